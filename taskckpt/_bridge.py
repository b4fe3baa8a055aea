"""The one place where asyncio is: runs the synchronous core in threads of our own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from taskckpt._operation import Stop, Stopped

T = TypeVar("T")

# Of our own, because the loop's default pool can be full of the user's work.
THREADS = 16

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None  # a forked child has none of the parent's threads


os.register_at_fork(after_in_child=_forget_pool)


async def in_thread(function: Callable[[Stop], T]) -> T:
    """Runs ``function`` in a thread. A cancelled caller waits until the write in flight has ended.

    Without that wait a save could commit after the coroutine that was cancelled has returned.
    """
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(THREADS, thread_name_prefix="taskckpt-async")
    stop = Stop()
    future = asyncio.get_running_loop().run_in_executor(_pool, partial(copy_context().run, partial(function, stop)))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.set()
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, Stopped):
            raise asyncio.CancelledError from error
        raise


async def called_back(call_at_the_end: Callable[[Callable[[], None]], None]) -> None:
    """Waits, without blocking the loop, for what calls back from any thread when it has ended."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def wake() -> None:
        if not ended.done():  # who waited may have been cancelled
            ended.set_result(None)

    def call() -> None:
        with contextlib.suppress(RuntimeError):  # the loop may have been closed
            loop.call_soon_threadsafe(wake)

    call_at_the_end(call)
    await ended
