"""The history of a task, over all stores and by all ways to call."""

from __future__ import annotations

import pytest

from taskckpt import BestN, LatestN
from taskckpt.errors import StaleAttemptError, StepExistsError, StepNotFoundError

BIG = bytes(range(256)) * 400  # more than what lies in a record


def payloads(place, task="task"):
    return [key for key in place.keys(task) if key.startswith("data/")]


def test_steps_metadata_and_metrics(place, way):
    checkpoint = place.checkpoint(keep=None)
    for step, loss in ((100, 0.9), (200, 0.1), (300, 0.5)):
        way.save(checkpoint, BIG + b"%d" % step, step=step, metrics={"loss": loss}, metadata={"epoch": step // 100})
    view = place.checkpoint(read_only=True)
    found = way.call(view, "checkpoints")
    assert [one.step for one in found] == [300, 200, 100]
    assert found[0].metadata == {"epoch": 3}
    assert found[0].metrics == {"loss": 0.5}
    assert found[0].size_bytes == len(BIG) + 3
    assert found[0].uri.startswith(f"{view.remote_destination}/log/")
    assert way.call(view, "steps") == [100, 200, 300]
    assert way.call(view, "latest_step") == 300
    assert way.load_bytes(view, step=100) == BIG + b"100"
    assert way.load_bytes(view, best="loss") == BIG + b"200"
    assert way.load_bytes(view, best="loss", mode="max") == BIG + b"100"
    assert way.load_bytes(view, where={"epoch": 3}) == BIG + b"300"
    assert way.load_bytes(view, where=lambda one: one.metrics["loss"] < 0.6) == BIG + b"300"
    with pytest.raises(StepNotFoundError, match=r"of step 150.*There are the steps 100, 200, 300"):
        way.load_bytes(view, step=150)


def test_rolled_back_pinned_and_pruned(place, way):
    checkpoint = place.checkpoint(keep=LatestN(2) | BestN(1, "loss"))
    for step in range(6):
        way.save(checkpoint, BIG + b"%d" % step, step=step, metrics={"loss": abs(step - 2.0)})
    assert way.call(checkpoint, "steps") == [2, 4, 5]
    assert len(payloads(place)) == 3
    way.call(checkpoint, "pin", 4)
    assert way.call(checkpoint, "rollback", 2).step == 2
    retry = place.checkpoint(keep=1)
    assert way.load_bytes(retry) == BIG + b"2"
    assert [one.step for one in way.call(retry, "checkpoints") if one.in_lineage] == [2]
    for step in (3, 4, 5):
        way.save(retry, BIG + b"again %d" % step, step=step)
    assert [(one.step, one.pinned) for one in way.call(retry, "checkpoints")] == [(5, False), (4, True)]
    view = place.checkpoint(read_only=True)
    assert way.load_bytes(view, step=4) == BIG + b"4", "the pinned one is all that is there of this step"
    way.call(retry, "unpin", 4)
    told = way.call(retry, "prune")
    assert [(one.checkpoint.step, one.keeps) for one in told] == [(5, True), (4, False)]
    assert way.call(retry, "steps") == [5]
    assert len(payloads(place)) == 1


def test_a_step_is_there_once(place, way):
    checkpoint = place.checkpoint()
    way.save(checkpoint, BIG + b"one", step=1)
    with pytest.raises(StepExistsError, match="checkpoint of step 1 already"):
        way.save(checkpoint, b"two", step=1)
    assert way.load_bytes(place.checkpoint(read_only=True)) == BIG + b"one"
    way.save(checkpoint, b"two", step=1, overwrite=True)
    assert way.load_bytes(place.checkpoint(read_only=True), step=1) == b"two"


def test_a_fork_begins_with_the_checkpoint_of_another_and_says_so(place, way):
    source = place.checkpoint("source", keep=None)
    way.save(source, BIG + b"1", step=1)
    way.save(source, BIG + b"2", step=2)
    first = way.call(source, "checkpoints")[1]
    fork = place.checkpoint("fork", fork_from=first)
    assert way.load_bytes(fork) == BIG + b"1"
    way.save(fork, b"own", step=2)
    assert way.call(fork, "checkpoints")[0].resumed_from == first.uri
    assert way.load_bytes(place.checkpoint("fork", fork_from=first)) == b"own"
    way.save(source, b"goes on", step=3)


def test_a_fenced_attempt_changes_nothing(place, way):
    old = place.checkpoint()
    way.save(old, b"one", step=1)
    way.save(old, b"two", step=2)
    place.checkpoint().load_bytes_sync()
    for verb in ("pin", "unpin", "rollback"):
        with pytest.raises(StaleAttemptError):
            way.call(old, verb, 1)
    with pytest.raises(StaleAttemptError):
        way.call(old, "prune")
    assert [(one.step, one.pinned) for one in way.call(old, "checkpoints")] == [(2, False), (1, False)]


def test_housekeeping_beside_a_running_attempt_ends_nobody(place, way):
    running = place.checkpoint(keep=2)
    way.save(running, BIG + b"1", step=1)
    way.save(running, BIG + b"2", step=2)
    beside = type(running)._joining(running.remote_destination, keep=None, storage_options=place.options)
    beside.pin_sync(1)
    for step in (3, 4, 5):
        way.save(running, BIG + b"%d" % step, step=step)
    assert way.call(running, "steps") == [1, 4, 5]
