"""Retention never deletes what the rules protect: random histories, judged by an oracle of tuples and sets.

`TASKCKPT_STATEFUL=2000 pytest tests/stateful` walks that often, along other ways each time.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
from hypothesis.stateful import run_state_machine_as_test

from taskckpt import Checkpoint, _payload
from taskckpt._log import history as _history
from taskckpt._log import retention as _retention
from taskckpt._log import writer as _log
from taskckpt.errors import CommitUnknownError, CorruptCheckpointError, StaleAttemptError, UnavailableError
from taskckpt.testing import instant_retries, intercepted
from tests.stateful import history_machine, machine

WALKS = os.environ.get("TASKCKPT_STATEFUL")


@pytest.mark.timeout(400 if WALKS is None else 400 + 2 * int(WALKS))
@pytest.mark.filterwarnings("ignore:memory... lives in this process only")
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_random_histories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(_retention, "GUARDED_SLOTS", machine.GUARDED)
    monkeypatch.setattr(_log, "RECORD_BATCH", machine.BATCH)
    monkeypatch.setattr(_history, "FEW_RECORDS", 1000)  # one after the other, or no walk could be walked again
    monkeypatch.setattr(_payload, "INLINE_LIMIT_BYTES", machine.INLINE)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power cuts here, and disks differ in speed
    run_state_machine_as_test(
        lambda: history_machine.History(kind, tmp_path / "walk"),  # type: ignore[arg-type] # it is called, and no more
        settings=hypothesis.settings(
            max_examples=int(WALKS or {"local": 60, "memory": 120}[kind]),
            stateful_step_count=40,
            derandomize=WALKS is None,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )


# --- what such walks have found, told once more ------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> str:
    """Where 1, 2 and 3 were saved, of which nothing goes."""
    checkpoint = Checkpoint(tmp_path / "task", keep=None)
    for step in (1, 2, 3):
        save(checkpoint, step)
    return str(tmp_path / "task")


def save(checkpoint: Checkpoint, step: int, metric: float = 0.0) -> None:
    checkpoint.save_sync(b"%d" % step * 100_000, step=step, metrics={"loss": metric}, overwrite=True)


def steps(place: str, *, ancestors: bool = False) -> list[int | None]:
    """Newest first."""
    found = Checkpoint(place, read_only=True).checkpoints_sync()
    return [one.step for one in found if one.in_lineage or not ancestors]


class Replies:
    """Those to the creation of records, which may get lost."""

    are_lost = False

    def hook(self, when: str, verb: str, keys: Sequence[str]) -> None:
        if self.are_lost and (when, verb) == ("after", "create"):
            raise UnavailableError("As wished.")

    @contextmanager
    def lost(self) -> Generator[None]:
        """A record is made inside, and nobody hears of it."""
        self.are_lost = True
        with pytest.raises(CommitUnknownError):
            yield
        self.are_lost = False


@pytest.fixture
def replies() -> Generator[Replies]:
    replies = Replies()
    with intercepted(replies.hook), instant_retries():
        yield replies


@pytest.fixture
def attempt(place: str, replies: Replies) -> Checkpoint:
    """It has the task, and has resumed from 3."""
    checkpoint = Checkpoint(place, keep=9)
    assert checkpoint.load_sync()
    return checkpoint


@pytest.mark.parametrize("verb", ["pin", "unpin", "rollback"])
def test_an_attempt_that_lost_the_task_is_told_so_by_each_verb(place: str, verb: str) -> None:
    stale, current = Checkpoint(place), Checkpoint(place, keep=None)
    stale.load_sync()
    current.load_sync()
    current.pin_sync(2)
    for step in (1, 2):
        with pytest.raises(StaleAttemptError):
            getattr(stale, f"{verb}_sync")(step)
    with pytest.raises(StaleAttemptError):
        stale.prune_sync()
    assert steps(place) == [3, 2, 1]


def test_one_that_never_saw_a_checkpoint_too(tmp_path: Path) -> None:
    stale = Checkpoint(tmp_path)
    assert stale.load_sync() is None
    save(Checkpoint(tmp_path), 1)
    with pytest.raises(StaleAttemptError):
        stale.pin_sync(1)


@pytest.mark.parametrize("verb", ["pin", "prune"])
def test_bookkeeping_does_not_roll_back_a_save_whose_reply_was_lost(
    place: str, attempt: Checkpoint, replies: Replies, verb: str
) -> None:
    with replies.lost():
        save(attempt, 4)
    attempt.pin_sync(1) if verb == "pin" else attempt.prune_sync()
    assert steps(place, ancestors=True) == [4, 3, 2, 1]


def test_a_pin_whose_reply_was_lost_is_not_undone_by_the_next(
    place: str, attempt: Checkpoint, replies: Replies
) -> None:
    with replies.lost():
        attempt.pin_sync(1)
    attempt.pin_sync(2)
    assert [one.step for one in attempt.checkpoints_sync() if one.pinned] == [2, 1]


@pytest.mark.parametrize("verb", ["pin", "prune"])
def test_bookkeeping_does_not_roll_back_what_a_child_process_has_saved(place: str, verb: str) -> None:
    parent = Checkpoint(place, keep=3)
    save(parent, 4)
    child = pickle.loads(pickle.dumps(parent))
    save(child, 5)
    parent.pin_sync(4) if verb == "pin" else parent.prune_sync()
    assert steps(place, ancestors=True)[:2] == [5, 4]


@pytest.mark.parametrize("metric", [math.nan, math.inf])
def test_a_save_whose_reply_was_lost_keeps_its_payload(
    place: str, attempt: Checkpoint, replies: Replies, metric: float
) -> None:
    with replies.lost():
        save(attempt, 4, metric)
    save(attempt, 5)
    assert Checkpoint(place, read_only=True).load_bytes_sync(step=4) == b"4" * 100_000


def test_what_was_loaded_since_is_what_the_next_save_goes_on_from(
    place: str, attempt: Checkpoint, replies: Replies
) -> None:
    with replies.lost():
        save(attempt, 4)
    attempt.load_sync(step=1)
    save(attempt, 5)
    assert steps(place, ancestors=True) == [5, 1]
    assert steps(place) == [5, 4, 3, 2, 1]


def test_a_pin_after_a_look_back_leaves_nothing_behind(place: str, attempt: Checkpoint) -> None:
    attempt.load_sync(step=1)
    attempt.load_sync()
    attempt.pin_sync(2)
    save(attempt, 4)
    assert steps(place, ancestors=True) == [4, 3, 2, 1]


def test_a_pin_does_not_end_a_look_back(place: str, attempt: Checkpoint) -> None:
    attempt.load_sync(step=1)
    attempt.pin_sync(2)
    assert steps(place, ancestors=True) == [3, 2, 1]
    save(attempt, 4)
    assert steps(place, ancestors=True) == [4, 1]


def test_a_rollback_to_what_is_gone_changes_nothing(place: str, attempt: Checkpoint) -> None:
    first, *_ = sorted(path for path in Path(place, "data").rglob("*") if path.is_file())
    assert first.read_bytes() == b"1" * 100_000
    first.unlink()
    with pytest.raises(CorruptCheckpointError):
        attempt.rollback_sync(1)
    assert steps(place, ancestors=True) == [3, 2, 1]


def test_a_dry_run_gives_the_reasons_of_the_real_one(place: str) -> None:
    checkpoint = Checkpoint(place, keep=2)
    foretold = checkpoint.prune_sync(dry_run=True)
    assert checkpoint.prune_sync() == foretold
    assert [(one.checkpoint.step, one.keeps) for one in foretold] == [(3, True), (2, True), (1, False)]


def test_a_prune_spares_what_was_resumed_from_one_commit_ago_though_the_attempt_has_loaded_again(place: str) -> None:
    current = Checkpoint(place, keep=1)
    current.load_sync(step=2)
    save(current, 4)
    current.load_sync()
    current.prune_sync()
    assert steps(place) == [4, 2]
