"""Bit flips, cuts, growth and swaps in every stored object: each is noticed, and wrong bytes are never loaded."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from taskckpt import Checkpoint
from taskckpt.errors import CorruptCheckpointError, NotFoundError
from taskckpt.testing import intercepted
from tests.crash.contents import NOTHING, recognised, source

SAVED = ("inline 1", "bytes 2", "file 3", "folder 4")

Damage = Callable[[bytes], bytes]


@dataclass(frozen=True)
class History:
    """A task in which each attempt saved one of ``SAVED``, and the last one only claimed."""

    dest: Path
    sources: Path
    objects: Mapping[Path, bytes]
    # For each checkpoint, oldest first: its record, and its payload if it has one.
    commits: tuple[tuple[Path, ...], ...]
    top: Path

    @property
    def all_of_commits(self) -> list[Path]:
        return [path for commit in self.commits for path in commit]

    def up_to(self, count: int) -> History:
        """The same task when only so many checkpoints had been saved, with the last of them on top."""
        dest = self.dest.with_name(f"{self.dest.name}-{count}")
        kept = self.commits[count - 1][0]
        objects = {}
        for path, data in self.objects.items():
            if path.suffix != ".jsonl" or path.name >= kept.name:  # names count downwards
                moved = dest / path.relative_to(self.dest)
                moved.parent.mkdir(parents=True, exist_ok=True)
                moved.write_bytes(data)
                objects[moved] = data
        commits = tuple(tuple(dest / path.relative_to(self.dest) for path in commit) for commit in self.commits[:count])
        return History(dest, self.sources, objects, commits, commits[-1][0])

    def expected(self, damaged: set[Path]) -> str | None:
        """The newest checkpoint of which nothing is damaged."""
        for name, commit in zip(reversed(SAVED[: len(self.commits)]), reversed(self.commits), strict=True):
            if not damaged & set(commit):
                return name
        return None

    def restore(self) -> None:
        for path, data in self.objects.items():
            path.write_bytes(data)


@pytest.fixture
def history(quick_path, sources, monkeypatch) -> History:
    monkeypatch.setenv("TASKCKPT_TMP", str(quick_path))
    dest = quick_path / "task"
    commits = []
    for name in SAVED:
        before = set(dest.rglob("*"))
        checkpoint = Checkpoint(dest, keep=None)
        checkpoint.load_sync()
        checkpoint.save_sync(source(name, sources))
        new = {path for path in set(dest.rglob("*")) - before if path.is_file()}
        record = min(path for path in new if path.suffix == ".jsonl")
        commits.append((record, *(path for path in new if path.suffix != ".jsonl")))
    Checkpoint(dest).load_sync()
    objects = {path: path.read_bytes() for path in dest.rglob("*") if path.is_file()}
    top = min(path for path in objects if path.suffix == ".jsonl")
    assert len(objects) == 9 + 3  # five claims, four commits; three payloads
    return History(dest, sources, objects, tuple(commits), top)


def flips(data: bytes, random: Random, count: int) -> Iterator[bytes]:
    bits = len(data) * 8
    ends = (0, 7, bits - 8, bits - 1)
    for bit in {*ends, *(random.randrange(bits) for _ in range(count))}:
        yield data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def cuts(data: bytes, random: Random, count: int) -> Iterator[bytes]:
    for size in {0, 1, len(data) // 2, len(data) - 1, *(random.randrange(len(data)) for _ in range(count))}:
        yield data[:size]
        yield data[:size] + bytes(len(data) - size)  # the end was never written: zeros


def growths(data: bytes, random: Random) -> Iterator[bytes]:
    for more in (b"\0", b"\n", b" ", b"}", data[-1:], data, random.randbytes(100), bytes(10_000)):
        yield data + more
        yield more + data


def look(history: History, caplog: pytest.LogCaptureFixture) -> tuple[str | None, list[str]]:
    """What is loaded (None: a typed error), and the warnings."""
    caplog.clear()
    try:
        found = Checkpoint(history.dest, read_only=True).load_sync()
    except CorruptCheckpointError:
        return None, []
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    name = recognised(found, history.sources)
    if found is not None:
        shutil.rmtree(found if found.is_dir() else found.parent)
    return name, warnings


def expect_noticed(history: History, damaged: set[Path], caplog: pytest.LogCaptureFixture) -> None:
    name, warnings = look(history, caplog)
    assert name == history.expected(damaged), (name, damaged)
    assert name is None or warnings, f"{damaged} went unnoticed"


def of_each_object(history: History, damages: Callable[[bytes], Iterator[bytes]], caplog) -> int:
    """Damages the newest checkpoint's objects, while each checkpoint in turn is the newest, and the top claim."""
    count = 0
    for stage in (*(history.up_to(number) for number in range(1, len(SAVED) + 1)), history):
        for path in stage.commits[-1] if stage is not history else (stage.top,):
            data = stage.objects[path]
            for changed in damages(data):
                if changed == data:
                    continue
                path.write_bytes(changed)
                expect_noticed(stage, {path}, caplog)
                count += 1
            path.write_bytes(data)
    return count


def test_every_flipped_bit_is_noticed(history, caplog):
    random = Random(1)
    assert of_each_object(history, lambda data: flips(data, random, 160), caplog) > 1_000


def test_every_bit_of_a_record_counts(history, caplog):
    stage = history.up_to(1)
    ((record,),) = stage.commits
    data = stage.objects[record]
    for bit in range(len(data) * 8):
        record.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        assert look(stage, caplog) == (None, [])


def test_every_cut_is_noticed(history, caplog):
    random = Random(2)
    assert of_each_object(history, lambda data: cuts(data, random, 25), caplog) > 400


def test_everything_that_has_grown_is_noticed(history, caplog):
    random = Random(3)
    assert of_each_object(history, lambda data: growths(data, random), caplog) >= 120


def test_every_exchange_of_two_objects_is_noticed(history, caplog):
    relevant = [*history.all_of_commits, history.top]
    others = [path for path in history.objects if path not in relevant]
    pairs = [*itertools.combinations(relevant, 2), *itertools.product(relevant, others)]
    assert len(pairs) > 50
    for one, other in pairs:
        one.write_bytes(history.objects[other])
        other.write_bytes(history.objects[one])
        damaged = {one, other}
        name, warnings = look(history, caplog)
        # Old claims and commits are not read as long as the newest commit is good.
        newest = {history.top, *history.commits[-1]}
        assert name == history.expected(damaged), (name, damaged)
        assert name is None or warnings or not damaged & newest
        history.restore()


def test_every_object_replaced_by_every_other_is_noticed(history, caplog):
    relevant = [*history.commits[-1], history.top]
    for victim, other in itertools.product(relevant, history.objects):
        if victim != other:
            victim.write_bytes(history.objects[other])
            expect_noticed(history, {victim}, caplog)
            victim.write_bytes(history.objects[victim])


def test_objects_that_are_gone_are_noticed(history, caplog):
    # A record on top that is gone cannot be: here a claim above names it as its head.
    for path in history.commits[-1]:
        path.unlink()
        expect_noticed(history, {path}, caplog)
        history.restore()
    for count in (2, 3, 4):
        stage = history.up_to(count)
        stage.commits[-1][1].unlink()
        expect_noticed(stage, {stage.commits[-1][1]}, caplog)


@pytest.mark.parametrize("seed", range(4))
def test_many_damaged_at_once(seed, history, caplog):
    random = Random(seed)
    for _ in range(60):
        damaged = {path for path in history.objects if random.random() < random.choice((0.2, 0.6))}
        for path in damaged:
            data = history.objects[path]
            path.write_bytes(next(iter(flips(data, random, 1))) if random.random() < 0.5 else data[: len(data) // 2])
        name, warnings = look(history, caplog)
        assert name == history.expected(damaged), damaged
        assert name is None or warnings or not damaged & {history.top, *history.commits[-1]}
        history.restore()


def test_a_private_folder_that_is_gone_is_no_damage(history):
    # systemd-tmpfiles and the like remove what lies in /tmp for long.
    first = Checkpoint(history.dest, read_only=True).load_sync()
    assert first is not None
    shutil.rmtree(first.parent)
    found = Checkpoint(history.dest, read_only=True).load_sync()
    assert found is not None
    assert recognised(found, history.sources) == SAVED[-1]

    def remove(when: str, verb: str, _keys: object) -> None:
        if (when, verb) == ("after", "stream"):
            shutil.rmtree(found.parent)

    with intercepted(remove), pytest.raises(NotFoundError):
        Checkpoint(history.up_to(2).dest, read_only=True).load_sync()


def test_a_damaged_history_goes_on(history, caplog):
    for number, path in enumerate(history.all_of_commits, start=5):
        data = history.objects[path]
        path.write_bytes(next(flips(data, Random(number), 1)))
        attempt = Checkpoint(history.dest, keep=None)
        assert recognised(attempt.load_sync(), history.sources) != NOTHING
        attempt.save_sync(source(f"bytes {number % 9 + 1}", history.sources))
        assert recognised(Checkpoint(history.dest).load_sync(), history.sources) == f"bytes {number % 9 + 1}"
