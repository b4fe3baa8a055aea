"""Flows of Prefect whose tasks fail, are retried, and run again; each prints what it found."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.task_runners import ProcessPoolTaskRunner

import taskckpt
from taskckpt.errors import AmbiguousIdentityError, StaleAttemptError

LAST = 6
together = threading.Barrier(2)


def tell(*words: object) -> None:
    """One line, whoever else prints: of this process, or of another one."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def first_time(what: str) -> bool:
    try:
        Path(f"{what}.first").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def current() -> taskckpt.TaskContext:
    context = taskckpt.ctx()
    assert context is not None
    return context


def count(item: str, interrupt: Callable[[], None]) -> int:
    """Counts to 6 and saves each number. After 3 it is interrupted, once."""
    checkpoint = taskckpt.checkpoint()
    saved = checkpoint.load_bytes_sync()
    owner, number = json.loads(saved) if saved else (item, 0)
    assert owner == item, f"{item} got the state of {owner}"
    tell(item, "resumes from", number)
    tell(item, "attempt", current().attempt)
    tell(item, "identity", current().run, current().task.replace(" ", "_"))
    while number < LAST:
        if number == 3 and first_time(item):
            interrupt()
        number += 1
        checkpoint.save_sync(json.dumps([item, number]).encode())
    return number


def go_on() -> None:
    pass


def fail() -> None:
    raise ConnectionError("the server hung up")


def fail_together() -> None:
    together.wait(30)
    fail()


def goes(item: str, call: Callable[[], object]) -> None:
    try:
        call()
        tell(item, "went well")
    except AmbiguousIdentityError as error:
        tell(item, "is ambiguous:", str(error).replace("\n", " "))
    except StaleAttemptError as error:
        tell(item, "is stale:", str(error).replace("\n", " "))


@task(retries=1)
def mapped_task(run: str, item: str) -> int:
    return count(f"{run}-{item}", fail_together)


@flow
def mapped(run: str) -> None:
    mapped_task.map(run, ["a", "b"]).result()


@task
def plain_task(item: str, how: Callable[[], None] | str = "fails") -> int:
    """The second argument is a plain value, or not."""
    return count(item, how if callable(how) else fail if how == "fails" else go_on)


@task
async def async_task(item: str) -> int:
    await asyncio.sleep(0)
    return count(item, go_on if item.startswith("equal") else fail)


@task
def nested_task(item: str) -> int:
    return count(item, fail)


@task(retries=1)
def calls_another(item: str) -> int:
    return nested_task(f"{item}-nested")


@flow
def subflow(item: str, how: str = "fails") -> None:
    plain_task(f"{item}-task", how)
    count(item, go_on)


@flow(retries=1)
def retried_later(item: str) -> None:
    count(item, fail)


@flow(retries=3)
def retried() -> None:
    """Each retry finds what was done, and gets one further."""
    count("flow", go_on)
    future = plain_task.submit("first")
    future.result()
    subflow("sub")
    calls_another("outer")
    asyncio.run(both())


async def both() -> None:
    results = await asyncio.gather(async_task("async-1"), async_task("async-2"), return_exceptions=True)
    for one in results:
        if isinstance(one, BaseException):
            raise one


@task
def says_the_key() -> int:
    return 0 if taskckpt.checkpoint("for equal calls").load_bytes_sync() is None else 1


@flow
def equal_calls() -> None:
    goes("equal-1", lambda: plain_task("equal", "well"))
    goes("equal-2", lambda: plain_task("equal", "well"))
    first, second = plain_task.submit("equal-3", "well"), plain_task.submit("equal-3", "well")
    first.wait(), second.wait()
    for future in (first, second):
        goes("equal-submitted", future.result)
    goes("equal-subflow", lambda: subflow("equal-sub", "well"))
    goes("equal-subflow", lambda: subflow("equal-sub", "well"))
    says_the_key()
    goes("equal-with-key", says_the_key)
    asyncio.run(equal_async())


async def equal_async() -> None:
    results = await asyncio.gather(async_task("equal-async"), async_task("equal-async"), return_exceptions=True)
    tell("equal-async:", *sorted(type(one).__name__ for one in results))


@flow(retries=1)
def not_plain() -> None:
    goes("by-id", lambda: plain_task.with_options(retries=1)("by-id", fail))
    if first_time("not-plain-flow"):
        fail()


@task(retries=1)
def elsewhere(item: str) -> int:
    tell(item, "is in the process of its flow:", os.getpid() == int(os.environ["SCRIPT"]))
    return count(item, fail)


@flow(retries=1, task_runner=ProcessPoolTaskRunner(max_workers=1))
def in_other_process() -> None:
    goes("other", elsewhere.submit("other").result)
    if first_time("other-flow"):
        fail()


def takes_over(item: str) -> None:
    tell(item, "begins")
    checkpoint = taskckpt.checkpoint()
    checkpoint.save_sync(b"0")
    taskckpt.Checkpoint(current().place.uri).load_bytes_sync()
    checkpoint.save_sync(b"1")


def not_stale(task: object, run: object, state: Any) -> bool:
    return not isinstance(state.data, StaleAttemptError)


@task(retries=2, retry_condition_fn=not_stale)
def stale(item: str) -> None:
    takes_over(item)


@task
def family(item: str) -> None:
    """Whom it tells is part of it. What Prefect leaves in the environment of everybody is not believed."""
    here = current()
    tell("task", here.task.replace(" ", "_"))
    with_context = contextvars.copy_context().run
    thread = threading.Thread(target=with_context, args=(lambda: tell("thread", current().task.replace(" ", "_")),))
    thread.start()
    thread.join()
    ask = "import taskckpt; print([ctx and ctx.task.replace(' ', '_') for ctx in [taskckpt.ctx()]][0])"
    leaked = {name: value for name, value in os.environ.items() if not name.startswith("TASKCKPT_")}
    leaked["PREFECT__FLOW_RUN_ID"] = "0" * 32
    ask_prefect = f"import prefect.context; {ask}"
    for who, code, environ in (("child", ask, {**leaked, **here.environ()}), ("stranger", ask_prefect, leaked)):
        tell(who, subprocess.check_output([sys.executable, "-c", code], text=True, env=environ).strip())


@flow
def identities() -> None:
    goes("stale", lambda: stale("stale"))
    family("family")
    thread = threading.Thread(target=lambda: tell("after the task", taskckpt.ctx()))
    thread.start()
    thread.join()


@task(retries=1)
def alone(item: str) -> int:
    return count(item, fail)


@task
def dies(item: str) -> int:
    return count(item, lambda: os.kill(os.getpid(), signal.SIGKILL))


@flow
def killed() -> None:
    tell("flow run", str(current().run).removeprefix("prefect/"))
    dies("killed")


def main() -> None:
    os.environ["SCRIPT"] = str(os.getpid())
    flows = (retried, equal_calls, not_plain, lambda: mapped("one"), lambda: retried_later("own"))
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(one) for one in (*flows, lambda: alone("alone"))]:
            done.result()
    mapped("two")
    identities()
    in_other_process()  # not in the pool above: Prefect ran no task of it there


if __name__ == "__main__":
    killed() if sys.argv[1:] == ["killed"] else main()
