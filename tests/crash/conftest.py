from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.crash import contents
from tests.crash.forker import Forker, forker

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session")
def forks() -> Iterator[Forker]:
    """The process in whose children everything is killed and disturbed."""
    with forker() as made:
        yield made


@pytest.fixture(scope="session")
def s3_forks() -> Iterator[Forker]:
    """The same, with all that a client of S3 has to import and read."""
    with forker("tests.crash.warm_s3") as made:
        yield made


@pytest.fixture(scope="session")
def cloud_forks() -> Iterator[Forker]:
    """The same for clients of Google Cloud Storage and Azure."""
    with forker("tests.crash.warm_clouds") as made:
        yield made


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files and folders that are saved."""
    folder = tmp_path_factory.mktemp("sources")
    contents.make_sources(folder)
    return folder


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """An empty folder where fsync is quick: a kill, unlike a power cut, loses nothing in the page cache."""
    if not os.access(SHARED_MEMORY, os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="taskckpt-test-", dir=SHARED_MEMORY))
    yield folder
    shutil.rmtree(folder)
