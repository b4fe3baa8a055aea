from __future__ import annotations

import os
import uuid
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from taskckpt import Checkpoint
from taskckpt.testing import instant_retries
from tests.contract.places import shared_session, with_shared_client
from tests.faults.proxy import Proxy, proxy_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from taskckpt.testing.servers import S3Server

# Short, so that a server that hangs is given up soon; long enough for the rest on a busy machine.
TIMEOUT_S = 2.0


class Site:
    """A task's place on an S3 server, behind a proxy and also beside it."""

    def __init__(self, proxy: Proxy, bucket: str) -> None:
        self.proxy = proxy
        self.bucket = bucket
        self.url = f"s3://{bucket}/{uuid.uuid4().hex}/task"

    def checkpoint(self, **arguments) -> Checkpoint:
        """An attempt behind the proxy, over the transfer that the test is about."""
        options = dict(self.proxy.options)
        if os.environ.get("TASKCKPT_TRANSFER") == "fsspec":
            options["session"] = shared_session()
        made = Checkpoint(self.url, storage_options=options, **{"timeout_s": TIMEOUT_S, **arguments})
        return with_shared_client(made, str(self.proxy.options["endpoint_url"]))

    def view(self) -> Checkpoint:
        """What somebody sees for whom nothing is broken."""
        return self._beside(read_only=True)

    def next_attempt(self) -> Checkpoint:
        return self._beside()

    def uploads(self) -> list[str]:
        """The keys of what was begun below this place and is neither complete nor aborted."""
        status, answer = self.proxy.server.request("GET", f"/{self.bucket}?uploads")
        assert status == 200, answer
        keys = [entry.findtext("{*}Key", "") for entry in ET.fromstring(answer).findall("{*}Upload")]
        return [key for key in keys if self.url.endswith(key.partition("/data/")[0])]

    def anew(self) -> Site:
        """Another place behind the same proxy."""
        return Site(self.proxy, self.bucket)

    def _beside(self, **arguments) -> Checkpoint:
        server = self.proxy.server
        options = {**server.storage_options, "session": shared_session()}  # a session means s3fs
        made = Checkpoint(self.url, storage_options=options, timeout_s=10, **arguments)
        return with_shared_client(made, server.endpoint_url)

    def keys(self, part: str) -> list[str]:
        return sorted(self.view()._attempt.open_store().list_below(part).names)


@pytest.fixture(autouse=True)
def _instant() -> Iterator[None]:
    with instant_retries():
        yield


@pytest.fixture(scope="session")
def moto_bucket(moto: S3Server) -> Iterator[str]:
    bucket = f"faults-{uuid.uuid4().hex}"
    moto.create_bucket(bucket)
    yield bucket
    moto.delete_bucket(bucket)


@pytest.fixture
def proxy(moto: S3Server) -> Iterator[Proxy]:
    with proxy_of(moto) as proxy:
        yield proxy


@pytest.fixture
def site(proxy: Proxy, moto_bucket: str) -> Site:
    return Site(proxy, moto_bucket)


@pytest.fixture
def real_site(seaweedfs: S3Server, new_bucket) -> Iterator[Site]:
    """The same in front of SeaweedFS, which checks secrets and signatures."""
    with proxy_of(seaweedfs) as proxy:
        yield Site(proxy, new_bucket(seaweedfs))
