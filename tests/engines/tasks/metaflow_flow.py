"""A flow of Metaflow whose tasks fail, are killed, are retried and resumed; each prints what it found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

from metaflow import FlowSpec, current, parallel, retry, step
from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY

import taskckpt
from taskckpt.errors import StaleAttemptError

HOME = Path(os.environ["HOME"])
LAST = 6


def tell(*words: object) -> None:
    """One line, whoever else prints: tasks share a file."""
    with (HOME / "events").open("a") as events:
        events.write(" ".join(map(str, words)) + "\n")


def here() -> taskckpt.TaskContext:
    context = taskckpt.ctx()
    assert context is not None
    return context


def count(item: str, how: str = "well", scope: Literal["run", "lineage"] = "run") -> int:
    """Counts to 6 and saves each number. In the first attempt it goes as ``how`` says, after 3."""
    context = taskckpt.ctx(scope=scope)
    assert context is not None
    saved = context.checkpoint.load_bytes_sync()
    owner, number = json.loads(saved) if saved else (item, 0)
    assert owner == item, f"{item} got the state of {owner}"
    tell(item, "resumes from", number)
    tell(item, "attempt", context.attempt)
    tell(item, "identity", context.run, context.task)
    while number < LAST:
        if number == 3 and current.retry_count == 0:
            interrupt(how)
        number += 1
        context.checkpoint.save_sync(json.dumps([item, number]).encode())
    return number


def interrupt(how: str) -> None:
    if how == "fails":
        raise ConnectionError("the server hung up")
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)


def become_stale() -> None:
    """Another attempt takes this task over while it runs."""
    checkpoint = taskckpt.checkpoint()
    checkpoint.save_sync(b"0")
    taskckpt.Checkpoint(here().place.uri).load_bytes_sync()
    checkpoint.save_sync(b"1")


def tell_family() -> None:
    """Threads and children are part of the task; what Metaflow leaves in the environment of others is not believed."""
    tell("task", here().task)
    thread = threading.Thread(target=lambda: tell("thread", here().task))
    thread.start()
    thread.join()
    ask = "import metaflow, taskckpt; print([ctx and ctx.task for ctx in [taskckpt.ctx()]][0])"
    leaked = {name: value for name, value in os.environ.items() if not name.startswith("TASKCKPT_")}
    for who, environ in (("child", dict(os.environ)), ("stranger", leaked)):
        tell(who, subprocess.check_output([sys.executable, "-c", ask], text=True, env=environ).strip())


class CountingFlow(FlowSpec):
    @step
    def start(self):
        tell("base", here().base)
        tell_family()
        self.items = ["a", "a"]
        self.next(self.outer, foreach="items")

    @step
    def outer(self):
        self.numbers = [1, 1]
        self.next(self.inner, foreach="numbers")

    @retry(times=1, minutes_between_retries=0)
    @step
    def inner(self):
        count(f"item-{self.foreach_stack()[0][0]}{self.index}", "is killed" if self.index else "fails")
        self.next(self.joins_inner)

    @step
    def joins_inner(self, inputs):
        count(f"joins-{self.index}")
        self.next(self.joins_outer)

    @step
    def joins_outer(self, inputs):
        count("joins")
        self.rounds = 0
        self.next(self.again)

    @step
    def again(self):
        count(f"again-{self.rounds}")
        self.rounds += 1
        self.how = "again" if self.rounds < 2 else "on"
        self.next({"again": self.again, "on": self.gathers}, condition="how")

    @step
    def gathers(self):
        self.next(self.gang, num_parallel=2)

    @retry(times=1, minutes_between_retries=0)
    @parallel
    @step
    def gang(self):
        context = here()
        tell(f"gang-{context.rank}", "of", context.world_size, context.task)
        if context.rank == 0:
            count("gang", "fails")
        else:
            tell("gang-1 sees", (context.checkpoint.load_bytes_sync() or b"nothing").decode())
        self.next(self.leaves_gang)

    @step
    def leaves_gang(self, inputs):
        self.next(self.fails)

    @step
    def fails(self):
        count("lineage", scope="lineage", how="well" if current.origin_run_id else "fails")
        count("own", how="well" if current.origin_run_id else "fails")
        self.next(self.end)

    @retry(times=2, minutes_between_retries=0)
    @step
    def end(self):
        tell("end begins", current.retry_count)
        try:
            become_stale()
        except StaleAttemptError as error:
            print(error, file=sys.stderr)
            sys.exit(METAFLOW_EXIT_DISALLOW_RETRY)


if __name__ == "__main__":
    if sys.argv[1] in ("run", "resume"):  # it only plans, and runs tasks in processes of their own
        tell("command line", taskckpt.ctx())
    CountingFlow()
