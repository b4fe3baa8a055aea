"""Commits that share what they name: positions carried on, payloads repeated, beside processes that drop them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from taskckpt import Checkpoint, _payload
from taskckpt._operation import Stop
from taskckpt.errors import CommitUnknownError, NotFoundError, StaleAttemptError, UnavailableError
from taskckpt.testing import intercepted


@pytest.fixture(autouse=True)
def _everything_is_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_payload, "INLINE_LIMIT_BYTES", -1)


def commit_positions(checkpoint: Checkpoint, position: int) -> None:
    checkpoint._attempt.save_positions(lambda: {"items": position}, Stop())


def loaded(dest: Path) -> tuple[bytes | None, dict[str, Any]]:
    view = Checkpoint(dest, read_only=True)
    return view.load_bytes_sync(), view._attempt.positions


def test_positions_do_not_hide_what_a_child_saved_first(tmp_path: Path) -> None:
    parent = Checkpoint(tmp_path / "task")
    assert parent.load_bytes_sync() is None
    child = pickle.loads(pickle.dumps(parent))
    child.save_sync(b"saved")
    commit_positions(parent, 5)
    assert loaded(tmp_path / "task") == (b"saved", {"items": 5})


def test_positions_do_not_hide_a_save_whose_reply_was_lost(tmp_path: Path) -> None:
    lost = list[bool]()

    def lose_the_reply(when: str, verb: str, keys: object) -> None:
        if lost and (when, verb) == ("after", "create"):
            lost.clear()
            raise UnavailableError("The reply was lost.", uri="task")

    with intercepted(lose_the_reply):
        checkpoint = Checkpoint(tmp_path / "task")
        assert checkpoint.load_bytes_sync() is None
        lost.append(True)
        with pytest.raises(CommitUnknownError):
            checkpoint.save_sync(b"saved")
        commit_positions(checkpoint, 5)
    assert loaded(tmp_path / "task") == (b"saved", {"items": 5})


def test_a_stale_save_leaves_the_positions_that_it_would_have_carried_on(tmp_path: Path) -> None:
    first = Checkpoint(tmp_path / "task")
    first.save_sync(b"first")
    commit_positions(first, 7)
    older = Checkpoint(tmp_path / "task")
    older.save_sync(b"older")
    assert Checkpoint(tmp_path / "task").load_bytes_sync() == b"older"
    with pytest.raises(StaleAttemptError):
        older.save_sync(b"too late")
    assert loaded(tmp_path / "task") == (b"older", {"items": 7})


def test_positions_are_those_of_what_a_sibling_committed_meanwhile(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "task", keep=1).save_sync(b"first")
    first = Checkpoint(tmp_path / "task", keep=1)
    first.load_bytes_sync()
    commit_positions(first, 1)
    uploads = list[str]()

    def overtaken(when: str, verb: str, keys: Any) -> None:
        if (when, verb) == ("after", "write") and not uploads:
            uploads.extend(keys)
            commit_positions(child, 2)  # drops the positions that there were

    with intercepted(overtaken):
        parent = Checkpoint(tmp_path / "task", keep=1)
        child = pickle.loads(pickle.dumps(parent))
        parent.save_sync(b"second")
    assert uploads
    assert loaded(tmp_path / "task") == (b"second", {"items": 2})


def test_what_a_joiner_pruned_is_not_repeated(tmp_path: Path) -> None:
    running = Checkpoint(tmp_path / "task", keep=3)
    for step in (1, 2, 3):
        running.save_sync(b"step %d" % step, step=step)
    assert running.load_bytes_sync(step=1) == b"step 1"
    Checkpoint._joining(tmp_path / "task", keep=1).prune_sync()
    with pytest.raises(NotFoundError, match="dropped"):
        commit_positions(running, 4)
    assert loaded(tmp_path / "task")[0] == b"step 3"
    running.save_sync(b"step 2, again", step=2)
    assert loaded(tmp_path / "task")[0] == b"step 2, again"


def test_a_pin_beside_a_clear_brings_nothing_back(tmp_path: Path) -> None:
    running = Checkpoint(tmp_path / "task")
    running.save_sync(b"saved", step=1)
    cleared = list[bool]()

    def clear_first(when: str, verb: str, keys: Any) -> None:
        # The join is the joiner's first create: what it has decided by the second one comes too late.
        if (when, verb) == ("before", "create"):
            cleared.append(True)
            if len(cleared) == 2:
                running.clear_sync()

    with intercepted(clear_first), pytest.raises(NotFoundError, match="dropped"):
        Checkpoint._joining(tmp_path / "task", keep=None).pin_sync(1)
    assert loaded(tmp_path / "task") == (None, {})
    assert not [name for _, _, names in os.walk(tmp_path / "task" / "data") for name in names]


def test_a_lost_record_takes_no_payload_along_that_another_one_names(tmp_path: Path) -> None:
    first = Checkpoint(tmp_path / "task", keep=3)
    for step in (1, 2, 3):
        first.save_sync(b"step %d" % step, step=step)
    first.rollback_sync(1)
    (lost,) = [path for path in (tmp_path / "task" / "log").iterdir() if path.name.endswith("-000000000003.jsonl")]
    lost.unlink()
    second = Checkpoint(tmp_path / "task", keep=1)
    for step in (11, 12, 13):
        second.save_sync(b"step %d" % step, step=step)
    view = Checkpoint(tmp_path / "task", read_only=True)
    for step in view.steps_sync():
        assert view.load_bytes_sync(step=step) == b"step %d" % step
