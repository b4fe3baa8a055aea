"""Dagster: the step that the current execution context is about.

A step is known by its key, which holds the mapping key of a dynamic output, and by the run's partition. A run id is a
UUID. A re-execution is a new run, and ``scope="lineage"`` follows it to its root; but one that the daemon starts by
itself (``run_retries``) is a retry, which goes on. From the second of these on, nobody can tell without a question
to the instance whether a person began anew in between: then the task must say ``scope="lineage"``, or give a key.

What lies: the attempt is 0 again in each of these runs.

Checked with Dagster 1.13.28.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary

from taskckpt.engines._task import EngineTask, ending, name_of

# The tags of a run: which partition it is about, or which range of them, and whether the daemon started it.
PARTITION = ("dagster/partition", "dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
RETRY_OF_RUN = "dagster/retry_number"

UNCLEAR = "Dagster retried this run by itself more than once, and perhaps a person began anew in between."
HINT = 'Say scope="lineage" (TASKCKPT_SCOPE=lineage) if all of them go on, or give a key=.'


class _Execution:
    """Lives as long as Dagster's context of a step, or until the next step begins."""


_executions: WeakKeyDictionary[Any, _Execution] = WeakKeyDictionary()


def find() -> EngineTask | None:
    """The step that this thread executes: an op, an asset, several assets, a check."""
    context = _context()
    if context is None:
        return None
    run, step = context.run, context.get_step_execution_context()
    root = run.root_run_id or run.run_id
    retried = RETRY_OF_RUN in run.tags
    base = _base(context)
    unclear = retried and run.parent_run_id != root
    return EngineTask(
        "dagster",
        run=name_of("dagster", root if retried else run.run_id),
        task=name_of(step.step.key, *(run.tags[tag] for tag in PARTITION if tag in run.tags)),
        attempt=context.retry_number,
        base=base,
        origin_run=name_of("dagster", root),
        ambiguous=UNCLEAR if unclear else None,
        hint=HINT if unclear else None,
        lineage_settles=True,
        alone=True,
        execution=_execution(context),
        stale=ending(sys.modules["dagster"].Failure, description=None, metadata=None, allow_retries=False),
        sources={
            "run": "context.run.root_run_id" if retried else "context.run_id",
            "task": "context.get_step_execution_context().step.key, partition of context.run.tags",
            "attempt": "context.retry_number",
            **({"base": "CheckpointResource.base"} if base else {}),
            "origin_run": "context.run.root_run_id",
        },
    )


def _context() -> Any:
    """Dagster's own context variable: threads that a step starts do not see it."""
    compute = sys.modules.get("dagster._core.execution.context.compute")
    variable = getattr(compute, "current_execution_context", None)
    current = variable.get() if variable is not None else None
    return current.op_execution_context if current is not None else None


def _base(context: Any) -> str | None:
    """Where our resource says, if the step asked for it."""
    ours = getattr(sys.modules.get("taskckpt.integrations.dagster"), "CheckpointResource", None)
    if ours is None:
        return None
    given = (resource.base for resource in context.resources if isinstance(resource, ours))
    return next((base for base in given if base), None)


def _execution(context: Any) -> _Execution:
    """Steps of a run that share a process run one after the other: those before have ended.

    Their contexts may still be there: that of one that failed stands in a circle with its exception.
    """
    for other in list(_executions):
        failed = other.get_step_execution_context().step_exception is not None
        if other is not context and (failed or other.run_id == context.run_id):
            _executions.pop(other, None)
    return _executions.setdefault(context, _Execution())
