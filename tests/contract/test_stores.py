"""The contract of a store, over those that come with the package, and over both transfers."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from taskckpt._stores import obstore as _obstore
from taskckpt._stores import parse
from taskckpt._stores.fsspec import FsspecStore
from taskckpt._stores.local import PARTIAL
from taskckpt._stores.s3 import PART_BYTES
from taskckpt.testing import StoreContract


class TestMemory(StoreContract):
    pytestmark = pytest.mark.filterwarnings("ignore:memory.//")
    across_processes = False
    atomic_writes = False  # fsspec's shows a file from its opening on

    @pytest.fixture
    def open_at(self, memory_place):
        return memory_place.open


class TestLocal(StoreContract):
    @pytest.fixture
    def open_at(self, local_place):
        return local_place.open

    def leftovers(self, store):
        return [str(path) for path in Path(store.uri).rglob(f"{PARTIAL}*")]


class TestLocalWithoutHardLinks(TestLocal):
    @pytest.fixture(autouse=True)
    def _no_links(self, monkeypatch):
        def refuse(*_, **__):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("os.link", refuse)


def uploads(place):
    bucket, _, prefix = place.url.removeprefix("s3://").partition("/")
    status, answer = place.server.request("GET", f"/{bucket}?uploads")
    assert status == 200, answer
    keys = [entry.findtext("{*}Key", "") for entry in ET.fromstring(answer).findall("{*}Upload")]
    return [key for key in keys if key.startswith(prefix)]


class TestMoto(StoreContract):
    part_bytes = PART_BYTES

    @pytest.fixture
    def open_at(self, moto_place):
        self.place = moto_place
        return moto_place.open

    def leftovers(self, store):
        return uploads(self.place)


class TestSeaweedFS(StoreContract):
    part_bytes = PART_BYTES

    @pytest.fixture
    def open_at(self, seaweedfs_place):
        self.place = seaweedfs_place
        return seaweedfs_place.open

    def leftovers(self, store):
        return uploads(self.place)


class TestMotoThroughObstore(TestMoto):
    part_bytes = _obstore.PART_BYTES

    # Forked children of the process that uses obstore go through s3fs: some tests here are about both at once.
    @pytest.fixture
    def open_at(self, moto_obstore_place):
        self.place = moto_obstore_place
        return moto_obstore_place.open


class TestSeaweedFSThroughObstore(TestSeaweedFS):
    part_bytes = _obstore.PART_BYTES

    @pytest.fixture
    def open_at(self, seaweedfs_obstore_place):
        self.place = seaweedfs_obstore_place
        return seaweedfs_obstore_place.open


class TestAnyFsspec(StoreContract):
    """What every other file system of fsspec gets: here s3fs by its plain verbs."""

    many = 50

    @pytest.fixture
    def open_at(self, moto_place):
        return lambda path: FsspecStore(parse(moto_place.at(path).url), moto_place.options, 20)
