"""A crash before and after every request of each verb that changes a task's history: old or new, never neither."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from taskckpt import Checkpoint, _payload
from taskckpt._log import history as _history
from taskckpt.errors import UnavailableError
from taskckpt.testing import instant_retries, intercepted
from tests.stateful.machine import Crash, Place


@dataclass(frozen=True)
class Seen:
    """What a view shows: steps, the newest first, and which of them are pinned."""

    steps: tuple[int | None, ...]
    pinned: frozenset[int | None]


@dataclass(frozen=True)
class Word:
    call: Callable[[Checkpoint], object]
    after: Seen


# Kept is the newest, and what was newest when the attempt began; 1 is pinned, 2 and 4 are objects of their own.
BEFORE = Seen((4, 3, 2, 1), frozenset({1}))
WORDS = {
    "save": Word(lambda cp: save(cp, 5, overwrite=True), Seen((5, 4, 1), frozenset({1}))),
    "save and pin": Word(lambda cp: save(cp, 6, overwrite=True, pin=True), Seen((6, 4, 1), frozenset({1, 6}))),
    "save again": Word(lambda cp: save(cp, 4, overwrite=True), Seen((4, 4, 1), frozenset({1}))),
    "rollback": Word(lambda cp: cp.rollback_sync(2), Seen((2, 4, 3, 1), frozenset({1}))),
    "pin": Word(lambda cp: cp.pin_sync(2), Seen((4, 3, 2, 1), frozenset({1, 2}))),
    "unpin": Word(lambda cp: cp.unpin_sync(1), Seen((4, 3, 2, 1), frozenset())),
    "prune": Word(lambda cp: cp.prune_sync(), Seen((4, 1), frozenset({1}))),
    "clear": Word(lambda cp: cp.clear_sync(), Seen((), frozenset())),
}


def content(step: int) -> bytes:
    return f"step {step}".encode().ljust(2000 if step % 2 == 0 else 20, b".")


def save(checkpoint: Checkpoint, step: int, *, overwrite: bool = False, pin: bool = False) -> None:
    checkpoint.save_sync(content(step), step=step, overwrite=overwrite, pin=pin)


def seen(dest: str) -> Seen:
    found = Checkpoint(dest, read_only=True).checkpoints_sync()
    return Seen(tuple(one.step for one in found), frozenset(one.step for one in found if one.pinned))


class Stage:
    """A task with four checkpoints, set up anew for each crash."""

    def __init__(self, kind: str, root: Path) -> None:
        self.place = Place(kind, root / "task")
        self._fs = fsspec.filesystem("file" if kind == "local" else "memory")
        first = Checkpoint(self.place.dest, keep=None)
        for step in (1, 2, 3, 4):
            save(first, step, pin=step == 1)
        self._objects = {key: self.place.read(key) for key in self.place.keys("")}

    def set_up(self) -> None:
        for key in self.place.keys(""):
            self._fs.rm_file(key)
        for key, data in self._objects.items():
            self._fs.makedirs(key.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(key, data)

    def act(self, word: Word, at: int | None, how: str) -> int:
        """An attempt that loads and does it, with a fault at one request; gives how many there were."""
        count, ends = 0, False

        def hook(when: str, verb: str, keys: Sequence[str]) -> None:
            nonlocal count, ends
            if ends:
                raise Crash
            count += when == "before"
            if at is None or count != at + 1 or when != how.rpartition(" ")[2]:
                return
            if how.startswith("crash"):
                ends = True
                raise Crash
            raise UnavailableError(f"As wished, {how} {verb}.")

        with intercepted(hook), instant_retries():
            checkpoint = Checkpoint(self.place.dest, keep=1)
            checkpoint.load_bytes_sync()
            word.call(checkpoint)
        return count

    def expect_tidy(self) -> None:
        """After two saves of a new attempt: each checkpoint has its object, and nothing else has one."""
        shown = [step for step in seen(self.place.dest).steps if step is not None and step % 2 == 0]
        objects = sorted(self.place.read(key) for key in self.place.keys("data"))
        assert objects == sorted(content(step) for step in shown)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_payload, "INLINE_LIMIT_BYTES", 1024)
    monkeypatch.setattr(_history, "FEW_RECORDS", 1000)  # one after the other, so that requests have an order
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power cuts here


@pytest.fixture(params=["local", "memory"])
def stage(request: pytest.FixtureRequest, tmp_path: Path, quick: None) -> Iterator[Stage]:
    yield Stage(request.param, tmp_path)
    if request.param == "memory" and fsspec.filesystem("memory").exists(str(tmp_path)):
        fsspec.filesystem("memory").rm(str(tmp_path), recursive=True)


@pytest.mark.filterwarnings("ignore:memory... lives in this process only")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", WORDS)
def test_old_or_new(stage: Stage, name: str) -> None:
    word = WORDS[name]
    stage.set_up()
    requests = stage.act(word, None, "")
    assert seen(stage.place.dest) == word.after
    assert requests >= 8
    met = set()
    for at in range(requests):
        for how in ("crash before", "crash after", "lost before", "lost after"):
            stage.set_up()
            try:
                stage.act(word, at, how)
            except (Crash, UnavailableError):
                met.add(recovered(stage, word))
            else:
                assert seen(stage.place.dest) == word.after, f"{how} request {at} was hidden, and it is not done"
    assert met == {BEFORE, word.after}


def recovered(stage: Stage, word: Word) -> Seen:
    """What is there after the fault; and a new attempt finds it, does it all the same, and leaves nothing behind."""
    dest = stage.place.dest
    found = seen(dest)
    assert found in (BEFORE, word.after)
    view = Checkpoint(dest, read_only=True)
    for step in found.steps:
        assert step is not None
        assert view.load_bytes_sync(step=step) == content(step)
    retry = Checkpoint(dest, keep=1)
    assert retry.load_bytes_sync() == (content(found.steps[0]) if found.steps and found.steps[0] else None)
    if found == BEFORE:
        word.call(retry)
        assert seen(dest) == word.after
    for step in (10, 12):
        save(retry, step)
    assert seen(dest).steps[:1] == (12,)
    assert seen(dest).pinned == word.after.pinned
    stage.expect_tidy()
    return found
