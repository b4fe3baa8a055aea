"""Tasks and actors on a Ray cluster of this process, then on a second one."""

from __future__ import annotations

import asyncio
import logging

import ray
from cluster_work import count, end_badly, lose_to_another, me, seen_by_child, seen_by_thread, tell, told

import taskckpt


@ray.remote(max_retries=2, retry_exceptions=[ConnectionError])
def counted(what, end):
    return count(what, end)


@ray.remote
def looking_down():
    me()
    return seen_by_child()


@ray.remote
def threaded():
    return [me().task, seen_by_thread()]


@ray.remote(max_retries=2, retry_exceptions=True)
def submits_again():
    """A task in a task: what it submits when it is retried is new to Ray."""
    tell("child", task=ray.get(threaded.remote())[0])
    if len(told("child")) == 1:
        raise ConnectionError


class Counter:
    """Its state is the actor's; each call is a task of its own, too."""

    def __init__(self):
        self.checkpoint = me().checkpoint
        self.number = int(self.checkpoint.load_bytes_sync() or 0)
        context = me()
        tell("actor begins", number=self.number, task=context.task, attempt=context.attempt)

    def add(self, end=""):
        if end and self.number == 2 and len(told("actor begins")) == 1:
            end_badly(end)
        self.number += 1
        self.checkpoint.save_sync(str(self.number).encode())
        return self.number

    def count(self, what):
        return count(what, "kill")


class Async:
    def __init__(self):
        self.both = asyncio.Event()
        self.seen = []

    async def call(self):
        self.seen.append(me().task)
        if len(self.seen) == 2:
            self.both.set()
        await asyncio.wait_for(self.both.wait(), 20)
        inner = await asyncio.gather(asyncio.create_task(self.look()))
        return [me().task, *inner]

    async def look(self):
        return me().task


@ray.remote(max_retries=2, retry_exceptions=[ConnectionError])
def stale_listed(what):
    lose_to_another(what)


@ray.remote(max_retries=2, retry_exceptions=True)
def stale_any(what):
    lose_to_another(what)


def first():
    assert taskckpt.ctx() is None, "the driver is no task"
    # Two of each with the same arguments, at once.
    kinds = [("exception", "exception")] * 2 + [("kill", "kill")] * 2
    names = ray.get([counted.remote(what, end) for what, end in kinds])
    print("names", len(set(names)))
    task, seen = ray.get(threaded.remote())
    print("thread sees", seen, "of", task)
    print("child sees", ray.get(looking_down.remote()))
    ray.get(submits_again.remote())


def actors():
    counter = ray.remote(max_restarts=1, max_task_retries=1)(Counter).remote()
    # One after the other: a call whose answer is lost with the worker is made again.
    print("actor counts", [ray.get(counter.add.remote("kill")) for _ in range(4)])
    pool = [ray.remote(max_restarts=3, max_task_retries=3)(Counter).remote() for _ in range(2)]
    print("calls", len(set(ray.get([actor.count.remote("call") for actor in pool for _ in range(2)]))))
    calls = ray.remote(max_concurrency=2)(Async).remote()
    print("async", ray.get([calls.call.remote() for _ in range(2)]))


def stale():
    for task, what in ((stale_listed, "stale, listed"), (stale_any, "stale, any")):
        try:
            ray.get(task.remote(what))
        except taskckpt.StaleAttemptError as error:
            print(what, "ends with", type(error).__name__, "|", str(error).splitlines()[0])


@taskckpt.task(retries=0)
def driver():
    """A task of taskckpt starts a cluster, whose workers get its environment."""
    taskckpt.checkpoint().save_sync(b"driver 9")
    start()
    print("outer", me().task)
    ray.get(counted.remote("inside", "exception"))
    print("child inside sees", ray.get(looking_down.remote()))
    print("kept", taskckpt.checkpoint().load_bytes_sync())


def start():
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=80 * 2**20, logging_level=logging.ERROR)


start()
first()
actors()
stale()
ray.shutdown()
driver()  # a second cluster: a second run
ray.shutdown()
