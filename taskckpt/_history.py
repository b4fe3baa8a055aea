"""What a task has saved so far: to list it, to pin parts of it, to go back, and to say what stays."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from taskckpt import _payload
from taskckpt._attempt import Attempt
from taskckpt._chain import whole
from taskckpt._keep import text_of
from taskckpt._log import catalogue
from taskckpt._log.catalogue import Retained
from taskckpt._log.records import Commit
from taskckpt._log.retention import Kept, Retention
from taskckpt._operation import Stop
from taskckpt._selection import CheckpointInfo, info_of, infos_of, of_step, of_uri
from taskckpt.errors import CorruptCheckpointError, NotFoundError, UsageError

logger = logging.getLogger("taskckpt")

# A step, or one of the checkpoints that were listed.
Which: TypeAlias = int | CheckpointInfo


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

    def pin(self, which: Which, stop: Stop) -> CheckpointInfo:
        """Nothing deletes it until it is unpinned. See ``Checkpoint.pin_sync``."""
        return self._pin(which, stop, on=True)

    def unpin(self, which: Which, stop: Stop) -> CheckpointInfo:
        """It stays no longer than others. See ``Checkpoint.unpin_sync``."""
        return self._pin(which, stop, on=False)

    def _pin(self, which: Which, stop: Stop, *, on: bool) -> CheckpointInfo:
        with self._attempt.holding(stop) as log:
            log.view(stop, to_write=True)  # a newer attempt is met even where there is nothing to write
            found = catalogue.everything(self._attempt.reader())
            info, commit = self._meant(which, found)
            newest, original = found.commits[0], commit.original
            if (original in newest.pinned) != on:
                newest = log.annotate(stop, pin=commit) if on else log.annotate(stop, unpin=original)
            logger.info("%s step %s of %s.", "Pinned" if on else "Unpinned", info.step, self._attempt.dest.uri)
            current = newest if commit.original == newest.original else commit
            return info_of(current, newest, self._attempt.dest.uri)

    def rollback(self, which: Which, stop: Stop) -> CheckpointInfo:
        """It is the newest again. See ``Checkpoint.rollback_sync``."""
        with self._attempt.holding(stop) as log:
            view = log.view(stop, to_write=True)
            reader = self._attempt.reader()
            info, commit = self._meant(which, catalogue.everything(reader))
            commit = whole(reader, view, commit)
            try:
                _payload.verify(reader.store, commit, stop)
            except NotFoundError as error:
                raise CorruptCheckpointError(f"Its payload is gone: {error.message}", uri=error.uri) from error
            positions = _payload.read_positions(reader.store, commit, stop)
            newest = log.go_back(commit, stop)
            self._attempt.went_back(newest, positions)
            logger.info("Rolled %s back to step %s, saved %s.", self._attempt.dest.uri, info.step, info.time)
            return info_of(newest, newest, self._attempt.dest.uri)

    def prune(self, stop: Stop, *, dry_run: bool) -> list[PruneDecision]:
        """Drops what need not stay. See ``Checkpoint.prune_sync``."""
        if dry_run:
            found = catalogue.everything(self._attempt.reader())
            return self._decisions(found, self._safe(found.commits, stop))
        with self._attempt.holding(stop) as log:
            log.view(stop, to_write=True)
            found = catalogue.everything(self._attempt.reader())
            safe = self._safe(found.commits, stop)
            decisions = self._decisions(found, safe)
            if not all(one.keeps for one in decisions):
                log.annotate(stop, prune=safe)
            return decisions

    def _safe(self, commits: Sequence[Commit], stop: Stop) -> dict[int, str]:
        """What no policy may drop, by its original: what was resumed from until two newer ones exist; a good one."""
        if not commits:
            return {}
        newest, safe = commits[0], self._attempt.protected(until=2)
        is_ours = newest.stamp.claim.nonce == self._attempt.claim_nonce
        if is_ours and newest.count == 1 and isinstance(newest.resumed_from, int):
            # A tool that joins an attempt knows no more of it than the log says.
            safe.setdefault(newest.resumed_from, "the attempt resumed from it")
        if self._attempt.policy is not None and len(commits) > 1:
            good = self._newest_good(commits, stop)
            if good is not None and good is not newest:
                safe[good.original] = "the newest that is not damaged"
        return safe

    def _newest_good(self, commits: Sequence[Commit], stop: Stop) -> Commit | None:
        """The first that can be read to its end. An attempt may have gone on from it, without a word in the log yet."""
        reader = self._attempt.reader()
        for commit in commits:
            if not (commit.has_payload and commits[0].lineage.has(commit.stamp.slot)):
                continue
            try:
                _payload.verify(reader.store, whole(reader, reader.look(), commit), stop)
            except (CorruptCheckpointError, NotFoundError) as error:
                logger.warning("A damaged checkpoint is in the way of what would be dropped: %s", error)
            else:
                return commit
        return None

    def _decisions(self, found: Retained, safe: Mapping[int, str]) -> list[PruneDecision]:
        told = self._told(found)
        if not told:
            return []
        newest = found.commits[0]
        older = [Kept.of(commit) for commit in found.commits[1:]]
        retention = Retention(self._attempt.policy, newest, older, [one.slot for one in found.damaged])
        reasons = retention.reasons(Kept.of(newest), newest.pinned, safe, newest.lineage)
        otherwise = f"nothing keeps it: not {text_of(self._attempt.policy)}"
        return [
            PruneDecision(info, commit.stamp.slot in reasons, reasons.get(commit.stamp.slot, otherwise))
            for info, commit in told
        ]

    def _meant(self, which: Which, found: Retained) -> tuple[CheckpointInfo, Commit]:
        told = self._told(found)
        commits = {info.slot: commit for info, commit in told}
        selection = of_uri(self._of_this_task(which).uri) if isinstance(which, CheckpointInfo) else of_step(which)
        chosen = selection.order([info for info, _ in told])
        if not chosen:
            raise selection.not_among([info.step for info, _ in told if info.step is not None], self._attempt.dest.uri)
        return chosen[0], commits[chosen[0].slot]

    def _of_this_task(self, info: CheckpointInfo) -> CheckpointInfo:
        place = f"{self._attempt.dest.uri}/"
        if not info.uri.startswith(place):
            raise UsageError("This checkpoint belongs to another task.", uri=info.uri, hint=f"Pass one of {place}.")
        return info
