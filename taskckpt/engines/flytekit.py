"""Flyte v1 (flytekit): the node whose pod this is.

The context has no node id, and its ``task_id`` is that of the task's definition, which all nodes of that task share.
What tells nodes apart is where Flyte puts the outputs: ``.../<execution>/<node>/data/<attempt>``, and of an item of a
map task ``.../<node>/data/<attempt of the node>/<index>/<attempt>``. Task is what of it stays the same on a retry;
an item's index, which older map tasks have in the environment only, is added. Base is the execution's folder there.

What lies: a local run calls everything "local" (and never retries), so it must be told who it is; and so must the
workers of an elastic task, which Flyte does not tell. A recovered execution is a new one, and Flyte does not say
which one it recovers; nor is a child the same when the dynamic task around it runs again: there it is loud.

Checked with flytekit 1.16.31: local runs, and its pods' own entry points ``pyflyte-execute`` and
``pyflyte-map-execute``. The layout of paths is that of flytepropeller 1.16.8.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any, NamedTuple

from taskckpt.engines._task import PROCESS, EngineTask, name_of

HINT = "Name the task: taskckpt.checkpoint('name'), or TASKCKPT_TASK=name."

# What a dynamic task makes when it runs for a second time: Flyte puts the number of its attempt into the names.
_OF_LATER_ATTEMPT = re.compile(r"-[1-9][0-9]*-dn[0-9]+")


def find() -> EngineTask | None:
    """The node of this process; threads that the task starts have no context of Flyte."""
    variable = getattr(sys.modules.get("flytekit.core.context_manager"), "flyte_context_Var", None)
    # To ask for the current context would make one where there is none.
    contexts = variable.get() if variable is not None else None
    state = contexts[-1].execution_state if contexts else None
    if state is None or state.mode is None or state.user_space_params is None:
        return None
    told = state.user_space_params
    prefix = told.output_metadata_prefix
    if not prefix:
        return _unknown(told)
    execution = told.execution_id
    node = _node_of(str(prefix), execution.name)
    attempt = os.environ.get("FLYTE_ATTEMPT_NUMBER", "")
    reason = _reason(told, node, attempt)
    return EngineTask(
        "flytekit",
        run=name_of("flytekit", execution.project, execution.domain, execution.name),
        task=name_of(*node.names),
        attempt=int(attempt) if attempt.isdecimal() else None,
        base=node.folder,
        base_is_of_run=True,
        ambiguous=reason,
        hint=None if reason is None else HINT,
        execution=PROCESS,
        sources={
            "run": "flytekit.current_context().execution_id",
            "task": "flytekit.current_context().output_metadata_prefix",
            "attempt": "FLYTE_ATTEMPT_NUMBER",
            "base": "flytekit.current_context().output_metadata_prefix",
        },
    )


def _unknown(told: Any) -> EngineTask:
    """A local run, or a worker of an elastic task."""
    execution = told.execution_id
    return EngineTask(
        "flytekit",
        run=name_of("flytekit", execution.project, execution.domain, execution.name),
        task="unknown",
        ambiguous="Flyte v1 does not say here which node of a workflow this is: it calls every one the same.",
        hint=HINT,
        execution=told,
        sources={"run": "flytekit.current_context().execution_id"},
    )


class _Node(NamedTuple):
    """Where a node's outputs go, taken apart.

    Attributes:
        folder: The execution's folder; None if there is none of its name.
        names: What of the rest is the same on every retry, and no other node's.
        known: The rest has the form that is known: what was left out is the attempt.
    """

    folder: str | None
    names: list[str]
    known: bool


def _node_of(prefix: str, execution: str) -> _Node:
    parts = prefix.rstrip("/").split("/")
    named = next((at + 1 for at, part in enumerate(parts) if execution and part.endswith(execution)), 0)
    folder, node = "/".join(parts[:named]) or None, parts[named:]
    if len(node) >= 3 and node[-2] == "data" and node[-1].isdecimal():
        return _Node(folder, [*node[:-2], *_index()], known=True)
    if len(node) >= 5 and node[-4] == "data" and all(part.isdecimal() for part in node[-3:]):
        return _Node(folder, [*node[:-4], node[-2]], known=True)
    return _Node(folder, [*node, *_index()], known=False)


def _index() -> list[str]:
    """Which item of a map task this is, for those whose items share the folder of their node."""
    variable = os.environ.get("BATCH_JOB_ARRAY_INDEX_VAR_NAME")
    if not variable:
        return []
    return [str(int(os.environ.get("BATCH_JOB_ARRAY_INDEX_OFFSET") or 0) + int(os.environ[variable]))]


def _reason(told: Any, node: _Node, attempt: str) -> str | None:
    """Why another task may have this identity, or this one had another."""
    if not node.known:
        return f"Flyte puts the outputs into {told.output_metadata_prefix}: which part of that is the attempt?"
    if any(_OF_LATER_ATTEMPT.search(name) for name in node.names):
        return "The dynamic task around this one was run again, and its children have other names than before."
    # Flyte's public attribute raises an error where there is none.
    previous = getattr(told, "_checkpoint", None)
    if attempt == "0" and getattr(previous, "_checkpoint_src", None):
        return "This execution recovers another one, and Flyte does not say which."
    return None
