"""Google Cloud Storage through gcsfs: its session and credentials, but the requests are our own.

gcsfs's own verbs first ask over gRPC what kind of bucket it is (60 s where only HTTP is let through, measured; and
gRPC does not survive a fork), and its file writer publishes what it has when an exception passes through.
Payloads go up as resumable uploads, of which nobody sees anything before the last part has arrived; what a killed
process leaves of one is never listed, and Google drops it after a week. (Parts of obstore's stay for ever: see sweep.)
https://cloud.google.com/storage/docs/json_api
"""

from __future__ import annotations

import contextlib
import io
import json
import secrets
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from taskckpt._layout import DATA
from taskckpt._operation import Stop, ordered_map
from taskckpt._stores import FIRST_PAGE
from taskckpt._stores.fsspec import FileSystem, FsspecStore, new_filesystem, no_such_bucket
from taskckpt._stores.s3 import CONNECT_TIMEOUT_S, MIB, READ_TIMEOUT_S, regrouped
from taskckpt.errors import NotFoundError, TaskckptError, UnavailableError

# Parts of a resumable upload go one after the other, each a multiple of 256 KiB; Google advises 8 MiB or more. While
# one is under way, the next is made: four of them are in memory.
PART_BYTES = 8 * MIB
DELETE_THREADS = 8
PAGE = 1000


class GCSStore(FsspecStore):
    """See ``_stores.Store``."""

    def _connect(self) -> FileSystem:
        import aiohttp

        patience = aiohttp.ClientTimeout(
            sock_connect=min(CONNECT_TIMEOUT_S, self._timeout_s / 2), sock_read=min(READ_TIMEOUT_S, self._timeout_s / 2)
        )
        fs = new_filesystem(self._location, {"requests_timeout": patience, **self._options})
        # One try: with_retries is the only one that repeats, and gcsfs logs a traceback for each error.
        once = getattr(type(fs)._request, "__wrapped__", None)  # noqa: SLF001 - there is no public switch
        if once is not None:
            fs._request = types.MethodType(once, fs)  # noqa: SLF001 - same
        return fs

    def _gcs(
        self, key: str, method: str, path: str, *names: str, stop: Stop | None = None, **arguments: Any
    ) -> tuple[Mapping[str, str], bytes]:
        """Headers and body of the answer to one request; ``names`` are put into the path, escaped."""
        return self._call(key, lambda: self._once(method, path, *names, **arguments), stop)

    def _once(
        self, method: str, path: str, *names: str, data: bytes | None = None, **arguments: Any
    ) -> tuple[Mapping[str, str], bytes]:
        body = None if data is None else io.BytesIO(data)  # of plain bytes, aiohttp warns
        arguments |= {"data": body, "timeout": self._timeout_s}  # the time-out is for fsspec's sync()
        headers, content = self.fs.call(method, path, *names, **arguments)
        return headers, content

    @property
    def _uploads(self) -> str:
        root: str = self.fs.base.removesuffix("storage/v1/")
        return f"{root}upload/storage/v1/b/{{}}/o"

    # --- reading -------------------------------------------------------------------------------

    def _list(self, folder: str, *, first_page: bool = False) -> tuple[dict[str, int], bool]:
        prefix = self._folder_key(folder)
        sizes: dict[str, int] = {}
        for page in self._pages(folder, maxResults=FIRST_PAGE if first_page else PAGE):
            found = {entry["name"].removeprefix(prefix): int(entry["size"]) for entry in page.get("items", ())}
            # A console makes names that end in "/", for an empty folder.
            sizes |= {name: size for name, size in found.items() if not name.endswith("/")}
            if first_page and sizes and page.get("nextPageToken"):
                return sizes, False
        return sizes, True

    def folders(self, folder: str) -> list[str]:
        pages = self._pages(folder, delimiter="/", maxResults=PAGE)
        found = {name.removeprefix(self._folder_key(folder)) for page in pages for name in page.get("prefixes", ())}
        return sorted({name.rstrip("/") for name in found} - {""})

    def _pages(self, folder: str, **query: Any) -> Iterator[dict[str, Any]]:
        token: str | None = None
        while True:
            page = self._page(folder, prefix=self._folder_key(folder), pageToken=token, **query)
            yield page
            token = page.get("nextPageToken")
            if not token:
                return

    def _page(self, folder: str, **query: Any) -> dict[str, Any]:
        query["fields"] = "kind,items(name,size),prefixes,nextPageToken"
        try:
            _, body = self._gcs(folder, "GET", "b/{}/o", self._bucket, **query)
        except NotFoundError as error:
            raise no_such_bucket(self.uri) from error
        with contextlib.suppress(ValueError):
            page = json.loads(body)
            if isinstance(page, dict) and page.get("kind") == "storage#objects":
                return page
        raise UnavailableError("The answer is no listing.", uri=self.uri, hint="Check the endpoint.")

    def read(self, key: str) -> bytes:
        return self._gcs(key, "GET", "b/{}/o/{}", self._bucket, self._key(key), alt="media")[1]

    def size(self, key: str) -> int | None:
        try:
            _, body = self._gcs(key, "GET", "b/{}/o/{}", self._bucket, self._key(key), fields="size")
        except NotFoundError:
            self._page(key, maxResults=1)  # a missing bucket looks like a missing key
            return None
        return int(json.loads(body)["size"])

    def _fetch(self, key: str, start: int, end: int) -> bytes:
        headers = {"Range": f"bytes={start}-{end - 1}"}
        return self._once("GET", "b/{}/o/{}", self._bucket, self._key(key), alt="media", headers=headers)[1]

    # --- writing -------------------------------------------------------------------------------

    def create(self, key: str, data: bytes, stop: Stop) -> None:
        self._put(key, data, stop, ifGenerationMatch="0")

    def _put(self, key: str, data: bytes, stop: Stop, **condition: str) -> None:
        boundary = secrets.token_hex(16)  # gcsfs's never changes, and a payload may hold it
        name = json.dumps({"name": self._key(key)}).encode()
        kinds = [b"\r\nContent-Type: %s\r\n\r\n" % kind for kind in (b"application/json", b"application/octet-stream")]
        line = b"--" + boundary.encode()
        body = b"".join((line, kinds[0], name, b"\r\n", line, kinds[1], data, b"\r\n", line, b"--\r\n"))
        headers = {"Content-Type": f"multipart/related; boundary={boundary}"}
        arguments = {"uploadType": "multipart", "headers": headers, "data": body, **condition}
        self._gcs(key, "POST", self._uploads, self._bucket, stop=stop, **arguments)

    def write(self, key: str, chunks: Iterable[bytes | memoryview], size_hint: int, stop: Stop) -> None:  # noqa: ARG002
        parts = regrouped(chunks, PART_BYTES)
        first = next(parts, b"")
        second = next(parts, None)
        if second is None:
            self._put(key, first, stop)
            return
        about = {"uploadType": "resumable", "name": self._key(key)}
        headers, _ = self._gcs(key, "POST", self._uploads, self._bucket, stop=stop, **about)
        session = headers["Location"]
        try:
            self._write_resumable(key, session, _placed(first, second, parts), stop)
        except BaseException:
            # A session that cannot be ended publishes nothing either, and nobody but us knows it.
            with contextlib.suppress(TaskckptError):
                self._gcs(key, "DELETE", session)
            raise

    def _write_resumable(self, key: str, session: str, parts: Iterator[_Part], stop: Stop) -> None:
        # While a part is under way, the next one is made.
        for end, whole in ordered_map(lambda part: self._send(key, session, part, stop), parts, threads=1, ahead=1):
            if whole is not None and whole != end:
                raise UnavailableError(f"Sent {end} bytes, and {whole} arrived.", uri=f"{self.uri}/{key}")

    def _send(self, key: str, session: str, part: _Part, stop: Stop) -> tuple[int, int | None]:
        """Gives where the part ends, and after the last one how large the object is."""
        start, data, is_last = part
        end = start + len(data)
        while True:
            what = f"{start}-{end - 1}/{end if is_last else '*'}"
            headers, body = self._gcs(
                key, "PUT", session, stop=stop, headers={"Content-Range": f"bytes {what}"}, data=data[start - end :]
            )
            if is_last and body:
                return end, int(json.loads(body)["size"])
            # "bytes=0-41", or nothing: the server may keep less than it was sent.
            kept = int(headers["Range"].rpartition("-")[2]) + 1 if "Range" in headers else 0
            if kept == end and not is_last:
                return end, None
            if not start < kept < end:
                raise UnavailableError(f"The upload is at {kept}, not at {end} bytes.", uri=f"{self.uri}/{key}")
            start = kept

    # --- deleting ------------------------------------------------------------------------------

    def delete(self, keys: Sequence[str]) -> None:
        list(ordered_map(self._delete, keys, threads=min(DELETE_THREADS, len(keys) or 1)))

    def _delete(self, key: str) -> None:
        with contextlib.suppress(NotFoundError):
            self._gcs(key, "DELETE", "b/{}/o/{}", self._bucket, self._key(key))

    def sweep(self, is_dead: Callable[[str], bool]) -> None:
        """Ends what killed writers left that sent parts through the XML interface, as obstore does."""
        root = self._folder_key("")
        objects = f"{self.fs.base.removesuffix('storage/v1/')}{self._bucket}"
        with contextlib.suppress(NotFoundError):  # an emulator without that interface
            _, body = self._gcs(DATA, "GET", f"{objects}?uploads", prefix=f"{root}{DATA}/")
            for upload in _uploads_in(body):
                if is_dead(upload["Key"].removeprefix(root)):
                    path = f"{objects}/{quote(upload['Key'])}"
                    self._gcs(DATA, "DELETE", path, uploadId=upload["UploadId"])


def _uploads_in(page: bytes) -> Iterator[dict[str, str]]:
    import xml.etree.ElementTree as ET

    try:
        found = ET.fromstring(page)  # noqa: S314 - from the store that we trust with everything else
    except ET.ParseError:
        return
    for upload in found.iterfind("{*}Upload"):
        yield {name: upload.findtext(f"{{*}}{name}", "") for name in ("Key", "UploadId")}


# Where a part begins, its bytes, and whether it is the last one.
_Part = tuple[int, bytes, bool]


def _placed(first: bytes, second: bytes, rest: Iterator[bytes]) -> Iterator[_Part]:
    yield 0, first, False
    start, held = len(first), second
    for part in rest:
        yield start, held, False
        start, held = start + len(held), part
    yield start, held, True
