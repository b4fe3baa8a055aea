"""SIGKILL before, in the middle of and after every call with which a process writes to a local disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.crash.contents import NOTHING, recognised
from tests.crash.forker import Forker, Job, Outcome
from tests.crash.inspection import local_place
from tests.crash.recovery import expect_old_or_new, moments, noted, recover, states


@dataclass(frozen=True)
class Story:
    """Attempts that ended well or were killed (at a call, counted from its last step), and then the one under test."""

    steps: Sequence[str]
    earlier: Sequence[tuple[Sequence[str], int, str]] = ()
    keep: int | None = 3
    skip: int = 0
    switches: dict[str, Any] = field(default_factory=dict)
    without: Sequence[str] = ()

    @property
    def before(self) -> str:
        state = NOTHING
        for steps, killed_at, _ in self.earlier:
            state = states(state, steps)[-2 if killed_at else -1]
        return state


def ended(*steps: str) -> tuple[Sequence[str], int, str]:
    return steps, 0, "before"


def killed(*steps: str, at: int, when: str) -> tuple[Sequence[str], int, str]:
    return steps, at, when


KINDS = ("inline", "bytes", "file", "folder")
SMALL_BATCHES = {"taskckpt._log.retention.GUARDED_SLOTS": 2, "taskckpt._log.writer.RECORD_BATCH": 2}
# Left behind by three killed attempts: half a payload, a whole payload, half a record.
LITTER = (
    ended("save inline 1"),
    killed("save bytes 2", at=12, when="middle"),
    killed("save folder 3", at=14, when="after"),
    killed("save inline 4", at=8, when="middle"),
)

STORIES = {
    **{f"the very first save: {kind}": Story([f"save {kind} 1"]) for kind in ("inline", "bytes", "file")},
    "the very first save: folder": Story(["save folder 1"]),
    **{
        f"a retry saves: {kind}": Story(["load", f"save {kind} 2"], [ended("save bytes 1")])
        for kind in ("inline", "bytes", "file", "folder")
    },
    **{
        f"a retry saves in the background: {kind}": Story(["load", f"later {kind} 2"], [ended("save bytes 1")])
        for kind in ("inline", "file", "folder")
    },
    "a second save and prune, keep=1": Story(
        ["save bytes 1", "save folder 2", "save inline 3", "save bytes 4"], keep=1
    ),
    "a second save and prune, keep=2": Story(["save bytes 1", "save file 2", "save bytes 3", "save bytes 4"], keep=2),
    "a retry prunes what others saved": Story(
        ["load", "save bytes 4", "save bytes 5"],
        [ended("save bytes 1", "save folder 2"), ended("load", "save file 3")],
        keep=1,
    ),
    "keep=None": Story(["load", "save bytes 2", "save bytes 3"], [ended("save bytes 1")], keep=None),
    "records go in batches": Story(
        ["save inline 1", *(f"save bytes {n}" for n in range(2, 9))], keep=1, skip=5, switches=SMALL_BATCHES
    ),
    "load claims": Story(["load"], [ended("save folder 1")]),
    "load claims where nothing is": Story(["load"]),
    "clear by a retry": Story(["clear", "save bytes 3"], [ended("save bytes 1", "save folder 2")]),
    "clear by the attempt that saved": Story(["save bytes 1", "save folder 2", "clear", "save inline 3"], skip=2),
    "the first save sweeps": Story(["save bytes 5"], LITTER),
    "a load and the first save sweep": Story(["load", "save folder 5"], LITTER),
    "without hard links": Story(["load", "save inline 2", "save bytes 3"], [ended("save bytes 1")], without=["link"]),
}


class Rehearsal:
    """A story told up to the attempt under test, to be copied for each moment at which that is killed."""

    def __init__(self, forks: Forker, sources: Path, folder: Path, story: Story) -> None:
        self._forks = forks
        self._story = story
        self._template = folder / "template"
        self._dest = folder / "dest"
        self.job = Job(
            str(self._dest),
            story.steps,
            sources,
            folder / "tmp",
            keep=story.keep,
            skip=story.skip,
            switches=story.switches,
            without=story.without,
        )
        for steps, at, when in story.earlier:
            job = replace(self.job, steps=steps, at=at, when=when, skip=len(steps) - 1, without=(), switches={})
            assert forks.run(job).killed == bool(at)
        if self._dest.exists():
            self._dest.rename(self._template)

    def restore(self) -> None:
        for folder in (self._dest, self.job.tmp):
            shutil.rmtree(folder, ignore_errors=True)
        self.job.tmp.mkdir()
        if self._template.exists():
            shutil.copytree(self._template, self._dest, copy_function=shutil.copyfile)

    def calls(self) -> list[str]:
        """The calls of the attempt under test when nothing happens to it."""
        self.restore()
        outcome = self._forks.run(self.job)
        assert not outcome.killed
        assert expect_old_or_new(outcome, self.job, self._story.before) == {
            states(self._story.before, self._story.steps)[-1]
        }
        return outcome.calls

    def kill(self, at: int, when: str) -> None:
        self.restore()
        job = replace(self.job, at=at, when=when)
        outcome = self._forks.run(job)
        assert outcome.killed
        allowed = expect_old_or_new(outcome, job, self._story.before)
        seen, _ = recover(self._forks, job)
        assert seen in allowed, f"{seen}, but {allowed} may be there"
        self._expect_swept(job)

    def _expect_swept(self, job: Job) -> None:
        """After the first save of the attempt after: nothing but what the newest commit retains."""
        place = local_place(self._dest)
        assert not place.missing
        if place.torn or any("-000000000001.jsonl~" in key for key in place.garbage):
            # A torn record may name a payload, so as long as it is the newest nothing is deleted. And killed at
            # the very first claim, the attempt after gets that very slot, and looks for nothing below it.
            self._forks.run(replace(job, steps=["save bytes 91"], at=0, then=(), skip=0, without=()))
            place = local_place(self._dest)
        garbage = place.garbage
        if job.keep is None:
            # Payloads of a claim that has commits stay: to tell them apart all commits would have to be read.
            garbage = {key for key in garbage if "/.partial-" in key}
        assert not garbage


# In three parts, so that a busy machine has time enough for each.
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("name", STORIES)
def test_old_or_new(name, part, forks, sources, quick_path):
    rehearsal = Rehearsal(forks, sources, quick_path, STORIES[name])
    calls = rehearsal.calls()
    assert len(calls) >= 10
    for at, when in moments(calls)[part::3]:
        with noted(when, at, calls):
            rehearsal.kill(at, when)


def test_a_kill_while_two_saves_are_pending(forks, sources, quick_path):
    story = Story(["load", "begin bytes 2", "begin folder 3", "wait", "load"], [ended("save bytes 1")], skip=1)
    rehearsal = Rehearsal(forks, sources, quick_path, story)
    rehearsal.restore()
    whole = forks.run(rehearsal.job)
    assert whole.answers == ["bytes 1", "done", "done", "done", "folder 3"]
    seen = set()
    for at, when in moments(whole.calls):
        rehearsal.restore()
        job = replace(rehearsal.job, at=at, when=when)
        outcome = forks.run(job)  # two threads write: which call is the last one differs from run to run
        saved = "folder 3" if "done" in outcome.answers[3:4] else None
        with noted(when, at, whole.calls):
            found, _ = recover(forks, job)
            assert found == saved or (saved is None and found in {"bytes 1", "bytes 2", "folder 3"})
            assert not local_place(Path(job.dest)).missing
            assert not local_place(Path(job.dest)).garbage
            seen.add(found)
    assert seen == {"bytes 1", "bytes 2", "folder 3"}
    assert len(list(rehearsal.job.tmp.iterdir())) <= 1, "copies that a kill left are swept by the next process"


@pytest.mark.parametrize("seed", range(4))
def test_three_attempts_in_a_row_are_killed(seed, forks, sources, quick_path):
    random = Random(seed)
    job = Job(str(quick_path / "dest"), [], sources, quick_path / "tmp", keep=1 + seed % 2, skip=1)
    job.tmp.mkdir()
    for _ in range(15):
        shutil.rmtree(job.dest, ignore_errors=True)
        allowed = {NOTHING}
        kills = [(random.randrange(1, 60), random.choice(["before", "middle", "after"])) for _ in range(3)]
        with noted(seed, kills):
            for at, when in kills:
                saves = [f"save {random.choice(KINDS)} {random.randrange(1, 10)}" for _ in range(3)]
                outcome = forks.run(now := replace(job, steps=["look", "load", *saves], at=at, when=when))
                assert outcome.answers[0] in allowed
                allowed = expect_old_or_new(outcome, now, outcome.answers[0])
            assert recover(forks, job)[0] in allowed
            assert not local_place(Path(job.dest)).missing


def test_the_very_first_save_without_hard_links_is_loud_where_it_is_torn(forks, sources, quick_path):
    # O_EXCL and write are two calls, so there is a moment at which the record is there and says nothing.
    # Was it a checkpoint? Nobody knows, so load must not say that there was none.
    rehearsal = Rehearsal(forks, sources, quick_path, Story(["save inline 1"], without=["link"]))
    calls = rehearsal.calls()
    seen = set()
    for at, when in moments(calls):
        rehearsal.restore()
        job = replace(rehearsal.job, at=at, when=when)
        allowed = expect_old_or_new(forks.run(job), job, NOTHING)
        clean = replace(job, steps=["look", "new", "load", "save bytes 90", "load"], at=0, without=())
        loaded, _, again, _, last = forks.run(clean).answers
        with noted(when, at, calls):
            assert loaded == again
            assert last == "bytes 90"
            torn = loaded.startswith("CorruptCheckpointError: Something was saved")
            assert torn or loaded in allowed, loaded
            seen.add("torn" if torn else loaded)
    assert seen == {NOTHING, "torn", "inline 1"}


def test_a_folder_of_the_users_is_replaced_as_a_whole(forks, sources, quick_path):
    target = quick_path / "mine" / "here"
    rehearsal = Rehearsal(forks, sources, quick_path, Story([f"load to {target}"], [ended("save folder 2")]))

    def load_over_folder_1(at: int, when: str) -> Outcome:
        rehearsal.restore()
        shutil.rmtree(target.parent, ignore_errors=True)
        shutil.copytree(sources / "folder-1", target, symlinks=True)
        return forks.run(replace(rehearsal.job, at=at, when=when))

    calls = load_over_folder_1(0, "before").calls
    seen = set()
    for at, when in moments(calls):
        load_over_folder_1(at, when)
        names = {path.parent: path.read_text().strip() for path in target.parent.glob("*/name")}
        seen.add(here := names.get(target, "moved aside"))
        with noted(when, at, calls):
            if here == "folder 2":
                assert recognised(target, sources) == "folder 2"
            else:  # whole, in its place or beside it, until the new one is there
                assert "folder 1" in names.values()
            assert recover(forks, rehearsal.job)[0] == "folder 2"
    assert seen == {"folder 1", "folder 2", "moved aside"}
