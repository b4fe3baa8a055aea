"""S3 through s3fs: its client and credentials, but the requests are our own.

s3fs's file writer uploads one part at a time and publishes what it has when an exception passes
through (both measured), so payloads go up as parts of a multipart upload that is aborted instead.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from taskckpt._layout import DATA
from taskckpt._operation import Stop, ordered_map
from taskckpt._stores import FIRST_PAGE
from taskckpt._stores.fsspec import FileSystem, FsspecStore, new_filesystem
from taskckpt.errors import NotFoundError, TaskckptError, UnavailableError, UsageError

logger = logging.getLogger("taskckpt")

MIB = 1024 * 1024
# The smallest part that S3 takes. 4 of them under way add 107 MiB to the process, 4 of 8 MiB add 157:
# the clients below copy each body twice. Larger ones were no faster.
PART_BYTES = 5 * MIB
UPLOAD_THREADS = 4
MAX_PARTS = 10_000
DELETE_BATCH = 1000

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60


class S3Store(FsspecStore):
    """See ``_stores.Store``."""

    def _connect(self) -> FileSystem:
        options = dict(self._options)
        # One try at each layer below: with_retries is the only one that repeats, so that five tries
        # are five and not s3fs's 5 times botocore's 5 (38 s measured on a permanent 503).
        config = {
            "connect_timeout": min(CONNECT_TIMEOUT_S, self._timeout_s / 2),
            "read_timeout": min(READ_TIMEOUT_S, self._timeout_s / 2),
            "retries": {"total_max_attempts": 1, "mode": "standard"},  # max_attempts=1 would be two
            **(options.pop("config_kwargs", None) or {}),
        }
        # max_concurrency=1: or each read of a whole object would begin with a HEAD.
        fs = new_filesystem(self._location, {"max_concurrency": 1, "config_kwargs": config, **options})
        fs.retries = 1
        try:
            fs.connect()
        except (AttributeError, TypeError, ValueError) as error:  # what botocore says of an argument
            raise UsageError(f"storage_options do not fit s3://: {error}.", uri=self.uri) from error
        # Without "Expect: 100-continue": a round trip less, and aiohttp waits for that word without any time-out.
        fs.s3.meta.events.register("before-call.s3", _expect_nothing)
        return fs

    def _s3(self, key: str, method: str, stop: Stop | None = None, **arguments: Any) -> dict[str, Any]:
        """One request to the bucket, named as botocore names it."""
        arguments |= {"Bucket": self._bucket, "timeout": self._timeout_s}  # the time-out is for fsspec's sync()
        body = arguments.pop("Body", None)

        def request() -> dict[str, Any]:
            # Of a file, aiohttp sends 256 KiB at a time. It copies bytes three times, whole, which stalls the caller's
            # event loop for 20 ms. A new file for each try: the one before may still be read.
            given = arguments if body is None else {**arguments, "Body": io.BytesIO(body)}
            answer: dict[str, Any] = self.fs.call_s3(method, **given)
            return answer

        return self._call(key, request, stop)

    # --- reading -------------------------------------------------------------------------------

    def _list(self, folder: str, *, first_page: bool = False) -> tuple[dict[str, int], bool]:
        prefix = self._folder_key(folder)
        sizes: dict[str, int] = {}
        for page in self._pages(folder, {"MaxKeys": FIRST_PAGE} if first_page else {}):
            names = [entry["Key"].removeprefix(prefix) for entry in page.get("Contents", ())]
            sizes |= zip(names, (int(entry["Size"]) for entry in page.get("Contents", ())), strict=True)
            # Directory buckets (S3 Express) list in no order: there the first page proves nothing.
            if first_page and page.get("IsTruncated") and names and names == sorted(names):
                return sizes, False
        return sizes, True

    def folders(self, folder: str) -> list[str]:
        pages = self._pages(folder, Delimiter="/")
        found = (entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", ()))
        return sorted({name.removeprefix(self._folder_key(folder)).rstrip("/") for name in found} - {""})

    def _pages(self, folder: str, first: Mapping[str, Any] | None = None, **query: Any) -> Iterator[dict[str, Any]]:
        """The pages of a listing; ``first`` is said only when the first one is asked for."""
        token: Mapping[str, Any] = first or {}
        while True:
            page = self._s3(folder, "list_objects_v2", Prefix=self._folder_key(folder), **query, **token)
            if "IsTruncated" not in page and "Name" not in page:  # else any web page would be an empty bucket
                raise UnavailableError("The answer is no listing.", uri=self.uri, hint="Check the endpoint.")
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def size(self, key: str) -> int | None:
        try:
            return int(self._s3(key, "head_object", Key=self._key(key))["ContentLength"])
        except NotFoundError:
            self._s3(key, "head_bucket")  # HEAD has no body: a missing bucket looks like a missing key
            return None

    # --- writing -------------------------------------------------------------------------------

    def create(self, key: str, data: bytes, stop: Stop) -> None:
        self._s3(key, "put_object", stop, Key=self._key(key), Body=data, IfNoneMatch="*")

    def write(self, key: str, chunks: Iterable[bytes | memoryview], size_hint: int, stop: Stop) -> None:
        parts = regrouped(chunks, part_size(size_hint))
        first = next(parts, b"")
        second = next(parts, None)
        if second is None:
            self._s3(key, "put_object", stop, Key=self._key(key), Body=first)
            return

        def all_parts() -> Iterator[bytes]:
            yield first
            yield second
            yield from parts

        self._write_multipart(key, all_parts(), stop)

    def _write_multipart(self, key: str, parts: Iterator[bytes], stop: Stop) -> None:
        target: dict[str, Any] = {"Key": self._key(key)}
        target["UploadId"] = self._s3(key, "create_multipart_upload", stop, **target)["UploadId"]

        def upload(numbered: tuple[int, bytes]) -> tuple[dict[str, Any], int]:
            number, part = numbered
            answer = self._s3(key, "upload_part", stop, PartNumber=number, Body=part, **target)
            return {"PartNumber": number, "ETag": answer["ETag"]}, len(part)

        try:
            done = list(ordered_map(upload, enumerate(parts, start=1), threads=UPLOAD_THREADS))
            self._complete(key, target, [part for part, _ in done], sum(size for _, size in done), stop)
        except BaseException:
            self._abort(key, target)
            raise

    def _complete(self, key: str, target: dict[str, Any], parts: list[dict[str, Any]], size: int, stop: Stop) -> None:
        try:
            self._s3(key, "complete_multipart_upload", stop, MultipartUpload={"Parts": parts}, **target)
        except NotFoundError:
            # A repeated request whose first reply was lost: the upload is gone because it is complete.
            if self.size(key) != size:
                raise UnavailableError("An upload vanished before it was completed.", uri=f"{self.uri}/{key}") from None

    def _abort(self, key: str, target: dict[str, Any]) -> None:
        try:
            self._s3(key, "abort_multipart_upload", **target)
        except NotFoundError:
            return  # gone already
        except TaskckptError as error:
            logger.warning("An unfinished upload could not be removed; a later attempt sweeps it: %s", error)

    # --- deleting ------------------------------------------------------------------------------

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), DELETE_BATCH):
            batch = keys[start : start + DELETE_BATCH]
            if len(batch) == 1:
                self._s3(batch[0], "delete_object", Key=self._key(batch[0]))
                continue
            objects = [{"Key": self._key(key)} for key in batch]
            answer = self._s3(DATA, "delete_objects", Delete={"Objects": objects, "Quiet": True})
            if answer.get("Errors"):
                first = answer["Errors"][0]
                raise UnavailableError(
                    f"{len(answer['Errors'])} of {len(batch)} objects were not deleted: "
                    f"{first.get('Code')}: {first.get('Message')}",
                    uri=f"{self.uri}/{first.get('Key', '').removeprefix(self._key('') + '/')}",
                )

    def sweep(self, is_dead: Callable[[str], bool]) -> None:
        root = self._folder_key("")
        answer = self._s3(DATA, "list_multipart_uploads", Prefix=f"{root}{DATA}/")
        for upload in answer.get("Uploads", ()):
            key = upload["Key"].removeprefix(root)
            if is_dead(key):
                self._abort(key, {"Key": upload["Key"], "UploadId": upload["UploadId"]})


def _expect_nothing(params: dict[str, Any], **_: Any) -> None:
    params["headers"].pop("Expect", None)


def part_size(size_hint: int) -> int:
    """Bytes per part: 5 MiB, and more only where 10,000 of them would not hold the payload."""
    return max(PART_BYTES, -(-size_hint * 11 // 10 // MAX_PARTS // MIB) * MIB)


def regrouped(chunks: Iterable[bytes | memoryview], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of exactly ``size``; the last one may be shorter."""
    part = io.BytesIO()
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            taken = min(size - part.tell(), len(rest))
            part.write(rest[:taken])
            rest = rest[taken:]
            if part.tell() == size:
                yield part.getvalue()  # no copy: it is the buffer itself, which nobody writes to any more
                part = io.BytesIO()
    if part.tell():
        yield part.getvalue()
