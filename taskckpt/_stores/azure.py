"""Azure Blob Storage through adlfs: its client and credentials, but the requests are our own.

adlfs's file writer publishes what it has when an exception passes through, so payloads go up as blocks, which are
no blob before the list of them is committed. What a killed process leaves of them is swept by a later attempt, and
dropped by Azure after a week. https://learn.microsoft.com/rest/api/storageservices/blob-service-rest-api
"""

from __future__ import annotations

import base64
import contextlib
import io
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from taskckpt._layout import DATA
from taskckpt._operation import Stop, ordered_map
from taskckpt._stores import FIRST_PAGE
from taskckpt._stores.fsspec import FileSystem, FsspecStore, in_loop_of, new_filesystem
from taskckpt._stores.s3 import CONNECT_TIMEOUT_S, MIB, READ_TIMEOUT_S, regrouped
from taskckpt.errors import NotFoundError, TaskckptError

T = TypeVar("T")

logger = logging.getLogger("taskckpt")

# Azure takes blocks of more than 4 MiB at a higher rate; four of them under way are four in memory, twice.
BLOCK_BYTES = 5 * MIB
# What goes up in one request, without a list of blocks: of more plain bytes than that, aiohttp warns.
PUT_BYTES = MIB
UPLOAD_THREADS = 4
MAX_BLOCKS = 50_000
PAGE = 5000
DELETE_THREADS = 8


class AzureStore(FsspecStore):
    """See ``_stores.Store``."""

    def _connect(self) -> FileSystem:
        # az://container@account.blob.core.windows.net/path names the account as well.
        account = self._location.path.partition("/")[0].partition("@")[2].partition(".")[0]
        named = {"account_name": account} if account else {}
        return new_filesystem(self._location, {**named, **self._options})

    @property
    def _bucket(self) -> str:
        return self._location.path.partition("/")[0].partition("@")[0]

    @property
    def _container(self) -> Any:
        return self.fs.service_client.get_container_client(self._bucket)

    def _blob(self, key: str) -> Any:
        return self._container.get_blob_client(self._key(key))

    @property
    def _patience(self) -> dict[str, Any]:
        # One try: with_retries is the only one that repeats.
        return {
            "retry_total": 0,
            "connection_timeout": min(CONNECT_TIMEOUT_S, self._timeout_s / 2),
            "read_timeout": min(READ_TIMEOUT_S, self._timeout_s / 2),
        }

    def _azure(self, key: str, verb: Callable[..., Coroutine[Any, Any, T]], *given: Any, stop: Stop | None = None) -> T:
        """One request, made by a coroutine of ours that is given what the client shall be patient about."""
        return self._call(key, lambda: in_loop_of(self.fs, verb, *given, timeout_s=self._timeout_s), stop)

    # --- reading -------------------------------------------------------------------------------

    def _list(self, folder: str, *, first_page: bool = False) -> tuple[dict[str, int], bool]:
        prefix = self._folder_key(folder)
        sizes: dict[str, int] = {}
        token: str | None = None
        while True:
            most = FIRST_PAGE if first_page else PAGE
            found, token = self._azure(folder, self._page, prefix, token, ["metadata"], most)
            page = [blob.name.removeprefix(prefix) for blob in found]
            sizes |= {name: int(blob.size) for name, blob in zip(page, found, strict=True) if not _is_folder(blob)}
            # Accounts with real folders do not promise an order: there the first page proves nothing.
            if not token or (first_page and sizes and page == sorted(page)):
                return sizes, not token

    def folders(self, folder: str) -> list[str]:
        names: set[str] = set()
        token: str | None = None
        while True:
            found, token = self._azure(folder, self._page_of_folders, folder, token)
            names |= {name.removeprefix(self._folder_key(folder)).rstrip("/") for name in found}
            if not token:
                return sorted(names - {""})

    async def _page_of_folders(self, folder: str, token: str | None) -> tuple[list[str], str | None]:
        listing = self._container.walk_blobs(
            name_starts_with=self._folder_key(folder), delimiter="/", results_per_page=PAGE, **self._patience
        )
        pages = listing.by_page(continuation_token=token)
        return [one.name async for one in await anext(pages) if hasattr(one, "prefix")], pages.continuation_token

    async def _page(
        self, prefix: str, token: str | None, include: list[str], most: int = PAGE
    ) -> tuple[list[Any], str | None]:
        listing = self._container.list_blobs(
            name_starts_with=prefix, include=include, results_per_page=most, **self._patience
        )
        pages = listing.by_page(continuation_token=token)
        return [blob async for blob in await anext(pages)], pages.continuation_token

    def read(self, key: str) -> bytes:
        return self._azure(key, self._download, key)

    async def _download(self, key: str, start: int | None = None, length: int | None = None) -> bytes:
        content: bytes = await (await self._blob(key).download_blob(start, length, **self._patience)).readall()
        return content

    def _fetch(self, key: str, start: int, end: int) -> bytes:
        content: bytes = in_loop_of(self.fs, self._download, key, start, end - start, timeout_s=self._timeout_s)
        return content

    def size(self, key: str) -> int | None:
        try:
            blob = self._azure(key, self._properties, key)
        except NotFoundError:
            self._azure(key, self._page, self._key(key), None, [])  # HEAD has no body: is the container there?
            return None
        return None if _is_folder(blob) else int(blob.size)

    async def _properties(self, key: str) -> Any:
        return await self._blob(key).get_blob_properties(**self._patience)

    # --- writing -------------------------------------------------------------------------------

    def create(self, key: str, data: bytes, stop: Stop) -> None:
        self._azure(key, self._put, key, data, False, stop=stop)

    async def _put(self, key: str, data: bytes, overwrite: bool) -> None:
        # One request. Without overwrite: If-None-Match: *.
        await self._blob(key).upload_blob(data, overwrite=overwrite, **self._patience)

    def write(self, key: str, chunks: Iterable[bytes | memoryview], size_hint: int, stop: Stop) -> None:
        blocks = regrouped(chunks, max(BLOCK_BYTES, -(-size_hint * 11 // 10 // MAX_BLOCKS // MIB) * MIB))
        first = next(blocks, b"")
        if len(first) <= PUT_BYTES:
            self._azure(key, self._put, key, first, True, stop=stop)
            return

        def all_blocks() -> Iterator[bytes]:
            yield first
            yield from blocks

        def stage(numbered: tuple[int, bytes]) -> str:
            name = base64.b64encode(b"%08d" % numbered[0]).decode()
            self._azure(key, self._stage, key, name, numbered[1], stop=stop)
            return name

        try:
            names = list(ordered_map(stage, enumerate(all_blocks()), threads=UPLOAD_THREADS))
            self._azure(key, self._commit, key, names, stop=stop)
        except BaseException:
            self._discard(key)
            raise

    async def _stage(self, key: str, name: str, data: bytes) -> None:
        await self._blob(key).stage_block(name, io.BytesIO(data), len(data), **self._patience)

    async def _commit(self, key: str, names: Sequence[str]) -> None:
        from azure.storage.blob import BlobBlock

        await self._blob(key).commit_block_list([BlobBlock(name) for name in names], **self._patience)

    def _discard(self, key: str) -> None:
        """Removes a blob and its blocks. Blocks alone cannot be deleted: an empty blob takes their place first."""
        try:
            self._azure(key, self._put, key, b"", True)
            self._delete(key)
        except TaskckptError as error:
            logger.warning("An unfinished upload could not be removed; a later attempt sweeps it: %s", error)

    # --- deleting ------------------------------------------------------------------------------

    def delete(self, keys: Sequence[str]) -> None:
        list(ordered_map(self._delete, keys, threads=min(DELETE_THREADS, len(keys) or 1)))

    def _delete(self, key: str) -> None:
        with contextlib.suppress(NotFoundError):
            self._azure(key, self._delete_blob, key)

    async def _delete_blob(self, key: str) -> None:
        await self._blob(key).delete_blob(delete_snapshots="include", **self._patience)

    def sweep(self, is_dead: Callable[[str], bool]) -> None:
        root = self._folder_key("")
        prefix = f"{root}{DATA}/"
        token: str | None = None
        while True:
            found, token = self._azure(DATA, self._page, prefix, token, ["uncommittedblobs"])
            for blob in found:
                # Every blob has a type once it is committed. Nothing but an empty one is ever thrown away here.
                unfinished = blob.size == 0 and blob.content_settings.content_type is None
                if unfinished and is_dead(blob.name.removeprefix(root)):
                    self._discard(blob.name.removeprefix(root))
            if not token:
                return


def _is_folder(blob: Any) -> bool:
    """Accounts with real folders list them as empty blobs."""
    return (blob.metadata or {}).get("hdi_isfolder") == "true"
