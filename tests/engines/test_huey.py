"""Huey: tasks that fail in threads and in processes, and one whose process is killed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engines.conftest import EXAMPLES, Engine, numbers
from tests.engines.queues import Work, redis_socket

EngineOf = Callable[[str], Engine]

pytestmark = pytest.mark.timeout(120)

FAILING = """
from huey.exceptions import TaskException
from huey_app import *
print([one.get(blocking=True, timeout=60) for one in (count("a", "fails"), count("b", "fails"))])
print([one.get(blocking=True, timeout=60) for one in (bystander(), bystander(), bystander())])
print(count("a", "well").get(blocking=True, timeout=60))
print(identities().get(blocking=True, timeout=60))
try:
    stale().get(blocking=True, timeout=60)
except TaskException as error:
    print("stale:", error)
"""

KILLED = """
from huey_app import *
result = count("k", "is killed")
wait_for("k saved 3")
time.sleep(1)
huey.enqueue(result.task)
print(result.get(blocking=True, timeout=60))
"""


def start_worker(work: Work, *options: str) -> None:
    work.start("huey_consumer", "huey_app.huey", "-d", "0.02", "-m", "0.1", "-c", "1", *options)


def expect_resumed(work: Work) -> None:
    """And that what failed has told nobody else."""
    assert [line for line in work.events if line.startswith("bystander") and line != "bystander None"] == []
    assert (work.resumed("a"), work.attempts("a")) == ([0, 3, 0], [0, 1, 0])
    assert (work.resumed("b"), work.attempts("b")) == ([0, 3], [0, 1])
    identities = {tuple(line.split()[2:]) for line in work.events if line.startswith(("a identity", "b identity"))}
    assert len(identities) == 3
    assert all(run.startswith("huey/") and task == "count" for run, task in identities)


def test_failed_tasks_in_threads_go_on(engine_of: EngineOf) -> None:
    work = Work(engine_of("queues"))
    start_worker(work, "-k", "thread", "-w", "2")
    output = work.run(FAILING)
    expect_resumed(work)
    assert "thread ambiguous" in work.events
    assert "child ambiguous" in work.events
    # Neither retried, though it has retries, nor silent.
    assert work.events.count("stale began") == 1
    assert "stale: StaleAttemptError" in output
    assert "aborted, will not be retried" in work.log()


def test_a_killed_process_and_the_same_task_enqueued_again(engine_of: EngineOf) -> None:
    engine = engine_of("queues")
    work = Work(engine, REDIS=f"unix://{redis_socket(engine)}")
    start_worker(work, "-k", "process", "-w", "2")
    work.run(FAILING)
    expect_resumed(work)
    told = dict(line.split() for line in work.events if line.startswith(("task ", "thread ", "child ")))
    assert told == dict.fromkeys(("task", "thread", "child"), "identities")
    assert "k 6" in work.run(KILLED)
    assert work.resumed("k") == [0, 3]


def test_immediate_mode(engine_of: EngineOf) -> None:
    work = Work(engine_of("queues"), IMMEDIATE="yes")
    work.run(
        "from huey_app import *\n[count(item, how) for item, how in (('a', 'fails'), ('b', 'fails'), ('a', 'well'))]"
    )
    expect_resumed(work)


def test_the_example(engine_of: EngineOf) -> None:
    engine = engine_of("queues")
    output = engine.run("python", EXAMPLES / "with_huey.py", env={"TMPDIR": str(engine.folder)})
    assert numbers(output, "resumes from") == [0, 3, 7]
    assert "counted to 10" in output
