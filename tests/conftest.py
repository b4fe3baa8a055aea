from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis.configuration import set_hypothesis_home_dir

from taskckpt import _process
from taskckpt.engines import systems
from taskckpt.errors import MissingDependencyError
from tests.servers import S3, START, Address, OwnServers, Servers, SharedServers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from taskckpt.testing.servers import AzureServer, GCSServer, S3Server

ROOT = Path(__file__).parent.parent
SERVERS = pytest.StashKey[Servers]()

# Each test has its own current folder, but what hypothesis has learnt is for all of them.
set_hypothesis_home_dir(ROOT / ".hypothesis")
# A deadline per example would measure how busy the machine is; the time-out per test stays.
# The same examples every time, so that a change is judged by what it changed; HYPOTHESIS=random looks for new ones.
derandomize = os.environ.get("HYPOTHESIS") != "random"
hypothesis.settings.register_profile("taskckpt", hypothesis.settings(), deadline=None, derandomize=derandomize)
hypothesis.settings.load_profile("taskckpt")


# --- servers: started once a run, before the first test that needs them, so that no test's time-out pays


def pytest_configure(config: pytest.Config) -> None:
    worker_input = getattr(config, "workerinput", None)
    if worker_input is not None:
        config.stash[SERVERS] = SharedServers(Address(*worker_input["servers"]))
        return
    own = OwnServers()
    config.stash[SERVERS] = own
    config.add_cleanup(own.close)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:  # of xdist: in the controller, before a worker starts
    own = node.config.stash[SERVERS]
    assert isinstance(own, OwnServers)
    node.workerinput["servers"] = list(own.address)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    for name in sorted(set().union(*map(_servers_of, session.items))):
        try:
            session.config.stash[SERVERS].get(name)
        except Exception:
            # Kept, and raised again by the fixture, in the tests that it concerns.
            continue


def _servers_of(item: pytest.Item) -> set[str]:
    names = set(getattr(item, "fixturenames", ()))
    chosen = getattr(item, "callspec", None)
    if chosen is not None:  # fixtures with a server for a parameter: s3_server and the like
        names |= {value.partition("-")[0] for value in chosen.params.values() if isinstance(value, str)}
    return names & START.keys()


def _server(config: pytest.Config, name: str) -> Any:
    try:
        return config.stash[SERVERS].get(name)
    except MissingDependencyError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NOT TESTED against {name}: {error}")


@pytest.fixture(scope="session")
def moto(pytestconfig: pytest.Config) -> S3Server:
    """moto's S3 server: quick, checks no secrets."""
    return _server(pytestconfig, "moto")


@pytest.fixture(scope="session")
def seaweedfs(pytestconfig: pytest.Config) -> S3Server:
    """SeaweedFS: an S3 server that keeps data on disk and refuses a wrong secret."""
    return _server(pytestconfig, "seaweedfs")


@pytest.fixture(scope="session")
def fake_gcs(pytestconfig: pytest.Config) -> GCSServer:
    """fake-gcs-server: Google Cloud Storage's JSON interface; checks no credentials."""
    return _server(pytestconfig, "fake_gcs")


@pytest.fixture(scope="session")
def azurite(pytestconfig: pytest.Config) -> AzureServer:
    """Azurite: Azure Blob Storage; refuses a wrong key."""
    return _server(pytestconfig, "azurite")


@pytest.fixture(scope="session", params=S3)
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    """Each of the S3 servers in turn."""
    return _server(request.config, request.param)


@pytest.fixture
def new_bucket() -> Iterator[Callable[[S3Server], str]]:
    """Make buckets, each with a name that nobody has used, which are gone after the test."""
    made: list[tuple[S3Server, str]] = []

    def make(server: S3Server) -> str:
        bucket = f"test-{uuid.uuid4().hex}"
        server.create_bucket(bucket)
        made.append((server, bucket))
        return bucket

    yield make
    for server, bucket in made:
        server.delete_bucket(bucket)


@pytest.fixture
def s3_bucket(s3_server: S3Server, new_bucket: Callable[[S3Server], str]) -> str:
    """An empty bucket of the test's own on each of the S3 servers."""
    return new_bucket(s3_server)


# --- every test begins in an empty folder of its own, and knows nothing of its caller's tasks and clouds


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.umask(0o022)
    monkeypatch.setattr(_process, "process", _process.Process())
    systems._ranks.clear()
    memory = sys.modules.get("fsspec.implementations.memory")
    if memory is not None:  # it lists all that was ever saved in this process, which takes longer and longer
        memory.MemoryFileSystem.store.clear()
        memory.MemoryFileSystem.pseudo_dirs[:] = [""]
    for name in os.environ:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_", "TASKCKPT_")):
            monkeypatch.delenv(name)
    # The last places where AWS clients look for credentials: the user's files, the cloud's metadata.
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
