"""What a task's log says, as far as commands show it. Only reads."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from taskckpt._chain import whole
from taskckpt._layout import folder_name, slot_key
from taskckpt._log import catalogue
from taskckpt._log.history import LogMoved, LogReader, View
from taskckpt._log.records import Claim, Commit
from taskckpt._selection import CheckpointInfo, infos_of, of_step
from taskckpt.cli._output import JSON, age, iso
from taskckpt.cli._targets import Task
from taskckpt.errors import CorruptCheckpointError, NotFoundError, StepNotFoundError


@dataclass(frozen=True)
class History:
    """The checkpoints of a task, newest first, and their commits by slot; and records that cannot be read."""

    task: Task
    reader: LogReader
    infos: list[CheckpointInfo]
    commits: Mapping[int, Commit]
    damaged: list[CorruptCheckpointError]

    @functools.cached_property
    def _view(self) -> View:
        return self.reader.look()

    @property
    def stored_bytes(self) -> int:
        """Of all checkpoints."""
        return sum(info.stored_bytes for info in self.infos)

    @property
    def step(self) -> int | None:
        """How far the task is: the step of the newest checkpoint that has one and was not left behind."""
        return next((info.step for info in self.infos if info.step is not None and info.in_lineage), None)

    @functools.cached_property
    def name(self) -> str:
        """The task's name or key as it was given, if a record tells: its folder's may be another."""
        for commit in self.commits.values():
            about = commit.stamp.about if commit.repeats is None else commit.repeats.about
            given = about.get("task")
            if isinstance(given, str) and folder_name(given) == self.task.name:
                return given
        return self.task.name

    @property
    def title(self) -> str:
        """As ``Task.path``, with the name that was given."""
        folders, separator, _ = self.task.path.rpartition("/")
        return f"{folders}{separator}{self.name}"

    def of_step(self, step: int) -> CheckpointInfo:
        """The checkpoint of a step: that of the lineage, if there are several.

        Raises:
            StepNotFoundError: There is none; the hint lists the steps there are.
        """
        found = of_step(step).order(self.infos)
        if not found:
            steps = [one.step for one in self.infos if one.step is not None]
            raise of_step(step).not_among(steps, self.task.uri)
        return found[0]

    def of_slot(self, slot: int) -> CheckpointInfo:
        """The checkpoint whose record is, or was, in a slot: others repeat it where it was pinned or gone back to.

        Raises:
            StepNotFoundError: There is none any more.
        """
        original = catalogue.original_of(self.reader, slot)
        for info in self.infos:
            if self.commits[info.slot].original == original:
                return info
        raise StepNotFoundError(
            "This checkpoint was deleted.",
            uri=f"{self.task.uri}/{slot_key(slot)}",
            hint=f"Those there are: taskckpt ls {self.task.uri}",
        )

    def commit_of(self, info: CheckpointInfo) -> Commit:
        """The record of one of these checkpoints, with the content that lies in it.

        Raises:
            NotFoundError: It was deleted meanwhile.
        """
        try:
            return whole(self.reader, self._view, self.commits[info.slot])
        except LogMoved as error:
            raise NotFoundError("The checkpoint was deleted meanwhile.", uri=info.uri) from error


@dataclass(frozen=True)
class Owner:
    """The attempt that has a task: what its claim says about it, and when it last wrote."""

    attempt: object
    host: object
    pid: object
    keep: object
    claimed: datetime | None
    wrote: datetime | None

    def fields(self) -> dict[str, JSON]:
        """As ``--json`` says it."""
        return {
            "attempt": self.attempt if isinstance(self.attempt, int) else None,
            "host": None if self.host is None else str(self.host),
            "pid": self.pid if isinstance(self.pid, int) else None,
            "keep": None if self.keep is None else str(self.keep),
            "claimed": None if self.claimed is None else iso(self.claimed),
            "wrote": None if self.wrote is None else iso(self.wrote),
        }

    def __str__(self) -> str:
        attempt = "an attempt" if self.attempt is None else f"attempt {self.attempt}"
        when = "" if self.wrote is None else f", last wrote {age(self.wrote)}"
        return f"{attempt} (pid {self.pid} on {self.host}{when})"


def history(task: Task) -> History:
    """All checkpoints that are there."""
    reader = LogReader(task.store)
    found = catalogue.everything(reader)
    told = infos_of(found.commits, task.uri)
    commits = {info.slot: commit for info, commit in told}
    return History(task, reader, [info for info, _ in told], commits, [one.error for one in found.damaged])


def owner(task: Task) -> Owner | None:
    """Who has the task; None if no claim can be read."""
    reader = LogReader(task.store)
    survey = catalogue.beginning(reader)
    newest = survey.newest
    if newest is None:
        return None
    for claim in reader.read_slot(survey.view, newest.stamp.claim.slot):
        if isinstance(claim, Claim) and claim.stamp.claim.nonce == newest.stamp.claim.nonce:
            about = claim.stamp.about
            said = {name: about.get(name) for name in ("attempt", "host", "pid", "keep")}
            return Owner(**said, claimed=_time(claim.stamp.time), wrote=_time(newest.stamp.time))
    return None


def _time(text: str) -> datetime | None:
    # For people: nothing was decided from it, so nobody checked it before.
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else None
