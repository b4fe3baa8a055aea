from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskckpt._archive import extract as _extract
from taskckpt._archive import gzip as _gzip
from taskckpt._archive import pack as _archive
from taskckpt._archive import tar as _tar
from taskckpt._archive.extract import Limits, extract
from taskckpt.errors import (
    DeniedError,
    NotFoundError,
    SourceChangedError,
    StorageFullError,
    UnavailableError,
    UnsafeArchiveError,
    UsageError,
)

NS = 10**9
MTIME_NS = 1_700_000_000_123_456_789
ROOM = Limits(bytes=1 << 40, entries=100_000)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    yield folder
    # shutil.rmtree, which pytest uses, may not be able to remove what a test made.
    subprocess.run(["rm", "-rf", str(folder), str(tmp_path / "target")], check=True)


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir(mode=0o700)
    return folder


def snapshot(root: Path) -> dict[bytes, tuple[object, ...]]:
    """All that a restore must bring back, looked at without the code under test."""
    first_names: dict[tuple[int, int], bytes] = {}

    def look(path: bytes) -> tuple[object, ...]:
        info = os.lstat(path)
        common = (stat.S_IFMT(info.st_mode), info.st_mtime_ns)
        if stat.S_ISLNK(info.st_mode):
            return *common, os.readlink(path)
        if stat.S_ISDIR(info.st_mode):
            return *common, stat.S_IMODE(info.st_mode)
        content = Path(os.fsdecode(path)).read_bytes()
        same = first_names.setdefault((info.st_dev, info.st_ino), path[len(base) :])
        return *common, stat.S_IMODE(info.st_mode), content, same

    base = os.fsencode(root)
    found = {b"": look(base)}
    for folder, folders, files in os.walk(base):
        folders.sort()
        for name in sorted(folders + files):
            path = os.path.join(folder, name)
            found[path[len(base) :]] = look(path)
    return found


def fill(root: Path) -> Path:
    """A tree with one of everything."""
    (root / "folder").mkdir(mode=0o750)
    (root / "empty folder").mkdir(mode=0o700)
    (root / "folder" / "file").write_bytes(b"content")
    (root / "folder" / "file").chmod(0o640)
    (root / "empty").write_bytes(b"")
    (root / "big").write_bytes(os.urandom(3_000_000))
    (root / ("long " * 30)).write_bytes(b"long name")
    (root / "n\xe4me \N{SNOWMAN}\nnewline").write_bytes(b"unicode")
    (Path(os.fsdecode(os.fsencode(root) + b"/not utf-8 \xff"))).write_bytes(b"bytes")
    (root / "deep").mkdir()
    nested = root / "deep"
    for _ in range(6):
        nested = nested / ("d" * 60)
        nested.mkdir()
    (nested / "file").write_bytes(b"deep down")
    (root / "hard link").hardlink_to(root / "folder" / "file")
    (root / "folder" / "up").symlink_to("../big")
    (root / "dangling").symlink_to("nowhere/./at//all")
    (root / "long link").symlink_to("x" * 150)
    (root / "folder link").symlink_to("folder")
    for number, name in enumerate(("folder/file", "empty", "big", "empty folder", "folder", ".")):
        os.utime(root / name, ns=(0, MTIME_NS + number))
    os.utime(root / "dangling", ns=(0, MTIME_NS), follow_symlinks=False)
    return root


def packed(root: Path) -> list[bytes]:
    tree = _archive.scan(root)
    chunks = list(map(bytes, _archive.pack(tree)))
    assert sum(map(len, chunks)) == tree.tar_size_bytes
    assert max(map(len, chunks)) <= 1 << 20
    return chunks


def test_a_tree_comes_back_as_it_was(root, target) -> None:
    before = snapshot(fill(root))
    tree = _archive.scan(root)
    assert tree.entry_count == len(before)
    assert tree.size_bytes == sum(
        p.lstat().st_size for p in root.rglob("*") if p.is_file() and not p.is_symlink()
    ) - len(
        b"content"  # has two names
    )
    # The exact limits suffice.
    extract(_archive.pack(tree), target, Limits(tree.size_bytes, tree.entry_count))
    assert snapshot(target) == before
    assert snapshot(root) == before


def test_order_is_deterministic_and_parents_come_first(root) -> None:
    names = [entry.name for entry in _archive.scan(fill(root)).entries]
    assert names == sorted(names, key=lambda name: name.split(b"/"))
    assert names[0] == b""
    assert packed(root) == packed(root)


@pytest.mark.parametrize("chunk", [1, 511, 4096])
def test_chunks_of_any_size_are_read(root, target, chunk) -> None:
    (root / "file").write_bytes(os.urandom(3000))
    stream = b"".join(packed(root))
    extract((stream[start : start + chunk] for start in range(0, len(stream), chunk)), target, ROOM)
    assert snapshot(target) == snapshot(root)


def test_the_root_may_be_a_symlink(root, target, tmp_path) -> None:
    (tmp_path / "link").symlink_to(root)
    (root / "file").write_bytes(b"x")
    extract(packed(tmp_path / "link"), target, ROOM)
    assert snapshot(target) == snapshot(root)


def test_an_empty_folder_comes_back(root, target) -> None:
    root.chmod(0o751)
    os.utime(root, ns=(0, MTIME_NS))
    extract(packed(root), target, ROOM)
    assert snapshot(target) == snapshot(root)


def test_through_gzip(root, target) -> None:
    extract(_gzip.decompress(_gzip.compress(packed(fill(root)))), target, ROOM)
    assert snapshot(target) == snapshot(root)


def test_setuid_setgid_and_sticky_are_left_behind(root, target) -> None:
    (root / "file").write_bytes(b"")
    (root / "file").chmod(0o6755)
    (root / "folder").mkdir()
    (root / "folder").chmod(0o1777)
    extract(packed(root), target, ROOM)
    assert stat.S_IMODE((target / "file").stat().st_mode) == 0o755
    assert stat.S_IMODE((target / "folder").stat().st_mode) == 0o777


def test_nested_folders_come_back_as_deep_as_allowed_and_can_be_removed(root, target) -> None:
    nest(root, _tar.MAX_DEPTH)
    extract(packed(root), target, ROOM)
    with _archive.OpenFolders(target) as folders:
        assert os.listdir(folders.fd(b"/".join([b"d"] * _tar.MAX_DEPTH))) == ["file"]
    shutil.rmtree(target / "d")  # recurses: deeper trees would make it fail


def nest(root: Path, depth: int) -> None:
    fd = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
        # Behind the folder in the order, so that the way back up is walked as well.
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)


def test_many_files_take_few_descriptors(root, target) -> None:
    resource = pytest.importorskip("resource")
    for number in range(300):
        (root / f"folder {number}").mkdir()
        (root / f"folder {number}" / "file").write_bytes(b"x")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 80, hard))
    try:
        extract(packed(root), target, ROOM)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list(target.iterdir())) == 300
    assert len(os.listdir("/dev/fd")) == used


# --- any tree ----------------------------------------------------------------------------------

names = (
    st.one_of(
        st.binary(min_size=1, max_size=8),
        st.text(min_size=1, max_size=60).map(lambda text: text.encode("utf-8", "replace")[:255]),
        st.sampled_from(
            [b" ", b"a b", b"new\nline", b"\xff\xfe", b"x" * 255, b"y" * 101, b"...", b"-rf", b"~", b"name "]
        ),
    )
    .map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_"))
    .filter(lambda name: name not in (b".", b".."))
)
steps = st.tuples(
    st.sampled_from(["file", "folder", "hard link", "symlink"]),
    st.integers(0, 100),  # which folder
    names,
    st.binary(max_size=600),
    st.integers(0, 0o777),
    st.integers(-(2**31) * NS, 2**33 * NS),
    st.integers(0, 100),  # what a link points to
)


def build(root: Path, plan: list[tuple[str, int, bytes, bytes, int, int, int]]) -> None:
    folders = [b""]
    files: list[bytes] = []
    settle: list[tuple[bytes, int, int]] = []
    base = os.fsencode(root)
    for kind, where, name, content, mode, mtime_ns, other in plan:
        relative = os.path.join(folders[where % len(folders)], name)
        path = os.path.join(base, relative)
        if os.path.lexists(path) or len(path) > 3000:
            continue
        if kind == "folder":
            os.mkdir(path)
            folders.append(relative)
            settle.append((path, mode | 0o700, mtime_ns))
        elif kind == "hard link" and files:
            os.link(files[other % len(files)], path)
        elif kind == "symlink":
            os.symlink(b"../" * (other % (relative.count(b"/") + 1)) + name + b"/x" * (other % 3), path)
            os.utime(path, ns=(0, mtime_ns), follow_symlinks=False)
        else:
            Path(os.fsdecode(path)).write_bytes(content)
            files.append(path)
            # Only root reads files without a bit for their owner.
            settle.append((path, mode if os.geteuid() == 0 else mode | 0o400, mtime_ns))
    for path, mode, mtime_ns in reversed(settle):
        os.chmod(path, mode)
        os.utime(path, ns=(0, mtime_ns))


@given(plan=st.lists(steps, max_size=15))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_tree_comes_back_and_gnu_tar_agrees(plan, tmp_path_factory) -> None:
    work = tmp_path_factory.mktemp("any")
    try:
        root, ours, theirs, back = (work / name for name in ("root", "ours", "theirs", "back"))
        for folder in (root, ours, theirs, back):
            folder.mkdir()
        build(root, plan)
        before = snapshot(root)
        stream = b"".join(packed(root))
        extract([stream], ours, ROOM)
        assert snapshot(ours) == before
        tar(["-xpf", "-", "-C", str(theirs)], stream)
        assert snapshot(theirs) == before
        made = tar(["-cf", "-", "--format=pax", "-C", str(root), "."], b"")
        extract([made], back, ROOM)
        assert snapshot(back) == before
    finally:
        subprocess.run(["chmod", "-R", "u+rwx", str(work)], check=True)
        shutil.rmtree(work)


def tar(arguments: list[str], stdin: bytes) -> bytes:
    return subprocess.run(["tar", *arguments], input=stdin, stdout=subprocess.PIPE, check=True).stdout


# --- other programs ----------------------------------------------------------------------------


def test_gnu_tar_and_tarfile_unpack_ours(root, target, tmp_path) -> None:
    before = snapshot(fill(root))
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(b"".join(map(bytes, _gzip.compress(packed(root)))))
    subprocess.run(["tar", "xzpf", str(archive), "-C", str(target)], check=True)
    assert snapshot(target) == before
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "tarfile", filter="fully_trusted")
    found = snapshot(tmp_path / "tarfile")
    assert found.keys() == before.keys()
    # Without the times: tarfile keeps them as floats.
    assert [entry[2:] for entry in found.values()] == [entry[2:] for entry in before.values()]


def whole_seconds(entries: dict[bytes, tuple[object, ...]]) -> dict[bytes, tuple[object, ...]]:
    return {name: (entry[0], int(entry[1]) // NS, *entry[2:]) for name, entry in entries.items()}  # type: ignore[call-overload]


@pytest.mark.parametrize("tar_format", ["gnu", "oldgnu", "pax", "ustar"])
def test_what_gnu_tar_packs_is_read(root, target, tar_format) -> None:
    before = snapshot(fill(root))
    if tar_format == "ustar":
        # The format has no room for it.
        subprocess.run(["rm", "-rf", root / "deep", root / ("long " * 30), root / "long link"], check=True)
        os.utime(root, ns=(0, MTIME_NS))
        before = snapshot(root)
    stream = tar(["-cf", "-", f"--format={tar_format}", "-C", str(root), "."], b"")
    extract([stream], target, ROOM)
    assert whole_seconds(snapshot(target)) == whole_seconds(before)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", [".", "saved"])
def test_what_tarfile_packs_is_read(root, target, tmp_path, tar_format, name) -> None:
    before = snapshot(fill(root))
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tar_format) as archive:
        archive.add(root, arcname=name)
    extract([path.read_bytes()], target, ROOM, foreign=True)
    found = whole_seconds(snapshot(target / name))
    wanted = whole_seconds(before)
    assert {key: entry[2:] for key, entry in found.items()} == {key: entry[2:] for key, entry in wanted.items()}
    assert found[b"/big"] == wanted[b"/big"]


def test_a_foreign_archive_may_leave_out_folders_and_have_more_mode_bits(target, tmp_path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, mode in (("a/b/file", 0o104755), ("a/c", 0o644)):
            info = tarfile.TarInfo(name)
            info.mode = mode
            archive.addfile(info)
        folder = tarfile.TarInfo("a")  # after what lies in it
        folder.type, folder.mode, folder.mtime = tarfile.DIRTYPE, 0o711, 1000
        archive.addfile(folder)
    extract([path.read_bytes()], target, Limits(bytes=0, entries=5), foreign=True)
    modes = {name: stat.S_IMODE((target / name).stat().st_mode) for name in ("a", "a/b", "a/b/file", "a/c")}
    assert modes == {"a": 0o711, "a/b": 0o755, "a/b/file": 0o755, "a/c": 0o644}
    assert (target / "a").stat().st_mtime == 1000
    shutil.rmtree(target / "a")
    with pytest.raises(UnsafeArchiveError, match=r"which is not in the archive before it|permission bits"):
        extract([path.read_bytes()], target, ROOM)
    # What is only implied counts, too.
    with pytest.raises(UnsafeArchiveError, match="more than the 2 entries"):
        extract([path.read_bytes()], target, Limits(bytes=0, entries=2), foreign=True)


def test_looks_like_tar(root) -> None:
    (root / "file").write_bytes(b"x")
    for tar_format in ("gnu", "pax", "ustar"):
        assert _extract.looks_like_tar(tar(["-cf", "-", f"--format={tar_format}", "-C", str(root), "."], b""))
    assert _extract.looks_like_tar(packed(root)[0])
    for other in (b"", bytes(511), bytes(512), bytes(10240), os.urandom(512), b"ustar" * 200):
        assert not _extract.looks_like_tar(other)


# --- what save refuses -------------------------------------------------------------------------


@pytest.mark.parametrize("target_of_link", ["/etc/passwd", "..", "../source/a", "a/..", "a/../b", "folder/../../x"])
def test_links_that_may_lead_out_are_refused(root, target_of_link) -> None:
    (root / "bad\nlink").symlink_to(target_of_link)
    with pytest.raises(UsageError, match=r"'bad\\nlink' is a symlink to .* outside") as caught:
        _archive.scan(root)
    assert caught.value.uri == str(root)
    assert caught.value.hint


def test_what_is_no_file_folder_or_link_is_refused(root) -> None:
    os.mkfifo(root / "pipe")
    with pytest.raises(UsageError, match="'pipe' is a FIFO"):
        _archive.scan(root)
    (root / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.open(".", os.O_RDONLY)
        os.chdir(root)  # the names of sockets are short
        bound.bind("sock")
        os.fchdir(here)
        os.close(here)
        with pytest.raises(UsageError, match="'sock' is a socket"):
            _archive.scan(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes: run the tests as root")
def test_devices_are_refused(root) -> None:
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    with pytest.raises(UsageError, match="'null' is a character device"):
        _archive.scan(root)


def test_too_deep_or_too_long_paths_are_refused(root) -> None:
    nest(root, _tar.MAX_DEPTH + 1)
    with pytest.raises(UsageError, match=f"more than {_tar.MAX_DEPTH} folders deep"):
        _archive.scan(root)
    subprocess.run(["rm", "-rf", str(root / "d")], check=True)
    fd = os.open(root, os.O_RDONLY)
    for _ in range(17):
        os.mkdir("x" * 250, dir_fd=fd)
        below = os.open("x" * 250, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    with pytest.raises(UsageError, match="path of more than 4096 bytes"):
        _archive.scan(root)


def test_a_root_that_is_no_folder(root) -> None:
    with pytest.raises(NotFoundError):
        _archive.scan(root / "missing")
    (root / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="not a folder"):
        _archive.scan(root / "file")


@pytest.mark.parametrize(("number", "error"), [(13, DeniedError), (1, DeniedError), (5, UnavailableError)])
def test_a_file_that_cannot_be_read_is_named(root, monkeypatch, number, error) -> None:
    (root / "secret").write_bytes(b"x")
    real = os.open

    def opening(path, flags, mode=0o777, *, dir_fd=None):
        if path == b"secret":
            raise OSError(number, os.strerror(number))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", opening)
    with pytest.raises(error, match="'secret'"):
        packed(root)


# --- a folder that changes meanwhile -----------------------------------------------------------


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size)


def rewrite_same_size_and_time(path: Path) -> None:
    info = path.stat()
    path.write_bytes(os.urandom(info.st_size))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("a")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def come_and_go(path: Path) -> None:
    path.write_bytes(b"")
    path.unlink()


def swap_folder(path: Path) -> None:
    path.rename(path.with_name("moved away"))
    path.mkdir()


CHANGES = [
    ("grew, not read yet", lambda root: truncate(root / "c", 400_001), "'c' grew"),
    ("grew, already read", lambda root: truncate(root / "a", 400_001), "'a' grew"),
    ("small one grew", lambda root: truncate(root / "small", 11), "'small' grew"),
    ("shrank, not read yet", lambda root: truncate(root / "c", 399_999), "'c' shrank"),
    ("shrank, already read", lambda root: truncate(root / "a", 1), "'a' shrank"),
    ("gone, not read yet", lambda root: (root / "c").unlink(), "'c' was gone"),
    ("gone, already read", lambda root: (root / "a").unlink(), "'a' was gone"),
    ("rewritten, not read yet", lambda root: rewrite_same_size_and_time(root / "c"), "'c' was rewritten"),
    ("rewritten, already read", lambda root: rewrite_same_size_and_time(root / "a"), "'a' was rewritten"),
    ("replaced, not read yet", lambda root: replace(root / "c"), "'c' was replaced"),
    ("replaced, already read", lambda root: replace(root / "a"), "'a' was replaced"),
    ("replaced by a link", lambda root: replace_by_link(root / "c"), "'c' was gone or replaced"),
    ("replaced by a pipe", lambda root: replace_by_pipe(root / "c"), "'c' was replaced"),
    ("other mode", lambda root: (root / "a").chmod(0o600), "'a' was rewritten or its attributes"),
    ("added at the end", lambda root: (root / "z").write_bytes(b""), "'z' was added"),
    ("added at the start", lambda root: (root / "A").write_bytes(b""), "'A' was added"),
    ("added in a folder", lambda root: (root / "folder" / "z").write_bytes(b""), "'folder/z' was added"),
    ("came and went", lambda root: come_and_go(root / "z"), r"'\.' was changed"),
    ("folder's mode", lambda root: (root / "folder").chmod(0o711), "'folder' was changed"),
    ("folder gone", lambda root: shutil.rmtree(root / "folder"), "'folder/in' was gone"),
    ("folder swapped", lambda root: swap_folder(root / "folder"), "'folder/in' was gone"),
    ("empty folder gone", lambda root: (root / "last").rmdir(), "'last' was gone"),
    (
        "link goes elsewhere",
        lambda root: ((root / "to").unlink(), (root / "to").symlink_to("x")),
        "'to' was (replaced|pointed elsewhere)",
    ),
    ("renamed", lambda root: (root / "a").rename(root / "b"), "'a' was gone"),
    ("root gone", lambda root: root.rename(root.with_name("elsewhere")), "gone|'c'"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_every_change_is_noticed_and_named(root, change, message) -> None:
    (root / "a").write_bytes(os.urandom(400_000))
    (root / "c").write_bytes(os.urandom(400_000))
    (root / "folder").mkdir()
    (root / "folder" / "in").write_bytes(b"in")
    (root / "last").mkdir()
    (root / "small").write_bytes(b"0123456789")
    (root / "to").symlink_to("a")
    chunks = map(bytes, _archive.pack(_archive.scan(root)))
    got = [next(chunks), next(chunks), next(chunks)]  # the headers before "a"; "a"; its padding and the header of "c"
    assert len(got[1]) == 400_000
    change(root)
    with pytest.raises(SourceChangedError, match=message) as caught:
        got.extend(chunks)
    assert caught.value.uri == str(root)
    # The end marks are never given, so nobody can take the stream for a whole one.
    with pytest.raises(Exception, match="ends before its end marks"):
        list(_tar.Reader(got, 100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: truncate(path, 1_500_000), "'big' shrank"),
        (lambda path: truncate(path, 5_000_000), "'big' grew"),
        (rewrite_same_size_and_time, "'big' was rewritten"),
    ],
)
def test_a_change_in_the_middle_of_a_file_is_noticed(root, change, message) -> None:
    (root / "big").write_bytes(bytes(4_000_000))
    chunks = _archive.pack(_archive.scan(root))
    next(chunks)
    next(chunks)
    change(root / "big")
    with pytest.raises(SourceChangedError, match=message):
        list(chunks)


def test_a_change_between_scan_and_pack_is_noticed(root) -> None:
    (root / "file").write_bytes(b"x")
    tree = _archive.scan(root)
    (root / "file").write_bytes(b"y")
    with pytest.raises(SourceChangedError, match="'file'"):
        list(_archive.pack(tree))


def test_two_writes_within_one_tick_of_the_clock_do_not_go_unnoticed(root, monkeypatch) -> None:
    # Reading waits until the tick of the newest write is over, so what is written later gets another time.
    (root / "file").write_bytes(b"x")
    tree = _archive.scan(root)
    newest = max(entry.ctime_ns for entry in tree.entries)
    list(_archive.pack(tree))
    assert time.time_ns() >= newest + 10_000_000
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    list(_archive.pack(tree))
    assert waits == []


def test_what_vanishes_between_listing_and_looking_is_a_change(root, monkeypatch) -> None:
    (root / "file").write_bytes(b"x")
    real = os.scandir

    class Vanishing:
        def __init__(self, fd):
            self.items = real(fd)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.items.close()

        def __iter__(self):
            for item in self.items:
                os.unlink(root / item.name)
                yield item

    monkeypatch.setattr(os, "scandir", Vanishing)
    with pytest.raises(SourceChangedError, match="'file' was gone"):
        _archive.scan(root)


# --- where the target does not play along --------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "error"),
    [(28, StorageFullError), (122, StorageFullError), (27, StorageFullError), (5, UnavailableError)],
)
def test_errors_of_the_target_are_typed(root, target, monkeypatch, number, error) -> None:
    (root / "file").write_bytes(b"content")
    stream = packed(root)

    def writing(fd, data):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", writing)
    with pytest.raises(error, match="'file'") as caught:
        extract(stream, target, ROOM)
    assert caught.value.uri == str(target)


def test_a_target_that_may_not_be_written(root, target, monkeypatch) -> None:
    (root / "folder").mkdir()
    stream = packed(root)

    def making(path, mode, *, dir_fd):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", making)
    with pytest.raises(DeniedError, match="'folder'"):
        extract(stream, target, ROOM)


def test_short_writes_are_completed(root, target, monkeypatch) -> None:
    (root / "file").write_bytes(os.urandom(5000))
    stream = packed(root)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    extract(stream, target, ROOM)
    assert (target / "file").read_bytes() == (root / "file").read_bytes()


def test_errors_of_the_stream_pass_through(target) -> None:
    def chunks():
        yield _tar.header(b"file", b"0", 0o600, 1000, 0)
        raise ConnectionResetError("the network")

    with pytest.raises(ConnectionResetError, match="the network"):
        extract(chunks(), target, ROOM)


def test_a_chunk_stays_as_it_is_until_the_next_is_asked_for(root) -> None:
    content = os.urandom(5_000_000)
    (root / "big").write_bytes(content)
    (root / "small").write_bytes(content[:300])
    seen = [(chunk, bytes(chunk)) for chunk in _archive.pack(_archive.scan(root))]
    assert content in b"".join(copy for _, copy in seen)
    # Whoever keeps chunks instead sees the buffer as it was filled last: that it is used again is what is wanted.
    assert sum(bytes(chunk) != copy for chunk, copy in seen) > 3
