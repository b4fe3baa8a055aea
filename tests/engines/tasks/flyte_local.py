"""Local runs of Flyte for test_flyte.py: ``python flyte_local.py all``, or ``... dying [name of the run]``.

A line that begins with ``>`` says what happened, in JSON.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import signal
import subprocess
import sys
import threading

import flyte
import flyte.errors

import taskckpt
from taskckpt.errors import AmbiguousIdentityError

env = flyte.TaskEnvironment("scenarios")


def say(*what: object) -> None:
    print(">", json.dumps(what), flush=True)


def here() -> taskckpt.TaskContext:
    context = taskckpt.ctx()
    assert context is not None
    return context


def resumed() -> str | None:
    saved = here().checkpoint.load_sync()
    return saved.read_text() if saved else None


async def fail_once(what: str, mine: str) -> None:
    """``mine`` is known without Flyte and taskckpt; it must be what the retry loads."""
    loaded = resumed()
    say(what, mine, loaded, here().attempt)
    if loaded is None:
        await here().checkpoint.save(mine.encode())
        await asyncio.sleep(0.1)
        raise RuntimeError("fails once")


@env.task(retries=1)
async def side_by_side(item: int) -> None:
    # Flyte retries within the asyncio task of the caller.
    task = asyncio.current_task()
    assert task is not None
    await fail_once("side by side", f"{item} in {task.get_name()}")


begun: list[int] = []


@env.task(retries=1)
def one_by_one(item: int) -> None:
    # A local map is sequential: each item comes twice in a row.
    begun.append(item)
    asyncio.run(fail_once("one by one", f"{item} as number {(len(begun) - 1) // 2}"))


@flyte.trace
async def traced() -> list[str]:
    return [here().task, flyte.ctx().action.name]


@env.task
async def with_trace() -> None:
    task, action = await traced()
    say("trace", task == here().task == flyte.ctx().action.name, action == task)


def ask(into: list[str]) -> None:
    try:
        into.append(here().task)
    except AmbiguousIdentityError as error:
        into.append(type(error).__name__)


@env.task(retries=1)
def with_helpers() -> None:
    heard: list[str] = []
    if resumed() is None:
        here().checkpoint.save_sync(b"once")
        raise RuntimeError("fails once")
    for run in (ask, contextvars.copy_context().run):
        thread = threading.Thread(target=run, args=(heard,) if run is ask else (ask, heard))
        thread.start()
        thread.join()
    command = [sys.executable, "-c", "import taskckpt; print(taskckpt.ctx().task)"]
    child = subprocess.run(
        command, env={**os.environ, **here().environ()}, capture_output=True, text=True, check=False
    ).stdout.strip()
    say("helpers", here().task, heard, child)


@env.task(retries=3)
def overtaken() -> None:
    cp = here().checkpoint
    cp.load_sync()
    say("overtaken")
    taskckpt.Checkpoint(here().place.uri).load_sync()
    cp.save_sync(b"too late")


@env.task
async def everything() -> None:
    await asyncio.gather(*(side_by_side(item) for item in (1, 1, 2)))
    list(await asyncio.to_thread(lambda: list(flyte.map(one_by_one, [1, 1, 2]))))
    await with_trace()
    await with_helpers.aio()
    try:
        await overtaken.aio()
    except flyte.errors.RuntimeUserError as error:
        say("ended", error.code, str(error))


@env.task
def dying() -> None:
    done = int(resumed() or 0)
    say("dying", done, here().base, here().run)
    if done:
        return
    here().checkpoint.save_sync(b"3")
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    flyte.init()
    if sys.argv[1] == "all":
        for _ in range(2):
            flyte.with_runcontext(mode="local").run(everything)
            say("end of run")
            begun.clear()
    else:
        flyte.with_runcontext(mode="local", name=sys.argv[2] if sys.argv[2:] else None).run(dying)
