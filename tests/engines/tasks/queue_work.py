"""The work of the tests of queues: the same function under Celery, Dramatiq, RQ and Huey."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import taskckpt
from taskckpt.errors import AmbiguousIdentityError

LAST = 6


def tell(*words: object) -> None:
    """One line for the test to read, however output is treated by the worker."""
    with Path(os.environ["EVENTS"]).open("a") as events:
        events.write(" ".join(map(str, words)) + "\n")


def first_time(what: str) -> bool:
    try:
        Path(os.environ["EVENTS"] + f".{what}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def current() -> taskckpt.TaskContext:
    context = taskckpt.ctx()
    assert context is not None
    return context


def count(item: str, how: str = "well") -> str:
    """Counts to 6 and saves each number. After 3 it goes, once, as ``how`` says."""
    checkpoint = taskckpt.checkpoint()
    saved = checkpoint.load_bytes_sync()
    owner, number = json.loads(saved) if saved else (item, 0)
    assert owner == item, f"{item} got the state of {owner}"
    tell(item, "resumes from", number)
    tell(item, "attempt", current().attempt)
    tell(item, "identity", current().run, current().task)
    while number < LAST:
        number += 1
        if number == 4 and how != "well" and first_time(f"{item}-{how}"):
            interrupt(item, how)
        checkpoint.save_sync(json.dumps([item, number]).encode())
        tell(item, "saved", number)
    tell(item, "done", number)
    return f"{item} {number}"


def interrupt(item: str, how: str) -> None:
    if how == "fails":
        raise ConnectionError("the server hung up")
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs":
        tell(item, "hangs")
        wait_for(Path(os.environ["EVENTS"] + f".go-{item}"))
        tell(item, "goes on")


def become_stale() -> None:
    """Another attempt takes this task over while it runs."""
    tell("stale began")
    checkpoint = taskckpt.checkpoint()
    checkpoint.save_sync(b"mine")
    newer = taskckpt.Checkpoint(current().place.uri)
    newer.load_sync()
    newer.save_sync(b"newer")
    try:
        checkpoint.save_sync(b"mine again")
    except taskckpt.StaleAttemptError as error:
        tell("stale is", *(one.__name__ for one in type(error).__mro__[:3]))
        raise


def tell_identities() -> None:
    """What threads and child processes of a task are told."""

    def in_thread() -> None:
        try:
            context = taskckpt.ctx()
            tell("thread", context and context.task)
        except AmbiguousIdentityError:
            tell("thread ambiguous")

    tell("task", current().task)
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    subprocess.run([sys.executable, "-c", CHILD], check=True)


def bystander() -> None:
    """Has nothing to do with checkpoints; its child process must not be told of whatever failed here before."""
    subprocess.run([sys.executable, "-c", CHILD.replace("child", "bystander")], check=True)


CHILD = """
import queue_work, taskckpt
from taskckpt.errors import AmbiguousIdentityError
try:
    context = taskckpt.ctx()
    queue_work.tell("child", context and context.task)
except AmbiguousIdentityError:
    queue_work.tell("child ambiguous")
"""
