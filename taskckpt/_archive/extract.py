"""Write a tar stream into an empty private folder, so that nothing outside of it can be touched.

Every folder is opened relative to its parent with ``O_NOFOLLOW`` and every file is created with ``O_EXCL``, so neither
the archive nor another process that plays with the folder can lead a write elsewhere; symlinks are made only after
all files and folders, so no entry can pass through one. Modes and times are set through descriptors, those of folders
last and deepest first. Why not ``tarfile``: its filters have been bypassed again and again (CVE-2025-4517, ...).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from taskckpt._archive import tar
from taskckpt._archive.pack import OpenFolders
from taskckpt._archive.tar import FILE, FOLDER, LINK, Member, Reader, show
from taskckpt._stores import NO_ROOM
from taskckpt.errors import DeniedError, StorageFullError, TaskckptError, UnavailableError, UnsafeArchiveError

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive may grow to.

    Attributes:
        bytes: Sum of the sizes of its files.
        entries: Number of its entries, folders that a foreign archive only implies included.
        path_bytes: Length of a path below the target.
        depth: How many folders an entry may lie below the target.
    """

    bytes: int
    entries: int
    path_bytes: int = tar.MAX_PATH_BYTES
    depth: int = tar.MAX_DEPTH


def looks_like_tar(first_block: bytes) -> bool:
    """Whether a file that begins with these 512 bytes is a tar: ustar or GNU magic, right checksum. Zeros are not."""
    return tar.is_header(first_block[: tar.BLOCK])


def extract(chunks: Iterable[bytes | memoryview], target: Path, limits: Limits, *, foreign: bool = False) -> None:
    """Write the entries of an uncompressed tar stream into ``target``, an existing empty folder of the caller's own.

    Not atomic: after an error ``target`` holds a part of the archive. Extract into a staging folder, verify, rename.

    Args:
        chunks: The stream in pieces of any size; what they raise passes through.
        target: The folder; its mode and time become those of the archive's ``./`` entry, if there is one.
        limits: What the archive may grow to.
        foreign: Written by another program: missing parent folders are made (0755), and setuid, setgid and sticky
            bits dropped. Otherwise both are refused.

    Raises:
        UnsafeArchiveError: The archive holds what is never restored; the message names the entry and the rule.
        CorruptCheckpointError: The archive is damaged or cut.
        StorageFullError: No room in the file system of ``target``.
        DeniedError: ``target`` may not be written.
        UnavailableError: Writing failed otherwise, or another process changed ``target`` meanwhile.
    """
    try:
        folders = OpenFolders(target)
    except OSError as error:
        raise _failed(error, target, b".") from error
    with folders:
        extraction = _Extraction(folders, target, limits, foreign)
        reader = Reader(chunks, limits.entries)
        for member in reader:
            extraction.add(member, reader)
        extraction.finish()


def _failed(error: OSError, target: Path, name: bytes) -> TaskckptError:
    uri = str(target)
    if error.errno in NO_ROOM:
        return StorageFullError(f"No room left to restore {show(name)}: {error.strerror}.", uri=uri)
    if isinstance(error, FileExistsError):
        return UnsafeArchiveError(f"The archive is refused: {show(name)} clashes with another name.", uri=uri)
    if isinstance(error, PermissionError):
        return DeniedError(f"{show(name)} may not be written: {error.strerror}.", uri=uri)
    return UnavailableError(f"{show(name)} could not be written: {error.strerror}.", uri=uri)


def _refused(name: bytes, why: str) -> UnsafeArchiveError:
    return UnsafeArchiveError(f"The archive is refused: {show(name)} {why}.")


class _Extraction:
    """One archive on its way into one folder."""

    __slots__ = (
        "_bytes_left",
        "_entries_left",
        "_files",
        "_folders",
        "_foreign",
        "_implied",
        "_limits",
        "_opened",
        "_root",
        "_surely_short",
        "_symlinks",
        "_target",
    )

    def __init__(self, opened: OpenFolders, target: Path, limits: Limits, foreign: bool) -> None:
        self._opened = opened
        self._target = target
        self._limits = limits
        self._foreign = foreign
        self._bytes_left = limits.bytes
        self._entries_left = limits.entries
        # No name up to this length can exceed a limit, and nearly all are shorter.
        self._surely_short = min(tar.MAX_NAME_BYTES, limits.path_bytes, limits.depth)
        self._files: set[bytes] = set()
        # Names of folders in the order they were made, parents first, with mode and time (None: leave it).
        self._folders: dict[bytes, tuple[int, int | None]] = {}
        self._implied: set[bytes] = set()
        self._symlinks: dict[bytes, tuple[bytes, int]] = {}
        self._root: tuple[int, int | None] | None = None

    def add(self, member: Member, reader: Reader) -> None:
        """Write one entry; symlinks are only noted."""
        self._count(member.name, member.size)
        mode = self._mode(member)
        parent, base, name = self._place(member)
        if member.kind == FILE:
            self._write_file(parent, base, name, mode, member.mtime_ns, reader)
        elif member.kind == FOLDER:
            self._make_folder(parent, base, name, (mode, member.mtime_ns))
        elif member.kind == LINK:
            self._link(parent, base, name, member.target)
        else:
            if not tar.link_stays_inside(member.target, name.count(b"/")):
                raise _refused(member.name, f"is a symlink to {show(member.target)}, which may leave the target")
            self._symlinks[name] = (member.target, member.mtime_ns)

    def finish(self) -> None:
        """Make the symlinks, then set modes and times of the folders, deepest first, the target's own last."""
        for name, (link_target, mtime_ns) in self._symlinks.items():
            self._make_symlink(name, link_target, mtime_ns)
        for name, (mode, mtime) in reversed(self._folders.items()):
            self._settle_folder(name, mode, mtime)
        if self._root is not None:
            self._settle_folder(b"", *self._root)

    def _make_symlink(self, name: bytes, link_target: bytes, mtime_ns: int) -> None:
        parent, _, base = name.rpartition(b"/")
        try:
            fd = self._opened.fd(parent)
            os.symlink(link_target, base, dir_fd=fd)
            os.utime(base, ns=(mtime_ns, mtime_ns), dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            # Some file systems keep no times for symlinks; nobody misses them.
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS):
                raise _failed(error, self._target, name) from error

    def _settle_folder(self, name: bytes, mode: int, mtime_ns: int | None) -> None:
        try:
            fd = self._opened.fd(name)
            os.fchmod(fd, mode)
            if mtime_ns is not None:
                os.utime(fd, ns=(mtime_ns, mtime_ns))
        except OSError as error:
            raise _failed(error, self._target, name or b".") from error

    def _count(self, name: bytes, size: int) -> None:
        self._entries_left -= 1
        if self._entries_left < 0:
            raise _refused(name, f"is more than the {self._limits.entries} entries that are allowed")
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise _refused(name, f"of {size} bytes exceeds the {self._limits.bytes} bytes that are allowed")

    def _mode(self, member: Member) -> int:
        mode = member.mode
        if mode > 0o777 and not self._foreign:
            raise _refused(member.name, f"has the mode {mode:o}, of which only the permission bits are allowed")
        return mode & 0o777

    def _place(self, member: Member) -> tuple[bytes, bytes, bytes]:
        """Parent, last component and clean full name of an entry, all checked; the parent exists afterwards."""
        name = member.name
        if member.kind == FOLDER:
            name = name.removesuffix(b"/")
        parent, _, base = name.rpartition(b"/")
        # A parent we made is a clean name; so only the last component is left to check, and only other cases cost.
        if base in (b"", b".", b"..") or (parent not in self._folders if parent else name != base):
            name = self._clean(member)
            parent, _, base = name.rpartition(b"/")
            self._need_folder(parent, member.name)
        if len(name) > self._surely_short:
            self._check_length(name)
        taken = name in self._files or name in self._symlinks or name in self._folders
        if taken and not (member.kind == FOLDER and name in self._implied):
            raise _refused(member.name, "stands in the archive twice")
        return parent, base, name

    def _clean(self, member: Member) -> bytes:
        name = member.name
        if not name:
            raise _refused(name, "is an empty name")
        if name.startswith(b"/"):
            raise _refused(name, "is an absolute name")
        if name.endswith(b"/") and member.kind != FOLDER:
            raise _refused(name, "ends in a slash but is not a folder")
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise _refused(name, "has a '..' in its path")
        if not parts and member.kind != FOLDER:
            raise _refused(name, "is the root but not a folder")
        clean = b"/".join(parts)
        # Before any parent is made for it.
        self._check_length(clean)
        return clean

    def _check_length(self, name: bytes) -> None:
        if len(name) > self._limits.path_bytes:
            raise _refused(name, f"is a path of more than {self._limits.path_bytes} bytes")
        if name.count(b"/") > self._limits.depth:
            raise _refused(name, f"lies more than {self._limits.depth} folders deep")
        if any(len(part) > tar.MAX_NAME_BYTES for part in name.split(b"/")):
            raise _refused(name, f"has a component of more than {tar.MAX_NAME_BYTES} bytes")

    def _need_folder(self, parent: bytes, name: bytes) -> None:
        """See to it that all folders above an entry are ones this archive made; a foreign one may leave them out."""
        missing = []
        while parent and parent not in self._folders:
            if parent in self._files or parent in self._symlinks:
                raise _refused(name, f"lies below {show(parent)}, which is not a folder")
            missing.append(parent)
            parent = parent.rpartition(b"/")[0]
        if missing and not self._foreign:
            raise _refused(name, f"lies in {show(missing[0])}, which is not in the archive before it")
        for folder in reversed(missing):
            self._count(folder, 0)
            above, _, base = folder.rpartition(b"/")
            self._make_folder(above, base, folder, (0o755, None))
            self._implied.add(folder)

    def _make_folder(self, parent: bytes, base: bytes, name: bytes, attributes: tuple[int, int | None]) -> None:
        if not name:
            if self._root is not None:
                raise _refused(b"./", "stands in the archive twice")
            self._root = attributes
            return
        if name in self._implied:
            self._implied.remove(name)
        else:
            try:
                os.mkdir(base, 0o700, dir_fd=self._opened.fd(parent))
            except OSError as error:
                raise _failed(error, self._target, name) from error
        self._folders[name] = attributes

    def _write_file(self, parent: bytes, base: bytes, name: bytes, mode: int, mtime_ns: int, reader: Reader) -> None:
        try:
            fd = os.open(base, _CREATE, 0o600, dir_fd=self._opened.fd(parent))
        except OSError as error:
            raise _failed(error, self._target, name) from error
        try:
            while reader.remaining:
                self._write(fd, reader.read(), name)
            self._settle_file(fd, mode, mtime_ns, name)
        finally:
            os.close(fd)
        self._files.add(name)

    def _write(self, fd: int, piece: memoryview, name: bytes) -> None:
        try:
            written = os.write(fd, piece)
            while written < len(piece):
                written += os.write(fd, piece[written:])
        except OSError as error:
            raise _failed(error, self._target, name) from error

    def _settle_file(self, fd: int, mode: int, mtime_ns: int, name: bytes) -> None:
        try:
            if mode != 0o600:
                os.fchmod(fd, mode)
            os.utime(fd, ns=(mtime_ns, mtime_ns))
        except OSError as error:
            raise _failed(error, self._target, name) from error

    def _link(self, parent: bytes, base: bytes, name: bytes, target: bytes) -> None:
        first = target if target in self._files else b"/".join(p for p in target.split(b"/") if p not in (b"", b"."))
        if first not in self._files or target.startswith(b"/"):
            raise _refused(name, f"is a hard link to {show(target)}, which is no file of the archive before it")
        above, _, first_base = first.rpartition(b"/")
        try:
            # Opening the second folder may close the first.
            above_fd = os.dup(self._opened.fd(above))
            try:
                parent_fd = self._opened.fd(parent)
                os.link(first_base, base, src_dir_fd=above_fd, dst_dir_fd=parent_fd, follow_symlinks=False)
            finally:
                os.close(above_fd)
        except OSError as error:
            raise _failed(error, self._target, name) from error
        self._files.add(name)
