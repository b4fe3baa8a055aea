"""Huey: the task that this thread executes.

Huey tells it to nobody but a function with ``context=True``; so it is read from Huey's own call that executes it. A
task keeps its id over its retries. Each time that a periodic task is due it gets a new one.

What lies: Huey takes a task out of its queue before it runs: one whose worker is killed does not come back, unless
you enqueue the same task (with its id) again. There it goes on. ``retries`` counts down from what the decorator says,
unless the call says something else: then the attempt may be wrong, or unknown.

Checked with Huey 3.5.4: workers of threads and processes, and immediate mode; SQLite and Redis.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from taskckpt.engines._frames import local_of
from taskckpt.engines._task import EngineTask, ending, name_of
from taskckpt.errors import StaleAttemptError


def find() -> EngineTask | None:
    """The task of Huey's innermost call in this thread."""
    task = local_of("huey.api", "_execute", "task")
    if task is None:
        return None
    attempt = task.default_retries - task.retries
    return EngineTask(
        "huey",
        run=name_of("huey", task.id),
        task=name_of(task.name),
        attempt=attempt if attempt >= 0 else None,
        alone=_is_alone(),
        execution=_execution(task),
        stale=_stale(),
        sources={
            "run": "Huey._execute(task): task.id",
            "task": "task.name",
            "attempt": "task.default_retries - task.retries",
        },
    )


class _Execution:
    """What a task has for itself until Huey is done with it. The task stays on in the traceback of a failure."""


def _execution(task: Any) -> object:
    huey = local_of("huey.api", "_execute", "self")
    hooks = huey._post_execute  # noqa: SLF001 - post_execute() would change it while other threads go through it
    if "taskckpt" not in hooks:
        huey._post_execute = {**hooks, "taskckpt": _forget}  # noqa: SLF001
    return vars(task).setdefault(_OURS, _Execution())


def _forget(task: Any, _value: object, _error: object) -> None:
    vars(task).pop(_OURS, None)


_OURS = "_taskckpt_execution"


def _is_alone() -> bool:
    """Whether this is a worker process, or the one worker among the consumer's threads."""
    here = threading.current_thread()
    others = [one for one in threading.enumerate() if one is not here and one.name.startswith("Worker-")]
    return here is threading.main_thread() or not others


def _stale() -> type[StaleAttemptError]:
    exceptions = sys.modules.get("huey.exceptions")
    return ending(exceptions.CancelExecution, retry=False) if exceptions is not None else StaleAttemptError
