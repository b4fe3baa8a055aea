"""Dramatiq on Redis: workers that fail, that are killed, and that were only silent."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.engines.conftest import EXAMPLES, Engine, numbers
from tests.engines.queues import Work, redis_socket

EngineOf = Callable[[str], Engine]

pytestmark = pytest.mark.timeout(120)


def start_worker(work: Work, threads: int = 2, name: str = "worker") -> subprocess.Popen[str]:
    return work.start("dramatiq", "dramatiq_app", "--processes", "1", "--threads", str(threads), log=name)


def test_without_current_message_failed_tasks_go_on(engine_of: EngineOf) -> None:
    engine = engine_of("queues")
    work = Work(engine, REDIS=f"unix://{redis_socket(engine)}")
    start_worker(work)
    work.run("from dramatiq_app import *\ncount.send('a', 'fails'); count.send('b', 'fails'); stale.send()")
    work.wait_for("a done 6", "b done 6", "stale began")
    work.run("from dramatiq_app import *\ncount.send('a', 'well'); identities.send()")
    work.wait_for("a done 6", times=2)
    work.wait_for("child ambiguous")
    assert "thread ambiguous" in work.events  # with several threads nobody knows whose thread it is
    assert (work.resumed("a"), work.attempts("a")) == ([0, 3, 0], [0, 1, 0])
    assert (work.resumed("b"), work.attempts("b")) == ([0, 3], [0, 1])
    identities = {tuple(line.split()[2:]) for line in work.events if line.startswith(("a identity", "b identity"))}
    assert len(identities) == 3
    assert all(run.startswith("dramatiq/") and task == "count" for run, task in identities)

    # Neither retried nor a failure.
    assert work.events.count("stale began") == 1
    assert "was skipped" in work.log()
    assert "took the task over" in work.log()

    # All async actors run in one thread: loud, not from zero.
    work.run("from dramatiq_app import *\ncount_async.send('n', 'well')")
    work.wait_for_log("AmbiguousIdentityError: dramatiq: An async actor")
    assert work.resumed("n") == []


def test_killed_and_silent_workers_lose_nothing(engine_of: EngineOf) -> None:
    engine = engine_of("queues")
    work = Work(engine, REDIS=f"unix://{redis_socket(engine)}", CURRENT="yes")
    first = start_worker(work, threads=1, name="first")
    work.run("from dramatiq_app import *\nidentities.send(); count_async.send('n', 'fails'); count.send('o', 'fails')")
    work.wait_for("n done 6", "o done 6")
    work.run("from dramatiq_app import *\nbystander.send()")
    work.wait_for("bystander None")
    assert work.resumed("n") == [0, 3]
    told = dict(line.split() for line in work.events if line.startswith(("task ", "thread ", "child ")))
    assert told == dict.fromkeys(("task", "thread", "child"), "identities")
    work.run("from dramatiq_app import *\ncount.send('k', 'is killed')")
    first.wait(30)  # the worker ends when one of its processes was killed
    time.sleep(1.2)
    second = start_worker(work, threads=1, name="second")
    work.wait_for("k done 6")
    assert (work.resumed("k"), work.attempts("k")) == ([0, 3], [0, 0])

    work.run("from dramatiq_app import *\ncount.send('s', 'hangs')")
    work.wait_for("s hangs")
    os.killpg(second.pid, signal.SIGSTOP)
    time.sleep(1.2)
    start_worker(work, threads=1, name="third")
    work.wait_for("s done 6")
    os.killpg(second.pid, signal.SIGCONT)
    work.let_go("s")
    work.wait_for("s goes on")
    work.wait_for_log("was skipped", "second")
    assert "took this task over" in work.log("second")
    assert work.events.count("s saved 4") == work.events.count("s done 6") == 1


def test_the_example(engine_of: EngineOf) -> None:
    output = engine_of("queues").run("python", EXAMPLES / "with_dramatiq.py")
    assert numbers(output, "resumes from") == [0, 3, 7]
