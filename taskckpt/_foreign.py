"""One object at ``src`` that taskckpt did not write: Flyte's checkpoints, raw or a tar of any compression.

The only place where what something is gets inferred from its content; ``src_kind=`` overrides it.
"""

from __future__ import annotations

import bz2
import itertools
import lzma
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from taskckpt._archive import extract, gzip
from taskckpt._layout import LOG
from taskckpt._log.records import Kind
from taskckpt._operation import Stop
from taskckpt._stores import Store
from taskckpt._stores.local import translating
from taskckpt.errors import CorruptCheckpointError, MissingDependencyError, UsageError

# Each is valid until the next is asked for; closed by whoever may stop early.
Chunks: TypeAlias = "Generator[bytes | memoryview]"

PIECE_BYTES = 1024 * 1024
BITE_BYTES = 64
XZ_MEMORY_BYTES = 512 * 1024 * 1024
MAX_ENTRIES = 10_000_000
# Left free on the disk when a foreign archive, which does not say how large it gets, is unpacked.
SPARE_DISK_BYTES = 64 * 1024 * 1024

# What tarfile writes for an empty folder: nothing but zeros, which alone would be no sign of a tar.
_EMPTY_TAR = bytes(10240)


@dataclass(frozen=True, slots=True)
class ForeignObject:
    """Somebody else's single object: its size, whether it is unpacked, and how it is compressed."""

    uri: str
    size_bytes: int
    kind: Kind
    compression: str | None = None


def look(store: Store, src_kind: str, stop: Stop) -> ForeignObject | None:
    """The object that lies at the root of a store itself; None if there is nothing at all.

    Raises:
        UsageError: There are several objects, and no log among them.
        MissingDependencyError: It is compressed with zstd, and there is no package to read that.
    """
    size = store.size("")
    if size is None:
        has_log = store.list_below(LOG, first_page=True).names  # of a task that has saved nothing
        if not has_log and store.list_below("", first_page=True).names:
            raise UsageError(
                "There is something at src, but neither a taskckpt log nor a single object.",
                uri=store.uri,
                hint="Pass the URI of a task's place (the folder that holds log/) or of one object.",
            )
        return None
    if src_kind == "bytes":
        return ForeignObject(store.uri, size, "bytes")
    head = bytes(next(iter(store.stream("", min(size, PIECE_BYTES), stop)), b"")) if size else b""
    compression = _compression_of(head)
    if src_kind == "folder":
        return ForeignObject(store.uri, size, "folder", compression)
    is_tar = _holds_tar(head, compression, store.uri)
    return ForeignObject(store.uri, size, "folder", compression) if is_tar else ForeignObject(store.uri, size, "bytes")


def chunks_of(store: Store, foreign: ForeignObject, stop: Stop) -> Chunks:
    """The object's bytes; a wrong count is all that can be noticed, since nobody recorded a digest."""
    size = 0
    for chunk in store.stream("", foreign.size_bytes, stop):
        size += len(chunk)
        yield chunk
    if size != foreign.size_bytes:
        raise CorruptCheckpointError(f"Expected {foreign.size_bytes} bytes, got {size}.", uri=foreign.uri)


def restore_folder(store: Store, foreign: ForeignObject, folder: str, stop: Stop) -> None:
    """Unpacks the archive into an empty private folder, to its very end, so that its checksums count."""
    with translating(folder):
        room = max(shutil.disk_usage(folder).free - SPARE_DISK_BYTES, 0)
    limits = extract.Limits(bytes=room, entries=MAX_ENTRIES)
    with (
        closing(chunks_of(store, foreign, stop)) as chunks,
        closing(_DECOMPRESS[foreign.compression](chunks, foreign.uri)) as tar,
    ):
        extract.extract(tar, Path(folder), limits, foreign=True)
        for _ in tar:
            pass


def _compression_of(head: bytes) -> str | None:
    for name, magic in (
        ("gzip", b"\x1f\x8b"),
        ("bzip2", b"BZh"),
        ("xz", b"\xfd7zXZ\0"),
        ("zstd", b"\x28\xb5\x2f\xfd"),
    ):
        if head.startswith(magic):
            return name
    return None


def _holds_tar(head: bytes, compression: str | None, uri: str) -> bool:
    """Whether the first block is a valid tar header. Any doubt means that the object stays as it is."""
    if compression is None:
        return extract.looks_like_tar(head[:512])
    wanted = len(_EMPTY_TAR) + 1
    start = bytearray()
    try:
        # In small bites: of a damaged archive too, what comes before the damage tells that it is one.
        bites = (head[at : at + BITE_BYTES] for at in range(0, len(head), BITE_BYTES))
        with closing(_DECOMPRESS[compression](bites, uri)) as pieces:
            for piece in pieces:
                start += piece
                if len(start) >= wanted:
                    break
    except CorruptCheckpointError:
        pass  # the head of a stream ends early, and a damaged one is noticed when it is restored
    return bytes(start) == _EMPTY_TAR or extract.looks_like_tar(bytes(start[:512]))


# --- decompression -----------------------------------------------------------------------------


class _Decompressor(Protocol):
    eof: bool

    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes | memoryview, max_length: int = -1) -> bytes: ...


def _plain(chunks: Chunks, uri: str) -> Chunks:  # noqa: ARG001
    return chunks


def _gunzip(chunks: Chunks, uri: str) -> Chunks:  # noqa: ARG001
    return gzip.decompress(chunks)


def _through(new: Callable[[], Any], failures: tuple[type[Exception], ...]) -> Callable[..., Chunks]:
    def decompress(chunks: Chunks, uri: str) -> Chunks:
        try:
            yield from _pieces(new, chunks)
        except failures as error:
            raise CorruptCheckpointError(f"The archive is damaged: {error}.", uri=uri) from error

    return decompress


def _pieces(new: Callable[[], _Decompressor], chunks: Chunks) -> Chunks:
    """Bounded pieces of a stream of one or several compressed members."""
    decompressor: _Decompressor | None = None
    for chunk in chunks:
        rest = chunk
        while rest or (decompressor is not None and not decompressor.needs_input):
            decompressor = decompressor or new()
            yield decompressor.decompress(rest, PIECE_BYTES)
            rest = b""
            if decompressor.eof:
                rest, decompressor = decompressor.unused_data, None
    if decompressor is not None:
        raise EOFError("it ends too early")


def _unzstd(chunks: Chunks, uri: str) -> Chunks:
    try:
        import zstandard  # pyright: ignore[reportMissingImports] - optional
    except ImportError as error:
        raise MissingDependencyError(
            "The object at src is compressed with zstd.",
            uri=uri,
            hint="pip install zstandard, or pass src_kind='bytes' to get it as it is.",
        ) from error
    first = next(chunks, b"")
    reader = zstandard.ZstdDecompressor(max_window_size=128 * 1024 * 1024).stream_reader(
        _Readable(itertools.chain((first,), chunks)), read_across_frames=True
    )
    try:
        while piece := reader.read(PIECE_BYTES):
            yield piece
    except zstandard.ZstdError as error:
        raise CorruptCheckpointError(f"The archive is damaged: {error}.", uri=uri) from error


class _Readable:
    """A stream of chunks as the ``read`` that zstandard asks for."""

    def __init__(self, chunks: Iterable[bytes | memoryview]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""

    def read(self, size: int) -> bytes:
        self._rest = self._rest or bytes(next(self._chunks, b""))
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


_DECOMPRESS: dict[str | None, Callable[[Chunks, str], Chunks]] = {
    None: _plain,
    "gzip": _gunzip,
    "bzip2": _through(bz2.BZ2Decompressor, (OSError, ValueError, EOFError)),
    "xz": _through(lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES), (lzma.LZMAError, EOFError)),
    "zstd": _unzstd,
}
