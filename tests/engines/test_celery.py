"""Celery: workers that fail, that are killed, and that work on the same message."""

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

ON_DISK = """
from celery import group
from celery_app import *
waiting = {"timeout": 60, "interval": 0.05}
print(group(count.s("a", "fails"), count.s("b", "fails"))().get(**waiting))
group(bystander.s(), bystander.s())().get(**waiting)
print(count.delay("a", "well").get(**waiting))
killed = redelivered.delay("r", "is killed"), survives.delay("s", "is killed")
print([one.get(**waiting) for one in killed])
replaces_itself.delay(1).get(**waiting)
calls.delay(0).get(**waiting)
print(loses.delay().get(propagate=False, **waiting))
state = stale.delay()
wait_for("stale is")
count.delay("z", "well").get(**waiting)
print("stale is", state.state)
"""

TWO_COPIES = """
from celery_app import *
calls.delay(0)
print("result:", redelivered.delay("c", "hangs").get(timeout=60, interval=0.05))
"""

KILLED = """
from celery_app import *
print(redelivered.delay("k", "hangs").get(timeout=60, interval=0.05))
"""

EAGER = """
from celery_app import *
app.conf.task_always_eager = True
count.delay("e", "fails").get()
functions.delay().get()
"""


def start_worker(work: Work, *options: str, name: str = "worker") -> subprocess.Popen[str]:
    quick = ("--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "INFO", "-c", "2")
    return work.start("celery", "-A", "celery_app", "worker", "-n", name, *quick, *options, log=name)


def test_failed_killed_and_replaced_tasks_go_on(engine_of: EngineOf) -> None:
    work = Work(engine_of("celery"))
    start_worker(work)
    output = work.run(ON_DISK)
    assert "['a 6', 'b 6']" in output

    # Two of a group never mix; a third message starts afresh.
    assert (work.resumed("a"), work.attempts("a")) == ([0, 3, 0], [0, 1, 0])
    assert (work.resumed("b"), work.attempts("b")) == ([0, 3], [0, 1])
    identities = {tuple(line.split()[2:]) for line in work.events if line.startswith(("a identity", "b identity"))}
    assert len({run for run, _ in identities}) == len(identities) == 3
    assert all(run.startswith("celery/") for run, _ in identities)

    assert work.events.count("bystander None") == 2

    # Delivered again, the number is the same; the base task is retried, and counts.
    assert (work.resumed("r"), work.attempts("r")) == ([0, 3], [0, 0])
    assert (work.resumed("s"), work.attempts("s")) == ([0, 3], [0, 1])
    # The base task gives up, where Celery would deliver for ever.
    assert work.events.count("loses again") == 2
    assert "Worker exited prematurely" in output

    # What a task replaces itself with has its id, and nothing of its state.
    assert [line for line in work.events if line.startswith("page")] == [f"page {n} found None" for n in (1, 2, 3)]
    expect_identities(work.events, "celery_app.calls/")

    # Neither retried nor failed: the state is what the newer attempt makes of it.
    assert work.events.count("stale began") == 1
    assert "stale is STARTED" in output
    assert "took the task over" in work.log()


def expect_identities(events: list[str], task: str) -> None:
    told = {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in events}
    outer = told["depth 0"]
    assert outer.startswith(task)
    assert [told[what] for what in ("depth 1", "back", "task", "thread", "child", "later")] == [outer] * 6
    assert told["other"] == told["depth 2"] != outer


def test_a_message_delivered_twice_and_a_killed_worker_lose_nothing(engine_of: EngineOf) -> None:
    engine = engine_of("celery")
    work = Work(engine, BROKER=f"redis+socket://{redis_socket(engine)}")
    older = start_worker(work, "-P", "threads", "-c", "1", name="older")
    sender = work.start("python", "-c", TWO_COPIES, log="sender")
    work.wait_for("c hangs", "child ambiguous")  # the pool of threads cannot tell which of its tasks a child is from
    assert "thread ambiguous" in work.events
    time.sleep(1.2)  # the visibility timeout is a second
    newer = start_worker(work, name="newer")
    work.wait_for("c done 6")
    work.let_go("c")
    work.wait_for("c goes on")
    sender.wait(60)
    assert "result: c 6" in work.log("sender")
    assert work.resumed("c") == [0, 3]
    assert work.events.count("c saved 4") == work.events.count("c done 6") == 1
    work.wait_for_log("took this task over", "older")

    work.start("python", "-c", KILLED, log="sender")
    work.wait_for("k hangs")
    for worker in (older, newer):
        os.killpg(worker.pid, signal.SIGKILL)
    time.sleep(1.2)
    start_worker(work, name="third")
    work.wait_for("k done 6")
    assert (work.resumed("k"), work.attempts("k")) == ([0, 3], [0, 0])


def test_eager_mode_and_calls_as_functions(engine_of: EngineOf) -> None:
    work = Work(engine_of("celery"))
    work.run(EAGER)
    assert (work.resumed("e"), work.attempts("e")) == ([0, 3], [0, 1])
    first, second = (line.split()[-1] for line in work.events if line.startswith("function"))
    assert first == second
    assert first.startswith("celery_app.functions/")


def test_the_example(engine_of: EngineOf) -> None:
    engine = engine_of("celery")
    output = engine.run("python", EXAMPLES / "with_celery.py", env={"TMPDIR": str(engine.folder)})
    assert numbers(output, "resumes from") == [0, 3, 7]
    assert "counted to 10" in output
