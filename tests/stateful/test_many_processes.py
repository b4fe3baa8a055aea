"""Real processes of one task, all at once, some of them killed: nobody is told a lie, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from taskckpt import Checkpoint
from taskckpt.testing.servers import S3Server
from tests.stateful.worker import NEVER_BEGAN, STALE

ROOT = Path(__file__).parents[2]
AT_ONCE = 4
NEVER = 2**63


@dataclass
class Story:
    """What a process said, in nanoseconds of the machine's clock."""

    loading: int = NEVER
    loaded: int = NEVER
    found: str | None = None
    saving: dict[str, int] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    stale: bool = False


def turmoil(
    folder: Path, dest: str, options: dict[str, object], *, seconds: float, kill_every_s: float
) -> dict[int, int]:
    """Keeps four processes at it, and kills one now and then; gives how each of them ended.

    On a busy machine it takes longer: until some were outdone and some saved.
    """
    choose, running, ended = random.Random(7), dict[int, subprocess.Popen[bytes]](), dict[int, int]()
    notes, stop = folder / "notes", folder / "stop"
    notes.touch()
    began = time.monotonic()
    next_kill, started = began + kill_every_s, 0
    try:
        while running or not stop.exists():
            passed = time.monotonic() - began
            if passed > 5 * seconds or (passed > seconds and _was_no_quiet_time(stories(folder))):
                stop.touch()
            while len(running) < AT_ONCE and not stop.exists():
                started += 1
                command = [sys.executable, "-m", "tests.stateful.worker", dest, json.dumps(options)]
                process = subprocess.Popen([*command, str(notes), str(stop), str(started)], cwd=ROOT)
                running[process.pid] = process
            time.sleep(choose.uniform(0.01, 0.1))
            if running and time.monotonic() > next_kill and not stop.exists():
                next_kill += choose.uniform(0.5, 1.5) * kill_every_s
                running[choose.choice(sorted(running))].send_signal(signal.SIGKILL)
            for pid in [pid for pid, process in running.items() if process.poll() is not None]:
                ended[pid] = running.pop(pid).returncode
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return ended


def stories(folder: Path) -> dict[int, Story]:
    found: dict[int, Story] = {}
    *lines, _ = (folder / "notes").read_text().split("\n")  # the last one may not be complete
    for line in lines:
        note = json.loads(line)
        story = found.setdefault(note["pid"], Story())
        match note["what"]:
            case "loading":
                story.loading = note["at"]
            case "loaded":
                story.loaded, story.found = note["at"], note["label"]
            case "saving":
                story.saving[note["label"]] = note["at"]
            case "saved":
                story.saved[note["label"]] = note["at"]
            case "stale":
                story.stale = True
    return found


def _was_no_quiet_time(told: dict[int, Story]) -> bool:
    return sum(story.stale for story in told.values()) >= 2 and sum(len(story.saved) for story in told.values()) > 20


def expect_no_lie(told: dict[int, Story], ended: dict[int, int], final: str | None) -> None:
    saving = {label: at for story in told.values() for label, at in story.saving.items()}
    saved = {label: at for story in told.values() for label, at in story.saved.items()}

    def expect_newest(label: str | None, began: int) -> None:
        """Nothing was acknowledged before, that surely is newer than what was loaded."""
        assert label is None or label in saving
        before = [other for other, at in saved.items() if at < began and other != label]
        if label is None:
            assert not before
        assert not [other for other in before if label and saved.get(label, NEVER) < saving[other]]

    for pid, story in told.items():
        if story.loaded < NEVER:
            expect_newest(story.found, story.loading)
        # Who surely claimed before this one is told of no save that it began after this one had the task.
        for older in told.values():
            if older.loaded < story.loading:
                late = [label for label in older.saved if older.saving[label] > story.loaded]
                assert not late, f"{late} were acknowledged although {pid} had the task"
        assert story.stale or ended[pid] != STALE
        assert not story.stale or ended[pid] in (STALE, -signal.SIGKILL)  # killed on its way out
    expect_newest(final, NEVER - 1)
    owner = max(told, key=lambda pid: told[pid].loaded if told[pid].loaded < NEVER else 0)
    if ended[owner] == 0:
        assert final == list(told[owner].saved)[-1]


def endure(folder: Path, dest: str, options: dict[str, object], *, seconds: float, kill_every_s: float) -> None:
    ended = turmoil(folder, dest, options, seconds=seconds, kill_every_s=kill_every_s)
    told = stories(folder)
    # Whoever was not killed and is not the last one was told that it is stale; nobody ended otherwise.
    assert set(ended.values()) <= {0, STALE, NEVER_BEGAN, -signal.SIGKILL}, ended
    assert list(ended.values()).count(0) >= 1 or -signal.SIGKILL in ended.values()
    view = Checkpoint(dest, storage_options=options, read_only=True).load_bytes_sync()
    final = None if view is None else view.decode().strip()
    expect_no_lie(told, ended, final)
    assert _was_no_quiet_time(told)
    # And the task goes on.
    checkpoint = Checkpoint(dest, storage_options=options)
    assert checkpoint.load_bytes_sync() == view
    checkpoint.save_sync(b"after all")
    assert Checkpoint(dest, storage_options=options, read_only=True).load_bytes_sync() == b"after all"


@pytest.mark.timeout(60)
def test_processes_at_once_on_a_disk(tmp_path: Path) -> None:
    dest = tmp_path / "task"
    endure(tmp_path, str(dest), {}, seconds=8, kill_every_s=0.4)
    left = [name for _, _, names in os.walk(dest) for name in names if name.startswith(".partial-")]
    assert not left  # the last attempt swept what the killed ones left


@pytest.mark.timeout(60)
def test_processes_at_once_on_s3(tmp_path: Path, seaweedfs: S3Server, new_bucket: Callable[[S3Server], str]) -> None:
    endure(tmp_path, f"s3://{new_bucket(seaweedfs)}/run/task", seaweedfs.storage_options, seconds=6, kill_every_s=2)
