"""The stores that every contract test runs over, seen from outside the package."""

from __future__ import annotations

import asyncio
import os
import uuid
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskckpt import Checkpoint
from taskckpt._stores import open_store, parse
from taskckpt._stores.fsspec import FsspecStore

if TYPE_CHECKING:
    from taskckpt._stores import Store
    from taskckpt.testing.servers import AzureServer, GCSServer, S3Server
    from tests.google_xml import GoogleXml

    Server = S3Server | GCSServer | AzureServer | GoogleXml


@cache
def shared_session() -> Any:
    """An AWS session for all clients of a test process: it reads 20 files, which takes 0.1 s."""
    from aiobotocore.session import get_session

    return get_session()


_clients: dict[tuple[int, str, float], Any] = {}


def with_shared_client(checkpoint: Checkpoint, endpoint: str) -> Checkpoint:
    """A new client takes 0.1 s, and most tests are about something else: they share one."""
    store: Any = checkpoint._attempt.open_store()
    while hasattr(store, "_store"):  # intercepted
        store = store._store
    if not isinstance(store, FsspecStore):
        return checkpoint
    key = (os.getpid(), endpoint, checkpoint._attempt._timeout_s)
    if key not in _clients:
        _clients[key] = store.fs
    store._filesystem = _clients[key]
    return checkpoint


@dataclass(frozen=True)
class Place:
    """An empty place of a test's own in one of the stores."""

    name: str
    url: str
    server: Server | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def at(self, path: str) -> Place:
        return replace(self, url=f"{self.url}/{path}" if path else self.url)

    @property
    def plain_options(self) -> dict[str, Any]:
        """The storage options without what cannot be pickled."""
        return {name: value for name, value in self.options.items() if name != "session"}

    def checkpoint(self, path: str = "task", src: Any = None, **arguments: Any) -> Checkpoint:
        made = Checkpoint(self.at(path).url, src, storage_options=self.options, **arguments)
        return made if self.server is None else with_shared_client(made, self.server.endpoint_url)

    def open(self, path: str = "") -> Store:
        return open_store(parse(self.at(path).url), storage_options=self.options, timeout_s=20)

    def keys(self, path: str = "") -> list[str]:
        return sorted(self.open(path).list_below("").names)

    def get(self, path: str) -> bytes:
        return self.open().read(path)

    def put(self, path: str, data: bytes) -> str:
        """Writes an object as somebody else would, over what is there; gives its URL."""
        url = self.at(path).url
        if self.server is not None:
            bucket, _, key = url.partition("://")[2].partition("/")
            self.server.put(bucket, key, data)
        elif self.name == "memory":
            import fsspec

            fsspec.filesystem("memory").pipe_file(url, data)
        else:
            Path(url).parent.mkdir(parents=True, exist_ok=True)
            Path(url).write_bytes(data)
        return url


def s3_place(server: S3Server, bucket: str) -> Place:
    """A place for the transfer that TASKCKPT_TRANSFER names."""
    options = dict(server.storage_options)
    if os.environ["TASKCKPT_TRANSFER"] == "fsspec":
        options["session"] = shared_session()
    return Place(server.name, f"s3://{bucket}/{uuid.uuid4().hex}", server, options)


def cloud_place(protocol: str, server: GCSServer | AzureServer | GoogleXml, bucket: str) -> Place:
    return Place(server.name, f"{protocol}://{bucket}/{uuid.uuid4().hex}", server, server.storage_options)


class Way:
    """The plain calls of a Checkpoint, their asynchronous twins, or saves in the background, under the same names."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _call(self, checkpoint: Checkpoint, verb: str, *arguments: Any, **options: Any) -> Any:
        if self.name == "async":
            return asyncio.run(getattr(checkpoint, verb)(*arguments, **options))
        return getattr(checkpoint, f"{verb}_sync")(*arguments, **options)

    def load(self, checkpoint: Checkpoint, **options: Any) -> Path | None:
        return self._call(checkpoint, "load", **options)

    def load_bytes(self, checkpoint: Checkpoint, **options: Any) -> bytes | None:
        return self._call(checkpoint, "load_bytes", **options)

    def save(self, checkpoint: Checkpoint, data: Any, **options: Any) -> None:
        if self.name == "later":
            assert checkpoint.save_later(data, policy="queue", **options).result()
        else:
            self._call(checkpoint, "save", data, **options)

    def clear(self, checkpoint: Checkpoint) -> None:
        self._call(checkpoint, "clear")

    def call(self, checkpoint: Checkpoint, verb: str, *arguments: Any, **options: Any) -> Any:
        """Any other verb."""
        return self._call(checkpoint, verb, *arguments, **options)
