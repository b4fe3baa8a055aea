"""Scan a folder and pack it as a tar stream, noticing every change on the way.

``scan`` looks at all names, types, sizes and times; ``pack`` reads the files and, before it gives the end marks of the
archive, looks at all of it a second time. So a stream that was given to its end is the folder as it was at one
moment: every file was read between two looks that found the same size, times and inode.
What could not be restored is refused in ``scan``: the limits are those of ``tar.py``, which the reader shares.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn, Self

from taskckpt._archive import tar
from taskckpt._archive.tar import FILE, FOLDER, LINK, SYMLINK, show
from taskckpt.errors import (
    DeniedError,
    NotFoundError,
    SourceChangedError,
    TaskckptError,
    UnavailableError,
    UsageError,
)

CHUNK_BYTES = 1 << 20
# Smaller files are read in one call and share a chunk with their neighbours.
_SMALL_BYTES = 256 << 10
# The coarsest tick of a kernel (HZ=100): two writes within one may leave the same time stamp.
_CLOCK_TICK_NS = 10_000_000
_OPEN_FOLDERS = 64
_PADDINGS = tuple(map(bytes, range(tar.BLOCK)))

_QUIET = "Save when nothing writes to the folder, or let writers use a temporary name and rename."
_GONE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ESTALE))

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_READ_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS = {stat.S_IFREG: FILE, stat.S_IFDIR: FOLDER, stat.S_IFLNK: SYMLINK}
_REFUSED = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class Entry(NamedTuple):
    """One name of a tree as ``lstat`` saw it. A tuple, as ``tar.Member`` is: one is made per file, twice per save.

    ``name`` is relative to the root (which is ``b""``). ``size`` is 0 for all but files. The second and later names
    of one file have the kind ``LINK`` and the first name as ``target``.
    """

    name: bytes
    kind: bytes
    mode: int
    size: int
    mtime_ns: int
    target: bytes
    ctime_ns: int
    inode: int
    device: int
    links: int


@dataclass(frozen=True, slots=True)
class Tree:
    """A folder as ``scan`` found it: parents before children, the names of a folder sorted by bytes.

    Attributes:
        root: The folder.
        entries: All of it; the first is the root itself.
        size_bytes: Sum of the sizes of all files, each counted once however many names it has.
        tar_size_bytes: Exact length of the stream that ``pack`` gives.
    """

    root: Path
    entries: tuple[Entry, ...]
    size_bytes: int
    tar_size_bytes: int

    @property
    def entry_count(self) -> int:
        """Number of entries, the root and empty folders included."""
        return len(self.entries)


class OpenFolders:
    """Descriptors of folders below a root, each opened relative to its parent and never through a symlink.

    At most 64 are open at a time, so a tree of any depth can be walked; names are relative bytes, ``b""`` is the root.
    A descriptor is valid until the next call: ``os.dup`` it to keep it. ``OSError`` passes through. Not thread-safe.
    """

    __slots__ = ("_last", "_last_fd", "_opened", "root_fd")

    def __init__(self, root: Path) -> None:
        self.root_fd = os.open(root, _READ_FOLDER)
        self._opened: dict[bytes, int] = {}
        self._last = b""
        self._last_fd = self.root_fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self._opened.values():
            os.close(fd)
        self._opened.clear()
        os.close(self.root_fd)

    def fd(self, name: bytes) -> int:
        """The descriptor of the folder ``name``."""
        if name == self._last:
            return self._last_fd
        missing = []
        ancestor = name
        while ancestor and ancestor not in self._opened:
            missing.append(ancestor)
            ancestor = ancestor.rpartition(b"/")[0]
        fd = self.root_fd
        if ancestor:
            fd = self._opened.pop(ancestor)
            self._opened[ancestor] = fd
        for folder in reversed(missing):
            fd = self._open(folder, fd)
        self._last, self._last_fd = name, fd
        return fd

    def _open(self, folder: bytes, parent_fd: int) -> int:
        fd = os.open(folder.rpartition(b"/")[2], _READ_FOLDER | os.O_NOFOLLOW, dir_fd=parent_fd)
        self._opened[folder] = fd
        if len(self._opened) > _OPEN_FOLDERS:
            oldest = next(iter(self._opened))
            os.close(self._opened.pop(oldest))
            if oldest == self._last:
                self._last, self._last_fd = b"", self.root_fd
        return fd


def scan(root: Path) -> Tree:
    """Look at everything below ``root``, a folder or a symlink to one, without reading any file.

    Raises:
        UsageError: ``root`` is no folder, or holds what no restore could bring back: sockets, FIFOs, devices, symlinks
            that could lead out of it, paths beyond the limits.
        NotFoundError: There is no ``root``.
        SourceChangedError: Something vanished while it was looked at.
        DeniedError: A folder cannot be read.
    """
    entries = []
    size_bytes = 0
    tar_size_bytes = len(tar.END)
    with _open_given(root) as folders:
        for entry in _walk(root, folders):
            entries.append(entry)
            size = entry.size
            size_bytes += size
            tar_size_bytes += tar.header_size(_tar_name(entry), size, entry.mtime_ns, entry.target)
            tar_size_bytes += size + -size % tar.BLOCK
    return Tree(root, tuple(entries), size_bytes, tar_size_bytes)


def pack(tree: Tree) -> Generator[bytes | memoryview]:
    """The uncompressed tar stream of a scanned folder, in chunks of at most 1 MiB, small files together in one.

    A chunk is valid until the next is asked for. The last one comes only after a second look at the whole folder found
    it unchanged.

    Raises:
        SourceChangedError: Something changed since ``scan``; the message names it. Scan and pack again.
        DeniedError: A file cannot be read.
        UnavailableError: The disk failed to read one.
    """
    with reading(tree) as folders:
        yield from _contents(tree, folders)
    yield tar.END


@contextmanager
def reading(tree: Tree) -> Generator[OpenFolders]:
    """For whoever reads all files of a scanned folder: at the end, all of it must be as it was.

    Raises:
        SourceChangedError: Something changed since ``scan``; the message names it.
    """
    _wait_for_next_tick(tree)
    with _open_root(tree.root) as folders:
        yield folders
    _compare(tree)


def _wait_for_next_tick(tree: Tree) -> None:
    # A file written twice within one tick of the kernel's clock keeps its times. Reading only after the tick in which
    # the newest was written makes every later write visible.
    newest = max(entry.ctime_ns for entry in tree.entries)
    wait_ns = newest + _CLOCK_TICK_NS - time.time_ns()
    if 0 < wait_ns <= _CLOCK_TICK_NS:
        time.sleep(wait_ns / 1e9)


def _tar_name(entry: Entry) -> bytes:
    if entry.kind == FOLDER:
        return (entry.name or b".") + b"/"
    return entry.name


def _open_given(root: Path) -> OpenFolders:
    try:
        return OpenFolders(root)
    except FileNotFoundError as error:
        raise NotFoundError("There is no such folder.", uri=str(root)) from error
    except NotADirectoryError as error:
        raise UsageError("This is not a folder.", uri=str(root)) from error
    except OSError as error:
        raise _failed(error, root, b"") from error


def _open_root(root: Path) -> OpenFolders:
    try:
        return OpenFolders(root)
    except OSError as error:
        raise _failed(error, root, b"") from error


def _failed(error: OSError, root: Path, name: bytes) -> TaskckptError:
    uri = str(root)
    shown = show(name or b".")
    if error.errno in _GONE:
        return SourceChangedError(f"{shown} was gone or replaced when it was to be read.", uri=uri, hint=_QUIET)
    if isinstance(error, PermissionError):
        return DeniedError(f"{shown} may not be read.", uri=uri, hint="Make it readable or move it out of the folder.")
    return UnavailableError(f"{shown} could not be read: {error.strerror}.", uri=uri)


def _walk(root: Path, folders: OpenFolders) -> Iterator[Entry]:
    """All entries, depth first. What waits to be visited is kept, so memory grows with the widest folders only."""
    first_names: dict[tuple[int, int], bytes] = {}
    info = os.fstat(folders.root_fd)
    pending = [_entry(b"", FOLDER, info, b"")]
    while pending:
        entry = pending.pop()
        if entry.kind == FOLDER:
            yield entry
            try:
                children = _children(root, folders, entry.name)
            except TaskckptError:
                raise  # some of them are OSErrors too, and already say which name it was
            except OSError as error:
                raise _failed(error, root, entry.name) from error
            children.sort(reverse=True)
            pending += children
            continue
        if entry.links > 1 and entry.kind == FILE:
            first = first_names.setdefault((entry.device, entry.inode), entry.name)
            if first != entry.name:
                entry = entry._replace(kind=LINK, size=0, target=first)
        yield entry


def _entry(name: bytes, kind: bytes, info: os.stat_result, target: bytes) -> Entry:
    return Entry(
        name,
        kind,
        info.st_mode & 0o777,
        info.st_size if kind == FILE else 0,
        info.st_mtime_ns,
        target,
        info.st_ctime_ns,
        info.st_ino,
        info.st_dev,
        info.st_nlink if kind == FILE else 0,
    )


def _children(root: Path, folders: OpenFolders, folder: bytes) -> list[Entry]:
    fd = folders.fd(folder)
    prefix = folder + b"/" if folder else b""
    children = []
    with os.scandir(fd) as items:
        for item in items:
            name = prefix + os.fsencode(item.name)
            try:
                info = item.stat(follow_symlinks=False)
            except OSError as error:
                raise _failed(error, root, name) from error
            kind = _KINDS.get(stat.S_IFMT(info.st_mode))
            target = b""
            if kind is None:
                _refuse(root, name, f"is {_REFUSED.get(stat.S_IFMT(info.st_mode), 'neither file, folder nor link')}")
            elif kind == SYMLINK:
                target = _link_target(root, name, fd)
            if len(name) > tar.MAX_NAME_BYTES:
                _check_length(root, name)
            children.append(_entry(name, kind, info, target))
    return children


def _link_target(root: Path, name: bytes, folder_fd: int) -> bytes:
    try:
        target = os.readlink(name.rpartition(b"/")[2], dir_fd=folder_fd)
    except OSError as error:
        raise _failed(error, root, name) from error
    if not tar.link_stays_inside(target, name.count(b"/")):
        _refuse(root, name, f"is a symlink to {show(target)}, which may lie outside of the folder")
    return target


def _check_length(root: Path, name: bytes) -> None:
    # The folder's trailing slash counts too.
    if len(name) >= tar.MAX_PATH_BYTES:
        _refuse(root, name, f"is a path of more than {tar.MAX_PATH_BYTES} bytes")
    if name.count(b"/") > tar.MAX_DEPTH:
        _refuse(root, name, f"lies more than {tar.MAX_DEPTH} folders deep")
    if len(name.rpartition(b"/")[2]) > tar.MAX_NAME_BYTES:
        _refuse(root, name, f"is a name of more than {tar.MAX_NAME_BYTES} bytes")


def _refuse(root: Path, name: bytes, why: str) -> NoReturn:
    raise UsageError(
        f"{show(name)} {why}: it could not be restored.",
        uri=str(root),
        hint="Move it out of the folder that is saved; symlinks must be relative and stay inside.",
    )


def _contents(tree: Tree, folders: OpenFolders) -> Iterator[bytes | memoryview]:
    parts: list[bytes] = []
    filled = 0
    for entry in tree.entries:
        size = entry.size
        head = tar.header(_tar_name(entry), entry.kind, entry.mode, size, entry.mtime_ns, entry.target)
        padding = -size % tar.BLOCK
        if filled + len(head) + size + padding > CHUNK_BYTES and parts:
            yield b"".join(parts)
            parts.clear()
            filled = 0
        parts.append(head)
        if size > _SMALL_BYTES:
            yield b"".join(parts)
            yield from _read_large(tree.root, folders, entry)
            parts.clear()
            filled = -len(head) - size
        elif entry.kind == FILE:
            parts.append(_read_small(tree.root, folders, entry))
        if padding:
            parts.append(_PADDINGS[padding])
        filled += len(head) + size + padding
    if parts:
        yield b"".join(parts)


def open_file(root: Path, folders: OpenFolders, entry: Entry) -> int:
    """A descriptor to read a file that ``scan`` found; the caller closes it."""
    folder, _, base = entry.name.rpartition(b"/")
    try:
        return os.open(base, _READ, dir_fd=folders.fd(folder))
    except OSError as error:
        raise _failed(error, root, entry.name) from error


def _read_small(root: Path, folders: OpenFolders, entry: Entry) -> bytes:
    fd = open_file(root, folders, entry)
    try:
        _check_unchanged(root, entry, os.fstat(fd))
        # One byte more than expected tells a file that grew; what else changes shows in the second look at all.
        data = os.read(fd, entry.size + 1)
        while 0 < len(data) < entry.size and (more := os.read(fd, entry.size + 1 - len(data))):
            data += more
    except OSError as error:
        raise _failed(error, root, entry.name) from error
    finally:
        os.close(fd)
    if len(data) != entry.size:
        _changed(root, entry.name, "grew" if len(data) > entry.size else "shrank")
    return data


def _read_large(root: Path, folders: OpenFolders, entry: Entry) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    fd = open_file(root, folders, entry)
    try:
        _check_unchanged(root, entry, os.fstat(fd))
        missing = entry.size
        while missing:
            count = _read_some(root, entry, fd, buffer[: min(missing, CHUNK_BYTES)])
            missing -= count
            yield buffer[:count]
        _check_unchanged(root, entry, os.fstat(fd))
    finally:
        os.close(fd)


def _read_some(root: Path, entry: Entry, fd: int, buffer: memoryview) -> int:
    try:
        count = os.readv(fd, (buffer,))
    except OSError as error:
        raise _failed(error, root, entry.name) from error
    if not count:
        _changed(root, entry.name, "shrank")
    return count


def _check_unchanged(root: Path, entry: Entry, info: os.stat_result) -> None:
    if (
        info.st_ctime_ns == entry.ctime_ns
        and info.st_mtime_ns == entry.mtime_ns
        and info.st_size == entry.size
        and info.st_ino == entry.inode
    ):
        return
    if info.st_ino != entry.inode or not stat.S_ISREG(info.st_mode):
        _changed(root, entry.name, "was replaced")
    if info.st_size != entry.size:
        _changed(root, entry.name, "grew" if info.st_size > entry.size else "shrank")
    _changed(root, entry.name, "was rewritten or its attributes changed")


def _changed(root: Path, name: bytes, what: str) -> NoReturn:
    raise SourceChangedError(f"{show(name or b'.')} {what} while the folder was saved.", uri=str(root), hint=_QUIET)


def _compare(tree: Tree) -> None:
    """Look at the tree again and raise if anything differs from the first look."""
    changed_folder: Entry | None = None
    with _open_root(tree.root) as folders:
        for before, now in zip_longest(tree.entries, _walk(tree.root, folders)):
            if before == now:
                continue
            if before and now and before.name == now.name and before.kind == now.kind == FOLDER:
                # What changed in it says more; it stands further on, if it is still to be seen.
                changed_folder = changed_folder or before
                continue
            _name_difference(tree.root, before, now)
    if changed_folder:
        _changed(tree.root, changed_folder.name, "was changed")


def _name_difference(root: Path, before: Entry | None, now: Entry | None) -> NoReturn:
    if before and now and before.name == now.name:
        if before.kind != now.kind or before.inode != now.inode:
            _changed(root, now.name, "was replaced")
        if before.target != now.target:
            _changed(root, now.name, "was pointed elsewhere")
        if before.size != now.size:
            _changed(root, now.name, "grew" if now.size > before.size else "shrank")
        _changed(root, now.name, "was rewritten or its attributes changed")
    # Both looks list in the same order, so the smaller one of two different names is missing in the other look.
    if now and (before is None or now.name.split(b"/") < before.name.split(b"/")):
        _changed(root, now.name, "was added")
    assert before is not None
    _changed(root, before.name, "was gone")
