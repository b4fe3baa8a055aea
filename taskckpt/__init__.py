"""Checkpoints for retrying tasks: a retry goes on where the last attempt stopped.

>>> import taskckpt
>>> cp = taskckpt.checkpoint("docs-example")
>>> cp.load_sync()
>>> cp.save_sync(b"17")
>>> cp.load_bytes_sync()
b'17'
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskckpt import engines, errors
    from taskckpt._checkpoint import Checkpoint
    from taskckpt._history import PruneDecision
    from taskckpt._keep import BestN, EveryNSteps, LatestN
    from taskckpt._pending import PendingSave
    from taskckpt._selection import CheckpointInfo
    from taskckpt._task import task
    from taskckpt._task_context import TaskContext
    from taskckpt._when import Budget, EverySeconds, EverySteps
    from taskckpt.context import checkpoint, ctx
    from taskckpt.errors import AmbiguousIdentityError, StaleAttemptError, TaskckptError, TaskckptWarning
    from taskckpt.iterators import CheckpointableIterator, IteratorCheckpoint, PipelineCheckpoint
    from taskckpt.latest import latest_checkpoint
    from taskckpt.stages import CheckpointManager

    __version__: str

__all__ = [
    "AmbiguousIdentityError",
    "BestN",
    "Budget",
    "Checkpoint",
    "CheckpointInfo",
    "CheckpointManager",
    "CheckpointableIterator",
    "EveryNSteps",
    "EverySeconds",
    "EverySteps",
    "IteratorCheckpoint",
    "LatestN",
    "PendingSave",
    "PipelineCheckpoint",
    "PruneDecision",
    "StaleAttemptError",
    "TaskContext",
    "TaskckptError",
    "TaskckptWarning",
    "checkpoint",
    "ctx",
    "engines",
    "errors",
    "latest_checkpoint",
    "task",
]

# Where each name lives. Loaded when it is first used: a script that only might save starts 60 ms sooner.
_HOMES = {
    "BestN": "taskckpt._keep",
    "Budget": "taskckpt._when",
    "Checkpoint": "taskckpt._checkpoint",
    "CheckpointInfo": "taskckpt._selection",
    "CheckpointManager": "taskckpt.stages",
    "CheckpointableIterator": "taskckpt.iterators",
    "EveryNSteps": "taskckpt._keep",
    "EverySeconds": "taskckpt._when",
    "EverySteps": "taskckpt._when",
    "IteratorCheckpoint": "taskckpt.iterators",
    "LatestN": "taskckpt._keep",
    "PendingSave": "taskckpt._pending",
    "PipelineCheckpoint": "taskckpt.iterators",
    "PruneDecision": "taskckpt._history",
    "AmbiguousIdentityError": "taskckpt.errors",
    "StaleAttemptError": "taskckpt.errors",
    "TaskContext": "taskckpt._task_context",
    "TaskckptError": "taskckpt.errors",
    "TaskckptWarning": "taskckpt.errors",
    "checkpoint": "taskckpt.context",
    "ctx": "taskckpt.context",
    "latest_checkpoint": "taskckpt.latest",
    "task": "taskckpt._task",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in ("engines", "errors"):
        return import_module(f"taskckpt.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("taskckpt")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'taskckpt' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
