"""What an attempt adds to its task's log: commits, repeated ones and clears; and what may be deleted after each.

How a record gets its slot stands in ``slots``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from taskckpt._keep import KeepPolicy
from taskckpt._layout import DATA, INDEX, claim_of_payload, parse_slot_name, payload_key, slot_key
from taskckpt._log import catalogue
from taskckpt._log.catalogue import PAGE_COMMITS
from taskckpt._log.history import Damaged, LogMoved, Survey
from taskckpt._log.records import (
    NO_NOTES,
    Catalogued,
    ClaimId,
    Clear,
    Commit,
    Content,
    Digest,
    Lineage,
    Notes,
    Origin,
    Record,
    Spans,
    Stored,
)
from taskckpt._log.retention import RECORD_BATCH, UNBROKEN, Kept, Plan, Retention, dead_payloads, dead_records
from taskckpt._log.slots import SlotWriter, merged, new_nonce
from taskckpt._operation import Stop
from taskckpt._stores import Store
from taskckpt.errors import NotFoundError, StaleAttemptError, TaskckptError

logger = logging.getLogger("taskckpt")


@dataclass(frozen=True, slots=True)
class Saved:
    """What a save has stored, complete and durable, and what the user said about it."""

    content: Content
    stored: Stored
    notes: Notes = NO_NOTES
    positions: Stored | None = None
    carries_positions: bool = False  # those of what the attempt goes on from
    pin: bool = False


# Only positions were saved so far.
NOTHING = Saved(Content("nothing", Digest.of(b"")), Stored(Digest.of(b""), inline=b""))


class TaskLog(SlotWriter):
    """One process's place in a task's log. Not thread-safe: the caller holds a lock.

    Args:
        claim_nonce: Names the attempt; its child processes share it.
        policy: Which checkpoints stay; None: all.
        about: Said in every record, for people.
        sources: Where the task's state comes from if this log has none.
        resumed_from: What another process of this attempt has loaded.
        stale: What is raised once a newer attempt has the task.
    """

    def __init__(
        self,
        store: Store,
        *,
        claim_nonce: str,
        policy: KeepPolicy | None,
        about: Mapping[str, Any],
        sources: tuple[str, ...] = (),
        resumed_from: Commit | str | None = None,
        stale: type[StaleAttemptError] = StaleAttemptError,
    ) -> None:
        super().__init__(store, claim_nonce=claim_nonce, about=about, sources=sources, stale=stale)
        self._policy = policy
        self._retention: Retention | None = None
        # What the next save goes on from, and what of that this attempt has loaded.
        self._position: Commit | None = None
        self._resumed_from = resumed_from
        self._went_back = False
        self._annotations: set[str] = set()  # nonces of own commits that are not what this attempt goes on from
        self._rollbacks: dict[str, Commit] = {}  # by their nonces, until it is known that they are there
        self._newest: Commit | None = None
        self._count = 0
        self._adopted = 0
        self._number = 0
        self._swept = False
        self._dropped: list[int] = []
        self._unsettled: list[Commit] = []
        self._unindexed: dict[int, Commit] = {}  # own commits that no page of the index has yet
        self._delete_failed = False
        self._index_failed_at = -PAGE_COMMITS

    def _took_over(self, claim: ClaimId, survey: Survey) -> None:
        self._retention, self._dropped = None, []
        head = self._newest = survey.head if isinstance(survey.head, Commit) else None
        if not self._went_back or head is None:
            self._position, self._went_back = head, False
            self._count = head.count if head is not None and head.stamp.claim == claim else 0
        elif self._position is not None and self._position.original == head.original:
            self._position = head

    def _met_own(self, record: Record) -> None:
        if isinstance(record, Commit):
            self._adopt(record)
            self._settle(record.stamp.slot, but=record)
        elif isinstance(record, Clear):
            self._forget()

    def _lost_sight_of(self, record: Record) -> None:
        if isinstance(record, Commit):
            self._unsettled.append(record)

    # --- adding records ------------------------------------------------------------------------

    def next_payload_key(self, save_nonce: str, suffix: str) -> str:
        """A key that no other save ever uses."""
        assert self._claim is not None
        self._number += 1
        return payload_key(self._claim.slot, self._claim.nonce, self._number, save_nonce, suffix)

    def resumed(self, commit: Commit | str) -> None:
        """This attempt has loaded a commit of this log, or a checkpoint elsewhere: the next save goes on from it.

        It stays until two newer ones exist.
        """
        self._resumed_from = commit
        if not isinstance(commit, Commit):
            return
        newest = self._newest
        if newest is not None and newest.stamp.slot > commit.stamp.slot:  # another thread may have committed meanwhile
            if newest.original == commit.original:
                commit = newest
            elif not newest.retains(commit.stamp.slot):
                return
        if self._position is None or commit.stamp.slot != self._position.stamp.slot:
            self._position, self._count = commit, 0
            # A newer one than the newest known is a sibling's: nothing is left behind then.
            self._went_back = newest is None or commit.stamp.slot < newest.stamp.slot

    @property
    def position(self) -> Commit | None:
        """What the next save goes on from."""
        return self._position

    @property
    def newest(self) -> Commit | None:
        """The newest commit, as far as this writer knows."""
        return self._newest

    def ancestors(self) -> list[Commit]:
        """What the next save goes on from, newest first. Inline content may have been left out of it."""
        assert self._newest is not None
        assert self._position is not None
        position = self._position
        newest, lineage = self._newest, position.lineage
        found = catalogue.at_rest(self.reader, lambda view: catalogue.retained(self.reader, view, newest))
        below = [one for one in found.commits if one.stamp.slot <= position.stamp.slot]
        return [one for one in below if lineage.has(one.stamp.slot)]

    def commit(self, save_nonce: str, saved: Saved, stop: Stop) -> Commit:
        """Makes a checkpoint exist. Its payload is complete and durable already.

        Raises:
            StaleAttemptError: A newer attempt has the task; the payload is removed.
            CommitUnknownError: The store did not tell; the next save of this process settles it.
        """
        own_keys = [key for one in (saved.stored, saved.positions) if one and (key := one.key)]
        return self._add(lambda slot: self._new(slot, save_nonce, saved), own_keys, stop)

    def _new(self, slot: int, save_nonce: str, saved: Saved) -> Commit:
        position, retention = self._position, self._retained()
        new = Kept(slot, (), slot, saved.notes.step, saved.notes.metrics)
        plan = retention.plan(new, retention.pinned, self.protected(), self._ancestry(position))
        source, positions = self._resumed_from, saved.positions  # a repeat goes by its original's name
        if saved.carries_positions and position is not None and position.positions is not None:
            positions = self._expect_retained(position).positions
        return Commit(
            self._stamp(slot, self._own_claim(), save_nonce),
            content=saved.content,
            stored=saved.stored,
            previous=None if position is None else position.stamp.slot,
            resumed_from=source.original if isinstance(source, Commit) else source,
            count=self._count + 1,
            floor=plan.floor,
            kept=plan.kept,
            notes=saved.notes,
            lineage=self._lineage_from(position, plan, saved.notes.step),
            pinned=(slot, *retention.pinned) if saved.pin else retention.pinned,
            positions=positions,
            catalogued=self._catalogued(),
            continues_from=() if saved.content.kind != "nothing" else self._sources_of_payload(),
        )

    def go_back(self, commit: Commit, stop: Stop) -> Commit:
        """Repeats an older commit, which must be whole: what came after it is left behind.

        It stays until two newer ones exist. Raises: as ``commit``.
        """
        nonce = new_nonce()
        self._rollbacks[nonce] = commit
        return self._add(lambda slot: replace(self._repeated(commit, slot, nonce), count=0), [], stop)

    def move_on(self, save_nonce: str, positions: Stored, stop: Stop) -> Commit:
        """Commits the payload that the attempt goes on from again, or nothing, with new positions.

        Raises: as ``commit``; NotFoundError if a sibling dropped that payload.
        """

        # Asked at each try: an earlier save may turn out to have been made, or a sibling have saved.
        def build(slot: int) -> Commit:
            if self._position is None:
                return self._new(slot, save_nonce, replace(NOTHING, positions=positions))
            return self._repeated(self._position, slot, save_nonce, positions=positions)

        return self._add(build, [positions.key] if positions.key else [], stop)

    def annotate(
        self, stop: Stop, *, pin: Commit | None = None, unpin: int | None = None, prune: Mapping[int, str] | None = None
    ) -> Commit:
        """Repeats the newest commit, which there must be, with other bookkeeping.

        Args:
            stop: Looked at before the write.
            pin: A commit that is pinned from now on.
            unpin: The original slot of one that is no longer.
            prune: Drop what the policy does not keep, but for these: by their originals, and why.

        Raises:
            NotFoundError: A sibling dropped it, or cleared all, meanwhile.
            Others: As ``commit``.
        """
        nonce = new_nonce()
        self._annotations.add(nonce)

        def build(slot: int) -> Commit:
            return self._repeated(self._newest, slot, nonce, pin=pin, unpin=unpin, prune=prune)

        return self._add(build, [], stop)

    def _repeated(
        self,
        commit: Commit | None,
        slot: int,
        nonce: str,
        *,
        pin: Commit | None = None,
        unpin: int | None = None,
        positions: Stored | None = None,
        prune: Mapping[int, str] | None = None,
    ) -> Commit:
        retention, commit = self._retained(), self._expect_retained(commit)
        if pin is not None and pin.original != commit.original:
            self._expect_retained(pin)
        stamp = commit.stamp
        origin = commit.repeats or Origin(stamp.slot, stamp.time, stamp.about, commit.resumed_from)
        new = replace(Kept.of(commit), slot=slot)
        others = tuple(original for original in retention.pinned if original not in (pin and pin.original, unpin))
        pins = others if pin is None else (pin.original, *others)
        ancestry = self._ancestry(commit)
        plan = retention.plan_all(new) if prune is None else retention.plan(new, pins, prune, ancestry)
        return replace(
            commit,
            stamp=self._stamp(slot, self._own_claim(), nonce),
            count=self._count,
            floor=plan.floor,
            kept=plan.kept,
            lineage=self._lineage_from(commit, plan, None),
            pinned=pins,
            repeats=origin,
            positions=positions or commit.positions,
            catalogued=self._catalogued(),
        )

    def _expect_retained(self, commit: Commit | None) -> Commit:
        """What a sibling dropped since it was read must not be named again: its payload may be deleted by now."""
        if commit is None or self._newest is None or not self._newest.retains(commit.stamp.slot):
            raise NotFoundError("This checkpoint was dropped meanwhile.", uri=self._store.uri, hint="Look again.")
        return commit

    def _add(self, build: Callable[[int], Commit], own_keys: list[str], stop: Stop) -> Commit:
        try:
            commit = self._append(build, stop)
        except StaleAttemptError:
            if not self._names_have_nonces:
                self._delete_quietly(own_keys)
            raise
        self._adopt(commit)
        self._settle(commit.stamp.slot)
        self._delete_dead_records()
        self._sweep()
        self._extend_index(stop)
        return commit

    def _lineage_from(self, position: Commit | None, plan: Plan, step: int | None) -> Lineage:
        """Of a commit that goes on from ``position``: whatever was committed since then is left behind."""
        if position is None:
            return Lineage(highest_step=step)
        spans, highest = self._left_behind(position), position.lineage.highest_step
        if spans:
            lowest = min((plan.floor, *plan.kept))
            spans = tuple(span for span in spans if span[1] >= lowest)
        if step is not None:
            highest = step if highest is None else max(highest, step)
        return Lineage(spans, highest) if spans or highest is not None else UNBROKEN

    def _left_behind(self, position: Commit) -> Spans:
        spans, newest = position.lineage.left_behind, self._newest
        if newest is None or newest.stamp.slot <= position.stamp.slot:
            return spans
        return (*spans, (position.stamp.slot + 1, newest.stamp.slot))

    def _ancestry(self, position: Commit | None) -> Lineage:
        """Of what a commit that goes on from ``position`` retains, which is not known yet."""
        spans = () if position is None else self._left_behind(position)
        return Lineage(spans) if spans else UNBROKEN

    def _sources_of_payload(self) -> tuple[str, ...]:
        before = self._survey.continues_from if self._survey is not None else ()
        return merged(self._sources, before)

    def clear(self, stop: Stop) -> None:
        """Everything saved so far exists no more: first the record says so, then it is deleted."""
        # Listed before the record exists: a child that joins after it may upload while we delete.
        doomed = self._store.list_below(DATA).names
        pages = self._store.list_below(INDEX).names if self._newest and self._newest.catalogued.through else ()
        cleared = self._append(lambda slot: Clear(self._stamp(slot, self._own_claim(), new_nonce())), stop)
        known = self._forget()
        sole_writer = self._first == self._own_claim().slot and cleared.stamp.slot == self._last
        keys = [key for kept in known for key in kept.keys]
        # Below our claim all is dead; below the one after it too, unless a child of ours may be uploading.
        below = self._own_claim().slot + (1 if sole_writer else 0)
        keys += dead_payloads((f"{DATA}/{name}" for name in doomed), claim_slot=below, above=0, living=set())
        self._delete_quietly(sorted({*keys, *(f"{INDEX}/{name}" for name in pages)}))
        self._delete_dead_records()

    def _forget(self) -> list[Kept]:
        """The log was cleared; gives what was known to be there."""
        self._position = self._newest = self._resumed_from = None
        self._went_back = False
        known = self._retained().cleared()
        self._drop(known)
        return known

    # --- what stays and what goes --------------------------------------------------------------

    def _retained(self) -> Retention:
        if self._retention is None:
            assert self._survey is not None
            self._retention = self._inherit(self._survey)
        return self._retention

    def _inherit(self, survey: Survey) -> Retention:
        """What earlier writers left. Where all of it stays, nothing needs to be read."""
        head = survey.head
        if self._policy is None or not isinstance(head, Commit):
            return Retention(self._policy, head if isinstance(head, Commit) else None)
        try:
            found = catalogue.retained(self.reader, survey.view, head)
            above = [one for slot in survey.unreadable for one in self.reader.read_slot(survey.view, slot)]
        except LogMoved:  # a newer attempt, which fences us in a moment, or a sibling, after which we look again
            self._swept = True
            return Retention(self._policy, head, unknown=head.kept)
        # Above the head, one that was never finished (on a disk without hard links) was never acknowledged either.
        damaged = [*found.damaged, *(one for one in above if isinstance(one, Damaged) and not one.torn)]
        unknown = {one.slot for one in damaged}
        if unknown:
            self._swept = True  # never delete what we do not know
        older = [Kept.of(commit) for commit in found.commits if commit is not head]
        return Retention(self._policy, head, older, unknown)

    def protected(self, *, until: int = 1) -> dict[int, str]:
        """The original of what was resumed from, until more own commits exist than that; and why it stays."""
        if self._count >= until:
            return {}
        commit = self._resumed_from if isinstance(self._resumed_from, Commit) else self._position
        return {} if commit is None else {commit.original: "the attempt resumed from it"}

    def _adopt(self, commit: Commit) -> None:
        """Our commit exists: what it retains no more is deleted."""
        if commit.stamp.slot <= self._adopted:
            return  # a save from a signal handler came in between, and met this one
        self._adopted = commit.stamp.slot
        retention = self._retained()
        dropped = retention.committed(commit)
        self._newest = commit
        is_elsewhere = self._position is not None and self._position.original != commit.original
        if commit.stamp.nonce not in self._annotations or not is_elsewhere:
            self._position, self._went_back = commit, False
        self._resumed_from = self._rollbacks.pop(commit.stamp.nonce, self._resumed_from)
        self._count = commit.count
        self._drop(dropped)
        # Several commits may share one payload.
        doomed = {key for kept in dropped for key in kept.keys} - retention.keys() if dropped else set[str]()
        self._delete_quietly(sorted(doomed))
        if self._adopted > commit.stamp.slot:
            self._look_again()

    def _look_again(self) -> None:
        """A signal handler has saved while a commit was taken in: what is known may be a mixture of both."""
        survey = catalogue.beginning(self.reader)
        if isinstance(survey.head, Commit) and survey.head.stamp.claim == self._claim:
            self._survey, self._retention = survey, None
            self._newest = self._position = survey.head
            self._count = survey.head.count

    def _drop(self, kept: list[Kept]) -> None:
        """Notes records of ours that may be deleted later; a late request must not find its slot empty."""
        self._dropped += [one.slot for one in kept if one.slot > self._first and one.slot not in self._late_slots]

    def _settle(self, slot: int, but: Commit | None = None) -> None:
        """A slot is filled: earlier saves that might have got it did not, so their payloads go."""
        # Not by their equality: a metric that is NaN is unequal to itself.
        settled = None if but is None else but.stamp.nonce
        lost = [one for one in self._unsettled if one.stamp.slot <= slot and one.stamp.nonce != settled]
        self._unsettled = [record for record in self._unsettled if record.stamp.slot > slot]
        # What such a record repeats, others have as well: only what was written for itself goes.
        self._delete_quietly([key for record in lost for key in record.keys if record.stamp.nonce in key])

    def _catalogued(self) -> Catalogued:
        """What a new commit says about the index: where all stays it also counts what lies in no page yet."""
        before = Catalogued() if self._newest is None else self._newest.catalogued
        return Catalogued(before.through, before.more + 1 if self._policy is None else 0)

    def _extend_index(self, stop: Stop) -> None:
        """Puts the oldest commits that no page has into one, once they are many."""
        newest = self._newest
        assert newest is not None
        retention = self._retained()
        if self._policy is not None and len(retention) < PAGE_COMMITS // 2:
            return  # so few that no page is in sight
        inline = newest.stored.inline
        self._unindexed[newest.stamp.slot] = catalogue.without_inline(newest) if inline else newest
        if len(self._unindexed) > 2 * PAGE_COMMITS:
            self._unindexed = {slot: one for slot, one in self._unindexed.items() if newest.retains(slot)}
        through = newest.catalogued.through
        more = newest.catalogued.more or len(retention.slots_after(through))
        if more < PAGE_COMMITS or self._index_failed_at + PAGE_COMMITS > self._last:
            return
        try:
            view = self.reader.look(first_page=False)
            page = catalogue.next_page(self.reader, view, newest, through, self._unindexed)
            if page is None:
                self._index_failed_at = self._last
                return
            catalogue.write_page(self.reader, page, new_nonce(), stop)
            self._delete_quietly(catalogue.dead_pages(self._store.list_below(INDEX).names, newest))
        except (TaskckptError, LogMoved) as error:
            self._index_failed_at = self._last
            logger.info("The index could not be extended; listings take more requests: %s", error)
            return
        self._unindexed = {slot: one for slot, one in self._unindexed.items() if slot > page.last}
        # The next commit says so; if there is none, this page is as good as not there.
        rest = Catalogued(page.last, more - len(page.commits) if newest.catalogued.more else 0)
        if self._newest is newest:  # else a save from a signal handler came in between
            self._newest = replace(newest, catalogued=rest)

    def _delete_dead_records(self) -> None:
        dead = dead_records(self._dropped, first=self._first, last=self._last)
        if len(dead) >= RECORD_BATCH:
            self._dropped = [slot for slot in self._dropped if slot not in set(dead)]
            self._delete_quietly([slot_key(slot) for slot in dead])

    def _sweep(self) -> None:
        """Once per claim: removes what killed attempts before ours left without a commit."""
        claim, survey = self._own_claim(), self._survey
        if self._swept or survey is None or claim.slot == 1 or self._first != claim.slot:
            return
        self._swept = True
        above = 0
        if self._policy is None and isinstance(survey.head, Commit):
            above = survey.head.stamp.claim.slot + 1  # lower ones may hold commits that were never read
        try:
            self._store.sweep(lambda key: _is_dead(key, claim.slot))
            if survey.unreadable:
                return
            keys = (f"{DATA}/{name}" for name in self._store.list_below(DATA).names)
        except TaskckptError as error:
            logger.warning("What killed attempts left behind could not be listed: %s", error)
            return
        living = self._retained().keys()
        self._delete_quietly(dead_payloads(keys, claim_slot=claim.slot, above=above, living=living))

    def _delete_quietly(self, keys: list[str]) -> None:
        """Deletes what is dead already; a store that refuses costs space, not the save."""
        if not keys:
            return
        try:
            self._store.delete(keys)
        except TaskckptError as error:
            level = logging.DEBUG if self._delete_failed else logging.WARNING
            self._delete_failed = True
            logger.log(level, "%d old objects could not be deleted and stay behind: %s", len(keys), error)


def _is_dead(key: str, claim_slot: int) -> bool:
    """Whether a half-written object belongs to a claim below ours, or would fill a slot up to our claim's.

    Our claim's own slot too: the attempt before us may have been killed at a record for the very same slot.
    """
    claim = claim_of_payload(key)
    if claim is not None:
        return claim[0] < claim_slot
    name = parse_slot_name(key.rpartition("/")[2])
    return name is not None and name.slot <= claim_slot
