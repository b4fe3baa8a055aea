"""Dask: the tasks of ``distributed``, whose workers know a task by its key.

A key is the same on each of Dask's retries and when the task moves to another worker. But it says nothing of the
cluster or the day: that of a pure call is a hash of the function and its arguments. So the run is the task's span, an
id that the scheduler draws when a task is submitted and keeps for as long as it knows the task. By default it spans
what is submitted until all is done; ``with distributed.span("name"):`` spans what is submitted in the block.

It follows that a task is what the scheduler knows under one key. The same key twice (two equal pure calls, equal items
of ``map``) is one task; submitted again after it was done and forgotten, or by a client that began again, it is another
one, except within one span. So is each submission with ``pure=False``, which draws a key of its own. ``key=`` of
taskckpt goes on over all of these.

What lies: ``run_id`` counts the runs of all tasks; nobody counts attempts. A finished task runs again if the only
worker that had its result is lost. Methods of Dask's actors have the same key in all actors of a class, and coroutines
that a task starts have none: both are ambiguous.

Checked with distributed 2026.8.0.
"""

from __future__ import annotations

import sys
from typing import Any

from taskckpt.engines._task import EngineTask, name_of


def find() -> EngineTask | None:
    """The task that this thread, or this coroutine on a worker, runs."""
    module = sys.modules.get("distributed.worker")
    state = getattr(module, "thread_state", None)
    key = getattr(state, "key", None)
    if key is not None:
        worker = state.execution_state["worker"]  # type: ignore[union-attr]  # there is one: it has a key
        if getattr(state, "actor", False):
            return _unknown(key, "in all actors of this class, the method has the same key")
        return _task(worker, key, since=getattr(state, "start_time", None))
    variable = getattr(module, "_worker_cvar", None)
    worker = variable.get(None) if variable is not None else None
    return None if worker is None else _coroutine(worker)


def _coroutine(worker: Any) -> EngineTask | None:
    """A task that is a coroutine runs in the worker's event loop, as an asyncio task with the key in its name."""
    running = _asyncio_task()
    if running is not None:
        for key in worker.active_keys.copy():
            if running.get_name() == _execution_name(key):
                return _task(worker, key)
    return _unknown("coroutine", "Dask does not tell which task a coroutine or thread belongs to that a task started")


def _asyncio_task() -> Any:
    try:
        return sys.modules["asyncio"].current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def _task(worker: Any, key: object, since: float | None = None) -> EngineTask:
    state = worker.state.tasks.get(key)
    span = getattr(state, "span_id", None)
    if span is None:
        return _unknown(key, "without spans in the scheduler, nothing tells two clusters apart")
    return EngineTask(
        "dask",
        run=name_of("dask", span),
        # Any other key than a str keeps its type: 1 is not "1".
        task=name_of(key) if isinstance(key, str) else name_of(type(key).__name__, repr(key)),
        # What an actor gets in __init__ lasts as long as the actor.
        execution=(None if key in worker.state.actors else _execution(worker, key)) or (span, key, since),
        sources={
            "run": "distributed.get_worker().state.tasks[key].span_id",
            "task": "distributed.get_worker().get_current_task()",
        },
    )


def _execution_name(key: object) -> str:
    return f"execute({key!r})"


def _execution(worker: Any, key: object) -> object:
    """Each execution is an asyncio task of the worker, also if the function runs in a thread."""
    name = _execution_name(key)
    # A copy, because the worker's own thread changes it. The attribute is not public.
    tasks: set[Any] = getattr(worker, "_async_instructions", set()).copy()
    return next((one for one in tasks if one.get_name() == name), None)


def _unknown(what: object, why: str) -> EngineTask:
    return EngineTask(
        "dask",
        run=name_of("dask", "unknown"),
        task=name_of(what),
        ambiguous=f"{why[0].upper()}{why[1:]}.",
        hint="Get the checkpoint in the task itself (of an actor: in __init__) and hand it on; or name it: "
        "taskckpt.checkpoint('my-task').",
    )
