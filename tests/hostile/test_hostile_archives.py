"""Archives built by hand from bytes, each with one thing that must never be restored.

Each gets a typed error within 2 seconds of CPU time and 16 MiB; a canary beside the target stays as it was.
The forms of known attacks on tarfile are in: CVE-2007-4559, CVE-2024-12718, CVE-2025-4138, -4330, -4435, -4517 and
-8194, CVE-2026-11940.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from taskckpt._archive import gzip as _gzip
from taskckpt._archive.extract import Limits, extract
from taskckpt.errors import CorruptCheckpointError, TaskckptError, UnavailableError, UnsafeArchiveError

MIB = 1 << 20
LIMITS = Limits(bytes=10 * MIB, entries=500)
END = bytes(1024)


def head(
    name: bytes = b"file",
    kind: bytes = b"0",
    *,
    mode: int | bytes = 0o644,
    size: int | bytes = 0,
    mtime: int | bytes = 1_700_000_000,
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    checksum_off: int = 0,
) -> bytes:
    """One header block, by the book of POSIX, unless told otherwise."""

    def field(value: int | bytes, width: int) -> bytes:
        return value.ljust(width, b"\0") if isinstance(value, bytes) else b"%0*o\0" % (width - 1, value)

    block = name.ljust(100, b"\0") + field(mode, 8) + b"0000000\0" * 2 + field(size, 12) + field(mtime, 12)
    rest = kind + link.ljust(100, b"\0") + magic + bytes(80) + prefix.ljust(155, b"\0") + bytes(12)
    total = sum(block) + 8 * 32 + sum(rest) + checksum_off
    block = block + b"%06o\0 " % total + rest
    assert len(block) == 512
    return block


def data(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def file(name: bytes, content: bytes = b"content", **fields) -> bytes:
    return head(name, size=len(content), **fields) + data(content)


def folder(name: bytes, **fields) -> bytes:
    return head(name, b"5", mode=fields.pop("mode", 0o755), **fields)


def symlink(name: bytes, target: bytes) -> bytes:
    return head(name, b"2", link=target)


def hard_link(name: bytes, target: bytes) -> bytes:
    return head(name, b"1", link=target)


def pax(kind: bytes = b"x", **records: bytes) -> bytes:
    content = b""
    for key, value in records.items():
        record = b" %b=%b\n" % (key.replace("_", ".").encode(), value)
        length = len(record) + len(str(len(record)))
        length += len(str(length)) - len(str(len(record)))
        content += b"%d%b" % (length, record)
    return raw_pax(content, kind)


def raw_pax(content: bytes, kind: bytes = b"x", **fields) -> bytes:
    return head(b"././@PaxHeader", kind, **({"size": len(content)} | fields)) + data(content)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    return head(b"././@LongLink", kind, size=len(name) + 1, magic=b"ustar  \0") + data(name + b"\0")


def negative(value: int) -> bytes:
    return value.to_bytes(12, "big", signed=True)


def deep_chain() -> bytes:
    """CVE-2025-4517: a path of links that is longer than PATH_MAX once resolved, so realpath gives up half-way."""
    parts, real, short = [], b"", b""
    for letter in b"abcdefghijklmno":
        parts.append(pax(path=real + b"d" * 247 + b"/") + folder(b"d/"))
        parts.append(pax(path=real + bytes([letter]), linkpath=b"d" * 247) + symlink(b"l", b"x"))
        real += b"d" * 247 + b"/"
        short += bytes([letter]) + b"/"
    long_link = short + b"l" * 254
    parts.append(pax(path=long_link, linkpath=b"../" * 15) + symlink(b"l", b"x"))
    parts.append(pax(linkpath=long_link + b"/../../canary") + symlink(b"escape", b"x"))
    parts.append(file(b"escape/victim", b"overwritten"))
    return b"".join(parts)


@dataclass(frozen=True)
class Case:
    """``foreign``: which kinds of reading must refuse it."""

    name: str
    stream: bytes
    why: str
    foreign: tuple[bool, ...] = (False, True)
    error: type[Exception] = UnsafeArchiveError


CASES = [
    # Names that climb out (CVE-2007-4559) or are none.
    Case("parent", file(b"../victim"), r"'\.\.'"),
    Case("parent in the middle", folder(b"a/") + file(b"a/../../victim"), r"'\.\.'"),
    Case("parent at the end", folder(b"a/") + folder(b"a/.."), r"'\.\.'"),
    Case("parent that stays inside", folder(b"a/") + file(b"a/../b"), r"'\.\.'"),
    Case("parent as a folder", folder(b"../canary/"), r"'\.\.'"),
    Case("parent in pax path", pax(path=b"../victim") + file(b"innocent"), r"'\.\.'"),
    Case("parent in GNU long name", long_name(b"../victim") + file(b"innocent"), r"'\.\.'"),
    Case("parent in prefix", file(b"victim", prefix=b".."), r"'\.\.'"),
    Case("absolute", file(b"/tmp/victim"), "absolute"),
    Case("absolute with two slashes", file(b"//tmp/victim"), "absolute"),
    Case("absolute folder", folder(b"/tmp/"), "absolute"),
    Case("the root of all", folder(b"/"), "absolute"),
    Case("absolute in pax path", pax(path=b"/tmp/victim") + file(b"innocent"), "absolute"),
    Case("absolute in prefix", file(b"victim", prefix=b"/tmp"), "absolute"),
    Case("empty name", file(b""), "empty name"),
    Case("empty pax path", pax(path=b"") + file(b"innocent"), "empty name"),
    Case("NUL in pax path", pax(path=b"a\0b") + file(b"innocent"), "NUL"),
    Case("NUL in GNU long name", long_name(b"a\0b") + file(b"innocent"), "NUL"),
    Case("NUL in a link's target", pax(linkpath=b"a\0b") + symlink(b"l", b"x"), "NUL"),
    Case("file with a trailing slash", file(b"a/"), "slash"),
    Case("file as the root", file(b"."), "root"),
    Case("symlink as the root", symlink(b"./", b"a"), "slash|root"),
    Case("symlink as the root, bare", symlink(b".", b"a"), "root"),
    Case("root twice", folder(b"./") + folder(b"."), "twice"),
    # Lengths and depths.
    Case("component of 256 bytes", pax(path=b"x" * 256) + file(b"x"), "component"),
    Case("path of 5000 bytes", pax(path=b"/".join([b"x" * 99] * 50)) + file(b"x"), "path of more"),
    Case("depth 1001", pax(path=b"d/" * 1001 + b"x") + file(b"x"), "folders deep"),
    Case("depth 5000", pax(path=b"d/" * 5000 + b"x") + file(b"x"), "path of more"),
    Case("missing parent", file(b"a/b"), "not in the archive", (False,)),
    Case("parent only later", file(b"a/b") + folder(b"a/"), "not in the archive", (False,)),
    # Names that clash.
    Case("file twice", file(b"a") + file(b"a"), "twice"),
    Case("file twice, spelt differently", file(b"a") + file(b"./a"), "twice"),
    Case("folder twice", folder(b"a/") + folder(b"a/"), "twice"),
    Case("folder over file", file(b"a") + folder(b"a/"), "twice"),
    Case("file over folder", folder(b"a/") + file(b"a"), "twice"),
    Case("below a file", file(b"a") + file(b"a/b"), "not a folder"),
    Case("hard link over file", file(b"a") + file(b"b") + hard_link(b"b", b"a"), "twice"),
    Case("symlink twice", symlink(b"a", b"x") + symlink(b"a", b"y"), "twice"),
    # Symlinks.
    Case("absolute symlink", symlink(b"a", b"/etc/passwd"), "symlink"),
    Case("absolute pax symlink", pax(linkpath=b"/etc") + symlink(b"a", b"x"), "symlink"),
    Case("absolute GNU symlink", long_name(b"/etc", b"K") + symlink(b"a", b"x"), "symlink"),
    Case("symlink up", symlink(b"a", b"../canary"), "symlink"),
    Case("symlink up from a folder", folder(b"d/") + symlink(b"d/a", b"../../canary"), "symlink"),
    Case("symlink down and up", folder(b"d/") + symlink(b"a", b"d/../.."), "symlink"),
    Case("symlink through a symlink", symlink(b"a", b".") + symlink(b"b", b"a/.."), "symlink"),
    Case("empty symlink", symlink(b"a", b""), "symlink"),
    Case("symlink of 5000 bytes", pax(linkpath=b"x/" * 2500) + symlink(b"a", b"x"), "symlink"),
    Case("file through a symlink", folder(b"d/") + symlink(b"l", b"d") + file(b"l/x"), "not a folder"),
    Case("file through a dangling symlink", symlink(b"l", b"gone") + file(b"l/x"), "not a folder"),
    Case("file over a symlink", symlink(b"l", b"x") + file(b"l"), "twice"),
    Case("chmod of a symlink's target", symlink(b"l", b"x") + folder(b"l/", mode=0o777), "twice"),
    Case("folder through a symlink", folder(b"d/") + symlink(b"d/l", b".") + folder(b"d/l/x/"), "not a folder"),
    Case("realpath confusion (CVE-2025-4517)", deep_chain(), "not a folder"),
    Case("realpath by many dots", pax(linkpath=b"a/" * 300 + b"../" * 300) + symlink(b"l", b"x"), "symlink"),
    # Hard links.
    Case("hard link to outside", hard_link(b"l", b"../canary/victim"), "hard link"),
    Case("absolute hard link", hard_link(b"l", b"/etc/passwd"), "hard link"),
    Case("absolute spelling of a file", file(b"a") + hard_link(b"l", b"/a"), "hard link"),
    Case("hard link to nothing", hard_link(b"l", b"missing"), "hard link"),
    Case("hard link to itself", hard_link(b"l", b"l"), "hard link"),
    Case("hard link to a later file", hard_link(b"l", b"a") + file(b"a"), "hard link"),
    Case("hard link to a folder", folder(b"d/") + hard_link(b"l", b"d"), "hard link"),
    Case("hard link to a symlink", symlink(b"s", b"x") + hard_link(b"l", b"s"), "hard link"),
    Case("hard link to the root", hard_link(b"l", b"."), "hard link"),
    Case("empty hard link", hard_link(b"l", b""), "hard link"),
    Case(
        "hard link to a deeper dangling symlink (CVE-2026-11940)",
        folder(b"a/") + folder(b"a/b/") + symlink(b"a/b/s", b"../../x") + hard_link(b"l", b"a/b/s"),
        "hard link",
    ),
    Case(
        "hard link through a symlink",
        folder(b"d/") + file(b"d/f") + symlink(b"s", b"d") + hard_link(b"l", b"s/f"),
        "hard link",
    ),
    Case(
        "hard link with content", file(b"a") + head(b"l", b"1", link=b"a", size=7) + data(b"evil..."), "claims 7 bytes"
    ),
    # Types and modes.
    Case("character device", head(b"null", b"3"), "character device"),
    Case("block device", head(b"sda", b"4"), "block device"),
    Case("FIFO", head(b"pipe", b"6"), "FIFO"),
    Case("GNU sparse file", head(b"s", b"S", magic=b"ustar  \0"), "sparse"),
    Case("pax sparse file", pax(GNU_sparse_major=b"1", GNU_sparse_minor=b"0") + file(b"s"), "sparse"),
    Case("unknown type", head(b"v", b"V"), "unknown type"),
    Case("contiguous file", head(b"c", b"7"), "unknown type"),
    Case("folder with content", head(b"d/", b"5", size=512) + data(b"x" * 512), "claims 512 bytes"),
    Case("symlink with content", head(b"l", b"2", link=b"x", size=1) + data(b"x"), "claims 1 bytes"),
    Case("setuid", file(b"a", mode=0o4755), "permission bits", (False,)),
    Case("setgid", file(b"a", mode=0o2755), "permission bits", (False,)),
    Case("sticky", folder(b"d/", mode=0o1777), "permission bits", (False,)),
    Case("negative mode", file(b"a", mode=b"\xff" * 8), "absurd"),
    Case("absurd time", file(b"a", mtime=b"\x80" + b"\x7f" * 11), "absurd"),
    # Sizes (CVE-2025-8194: a negative one sent tarfile round in circles).
    Case("negative size", head(b"a", size=negative(-512)), "negative size"),
    Case(
        "negative size of an extended header",
        raw_pax(b"", size=negative(-512)) + file(b"a"),
        "extended header claims -512",
    ),
    Case("negative pax size", pax(size=b"-512") + file(b"a"), "plain number"),
    Case("size of 8 EiB", head(b"a", size=b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7), "exceeds"),
    Case("pax size of 21 digits", pax(size=b"9" * 21) + file(b"a"), "plain number"),
    Case("pax size over the limit", pax(size=b"99999999999") + file(b"a"), "exceeds"),
    Case("one byte over the limit", head(b"a", size=10 * MIB + 1), "exceeds"),
    Case("over the limit in sum", head(b"a", size=10 * MIB) + bytes(10 * MIB) + file(b"b", b"x"), "exceeds"),
    Case("too many entries", b"".join(file(b"%d" % number, b"") for number in range(501)), "500 entries"),
    Case(
        "too many implied folders",
        b"".join(pax(path=b"%d/" % number + b"d/" * 100) + file(b"x", b"") for number in range(6)),
        "slash|entries",
    ),
    Case(
        "too many implied folders of files",
        b"".join(pax(path=b"%d/" % number + b"d/" * 100 + b"f") + file(b"x", b"") for number in range(6)),
        "500 entries",
        (True,),
    ),
    # Extended headers.
    Case("pax header of 4 GiB", raw_pax(b"", size=4 << 30) + bytes(8192), "claims 4294967296 bytes"),
    Case("GNU long name of 4 GiB", head(b"L", b"L", size=4 << 30) + bytes(8192), "claims 4294967296 bytes"),
    Case("global header of 4 GiB", raw_pax(b"", b"g", size=4 << 30), "claims 4294967296 bytes"),
    Case("pax in pax", pax(path=b"a") + pax(path=b"b") + file(b"c"), "another header"),
    Case("long name in long name", long_name(b"a") + long_name(b"b") + file(b"c"), "another header"),
    Case("long name in pax", pax(path=b"a") + long_name(b"b") + file(b"c"), "another header"),
    Case("global header in pax", pax(path=b"a") + pax(b"g", path=b"b") + file(b"c"), "another header"),
    Case("5000 pax headers in a row", pax(comment=b"x") * 5000 + file(b"a"), "another header"),
    Case("endless global headers", raw_pax(b"", b"g") * 80_000, "larger than its entries allow"),
    Case("pax record over its end", raw_pax(b"99 path=a\n") + file(b"x"), "malformed", error=CorruptCheckpointError),
    Case("pax record of length 0", raw_pax(b"0 path=a\n") + file(b"x"), "malformed", error=CorruptCheckpointError),
    Case(
        "pax record of negative length", raw_pax(b"-9 path=a\n") + file(b"x"), "malformed", error=CorruptCheckpointError
    ),
    Case(
        "pax length of a million digits",
        raw_pax(b"1" * 1_000_000) + file(b"x"),
        "malformed",
        error=CorruptCheckpointError,
    ),
    Case("pax record without =", raw_pax(b"8 pathx\n") + file(b"x"), "malformed", error=CorruptCheckpointError),
    Case("pax time in words", pax(mtime=b"nan") + file(b"x"), "decimal", error=CorruptCheckpointError),
    Case("pax time with an exponent", pax(mtime=b"1e400") + file(b"x"), "decimal", error=CorruptCheckpointError),
    # Damage: tarfile takes the first three for the end of the archive and calls it a success.
    Case("broken second header", file(b"a") + file(b"b", checksum_off=1), "checksum", error=CorruptCheckpointError),
    Case("garbage as second header", file(b"a") + os.urandom(512), "checksum|number", error=CorruptCheckpointError),
    Case("early zero block", file(b"a") + bytes(512) + file(b"b"), "single zero block", error=CorruptCheckpointError),
    Case("data after the end", file(b"a") + END + file(b"b"), "after|follows", error=CorruptCheckpointError),
    Case("late data after the end", file(b"a") + bytes(99_999) + b"x", "follows", error=CorruptCheckpointError),
    Case("much padding", file(b"a") + bytes(3 * MIB), "padding"),
    Case("no magic", head(b"a", magic=bytes(8)), "magic", error=CorruptCheckpointError),
    Case("octal with an underscore", head(b"a", size=b"0000000_7\0"), "number", error=CorruptCheckpointError),
    Case("octal with a sign", head(b"a", size=b"-7\0"), "number", error=CorruptCheckpointError),
    Case("octal with digits that are none", head(b"a", size=b"99\0"), "number", error=CorruptCheckpointError),
    Case("pax header at the end", file(b"a") + pax(path=b"x"), "no entry behind", error=CorruptCheckpointError),
]
# These end too early, so no end is added.
CUTS = [
    Case("empty", b"", "ends before", error=CorruptCheckpointError),
    Case("no end", file(b"a"), "ends before", error=CorruptCheckpointError),
    Case("half an end", file(b"a") + bytes(512), "ends before", error=CorruptCheckpointError),
    Case("half a header", file(b"a") + head(b"b")[:300], "ends before", error=CorruptCheckpointError),
    Case("half a file", head(b"a", size=4096) + b"x" * 1000, "ends before", error=CorruptCheckpointError),
    Case(
        "half a pax header",
        raw_pax(b"")[:512] + raw_pax(b"", size=900_000),
        "another|ends before",
        error=CorruptCheckpointError,
    ),
]


@pytest.fixture
def canary(tmp_path) -> Iterator[Path]:
    """A tree beside the target that nothing may touch; looked at afterwards."""
    root = tmp_path / "canary"
    (root / "folder").mkdir(parents=True)
    (root / "victim").write_bytes(b"untouched")
    (root / "folder" / "file").write_bytes(b"untouched, too")
    (root / "victim").chmod(0o640)
    (root / "folder").chmod(0o751)
    for path in (root / "victim", root / "folder" / "file", root / "folder", root):
        os.utime(path, ns=(0, 1_600_000_000_000_000_000))
    before = look(tmp_path)
    yield root
    assert look(tmp_path) == before


def look(parent: Path) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = [tuple(sorted(path.name for path in parent.iterdir() if path.name != "target"))]
    for path in [*sorted((parent / "canary").rglob("*")), parent / "canary"]:
        info = path.lstat()
        content = path.read_bytes() if path.is_file() else sorted(path.iterdir())
        found.append((path, info.st_mode, info.st_mtime_ns, info.st_nlink, info.st_ino, info.st_ctime_ns, content))
    return found


@pytest.fixture
def target(canary, tmp_path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir(mode=0o700)
    return folder


RUNS = [
    pytest.param(
        case, case.stream + (b"" if case in CUTS else END), foreign, id=f"{case.name}-{'foreign' if foreign else 'own'}"
    )
    for case in CASES + CUTS
    for foreign in case.foreign
]


@pytest.mark.parametrize(("case", "stream", "foreign"), RUNS)
def test_hostile_archive_is_refused(case, stream, foreign, target) -> None:
    pieces = [stream[start : start + 65_537] for start in range(0, len(stream), 65_537)]
    started = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match=case.why) as caught:
            extract(pieces, target, LIMITS, foreign=foreign)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(caught.value, case.error)
    assert time.process_time() - started < 2
    assert peak < 16 * MIB
    nothing_special(target)


def nothing_special(root: Path) -> None:
    """What a refused archive leaves behind are files, folders and links that stay inside."""
    inside = os.path.realpath(root)
    for folder_name, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder_name, name)
            mode = os.lstat(path).st_mode
            assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
            assert not mode & 0o7000
            assert not stat.S_ISLNK(mode) or os.path.realpath(path).startswith(inside)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) + len(CUTS) >= 100
    assert len({case.name for case in CASES + CUTS}) == len(CASES + CUTS)


def test_the_builder_builds_good_archives_too(target) -> None:
    # Otherwise the refusals above would prove nothing.
    stream = folder(b"./") + folder(b"d/") + file(b"d/f") + symlink(b"d/l", b"../x") + hard_link(b"h", b"d/f")
    stream += (
        pax(path=b"long " * 30) + file(b"x") + long_name(b"d/gnu " * 1) + file(b"y") + file(b"p", prefix=b"d") + END
    )
    extract([stream], target, LIMITS)
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*")) == [
        "d",
        "d/f",
        "d/gnu ",
        "d/l",
        "d/p",
        "h",
        "long " * 30,
    ]
    assert os.readlink(target / "d" / "l") == "../x"
    assert (target / "h").samefile(target / "d" / "f")


def test_a_chain_of_good_links_stays_inside(target) -> None:
    """As many links as one likes, each allowed: where they end is still inside (the rule is sound by induction)."""
    parts, path = [], b""
    for _ in range(20):
        path += b"d/"
        parts.append(folder(path))
    parts += [
        symlink(path + b"up", b"../" * 20),
        symlink(b"down", b"d/" * 20 + b"up"),
        symlink(b"x", b"down/down/down/x"),
    ]
    extract([b"".join(parts) + END], target, LIMITS)
    nothing_special(target)
    assert os.path.realpath(target / "down") == os.path.realpath(target)


def test_a_gzip_bomb_stops_at_the_limit(target) -> None:
    def bomb() -> Iterator[bytes]:
        yield head(b"zeros", size=7 << 30)
        for _ in range(7 << 10):
            yield bytes(MIB)

    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(UnsafeArchiveError, match="exceeds"):
        extract(_gzip.decompress(_gzip.compress(bomb())), target, LIMITS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - started < 2
    assert peak < 64 * MIB
    assert list(target.iterdir()) == []


def test_a_bomb_of_padding_stops_at_the_limit(target) -> None:
    stream = _gzip.compress([END] + [bytes(MIB)] * 256)
    with pytest.raises(UnsafeArchiveError, match="padding"):
        extract(_gzip.decompress(stream), target, LIMITS)


def test_a_target_that_is_not_empty_is_never_overwritten(target) -> None:
    (target / "file").write_bytes(b"mine")
    with pytest.raises(UnsafeArchiveError, match="clashes"):
        extract([file(b"file") + END], target, LIMITS)
    assert (target / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("entry", [file(b"link/victim"), folder(b"link/new/"), folder(b"link/")])
def test_a_link_that_waits_in_the_target_is_not_followed(canary, target, entry) -> None:
    (target / "link").symlink_to(canary)
    with pytest.raises(TaskckptError):
        extract([(b"" if entry == folder(b"link/") else folder(b"link/")) + entry + END], target, LIMITS)
    with pytest.raises(TaskckptError):
        extract([entry + END], target, LIMITS, foreign=True)


class Swapper(threading.Thread):
    """Keeps swapping the subfolders of the current target for symlinks to the canary, and back."""

    def __init__(self, canary: Path) -> None:
        super().__init__(daemon=True)
        self.canary = canary
        self.current: Path | None = None
        self.ended = False
        self.swaps = 0

    def run(self) -> None:
        while not self.ended:
            if self.current is not None:
                for number in range(4):
                    self.swap(str(self.current / f"d{number}"))

    def swap(self, path: str) -> None:
        try:
            os.rename(path, path + ".away")
            os.symlink(self.canary, path)
            self.swaps += 1
            time.sleep(0)
            os.unlink(path)
            os.rename(path + ".away", path)
        except OSError:
            time.sleep(0)  # not there yet, or the extraction made one meanwhile


def test_another_process_that_swaps_folders_for_links_leads_nothing_out(canary, target) -> None:
    """TOCTOU. realpath-then-open escapes in 1.5 % of the writes of such a run (reliability.md); this must not once."""
    files = [folder(b"d%d/" % number) for number in range(4)]
    files += [file(b"d%d/%d" % (number % 4, number)) for number in range(200)]
    files += [folder(b"d%d/sub%d/" % (number % 4, number)) for number in range(100)]
    files += [hard_link(b"d%d/h%d" % (number % 4, number), b"d1/1") for number in range(20)]
    files += [symlink(b"d%d/s%d" % (number % 4, number), b"../d1") for number in range(20)]
    stream = b"".join(files) + END
    swapper = Swapper(canary)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    swapper.start()
    rounds = 0
    ends = time.monotonic() + 12
    try:
        while (rounds < 20 or swapper.swaps < 1000) and time.monotonic() < ends:
            swapper.current = target / str(rounds)
            swapper.current.mkdir(mode=0o700)
            # Whether it ends well or with a typed error is chance; what counts is the canary.
            with contextlib.suppress(UnavailableError, UnsafeArchiveError):
                extract([stream], swapper.current, LIMITS)
            rounds += 1
    finally:
        swapper.ended = True
        swapper.join()
        sys.setswitchinterval(interval)
    assert rounds > 1
    assert swapper.swaps > 100
