"""Dagster: a resource that says where checkpoints lie, and gives a step its own.

    @dagster.op(retry_policy=dagster.RetryPolicy(max_retries=3))
    def train(checkpoints: CheckpointResource) -> None:
        done = int(checkpoints.checkpoint.load_bytes_sync() or 0)
        ...

    dagster.Definitions(jobs=[...], resources={"checkpoints": CheckpointResource(base="s3://bucket/checkpoints")})

``taskckpt.checkpoint()`` alone does the same in any step, where ``TASKCKPT_BASE`` says where.
"""

from typing import Literal

import dagster

import taskckpt


class CheckpointResource(dagster.ConfigurableResource):
    """Where the checkpoints of the steps that ask for this resource lie.

    Attributes:
        base: A URL, or a path that all hosts share. ``TASKCKPT_BASE``, where it is set, goes before; without both it
            is ``./.taskckpt``.
        scope: ``"lineage"``: a run that executes another one again goes on where that one stopped.
    """

    base: str | None = None
    scope: Literal["run", "lineage"] = "run"

    @property
    def checkpoint(self) -> taskckpt.Checkpoint:
        """The checkpoint of the step that runs; the same object every time.

        Raises:
            NoTaskContextError: No step runs here.
            AmbiguousIdentityError: Dagster cannot tell which retry this is: the hint says what to do.
        """
        step = taskckpt.ctx(scope=self.scope)
        return step.checkpoint if step is not None else taskckpt.checkpoint()
