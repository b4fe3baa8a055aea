"""Flyte v2: the action that ``flyte.ctx()`` says is running.

An action's name is a digest of its parent's name, its task, its inputs, and which of several equal calls it is, so
it is the same on every retry, and each item of ``flyte.map`` has its own. Asked for is ``task_action``: a
``@flyte.trace`` step puts its own in the place of ``action``. Names are unique within a run; the run is known by
its organisation, project, domain and name.

What lies: a pod that was preempted, evicted or killed comes back with the attempt number that it had, and so with the
same paths. ``raw_data_path`` and ``output_path`` end in that number: the base is ``run_base_dir``, the run's. Flyte's
own checkpoint paths look back by one attempt only; here they are where to look last (``src``). A local run says
attempt 0 for ever, has one pair of checkpoint paths for all its tasks, and a base below ``/tmp``: none is used.
A local run that got a name (``flyte.with_runcontext(name=)``, ``flyte run --local --name``) is the same run when it
is started again. The restarts of a clustered task's JobSet are no attempts.

Checked with flyte 2.12.1: local runs, and its pods' own entry point ``a0``.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from taskckpt.engines._task import PROCESS, EngineTask, ending, name_of
from taskckpt.errors import StaleAttemptError


def find() -> EngineTask | None:
    """The action of this context; threads that the task starts have none."""
    ask = getattr(sys.modules.get("flyte"), "ctx", None)
    here: Any = ask() if ask is not None else None
    if not here or not getattr(here, "action", None):
        return None
    action = getattr(here, "task_action", None) or here.action
    if here.mode == "local":
        return EngineTask(
            "flyte",
            run=name_of("flyte", "local", action.run_name),
            task=name_of(action.name),
            execution=here.report,
            stale=_stale(),
            sources=_IDENTITY,
        )
    # A run that is driven from somebody's machine is called after its first action, as long as nobody named it.
    nameless = action.run_name == action.name
    clustered = "FLYTE_CLUSTERED_WORKER" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    return EngineTask(
        "flyte",
        run=name_of("flyte", action.org or "", action.project or "", action.domain or "", action.run_name),
        task=name_of(action.name),
        # Flyte reads a variable that is not there as 0.
        attempt=here.attempt_number if "FLYTE_ATTEMPT_NUMBER" in os.environ else None,
        base=here.run_base_dir,
        base_is_of_run=True,
        rank=here.rank if clustered else None,
        world_size=here.world_size if clustered else None,
        ambiguous="The run has no name, and every such run of this project has the same." if nameless else None,
        hint="Name it: flyte.with_runcontext(name=...)." if nameless else None,
        execution=_execution(here, action),
        src=_flytes_own(here.checkpoint_paths),
        stale=_stale(),
        sources={
            **_IDENTITY,
            "attempt": "flyte.ctx().attempt_number",
            "base": "flyte.ctx().run_base_dir",
            "src": "flyte.ctx().checkpoint_paths",
            **({"rank": "flyte.ctx().rank", "world_size": "flyte.ctx().world_size"} if clustered else {}),
        },
    )


_IDENTITY = {"run": "flyte.ctx().task_action.run_name", "task": "flyte.ctx().task_action.name"}


def _execution(here: Any, action: Any) -> object:
    """A pod runs the one action that it was made for; a reusable one takes actions as they come.

    A report is made for each attempt. The context itself is replaced within one, by groups and traces.
    """
    of_pod = os.environ.get("RUN_NAME"), os.environ.get("ACTION_NAME")
    return PROCESS if of_pod == (action.run_name, action.name) else here.report


def _flytes_own(paths: Any) -> tuple[str, ...]:
    """Where Flyte's helper may have saved: this attempt before it was relaunched, then the one before."""
    found = (
        [str(path).strip().strip('"') for path in (paths.checkpoint_path, paths.prev_checkpoint_path)] if paths else []
    )
    return tuple(path for path in found if path and path != "None" and not path.startswith("{{"))


def _stale() -> type[StaleAttemptError]:
    final = getattr(sys.modules.get("flyte.errors"), "NonRecoverableError", None)
    return StaleAttemptError if final is None else ending(final, kind="user", worker=None)
