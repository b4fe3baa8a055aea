from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest

from tests.contract.places import Place, Way, cloud_place, s3_place
from tests.google_xml import google_xml

if TYPE_CHECKING:
    from collections.abc import Iterator

    from taskckpt.testing.servers import AzureServer, GCSServer, S3Server
    from tests.contract.places import Server
    from tests.google_xml import GoogleXml

_WARNS = pytest.mark.filterwarnings("ignore:memory.// lives in this process only")

S3_PLACES = ["moto", "moto-obstore", "seaweedfs", "seaweedfs-obstore"]
PLACES = [pytest.param("memory", marks=_WARNS), "local", *S3_PLACES, "fake_gcs", "azurite"]
# Each store, and each way to call, at least twice; on S3 one way each, since both end in one core.
PLACES_AND_WAYS = [
    pytest.param("memory", "sync", marks=_WARNS),
    pytest.param("memory", "async", marks=_WARNS),
    ("local", "sync"),
    ("local", "async"),
    ("local", "later"),
    ("moto", "sync"),
    ("moto-obstore", "async"),
    ("seaweedfs", "async"),
    ("seaweedfs", "later"),
    ("seaweedfs-obstore", "sync"),
    ("fake_gcs", "async"),
    ("azurite", "sync"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"place", "way"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("place", "way"), PLACES_AND_WAYS, indirect=True)
    elif "place" in metafunc.fixturenames:
        metafunc.parametrize("place", PLACES, indirect=True)


def _bucket(server: Server) -> Iterator[str]:
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


@pytest.fixture(scope="session")
def fake_gcs_bucket(fake_gcs: GCSServer) -> Iterator[str]:
    yield from _bucket(fake_gcs)


@pytest.fixture(scope="session")
def azurite_bucket(azurite: AzureServer) -> Iterator[str]:
    yield from _bucket(azurite)


@pytest.fixture
def moto_place(moto: S3Server, moto_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TASKCKPT_TRANSFER", "fsspec")
    return s3_place(moto, moto_bucket)


@pytest.fixture
def moto_obstore_place(moto: S3Server, moto_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TASKCKPT_TRANSFER", "obstore")
    return s3_place(moto, moto_bucket)


@pytest.fixture
def seaweedfs_place(seaweedfs: S3Server, seaweedfs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TASKCKPT_TRANSFER", "fsspec")
    return s3_place(seaweedfs, seaweedfs_bucket)


@pytest.fixture
def seaweedfs_obstore_place(seaweedfs: S3Server, seaweedfs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TASKCKPT_TRANSFER", "obstore")
    return s3_place(seaweedfs, seaweedfs_bucket)


@pytest.fixture
def fake_gcs_place(fake_gcs: GCSServer, fake_gcs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TASKCKPT_TRANSFER", "fsspec")
    return cloud_place("gs", fake_gcs, fake_gcs_bucket)


@pytest.fixture
def azurite_place(azurite: AzureServer, azurite_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TASKCKPT_TRANSFER", "fsspec")
    return cloud_place("az", azurite, azurite_bucket)


@pytest.fixture
def azurite_obstore_place(azurite: AzureServer, azurite_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TASKCKPT_TRANSFER", "obstore")
    return cloud_place("az", azurite, azurite_bucket)


@pytest.fixture(scope="session")
def google_xml_server(seaweedfs: S3Server) -> Iterator[GoogleXml]:
    with google_xml(seaweedfs) as server:
        yield server


@pytest.fixture
def google_xml_obstore_place(
    google_xml_server: GoogleXml, seaweedfs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Place:
    monkeypatch.setenv("TASKCKPT_TRANSFER", "obstore")
    monkeypatch.setenv("FETCH_RAW_TOKEN_EXPIRY", "false")  # or gcsfs would ask Google when the token ends
    return cloud_place("gs", google_xml_server, seaweedfs_bucket)


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
    """A place of the test's own in each of the stores."""
    return request.getfixturevalue(f"{request.param.replace('-', '_')}_place")


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Way:
    """All ways to call a Checkpoint."""
    return Way(request.param)
