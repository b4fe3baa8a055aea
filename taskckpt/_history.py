"""What a task has saved so far: to list it, to pin parts of it, to go back, and to say what stays."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from taskckpt import _payload
from taskckpt._attempt import Attempt
from taskckpt._chain import whole
from taskckpt._keep import text_of
from taskckpt._log import catalogue
from taskckpt._log.catalogue import Retained
from taskckpt._log.records import Commit
from taskckpt._log.retention import Kept, Retention
from taskckpt._operation import Stop
from taskckpt._selection import CheckpointInfo, Selection, info_of, infos_of
from taskckpt.errors import CorruptCheckpointError

logger = logging.getLogger("taskckpt")


@dataclass(frozen=True, slots=True)
class PruneDecision:
    """What ``prune`` does with a checkpoint, and why.

    Attributes:
        checkpoint: Which one.
        keeps: Whether it stays.
        reason: In plain words.
    """

    checkpoint: CheckpointInfo
    keeps: bool
    reason: str


class History:
    """The checkpoints of one task. Threads may share it."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    # --- to look at ----------------------------------------------------------------------------

    def checkpoints(self, stop: Stop) -> list[CheckpointInfo]:
        """All of them, newest first. See ``Checkpoint.checkpoints_sync``."""
        return [info for info, _ in self._all(stop)]

    def steps(self, stop: Stop) -> list[int]:
        """Of all checkpoints that have one, ascending."""
        return sorted({info.step for info in self.checkpoints(stop) if info.step is not None})

    def latest_step(self, stop: Stop) -> int | None:
        """The step of the newest commit."""
        stop.check()
        head = catalogue.beginning(self._attempt.reader()).head
        return head.notes.step if isinstance(head, Commit) else None

    def _all(self, stop: Stop) -> list[tuple[CheckpointInfo, Commit]]:
        stop.check()
        reader = self._attempt.reader()
        return self._told(catalogue.everything(reader))

    def _told(self, found: Retained) -> list[tuple[CheckpointInfo, Commit]]:
        if found.damaged and not found.commits:
            raise CorruptCheckpointError(
                f"None of the records can be read: {'; '.join(str(one.error) for one in found.damaged[:10])}.",
                uri=self._attempt.dest.uri,
            )
        for one in found.damaged:
            logger.warning("A record cannot be read, and is not listed: %s", one.error)
        return infos_of(found.commits, self._attempt.dest.uri)

    # --- to change -----------------------------------------------------------------------------

    def pin(self, which: Selection, stop: Stop) -> CheckpointInfo:
        """Nothing deletes it until it is unpinned. See ``Checkpoint.pin_sync``."""
        return self._pin(which, stop, on=True)

    def unpin(self, which: Selection, stop: Stop) -> CheckpointInfo:
        """It stays no longer than others. See ``Checkpoint.unpin_sync``."""
        return self._pin(which, stop, on=False)

    def _pin(self, which: Selection, stop: Stop, *, on: bool) -> CheckpointInfo:
        with self._attempt.holding(stop) as log:
            info, commit = self._meant(which, stop)
            assert log.newest is not None
            before = log.newest.pinned
            others = tuple(slot for slot in before if slot != commit.original)
            pinned = (commit.original, *others) if on else others
            newest = log.newest if set(pinned) == set(before) else log.annotate(stop, pinned=pinned)
            logger.info("%s step %s of %s.", "Pinned" if on else "Unpinned", info.step, self._attempt.dest.uri)
            current = newest if commit.original == newest.original else commit
            return info_of(current, newest, self._attempt.dest.uri)

    def rollback(self, which: Selection, stop: Stop) -> CheckpointInfo:
        """It is the newest again. See ``Checkpoint.rollback_sync``."""
        with self._attempt.holding(stop) as log:
            info, commit = self._meant(which, stop)
            reader = self._attempt.reader()
            commit = whole(reader, reader.look(), commit)
            _payload.verify(reader.store, commit, stop)
            positions = _payload.read_positions(reader.store, commit, stop)
            newest = log.go_back(commit, stop)
            self._attempt.went_back(newest, positions)
            logger.info("Rolled %s back to step %s, saved %s.", self._attempt.dest.uri, info.step, info.time)
            return info_of(newest, newest, self._attempt.dest.uri)

    def prune(self, stop: Stop, *, dry_run: bool) -> list[PruneDecision]:
        """Drops what need not stay. See ``Checkpoint.prune_sync``."""
        if dry_run:
            found = catalogue.everything(self._attempt.reader())
            return self._decisions(found)
        with self._attempt.holding(stop) as log:
            decisions = self._decisions(catalogue.everything(self._attempt.reader()))
            if not all(one.keeps for one in decisions):
                log.annotate(stop, prune=True)
            return decisions

    def _decisions(self, found: Retained) -> list[PruneDecision]:
        told = self._told(found)
        if not told:
            return []
        newest = found.commits[0]
        older = [Kept.of(commit) for commit in found.commits[1:]]
        retention = Retention(self._attempt.policy, newest, older, [one.slot for one in found.damaged])
        reasons = retention.reasons(Kept.of(newest), newest.pinned, self._attempt.protected, newest.lineage)
        otherwise = f"nothing keeps it: not {text_of(self._attempt.policy)}"
        return [
            PruneDecision(info, commit.stamp.slot in reasons, reasons.get(commit.stamp.slot, otherwise))
            for info, commit in told
        ]

    def _meant(self, which: Selection, stop: Stop) -> tuple[CheckpointInfo, Commit]:
        told = self._all(stop)
        commits = {info.slot: commit for info, commit in told}
        chosen = which.order([info for info, _ in told])
        if not chosen:
            raise which.not_among([info.step for info, _ in told if info.step is not None], self._attempt.dest.uri)
        return chosen[0], commits[chosen[0].slot]
