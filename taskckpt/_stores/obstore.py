"""S3 through obstore: a fraction of the processor time of s3fs, and 4 ms to import instead of 700.

The one module that knows obstore. Its requests, errors, time-outs and retries are those of ``s3.py``; where obstore
cannot go (a forked child, an option that it does not know), the same place is reached through fsspec.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import itertools
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar
from urllib.parse import urlsplit

from taskckpt._layout import LOG
from taskckpt._operation import FIRST_WAIT_S, LONGEST_WAIT_S, TRIES, Stop, ordered_map, with_retries
from taskckpt._stores import (
    AZURE_PROTOCOLS,
    CHUNK_BYTES,
    GCS_PROTOCOLS,
    S3_PROTOCOLS,
    Listing,
    Location,
    Store,
)
from taskckpt._stores.fsspec import RANGE_NOT_SATISFIABLE, translated
from taskckpt._stores.obstore_clouds import azure_settings, gcs_settings
from taskckpt._stores.obstore_options import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, Settings, s3_settings
from taskckpt._testing import switches
from taskckpt.errors import MissingDependencyError, NotFoundError, TaskckptError, UnavailableError, UsageError

logger = logging.getLogger("taskckpt")

P = ParamSpec("P")
R = TypeVar("R")

MIB = 1024 * 1024
# What fits in one part goes up in one request. 4 under way add 57 MiB to the process, 4 of 16 MiB 96, and no speed.
PART_BYTES = 8 * MIB
PARTS_UNDER_WAY = 4
MAX_PARTS = 10_000
READ_THREADS = 4
DELETE_THREADS = 8
PAGE_KEYS = 1000


@dataclass(frozen=True, slots=True)
class _Cloud:
    """What differs between the clouds.

    Attributes:
        settings: From location, options and perhaps a region to obstore's settings.
        package: fsspec's package for the same, and the extra that brings it.
        listing: What the raw answer to a listing has in it; b"" where obstore does not give that, and None where it
            takes nothing else for a listing anyway.
        keeps_parts: Whether the parts of an aborted upload stay until something else takes their place.
    """

    settings: Callable[[Location, dict[str, Any], str | None], Settings]
    package: str
    extra: str
    listing: bytes | None
    keeps_parts: bool = False


_S3 = _Cloud(s3_settings, "s3fs", "taskckpt[s3]", b"<ListBucketResult")
_GCS = _Cloud(gcs_settings, "gcsfs", "taskckpt[gcs]", b"")
_AZURE = _Cloud(azure_settings, "adlfs", "taskckpt[azure]", None, keeps_parts=True)
_CLOUDS: dict[str, _Cloud] = {
    **dict.fromkeys(S3_PROTOCOLS, _S3),
    **dict.fromkeys(GCS_PROTOCOLS, _GCS),
    **dict.fromkeys(AZURE_PROTOCOLS, _AZURE),
}


def open_obstore(
    location: Location, options: dict[str, Any], timeout_s: float, *, forced: bool, through_fsspec: Callable[[], Store]
) -> Store | None:
    """The store of a protocol that obstore speaks; None if it does not, or is not installed.

    Raises:
        MissingDependencyError: It is not installed, but ``forced``.
    """
    if location.protocol not in _CLOUDS:
        return None
    if importlib.util.find_spec("obstore") is None:
        if forced:
            raise MissingDependencyError(
                "TASKCKPT_TRANSFER=obstore, and obstore is not installed.",
                uri=location.uri,
                hint="pip install 'taskckpt[fast]'",
            )
        return None
    return ObstoreStore(location, options, timeout_s, forced=forced, through_fsspec=through_fsspec)


# --- forked children ---------------------------------------------------------------------------

# The runtime that obstore starts at its first request does not survive a fork: a child's first request hangs, and
# then the parent's next one too, for they share an epoll instance (both measured). So a child whose parent had
# imported obstore never calls it, and never frees what the parent had made.
_inherited = False
_of_the_parent: list[object] = []


def _in_a_child() -> None:
    global _inherited
    _inherited = _inherited or "obstore" in sys.modules


os.register_at_fork(after_in_child=_in_a_child)


def _unless_elsewhere(
    verb: Callable[Concatenate[ObstoreStore, P], R],
) -> Callable[Concatenate[ObstoreStore, P], R]:
    """Where obstore cannot go, the same verb of the store behind fsspec answers."""

    def here_or_there(self: ObstoreStore, /, *arguments: P.args, **named: P.kwargs) -> R:
        other = self.elsewhere()
        if other is None:
            return verb(self, *arguments, **named)
        answer: R = getattr(other, verb.__name__)(*arguments, **named)
        return answer

    return here_or_there


class ObstoreStore:
    """See ``_stores.Store``."""

    exclusive: bool | None = None

    def __init__(
        self,
        location: Location,
        options: dict[str, Any],
        timeout_s: float,
        *,
        forced: bool,
        through_fsspec: Callable[[], Store],
    ) -> None:
        self.uri = location.uri
        self._location = location
        self._options = options
        self._timeout_s = timeout_s
        self._forced = forced
        self._through_fsspec = functools.cache(through_fsspec)
        self._cloud = _CLOUDS[location.protocol]
        self._region: str | None = None
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._settings: Settings | None = None
        self._clients: dict[bool, Any] = {}

    # --- which way -----------------------------------------------------------------------------

    def elsewhere(self) -> Store | None:
        """The store behind fsspec, if obstore must not or cannot do it."""
        if self._pid != os.getpid():
            _of_the_parent.append(self._clients)
            self._begin()
        if _inherited:
            return self._other("obstore does not survive a fork", "Start processes with spawn")
        unhonoured = self._known().unhonoured
        if not unhonoured:
            return None
        names = ", ".join(unhonoured)
        if self._forced:
            raise UsageError(
                f"TASKCKPT_TRANSFER=obstore, and obstore does not know {names}.",
                uri=self.uri,
                hint="Leave that out, or leave the choice of the transfer to taskckpt.",
            )
        return self._other(f"obstore does not know {names}", "Leave that out")

    def _other(self, why: str, way_out: str) -> Store:
        if importlib.util.find_spec(self._cloud.package) is None:
            raise MissingDependencyError(
                f"{why}, and {self._cloud.package} is not installed.".capitalize(),
                uri=self.uri,
                hint=f"{way_out}, or pip install '{self._cloud.extra}'",
            )
        logger.debug("Through %s, since %s: %s", self._cloud.package, why, self.uri)
        return self._through_fsspec()

    def _known(self) -> Settings:
        with self._lock:
            if self._settings is None:
                try:
                    self._settings = self._cloud.settings(self._location, self._options, self._region)
                except TaskckptError:
                    raise
                except Exception as error:  # of botocore, and of whatever it asks for credentials
                    raise translated(error, self.uri) from error
            return self._settings

    def _client(self, *, for_parts: bool = False) -> Any:
        """Made at first use. The one for parts repeats them itself: nobody above could hand them in again."""
        settings = self._known()
        with self._lock:
            if for_parts not in self._clients:
                self._clients[for_parts] = self._new_client(settings, for_parts=for_parts)
            return self._clients[for_parts]

    def _new_client(self, settings: Settings, *, for_parts: bool) -> Any:
        import obstore.store

        limits: dict[str, Any] = {
            "connect_timeout": min(CONNECT_TIMEOUT_S, self._timeout_s / 2),
            # It counts from the first byte that is sent: a part on a slow line needs more.
            "read_timeout": self._timeout_s / 2 if for_parts else min(READ_TIMEOUT_S, self._timeout_s / 2),
            "timeout": self._timeout_s,
            **settings.client,
        }
        client = {
            "allow_http": settings.url.startswith("http:"),
            **{name: timedelta(seconds=v) if name.endswith("timeout") else v for name, v in limits.items()},
        }
        config = dict(settings.config)
        retries: dict[str, Any] = {"max_retries": 0}  # with_retries is the only one that repeats
        if for_parts:
            # Nobody needs to sign, and thereby hash, the parts: the digest of the whole is in the commit, which is.
            config |= {"unsigned_payload": True} if "unsigned_payload" in config else {}
            first_s = 0.001 if switches.instant_retries else FIRST_WAIT_S
            retries = {
                "max_retries": TRIES - 1,
                "retry_timeout": timedelta(seconds=self._timeout_s),
                "backoff": {
                    "init_backoff": timedelta(seconds=first_s),
                    "max_backoff": timedelta(seconds=LONGEST_WAIT_S),
                    "base": 2,
                },
            }
        make = getattr(obstore.store, settings.store)
        return make(
            settings.bucket,
            config=config,
            client_options=client,
            retry_config=retries,
            credential_provider=settings.credentials,
        )

    def _key(self, key: str) -> str:
        prefix = self._location.path.partition("/")[2]
        return "/".join(part for part in (prefix, key) if part)

    def _call(self, key: str, request: Callable[[], R], stop: Stop | None = None) -> R:
        """One request: with its errors translated, and passing ones tried again."""
        uri = f"{self.uri}/{key}" if key else self.uri

        def translated_request() -> R:
            try:
                return request()
            except TaskckptError:
                raise
            except Exception as error:
                if self._found_elsewhere(error):
                    return translated_request()
                raise _translated(error, uri) from error

        return with_retries(translated_request, timeout_s=self._timeout_s, stop=stop)

    def _found_elsewhere(self, error: Exception) -> bool:
        """Whether the bucket lies in another region than thought; from now on that one is signed for."""
        if not _MISPLACED.search(str(error)) or self._region is not None:
            return False
        self._region = _region_of(self._known().url, self._timeout_s)
        if self._region is None:
            return False
        with self._lock:
            self._settings, self._clients = None, {}
        return True

    # --- reading -------------------------------------------------------------------------------

    @_unless_elsewhere
    def list_below(self, folder: str, *, first_page: bool = False) -> Listing:
        """See ``_stores.Store``."""
        sizes, complete = self._list(folder, first_page=first_page)
        return Listing(sizes, complete)

    @_unless_elsewhere
    def sizes_below(self, folder: str) -> dict[str, int]:
        """See ``_stores.Store``."""
        return self._list(folder)[0]

    def _list(self, folder: str, *, first_page: bool = False) -> tuple[dict[str, int], bool]:
        """All objects below a folder with their sizes, and whether they are all."""
        import obstore

        prefix = self._key(folder)

        def request() -> tuple[dict[str, int], bool]:
            sizes: dict[str, int] = {}
            for page in obstore.list(self._client(), prefix, chunk_size=PAGE_KEYS):
                names = [entry["path"].removeprefix(f"{prefix}/") for entry in page]
                sizes |= zip(names, (int(entry["size"]) for entry in page), strict=True)
                # Directory buckets (S3 Express) list in no order: there the first page proves nothing.
                if first_page and len(page) == PAGE_KEYS and names == sorted(names):
                    return sizes, False
            if len(sizes) % PAGE_KEYS == 0:
                self._require_listing()
            return sizes, True

        return self._call(folder, request)

    @_unless_elsewhere
    def folders(self, folder: str) -> list[str]:
        """See ``_stores.Store``."""
        import obstore

        def request() -> list[str]:
            page = obstore.list_with_delimiter(self._client(), self._key(folder))
            if not page["common_prefixes"]:
                self._require_listing()
            return [name.rstrip("/").rpartition("/")[2] for name in page["common_prefixes"]]

        return sorted(self._call(folder, request))

    def _require_listing(self) -> None:
        """Where a listing ends with nothing: was it one? To obstore, a web page without any keys looks the same."""
        import obstore

        if not self._cloud.listing:
            if self._cloud.listing is not None:
                self._require_absence()
            return
        try:
            answer = obstore.get(self._client(), "")  # the bucket itself: a listing too, of which the head is enough
            head = next(iter(answer.stream(min_chunk_size=1024)), b"")
        except Exception as error:
            if _answer(error)[1] == "AccessDenied":
                return  # only below a prefix may we list: so says S3, and no web page
            raise
        if self._cloud.listing not in bytes(head):
            raise UnavailableError("The answer is no listing.", uri=self.uri, hint="Check the endpoint.")

    def _require_absence(self) -> None:
        """A web page answers all requests alike; a store knows what is not there."""
        import obstore

        try:
            obstore.head(self._client(), self._key(f"{LOG}/absent"))
        except FileNotFoundError:
            return
        except obstore.exceptions.GenericError as error:
            if _answer(error)[0] is not None:
                raise
        raise UnavailableError("The answer is no listing.", uri=self.uri, hint="Check the endpoint.")

    @_unless_elsewhere
    def read(self, key: str) -> bytes:
        """See ``_stores.Store``."""
        import obstore

        return self._call(key, lambda: obstore.get(self._client(), self._key(key)).bytes().to_bytes())

    @_unless_elsewhere
    def size(self, key: str) -> int | None:
        """See ``_stores.Store``."""
        import obstore

        try:
            return int(self._call(key, lambda: obstore.head(self._client(), self._key(key))["size"]))
        except NotFoundError:
            pass
        try:
            # HEAD has no body: a missing bucket looks like a missing key.
            return int(self._call(key, lambda: obstore.get(self._client(), self._key(key)).meta["size"]))
        except NotFoundError as error:
            if "bucket" in error.message:
                raise
            return None

    @_unless_elsewhere
    def stream(self, key: str, size_bytes: int, stop: Stop) -> Iterator[memoryview]:
        """See ``_stores.Store``."""
        ranges = ((start, min(start + CHUNK_BYTES, size_bytes)) for start in range(0, size_bytes, CHUNK_BYTES))
        return ordered_map(lambda span: self._read_range(key, *span, stop), ranges, threads=READ_THREADS)

    def _read_range(self, key: str, start: int, end: int, stop: Stop) -> memoryview:
        import obstore

        def request() -> memoryview:
            try:
                return memoryview(obstore.get_range(self._client(), self._key(key), start=start, end=end))
            except Exception as error:
                if _answer(error)[0] == RANGE_NOT_SATISFIABLE:
                    return memoryview(b"")  # the object ends before: shorter than promised, and the caller counts
                raise

        return self._call(key, request, stop)

    # --- writing -------------------------------------------------------------------------------

    @_unless_elsewhere
    def create(self, key: str, data: bytes, stop: Stop) -> None:
        """See ``_stores.Store``."""
        self._put(key, data, stop, mode="create")

    def _put(self, key: str, data: bytes | bytearray, stop: Stop, *, mode: Literal["create", "overwrite"]) -> None:
        import obstore

        self._call(key, lambda: obstore.put(self._client(), self._key(key), data, mode=mode, use_multipart=False), stop)

    @_unless_elsewhere
    def write(self, key: str, chunks: Iterable[bytes | memoryview], size_hint: int, stop: Stop) -> None:
        """See ``_stores.Store``."""
        chunks = iter(chunks)
        first = bytearray()
        for chunk in chunks:
            first += chunk
            if len(first) > PART_BYTES:
                break
        else:
            self._put(key, first, stop, mode="overwrite")
            return
        self._write_parts(key, first, chunks, part_size(size_hint), stop)

    def _write_parts(
        self, key: str, first: bytearray, chunks: Iterator[bytes | memoryview], part_bytes: int, stop: Stop
    ) -> None:
        import obstore

        uri = f"{self.uri}/{key}"
        stop.check()
        writer = obstore.open_writer(
            self._client(for_parts=True), self._key(key), buffer_size=part_bytes, max_concurrency=PARTS_UNDER_WAY
        )
        size = 0
        try:
            for chunk in itertools.chain((first,), chunks):
                stop.check()
                self._write_chunk(writer, chunk, uri)
                size += len(chunk)
            stop.check()
        except BaseException as error:
            self._abort(writer, error)
            if self._cloud.keeps_parts:
                self._displace(key)
            raise
        self._complete(key, writer, size)

    def _write_chunk(self, writer: Any, chunk: bytes | bytearray | memoryview, uri: str) -> None:
        try:
            # It keeps what it gets until that has arrived, but the caller may use its buffer again.
            writer.write(bytes(chunk) if isinstance(chunk, memoryview) else chunk)
        except Exception as error:
            raise _translated(error, uri) from error

    def _abort(self, writer: Any, error: BaseException) -> None:
        try:
            writer.__exit__(type(error), error, None)
        except Exception as failed:  # noqa: BLE001 - the error that led here is the one to raise
            reason = _translated(failed, self.uri)
            if not isinstance(reason, NotFoundError):  # gone already
                logger.warning("An unfinished upload could not be removed; a later attempt sweeps it: %s", reason)

    def _displace(self, key: str) -> None:
        """Removes the parts of an aborted upload: for a moment, an empty object takes their place.

        One that was under way may arrive afterwards; as all that is left of a killed save, a later attempt sweeps it.
        """
        try:
            self._put(key, b"", Stop(), mode="overwrite")
            self.delete([key])
        except TaskckptError as error:
            logger.warning("Parts of an unfinished upload could not be removed: %s", error)

    def _complete(self, key: str, writer: Any, size: int) -> None:
        uri = f"{self.uri}/{key}"
        try:
            writer.close()  # completes the upload, or aborts it
        except Exception as error:
            failed = _translated(error, uri)
            if not isinstance(failed, NotFoundError):
                raise failed from error
            # A repeated request whose first reply was lost: the upload is gone because it is complete.
            if self.size(key) != size:
                raise UnavailableError("An upload vanished before it was completed.", uri=uri) from error

    # --- deleting ------------------------------------------------------------------------------

    @_unless_elsewhere
    def delete(self, keys: Sequence[str]) -> None:
        """See ``_stores.Store``."""
        if not keys:
            return
        try:
            self._delete(list(keys))
        except NotFoundError:
            # On Google's and Azure's clouds one that is absent ends it, and says nothing of the others.
            list(ordered_map(self._delete_one, keys, threads=DELETE_THREADS))

    def _delete(self, keys: list[str]) -> None:
        import obstore

        paths = [self._key(key) for key in keys]
        self._call(keys[0] if len(keys) == 1 else "", lambda: obstore.delete(self._client(), paths))

    def _delete_one(self, key: str) -> None:
        with contextlib.suppress(NotFoundError):
            self._delete([key])

    @_unless_elsewhere
    def sweep(self, is_dead: Callable[[str], bool]) -> None:
        """See ``_stores.Store``. obstore has no word for unfinished uploads: fsspec's package sees to them."""
        if importlib.util.find_spec(self._cloud.package) is not None:
            self._through_fsspec().sweep(is_dead)
        else:
            _say_who_sweeps(self._cloud)


@functools.cache
def _say_who_sweeps(cloud: _Cloud) -> None:
    """Once is enough."""
    logger.info(
        "Uploads of killed attempts are not removed without %s: let the bucket's lifecycle rules do it, or "
        "pip install '%s'.",
        *(cloud.package, cloud.extra),
    )


def part_size(size_hint: int) -> int:
    """Bytes per part: 8 MiB, and more only where 10,000 of them would not hold the payload."""
    return max(PART_BYTES, -(-size_hint * 11 // 10 // MAX_PARTS // MIB) * MIB)


# --- regions -----------------------------------------------------------------------------------

# What S3 answers where a request was signed for, or sent to, another region than the bucket's.
_MISPLACED = re.compile(r"Received redirect without LOCATION|<Code>(AuthorizationHeaderMalformed|PermanentRedirect)<")


def _region_of(url: str, timeout_s: float) -> str | None:
    """The region of the bucket at a URL, which S3 tells everybody; botocore asks in the same way."""
    where = urlsplit(url)
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    with closing(kind(where.netloc, timeout=min(CONNECT_TIMEOUT_S, timeout_s / 2))) as connection:
        try:
            connection.request("HEAD", where.path or "/")
            return connection.getresponse().headers.get("x-amz-bucket-region")
        except (OSError, http.client.HTTPException):
            return None


# --- errors ------------------------------------------------------------------------------------

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]+)</Code>|\(code: (\w+)\)")
_MESSAGE = re.compile(r"<Message>([^<]+)</Message>")
# What obstore itself says where a server answers with nothing rather than with 416.
_BEYOND_THE_END = "Wanted range starting at"


def _answer(error: Exception) -> tuple[int | None, str | None, str]:
    """HTTP status, the service's own code and its message: they stand in the text of obstore's errors only."""
    text = str(error).partition("\n\nDebug source")[0]
    if _BEYOND_THE_END in text:
        return RANGE_NOT_SATISFIABLE, None, text
    status, code, message = (pattern.search(text) for pattern in (_STATUS, _CODE, _MESSAGE))
    return int(status[1]) if status else None, (code[1] or code[2]) if code else None, message[1] if message else text


def _translated(error: Exception, uri: str) -> TaskckptError:
    return translated(error, uri, _answer(error))
