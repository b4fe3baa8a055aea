"""Airflow 3 and 2: the task that the current context is about.

A task instance is known by its DAG, its run, its task and, where it is mapped, its index. ``ti.id`` names one try
of it only, and a run id is unique within its DAG only.

What lies: a clear keeps the identity, and the number of tries goes on. ``max_tries`` grows, which is what
``on_clear="fresh"`` asks for; in Airflow 2 it does not where the task ran at that moment. A deferred task and a
rescheduled sensor come back with the number that they had. A scheduled run's id is made of its date: a run that was
deleted and made again has the same, and so has another installation with the same DAG, which therefore needs a base
of its own. Two copies of a try may run at once, after a lost heartbeat.

Checked with Airflow 3.3.2 and 2.11.2.
"""

from __future__ import annotations

import sys
from typing import Any

from taskckpt.engines._task import PROCESS, EngineTask, ending, name_of
from taskckpt.errors import StaleAttemptError


def find() -> EngineTask | None:
    """The task of the current context, which all threads of the process see."""
    context = _context()
    if context is None:
        return None
    ti = context["ti"]
    mapped = ti.map_index is not None and ti.map_index >= 0
    return EngineTask(
        "airflow",
        run=name_of("airflow", ti.dag_id, ti.run_id),
        task=name_of(ti.task_id, ti.map_index) if mapped else name_of(ti.task_id),
        # 0 is outside of any try: `airflow tasks test`.
        attempt=ti.try_number - 1 if ti.try_number > 0 else None,
        # Without task.retries taken off: that somebody edited them between two tries is no clear.
        generation=str(ti.max_tries),
        in_all_threads=True,
        execution=_execution(ti),
        stale=_stale(),
        sources={
            "run": "ti.dag_id, ti.run_id",
            "task": "ti.task_id, ti.map_index",
            "attempt": "ti.try_number - 1",
            "generation": "ti.max_tries",
        },
    )


def _context() -> Any:
    """The innermost context that is being executed; both versions keep them in a list."""
    for place in ("airflow.sdk.definitions._internal.contextmanager", "airflow.models.taskinstance"):
        contexts = getattr(sys.modules.get(place), "_CURRENT_CONTEXT", None)
        if contexts:
            return contexts[-1]
    return None


def _execution(ti: Any) -> object:
    """A worker forks a process for each try; ``dag.test()`` and ``airflow tasks test`` run all tasks in their own."""
    runner = sys.modules.get("airflow.sdk.execution_time.task_runner")
    if runner is not None:
        supervised = type(getattr(runner, "SUPERVISOR_COMMS", None)).__name__ == "CommsDecoder"
    else:
        supervised = bool(getattr(ti, "raw", None))
    # The task instance and its context refer to each other: they would not go when the task ends.
    return PROCESS if supervised else (ti.dag_id, ti.run_id, ti.task_id, ti.map_index, ti.try_number)


def _stale() -> type[StaleAttemptError]:
    for place in ("airflow.sdk.exceptions", "airflow.exceptions"):
        module = sys.modules.get(place)
        if module is not None and "AirflowFailException" in vars(module):
            return ending(module.AirflowFailException)
    return StaleAttemptError
