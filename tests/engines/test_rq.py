"""RQ on Redis: jobs that fail, whose process or worker is killed, and that run twice."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from tests.engines.conftest import EXAMPLES, Engine, numbers
from tests.engines.queues import Work, redis_socket

EngineOf = Callable[[str], Engine]

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def work(engine_of: EngineOf) -> Work:
    engine = engine_of("queues")
    return Work(engine, REDIS=f"unix://{redis_socket(engine)}")


def start_worker(work: Work, *options: str, name: str = "worker") -> subprocess.Popen[str]:
    return work.start("rq", "worker", "-u", work.environ["REDIS"], "-n", name, *options, log=name)


def send(work: Work, code: str) -> None:
    work.run(f"from rq_app import *\n{code}")


@pytest.mark.parametrize("kind", ["rq.Worker", "rq.SimpleWorker"])
def test_failed_jobs_go_on(work: Work, kind: str) -> None:
    for name in ("one", "other"):
        start_worker(work, "-w", kind, name=name)
    send(work, "send('count', 'a', 'fails', job_id='mine'); send('count', 'b', 'fails')")
    work.wait_for("a done 6", "b done 6")
    send(work, "[send('bystander') for _ in range(4)]")
    work.wait_for("bystander None", times=4)
    # The same id once more is another job; and so is each repetition.
    send(work, "send('count', 'a', job_id='mine'); send_repeated('c'); send('tell_identities')")
    work.wait_for("a done 6", "c done 6", times=2)
    assert (work.resumed("a"), work.resumed("b"), work.resumed("c")) == ([0, 3, 0], [0, 3], [0, 0])
    assert "a attempt None" in work.events
    identities = {tuple(line.split()[2:]) for line in work.events if " identity " in line}
    assert len(identities) == 5
    assert all(run.startswith("rq/") and task == "queue_work.count" for run, task in identities)
    # A SimpleWorker runs all in one process, and does not tell when a job has ended.
    told = "queue_work.tell_identities" if kind == "rq.Worker" else "None"
    work.wait_for("task queue_work.tell_identities", f"thread {told}", f"child {told}")


def test_killed_and_abandoned_jobs_lose_nothing(work: Work) -> None:
    first = start_worker(work, name="first")
    send(work, "send('count', 'k', 'is killed')")
    work.wait_for("k done 6")
    assert work.resumed("k") == [0, 3]

    send(work, "send('count', 'w', 'hangs')")
    work.wait_for("w hangs")
    for process in (first.pid, *children(first.pid)):
        os.kill(process, signal.SIGKILL)
    send(work, "find_abandoned()")
    second = start_worker(work, name="second")
    work.wait_for("w done 6")
    assert work.resumed("w") == [0, 3]

    send(work, "send('count', 's', 'hangs')")
    work.wait_for("s hangs")
    os.kill(second.pid, signal.SIGSTOP)  # its job runs on
    send(work, "find_abandoned()")
    start_worker(work, name="third")
    work.wait_for("s done 6")
    work.let_go("s")
    os.kill(second.pid, signal.SIGCONT)
    work.wait_for_log("took this task over", "second")
    # RQ cannot be told not to retry it.
    work.wait_for("s done 6", times=2)
    assert work.resumed("s") == [0, 3, 6]
    assert work.events.count("s saved 4") == 1


def children(process: int) -> list[int]:
    output = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in output.split()]


def test_the_example(work: Work) -> None:
    output = work.engine.run("python", EXAMPLES / "with_rq.py", env=work.environ)
    assert numbers(output, "resumes from") == [0, 3, 7]
    assert "counted to 10" in output
