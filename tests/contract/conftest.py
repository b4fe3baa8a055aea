from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest

from tests.contract.places import Place, Way, s3_place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from taskckpt.testing.servers import S3Server

_WARNS = pytest.mark.filterwarnings("ignore:memory.// lives in this process only")

PLACES = [pytest.param("memory", marks=_WARNS), "local", "moto", "seaweedfs"]
# Each store, and each way to call, at least twice; on S3 one way each, since both end in one core.
PLACES_AND_WAYS = [
    pytest.param("memory", "sync", marks=_WARNS),
    pytest.param("memory", "async", marks=_WARNS),
    ("local", "sync"),
    ("local", "async"),
    ("moto", "sync"),
    ("seaweedfs", "async"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"place", "way"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("place", "way"), PLACES_AND_WAYS, indirect=True)
    elif "place" in metafunc.fixturenames:
        metafunc.parametrize("place", PLACES, indirect=True)


def _bucket(server: S3Server) -> Iterator[str]:
    # One for all tests: a bucket costs SeaweedFS a volume; each test has a prefix of its own.
    bucket = f"contract-{uuid.uuid4().hex}"
    server.create_bucket(bucket)
    yield bucket
    server.delete_bucket(bucket)


@pytest.fixture(scope="session")
def moto_bucket(moto: S3Server) -> Iterator[str]:
    yield from _bucket(moto)


@pytest.fixture(scope="session")
def seaweedfs_bucket(seaweedfs: S3Server) -> Iterator[str]:
    yield from _bucket(seaweedfs)


@pytest.fixture
def moto_place(moto: S3Server, moto_bucket: str) -> Place:
    return s3_place(moto, moto_bucket)


@pytest.fixture
def seaweedfs_place(seaweedfs: S3Server, seaweedfs_bucket: str) -> Place:
    return s3_place(seaweedfs, seaweedfs_bucket)


@pytest.fixture
def local_place(tmp_path) -> Place:
    return Place("local", str(tmp_path / "base"))


@pytest.fixture
def memory_place() -> Iterator[Place]:
    import fsspec

    name = f"contract-{uuid.uuid4().hex}"
    yield Place("memory", f"memory://{name}")
    fs = fsspec.filesystem("memory")
    if fs.exists(f"/{name}"):
        fs.rm(f"/{name}", recursive=True)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Place:
    """A place of the test's own in each of the four stores."""
    return request.getfixturevalue(f"{request.param}_place")


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Way:
    """Both ways to call a Checkpoint."""
    return Way(request.param)
