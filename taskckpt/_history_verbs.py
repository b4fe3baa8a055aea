"""The verbs of ``Checkpoint`` for what a task has saved so far."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from taskckpt._attempt import Attempt
from taskckpt._history import History, PruneDecision
from taskckpt._later import Later
from taskckpt._operation import Stop
from taskckpt._selection import CheckpointInfo

T = TypeVar("T")


class HistoryVerbs:
    """Lists, pins, rolls back and prunes. A part of ``Checkpoint``."""

    _attempt: Attempt
    _later: Later
    _history: History

    def _loaded(self) -> None:
        """What this attempt goes on from may be another checkpoint now."""
        raise NotImplementedError

    def checkpoints_sync(self) -> list[CheckpointInfo]:
        """All checkpoints that are there, newest first. Reads no payload, and never takes the task over.

        Raises:
            CorruptCheckpointError: There is something, and none of it can be read.
            UnavailableError, DeniedError: The store could not be asked; nothing is known.
        """
        return self._history.checkpoints(Stop())

    async def checkpoints(self) -> list[CheckpointInfo]:
        """``checkpoints_sync`` without blocking the event loop."""
        return await in_thread(self._history.checkpoints)

    def steps_sync(self) -> list[int]:
        """The steps of which there is a checkpoint, ascending: also of those that were rolled back."""
        return self._history.steps(Stop())

    async def steps(self) -> list[int]:
        """``steps_sync`` without blocking the event loop."""
        return await in_thread(self._history.steps)

    def latest_step_sync(self) -> int | None:
        """The step of the newest checkpoint, which ``load`` gives if it is intact; None if it has none."""
        return self._history.latest_step(Stop())

    async def latest_step(self) -> int | None:
        """``latest_step_sync`` without blocking the event loop."""
        return await in_thread(self._history.latest_step)

    def pin_sync(self, which: int | CheckpointInfo) -> CheckpointInfo:
        """That checkpoint stays until it is unpinned (or all is cleared).

        Args:
            which: Its step, or what ``checkpoints_sync`` said of it: not every one has a step.

        Raises:
            StepNotFoundError: There is none. The hint lists the steps there are.
            StaleAttemptError: A newer attempt has the task.
        """
        return self._change(Stop(), partial(self._history.pin, which), "pin")

    async def pin(self, which: int | CheckpointInfo) -> CheckpointInfo:
        """``pin_sync`` without blocking the event loop."""
        return await in_thread(partial(self._change, change=partial(self._history.pin, which), verb="pin"))

    def unpin_sync(self, which: int | CheckpointInfo) -> CheckpointInfo:
        """That checkpoint stays no longer than others. Args and raises: as ``pin_sync``."""
        return self._change(Stop(), partial(self._history.unpin, which), "unpin")

    async def unpin(self, which: int | CheckpointInfo) -> CheckpointInfo:
        """``unpin_sync`` without blocking the event loop."""
        return await in_thread(partial(self._change, change=partial(self._history.unpin, which), verb="unpin"))

    def rollback_sync(self, which: int | CheckpointInfo) -> CheckpointInfo:
        """That checkpoint is the newest again: this and every later attempt goes on from it.

        What came after it is left behind: it is still there until ``keep`` drops it, and may be rolled back to.

        Args:
            which: As for ``pin_sync``.

        Raises:
            StepNotFoundError: There is none. The hint lists the steps there are.
            CorruptCheckpointError: It is damaged; nothing has changed.
            StaleAttemptError: A newer attempt has the task.
        """
        rolled_back = self._change(Stop(), partial(self._history.rollback, which), "roll back")
        self._loaded()
        return rolled_back

    async def rollback(self, which: int | CheckpointInfo) -> CheckpointInfo:
        """``rollback_sync`` without blocking the event loop."""
        change = partial(self._history.rollback, which)
        rolled_back = await in_thread(partial(self._change, change=change, verb="roll back"))
        self._loaded()
        return rolled_back

    def _change(self, stop: Stop, change: Callable[[Stop], T], verb: str) -> T:
        self._attempt.expect_writable(verb)
        self._later.settle(stop)
        return change(stop)

    def prune_sync(self, *, dry_run: bool = False) -> list[PruneDecision]:
        """Drops now what ``keep`` does not keep. (Each save does so as well.)

        Never dropped are the newest checkpoint, pinned ones, what this attempt resumed from until it has saved
        twice, and what cannot be read.

        Args:
            dry_run: Only tell.

        Returns:
            For each checkpoint, newest first, whether it stays, and why.

        Raises:
            StaleAttemptError: A newer attempt has the task; nothing was dropped.
        """
        return self._prune(Stop(), dry_run=dry_run)

    async def prune(self, *, dry_run: bool = False) -> list[PruneDecision]:
        """``prune_sync`` without blocking the event loop."""
        return await in_thread(partial(self._prune, dry_run=dry_run))

    def _prune(self, stop: Stop, *, dry_run: bool) -> list[PruneDecision]:
        if not dry_run:
            self._attempt.expect_writable("prune")
            self._later.settle(stop)
        return self._history.prune(stop, dry_run=dry_run)


async def in_thread(function: Callable[[Stop], T]) -> T:
    from taskckpt._bridge import in_thread as run  # asyncio takes 30 ms to import, and plain tasks do without

    return await run(function)
