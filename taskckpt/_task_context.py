"""One attempt of one task, as code sees it: who it is, and its checkpoint."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from taskckpt import _process
from taskckpt._keep import KeepPolicy
from taskckpt._layout import folder_name, keyed_prefix, task_prefix
from taskckpt._log.slots import new_nonce
from taskckpt._process import AMBIGUOUS, ATTEMPT, BASE, CLAIMS, KEEP, KEY, PLACE, RANK, RUN, TASK
from taskckpt._stores import Location, parse
from taskckpt.engines import EngineTask
from taskckpt.errors import StaleAttemptError, TaskckptWarning

if TYPE_CHECKING:
    from taskckpt._arguments import Target
    from taskckpt._checkpoint import Checkpoint
    from taskckpt._selection import CheckpointInfo
    from taskckpt._when import SavePolicy

logger = logging.getLogger("taskckpt")

# The origin of a value that nobody gave.
MADE_UP = "made up"


@dataclass(frozen=True)
class CheckpointPaths:
    """Flyte's pair of paths. Both are the task's one place: it holds the state of all its attempts."""

    checkpoint_path: str
    prev_checkpoint_path: str


@dataclass(frozen=True, eq=False)
class TaskContext:
    """One attempt of one task.

    Attributes:
        run: The run; ``local`` in a plain script. A task with a ``key`` spans runs.
        task: The task's identity, the same over all its attempts.
        attempt: Counted from 0; None if nobody knows. Information: nothing is decided from it.
        base: Where all tasks lie: a URL, or an absolute local path.
        key: The name that the user gave the task, if any.
        rank: Which of several processes that do the task together this one is, from 0: only rank 0 saves.
            None if it is alone, or nobody knows.
        world_size: How many these are, or None.
        engine: What the engine said, if one runs the task.
        origins: For each value, where it came from.
    """

    run: str
    task: str
    attempt: int | None
    base: str
    key: str | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    keep: int | KeepPolicy | None = 3
    save_policy: SavePolicy | int | str | None = None
    fork_from: Target | CheckpointInfo | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    timeout_s: float = 300
    rank: int | None = None
    world_size: int | None = None
    engine: EngineTask | None = field(default=None, repr=False)
    parent: TaskContext | None = field(default=None, repr=False)
    _handed_nonce: str | None = field(default=None, repr=False)
    _of_process: bool = field(default=False, repr=False)
    _is_ambiguous: bool = field(default=False, repr=False)
    _within: str = field(default="", repr=False)
    _prefix: str | None = field(default=None, repr=False)
    _stands_for: str | None = field(default=None, repr=False)
    _made_in: int = field(default_factory=os.getpid, repr=False)

    @property
    def place(self) -> Location:
        """Where the task's state lies."""
        return parse(self.base, what="base").child(self._below_base)

    @property
    def _below_base(self) -> str:
        if self._prefix is not None:
            return self._prefix
        return keyed_prefix(self.key) if self.key is not None else task_prefix(self.run, self.task)

    @property
    def checkpoint_paths(self) -> CheckpointPaths:
        """The task's place, twice, for code that expects Flyte's two paths."""
        return CheckpointPaths(self.place.uri, self.place.uri)

    @property
    def _is_override(self) -> bool:
        """Whether a person named the task in the environment: what a task hands down brings its claim along."""
        return self.origins.get("task") in (TASK, KEY) and self._handed_nonce is None

    @cached_property
    def _nonce(self) -> str:
        return self._handed_nonce or new_nonce()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_nonce": self._nonce}  # copies of it are one attempt

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """This attempt's checkpoint; the same object every time."""
        from taskckpt._attempt import Owner
        from taskckpt._checkpoint import Checkpoint

        return Checkpoint._for_context(  # noqa: SLF001 - the two rooms share one door
            self.place,
            keep=self.keep,
            save_policy=self.save_policy,
            fork_from=self.fork_from,
            storage_options=dict(self.storage_options),
            timeout_s=self.timeout_s,
            owner=Owner(
                self._nonce,
                inherited=self._handed_nonce is not None or self._made_in != os.getpid(),
                about={"run": self.run, "task": self.task, "attempt": self.attempt},
                rank=self.rank or 0,
                stands_for=self._stands_for,
                stale=self.engine.stale if self.engine is not None else StaleAttemptError,
                on_hold=partial(_process.hand_down_claim, self) if self._of_process else None,
                on_nothing=self._tell_nothing,
            ),
            src=self._src,
        )

    @property
    def _src(self) -> tuple[str, ...]:
        """Where else to look, if the task is the very one that the engine named."""
        said = self.engine
        is_named_by_it = said is not None and self.key is None and self.origins.get("task") == said.engine
        return said.src if said is not None and is_named_by_it and self.fork_from is None else ()

    def _tell_nothing(self) -> None:
        """Nothing was found by what is a retry, in a place that perhaps only an earlier attempt had."""
        if self.engine is None:
            return
        outer = self.parent
        if outer is not None and outer.attempt and self.origins.get("task") == self.engine.engine:
            self._warn(
                f"Attempt {outer.attempt} (from 0) of {outer.task} found nothing for a task of {self.engine.engine} in "
                f"it: {self.task}. Where the engine's run is another one in each attempt, as most are, nothing can be "
                "found again: name the task by a key, as in taskckpt.checkpoint('train')."
            )
        if self.attempt and self.origins.get("base") == MADE_UP:
            self._warn(self._told_base())

    def _told_base(self) -> str:
        assert self.engine is not None
        return (
            f"Attempt {self.attempt} (from 0) of this {self.engine.engine} task found nothing in {self.base} on host "
            f"{platform.node()}, and begins anew: what an earlier attempt saved on another host, or in a container "
            f"that is gone, is not there. Set {BASE} to a place that all hosts share."
        )

    def _warn(self, message: str) -> None:
        logger.error(message)
        warnings.warn(message, TaskckptWarning, stacklevel=2)

    def environ(self) -> dict[str, str]:
        """What a child process needs in its environment to be part of this attempt.

        All of it, so that ``{**os.environ, **ctx().environ()}`` says one thing: what does not apply is blank.
        """
        named = _process.can_be_handed_down(self.task)
        return {
            BASE: self.base,
            RUN: self.run if _process.can_be_handed_down(self.run) else folder_name(self.run),
            TASK: self.task if self.key is None and named else "",
            KEY: self.key or "" if named else "",
            PLACE: "" if named and self._prefix is None else self._below_base,
            ATTEMPT: "" if self.attempt is None else str(self.attempt),
            RANK: "" if self.rank is None else str(self.rank),
            KEEP: "all" if self.keep is None else str(self.keep),
            CLAIMS: _process.claims(self),
            AMBIGUOUS: "",
        }
