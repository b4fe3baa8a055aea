"""Metaflow: the task that this process runs; each has a process of its own.

The run is the flow's name and the run's id. The task is its step, with the index of each foreach around it and the
count of a step that goes to itself: that is the same in every retry, in another place for every item (equal values,
too), and the same in a run that ``resume`` made, where Metaflow counts the task ids anew. The nodes of a
``@parallel`` step are ranks of one task. The base is a folder beside what Metaflow itself stores.

What lies: after ``resume`` the run is another one, and the count of retries begins at 0 again: its tasks start
afresh, unless ``scope="lineage"`` asks for the run that was resumed. That is the one which Metaflow names; where
somebody resumed a resumed run by its id, the run before it is not known. The process of the command line runs no
task. ``METAFLOW_RUN_ID`` and ``MF_PATHSPEC`` are inherited by children, so they are not read. No exception ends a
task without a retry; ``sys.exit(202)`` does. Checked with 2.19.39.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from taskckpt.engines._task import PROCESS, EngineTask, name_of

FOLDER = "taskckpt"


def find() -> EngineTask | None:
    """The task of this process, once Metaflow has begun it."""
    current = getattr(sys.modules.get("metaflow.metaflow_current"), "current", None)
    if current is None or not current.is_running_flow or current.task_id is None:
        return None
    system = getattr(sys.modules.get("metaflow.system_context"), "system_context", None)
    flow = getattr(system, "flow", None)
    base = _base(getattr(system, "flow_datastore", None))
    node, nodes = _gang(current)
    indices = None if flow is None else _indices(vars(flow), current.step_name if node is not None else None)
    origin = current.origin_run_id or None
    # An older Metaflow: the id of the task is good within the run, and no other run has it.
    unclear = origin is not None and indices is None
    where = "metaflow.current"
    return EngineTask(
        "metaflow",
        run=name_of("metaflow", current.flow_name, current.run_id),
        task=name_of(current.step_name, *([f"task {current.task_id}"] if indices is None else indices)),
        attempt=current.retry_count,
        base=base,
        rank=node,
        world_size=nodes,
        origin_run=None if origin is None else name_of("metaflow", current.flow_name, origin),
        ambiguous="This run resumes another one, and this Metaflow does not tell which item a task is."
        if unclear
        else None,
        hint="Name the task: taskckpt.checkpoint('my-task'); or take a newer Metaflow." if unclear else None,
        in_all_threads=True,
        execution=PROCESS,
        sources={
            "run": f"{where}.flow_name, .run_id",
            "task": f"{where}.step_name, "
            + (".task_id" if indices is None else "and the indices of self.foreach_stack()"),
            "attempt": f"{where}.retry_count",
            "rank": f"{where}.parallel.node_index",
            "world_size": f"{where}.parallel.num_nodes",
            "base": "the root of Metaflow's datastore",
            "origin_run": f"{where}.origin_run_id",
        },
    )


def _indices(flow: dict[str, Any], gang: str | None) -> list[str]:
    """Where in its foreaches and loops the task is. The nodes of a gang are one task: theirs is left out."""
    frames = [frame for frame in flow.get("_foreach_stack") or () if frame.step != gang]
    return [str(frame.index) for frame in frames] + [f"round {count}" for count in flow.get("_iteration_stack") or ()]


def _gang(current: Any) -> tuple[int | None, int | None]:
    if not current.get("is_parallel"):
        return None, None
    parallel = current.parallel
    return parallel.node_index, parallel.num_nodes


def _base(datastore: Any) -> str | None:
    """Where Metaflow keeps this flow's artifacts; of Azure's it does not tell the account."""
    kind, root = getattr(datastore, "TYPE", None), getattr(datastore, "datastore_root", None)
    if not root:
        return None
    if kind == "local":
        return os.path.join(root, FOLDER)
    return f"{root.rstrip('/')}/{FOLDER}" if "://" in root else None
