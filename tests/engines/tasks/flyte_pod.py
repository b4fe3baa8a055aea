"""A task that runs in a pod of Flyte, for test_flyte.py: its ``a0`` starts it. ``DIE`` says how it ends.

A line that begins with ``>`` says what happened, in JSON. As a program, it shows what Flyte's backend is told of an
error: ``python flyte_pod.py path/error.pb``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import flyte

import taskckpt

env = flyte.TaskEnvironment("pod")

WHOLE = 5


def say(*what: object) -> None:
    print(">", json.dumps(what), flush=True)


def here() -> taskckpt.TaskContext:
    context = taskckpt.ctx()
    assert context is not None
    return context


@env.task(retries=5)
def count() -> int:
    cp = flyte.ctx().checkpoint if os.environ.get("HELPER") == "flyte" else here().checkpoint
    saved = cp.load_sync()
    done = int(saved.read_text()) if saved else 0
    how, _, at = os.environ.get("DIE", "").partition(" ")
    say("from", done)
    while done < WHOLE:
        if how and done == int(at):
            die(how)
        done += 1
        cp.save_sync(str(done).encode())
    return done


def die(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "overtaken":
        taskckpt.Checkpoint(here().place.uri).load_sync()
        return
    raise RuntimeError(how)


@env.task
def who() -> None:
    context = here()
    say("who", context.run, context.task, context.attempt, context.rank, context.world_size, context.base)
    heard: list[str] = []
    thread = threading.Thread(target=lambda: heard.append(here().task))
    thread.start()
    thread.join()
    command = [sys.executable, "-c", "import taskckpt; print(taskckpt.ctx().task)"]
    say("helpers", heard, subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())


if __name__ == "__main__":
    from flyteidl2.core import execution_pb2

    error = execution_pb2.ErrorDocument.FromString(Path(sys.argv[1]).read_bytes()).error
    kind = execution_pb2.ContainerError.Kind.Name(error.kind)
    say("error", kind, error.code, error.message)
