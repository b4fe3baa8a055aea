"""Tasks of Flyte v1 for test_flytekit.py: in its pods, where ``pyflyte-execute`` starts them, and in a local run.

A line that begins with ``>`` says what happened, in JSON. As a program: ``local``; ``inputs PATH NUMBER...`` writes
what a map task gets; ``errors PATH...`` shows what Flyte's backend is told; ``contexts`` what is known in pods whose
arguments and variables come from standard input, in JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import flytekit
from flytekit.core.type_engine import TypeEngine
from flytekit.exceptions.user import FlyteRecoverableException

import taskckpt
from taskckpt import engines
from taskckpt.errors import AmbiguousIdentityError

WHOLE = 5


def say(*what: object) -> None:
    print(">", json.dumps(what), flush=True)


def here() -> taskckpt.TaskContext:
    context = taskckpt.ctx()
    assert context is not None
    return context


@flytekit.task(retries=3)
def count(item: int = 0) -> int:
    cp = here().checkpoint
    saved = cp.load_sync()
    done = int(saved.read_text()) if saved else 0
    say("from", done, item, here().run, here().task, here().attempt, here().base)
    how, _, at = os.environ.get("DIE", "").partition(" ")
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
    raise FlyteRecoverableException(how)


@flytekit.task
def with_helpers() -> None:
    here()  # this process's children are told from here on
    heard: list[str] = []
    thread = threading.Thread(target=lambda: heard.append(here().task))
    thread.start()
    thread.join()
    command = [sys.executable, "-c", "import taskckpt; print(taskckpt.ctx().task)"]
    say("helpers", heard, subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())


@flytekit.task
def local() -> None:
    try:
        taskckpt.ctx()
    except AmbiguousIdentityError as error:
        say("ambiguous", str(error))
    say("key", str(taskckpt.checkpoint("by key").load_sync()))


@flytekit.workflow
def workflow() -> None:
    local()


def contexts() -> None:
    """What Flyte itself makes of the arguments and variables of pods."""
    from flytekit.bin.entrypoint import setup_execution

    for prefix, previous, variables in json.load(sys.stdin):
        os.environ.update(variables)
        with setup_execution("raw", prefix, "raw/_flytecheckpoints", previous):
            found = engines.detect()
        assert found is not None
        say("context", found.run, found.task, found.base, found.ambiguous)
        for name in variables:
            del os.environ[name]


def write_inputs(path: str, *items: str) -> None:
    context = flytekit.FlyteContextManager.current_context()
    values = {"item": [int(one) for one in items]}
    literals = TypeEngine.dict_to_literal_map(context, values, {"item": list[int]})
    Path(path).write_bytes(literals.to_flyte_idl().SerializeToString())


def errors(*paths: str) -> None:
    from flyteidl.core import errors_pb2

    for path in paths:
        error = errors_pb2.ErrorDocument.FromString(Path(path).read_bytes()).error
        say("error", errors_pb2.ContainerError.Kind.Name(error.kind), error.message)


def local_run() -> None:
    say("outside", taskckpt.ctx())
    workflow()


PROGRAMS: dict[str, Callable[..., None]] = {
    "local": local_run,
    "inputs": write_inputs,
    "errors": errors,
    "contexts": contexts,
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
