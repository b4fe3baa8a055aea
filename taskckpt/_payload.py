"""A checkpoint's content on its way: what users pass to save, up to a store, and back into a folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from blake3 import blake3

from taskckpt import _foreign
from taskckpt._archive import extract, gzip, pack
from taskckpt._foreign import ForeignObject
from taskckpt._log.records import INLINE_LIMIT_BYTES, Commit, Content, Digest, Kind, Stored
from taskckpt._operation import Call, Stop
from taskckpt._progress import Report
from taskckpt._stores import READ_BYTES, Store
from taskckpt._stores.local import translating
from taskckpt.errors import (
    CorruptCheckpointError,
    NotFoundError,
    SourceChangedError,
    UnsupportedFormatError,
    UsageError,
    UsageTypeError,
)

if TYPE_CHECKING:
    from taskckpt._states import EncodedState

Data: TypeAlias = bytes | bytearray | memoryview | str | os.PathLike[str]

# A restored file or bytes get this name, as in Flyte, unless the user names the folder.
PAYLOAD = "payload"

# Smaller chunks are hashed by the thread that has just read them, in whose cache they are: a fifth faster (measured).
_ALONE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """Something to save, looked at but not read yet.

    ``chunks`` reads it: the bytes of a file, the tar stream of a folder, or a state as a file would have it.
    """

    kind: Kind
    size_hint: int
    chunks: Callable[[], Iterator[bytes | memoryview]]
    name: str | None = None
    mode: int | None = None
    mtime_ns: int | None = None
    entries: int | None = None

    @property
    def suffix(self) -> str:
        return ".tar.gz" if self.kind == "folder" else ""


def source_of(data: Data) -> Source:
    """What ``save`` was given, checked as far as that goes without reading it.

    Raises:
        UsageTypeError: It is neither bytes-like nor a path.
        UsageError: A str that is no path, or a file or folder that could not be restored.
        NotFoundError: A Path to nothing.
    """
    if isinstance(data, (bytes, bytearray, memoryview)):
        return _bytes_source(memoryview(data))
    if isinstance(data, Mapping):
        raise UsageTypeError(
            f"save takes no {type(data).__name__}.",
            hint="save_state() and save_later() do; or save its bytes: json.dumps(...).encode().",
        )
    if not isinstance(data, (str, os.PathLike)):
        raise UsageTypeError(
            f"save takes bytes, bytearray, memoryview, or a str or Path to a file or folder, "
            f"not {type(data).__name__}.",
            hint="Encode it first, for instance with json.dumps(...).encode(); or put it into a dict for save_state().",
        )
    path = os.fspath(data)
    if not isinstance(path, str):
        raise UsageTypeError(f"save takes str paths, not {type(path).__name__} ones.")
    return _path_source(path, is_str=isinstance(data, str))


def encoded_source(encoded: EncodedState) -> Source:
    """A state that has been encoded."""
    return Source("state", encoded.size_bytes, encoded.chunks)


def state_source(state: Mapping[str, Any]) -> Source:
    """What ``save_state`` was given, checked; its arrays are not read yet.

    Raises:
        UsageTypeError: It is no dict, or there is something in it that would not come back.
        UsageError: It contains itself, or is nested too deeply.
    """
    if not isinstance(state, Mapping):
        raise UsageTypeError(
            f"save_state takes a dict, not {type(state).__name__}.", hint='Put it into one: {"value": ...}.'
        )
    from taskckpt import _states  # only who saves states waits for it

    return encoded_source(_states.encode(state))


def _bytes_source(view: memoryview) -> Source:
    flat = view.cast("B") if view.c_contiguous else memoryview(view.tobytes())

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(flat), READ_BYTES):
            # Copied, so that what is hashed and what is stored are the same bytes, whoever writes to a
            # bytearray meanwhile.
            yield bytes(flat[start : start + READ_BYTES])

    return Source("bytes", len(flat), chunks)


def _path_source(path: str, *, is_str: bool) -> Source:
    try:
        with translating(path):
            info = os.stat(path)
    except (NotFoundError, UsageError, ValueError) as error:
        if is_str:
            raise UsageError(
                f"{path[:80]!r} is no path to a file or folder.",
                hint="To save text, pass its bytes: text.encode().",
            ) from error
        raise
    if stat.S_ISDIR(info.st_mode):
        tree = pack.scan(Path(path))
        return Source(
            "folder",
            tree.tar_size_bytes,
            FolderChunks(tree),
            _name_of(path),
            entries=tree.entry_count,
        )
    if stat.S_ISREG(info.st_mode):
        chunks = FileChunks(path, info)
        mode = stat.S_IMODE(info.st_mode) & 0o777
        return Source("file", info.st_size, chunks, _name_of(path), mode=mode, mtime_ns=info.st_mtime_ns)
    raise UsageError("Only files and folders can be saved; this is a device, a pipe or a socket.", uri=path)


@dataclass(frozen=True, slots=True)
class FolderChunks:
    """Reads a folder as a tar stream, and notices when it changes meanwhile."""

    tree: pack.Tree

    def __call__(self) -> Iterator[bytes | memoryview]:
        return pack.pack(self.tree)


def _name_of(path: str) -> str:
    return os.path.basename(os.path.realpath(path)) or PAYLOAD


@dataclass(frozen=True, slots=True)
class FileChunks:
    """Reads a file, and notices when it changes meanwhile."""

    path: str
    before: os.stat_result

    def __call__(self) -> Iterator[memoryview]:
        with self.opened() as file:
            size = 0
            buffer = memoryview(bytearray(READ_BYTES))
            while count := file.readinto(buffer):
                size += count
                yield buffer[:count]
            if size != self.before.st_size:
                raise self._changed()

    @contextmanager
    def opened(self) -> Generator[FileIO]:
        """The file, to be read: afterwards it must be as it was before."""
        with translating(self.path), open(self.path, "rb", buffering=0) as file:
            self._expect_unchanged(os.fstat(file.fileno()))
            yield file
            self._expect_unchanged(os.fstat(file.fileno()))
            self._expect_unchanged(os.stat(self.path))

    def _expect_unchanged(self, now: os.stat_result) -> None:
        if _identity(now) != _identity(self.before):
            raise self._changed()

    def _changed(self) -> SourceChangedError:
        return SourceChangedError(
            "The file changed while it was saved.", uri=self.path, hint="Save when nobody writes to it."
        )


def _identity(info: os.stat_result) -> tuple[int, ...]:
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


class _Meter:
    """Passes chunks on, and knows their size and digest in the end; ``report`` is told how far it is of ``total``."""

    def __init__(self, report: Report | None = None, total_bytes: int = 0) -> None:
        self._hash = blake3()
        self._report = report
        self._total_bytes = total_bytes
        self.size_bytes = 0

    def through(self, chunks: Iterable[bytes | memoryview]) -> Generator[bytes | memoryview]:
        # A thread hashes while the consumer works on the same chunk; the next one is asked for when both are done.
        with ThreadPoolExecutor(1, thread_name_prefix="taskckpt") as pool:
            for chunk in chunks:
                self.size_bytes += len(chunk)
                if len(chunk) < _ALONE_BYTES:
                    self._hash.update(chunk)
                    yield chunk
                else:
                    hashed = Call(partial(self._hash.update, chunk))
                    try:
                        hashed.start(pool)
                        yield chunk
                        hashed.result()
                    finally:
                        hashed.give_up()
                if self._report is not None:
                    self._report(self.size_bytes, self._total_bytes)

    def digest(self) -> Digest:
        return Digest(self.size_bytes, self._hash.hexdigest())


# --- up ----------------------------------------------------------------------------------------


def upload(
    store: Store, source: Source, key_for: Callable[[str], str], stop: Stop, report: Report | None = None
) -> tuple[Content, Stored]:
    """Stores the content, complete and durable, in one stream; ``key_for`` gives a key for a suffix.

    Raises:
        SourceChangedError: The source changed while it was read. Nothing is left in the store.
    """
    if source.kind in ("bytes", "state") and source.size_hint <= INLINE_LIMIT_BYTES:
        data = b"".join(map(bytes, source.chunks()))
        digest = Digest.of(data)
        if report is not None:
            report(len(data), len(data))
        return Content(source.kind, digest), Stored(digest, inline=data)
    content, stored = _Meter(None if source.kind == "folder" else report, source.size_hint), _Meter()
    if report is not None and source.kind == "folder":
        # A thread reads ahead. It is the one that saves that reports: what the user's function may do depends on that.
        stored = _Meter(lambda _done, _total: report(content.size_bytes, source.size_hint))
    key = key_for(source.suffix)
    with closing(content.through(source.chunks())) as chunks:
        if source.kind == "folder":
            with closing(gzip.compress(chunks)) as members, closing(stored.through(members)) as hashed:
                store.write(key, hashed, source.size_hint, stop)
        else:
            store.write(key, chunks, source.size_hint, stop)
    digest = content.digest()
    described = Content(source.kind, digest, source.name, source.mode, source.mtime_ns, source.entries)
    return described, Stored(stored.digest() if source.kind == "folder" else digest, key=key)


# --- back --------------------------------------------------------------------------------------


def stored_chunks(
    store: Store, commit: Commit, stop: Stop, report: Report | None = None
) -> Generator[bytes | memoryview]:
    """The stored bytes; a wrong size or digest is noticed at the end, so nothing may be used before that.

    Whoever may stop early closes it: threads read ahead, and the garbage collector cannot safely wait for
    their end (it runs anywhere, even where a thread is being started).

    Raises:
        NotFoundError: The payload is gone.
        CorruptCheckpointError: It is not what was saved.
    """
    return chunks_of(store, commit.stored, stop, report)


def chunks_of(store: Store, stored: Stored, stop: Stop, report: Report | None = None) -> Generator[bytes | memoryview]:
    """``stored_chunks`` of a payload, or of positions."""
    if stored.inline is not None:
        yield stored.inline  # its digest was checked with the record
        if report is not None:
            report(len(stored.inline), len(stored.inline))
        return
    assert stored.key is not None
    uri = f"{store.uri}/{stored.key}"
    meter = _Meter(report, stored.digest.size_bytes)
    with closing(meter.through(store.stream(stored.key, stored.digest.size_bytes, stop))) as chunks:
        for chunk in chunks:
            if meter.size_bytes > stored.digest.size_bytes:
                break
            yield chunk
    _expect(meter, stored.digest, uri)


def _expect(meter: _Meter, digest: Digest, uri: str) -> None:
    found = meter.digest()
    if found.size_bytes != digest.size_bytes:
        raise CorruptCheckpointError(
            f"The payload has {found.size_bytes} bytes or more; {digest.size_bytes} were saved.", uri=uri
        )
    if found != digest:
        raise CorruptCheckpointError("The payload is damaged: its digest does not fit.", uri=uri)


def restore(
    store: Store, found: Commit | ForeignObject, name: str, stop: Stop, report: Report | None, folder: str
) -> None:
    """Restores a checkpoint into an empty private folder: a tree as it was, anything else as file ``name``."""
    if isinstance(found, ForeignObject):
        _restore_foreign(store, found, name, stop, folder)
    else:
        _restore_own(store, found, name, stop, report, folder)


def _restore_own(store: Store, commit: Commit, name: str, stop: Stop, report: Report | None, folder: str) -> None:
    if commit.content.kind == "folder":
        with closing(stored_chunks(store, commit, stop)) as chunks:
            _restore_folder(chunks, commit, folder, f"{store.uri}/{commit.stored.key}", report)
        return
    path = os.path.join(folder, name)
    with closing(stored_chunks(store, commit, stop, report)) as chunks:
        _write(path, chunks)
    with translating(path):
        if commit.content.mode is not None:
            os.chmod(path, commit.content.mode & 0o777)
        if commit.content.mtime_ns is not None:
            os.utime(path, ns=(commit.content.mtime_ns, commit.content.mtime_ns))


def _write(path: str, chunks: Iterable[bytes | memoryview]) -> None:
    with translating(path), open(path, "xb", buffering=0) as file:
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]


def _restore_foreign(store: Store, foreign: ForeignObject, name: str, stop: Stop, folder: str) -> None:
    if foreign.kind == "folder":
        _foreign.restore_folder(store, foreign, folder, stop)
    else:
        with closing(_foreign.chunks_of(store, foreign, stop)) as chunks:
            _write(os.path.join(folder, name), chunks)


def _restore_folder(
    chunks: Iterator[bytes | memoryview], commit: Commit, folder: str, uri: str, report: Report | None
) -> None:
    content = commit.content
    meter = _Meter(report, content.digest.size_bytes)
    limits = extract.Limits(bytes=content.digest.size_bytes, entries=content.entries or 0)
    with closing(gzip.decompress(chunks)) as inflated, closing(meter.through(inflated)) as tar:
        extract.extract(tar, Path(folder), limits)
    for _ in chunks:  # to the end, where the digest is checked
        pass
    _expect(meter, content.digest, uri)


def read_all(store: Store, found: Commit | ForeignObject, stop: Stop, report: Report | None = None) -> bytes:
    """The content of a checkpoint of bytes or of a file.

    Raises:
        UsageError: It is a folder.
    """
    if kind_of(found) == "folder":
        raise UsageError("The checkpoint is a folder, not bytes.", uri=store.uri, hint="Use load() or load_sync().")
    if isinstance(found, ForeignObject):
        return b"".join(map(bytes, _foreign.chunks_of(store, found, stop)))
    return b"".join(map(bytes, stored_chunks(store, found, stop, report)))


def read_state(store: Store, found: Commit | ForeignObject, stop: Stop, report: Report | None = None) -> dict[str, Any]:
    """The state that a checkpoint holds, its arrays read straight into their memory.

    Raises:
        UsageError: It is of another kind.
        UnsupportedFormatError: It is intact, but this environment cannot rebuild it.
    """
    if isinstance(found, ForeignObject) or found.content.kind != "state":
        instead = "load()" if kind_of(found) == "folder" else "load_bytes()"
        raise UsageError(
            f"The checkpoint is no state, but of the kind {kind_of(found)!r}.", uri=store.uri, hint=f"Use {instead}."
        )
    from taskckpt import _states

    where = store.uri if found.stored.key is None else f"{store.uri}/{found.stored.key}"
    with closing(stored_chunks(store, found, stop, report)) as chunks:
        intact = False

        def to_the_end() -> Iterator[bytes | memoryview]:
            nonlocal intact
            yield from chunks
            intact = True

        stream = to_the_end()
        try:
            return _states.decode(stream, where, size_bytes=found.stored.digest.size_bytes)
        except CorruptCheckpointError as error:
            for _ in stream:  # where the digest is checked: what is damaged may be passed over, what is intact may not
                pass
            if not intact:
                raise
            raise UnsupportedFormatError(
                f"The state is as it was saved, but cannot be rebuilt here: {error.message}",
                uri=where,
                hint="Load it with the versions of taskckpt and of NumPy, PyTorch or JAX that it was saved with.",
            ) from error


def verify(store: Store, found: Commit | ForeignObject, stop: Stop) -> None:
    """Reads a checkpoint to its end, to see that it is what was saved.

    Raises:
        NotFoundError: The payload is gone.
        CorruptCheckpointError: It is not what was saved.
    """
    chunks = (
        _foreign.chunks_of(store, found, stop)
        if isinstance(found, ForeignObject)
        else stored_chunks(store, found, stop)
    )
    with closing(chunks):
        for _ in chunks:
            pass


def read_positions(store: Store, found: Commit | ForeignObject, stop: Stop) -> dict[str, Any]:
    """Where iterations were when a checkpoint was saved. Raises as ``verify``; UnsupportedFormatError."""
    if isinstance(found, ForeignObject) or found.positions is None:
        return {}
    from taskckpt import _states

    positions = found.positions
    with closing(chunks_of(store, positions, stop)) as chunks:
        return _states.decode(chunks, f"{store.uri}/{positions.key}", size_bytes=positions.digest.size_bytes)


def kind_of(found: Commit | ForeignObject) -> Kind:
    return found.kind if isinstance(found, ForeignObject) else found.content.kind


def restored_name(found: Commit | ForeignObject) -> str:
    """A file's own name where that is one; bytes have none."""
    name = None if isinstance(found, ForeignObject) else found.content.name
    if name is None or name in ("", ".", "..") or "/" in name or "\0" in name:
        return PAYLOAD
    return name
