"""What the tests save: told apart by name, and recognised only if every bit, mode and time is right."""

from __future__ import annotations

import os
import stat
from pathlib import Path

NOTHING = "nothing"
NUMBERS = (*range(1, 10), 90, 91)
SIZES = {"inline": 300, "bytes": 70_000, "file": 90_000, "large": 17 * 2**20}


def data_of(name: str) -> bytes:
    """The bytes of ``inline 3``, ``bytes 3``, ``file 3`` or ``large 3``."""
    kind, number = name.split()
    size = SIZES[kind] + int(number)
    line = f"{name}\n".encode()
    return (line * (size // len(line) + 1))[:size]


def make_sources(folder: Path) -> None:
    """The files and folders that are saved, on disk."""
    for number in NUMBERS:
        file = folder / f"file-{number}"
        file.write_bytes(data_of(f"file {number}"))
        file.chmod(0o640 + number % 4)
        os.utime(file, ns=(1, 1_600_000_000_000_000_000 + number))
        _make_tree(folder / f"folder-{number}", number)


def _make_tree(folder: Path, number: int) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "empty").mkdir(mode=0o750)
    (folder / "name").write_bytes(b"folder %d\n" % number)
    (folder / "deep" / "er" / "some.bin").write_bytes(os.urandom(5_000) + bytes(20_000))
    (folder / "deep" / "link").symlink_to("er/some.bin")
    os.link(folder / "name", folder / "twin")
    (folder / "name").chmod(0o600)
    os.utime(folder / "deep", ns=(1, 1_500_000_000_000_000_000 + number))


def source(name: str, sources: Path) -> bytes | Path:
    """What to pass to ``save`` for a name."""
    kind, number = name.split()
    return sources / f"{kind}-{number}" if kind in ("file", "folder") else data_of(name)


def recognised(found: Path | None, sources: Path) -> str:
    """The name of what ``load`` gave, or what is wrong with it."""
    if found is None:
        return NOTHING
    if found.is_dir():
        name = (found / "name").read_text().strip()
        return name if tree_of(found) == tree_of(sources / name.replace(" ", "-")) else f"no {name}"
    data = found.read_bytes()
    name = data.partition(b"\n")[0].decode("ascii", "replace")
    if len(name) > 20 or data != data_of(name):
        return f"no {name[:20]} ({len(data)} bytes)"
    if name.startswith("file"):
        before, now = (sources / name.replace(" ", "-")).stat(), found.stat()
        if (before.st_mode, before.st_mtime_ns) != (now.st_mode, now.st_mtime_ns):
            return f"no {name}: mode {now.st_mode:o}, mtime {now.st_mtime_ns}"
    return name


def tree_of(folder: Path) -> dict[str, tuple[object, ...]]:
    """All there is to know of a folder."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        info = path.lstat()
        if path.is_symlink():
            what: tuple[object, ...] = ("link", os.readlink(path))
        elif path.is_dir():
            what = ("folder", stat.S_IMODE(info.st_mode), info.st_mtime_ns)
        else:
            what = ("file", stat.S_IMODE(info.st_mode), info.st_mtime_ns, info.st_nlink, path.read_bytes())
        found[str(path.relative_to(folder))] = what
    return found
