"""What tasks of a cluster do in the tests: they count, save each step, and end badly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from typing import Any

import taskckpt


def me() -> taskckpt.TaskContext:
    context = taskckpt.ctx()
    assert context is not None
    return context


def tell(what: str, **values: Any) -> None:
    """A line for the test, that no kill undoes."""
    with open(os.environ["JOURNAL"], "a") as journal:
        journal.write(json.dumps({"what": what, **values}) + "\n")


def told(what: str) -> list[dict[str, Any]]:
    if not os.path.exists(os.environ["JOURNAL"]):
        return []
    with open(os.environ["JOURNAL"]) as journal:
        return [line for line in map(json.loads, journal) if line["what"] == what]


def end_badly(how: str) -> None:
    if how == "exception":
        raise ConnectionError("the server hung up")
    os.kill(os.getpid(), signal.SIGKILL)


def count(what: str, end: str, checkpoint: taskckpt.Checkpoint | None = None, to: int = 4) -> str:
    """Counts, and ends badly at 2, once. Gives what this task called itself at first."""
    context = taskckpt.ctx()
    checkpoint = checkpoint or taskckpt.checkpoint()
    name, number = (checkpoint.load_bytes_sync() or f"{uuid.uuid4()} 0".encode()).decode().split()
    began = int(number)
    about = {"run": context.run, "task": context.task, "attempt": context.attempt} if context is not None else {}
    tell(what, name=name, began=began, **about)
    for step in range(began + 1, to + 1):
        time.sleep(0.02)  # the work
        checkpoint.save_sync(f"{name} {step}".encode())
        if step == 2 and began == 0:
            end_badly(end)
    return name


def lose_to_another(what: str) -> None:
    """Another one of the same task takes over, as after a network split; the save of this one then fails."""
    checkpoint = taskckpt.checkpoint()
    began = int(checkpoint.load_bytes_sync() or 0)
    tell(what, began=began)
    checkpoint.save_sync(str(began + 1).encode())
    other = taskckpt.Checkpoint(checkpoint.remote_destination)
    other.load_sync()
    other.save_sync(str(began + 2).encode())
    checkpoint.save_sync(b"lost")


def seen_by_thread() -> str:
    """What a plain thread of this task is told about who it is."""
    me()
    seen: list[str] = []

    def look() -> None:
        try:
            context = taskckpt.ctx()
            seen.append("nothing" if context is None else context.task)
        except taskckpt.errors.TaskckptError as error:
            seen.append(type(error).__name__)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return seen[0]


def seen_by_child() -> str:
    """What a child process of this task is told about who it is."""
    code = "import taskckpt; context = taskckpt.ctx(); print('nothing' if context is None else context.task)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return child.stdout.strip() or child.stderr.strip().splitlines()[-1]
