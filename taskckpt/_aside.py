"""Sets aside what is to be saved later, so that the caller may change it again.

Bytes that nobody can change stay where they are; other memory is copied once. Files and folders are copied into this
process's private folder, with names, modes, times and links, so that saving the copy saves what was there. On file
systems that can do so (XFS, Btrfs, some of NFS) the copies share their blocks with the originals, which takes no time
and no room.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from taskckpt import _payload, _workspace
from taskckpt._archive import pack
from taskckpt._archive.pack import Entry, OpenFolders, Tree
from taskckpt._archive.tar import FILE, FOLDER, LINK
from taskckpt._attempt import SAVE_TRIES
from taskckpt._payload import Data, FileChunks, FolderChunks, Source
from taskckpt._stores.local import translating
from taskckpt.errors import SourceChangedError, UnavailableError, UsageError

if TYPE_CHECKING:
    from taskckpt._states import HostBuffers

# At most so much in one call, so that Ctrl-C is heard within the time that it takes.
_COPY_BYTES = 64 << 20
_READ_BYTES = 1 << 20
# Only these are about the data; of all others one knows no more than that the kernel does not copy here.
_FATAL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))
_COPY_IN_KERNEL = getattr(os, "copy_file_range", None)  # not on macOS


class Aside(NamedTuple):
    """What is set aside: ``look`` at it as often as needed; ``release`` it when nobody will any more."""

    look: Callable[[], Source]
    release: Callable[[], None]


def set_aside(
    data: Data | Mapping[str, Any], buffers: Callable[[], HostBuffers], make_room: Callable[[], None]
) -> Aside:
    """What ``save`` takes, or a state. When it returns, the caller may change ``data``.

    Args:
        data: What cannot be saved is refused here, as ``save`` and ``save_state`` do it.
        buffers: Where the arrays of a state are copied to.
        make_room: Called before that, when it is sure that the state can be saved.

    Raises:
        SourceChangedError: The file or folder kept changing while it was copied.
        StorageFullError: There is no room for the copy.
    """
    if isinstance(data, Mapping):
        return _state_aside(data, buffers, make_room)
    source = _payload.source_of(data)
    if source.kind == "bytes":
        kept = data if isinstance(data, bytes) else b"".join(map(bytes, source.chunks()))
        return Aside(partial(_payload.source_of, kept), _nothing)
    assert isinstance(data, (str, os.PathLike))
    for remaining in reversed(range(SAVE_TRIES)):
        try:
            return _copied(os.fspath(data), source)
        except SourceChangedError:
            if not remaining:
                raise
            source = _payload.source_of(data)
    raise AssertionError


def _nothing() -> None:
    pass


def _state_aside(state: Mapping[str, Any], buffers: Callable[[], HostBuffers], make_room: Callable[[], None]) -> Aside:
    from taskckpt import _states

    encoded = _states.encode(state)
    make_room()
    snapshot = encoded.snapshot(buffers())
    return Aside(partial(_payload.encoded_source, snapshot), snapshot.release)


def _copied(path: str, source: Source) -> Aside:
    root = _workspace.process_root()
    if source.kind == "folder" and _workspace.contains(os.path.realpath(path), os.path.realpath(root)):
        raise UsageError(
            "The folder to be saved contains the one where it would be copied to.",
            uri=root,
            hint="Set TASKCKPT_TMP to a place outside of it.",
        )
    folder = f"{root}/.{secrets.token_hex(6)}"
    release = partial(_workspace.remove_tree, folder)
    try:
        with translating(folder):
            os.mkdir(folder, 0o700)
            copied = _folder_copied if source.kind == "folder" else _file_copied
            look = copied(source, f"{folder}/copy")
    except BaseException:
        release()
        raise
    return Aside(look, release)


def _file_copied(source: Source, copy: str) -> Callable[[], Source]:
    assert isinstance(source.chunks, FileChunks)
    with source.chunks.opened() as file, translating(copy):
        target = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _copy_content(file.fileno(), target, source.size_hint)
        finally:
            os.close(target)
    with translating(copy):
        of_copy = replace(source, chunks=FileChunks(copy, os.stat(copy)))
    return lambda: of_copy


def _folder_copied(source: Source, copy: str) -> Callable[[], Source]:
    assert isinstance(source.chunks, FolderChunks)
    tree = source.chunks.tree
    with pack.reading(tree) as folders:
        _copy_tree(tree, folders, copy)
    now = pack.scan(Path(copy))
    if [_kept(entry) for entry in now.entries] != [_kept(entry) for entry in tree.entries]:
        raise UnavailableError(
            "This file system does not keep names, modes or times of a folder as they are.",
            uri=copy,
            hint="Set TASKCKPT_TMP to a place on another one, or use save.",
        )
    of_copy = replace(source, chunks=FolderChunks(now))
    return lambda: of_copy


def _kept(entry: Entry) -> tuple[object, ...]:
    """What a folder that is saved keeps of an entry."""
    return entry[: Entry._fields.index("ctime_ns")]


def _copy_tree(tree: Tree, folders: OpenFolders, copy: str) -> None:
    os.mkdir(copy, 0o700)
    with OpenFolders(Path(copy)) as targets:
        for entry in tree.entries[1:]:
            parent, _, base = entry.name.rpartition(b"/")
            parent_fd = targets.fd(parent)
            if entry.kind == FOLDER:
                os.mkdir(base, 0o700, dir_fd=parent_fd)
            elif entry.kind == FILE:
                _copy_file(tree, folders, entry, parent_fd)
            elif entry.kind == LINK:
                _copy_link(entry, targets)
            else:
                os.symlink(entry.target, base, dir_fd=parent_fd)
                os.utime(base, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent_fd, follow_symlinks=False)
        for entry in reversed(tree.entries):  # what is written into a folder changes its time
            if entry.kind == FOLDER:
                _describe(targets.fd(entry.name), entry)


def _copy_file(tree: Tree, folders: OpenFolders, entry: Entry, parent_fd: int) -> None:
    source = pack.open_file(tree.root, folders, entry)
    try:
        base = entry.name.rpartition(b"/")[2]
        target = os.open(base, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=parent_fd)
        try:
            _copy_content(source, target, entry.size)
            _describe(target, entry)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _copy_link(entry: Entry, targets: OpenFolders) -> None:
    first_parent, _, first = entry.target.rpartition(b"/")
    parent, _, base = entry.name.rpartition(b"/")
    first_fd = os.dup(targets.fd(first_parent))
    try:
        os.link(first, base, src_dir_fd=first_fd, dst_dir_fd=targets.fd(parent), follow_symlinks=False)
    finally:
        os.close(first_fd)


def _describe(descriptor: int, entry: Entry) -> None:
    os.fchmod(descriptor, entry.mode)
    os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))


def _copy_content(source: int, target: int, size_bytes: int) -> None:
    """Copies so much, or less if the file is shorter by now: whoever calls sees that it changed.

    Raises:
        SourceChangedError: There is more. Some file systems give a size that is not, or no longer, true.
    """
    left = size_bytes
    try:
        # The kernel shares the blocks where it can, and else copies within the page cache.
        while left and _COPY_IN_KERNEL is not None:
            count = _COPY_IN_KERNEL(source, target, min(left, _COPY_BYTES))
            if not count:
                break
            left -= count
    except OSError as error:
        if error.errno in _FATAL:
            raise
    while left and (data := os.read(source, min(left, _READ_BYTES))):
        left -= len(data)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(target, rest) :]
    if not left and os.read(source, 1):
        raise SourceChangedError("A file is longer than it says.", hint="Save when nobody writes to it.")
