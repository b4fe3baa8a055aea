"""Temporal: the activity that runs in this thread or coroutine.

An activity is known by its namespace, its workflow, the workflow's run and its own id, which is the same on every
attempt; one without a workflow by its id and its own run. For ``scope="lineage"`` the workflow alone counts: it is
the same after a reset, a retry of the whole workflow, a cron run and continue-as-new. In these the ids of activities
count from 1 again: that scope is for workflows that do the same things in the same order.

What lies: the attempt begins again at 1 when an operator resets the activity. After a heartbeat time-out the old
worker may still run beside the new one: the later claim wins. Heartbeat details are throttled, and the last may be
lost with its worker; what was saved is not.

Checked with temporalio 1.35.0 in its ``ActivityEnvironment``, not with a server.
"""

from __future__ import annotations

import sys
from typing import Any

from taskckpt.engines._task import EngineTask, ending, name_of
from taskckpt.errors import StaleAttemptError


def find() -> EngineTask | None:
    """The activity of the current context."""
    activity: Any = sys.modules.get("temporalio.activity")
    if activity is None or not hasattr(activity, "in_activity") or not activity.in_activity():
        return None
    info = activity.info()
    run, origin, run_from = _run(info)
    return EngineTask(
        "temporal",
        run=run,
        origin_run=origin,
        task=name_of(info.activity_type, info.activity_id),
        attempt=info.attempt - 1,
        # Made for each execution, and only the thread or coroutine that runs it holds on to it.
        execution=activity._current_context.get(None) if hasattr(activity, "_current_context") else None,  # noqa: SLF001
        stale=_stale(),
        sources={
            "run": run_from,
            "origin_run": run_from.rpartition(", ")[0],
            "task": "activity.info().activity_type, activity_id",
            "attempt": "activity.info().attempt - 1",
        },
    )


def _run(info: Any) -> tuple[str, str, str]:
    if info.workflow_id is not None:
        origin = name_of("temporal", info.namespace, info.workflow_id)
        return (
            f"{origin}/{name_of(info.workflow_run_id)}",
            origin,
            "activity.info().namespace, workflow_id, workflow_run_id",
        )
    # Its id is chosen by the caller, and may be used again once it has ended.
    origin = name_of("temporal", info.namespace, "", info.activity_id)
    return (
        f"{origin}/{name_of(info.activity_run_id)}",
        origin,
        "activity.info().namespace, activity_id, activity_run_id",
    )


def _stale() -> type[StaleAttemptError]:
    exceptions: Any = sys.modules.get("temporalio.exceptions")
    if exceptions is None:
        return StaleAttemptError
    # What its class has as properties, over values that its __init__ would have set.
    return ending(
        exceptions.ApplicationError,
        message="",
        failure=None,
        details=(),
        type="StaleAttemptError",
        non_retryable=True,
        next_retry_delay=None,
        category=exceptions.ApplicationErrorCategory.UNSPECIFIED,
    )
