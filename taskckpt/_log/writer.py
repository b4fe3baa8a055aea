"""Writing a task's log: claim, join, commit, clear, and what may be deleted after each.

The protocol is that of ``docs/format.md``; ``tests/model`` explores it. In short: a record is created
only if its slot is free, a slot number is never used twice, and a writer always tries the slot after its
own last one. So whoever has claimed the task later is met there, and a stale attempt can add nothing.
"""

from __future__ import annotations

import logging
import random
import secrets
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from taskckpt._layout import DATA, SlotName, claim_of_payload, parse_slot_name, payload_key, slot_key
from taskckpt._log import records as _records
from taskckpt._log.history import Damaged, LogMoved, LogReader, Survey, View
from taskckpt._log.records import Claim, ClaimId, Clear, Commit, Content, Join, Record, Stamp, Stored
from taskckpt._log.retention import RECORD_BATCH, Kept, Retention, dead_payloads, dead_records
from taskckpt._operation import Stop
from taskckpt._stores import Store
from taskckpt.errors import (
    AlreadyExistsError,
    CommitUnknownError,
    CorruptCheckpointError,
    DeniedError,
    NotFoundError,
    StaleAttemptError,
    StorageFullError,
    TaskckptError,
    TaskckptWarning,
    UnavailableError,
)

logger = logging.getLogger("taskckpt")

# Others may be quicker a few times in a row; not for ever.
MAX_ROUNDS = 64
# How often a slot that is said to be taken, but cannot be read, is looked at again.
SETTLE_TRIES = 6
# How many earlier claims a claim names. Whoever finds its own nonce among them is stale.
MAX_FENCED = 32
MAX_SOURCES = 16

RecordT = TypeVar("RecordT", Commit, Clear)


def new_nonce() -> str:
    return secrets.token_hex(8)


class _ClaimDenied(Exception):  # noqa: N818 - caught in this room: only a load may go on without a claim
    def __init__(self, error: DeniedError) -> None:
        super().__init__(str(error))
        self.error = error


class TaskLog:
    """One process's place in a task's log. Not thread-safe: the caller holds a lock.

    Args:
        claim_nonce: Names the attempt; its child processes share it.
        about: Said in every record, for people.
        sources: Where the task's state comes from if this log has none.

    Attributes:
        resumed_from: What this attempt goes on from, set by whoever loads: it stays until two newer ones exist.
    """

    def __init__(
        self,
        store: Store,
        *,
        claim_nonce: str,
        keep: int | None,
        about: Mapping[str, Any],
        sources: tuple[str, ...] = (),
    ) -> None:
        self.reader = LogReader(store)
        self.resumed_from: Kept | None = None
        self._store = store
        self._nonce = claim_nonce
        self._keep = keep
        self._about = about
        self._sources = sources
        self._writer = new_nonce()
        self._claim: ClaimId | None = None
        self._first = self._last = 0
        self._names_have_nonces = False
        self._seen_top: int | None = None
        self._fenced_by: str | None = None
        self._fenced_hint = ""
        self._survey: Survey | None = None
        self._retention: Retention | None = None
        self._count = 0
        self._adopted = 0
        self._number = 0
        self._swept = False
        self._dropped: list[int] = []
        self._unsettled: list[Commit] = []
        self._late_slots: set[int] = set()  # a request that was given up may still be on its way there
        self._delete_failed = False

    # --- taking the task over ------------------------------------------------------------------

    def hold(self, stop: Stop) -> None:
        """Makes sure that this process may write. Costs nothing once it does.

        Raises:
            StaleAttemptError: A newer attempt has the task.
        """
        self._refuse_if_fenced()
        if self._claim is None:
            self.view(stop, to_write=True)

    def view(self, stop: Stop, *, to_write: bool = False) -> View:
        """A fresh view of the log, after the task was claimed or joined: nothing older can still be added to it.

        Without permission to write, a call that is not ``to_write`` warns and gives the view all the same.

        Raises:
            StaleAttemptError: A newer attempt has the task.
        """
        self._refuse_if_fenced()
        for _ in range(MAX_ROUNDS):
            view = self.reader.look()
            try:
                held = self._held_view(view, stop)
            except LogMoved:
                continue
            except _ClaimDenied as denied:
                if to_write:
                    raise denied.error from None
                logger.warning("This attempt may read its log but not write it; saving will fail: %s", denied.error)
                self._seen_top = view.top
                return view
            if held is not None:
                return held
        raise self._crowded()

    def _held_view(self, view: View, stop: Stop) -> View | None:
        # Who is in adds nothing that would show whether the top was one, so it must look again.
        survey = self.reader.survey(view, confirm=self._claim is not None)
        if self._claim is None:
            self._expect_nothing_new(survey)
            if not self._names_have_nonces and (self._store.exclusive is False or view.has_nonces):
                self._name_with_nonces()
            return self._take(survey, stop)
        if survey.owner is not None and survey.owner.nonce != self._nonce:
            raise self._fence_if_confirmed(survey)
        return view

    def _expect_nothing_new(self, survey: Survey) -> None:
        """A load that was not allowed to claim gave a state; whoever wrote since then took the task over."""
        if self._seen_top is not None and survey.view.top > self._seen_top:
            raise self._fence_if_confirmed(survey)

    def _take(self, survey: Survey, stop: Stop) -> View | None:
        if survey.owner is not None and survey.owner.nonce == self._nonce:
            return self._join(survey, stop)
        if survey.owner is not None and self._nonce in survey.owner.fenced:
            # Our parent, our child or a claim of our own whose reply was lost had the task, and lost it.
            raise self._fence_if_confirmed(survey)
        return self._make_claim(survey, stop)

    def _make_claim(self, survey: Survey, stop: Stop) -> View | None:
        """One try to claim the slot above everything; None if it has to be tried again."""
        slot = survey.view.top + 1
        claim_id = ClaimId(slot, self._nonce, _fenced_by(survey.owner))
        claim = Claim(
            self._stamp(slot, claim_id, new_nonce()),
            head=survey.head.stamp.slot if survey.head else None,
            unreadable=survey.unreadable,
            continues_from=_merged(self._sources, self._sources_before(survey)),
        )
        try:
            holder = self._create(claim, stop)
        except DeniedError as error:
            raise _ClaimDenied(error) from error
        except StorageFullError as error:
            error.add_note("To load all the same, without taking the task over: Checkpoint(..., read_only=True).")
            raise
        if holder is not None and holder.stamp.nonce != claim.stamp.nonce:
            return None
        self._probe(claim, stop)
        view = self.reader.look()
        if view.top > slot:
            # Our child joined already: join it. A newer attempt: we are stale. Else our claim filled a slot
            # that others had left behind, and fences nobody: claim again. The next round tells.
            return None
        self._begin(claim_id, slot, survey)
        logger.debug("Claimed %s in slot %d.", self._store.uri, slot)
        return view

    def _sources_before(self, survey: Survey) -> tuple[str, ...]:
        """Where earlier attempts said that the task comes from, as long as nothing was saved since."""
        return () if survey.head is not None else survey.continues_from

    def _probe(self, record: Claim | Join, stop: Stop) -> None:
        """Creates our own record a second time, which the store must refuse."""
        if self._store.exclusive or self._names_have_nonces:
            return
        try:
            self._store.create(slot_key(record.stamp.slot), _records.encode(record), stop)
        except AlreadyExistsError:
            return
        self._name_with_nonces()
        self._create(record, stop)

    def _name_with_nonces(self) -> None:
        self._names_have_nonces = True
        warnings.warn(
            f"{self._store.uri}: this store overwrites where it was told to create only. Nothing that was saved "
            "gets overwritten all the same, but two attempts at once are told apart by best effort only.",
            TaskckptWarning,
            stacklevel=8,
        )

    def _join(self, survey: Survey, stop: Stop) -> View | None:
        """One try to go on under a claim that another process of this attempt has made."""
        assert survey.owner is not None
        if survey.unreadable and survey.unreadable[0] == survey.view.top:
            raise self._unreadable_top(survey.view.top)
        slot = survey.view.top + 1
        head = survey.head.stamp.slot if survey.head else None
        join = Join(self._stamp(slot, survey.owner, new_nonce()), head=head, unreadable=survey.unreadable)
        holder = self._create(join, stop)
        if holder is not None and holder.stamp.nonce != join.stamp.nonce:
            return None
        self._probe(join, stop)
        view = self.reader.look()
        if view.top > slot:
            return None
        self._begin(survey.owner, slot, survey)
        logger.debug("Joined %s in slot %d.", self._store.uri, slot)
        return view

    def _begin(self, claim: ClaimId, slot: int, survey: Survey) -> None:
        self._survey, self._retention, self._dropped = survey, None, []
        head = survey.head
        self._count = head.count if isinstance(head, Commit) and head.stamp.claim == claim else 0
        self._first, self._last = slot, slot
        self._claim = claim  # last: an interrupt before it leaves us outside, not half inside

    def _fence_if_confirmed(self, survey: Survey) -> StaleAttemptError | LogMoved:
        """What to raise when the newest record is another attempt's: stale, if it is the newest indeed."""
        try:
            self.reader.expect_top(survey.view)
        except LogMoved as moved:
            return moved
        return self._fence(survey.newest)

    # --- adding records ------------------------------------------------------------------------

    def next_payload_key(self, save_nonce: str, suffix: str) -> str:
        """A key that no other save ever uses."""
        assert self._claim is not None
        self._number += 1
        return payload_key(self._claim.slot, self._claim.nonce, self._number, save_nonce, suffix)

    @property
    def holds(self) -> bool:
        """Whether this process has claimed or joined."""
        return self._claim is not None

    def commit(self, save_nonce: str, content: Content, stored: Stored, stop: Stop) -> Commit:
        """Makes a checkpoint exist. Its payload is complete and durable already.

        Raises:
            StaleAttemptError: A newer attempt has the task; the payload is removed.
            CommitUnknownError: The store did not tell; the next save of this process settles it.
        """

        def build(slot: int) -> Commit:
            assert self._claim is not None
            plan = self._retained().plan(slot, protected=self._protected())
            return Commit(
                self._stamp(slot, self._claim, save_nonce),
                content=content,
                stored=stored,
                previous=plan.previous,
                resumed_from=self.resumed_from.slot if self.resumed_from else None,
                count=self._count + 1,
                floor=plan.floor,
                kept=plan.kept,
            )

        try:
            commit = self._append(build, stop)
        except StaleAttemptError:
            if stored.key is not None and not self._names_have_nonces:
                self._delete_quietly([stored.key])
            raise
        self._adopt(commit)
        self._settle(commit.stamp.slot)
        self._delete_dead_records()
        self._sweep()
        return commit

    def clear(self, stop: Stop) -> None:
        """Everything saved so far exists no more: first the record says so, then it is deleted."""
        # Listed before the record exists: a child that joins after it may upload while we delete.
        doomed = self._store.list_below(DATA).names
        cleared = self._append(lambda slot: Clear(self._stamp(slot, self._own_claim(), new_nonce())), stop)
        known = self._retained().cleared()
        sole_writer = self._first == self._own_claim().slot and cleared.stamp.slot == self._last
        keys = [kept.key for kept in known if kept.key is not None]
        # Below our claim all is dead; below the one after it too, unless a child of ours may be uploading.
        below = self._own_claim().slot + (1 if sole_writer else 0)
        keys += dead_payloads((f"{DATA}/{name}" for name in doomed), claim_slot=below, above=0, living=set())
        self.resumed_from = None
        self._drop(known)
        self._delete_quietly(sorted(set(keys)))
        self._delete_dead_records()

    def _append(self, build: Callable[[int], RecordT], stop: Stop) -> RecordT:
        for _ in range(MAX_ROUNDS):
            record = build(self._last + 1)
            holder = self._create_settling(record, stop)
            if holder is None or holder.stamp.nonce == record.stamp.nonce:
                self._last = max(self._last, record.stamp.slot)
                return record
            if holder.stamp.claim.nonce != self._nonce:
                raise self._fence(holder)
            if holder.stamp.writer == self._writer:
                # An earlier save of ours whose outcome we never heard, or one from a signal handler just now.
                self._last = max(self._last, holder.stamp.slot)
                if isinstance(holder, Commit):
                    self._adopt(holder)
                    self._settle(holder.stamp.slot, but=holder)
                elif isinstance(holder, Clear):
                    self._drop(self._retained().cleared())
                continue
            self._rejoin(stop)
        raise self._crowded()

    def _create_settling(self, record: RecordT, stop: Stop) -> Record | None:
        try:
            return self._create(record, stop)
        except StorageFullError:
            raise
        except UnavailableError as error:
            self._late_slots.add(record.stamp.slot)
            if isinstance(record, Commit):
                self._unsettled.append(record)
            raise CommitUnknownError(
                f"The store never told whether slot {record.stamp.slot} was written: {error.message}",
                uri=error.uri,
                hint="Nothing saved before is lost. Save again: that settles it.",
            ) from error

    def _create(self, record: Record, stop: Stop) -> Record | None:
        """Creates a record; None if it is there now, else whichever record has its slot."""
        slot = record.stamp.slot
        name = SlotName(slot, record.stamp.nonce if self._names_have_nonces else None)
        try:
            self._store.create(slot_key(slot, name.nonce), _records.encode(record), stop)
        except AlreadyExistsError:
            return self._holder(name, stop)
        self.reader.remember(name, record)
        return self._rival(slot, name) if self._names_have_nonces else None

    def _holder(self, name: SlotName, stop: Stop) -> Record:
        for number in range(SETTLE_TRIES):
            try:
                return self.reader.read(name)
            except NotFoundError:  # "exists already", and yet it does not: undecided, so look again
                stop.sleep(0.05 * 2**number)
            except CorruptCheckpointError as error:
                raise self._unreadable_top(name.slot) from error
        raise UnavailableError(f"Slot {name.slot} is taken, and yet there is no record in it.", uri=self._store.uri)

    def _rival(self, slot: int, own: SlotName) -> Record | None:
        """Without a conditional create: has anyone else written at or above the slot that we just wrote?"""
        view = self.reader.look()
        for name in (name for taken in reversed(view.slots) if taken >= slot for name in view.names[taken]):
            if name != own:
                rival = self.reader.read(name)
                if rival.stamp.claim.nonce != self._nonce:
                    return rival
        return None

    def _rejoin(self, stop: Stop) -> None:
        """A child process of ours wrote meanwhile: go on above it."""
        for number in range(MAX_ROUNDS):
            try:
                survey = self.reader.survey(self.reader.look())
                if survey.owner is None or survey.owner.nonce != self._nonce:
                    raise self._fence_if_confirmed(survey)
                if self._join(survey, stop) is not None:
                    return
            except LogMoved:
                continue
            # Two processes that save all the time could join past each other for ever.
            stop.sleep(random.uniform(0, 0.001 * 2 ** min(number, 8)))  # noqa: S311 - jitter, no secret
        raise self._crowded()

    # --- what stays and what goes --------------------------------------------------------------

    def _retained(self) -> Retention:
        if self._retention is None:
            assert self._survey is not None
            self._retention = self._inherit(self._survey)
        return self._retention

    def _inherit(self, survey: Survey) -> Retention:
        """What earlier writers left: as many commits as this one keeps, read from the newest downwards."""
        head = survey.head
        if not isinstance(head, Commit):
            return Retention(self._keep)
        chain, pinned = [Kept.of(head)], list[Kept]()
        wanted = 1 if self._keep is None else self._keep - 1
        try:
            for found in self.reader.walk(survey.view):
                if isinstance(found, Damaged):
                    self._swept = True  # never delete what we do not know
                if not isinstance(found, Commit) or found.stamp.slot >= head.stamp.slot:
                    continue
                if len(chain) >= wanted and not head.kept:
                    break
                (pinned if found.stamp.slot < head.floor else chain).append(Kept.of(found))
        except LogMoved:
            self._swept = True
        return Retention(self._keep, chain, head.floor, pinned)

    def _protected(self) -> Kept | None:
        """What must stay although it may be old: the state resumed from, until two own commits exist."""
        if self._count >= 1:
            return None
        head = self._survey.head if self._survey else None
        return self.resumed_from or (Kept.of(head) if isinstance(head, Commit) else None)

    def _adopt(self, commit: Commit) -> None:
        """Our commit exists: what it retains no more is deleted."""
        if commit.stamp.slot <= self._adopted:
            return  # a save from a signal handler came in between, and met this one
        self._adopted = commit.stamp.slot
        dropped = self._retained().committed(commit, protected=self._protected())
        self._count = commit.count
        self._drop(dropped)
        self._delete_quietly([kept.key for kept in dropped if kept.key is not None])

    def _drop(self, kept: list[Kept]) -> None:
        """Notes records of ours that may be deleted later; a late request must not find its slot empty."""
        self._dropped += [one.slot for one in kept if one.slot > self._first and one.slot not in self._late_slots]

    def _settle(self, slot: int, but: Commit | None = None) -> None:
        """A slot is filled: earlier saves that might have got it did not, so their payloads go."""
        lost = [record for record in self._unsettled if record.stamp.slot <= slot and record != but]
        self._unsettled = [record for record in self._unsettled if record.stamp.slot > slot]
        self._delete_quietly([record.stored.key for record in lost if record.stored.key is not None])

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
        if self._keep is None and isinstance(survey.head, Commit):
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

    # --- small things --------------------------------------------------------------------------

    def _own_claim(self) -> ClaimId:
        assert self._claim is not None
        return self._claim

    def _stamp(self, slot: int, claim: ClaimId, nonce: str) -> Stamp:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        return Stamp(slot, claim, self._writer, nonce, now, self._about)

    def _fence(self, record: Record | None) -> StaleAttemptError:
        about = {} if record is None else record.stamp.about
        if record is not None and all(about.get(word) == self._about.get(word) for word in ("host", "pid")):
            self._fenced_by = "Another Checkpoint object of this very process took the task over; this one is stale."
            self._fenced_hint = (
                "Make one Checkpoint and share it; to look at a task without taking it over: read_only=True."
            )
            return self._stale()
        who = "" if record is None else f" ({_who(record)})"
        self._fenced_by = f"A newer attempt took this task over{who}; this one can save no more."
        self._fenced_hint = "Let this process end; do not retry it."
        return self._stale()

    def _stale(self) -> StaleAttemptError:
        assert self._fenced_by is not None
        return StaleAttemptError(self._fenced_by, uri=self._store.uri, hint=self._fenced_hint)

    def _refuse_if_fenced(self) -> None:
        if self._fenced_by is not None:
            raise self._stale()

    def _unreadable_top(self, slot: int) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"The record in slot {slot} cannot be read, so nobody can tell whether this attempt still has the task.",
            uri=f"{self._store.uri}/{slot_key(slot)}",
            hint="Start a new attempt: it claims the task anew and goes on from the newest good checkpoint.",
        )

    def _crowded(self) -> UnavailableError:
        return UnavailableError(
            f"Other processes were quicker {MAX_ROUNDS} times in a row.",
            uri=self._store.uri,
            hint="Try again.",
        )


def _is_dead(key: str, claim_slot: int) -> bool:
    """Whether a half-written object belongs to a claim below ours, or would fill a slot up to our claim's.

    Our claim's own slot too: the attempt before us may have been killed at a record for the very same slot.
    """
    claim = claim_of_payload(key)
    if claim is not None:
        return claim[0] < claim_slot
    name = parse_slot_name(key.rpartition("/")[2])
    return name is not None and name.slot <= claim_slot


def _who(record: Record) -> str:
    about = record.stamp.about
    parts = [f"{word} {about[word]}" for word in ("attempt", "host", "pid") if about.get(word) is not None]
    return ", ".join([*parts, record.stamp.time])


def _fenced_by(owner: ClaimId | None) -> tuple[str, ...]:
    return () if owner is None else (owner.nonce, *owner.fenced)[:MAX_FENCED]


def _merged(first: tuple[str, ...], then: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *then)))[:MAX_SOURCES]
