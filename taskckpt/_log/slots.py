"""Filling the slots of a task's log: claim, join, and add records behind one's own last one.

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
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from taskckpt._layout import SlotName, slot_key
from taskckpt._log import records as _records
from taskckpt._log.history import Damaged, LogMoved, LogReader, Survey, View
from taskckpt._log.records import Claim, ClaimId, Clear, Commit, Join, Record, Stamp
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


class SlotWriter:
    """One process's place in a task's log. Not thread-safe: the caller holds a lock.

    Args:
        claim_nonce: Names the attempt; its child processes share it.
        about: Said in every record, for people.
        sources: Where the task's state comes from if this log has none.
        stale: What is raised once a newer attempt has the task.
    """

    def __init__(
        self,
        store: Store,
        *,
        claim_nonce: str,
        about: Mapping[str, Any],
        sources: tuple[str, ...] = (),
        stale: type[StaleAttemptError] = StaleAttemptError,
    ) -> None:
        self.reader = LogReader(store)
        self._store = store
        self._nonce = claim_nonce
        self._about = about
        self._sources = sources
        self._stale_error = stale
        self._writer = new_nonce()
        self._claim: ClaimId | None = None
        self._first = self._last = 0
        self._names_have_nonces = False
        self._seen_top: int | None = None
        self._fenced_by: str | None = None
        self._fenced_hint = ""
        self._survey: Survey | None = None
        self._late_slots: set[int] = set()  # a request that was given up may still be on its way there

    # --- what the records mean is another room's: see TaskLog ----------------------------------

    def _took_over(self, claim: ClaimId, survey: Survey) -> None:
        """A claim or a join has succeeded, and the log was like that."""
        raise NotImplementedError

    def _met_own(self, record: Record) -> None:
        """An earlier record of this writer, whose outcome was unknown, has its slot."""
        raise NotImplementedError

    def _lost_sight_of(self, record: Record) -> None:
        """Nobody told whether this record has its slot."""
        raise NotImplementedError

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
        self._meet_own(view)
        return view

    def _meet_own(self, view: View) -> None:
        """Records of this writer whose outcome was unknown, and that are there: known before anything is decided."""
        while self._last < view.top:
            found = self.reader.read_slot(view, self._last + 1)
            own = [one for one in found if not isinstance(one, Damaged) and one.stamp.writer == self._writer]
            if not own:
                return
            self._last += 1
            self._met_own(own[0])

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
            continues_from=merged(self._sources, survey.continues_from),
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
        self._begin(claim_id, slot, replace(survey, view=view))
        logger.debug("Claimed %s in slot %d.", self._store.uri, slot)
        return view

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
        self._begin(survey.owner, slot, replace(survey, view=view))
        logger.debug("Joined %s in slot %d.", self._store.uri, slot)
        return view

    def _begin(self, claim: ClaimId, slot: int, survey: Survey) -> None:
        self._took_over(claim, survey)
        self._survey, self._first, self._last = survey, slot, slot
        self._claim = claim  # last: an interrupt before it leaves us outside, not half inside

    def _fence_if_confirmed(self, survey: Survey) -> StaleAttemptError | LogMoved:
        """What to raise when the newest record is another attempt's: stale, if it is the newest indeed."""
        try:
            self.reader.expect_top(survey.view)
        except LogMoved as moved:
            return moved
        return self._fence(survey.newest)

    @property
    def holds(self) -> bool:
        """Whether this process has claimed or joined."""
        return self._claim is not None

    # --- adding records ------------------------------------------------------------------------

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
                self._met_own(holder)
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
            self._lost_sight_of(record)
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
        else:
            who = "" if record is None else f" ({_who(record)})"
            self._fenced_by = f"A newer attempt took this task over{who}; this one can save no more."
            self._fenced_hint = "Let this process end; do not retry it."
        error = self._stale()
        # An engine that sees by the error's type that it must not retry may say no word of it.
        logger.warning("%s", error)
        return error

    def _stale(self) -> StaleAttemptError:
        assert self._fenced_by is not None
        return self._stale_error(self._fenced_by, uri=self._store.uri, hint=self._fenced_hint)

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


def _who(record: Record) -> str:
    about = record.stamp.about
    parts = [f"{word} {about[word]}" for word in ("attempt", "host", "pid") if about.get(word) is not None]
    return ", ".join([*parts, record.stamp.time])


def _fenced_by(owner: ClaimId | None) -> tuple[str, ...]:
    return () if owner is None else (owner.nonce, *owner.fenced)[:MAX_FENCED]


def merged(first: tuple[str, ...], then: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *then)))[:MAX_SOURCES]
