"""Where a task continues from stays known, whatever happens before its first save."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import shutil

import pytest

from taskckpt import Checkpoint
from taskckpt.errors import CorruptCheckpointError, TaskckptError, UnavailableError


@pytest.fixture
def run1(tmp_path):
    Checkpoint(tmp_path / "run1").save_sync(b"three weeks")
    return tmp_path / "run1"


@pytest.fixture
def begun(tmp_path, run1):
    """A task that loaded from its src, and was killed before its first save."""
    cp = Checkpoint(tmp_path / "run2", src=run1)
    assert cp.load_bytes_sync() == b"three weeks"
    return cp


def expect_known(tmp_path, expected=b"three weeks"):
    place = tmp_path / "run2"
    assert Checkpoint(place, read_only=True).load_bytes_sync() == expected
    assert Checkpoint(place).prev_exists()
    assert Checkpoint(tmp_path / "run3", src=place).prev_exists()
    assert Checkpoint(tmp_path / "run3", src=place).load_bytes_sync() == expected
    for _ in range(2):  # the second one learns it from the claim of the first
        assert Checkpoint(place).load_bytes_sync() == expected


@pytest.mark.parametrize("joins", [0, 1, 2, 5])
def test_joins_do_not_hide_it(tmp_path, begun, joins):
    for _ in range(joins):
        assert copy.deepcopy(begun).load_bytes_sync() == b"three weeks"
    expect_known(tmp_path)


def test_workers_that_were_handed_the_checkpoint_do_not_hide_it(tmp_path, begun):
    handed = pickle.dumps(begun)
    for _ in range(2):
        assert pickle.loads(handed).load_bytes_sync() == b"three weeks"
    expect_known(tmp_path)


def test_joins_of_a_later_attempt_do_not_hide_it(tmp_path, begun):
    second = Checkpoint(tmp_path / "run2")  # nobody says src again
    assert second.load_bytes_sync() == b"three weeks"
    assert copy.deepcopy(second).load_bytes_sync() == b"three weeks"
    expect_known(tmp_path)


def test_a_save_of_a_worker_comes_first(tmp_path, begun):
    worker = copy.deepcopy(begun)
    worker.load_sync()
    worker.save_sync(b"later")
    expect_known(tmp_path, b"later")


# --- its first record --------------------------------------------------------------------------


def first_record(tmp_path):
    (record,) = (tmp_path / "run2" / "log").iterdir()
    return record


@pytest.mark.parametrize("place", ["early", "late", "digest"])
def test_a_flipped_bit_in_the_first_claim_is_no_empty_task(tmp_path, begun, place):
    record = first_record(tmp_path)
    raw = bytearray(record.read_bytes())
    raw[{"early": 40, "late": raw.index(b"\n") - 3, "digest": len(raw) - 10}[place]] ^= 1
    record.write_bytes(raw)
    for cp in (
        Checkpoint(tmp_path / "run2", read_only=True),
        Checkpoint(tmp_path / "run3", src=tmp_path / "run2"),
        Checkpoint(tmp_path / "run2"),
        Checkpoint(tmp_path / "run2"),
    ):
        assert cp.prev_exists()
        with pytest.raises(CorruptCheckpointError):
            cp.load_bytes_sync()
    again = Checkpoint(tmp_path / "run2", src=tmp_path / "run1")
    assert again.load_bytes_sync() == b"three weeks", "who says src again goes on"


@pytest.mark.parametrize("left", [0, 1, 50, -10, -1])
def test_a_torn_first_claim_was_never_believed(tmp_path, begun, caplog, left):
    record = first_record(tmp_path)
    raw = record.read_bytes()
    record.write_bytes(raw[:left] if left >= 0 else raw[: len(raw) + left])
    with caplog.at_level(logging.WARNING, "taskckpt"):
        assert Checkpoint(tmp_path / "run2", read_only=True).load_bytes_sync() is None
    assert "first record of the log is damaged" in caplog.text
    cp = Checkpoint(tmp_path / "run2")
    assert cp.load_bytes_sync() is None
    cp.save_sync(b"1")
    assert Checkpoint(tmp_path / "run2").load_bytes_sync() == b"1"


# --- disks that are not there ------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "/A", "/deep/A"])
def test_a_dangling_link_is_a_disk_that_is_not_mounted(tmp_path, run1, below):
    (tmp_path / "disk").symlink_to(tmp_path / "mnt")
    place = f"{tmp_path}/disk{below}"
    for ask in (
        Checkpoint(tmp_path / "run2", src=place).load_bytes_sync,
        Checkpoint(tmp_path / "run2", src=place).prev_exists,
        Checkpoint(place).prev_exists,
        Checkpoint(place).load_bytes_sync,
        Checkpoint(place, read_only=True).load_bytes_sync,
        lambda: Checkpoint(place).save_sync(b"1"),
    ):
        with pytest.raises(UnavailableError):
            ask()
    assert not (tmp_path / "mnt").exists()
    shutil.copytree(run1, f"{tmp_path}/mnt{below}")
    assert Checkpoint(tmp_path / "run2", src=place).load_bytes_sync() == b"three weeks"


def test_a_src_that_fails_later_is_named_as_remembered(tmp_path):
    os.symlink(tmp_path / "nowhere", tmp_path / "mistyped")
    with pytest.raises(TaskckptError) as given:
        Checkpoint(tmp_path / "task", src=tmp_path / "mistyped").load_sync()
    assert not getattr(given.value, "__notes__", []), "whoever gave it knows where it comes from"
    with pytest.raises(TaskckptError) as later:
        Checkpoint(tmp_path / "task").load_sync()
    assert any("clear() forgets it" in note for note in later.value.__notes__)
    cp = Checkpoint(tmp_path / "task")
    cp.clear_sync()
    assert cp.load_sync() is None
    assert Checkpoint(tmp_path / "task").load_sync() is None
