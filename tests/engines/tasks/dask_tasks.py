"""Tasks on two Dask clusters with processes as workers, then on one within this process."""

from __future__ import annotations

import asyncio
import time

import dask
from cluster_work import count, end_badly, lose_to_another, me, seen_by_child, seen_by_thread, tell
from distributed import Client, LocalCluster, get_client, secede, span

import taskckpt

dask.config.set({"distributed.scheduler.allowed-failures": 10})


def mapped(item, what, end):
    return count(what, end)


async def coroutine(what):
    """It runs in the worker's event loop."""
    first = count(what, "exception")

    async def part():
        try:
            return me().task
        except taskckpt.errors.AmbiguousIdentityError as error:
            return f"loud: {error.hint}"

    return first, await asyncio.create_task(part())


class Counter:
    """An actor: Dask never starts it again, and its methods have one name in all of them."""

    def __init__(self):
        self.checkpoint = taskckpt.checkpoint()

    def add(self):
        try:
            taskckpt.checkpoint()
        except taskckpt.errors.AmbiguousIdentityError:
            self.checkpoint.save_sync(b"of the actor")
            return "loud"


def looking_down():
    me()
    return seen_by_child()


def interrupted(what):
    """Ends badly in each attempt, after a step."""
    checkpoint = taskckpt.checkpoint()
    began = int(checkpoint.load_bytes_sync() or 0)
    tell(what, began=began, task=me().task, run=me().run)
    checkpoint.save_sync(str(began + 1).encode())
    if began < 2:
        end_badly("exception")
    return began


def submitted_until_done(client, what):
    """The retry loop of a client, which forgets the task before it submits it again."""
    for _ in range(3):
        future = client.submit(interrupted, what, key=what)
        if future.exception() is None:
            break
        del future
        time.sleep(0.5)


def first(client):
    # A key of another type that looks the same in print, and one that is used in the second cluster, too.
    keys = [(1, "typed", "exception"), ("1", "typed", "exception"), ("key", "killed", "kill")]
    futures = [client.submit(mapped, 0, what, end, key=key, retries=2) for key, what, end in keys]
    print("names", len(set(client.gather(futures))))
    # Eight items on two workers at once; each fails once, and half of them kill their worker.
    items = client.map(mapped, range(8), ["mapped"] * 8, ["exception", "kill"] * 4, retries=2, pure=False)
    print("mapped", len(set(client.gather(items))))
    print("equal items", len({future.key for future in client.map(mapped, [1, 1], ["equal"] * 2, [""] * 2)}))
    print("impure", len({client.submit(mapped, 1, "impure", "", pure=False).key for _ in range(2)}))


def other(client):
    print("coroutine", client.submit(coroutine, "coroutine", retries=1).result()[1])
    print("thread sees", client.submit(seen_by_thread).result())
    print("child sees", client.submit(looking_down).result())
    print("actor is", client.submit(Counter, actor=True).result().add().result())
    for retries in (0, 2):
        try:
            client.submit(lose_to_another, f"stale, {retries} retries", retries=retries).result()
        except taskckpt.StaleAttemptError as error:
            print(f"stale, {retries} retries:", type(error).__name__)
    submitted_until_done(client, "submitted again")
    with span("training"):
        submitted_until_done(client, "submitted again in a span")
    future = client.submit(interrupted, "retried by the client")
    while future.exception() is not None:
        future.retry()


@taskckpt.task(key="caller")
def caller(item):
    """Waits for a task that begins as soon as this one makes room for it: in a copy of this one's context."""
    future = get_client().submit(count, "called", "exception", key=f"called-{item}", retries=1)
    time.sleep(0.3)
    secede()
    future.result()


@taskckpt.task(retries=0)
def outer():
    taskckpt.checkpoint().save_sync(b"outer 9")
    with Cluster(n_workers=1, processes=False) as client:
        client.submit(mapped, 0, "in a process", "exception", retries=1).result()
        client.submit(caller, 0).result()
    print("kept", taskckpt.checkpoint().load_bytes_sync())


class Cluster:
    def __init__(self, **options):
        self.options = options

    def __enter__(self):
        self.cluster = LocalCluster(threads_per_worker=1, dashboard_address=None, **self.options)
        self.client = Client(self.cluster)
        return self.client

    def __exit__(self, *_):
        self.client.close()
        self.cluster.close()


if __name__ == "__main__":
    assert taskckpt.ctx() is None
    with Cluster(n_workers=2) as client:
        first(client)
        other(client)
    with Cluster(n_workers=2) as client:
        # The same key in another cluster, perhaps at the same address.
        client.submit(mapped, 0, "second cluster", "kill", retries=2, key="key").result()
    outer()
