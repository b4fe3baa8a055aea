"""Activities in Temporal's own environment for tests, which plays the part of a worker: one execution at a time."""

import asyncio
import contextvars
import dataclasses
import gc
import json
import os
import pickle
import signal
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from temporalio import activity
from temporalio.api.failure.v1 import Failure
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

import taskckpt
from taskckpt.errors import AmbiguousIdentityError, StaleAttemptError


def environment(**values):
    made = ActivityEnvironment()
    made.info = dataclasses.replace(made.info, **{"activity_type": "count", **values})
    return made


def counted(to, dies_after=None, how="raise"):
    me: Any = taskckpt.ctx()
    saved = me.checkpoint.load_sync()
    start = int(saved.read_text()) if saved else 0
    print(f"{activity.info().activity_id} attempt {me.attempt} resumes from {start}", flush=True)
    for done in range(start + 1, to + 1):
        me.checkpoint.save_sync(str(done).encode())
        if done == dies_after and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if done == dies_after:
            raise RuntimeError(f"dies after {done}")
    return to


@activity.defn
def count(to, dies_after=None, how="raise"):
    return counted(to, dies_after, how)


@activity.defn(name="count")
async def count_async(to, dies_after=None):
    await asyncio.sleep(0)
    return await asyncio.to_thread(counted, to, dies_after)


def retried():
    for attempt, dies_after in enumerate((3, 5, None), 1):
        try:
            print("counted to", environment(activity_id="1", attempt=attempt).run(count, 7, dies_after))
        except RuntimeError as error:
            print(error)


def retried_async():
    for attempt, dies_after in enumerate((2, None), 1):
        try:
            print(
                "counted to", asyncio.run(environment(activity_id="2", attempt=attempt).run(count_async, 4, dies_after))
            )
        except RuntimeError as error:
            print(error)


def mapped():
    """Two of one type at a time, each in a thread of a worker, both fail once."""

    def one(number):
        for attempt, dies_after in enumerate((number, None), 1):
            try:
                environment(activity_id=f"item-{number}", attempt=attempt).run(count, 6, dies_after)
            except RuntimeError:
                continue

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, (2, 4)))


def once(values):
    environment(**json.loads(values)).run(count, 4, 2, os.environ.get("HOW", "raise"))


def identities():
    def tell():
        me: Any = taskckpt.ctx()
        print("identity", me.run, me.task, me.attempt, flush=True)

    environment(activity_id="5", workflow_id="order/7", workflow_run_id="r1", attempt=3).run(tell)
    environment(activity_id="5", workflow_id="order/7", workflow_run_id="r2").run(tell)
    alone = {"workflow_id": None, "workflow_run_id": None, "workflow_type": None, "activity_id": "mine"}
    environment(**alone, activity_run_id="a1").run(tell)
    environment(**alone, activity_run_id="a2").run(tell)
    print("outside", taskckpt.ctx())


def threads():
    """A worker runs other activities meanwhile: a plain thread could be any's, one that gets the context is not."""
    ended = []

    @activity.defn
    def starts_one():
        ended.append(weakref.ref(activity._current_context.get()))
        me: Any = taskckpt.ctx()
        mine = me.place.uri

        def look(how):
            try:
                here: Any = taskckpt.ctx()
                print(how, "thread sees the same", here.place.uri == mine, flush=True)
            except AmbiguousIdentityError:
                print(how, "thread is told that it is ambiguous", flush=True)

        handed = contextvars.copy_context()
        for how, target in (("plain", lambda: look("plain")), ("handed", lambda: handed.run(look, "handed"))):
            thread = threading.Thread(target=target, name=how)
            thread.start()
            thread.join()
        if len(ended) == 2:
            raise RuntimeError

    for attempt in (1, 2):
        try:
            environment(activity_id="7", attempt=attempt).run(starts_one)
        except RuntimeError:
            print("an error")
    gc.collect()
    print("let go of", [one() is None for one in ended])


def stale():
    @activity.defn
    def is_overtaken():
        me: Any = taskckpt.ctx()
        mine = me.checkpoint
        mine.load_sync()
        mine.save_sync(b"1")
        other = taskckpt.Checkpoint(me.place.uri)
        other.load_sync()
        other.save_sync(b"2")
        mine.save_sync(b"3")

    try:
        environment(activity_id="9").run(is_overtaken)
    except StaleAttemptError as error:
        failure = Failure()
        converter = DataConverter.default
        converter.failure_converter.to_failure(error, converter.payload_converter, failure)
        info = failure.application_failure_info
        print("failure", info.non_retryable, info.type, failure.message)
        again = converter.failure_converter.from_failure(failure, converter.payload_converter)
        print("in the workflow", type(again).__name__, again.non_retryable, again.message == error.message)
        copied = pickle.loads(pickle.dumps(error))
        print(
            "pickled",
            isinstance(copied, ApplicationError),
            isinstance(copied, StaleAttemptError),
            str(copied) == str(error),
        )


globals()[sys.argv[1]](*sys.argv[2:])
