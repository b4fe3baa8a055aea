"""A Celery application; the test says in the environment which broker."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path

import queue_work
from celery import Celery
from queue_work import tell

import taskckpt
from taskckpt.integrations.celery import CheckpointedTask

HERE = Path(os.environ["EVENTS"]).parent
app = Celery("counting", broker=os.environ.get("BROKER", "filesystem://"), backend=f"file://{HERE}/results")
(HERE / "results").mkdir(exist_ok=True)
if "BROKER" in os.environ:
    app.conf.broker_transport_options = {"visibility_timeout": 1}
else:
    folders = {"data_folder_in": str(HERE / "queue"), "data_folder_out": str(HERE / "queue")}
    app.conf.broker_transport_options = {**folders, "control_folder": str(HERE / "control"), "polling_interval": 0.05}
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1
app.conf.task_track_started = True
app.conf.worker_lost_wait = 0.2

RETRIED = {"autoretry_for": (Exception,), "retry_kwargs": {"countdown": 0}, "max_retries": 5}


@app.task(**RETRIED)
def count(item: str, how: str) -> str:
    return queue_work.count(item, how)


@app.task(acks_late=True, reject_on_worker_lost=True)
def redelivered(item: str, how: str) -> str:
    return queue_work.count(item, how)


@app.task(base=CheckpointedTask, bind=True, default_retry_delay=0)
def survives(self: CheckpointedTask, item: str, how: str) -> str:
    assert self.checkpoint is taskckpt.checkpoint()
    return queue_work.count(item, how)


@app.task(base=CheckpointedTask, default_retry_delay=0, max_retries=1)
def loses() -> None:
    tell("loses again")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(acks_late=True, reject_on_worker_lost=True, **RETRIED)
def stale() -> None:
    queue_work.become_stale()


@app.task(bind=True)
def replaces_itself(self, page: int) -> int:
    checkpoint = taskckpt.checkpoint()
    tell("page", page, "found", checkpoint.load_bytes_sync())
    checkpoint.save_sync(b"%d" % page)
    tell("nesting", queue_work.current().task)
    return page if page == 3 else self.replace(self.s(page + 1))


@app.task
def calls(depth: int) -> None:
    """Calls itself as a function, and then another task, eagerly, that does it too."""
    tell("depth", depth, queue_work.current().task)
    if depth < 1:
        calls(depth + 1)
        other.apply()
        tell("back", queue_work.current().task)
        queue_work.tell_identities()
        tell("later", _told_after_a_failure())


@app.task
def other() -> None:
    tell("other", queue_work.current().task)
    calls(2)


@app.task
def functions() -> None:
    """Calls another task as a function: that is part of this one."""
    tell("function of", queue_work.current().task)
    helper()


@app.task
def helper() -> None:
    tell("function is", queue_work.current().task)


@app.task
def bystander() -> None:
    queue_work.bystander()


@app.task
def fails() -> None:
    queue_work.current()
    raise ValueError


def _told_after_a_failure() -> str | None:
    """What children are told once a task within this one has failed; its request is still in the traceback."""
    gc.disable()
    fails.apply()
    told = os.environ.get("TASKCKPT_TASK")
    gc.enable()
    return told


def wait_for(event: str) -> None:
    while event not in Path(os.environ["EVENTS"]).read_text():
        time.sleep(0.05)
