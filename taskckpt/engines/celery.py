"""Celery: the task of the message that this thread works on.

A message keeps its id when the task retries and when the broker delivers it again. The run is the message that the
first of a chain, group or chord was sent with. The task's name and the depth of ``replace()`` are part of the
identity, too: what a task replaces itself with has its id. A task that is called as a function is part of the one
that calls it.

What lies: ``retries`` is the same again when a killed worker's message is delivered once more, and so is, with some
brokers, ``redelivered``. After the visibility timeout of Redis or SQS a task that still runs is delivered to a second
worker: two live copies, of which the newer one has the task. The older one ends by ``Ignore``, which neither retries
nor stores a result; like any end it acknowledges the message for both. An id that you chose yourself
(``apply_async(task_id=)``) is the same task each time that you send it.

Checked with Celery 5.7.0: prefork, threads and solo pools, eager mode; filesystem broker and Redis.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

from taskckpt.engines._task import EngineTask, ending, name_of
from taskckpt.errors import StaleAttemptError


def find() -> EngineTask | None:
    """The innermost task of this thread that has a message of its own."""
    task, request = _innermost()
    if request is None:
        return None
    nesting = request.replaced_task_nesting
    return EngineTask(
        "celery",
        run=name_of("celery", request.root_id or request.id),
        task=name_of(task.name, request.id, *([f"replaced-{nesting}"] if nesting else [])),
        attempt=request.retries,
        # Pools of processes and the solo pool run one task at a time, and that in their main thread.
        alone=not request.is_eager and threading.current_thread() is threading.main_thread(),
        execution=_execution(request),
        stale=_stale(),
        sources={
            "run": "current_task.request.root_id",
            "task": "current_task.name, current_task.request.id" + (", .replaced_task_nesting" if nesting else ""),
            "attempt": "current_task.request.retries",
        },
    )


def _innermost() -> tuple[Any, Any]:
    """A task and its request. Each task has requests of its own, and may be on the stack several times.

    One that is called as a function has a request without an id, or a copy of the one that it works on.
    """
    state = sys.modules.get("celery._state")
    tasks: list[Any] = getattr(getattr(state, "_task_stack", None), "stack", None) or []
    seen: Counter[int] = Counter()
    for task in reversed(tasks):
        seen[id(task)] += 1
        requests = task.request_stack.stack
        own = len(requests) - seen[id(task)]
        if own < 0 or requests[own].called_directly or requests[own].id is None:
            continue
        if not any(earlier.delivery_info is requests[own].delivery_info for earlier in requests[:own]):
            return task, requests[own]
    return None, None


class _Execution:
    """What a request has for itself until its task ends. The request stays on in the traceback of a failure."""


_executions: WeakKeyDictionary[Any, _Execution] = WeakKeyDictionary()


def _execution(request: Any) -> object:
    found = _executions.get(request)
    if found is None:
        signals = sys.modules["celery.signals"]
        signals.task_postrun.connect(_forget, weak=False, dispatch_uid="taskckpt")
        found = _executions[request] = _Execution()
    return found


def _forget(task: Any, **_: Any) -> None:
    _executions.pop(task.request, None)


def _stale() -> type[StaleAttemptError]:
    exceptions = sys.modules.get("celery.exceptions")
    return ending(exceptions.Ignore) if exceptions is not None else StaleAttemptError
