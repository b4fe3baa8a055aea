"""A folder on a local disk as a store: atomic and durable by ``link``, ``rename`` and ``fsync``.

fsspec's local file system is not used: it never calls fsync, and its exclusive create is a check
followed by a write (both measured). Network file systems are best effort: they do what their
``link`` and ``fsync`` do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from taskckpt._layout import DATA, LOG
from taskckpt._operation import Stop
from taskckpt._stores import NO_ROOM, READ_BYTES, Listing
from taskckpt.errors import (
    AlreadyExistsError,
    DeniedError,
    NotFoundError,
    StorageFullError,
    TaskckptError,
    UnavailableError,
    UsageError,
)

# Half-written files carry this prefix; no record or payload has a name that begins with a dot.
PARTIAL = ".partial-"

# So much is written before the disk is asked to begin.
WRITE_BACK_BYTES = 16 * 1024 * 1024

# A folder that changes all the time: this many listings before giving up.
MAX_LISTINGS = 1000

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


def translated(error: OSError, path: str | os.PathLike[str]) -> TaskckptError:
    """The error of taskckpt that says what an OSError at a path means."""
    uri = os.fspath(path)
    reason = error.strerror or str(error)
    if error.errno in NO_ROOM:
        return StorageFullError(
            f"No room to write: {reason}.",
            uri=uri,
            hint="Make room, raise the quota, or choose another place.",
        )
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return DeniedError(f"Not permitted: {reason}.", uri=uri, hint="Check the owner and the mode of the path.")
    if isinstance(error, FileNotFoundError):
        return NotFoundError("No such file or folder.", uri=uri)
    if isinstance(error, FileExistsError):
        return AlreadyExistsError("The path is taken.", uri=uri)
    if isinstance(error, NotADirectoryError):
        return UsageError("A part of the path is a file, not a folder.", uri=uri, hint="Choose another base.")
    if error.errno == errno.ENAMETOOLONG:
        return UsageError("The path is too long for this disk.", uri=uri, hint="Choose a shorter base.")
    return UnavailableError(f"The disk failed: {reason}.", uri=uri)


@contextlib.contextmanager
def translating(path: str | os.PathLike[str]) -> Generator[None]:
    """Turns any OSError raised inside into an error of taskckpt about ``path``."""
    try:
        yield
    except OSError as error:
        if isinstance(error, TaskckptError):
            raise
        raise translated(error, path) from error


class LocalStore:
    """See ``_stores.Store``."""

    exclusive: bool | None = True  # link(2) and O_EXCL refuse a taken name

    def __init__(self, root: str) -> None:
        self.uri = root
        self._known_folders: set[str] = set()
        self._links_work = True

    def _path(self, key: str) -> str:
        return os.path.join(self.uri, key) if key else self.uri

    # --- reading -------------------------------------------------------------------------------

    def list_below(self, folder: str, *, first_page: bool = False) -> Listing:  # noqa: ARG002 - all is one page
        with translating(self._path(folder)):
            before = self._walk(folder)
            for _ in range(MAX_LISTINGS):
                # readdir is no snapshot: it can miss a file that was there all the time while others
                # come and go. Two equal listings in a row cannot both have missed the newest record.
                after = self._walk(folder)
                if after == before:
                    return Listing(after)
                before = after
                time.sleep(0.001)
        raise UnavailableError(f"The folder kept changing during {MAX_LISTINGS} listings.", uri=self._path(folder))

    def _walk(self, folder: str) -> set[str]:
        names: set[str] = set()
        pending = [""]
        while pending:
            below = pending.pop()
            try:
                with os.scandir(os.path.join(self._path(folder), below)) as entries:
                    for entry in entries:
                        name = entry.name
                        if name.startswith("."):
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(f"{below}{name}/")
                        else:
                            names.add(below + name)
            except FileNotFoundError:
                self._require_reachable()
        return names

    def _require_reachable(self) -> None:
        """An absent folder is an empty one, but a root behind a file or a forbidden folder is an error."""
        path = self.uri
        while path != os.path.dirname(path):
            try:
                info = os.stat(path)
            except FileNotFoundError:
                if os.path.islink(path):
                    message = f"The symlink {path} leads nowhere: is its disk mounted?"
                    raise UnavailableError(message, uri=self.uri) from None
                path = os.path.dirname(path)
                continue
            if not stat.S_ISDIR(info.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            return

    def sizes_below(self, folder: str) -> dict[str, int]:
        sizes = {name: self.size(f"{folder}/{name}" if folder else name) for name in self.list_below(folder).names}
        return {name: size for name, size in sizes.items() if size is not None}  # not those that are gone by now

    def folders(self, folder: str) -> list[str]:
        with translating(self._path(folder)):
            try:
                with os.scandir(self._path(folder)) as entries:
                    found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            except FileNotFoundError:
                self._require_reachable()
                return []
        return sorted(name for name in found if not name.startswith("."))

    def read(self, key: str) -> bytes:
        with translating(self._path(key)), open(self._path(key), "rb") as file:
            return file.read()

    def size(self, key: str) -> int | None:
        with translating(self._path(key)):
            try:
                info = os.stat(self._path(key))
            except FileNotFoundError:
                self._require_reachable()
                return None
            return info.st_size if stat.S_ISREG(info.st_mode) else None

    def stream(self, key: str, size_bytes: int, stop: Stop) -> Iterator[memoryview]:  # noqa: ARG002
        path = self._path(key)
        with translating(path):
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below; the generator may be dropped
        buffer = memoryview(bytearray(READ_BYTES))
        with file:
            while True:
                stop.check()
                with translating(path):
                    count = file.readinto(buffer)
                if not count:
                    return
                yield buffer[:count]

    # --- writing -------------------------------------------------------------------------------

    def create(self, key: str, data: bytes, stop: Stop) -> None:
        stop.check()
        path = self._path(key)
        with translating(path):
            folder = self._make_folder(os.path.dirname(path))
            if not self._links_work or not self._create_by_link(path, data):
                self._create_exclusively(path, data)
            _sync_folder(folder)

    def _create_by_link(self, path: str, data: bytes) -> bool:
        """Publishes a complete file under its final name at once; False where there are no hard links."""
        partial = f"{os.path.dirname(path)}/{PARTIAL}{os.path.basename(path)}~{secrets.token_hex(4)}"
        try:
            _write_file(partial, (data,))
            os.link(partial, path)
        except FileNotFoundError:
            # A newer attempt swept our half-written record: it holds a slot at or above this one.
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS or not os.path.exists(partial):
                raise
            self._links_work = False
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
        return True

    def _create_exclusively(self, path: str, data: bytes) -> None:
        # Killed in between, this leaves a torn record; readers take its slot as taken and step over it.
        _write_file(path, (data,))

    def write(self, key: str, chunks: Iterable[bytes | memoryview], size_hint: int, stop: Stop) -> None:  # noqa: ARG002
        path = self._path(key)
        folder = os.path.dirname(path)
        partial = f"{folder}/{PARTIAL}{os.path.basename(path)}"
        with translating(path):
            try:
                _fill(self._open_in_folder(partial), _checked(chunks, stop))
                stop.check()
                os.rename(partial, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
                raise
            _sync_folder(folder)

    def _open_in_folder(self, path: str) -> int:
        """A new file; made again if another process just dropped its folder, which was empty still."""
        for _ in range(MAX_LISTINGS):
            self._make_folder(os.path.dirname(path))
            with contextlib.suppress(FileNotFoundError):
                return _open_new(path)
        return _open_new(path)

    def _make_folder(self, folder: str) -> str:
        if folder not in self._known_folders or not os.path.isdir(folder):
            _make_folder_durably(folder)
            self._known_folders.add(folder)
        return folder

    # --- deleting ------------------------------------------------------------------------------

    def delete(self, keys: Sequence[str]) -> None:
        folders = set()
        for key in keys:
            path = self._path(key)
            with translating(path), contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            folders.add(os.path.dirname(path))
        for folder in folders:
            self._drop_if_empty(folder)

    def _drop_if_empty(self, folder: str) -> None:
        if os.path.basename(os.path.dirname(folder)) == DATA:
            with contextlib.suppress(OSError):  # not empty, or gone: both are fine
                os.rmdir(folder)
                self._known_folders.discard(folder)

    def sweep(self, is_dead: Callable[[str], bool]) -> None:
        with translating(self.uri):
            for path, key in self._partials():
                if is_dead(key):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                    self._drop_if_empty(os.path.dirname(path))

    def _partials(self) -> Iterator[tuple[str, str]]:
        """Half-written files, each with the key that it would have got."""
        folders = [LOG]
        with contextlib.suppress(FileNotFoundError):
            folders += [f"{DATA}/{name}" for name in os.listdir(self._path(DATA))]
        for folder in folders:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for name in os.listdir(self._path(folder)):
                    if name.startswith(PARTIAL):
                        yield (
                            f"{self._path(folder)}/{name}",
                            f"{folder}/{name.removeprefix(PARTIAL).partition('~')[0]}",
                        )


def _checked(chunks: Iterable[bytes | memoryview], stop: Stop) -> Iterator[bytes | memoryview]:
    for chunk in chunks:
        stop.check()
        yield chunk


def _write_file(path: str, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a new file and makes it durable."""
    _fill(_open_new(path), chunks)


def _open_new(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _fill(descriptor: int, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes and closes a file, and makes it durable."""
    try:
        written = under_way = 0
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                count = os.write(descriptor, rest)
                rest = rest[count:]
                written += count
            if written - under_way >= WRITE_BACK_BYTES:
                _begin_write_back(descriptor, under_way, written)
                under_way = written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _begin_write_back(descriptor: int, start: int, end: int) -> None:
    """Has the disk work while more is made; else all of its work would begin with fsync (1 GiB: 0.3 s more of 0.6)."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with contextlib.suppress(OSError):  # advice only
            os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)


def _make_folder_durably(folder: str) -> None:
    """``makedirs`` whose every new folder survives a power cut."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        parent = os.path.dirname(folder)
        if parent == folder:
            break
        folder = parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        _sync_folder(os.path.dirname(path))


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without folder fsync
            raise
    finally:
        os.close(descriptor)
