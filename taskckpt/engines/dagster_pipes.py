"""Dagster Pipes: the process that a step of Dagster started, and that opened its end.

It is told its run and its assets, but not the step: without assets, nobody here can tell two steps apart. Best is
what needs none of this: the step starts it with ``env=taskckpt.ctx().environ()``, and it is part of that step.

What lies: a run that Dagster retries by itself is another run here. Two processes for the same assets, one after
the other in the same step, are one task.

Checked with dagster-pipes 1.13.28.
"""

from __future__ import annotations

import sys
from typing import Any

from taskckpt.engines._task import EngineTask, name_of

HINT = "Start the process with env=taskckpt.ctx().environ() in the step, or give a key= (or TASKCKPT_TASK) to each."


def find() -> EngineTask | None:
    """The step that this process works for, between ``open_dagster_pipes()`` and its end."""
    context = _context()
    if context is None:
        return None
    data = context._data  # noqa: SLF001 - its properties raise where there are no assets, or no one partition
    assets, span = data["asset_keys"], data["partition_key_range"]
    partition = (data["partition_key"],) if data["partition_key"] else (span["start"], span["end"]) if span else ()
    return EngineTask(
        "dagster-pipes",
        run=name_of("dagster-pipes", data["run_id"]),
        task=name_of("+".join(sorted(assets or ["step"])), *partition),
        attempt=data["retry_number"],
        ambiguous=None if assets else "Dagster Pipes does not tell the steps of a run apart, except by their assets.",
        hint=None if assets else HINT,
        # So that what the step hands down by itself goes before.
        in_environment=True,
        in_all_threads=True,
        sources={
            "run": "PipesContext.run_id",
            "task": "PipesContext.asset_keys, .partition_key",
            "attempt": "PipesContext.retry_number",
        },
    )


def _context() -> Any:
    pipes = getattr(sys.modules.get("dagster_pipes"), "PipesContext", None)
    if pipes is None or not pipes.is_initialized():
        return None
    context = pipes.get()
    return None if context.is_closed else context
