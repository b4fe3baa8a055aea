"""Pipelines and real processes: killed in the middle of a stage, and racing for one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from taskckpt import Checkpoint
from taskckpt.stages import CheckpointManager

WAIT_S = 15

PREAMBLE = """\
import json, multiprocessing, os, sys, time
from pathlib import Path
from taskckpt import Checkpoint, StaleAttemptError
from taskckpt.stages import CheckpointManager

def note(text):
    with open("notes", "a") as file:
        file.write(text + "\\n")

def wait_for(path):
    until = time.monotonic() + 15
    while not Path(path).exists():
        assert time.monotonic() < until, path
        time.sleep(0.005)

"""


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program; what a failed test leaves running ends with it."""
    numbers = count()
    with ExitStack() as running:

        def start(program: str, *args: str) -> subprocess.Popen[str]:
            path = Path(f"program-{next(numbers)}.py")  # not one that another process is reading now
            path.write_text(PREAMBLE + textwrap.dedent(program))
            command = [sys.executable, str(path), *args]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            running.enter_context(process)
            running.callback(process.kill)
            return process

        yield start


def end(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, out
    return out


def notes() -> list[str]:
    return Path("notes").read_text().splitlines() if Path("notes").exists() else []


def wait_for_note(text: str) -> None:
    until = time.monotonic() + WAIT_S
    while text not in notes():
        assert time.monotonic() < until, (text, notes())
        time.sleep(0.005)


PIPELINE = """
manager = CheckpointManager()
dies_in = sys.argv[1]

def stage(name, *inputs):
    note(f"{name} begins")
    if name == dies_in:
        time.sleep(60)
    return [name, *inputs]

first = manager.run("first", stage, "first")
second = manager.run("second", stage, "second", first)
third = manager.run("third", stage, "third", second)
print(third)
"""


def test_a_pipeline_killed_in_the_middle_of_a_stage_goes_on_with_that_stage(start: Start):
    for dies_in in ("first", "second", "third"):
        with start(PIPELINE, dies_in) as process:
            wait_for_note(f"{dies_in} begins")
            Path("notes").write_text("")
            process.send_signal(signal.SIGKILL)
        begun = CheckpointManager().status()[-1]
        assert (begun.name, begun.state, begun.pid) == (dies_in, "begun", process.pid)
    process = start(PIPELINE, "none")  # the dead ones block nobody
    assert end(process).strip() == "['third', ['second', ['first']]]"
    assert notes() == ["third begins"]
    manager = CheckpointManager()
    assert [status.versions for status in manager.status()] == [(1,)] * 3


KILLED_WHILE_IT_SAVES = """
import taskckpt.testing

def die(when, verb, keys):
    global number
    if verb in ("create", "write", "delete"):
        number += 1
        if number == int(sys.argv[1]):
            os.kill(os.getpid(), 9)

number = 0
manager = CheckpointManager()
with taskckpt.testing.intercepted(die):
    manager.run("a", lambda: b"x" * 100_000)
note("through")
"""


def test_a_stage_killed_at_any_request_is_done_or_not_and_never_half(start: Start):
    outcomes = []
    for number in range(1, 20):
        Path("notes").write_text("")
        with start(KILLED_WHILE_IT_SAVES, str(number)) as process:
            process.wait(WAIT_S)
        manager = CheckpointManager()
        done = manager.has_checkpoint("a")
        outcomes.append(done)
        assert not done or manager.result("a") == b"x" * 100_000
        if notes() == ["through"]:
            break
        manager.clear_checkpoints()
    assert outcomes[0] is False
    assert outcomes[-1] is True
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 4


RACE = """
wait_s = json.loads(sys.argv[1])
manager = CheckpointManager()

def work():
    note(f"{os.getpid()} runs")
    time.sleep(0.2)
    return os.getpid()

note("ready")
wait_for("go")
try:
    print(manager.run("a", work, wait_s=wait_s))
except StaleAttemptError as error:
    print("told", error)
"""


@pytest.mark.parametrize("wait_s", [10, None])
def test_of_processes_that_race_for_a_stage_exactly_one_result_counts(start: Start, wait_s: float | None):
    racers = [start(RACE, json.dumps(wait_s)) for _ in range(5)]
    until = time.monotonic() + WAIT_S
    while len(notes()) < len(racers):
        assert time.monotonic() < until
        time.sleep(0.01)
    Path("go").touch()
    given = [end(racer).strip() for racer in racers]
    winner = CheckpointManager().result("a")
    assert CheckpointManager().versions("a") == [1]
    assert len(Checkpoint("checkpoints/a.stage", read_only=True).checkpoints_sync()) == 1
    assert winner in {racer.pid for racer in racers}
    told = [line for line in given if line.startswith("told")]
    assert {line for line in given if line not in told} == {str(winner)}
    assert all("A newer attempt took this task over" in line for line in told)
    assert not told or wait_s is None
    assert f"{winner} runs" in notes()


def test_the_later_process_wins_and_the_earlier_one_waits_for_it(start: Start):
    slow = """
    manager = CheckpointManager()

    def work():
        note(f"{sys.argv[1]} begins")
        wait_for(f"{sys.argv[1]} may end")
        return sys.argv[1]

    print(manager.run("a", work, wait_s=10))
    """
    earlier = start(slow, "earlier")
    wait_for_note("earlier begins")
    later = start(slow, "later")
    wait_for_note("later begins")
    Path("earlier may end").touch()
    time.sleep(0.3)
    assert not CheckpointManager().has_checkpoint("a")
    Path("later may end").touch()
    assert end(later).strip() == end(earlier).strip() == "later"


def test_forked_children_of_a_running_stage_use_the_manager(start: Start):
    program = """
    manager = CheckpointManager()

    def child(number):
        manager.save_checkpoint(f"child {number}")
        assert manager.run(f"result {number}", lambda: number) == number

    def parent():
        for method in ("fork", "spawn"):
            children = [multiprocessing.get_context(method).Process(target=child, args=(number,)) for number in (1, 2)]
            for one in children:
                one.start()
            for one in children:
                one.join(15)
                assert one.exitcode == 0
            assert all(manager.has_checkpoint(f"child {number}") for number in (1, 2))
        return "parent"

    if __name__ == "__main__":
        print(manager.run("a", parent))
    """
    assert end(start(program)).strip() == "parent"
    assert {status.name for status in CheckpointManager().status()} == {
        "a",
        *(f"{what} {number}" for what in ("child", "result") for number in (1, 2)),
    }
