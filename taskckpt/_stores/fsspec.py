"""The one module that knows fsspec: any of its stores, with its errors translated once, here."""

from __future__ import annotations

import contextlib
import difflib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

from taskckpt._operation import Stop, ordered_map, with_retries
from taskckpt._stores import (
    AZURE_PROTOCOLS,
    CHUNK_BYTES,
    GCS_PROTOCOLS,
    LOCAL_PROTOCOLS,
    NO_ROOM,
    S3_PROTOCOLS,
    Listing,
    Location,
    Store,
)
from taskckpt.errors import (
    AlreadyExistsError,
    DeniedError,
    MissingDependencyError,
    NotFoundError,
    StorageFullError,
    TaskckptError,
    TaskckptWarning,
    UnavailableError,
    UsageError,
)

T = TypeVar("T")

# fsspec has no type information, and its file systems differ in what they offer.
FileSystem: TypeAlias = Any

# HTTP status, the service's own error code, and its message.
Answer: TypeAlias = "tuple[int | None, str | None, str]"

# Ranged reads under way at once while an object is streamed.
READ_THREADS = 4
# Large enough to hide a round trip, and no larger: clients hold each twice (8 MiB: 45 MiB more memory, no faster).
RANGE_BYTES = 4 * 1024 * 1024

# Protocols whose clients know a conditional create; whether the server obeys is probed.
NATIVE_CREATE = (*S3_PROTOCOLS, *GCS_PROTOCOLS, *AZURE_PROTOCOLS)

# Protocols whose first path component is a bucket: it must exist, it is never created here.
BUCKET_PROTOCOLS = (*NATIVE_CREATE, "adl", "oss", "r2")

# Those that somebody may have mistyped.
_USUAL = (*NATIVE_CREATE, *LOCAL_PROTOCOLS, "memory", "hdfs", "sftp", "http", "https")

_EXTRAS = {
    **dict.fromkeys(S3_PROTOCOLS, "taskckpt[s3]"),
    **dict.fromkeys(GCS_PROTOCOLS, "taskckpt[gcs]"),
    **dict.fromkeys(AZURE_PROTOCOLS, "taskckpt[azure]"),
}


def open_remote(location: Location, storage_options: dict[str, Any], timeout_s: float) -> Store:
    """The store of a protocol other than the local disk's."""
    if storage_options.get("asynchronous"):
        raise UsageError(
            "storage_options has asynchronous=True.",
            uri=location.uri,
            hint="Leave it out: taskckpt calls the store from threads of its own.",
        )
    forced = _forced_transfer()
    if forced != "fsspec" and location.protocol in NATIVE_CREATE:
        from taskckpt._stores.obstore import open_obstore

        found = open_obstore(
            location,
            storage_options,
            timeout_s,
            forced=forced is not None,
            through_fsspec=lambda: _open_fsspec(location, storage_options, timeout_s),
        )
        if found is not None:
            return found
    return _open_fsspec(location, storage_options, timeout_s)


def _forced_transfer() -> str | None:
    """What TASKCKPT_TRANSFER says; None leaves the choice to us."""
    transfer = os.environ.get("TASKCKPT_TRANSFER") or None
    if transfer not in (None, "fsspec", "obstore"):
        raise UsageError(
            f"TASKCKPT_TRANSFER is {transfer!r}.",
            hint="Set it to fsspec or obstore, or leave it out for the faster one.",
        )
    return transfer


def _open_fsspec(location: Location, storage_options: dict[str, Any], timeout_s: float) -> Store:
    if location.protocol in S3_PROTOCOLS:
        from taskckpt._stores.s3 import S3Store

        return S3Store(location, storage_options, timeout_s)
    if location.protocol in GCS_PROTOCOLS:
        from taskckpt._stores.gcs import GCSStore

        return GCSStore(location, storage_options, timeout_s)
    if location.protocol in AZURE_PROTOCOLS:
        from taskckpt._stores.azure import AzureStore

        return AzureStore(location, storage_options, timeout_s)
    if location.protocol == "memory":
        return MemoryStore(location, storage_options, timeout_s)
    require_known(location)
    return FsspecStore(location, storage_options, timeout_s)


def require_known(location: Location) -> None:
    """Raises UsageError unless fsspec knows the protocol; never falls back to the local disk."""
    import fsspec

    known = fsspec.available_protocols()
    if location.protocol not in known and location.protocol not in fsspec.registry:
        near = difflib.get_close_matches(location.protocol, _USUAL, n=3, cutoff=0.5)
        raise UsageError(
            f"Unknown protocol {location.protocol!r}.",
            uri=location.uri,
            hint=f"Did you mean {', '.join(f'{one}://' for one in near)}?"
            if near
            else "There are s3://, gs://, az://, and those of fsspec's file systems.",
        )


# File systems of this process, and in a forked child those of its parent, which are never freed there. Their clients
# would close the parent's connections, and with them take its sockets out of the epoll instance that a fork shares:
# the parent's next request then hangs until it times out (measured with s3fs).
_alive: weakref.WeakValueDictionary[int, FileSystem] = weakref.WeakValueDictionary()
_of_the_parent: list[FileSystem] = []


def _keep_those_of_the_parent() -> None:
    _of_the_parent.extend(_alive.values())
    _alive.clear()


os.register_at_fork(after_in_child=_keep_those_of_the_parent)


def new_filesystem(location: Location, options: dict[str, Any]) -> FileSystem:
    """A file system of our own: not shared with the user's, and without a cache of listings."""
    import fsspec

    try:
        make = fsspec.get_filesystem_class(location.protocol)
    except ImportError as error:
        package = _EXTRAS.get(location.protocol)
        raise MissingDependencyError(
            f"The package for {location.protocol}:// is not installed: {error}.",
            uri=location.uri,
            hint=f"pip install '{package}'" if package else str(error),
        ) from error
    try:
        made = make(**{"skip_instance_cache": True, "use_listings_cache": False, **options})
    except TypeError as error:
        raise UsageError(f"storage_options do not fit {location.protocol}://: {error}.", uri=location.uri) from error
    _alive[id(made)] = made
    return made


def in_loop_of(fs: FileSystem, function: Callable[..., Coroutine[Any, Any, T]], *given: Any, timeout_s: float) -> T:
    """The answer of a coroutine that uses the file system's client, which lives in fsspec's loop."""
    import fsspec.asyn

    run: Any = fsspec.asyn.sync
    answer: T = run(fs.loop, function, *given, timeout=timeout_s)
    return answer


class FsspecStore:
    """See ``_stores.Store``. Works on any fsspec file system through its synchronous verbs."""

    exclusive: bool | None = False

    def __init__(self, location: Location, storage_options: dict[str, Any], timeout_s: float) -> None:
        self.uri = location.uri
        self._location = location
        self._options = storage_options
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._filesystem: FileSystem | None = None
        self._pid = os.getpid()
        if location.protocol in NATIVE_CREATE:
            self.exclusive = None

    @property
    def fs(self) -> FileSystem:
        """Made at first use, and anew in a forked child (an inherited one would hang or raise)."""
        if self._pid != os.getpid():
            self._lock, self._filesystem, self._pid = threading.Lock(), None, os.getpid()
        with self._lock:
            if self._filesystem is None:
                self._filesystem = self._connect()
            return self._filesystem

    def _connect(self) -> FileSystem:
        return new_filesystem(self._location, self._options)

    def _path(self, key: str) -> str:
        return f"{self._location.path}/{key}" if key else self._location.path

    @property
    def _bucket(self) -> str:
        return self._location.path.partition("/")[0]

    def _key(self, key: str) -> str:
        """The whole key, in its bucket."""
        prefix = self._location.path.partition("/")[2]
        return "/".join(part for part in (prefix, key) if part)

    def _folder_key(self, folder: str) -> str:
        """What the whole keys of all that lies below a folder begin with; at a bucket's own root, nothing."""
        key = self._key(folder)
        return f"{key}/" if key else ""

    def _call(self, key: str, request: Callable[[], T], stop: Stop | None = None) -> T:
        """One request: with its errors translated, and passing ones tried again."""
        uri = f"{self.uri}/{key}" if key else self.uri

        def translated_request() -> T:
            with _translating(uri):
                return request()

        return with_retries(translated_request, timeout_s=self._timeout_s, stop=stop)

    # --- reading -------------------------------------------------------------------------------

    def list_below(self, folder: str, *, first_page: bool = False) -> Listing:
        sizes, complete = self._list(folder, first_page=first_page)
        return Listing(sizes, complete)

    def sizes_below(self, folder: str) -> dict[str, int]:
        return self._list(folder)[0]

    def _list(self, folder: str, *, first_page: bool = False) -> tuple[dict[str, int], bool]:  # noqa: ARG002 - all pages
        """All objects below a folder with their sizes, and whether they are all."""
        root = self._path(folder)

        def request() -> dict[str, int]:
            self.fs.invalidate_cache()
            return self._walk(root)

        sizes = self._call(folder, request)
        if not sizes:
            self._call(folder, self._require_bucket)
        return sizes, True

    def folders(self, folder: str) -> list[str]:
        def request() -> list[str]:
            self.fs.invalidate_cache()
            try:
                entries = self.fs.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                self._require_bucket()
                return []
            return [entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"]

        return sorted(name.rpartition("/")[2] for name in self._call(folder, request))

    def _walk(self, root: str) -> dict[str, int]:
        """All objects below a folder. Not fsspec's find: that one leaves out what it cannot list, and says nothing."""
        start = len(self.fs._strip_protocol(root)) + 1  # noqa: SLF001 - how ls() spells what it found
        sizes: dict[str, int] = {}
        pending = [root]
        while pending:
            try:
                entries = self.fs.ls(pending.pop(), detail=True)
            except FileNotFoundError:
                continue  # an absent folder is an empty one
            for entry in entries:
                name = entry["name"].rstrip("/")
                if entry["type"] == "directory":
                    pending.append(name)
                elif name[start:]:
                    sizes[name[start:]] = int(entry["size"])
        return sizes

    def _require_bucket(self) -> None:
        if self._location.protocol in BUCKET_PROTOCOLS:
            bucket = self._location.path.strip("/").split("/")[0]
            self.fs.ls(bucket, detail=False)  # FileNotFoundError if there is no such bucket

    def read(self, key: str) -> bytes:
        return self._call(key, lambda: bytes(self.fs.cat_file(self._path(key))))

    def size(self, key: str) -> int | None:
        def request() -> int | None:
            self.fs.invalidate_cache()
            try:
                info = self.fs.info(self._path(key))
            except FileNotFoundError:
                return None
            return int(info["size"]) if info.get("type") == "file" else None

        return self._call(key, request)

    def stream(self, key: str, size_bytes: int, stop: Stop) -> Iterator[bytes]:
        ranges = ((start, min(start + RANGE_BYTES, size_bytes)) for start in range(0, size_bytes, RANGE_BYTES))
        return ordered_map(lambda span: self._read_range(key, *span, stop), ranges, threads=READ_THREADS)

    def _read_range(self, key: str, start: int, end: int, stop: Stop) -> bytes:
        def request() -> bytes:
            try:
                data = self._fetch(key, start, end)
            except Exception as error:
                if _http_answer(error)[0] == RANGE_NOT_SATISFIABLE:
                    return b""  # the object ends before: it is shorter than promised, and the caller counts
                raise
            if len(data) > end - start:
                raise UnavailableError(f"Asked for {end - start} bytes, got {len(data)}.", uri=f"{self.uri}/{key}")
            return data

        return self._call(key, request, stop)

    def _fetch(self, key: str, start: int, end: int) -> bytes:
        return bytes(self.fs.cat_file(self._path(key), start=start, end=end))

    # --- writing -------------------------------------------------------------------------------

    def create(self, key: str, data: bytes, stop: Stop) -> None:
        if self.exclusive is not False:
            self._call(key, lambda: self.fs.pipe_file(self._path(key), data, mode="create"), stop)
            return

        def request() -> None:
            # Elsewhere fsspec's "create" looks first and writes then, and takes any error for "absent". So
            # names carry nonces there, and nothing else is ever written to this one.
            path = self._path(key)
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path, data)

        self._call(key, request, stop)

    def write(self, key: str, chunks: Iterable[bytes | memoryview], size_hint: int, stop: Stop) -> None:  # noqa: ARG002
        # No retry of the whole: the stream is gone once it was read. A payload that is only partly
        # there is named by no commit, so nobody loads it; it is removed all the same.
        path, uri = self._path(key), f"{self.uri}/{key}"
        with _translating(uri):
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            file = self.fs.open(path, "wb", block_size=CHUNK_BYTES)
        try:
            for chunk in chunks:
                stop.check()
                with _translating(uri):
                    file.write(chunk)
            stop.check()
            with _translating(uri):
                file.close()
        except BaseException:
            with contextlib.suppress(Exception):
                file.close()  # publishes what there is, and so would the end of a file that nobody closed
            with contextlib.suppress(Exception):
                self.fs.rm_file(path)
            raise

    # --- deleting ------------------------------------------------------------------------------

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._call(key, lambda key=key: self._delete_one(key))  # type: ignore[misc]

    def _delete_one(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(key))

    def sweep(self, is_dead: Callable[[str], bool]) -> None:
        """Nothing: fsspec has no word for uploads that were never completed."""


_memory_lock = threading.Lock()


class MemoryStore(FsspecStore):
    """fsspec's ``memory://``: one process only."""

    exclusive: bool | None = True

    def __init__(self, location: Location, storage_options: dict[str, Any], timeout_s: float) -> None:
        super().__init__(location, storage_options, timeout_s)
        self._owner = os.getpid()
        warnings.warn(
            "memory:// lives in this process only: a retry in another process finds nothing.",
            TaskckptWarning,
            stacklevel=6,
        )

    def _connect(self) -> FileSystem:
        if os.getpid() != self._owner:
            raise UsageError(
                "memory:// is one process only, and this is a child process.",
                uri=self.uri,
                hint="Use a folder or a bucket to share state between processes.",
            )
        return super()._connect()

    def create(self, key: str, data: bytes, stop: Stop) -> None:
        with _memory_lock:  # fsspec's own create is a check followed by a write
            super().create(key, data, stop)


# --- errors ------------------------------------------------------------------------------------

_DENIED_CODES = {
    *("AccessDenied", "AccountProblem", "AllAccessDisabled", "AuthorizationHeaderMalformed", "ExpiredToken"),
    *("ExpiredTokenException", "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidSecurity", "InvalidToken"),
    *("RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired", "UnrecognizedClientException"),
}
_DENIED_TYPES = {
    *("ClientAuthenticationError", "CredentialRetrievalError", "DefaultCredentialsError", "NoAuthTokenError"),
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "RefreshError", "SSOTokenLoadError"),
    *("TokenRetrievalError", "UnauthorizedSSOTokenError"),
}
_USAGE_TYPES = {"ParamValidationError", "UnknownServiceError", "InvalidRegionError", "UnknownRegionError"}
_CONFLICT_CODES = {"PreconditionFailed", "412", "BlobAlreadyExists"}
_NO_BUCKET_CODES = {"NoSuchBucket", "ContainerNotFound"}
_NO_BUCKET_TEXT = "bucket does not exist"
_PASSING_STATUS = {408, 409, 425, 429}
RANGE_NOT_SATISFIABLE = 416


@contextlib.contextmanager
def _translating(uri: str) -> Generator[None]:
    """Whatever the clients below raise leaves here as one of our errors."""
    try:
        yield
    except TaskckptError:
        raise
    except Exception as error:
        raise translated(error, uri) from error


def translated(error: BaseException, uri: str, answer: Answer | None = None) -> TaskckptError:
    """The error of taskckpt for whatever a client raised; ``answer`` is what the server said, if the caller knows."""
    status, code, text = answer or _http_answer(error)
    names = {kind.__name__ for cause in _chain(error) for kind in type(cause).__mro__}
    if code in _DENIED_CODES or status in (401, 403) or names & _DENIED_TYPES or isinstance(error, PermissionError):
        return _denied(error, uri, code, text)
    if code in _NO_BUCKET_CODES or (isinstance(error, FileNotFoundError) and _NO_BUCKET_TEXT in text.lower()):
        return no_such_bucket(uri)
    if status == 404 or isinstance(error, FileNotFoundError):
        return NotFoundError("No such object.", uri=uri)
    if code in _CONFLICT_CODES or status == 412 or isinstance(error, FileExistsError):
        return AlreadyExistsError("The object exists already.", uri=uri)
    if names & _USAGE_TYPES or code == "InvalidBucketName":
        return UsageError(f"The store refuses the request: {text}", uri=uri, hint="Check the URL and storage_options.")
    if isinstance(error, (TypeError, ValueError, NotImplementedError)) and not isinstance(error, OSError):
        return UsageError(
            f"The store's client does not take this: {type(error).__name__}: {text}",
            uri=uri,
            hint="Check the URL, the endpoint and storage_options.",
        )
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return StorageFullError(f"The store is full: {text}", uri=uri, hint="Make room, or choose another place.")
    if status is not None and status < 500 and status not in _PASSING_STATUS:
        return UsageError(f"The store refuses the request: {text}", uri=uri, hint="Check the URL and storage_options.")
    return UnavailableError(
        f"The store does not answer as it should: {type(error).__name__}: {text}",
        uri=uri,
        hint="Check the endpoint and the network; trying again later may work.",
    )


def no_such_bucket(uri: str) -> NotFoundError:
    """For stores whose answers do not tell a bucket from an object."""
    return NotFoundError("There is no such bucket.", uri=uri, hint="Check its spelling; taskckpt never makes buckets.")


def _denied(error: BaseException, uri: str, code: str | None, text: str) -> DeniedError:
    hint = "Check the credentials (storage_options, or the store's usual variables and files) and the permissions"
    if code in (None, "AccessDenied", "403"):
        # Without permission to list, S3 answers 403 even where a key is simply absent.
        hint += "; on S3 the task needs s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject"
    return DeniedError(f"The store denies access: {code or type(error).__name__}: {text}", uri=uri, hint=hint + ".")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _http_answer(error: BaseException) -> Answer:
    """HTTP status, the service's own error code and its message, as far as the clients tell."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and "Error" in response:  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            body = response["Error"]
            return status, body.get("Code"), str(body.get("Message") or cause)
        if _is_garbled(cause) or (cause.__cause__ is not None and _is_garbled(cause.__cause__)):
            continue  # the 400 in it was not the server's
        if isinstance(cause, OSError) and str(cause).startswith("Forbidden: "):  # gcsfs's word for 403
            return 403, None, str(cause)
        for attribute in ("status", "status_code", "code"):  # aiohttp, azure, gcsfs
            value = getattr(cause, attribute, None)
            if isinstance(value, int) and not isinstance(cause, OSError):
                code = getattr(cause, "error_code", None)  # azure
                return value, None if code is None else str(getattr(code, "value", code)), str(cause)
    return None, None, str(error) or type(error).__name__


def _is_garbled(error: BaseException) -> bool:
    """Whether a reply was cut or no HTTP, in aiohttp's words."""
    return any(kind.__name__ == "HttpProcessingError" for kind in type(error).__mro__)
