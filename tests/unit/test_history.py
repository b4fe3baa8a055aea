"""Steps, metadata, lineage, pins, rollbacks, forks, the index: on a local folder, case by case."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

import taskckpt
from taskckpt import BestN, Checkpoint, CheckpointInfo, EveryNSteps, LatestN
from taskckpt._log import catalogue
from taskckpt.errors import (
    CorruptCheckpointError,
    NotFoundError,
    StepExistsError,
    StepNotFoundError,
    UnavailableError,
    UsageError,
    UsageTypeError,
)
from taskckpt.testing import intercepted

BIG = os.urandom(100_000)


@pytest.fixture
def dest(tmp_path):
    return str(tmp_path / "task")


def saved(dest, steps, **options):
    checkpoint = Checkpoint(dest, **options)
    for step in steps:
        checkpoint.save_sync(BIG + b"%d" % step, step=step)
    return checkpoint


def payload_of(dest, info):
    """The file that holds the payload of a checkpoint, as its record says."""
    record = json.loads(Path(info.uri).read_bytes().partition(b"\n")[0])
    return Path(dest) / record["checkpoint"]["stored"]["key"]


def damage(dest, info):
    path = payload_of(dest, info)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def info_of(checkpoint, step):
    return next(one for one in checkpoint.checkpoints_sync() if one.step == step)


def requests():
    seen = []
    return seen, intercepted(lambda when, verb, keys: seen.append((verb, *keys)) if when == "before" else None)


# --- what is told ------------------------------------------------------------------------------


def test_a_checkpoint_is_told_in_full(dest, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"12345")
    checkpoint = taskckpt.Checkpoint(dest)
    before = datetime.now(UTC)
    returned = checkpoint.save_sync(
        tmp_path / "model.bin", step=7, metadata={"a": [1, None, {"b": "ä"}]}, metrics={"loss": math.nan}, pin=True
    )
    (found,) = Checkpoint(dest, read_only=True).checkpoints_sync()
    assert repr(found) == repr(returned)  # nan != nan
    assert (found.step, found.kind, found.name, found.size_bytes, found.stored_bytes) == (7, "file", "model.bin", 5, 5)
    assert found.metadata == {"a": [1, None, {"b": "ä"}]}
    assert math.isnan(found.metrics["loss"])
    assert found.pinned
    assert found.in_lineage
    assert found.attempt is None
    assert found.resumed_from is None
    assert before - timedelta(seconds=1) < found.time < datetime.now(UTC) + timedelta(seconds=1)
    assert Path(found.uri).is_file()


def test_it_is_frozen_and_travels(dest):
    info = Checkpoint(dest).save_sync(b"x", step=1, metadata={"a": 1})
    with pytest.raises(FrozenInstanceError):
        info.step = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        info.metadata["a"] = 2  # type: ignore[index]
    assert pickle.loads(pickle.dumps(info)) == info


def test_without_anything_said_there_are_no_steps(dest):
    checkpoint = Checkpoint(dest)
    assert checkpoint.checkpoints_sync() == []
    assert checkpoint.steps_sync() == []
    assert checkpoint.latest_step_sync() is None
    checkpoint.save_sync(b"x")
    assert checkpoint.steps_sync() == []
    assert checkpoint.latest_step_sync() is None
    assert [(one.step, dict(one.metadata), dict(one.metrics)) for one in checkpoint.checkpoints_sync()] == [
        (None, {}, {})
    ]


def test_listing_writes_nothing_and_takes_nothing_over(dest):
    running = saved(dest, [1])
    seen, watched = requests()
    with watched:
        view = Checkpoint(dest)
        view.checkpoints_sync()
        view.steps_sync()
        view.latest_step_sync()
        view.prune_sync(dry_run=True)
    assert {verb for verb, *_ in seen} <= {"list", "read"}
    assert not any(key.startswith("data/") for _, *keys in seen for key in keys), "and reads no payload"
    running.save_sync(b"not stale", step=2)


def test_the_attempt_and_what_it_resumed_from_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKCKPT_BASE", str(tmp_path))

    @taskckpt.task(retries=1, key="job", wait_initial_s=0)
    def job():
        checkpoint = taskckpt.checkpoint()
        if checkpoint.load_bytes_sync() is None:
            checkpoint.save_sync(b"1", step=1)
            raise OSError
        checkpoint.save_sync(b"2", step=2)

    job()
    second, first = Checkpoint.of(key="job", base=str(tmp_path)).checkpoints_sync()
    assert (first.attempt, second.attempt) == (0, 1)
    assert first.resumed_from is None
    assert second.resumed_from == first.uri


# --- what may be said --------------------------------------------------------------------------


@pytest.mark.parametrize("step", [-1, 2**53, True, 1.0, "1"])
def test_what_is_no_step(dest, step):
    with pytest.raises(UsageError, match="step="):
        Checkpoint(dest).save_sync(b"x", step=step)
    with pytest.raises(UsageError, match="step="):
        Checkpoint(dest).load_sync(step=step)
    assert not os.path.exists(dest)


@pytest.mark.parametrize("step", [0, 2**53 - 1, np.int64(5)])
def test_what_is_a_step(dest, step):
    info = Checkpoint(dest).save_sync(b"x", step=step)
    assert info.step == step
    assert type(info.step) is int
    assert Checkpoint(dest).load_bytes_sync(step=step) == b"x"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": {"b": [1, object()]}}, r"metadata\['a'\]\['b'\]\[1\] is of the type object"),
        ({"a": b"x"}, r"metadata\['a'\] is of the type bytes"),
        ({1: "x"}, "key 1 must be a str"),
        ({"a": {None: 1}}, r"metadata\['a'\]: the key None must be a str"),
        ({"a": math.nan}, "is nan, which JSON cannot say"),
        ({"a": {1, 2}}, "type set"),
        ([("a", 1)], "metadata must be a dict, not list"),
        ("text", "metadata must be a dict, not str"),
        ({"a": "x" * 70_000}, "65536 are the most"),
    ],
)
def test_metadata_that_json_cannot_hold_is_refused_by_its_path(dest, metadata, message):
    with pytest.raises(UsageError, match=message):
        Checkpoint(dest).save_sync(b"x", metadata=metadata)
    assert not os.path.exists(dest)


def test_metadata_comes_back_as_json_gives_it(dest):
    given: dict[str, Any] = {
        "": {},
        "__string__": "x",
        "n": np.int64(3),
        "f": np.float32(0.5),
        "t": (1, 2),
        "none": None,
        "b": True,
    }
    info = Checkpoint(dest).save_sync(b"x", metadata=given)
    expected = {"": {}, "__string__": "x", "n": 3, "f": 0.5, "t": [1, 2], "none": None, "b": True}
    assert info.metadata == expected
    (found,) = Checkpoint(dest).checkpoints_sync()
    assert found.metadata == expected
    assert Checkpoint(dest).load_bytes_sync(where={"none": None, "b": True}) == b"x"
    with pytest.raises(StepNotFoundError):
        Checkpoint(dest).load_bytes_sync(where={"absent": None})


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], b"1"])
def test_what_is_no_metric(dest, value):
    with pytest.raises(UsageTypeError, match=r"metrics\['loss'\]"):
        Checkpoint(dest).save_sync(b"x", metrics={"loss": value})


def test_metrics_of_all_kinds_come_back(dest):
    given: dict[str, Any] = {"int": 3, "inf": math.inf, "low": -math.inf, "numpy": np.float32(0.25)}
    Checkpoint(dest).save_sync(b"x", metrics=given)
    (found,) = Checkpoint(dest).checkpoints_sync()
    assert found.metrics == {"int": 3.0, "inf": math.inf, "low": -math.inf, "numpy": 0.25}


# --- load --------------------------------------------------------------------------------------


def test_the_best_ignores_nan_and_what_has_no_metric_and_prefers_the_newer(dest):
    checkpoint = Checkpoint(dest, keep=None)
    for step, metrics in enumerate([{"loss": 2.0}, {"loss": 1.0}, {"loss": 1.0}, {"loss": math.nan}, {}]):
        checkpoint.save_sync(b"%d" % step, step=step, metrics=metrics)
    assert checkpoint.load_bytes_sync(best="loss") == b"2"
    assert checkpoint.load_bytes_sync(best="loss", mode="max") == b"0"
    with pytest.raises(StepNotFoundError, match="with the metric 'acc'"):
        checkpoint.load_bytes_sync(best="acc")


@pytest.mark.parametrize(
    "which",
    [{"step": 1, "best": "loss"}, {"where": 7}, {"best": 7}, {"best": "loss", "mode": "lowest"}, {"mode": "low"}],
)
def test_what_does_not_say_which(dest, which):
    with pytest.raises(UsageError):
        saved(dest, [1]).load_sync(**which)


def test_a_step_of_nothing_is_an_error_not_none(dest):
    with pytest.raises(StepNotFoundError, match="No checkpoint has a step") as caught:
        Checkpoint(dest).load_sync(step=1)
    assert isinstance(caught.value, (ValueError, FileNotFoundError))


def test_many_steps_are_listed_in_short(dest):
    with pytest.raises(StepNotFoundError, match=r"0, 1, .*9, \.\.\., 30, .*39 \(40 in all\)"):
        saved(dest, range(40), keep=None).load_sync(step=99)


def test_a_damaged_step_is_an_error_and_never_another_step(dest):
    checkpoint = saved(dest, [1, 2])
    damage(dest, info_of(checkpoint, 1))
    with pytest.raises(CorruptCheckpointError, match="no copy of it is intact"):
        Checkpoint(dest).load_sync(step=1)


def test_a_damaged_best_one_gives_way_to_the_second_with_a_warning(dest, caplog):
    checkpoint = Checkpoint(dest)
    for step, loss in ((1, 0.1), (2, 0.2), (3, 0.3)):
        checkpoint.save_sync(BIG + b"%d" % step, step=step, metrics={"loss": loss})
    damage(dest, info_of(checkpoint, 1))
    assert Checkpoint(dest).load_bytes_sync(best="loss") == BIG + b"2"
    assert "Passed over a damaged checkpoint" in caplog.text


def test_what_was_loaded_is_told(dest, tmp_path):
    checkpoint = saved(dest, [1, 2])
    assert checkpoint.loaded is None
    checkpoint.load_sync()
    assert checkpoint.loaded is not None
    assert checkpoint.loaded.step == 2
    checkpoint.load_bytes_sync(step=1)
    assert (checkpoint.loaded.step, checkpoint.loaded.uri) == (1, info_of(checkpoint, 1).uri)
    fork = Checkpoint(tmp_path / "fork", dest)
    fork.load_sync()
    assert fork.loaded is not None
    assert fork.loaded.uri.startswith(f"{dest}/log/")
    empty = Checkpoint(tmp_path / "empty")
    assert empty.load_sync() is None
    assert empty.loaded is None


def test_where_that_raises_raises(dest):
    with pytest.raises(ZeroDivisionError):
        saved(dest, [1]).load_sync(where=lambda _: 1 / 0)


# --- lineage -----------------------------------------------------------------------------------


def test_a_step_may_be_saved_again_after_the_task_fell_back(dest, caplog):
    checkpoint = saved(dest, [1, 2])
    damage(dest, info_of(checkpoint, 2))
    retry = Checkpoint(dest)
    assert retry.load_bytes_sync() == BIG + b"1"
    retry.save_sync(b"anew", step=2)
    assert [(one.step, one.in_lineage) for one in retry.checkpoints_sync()] == [(2, True), (2, False), (1, True)]
    assert retry.load_bytes_sync(step=2) == b"anew"


def test_a_damaged_copy_of_a_step_is_no_hindrance(dest, caplog):
    checkpoint = saved(dest, [1])
    damage(dest, info_of(checkpoint, 1))
    checkpoint.save_sync(b"anew", step=1)
    assert "saved anew" in caplog.text


def test_a_lower_step_is_allowed_and_is_the_newest(dest):
    checkpoint = saved(dest, [5, 9, 7], keep=1)
    assert checkpoint.latest_step_sync() == 7
    assert checkpoint.steps_sync() == [7]
    assert Checkpoint(dest).load_bytes_sync() == BIG + b"7"


def test_what_was_loaded_is_what_a_save_goes_on_from(dest):
    checkpoint = saved(dest, [1, 2, 3], keep=None)
    checkpoint.load_sync(step=1)
    checkpoint.save_sync(b"other", step=2)
    told = [(one.step, one.in_lineage) for one in checkpoint.checkpoints_sync()]
    assert told == [(2, True), (3, False), (2, False), (1, True)]
    assert checkpoint.load_bytes_sync(step=2) == b"other"


def test_a_fall_back_never_goes_to_what_was_left_behind(dest, caplog):
    checkpoint = saved(dest, [1, 2, 3], keep=None)
    checkpoint.rollback_sync(1)
    last = checkpoint.save_sync(BIG + b"new", step=2)
    damage(dest, last)
    assert Checkpoint(dest).load_bytes_sync() == BIG + b"1"


def test_a_step_exists_for_an_attempt_that_has_not_loaded(dest):
    saved(dest, [1])
    with pytest.raises(StepExistsError, match=r"overwrite=True.*load\(step=") as caught:
        Checkpoint(dest).save_sync(b"from nothing", step=1)
    assert isinstance(caught.value, (ValueError, FileExistsError))


def test_a_higher_step_asks_for_no_list(dest):
    checkpoint = saved(dest, [1])
    seen, watched = requests()
    with watched:
        retry = Checkpoint(dest)
        retry.load_sync()
        seen.clear()
        retry.save_sync(b"x", step=2)
        first = len(seen)
        seen.clear()
        retry.save_sync(b"x", step=3)
    assert first <= 4
    assert [verb for verb, *_ in seen] == ["create"]
    del checkpoint


def test_a_slow_load_does_not_leave_behind_what_another_thread_saves(dest):
    checkpoint = saved(dest, [1])
    in_load, may_go_on = threading.Event(), threading.Event()

    def progress(_done, _total):
        in_load.set()
        may_go_on.wait(10)

    loader = threading.Thread(target=checkpoint.load_sync, kwargs={"progress": progress})
    loader.start()
    in_load.wait(10)
    checkpoint.save_sync(BIG + b"2", step=2)
    may_go_on.set()
    loader.join()
    checkpoint.save_sync(BIG + b"3", step=3)
    assert [(one.step, one.in_lineage) for one in checkpoint.checkpoints_sync()] == [(3, True), (2, True), (1, True)]


# --- rollback ----------------------------------------------------------------------------------


def test_rolled_back_for_good(dest):
    checkpoint = saved(dest, [1, 2, 3])
    info = checkpoint.rollback_sync(1)
    assert isinstance(info, CheckpointInfo)
    assert info.step == 1
    assert checkpoint.latest_step_sync() == 1
    assert Checkpoint(dest).load_bytes_sync() == BIG + b"1"
    assert [(one.step, one.in_lineage) for one in checkpoint.checkpoints_sync()] == [(1, True), (3, False), (2, False)]


def test_a_rollback_may_be_taken_back(dest):
    checkpoint = saved(dest, [1, 2, 3])
    checkpoint.rollback_sync(1)
    checkpoint.rollback_sync(3)
    assert Checkpoint(dest).load_bytes_sync() == BIG + b"3"
    assert [one.step for one in checkpoint.checkpoints_sync() if one.in_lineage] == [3, 2, 1]


def test_the_state_rolled_back_to_outlives_the_window(dest):
    checkpoint = saved(dest, [1, 2, 3])
    narrow = Checkpoint(dest, keep=1)
    narrow.rollback_sync(1)
    narrow.save_sync(BIG + b"a", step=2)
    assert narrow.steps_sync() == [1, 2]
    narrow.save_sync(BIG + b"b", step=3)
    assert narrow.steps_sync() == [3]
    assert len(list(Path(dest, "data").rglob("0*-*/*"))) == 1
    del checkpoint


def test_nothing_changes_when_the_step_is_damaged_or_not_there(dest):
    checkpoint = saved(dest, [1, 2])
    damage(dest, info_of(checkpoint, 1))
    before = checkpoint.checkpoints_sync()
    with pytest.raises(CorruptCheckpointError):
        checkpoint.rollback_sync(1)
    with pytest.raises(StepNotFoundError, match="There are the steps 1, 2"):
        checkpoint.rollback_sync(3)
    assert checkpoint.checkpoints_sync() == before


def test_a_rollback_that_failed_changes_nothing(dest):
    saved(dest, [1, 2])
    faults: list[Exception] = []

    def fail_once(when, verb, keys):
        if faults and (when, verb) == ("before", "create"):
            raise faults.pop()

    with intercepted(fail_once):
        retry = Checkpoint(dest, keep=1)
        retry.load_sync()
        faults.append(UnavailableError("down"))
        with pytest.raises(UnavailableError):
            retry.rollback_sync(1)
        told = retry.save_sync(b"x", step=3)
    assert str(told.resumed_from).endswith("-000000000003.jsonl"), "which it had loaded"
    assert retry.steps_sync() == [2, 3]


def test_a_state_in_the_record_is_rolled_back_too(dest):
    checkpoint = Checkpoint(dest)
    for step in (1, 2):
        checkpoint.save_state_sync({"step": step}, step=step)
    checkpoint.rollback_sync(1)
    assert Checkpoint(dest).load_state_sync() == {"step": 1}


# --- pins and what stays -----------------------------------------------------------------------


def test_a_pin_survives_saves_rollbacks_and_other_attempts(dest):
    checkpoint = saved(dest, [1, 2], keep=1)
    checkpoint.pin_sync(2)
    for step in (3, 4):
        checkpoint.save_sync(BIG, step=step)
    assert checkpoint.steps_sync() == [2, 4]
    other = Checkpoint(dest, keep=1)
    other.load_sync()
    for step in (5, 6, 7):
        other.save_sync(BIG, step=step)
    assert other.steps_sync() == [2, 7]
    other.rollback_sync(2)
    other.save_sync(BIG, step=8)
    other.save_sync(BIG, step=9)
    assert other.steps_sync() == [2, 9]
    other.unpin_sync(2)
    other.save_sync(BIG, step=10)
    assert other.steps_sync() == [10]


def test_pinned_twice_is_pinned_once_and_unpinned_is_no_error(dest):
    checkpoint = saved(dest, [1])
    records = len(os.listdir(os.path.join(dest, "log")))
    assert checkpoint.pin_sync(1).pinned
    assert checkpoint.pin_sync(1).pinned
    assert not checkpoint.unpin_sync(1).pinned
    assert not checkpoint.unpin_sync(1).pinned
    assert len(os.listdir(os.path.join(dest, "log"))) == records + 2
    with pytest.raises(StepNotFoundError):
        checkpoint.pin_sync(9)


def test_a_checkpoint_without_a_step_is_named_by_what_was_listed(dest, tmp_path):
    checkpoint = Checkpoint(dest, keep=1)
    first = checkpoint.save_sync(BIG + b"1")
    assert checkpoint.pin_sync(first).pinned
    checkpoint.save_sync(BIG + b"2")
    assert [one.pinned for one in checkpoint.checkpoints_sync()] == [False, True]
    checkpoint.rollback_sync(first)
    assert Checkpoint(dest, read_only=True).load_bytes_sync() == BIG + b"1"
    assert not checkpoint.unpin_sync(first).pinned, "wherever it was repeated meanwhile"
    stranger = Checkpoint(tmp_path / "other").save_sync(b"x")
    with pytest.raises(UsageError, match="belongs to another task"):
        checkpoint.pin_sync(stranger)
    for step in range(3):
        checkpoint.save_sync(b"x", step=step)
    with pytest.raises(StepNotFoundError, match="is no checkpoint named"):
        checkpoint.rollback_sync(first)


def test_a_time_that_cannot_be_read_is_no_reason_to_fail(dest):
    info = Checkpoint(dest).save_sync(b"x")
    path = Path(info.uri)
    body = json.loads(path.read_bytes().partition(b"\n")[0]) | {"time": "yesterday"}
    first = json.dumps(body).encode() + b"\n"
    path.write_bytes(first + b'{"blake3": "%s"}\n' % blake3(first).hexdigest().encode())
    assert Checkpoint(dest).checkpoints_sync()[0].time.year == 1


def test_clear_clears_pins_as_well(dest):
    checkpoint = saved(dest, [1])
    checkpoint.pin_sync(1)
    checkpoint.clear_sync()
    assert checkpoint.checkpoints_sync() == []
    checkpoint.save_sync(b"x", step=1)
    assert not info_of(checkpoint, 1).pinned


def test_policies_are_combined(dest):
    checkpoint = Checkpoint(dest, keep=LatestN(2) | BestN(1, "acc", mode="max") | EveryNSteps(4))
    for step in range(11):
        checkpoint.save_sync(BIG, step=step, metrics={"acc": -abs(step - 3)})
    assert checkpoint.steps_sync() == [0, 3, 4, 8, 9, 10]
    assert len(list(Path(dest, "data").rglob("0*-*/*"))) == 6
    reasons = {one.checkpoint.step: one.reason for one in checkpoint.prune_sync(dry_run=True)}
    assert reasons[3] == "among the best 1 by acc"
    assert reasons[10] == "the newest"


def test_a_later_attempt_may_keep_fewer_and_prune_says_why(dest):
    saved(dest, range(5), keep=None)
    view = Checkpoint(dest, keep=2)
    told = view.prune_sync(dry_run=True)
    assert [(one.checkpoint.step, one.keeps) for one in told] == [
        (4, True),
        (3, True),
        (2, False),
        (1, False),
        (0, False),
    ]
    assert "latest:2" in told[-1].reason
    assert view.steps_sync() == [0, 1, 2, 3, 4]
    assert [one.keeps for one in view.prune_sync()] == [True, True, False, False, False]
    assert view.steps_sync() == [3, 4]
    assert len(list(Path(dest, "data").rglob("0*-*/*"))) == 2
    assert Checkpoint(dest).load_bytes_sync() == BIG + b"4"


def test_nothing_to_prune_writes_nothing(dest):
    checkpoint = saved(dest, [1, 2])
    records = os.listdir(os.path.join(dest, "log"))
    assert all(one.keeps for one in checkpoint.prune_sync())
    assert os.listdir(os.path.join(dest, "log")) == records
    assert Checkpoint(f"{dest}-empty").prune_sync() == []


def test_what_cannot_be_read_is_not_dropped(dest, caplog):
    checkpoint = saved(dest, [1, 2, 3])
    info = info_of(checkpoint, 2)
    payload, record = payload_of(dest, info), Path(info.uri)
    content = record.read_bytes()
    record.write_bytes(content[:50])
    assert [one.step for one in Checkpoint(dest).checkpoints_sync()] == [3, 1]
    assert "cannot be read, and is not listed" in caplog.text
    retry = Checkpoint(dest, keep=1)
    retry.load_sync()
    for step in (4, 5, 6):
        retry.save_sync(BIG, step=step)
    assert payload.exists()
    record.write_bytes(content)
    assert retry.steps_sync() == [2, 6]


def test_views_change_nothing(dest):
    saved(dest, [1])
    view = Checkpoint(dest, read_only=True)
    for call in (view.pin_sync, view.unpin_sync, view.rollback_sync):
        with pytest.raises(UsageError, match="read-only view"):
            call(1)
    with pytest.raises(UsageError, match="read-only view"):
        view.prune_sync()


def test_a_crash_between_the_record_and_the_deletion_loses_nothing(dest):
    checkpoint = saved(dest, [1, 2, 3], keep=3)

    def no_delete(when, verb, keys):
        if (when, verb) == ("before", "delete"):
            raise UnavailableError("gone")

    with intercepted(no_delete):
        Checkpoint(dest, keep=1).prune_sync()
    again = Checkpoint(dest, keep=1)
    assert again.load_bytes_sync() == BIG + b"3"
    again.save_sync(b"x", step=4)
    again.save_sync(b"x", step=5)
    assert list(Path(dest, "data").rglob("0*-*/*")) == [], "and what it left is swept"
    del checkpoint


# --- forks -------------------------------------------------------------------------------------


def test_a_fork_from_a_place_takes_its_newest_and_stays_there(dest, tmp_path):
    source = saved(dest, [1])
    target = str(tmp_path / "fork")
    assert Checkpoint(target, fork_from=dest).load_bytes_sync() == BIG + b"1"
    source.save_sync(b"goes on", step=2)
    retry = Checkpoint(target, fork_from=dest)
    assert retry.load_bytes_sync() == BIG + b"1", "a retry begins where the first attempt began"
    retry.save_sync(b"own")
    assert str(retry.checkpoints_sync()[0].resumed_from).startswith(f"{dest}/log/")


def test_a_fork_from_nothing_is_an_error(dest, tmp_path):
    with pytest.raises(NotFoundError, match="no checkpoint to fork from"):
        Checkpoint(str(tmp_path / "fork"), fork_from=dest).load_sync()
    source = saved(dest, [1])
    info = info_of(source, 1)
    for step in (2, 3, 4, 5):
        source.save_sync(BIG, step=step)
    for _ in range(2):
        with pytest.raises(NotFoundError, match="is not there any more"):
            Checkpoint(str(tmp_path / "fork"), fork_from=info).load_sync()
    with pytest.raises(UsageError, match="pass one of them"):
        Checkpoint(str(tmp_path / "fork"), dest, fork_from=dest)


def test_a_fork_follows_a_checkpoint_that_was_repeated(dest, tmp_path):
    source = saved(dest, [1, 2])
    info = info_of(source, 1)
    source.rollback_sync(1)
    assert Checkpoint(str(tmp_path / "fork"), fork_from=info).load_bytes_sync() == BIG + b"1"


def test_a_fork_does_not_go_on_in_the_iterations_of_its_source(dest, tmp_path):
    source = Checkpoint(dest)
    for item in source.iterate(range(5)):
        source.save_sync(b"%d" % item)
    fork = Checkpoint(tmp_path / "fork", fork_from=dest)
    assert fork.load_bytes_sync() == b"4"
    assert list(fork.iterate(range(3))) == [0, 1, 2]
    other = Checkpoint(tmp_path / "other", dest)
    assert other.load_bytes_sync() == b"4"
    assert list(other.iterate(range(5))) == [], "with src= it is the same task"


@pytest.mark.parametrize("how", ["cleared", "moved"])
@pytest.mark.parametrize("loops", [False, True])
def test_a_fork_whose_source_is_gone_is_no_new_beginning(dest, tmp_path, how, loops):
    saved(dest, [1])
    fork = Checkpoint(tmp_path / "fork", fork_from=dest)
    fork.load_sync()
    if loops:
        for item in fork.iterate(range(9), every=1):
            if item == 3:
                break
    if how == "cleared":
        Checkpoint(dest).clear_sync()
    else:
        os.rename(dest, f"{dest}-moved")
    for again in Checkpoint(tmp_path / "fork"), Checkpoint(tmp_path / "fork", fork_from=dest):
        with pytest.raises(NotFoundError, match="is not there any more"):
            again.load_sync()


def test_positions_of_a_task_whose_src_is_gone_are_no_new_beginning(dest, tmp_path):
    saved(dest, [1])
    task = Checkpoint(tmp_path / "own", dest)
    task.load_sync()
    for _ in task.iterate(range(3), every=1):
        pass
    os.rename(dest, f"{dest}-moved")
    with pytest.raises(NotFoundError, match="its own ones are positions only"):
        Checkpoint(tmp_path / "own").load_sync()


def test_a_fork_has_one_step_only(dest, tmp_path):
    source = saved(dest, [1, 3, 7], keep=None)
    fork = Checkpoint(tmp_path / "fork", fork_from=info_of(source, 3))
    assert fork.load_bytes_sync(step=3) == BIG + b"3"
    for which in ({"step": 7}, {"step": 99}, {"best": "loss"}):
        with pytest.raises(StepNotFoundError):
            fork.load_sync(**which)


def test_the_name_of_a_checkpoint_lasts(dest, tmp_path):
    checkpoint = Checkpoint(dest, keep=2)
    info = checkpoint.save_sync(BIG, step=0)
    checkpoint.pin_sync(info)
    for item in checkpoint.iterate(range(200), every=1):
        if item == 150:
            break
    assert checkpoint.checkpoints_sync()[0].uri == info.uri
    assert Checkpoint(tmp_path / "fork", fork_from=info).load_bytes_sync() == BIG
    assert checkpoint.load_bytes_sync(where=info) == BIG
    assert not checkpoint.unpin_sync(info).pinned


# --- what cannot be read ------------------------------------------------------------------------


def test_a_page_hides_nothing_that_could_not_be_read(dest, small_pages):
    first = Checkpoint(dest, keep=None)
    infos = [first.save_sync(BIG + b"%d" % step, step=step) for step in range(12)]
    record = Path(infos[5].uri)
    content = record.read_bytes()
    record.write_bytes(b"garbage\n")
    second = Checkpoint(dest, keep=None)
    second.load_sync()
    for step in range(12, 30):
        second.save_sync(b"x", step=step)
    record.write_bytes(content)
    assert Checkpoint(dest, read_only=True).load_bytes_sync(step=5) == BIG + b"5"
    third = Checkpoint(dest, keep=100)
    third.load_sync()
    third.save_sync(b"x", step=40)
    assert third.load_bytes_sync(step=5) == BIG + b"5"


def test_the_newest_one_is_not_dropped_because_it_could_not_be_read(dest, caplog):
    first = saved(dest, [1, 2, 3])
    record = Path(info_of(first, 3).uri)
    content = record.read_bytes()
    record.write_bytes(content.replace(b"commit", b"comnit"))
    for step in (10, 11, 12):
        retry = Checkpoint(dest, keep=2)
        retry.load_sync()
        retry.save_sync(BIG + b"%d" % step, step=step)
    record.write_bytes(content)
    assert Checkpoint(dest, read_only=True).load_bytes_sync(step=3) == BIG + b"3"


def test_prune_spares_what_was_resumed_from_until_there_are_two_newer_ones(dest):
    saved(dest, [1], keep=1)
    retry = Checkpoint(dest, keep=1)
    retry.load_sync()
    retry.save_sync(BIG, step=2)
    told = {one.checkpoint.step: one.reason for one in retry.prune_sync(dry_run=True)}
    assert told == {2: "the newest", 1: "the attempt resumed from it"}
    retry.prune_sync()
    beside = Checkpoint._joining(dest, keep=1)
    beside.prune_sync()
    assert retry.steps_sync() == [1, 2]
    retry.save_sync(BIG, step=3)
    retry.prune_sync()
    assert retry.steps_sync() == [3]


def test_prune_beside_an_attempt_never_drops_the_only_good_one(dest, caplog):
    damage(dest, info_of(saved(dest, [1, 2]), 2))
    running = Checkpoint(dest)
    assert running.load_bytes_sync() == BIG + b"1"
    told = {one.checkpoint.step: one.reason for one in Checkpoint._joining(dest, keep=1).prune_sync()}
    assert told == {2: "the newest", 1: "the newest that is not damaged"}
    assert Checkpoint(dest, read_only=True).load_bytes_sync() == BIG + b"1"


def test_what_a_child_process_saved_is_no_step_back(dest):
    parent = Checkpoint(dest, keep=1)
    parent.save_sync(b"0", step=0)

    def in_child(step):
        if (pid := os.fork()) == 0:
            parent.save_sync(b"child", step=step)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

    in_child(1)
    parent.load_sync()
    in_child(2)
    for _ in parent.iterate(range(3), every=1):
        pass
    parent.save_sync(b"parent", step=3)
    assert all(one.in_lineage for one in parent.checkpoints_sync())


def test_a_loop_that_ends_does_not_claim_what_a_child_saved_in_the_middle(dest):
    checkpoint = Checkpoint(dest)
    for item in checkpoint.iterate(range(10)):
        if item == 5 and (pid := os.fork()) == 0:
            checkpoint.save_sync(b"after 5")
            os._exit(0)
        if item == 5:
            assert os.waitpid(pid, 0)[1] == 0
    retry = Checkpoint(dest)
    assert retry.load_bytes_sync() == b"after 5"
    assert list(retry.iterate(range(10))) == [6, 7, 8, 9]


# --- many --------------------------------------------------------------------------------------


@pytest.fixture
def small_pages(monkeypatch):
    for room in ("writer", "catalogue"):
        monkeypatch.setattr(f"taskckpt._log.{room}.PAGE_COMMITS", 8)
    monkeypatch.setattr("taskckpt._log.catalogue.FEW_RECORDS", 4)


def test_pages_spare_reading_each_record(dest, small_pages):
    checkpoint = Checkpoint(dest, keep=None)
    for step in range(100):
        checkpoint.save_sync(b"%d" % step, step=step, metadata={"step": step}, metrics={"loss": -step})
    seen, watched = requests()
    with watched:
        found = Checkpoint(dest, read_only=True).checkpoints_sync()
    assert [one.step for one in found] == list(reversed(range(100)))
    assert [one.metadata["step"] for one in found] == list(reversed(range(100)))
    assert len(seen) < 40
    assert Checkpoint(dest).load_bytes_sync(step=17) == b"17", "what a page leaves out is read from the record"
    assert Checkpoint(dest).load_bytes_sync(best="loss", mode="max") == b"0"


@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "empty"])
def test_pages_are_never_needed(dest, small_pages, how):
    checkpoint = Checkpoint(dest, keep=None)
    for step in range(60):
        checkpoint.save_sync(b"%d" % step, step=step)
    pages = sorted(Path(dest, "index").iterdir())
    assert len(pages) == 7
    for page in pages[::2]:
        data = page.read_bytes()
        if how == "gone":
            page.unlink()
        else:
            page.write_bytes({"cut": data[: len(data) // 2], "flipped": b"?" + data[1:], "empty": b""}[how])
    assert Checkpoint(dest).steps_sync() == list(range(60))


def test_many_attempts_go_on_with_the_index(dest, small_pages):
    for attempt in range(12):
        checkpoint = Checkpoint(dest, keep=None)
        checkpoint.load_sync()
        for step in range(5):
            checkpoint.save_sync(b"x", step=attempt * 5 + step)
    assert Checkpoint(dest).steps_sync() == list(range(60))
    assert len(list(Path(dest, "index").iterdir())) >= 6


def test_pages_go_with_what_they_are_about(dest, small_pages):
    checkpoint = Checkpoint(dest, keep=20)
    for step in range(200):
        checkpoint.save_sync(b"x", step=step)
    assert 2 <= len(list(Path(dest, "index").iterdir())) <= 5
    assert checkpoint.steps_sync() == list(range(180, 200))
    checkpoint.clear_sync()
    assert list(Path(dest, "index").iterdir()) == []


def test_an_index_that_cannot_be_written_costs_nothing_but_time(dest, small_pages, caplog):
    def refuse(when, verb, keys):
        if when == "before" and any(key.startswith("index/") for key in keys):
            raise UnavailableError("no")

    caplog.set_level(logging.INFO, "taskckpt")
    with intercepted(refuse):
        checkpoint = Checkpoint(dest, keep=None)
        for step in range(30):
            checkpoint.save_sync(b"x", step=step)
    assert "index could not be extended" in caplog.text
    assert Checkpoint(dest).steps_sync() == list(range(30))


@pytest.mark.timeout(180)
def test_ten_thousand_checkpoints_take_few_requests(tmp_path):
    """The figures of the documentation, on the real sizes; written without fsync, which is not what is asked here."""
    code = (
        "import os, sys; os.fsync = lambda fd: None\n"
        "from taskckpt import Checkpoint\n"
        "cp = Checkpoint(sys.argv[1], keep=None)\n"
        "for step in range(10_000): cp.save_sync(b'%d' % step, step=step)\n"
    )
    dest = str(tmp_path / "task")
    subprocess.run([sys.executable, "-c", code, dest], check=True)
    counts = {}
    for what, call in {
        "list": lambda one: len(one.checkpoints_sync()),
        "load": lambda one: one.load_bytes_sync(),
        "step": lambda one: one.load_bytes_sync(step=5),
    }.items():
        seen, watched = requests()
        with watched:
            result = call(Checkpoint(dest, read_only=True))
        assert result == {"list": 10_000, "load": b"9999", "step": b"5"}[what]
        pages_of_listing = sum(len(keys) and keys[0] == "log" for verb, *keys in seen if verb == "list") * 10
        counts[what] = len(seen) + pages_of_listing  # on S3, a page of a listing has 1,000 names
    assert counts["list"] <= 300, counts
    assert counts["step"] <= 300, counts
    small = str(tmp_path / "small")
    saved(small, range(10), keep=None)
    ten, watched = requests()
    with watched:
        Checkpoint(small, read_only=True).load_bytes_sync()
    many, watched = requests()
    with watched:
        Checkpoint(dest, read_only=True).load_bytes_sync()
    assert len(many) <= len(ten)


def test_a_log_that_is_pruned_while_it_is_listed(dest):
    """A reader that lists all the time meets whole histories only."""
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            steps = Checkpoint(dest, read_only=True).steps_sync()
            if steps != list(range(min(steps, default=0), max(steps, default=-1) + 1)):
                wrong.append(steps)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        checkpoint = Checkpoint(dest, keep=3)
        for step in range(300):
            checkpoint.save_sync(b"x", step=step)
    finally:
        stop.set()
        reader.join()
    assert not wrong


# --- options of a key, and where nothing may be restored to ------------------------------------


def test_a_key_takes_options(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKCKPT_BASE", str(tmp_path))
    checkpoint = taskckpt.checkpoint("options", keep=1, save_policy=10)
    assert checkpoint.should_save(10)
    for step in range(3):
        checkpoint.save_sync(b"x", step=step)
    assert checkpoint.steps_sync() == [2]
    assert taskckpt.checkpoint("options") is checkpoint
    assert taskckpt.checkpoint("options", keep=1) is checkpoint
    with pytest.raises(UsageError, match="exists already, with another keep"):
        taskckpt.checkpoint("options", keep=2)
    with pytest.raises(UsageTypeError, match=r"no option kep.*There are: keep"):
        taskckpt.checkpoint("other", kep=2)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="belong to a task with a key"):
        taskckpt.checkpoint(keep=2)
    fork = taskckpt.checkpoint("options-fork", fork_from=checkpoint.checkpoints_sync()[0])
    assert fork.load_bytes_sync() == b"x"


@pytest.mark.parametrize("inside", ["", "data", "data/deeper"])
def test_nothing_is_restored_over_another_task(dest, tmp_path, inside):
    other = tmp_path / "other"
    saved(other, [1])
    with pytest.raises(UsageError, match="Checkpoints of a task lie here"):
        saved(dest, [1]).load_sync(to=other / inside, replace=True)
    assert Checkpoint(other, read_only=True).steps_sync() == [1]


# --- when to save ------------------------------------------------------------------------------


def test_when_to_save(dest):
    checkpoint = Checkpoint(dest, save_policy=10)
    saves = []
    for step in range(1, 35):
        if checkpoint.should_save(step):
            checkpoint.save_sync(b"x", step=step)
            saves.append(step)
    assert saves == [10, 20, 30]
    with pytest.raises(UsageError, match="has no save_policy"):
        Checkpoint(dest).should_save(1)
    with pytest.raises(UsageError):
        Checkpoint(dest, save_policy="often")


def test_a_task_has_a_save_policy_too(tmp_path):
    @taskckpt.task(base=str(tmp_path), key="job", save_policy="1h", keep=LatestN(1) | EveryNSteps(2))
    def job():
        assert not taskckpt.checkpoint().should_save(1)
        for step in range(4):
            taskckpt.checkpoint().save_sync(b"x", step=step)
        return taskckpt.checkpoint().steps_sync(), os.environ["TASKCKPT_KEEP"]

    assert job() == ([0, 2, 3], "latest:1|every:2")


def test_a_page_comes_back(dest):
    commits = catalogue.everything(saved(dest, range(3))._attempt.reader()).commits[::-1]
    page = catalogue.Page(1, 4, tuple(map(catalogue.without_inline, commits)))
    assert catalogue.decode_page(catalogue.encode_page(page), (1, 4), uri="x") == page
