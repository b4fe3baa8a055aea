"""The power goes: what ``save`` has acknowledged is on the disk, and a save that was cut short is old or new.

An ext4 file system on a loop device is shut down without flushing its journal, unmounted and mounted again:
what was in the page cache only is gone, as after a power cut.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.crash.contents import NOTHING
from tests.crash.forker import Forker, Job
from tests.crash.recovery import expect_old_or_new, recover

SIZE_BYTES = 24 * 2**20
# Nothing is written back by itself within the time of a test; without barriers nothing would be proved.
OPTIONS = "loop,commit=300,barrier=1"


class Disk:
    """An ext4 file system of our own, whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        self._image = folder / "disk.img"
        self.mount_point = folder / "disk"
        self.mount_point.mkdir()
        with open(self._image, "wb") as file:
            file.truncate(SIZE_BYTES)
        _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(self._image))
        self.mount()

    def mount(self) -> None:
        _run("mount", "-t", "ext4", "-o", OPTIONS, str(self._image), str(self.mount_point))

    def unmount(self) -> None:
        _run("umount", str(self.mount_point))

    def power_up(self) -> None:
        """After a cut."""
        self.unmount()
        self.mount()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    programs = [name for name in ("mkfs.ext4", "mount", "umount", "losetup") if shutil.which(name) is None]
    if sys.platform != "linux" or os.geteuid() != 0 or programs:
        pytest.skip(
            "NOT TESTED that saves survive a power cut: this needs Linux, root and the programs "
            f"mkfs.ext4, mount, umount and losetup (missing: {programs or 'none'})"
        )
    try:
        made = Disk(tmp_path)
    except OSError as error:
        pytest.skip(f"NOT TESTED that saves survive a power cut: no loop device can be mounted here: {error}")
    try:
        yield made
    finally:
        made.unmount()


@pytest.fixture
def job(disk: Disk, sources: Path, tmp_path: Path) -> Job:
    return Job(str(disk.mount_point / "run" / "task"), [], sources, tmp_path, how=f"cut {disk.mount_point}")


def save_and_cut(forks: Forker, disk: Disk, job: Job, *saves: str) -> str:
    """Saves, cuts the power, and gives what is there then."""
    outcome = forks.run(replace(job, steps=[*saves, f"shut_down {disk.mount_point}"]))
    assert outcome.answers == ["done"] * (len(saves) + 1)
    disk.power_up()
    (seen,) = forks.run(replace(job, steps=["look"], without=())).answers
    return seen


@pytest.mark.parametrize("kind", ["inline", "bytes", "file", "folder"])
def test_what_was_saved_stays(kind, forks, disk, job):
    assert save_and_cut(forks, disk, job, f"save {kind} 1") == f"{kind} 1"
    assert save_and_cut(forks, disk, job, "new", f"save {kind} 2") == f"{kind} 2"
    keep_1 = replace(job, keep=1)
    assert save_and_cut(forks, disk, keep_1, *(f"save {kind} {n}" for n in range(3, 7))) == f"{kind} 6"
    assert recover(forks, job)[0] == f"{kind} 6"


def test_what_was_saved_in_the_background_stays(forks, disk, job):
    for number, kind in enumerate(("inline", "bytes", "file", "folder"), start=1):
        assert save_and_cut(forks, disk, job, f"later {kind} {number}") == f"{kind} {number}"


def test_what_was_saved_without_hard_links_stays(forks, disk, job):
    assert save_and_cut(forks, disk, replace(job, without=["link"]), "save bytes 1") == "bytes 1"


def test_a_clear_stays(forks, disk, job):
    assert save_and_cut(forks, disk, job, "save folder 1", "save bytes 2", "clear") == NOTHING


@pytest.mark.parametrize("without", ["fsync", "fsync of files", "fsync of folders"])
def test_without_fsync_it_would_be_lost(without, forks, disk, job):
    # The control: with any of them left out, the very same cut loses what was acknowledged.
    assert save_and_cut(forks, disk, job, "save bytes 1") == "bytes 1"
    assert save_and_cut(forks, disk, replace(job, without=[without]), "save bytes 2") != "bytes 2"


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize(
    "steps",
    [
        ["save inline 2"],
        ["save bytes 2"],
        ["save folder 2"],
        ["later folder 2"],
        ["save bytes 2", "save bytes 3", "clear"],
    ],
    ids=lambda steps: steps[-1],
)
def test_a_save_that_was_cut_is_old_or_new(steps, first, forks, disk, job):
    before = NOTHING if first else "bytes 90"
    if not first:
        recover(forks, job)
    seen = set()
    for at in range(1, 100):
        when = ("after", "before", "middle")[at % 3]
        dest = f"{job.dest}-{at}" if first else job.dest
        cut = replace(job, dest=dest, steps=["look", *steps], skip=1, keep=1, at=at, when=when)
        outcome = forks.run(cut)
        allowed = expect_old_or_new(outcome, cut, before)
        disk.power_up()
        found, _ = recover(forks, cut)
        assert found in allowed, f"cut {when} call {at}: {found}, but {allowed} may be there"
        seen.add(found)
        if not outcome.killed:
            break
    assert not outcome.killed
    assert at > 12
    assert len(seen) >= 2


@pytest.mark.parametrize("kind", ["inline", "bytes", "folder"])
def test_every_new_name_is_on_the_disk_before_the_next_step(kind, forks, sources, tmp_path):
    # Needs no root. And ext4 writes more than it must at each fsync, so that a cut there misses some of these.
    saves = [f"save {kind} 1", f"save {kind} 2"]
    calls = [
        call
        for call in forks.run(Job(str(tmp_path / "a" / "task"), saves, sources, tmp_path)).calls
        if call != "unlink"  # of the other name of a file that has been linked
    ]
    assert calls.count("link") == 3
    assert calls.count("rename") == (0 if kind == "inline" else 2)
    for before, call, after in zip(calls, calls[1:], [*calls[2:], "end"], strict=False):
        if call in ("link", "rename"):
            assert (before, after) == ("fsync", "fsync"), calls
        elif call == "mkdir":
            assert after == "fsync", calls
