"""All 4^5 fates of five attempts: the sixth gets the newest good checkpoint, or is told that there is none intact.

An attempt saves nothing (``N``), dies in the upload (``D``), commits (``C``), or commits what rots later (``R``).
Each one really loads first, so it goes on from, and prunes after, whatever those before it left behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from taskckpt import Checkpoint
from taskckpt.errors import CorruptCheckpointError
from tests.crash.contents import data_of
from tests.crash.forker import Forker, Job

ATTEMPTS = 5
FATES = "NDCR"
CORRUPT = "corrupt"

# A save's calls after its load: folders, the payload (open, write, fsync, rename, fsync), then the record.
# The link that makes the record exist comes last, so at none of these there is a commit.
DEATHS = ((3, "after"), (4, "middle"), (6, "after"), (8, "after"), (9, "middle"))


def name_of(fates: str) -> str:
    """What the last of these attempts saves: its bytes in the record itself, or as a payload."""
    return f"{'inline' if fates.count('C') % 3 == 2 else 'bytes'} {len(fates)}"


def expected(fates: str) -> str | None:
    """By the rules alone: the newest that is good. Pruning must never have taken it."""
    if "C" in fates:
        return name_of(fates[: fates.rindex("C") + 1])
    return CORRUPT if "R" in fates else None


def loaded(checkpoint: Checkpoint) -> str | None:
    try:
        data = checkpoint.load_bytes_sync()
    except CorruptCheckpointError:
        return CORRUPT
    if data is None:
        return None
    name = data.partition(b"\n")[0].decode()
    assert data == data_of(name)
    return name


class Attempts:
    """Attempts at one task, in a folder that is copied where their fates part."""

    def __init__(self, forks: Forker, sources: Path, folder: Path, keep: int) -> None:
        self._forks = forks
        self._sources = sources
        self._folder = folder
        self._keep = keep

    def dest(self, fates: str) -> Path:
        return self._folder / ("task-" + fates)

    def branch(self, fates: str) -> None:
        """The next attempt begins where those before it ended."""
        before = self.dest(fates[:-1])
        if before.exists():
            shutil.copytree(before, self.dest(fates), copy_function=shutil.copyfile)

    def live(self, fates: str) -> None:
        """The last of these attempts meets its fate."""
        if fates[-1] == "D":
            self._die(fates)
            return
        checkpoint = Checkpoint(self.dest(fates), keep=self._keep)
        assert loaded(checkpoint) == expected(fates[:-1])
        if fates[-1] == "N":
            return
        before = files(self.dest(fates))
        checkpoint.save_sync(data_of(name_of(fates)))
        assert loaded(checkpoint) == name_of(fates)
        if fates[-1] == "R":
            self._rot(fates, files(self.dest(fates)) - before)

    def _die(self, fates: str) -> None:
        at, when = DEATHS[(sum(map(ord, fates)) + len(fates)) % len(DEATHS)]
        steps = ["load", f"save bytes {len(fates)}"]
        job = Job(str(self.dest(fates)), steps, self._sources, self._folder, self._keep, skip=1)
        outcome = self._forks.run(replace(job, at=at, when=when))
        assert outcome.killed
        want = expected(fates[:-1])
        assert outcome.answers[0].startswith("CorruptCheckpointError" if want == CORRUPT else want or "nothing")

    def _rot(self, fates: str, new: set[Path]) -> None:
        payloads = [path for path in new if path.parent.parent.name == "data"]
        (record,) = (path for path in new if path.suffix == ".jsonl")
        way = (len(fates) + 2 * fates.count("C") + fates.count("D")) % 4
        victim = payloads[0] if payloads and way != 1 else record
        data = victim.read_bytes()
        if way == 2 and victim != record:
            victim.unlink()
        elif way == 3:
            victim.write_bytes(data[: len(data) // 2])
        else:
            middle = len(data) // 2
            victim.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


def files(dest: Path) -> set[Path]:
    return {path for path in dest.rglob("*") if path.is_file()}


def descendants(fates: str) -> Iterator[str]:
    """Depth first: all fates that begin like this, and every step on the way there."""
    yield fates
    if len(fates) < ATTEMPTS:
        for fate in FATES:
            yield from descendants(fates + fate)


@pytest.mark.parametrize("keep", [3, 1])
@pytest.mark.parametrize("first", ["".join(pair) for pair in product(FATES, repeat=2)])
def test_the_newest_good_one_is_found(first, keep, forks, sources, quick_path, monkeypatch):
    monkeypatch.setenv("TASKCKPT_TMP", str(quick_path))
    attempts = Attempts(forks, sources, quick_path, keep)
    count = 0
    for fates in (first[:1], *descendants(first)):
        attempts.branch(fates)
        attempts.live(fates)
        if len(fates) == ATTEMPTS:
            count += 1
            dest = attempts.dest(fates)
            assert loaded(Checkpoint(dest, read_only=True)) == expected(fates), fates
            assert loaded(Checkpoint(dest)) == expected(fates), fates
            shutil.rmtree(dest)
    assert count == len(FATES) ** (ATTEMPTS - 2)
