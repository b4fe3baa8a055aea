"""No thread outlives the load or save that started it, however it ends.

One that does waits for the garbage collector to end it, which then waits for the thread: wherever it happens to
run, if need be while another thread is being started, whose locks it would need. That is for ever.
"""

from __future__ import annotations

import gc
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from taskckpt import Checkpoint
from taskckpt._archive import gzip as _gzip
from taskckpt.errors import CorruptCheckpointError, UnavailableError
from taskckpt.testing import intercepted

pytestmark = pytest.mark.filterwarnings("ignore:memory... lives in this process only")


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("taskckpt_")]


def damage(checkpoint: Checkpoint) -> None:
    memory = fsspec.filesystem("memory")
    for key in memory.find("/" + checkpoint.remote_destination.removeprefix("memory://").strip("/") + "/data"):
        data = memory.cat_file(key)
        memory.pipe_file(key, data[:30] + bytes([data[30] ^ 255]) * 30 + data[60:])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "content"
    folder.mkdir()
    (folder / "random").write_bytes(os.urandom(100_000))
    return folder


def test_a_load_of_damaged_folders(tmp_path: Path, folder: Path) -> None:
    checkpoint = Checkpoint(f"memory:/{tmp_path}/task")
    for _ in range(3):
        checkpoint.save_sync(folder)
    damage(checkpoint)
    with pytest.raises(CorruptCheckpointError) as caught:
        checkpoint.load_sync()
    assert not threads(), caught  # which holds the error, and the error the frames


def test_a_load_of_a_damaged_archive_of_somebody_else(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for number in range(20):
            entry = tarfile.TarInfo(f"file{number}")
            entry.size = 10_000
            tar.addfile(entry, io.BytesIO(os.urandom(entry.size)))
    data = bytearray(archive.getvalue())
    data[10_752:11_264] = bytes([255]) * 512  # the second header
    where = f"memory:/{tmp_path}/foreign"
    fsspec.filesystem("memory").pipe_file(where.removeprefix("memory:/"), bytes(data))
    with pytest.raises(CorruptCheckpointError) as caught:
        Checkpoint(f"memory:/{tmp_path}/task", src=where, src_kind="folder").load_sync()
    assert not threads(), caught  # which holds the error, and the error the frames


def test_a_load_whose_target_fails(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(f"memory:/{tmp_path}/task")
    checkpoint.save_sync(os.urandom(100_000))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("taskckpt._payload.memoryview", lambda chunk: 1 // 0, raising=False)
    with pytest.raises(ZeroDivisionError) as caught:
        checkpoint.load_sync()
    assert not threads(), caught  # which holds the error, and the error the frames


def test_a_save_that_fails_in_the_middle(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gzip, "BLOCK_BYTES", 10_000)
    checkpoint = Checkpoint(tmp_path / "task")
    checkpoint.load_sync()

    def failing(path: str, chunks: Iterator[bytes]) -> None:
        next(chunks)
        raise UnavailableError("The disk failed.", uri=path)

    monkeypatch.setattr("taskckpt._stores.local._fill", lambda descriptor, chunks: failing("", iter(chunks)))
    with pytest.raises(UnavailableError) as caught:
        checkpoint.save_sync(folder)
    assert not threads(), caught  # which holds the error, and the error the frames


def test_a_request_that_is_lost(tmp_path: Path, folder: Path) -> None:
    checkpoint = Checkpoint(f"memory:/{tmp_path}/task")
    checkpoint.save_sync(folder)

    def lost(when: str, verb: str, keys: object) -> None:
        if when == "after" and verb == "stream":
            raise UnavailableError("No answer.", uri="memory://")

    with intercepted(lost), pytest.raises(UnavailableError) as caught:
        Checkpoint(f"memory:/{tmp_path}/task", read_only=True).load_sync()
    assert not threads(), caught  # which holds the error, and the error the frames
