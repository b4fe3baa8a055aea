"""Checkpoints for retrying tasks: a retry goes on where the last attempt stopped.

>>> import taskckpt
>>> cp = taskckpt.checkpoint("docs-example")
>>> cp.load_sync()
>>> cp.save_sync(b"17")
>>> cp.load_bytes_sync()
b'17'
"""

from __future__ import annotations

from taskckpt import engines, errors
from taskckpt.checkpoint import Checkpoint
from taskckpt.context import TaskContext, checkpoint, ctx
from taskckpt.errors import StaleAttemptError, TaskckptError, TaskckptWarning
from taskckpt.latest import latest_checkpoint
from taskckpt.task import task

__all__ = [
    "Checkpoint",
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


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("taskckpt")
    raise AttributeError(f"module 'taskckpt' has no attribute {name!r}")
