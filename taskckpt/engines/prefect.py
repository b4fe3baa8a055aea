"""Prefect 3: the task run, or the flow run, that this code runs in.

Prefect gives a task run another id on each retry of its flow, and names nothing else that stays but the task. So
a task is told by what it is called with: the flow run, the tasks and flows around it, its own name, and its
parameters. Two equal calls in one attempt of a flow would be one task: the second is ambiguous. Where parameters
are not plain values, or the task runs in another process than its flow (Dask, Ray, a process pool), it is told by
its id: that holds over retries of the task, and is ambiguous in a retry of the flow.

What lies: ``task_run.run_count`` begins anew with each retry of the flow; a subflow is another flow run in each
attempt of the flow around it; ``PREFECT__FLOW_RUN_ID`` is inherited by every child process, so it is not read.
The task's key is not used either: it changes with the code. No exception ends a task without a retry (the
engine's ``Abort`` is no ``Exception``): ``retry_condition_fn`` can. Contexts may outlive what they are of, since
Prefect's own threads inherit them; so ``execution`` is an object of ours. Checked with 3.8.8.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from taskckpt.engines._task import EngineTask, name_of

# Longer ones are told by their digest: a task's name goes into the environment of its children.
MOST_CHARACTERS = 300

TWICE = "The same task was called with the same arguments before, in this attempt of what called it."
BY_ID = "Only the id of its run tells this task, and that is another one now that what called it is retried."
UNKNOWN = "What called this task has ended, so that its calls cannot be told apart any more."
HINT = (
    "Pass arguments that are plain values and tell the calls apart; or name the task, as in "
    "taskckpt.checkpoint(f'{prefect.runtime.flow_run.id} part 3')."
)


class _Execution:
    """Lives as long as a context is entered."""


class _Seen:
    """What is known of one attempt of a task or a flow, and of the calls that were made in it."""

    def __init__(self, context: Any, run: str, parts: tuple[str, ...], again: bool, ambiguous: str | None) -> None:
        key = id(context)
        self.of = weakref.ref(context, lambda _: _seen.pop(key, None))
        self.run, self.parts, self.ambiguous = run, parts, ambiguous
        self.again = again  # a retry of this, or of anything around it
        self.names: dict[str, str] = {}  # of the calls by the ids of their runs, and the other way round
        self.owners: dict[str, str] = {}
        self.execution: _Execution | None = _Execution()


# By the identity of the context: it cannot be hashed. Without a lock: each step is one call of a dict.
_seen: dict[int, _Seen] = {}


def find() -> EngineTask | None:
    """The innermost task or flow whose context is entered here."""
    module = sys.modules.get("prefect.context")
    tasks, flows = getattr(module, "TaskRunContext", None), getattr(module, "FlowRunContext", None)
    if tasks is None or flows is None:
        return None
    _let_go()
    task, flow = tasks.get(), flows.get()
    context = _innermost(task, flow)
    if context is None:
        return None
    seen = _look(task, flow)
    kind = "task_run" if context is task else "flow_run"
    where = f"prefect.context.{type(context).__name__}"
    by_id = _id(context) in (seen.run, seen.parts[-1])
    return EngineTask(
        "prefect",
        run=name_of("prefect", seen.run),
        task=name_of(*seen.parts),
        attempt=max(_of(context).run_count - 1, 0),
        ambiguous=seen.ambiguous,
        hint=HINT if seen.ambiguous else None,
        execution=seen.execution,
        sources={
            "run": "prefect.context.FlowRunContext.flow_run.id",
            "task": f"{where}.{kind}.id" if by_id else f"{where}: its name and its parameters",
            "attempt": f"{where}.{kind}.run_count - 1" + (", of this attempt of the flow" if context is task else ""),
        },
    )


def _look(task: Any, flow: Any) -> _Seen:
    """What is known of the innermost of both, found out now if nobody asked before."""
    context = _innermost(task, flow)
    known = _seen.get(id(context))
    if known is not None and known.of() is context:
        return known
    around = (_outer(task), flow) if context is task else (task, _outer(flow))
    again = _of(context).run_count > 1
    # A context that was left does not tell any more what was around it; a flow's run does, where nothing was.
    lost = UNKNOWN if _ended(context) and getattr(_of(context), "parent_task_run_id", True) else None
    if _innermost(*around) is None:
        seen = _Seen(context, _id(context), ("task" if context is task else "flow",), again, lost)
    else:
        caller = _look(*around)
        mine = _id(context)
        text = None if getattr(around[1], "detached", False) else _text(context)
        name = caller.names.setdefault(mine, text or mine)
        ambiguous = lost or caller.ambiguous
        if name == mine and caller.again:
            ambiguous = ambiguous or BY_ID
        if caller.owners.setdefault(name, mine) != mine:
            ambiguous = ambiguous or TWICE
        seen = _Seen(context, caller.run, (*caller.parts, name), again or caller.again, ambiguous)
    return _seen.setdefault(id(context), seen)


def _innermost(task: Any, flow: Any) -> Any:
    """A task's context stays while it runs a flow, and the flow's while it runs a task: ids tell which is within."""
    if flow is None or flow.flow_run is None:
        return task
    # What came from another process is the flow of this task, whatever the task says; flows run in their own.
    within = task is not None and (flow.detached or task.task_run.flow_run_id == flow.flow_run.id)
    return task if within else flow


def _outer(context: Any) -> Any:
    """The context of its kind that was there when this one was entered: of another run."""
    outer = context
    while type(outer) is type(context) and _id(outer) == _id(context):
        outer = getattr(getattr(outer, "_token", None), "old_value", None)
    return outer if type(outer) is type(context) else None


def _of(context: Any) -> Any:
    return context.task_run if hasattr(context, "task_run") else context.flow_run


def _id(context: Any) -> str:
    return str(_of(context).id)


def _ended(context: Any) -> bool:
    return getattr(context, "_token", context) is None


def _text(context: Any) -> str | None:
    """The call as one text that is the same in every attempt; None if its parameters are not plain."""
    kind, called = ("", context.task) if hasattr(context, "task_run") else ("flow ", context.flow)
    arguments = _arguments(called.fn, context.parameters or {})
    if arguments is None:
        return None
    text = f"{kind}{called.name}({arguments}) @ {_where(called.fn)}"
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{kind}{called.name[:80]}(...) {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()}"


def _arguments(function: Callable[..., Any], parameters: Mapping[str, Any]) -> str | None:
    from taskckpt._identity import canonical, constants_around

    try:
        captured = "".join(f" with {name}={value}" for name, value in constants_around(function))
        return ", ".join(f"{name}={canonical(value, name)}" for name, value in sorted(parameters.items())) + captured
    except (ValueError, RecursionError):
        return None


def _where(function: Callable[..., Any]) -> str:
    """Where the function was defined: the same whether its file is run, or loaded from another folder by a worker.

    Such a file is no module of a package any more, so only the last part of the module's name stays.
    """
    module = str(getattr(function, "__module__", "")).rpartition(".")[2]
    if module.startswith("__"):
        code = getattr(inspect.unwrap(function), "__code__", None)
        module = os.path.splitext(os.path.basename(code.co_filename))[0] if code is not None else ""
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _let_go() -> None:
    """Contexts that were left have ended, however long they still live."""
    for seen in list(_seen.values()):
        if seen.execution is not None and _ended(seen.of()):
            seen.execution = None
