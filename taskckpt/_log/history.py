"""Reading a task's log: which records there are, and what a load finds in them. Never writes."""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from taskckpt._layout import LOG, SlotName, parse_slot_name, slot_key
from taskckpt._log import records as _records
from taskckpt._log.records import Claim, ClaimId, Clear, Commit, Join, Record
from taskckpt._operation import ordered_map
from taskckpt._stores import Store
from taskckpt.errors import CorruptCheckpointError, NotFoundError

# Records never change, so what was read once need not be read again. A few are enough: the claim,
# the head, and the commits that a first save looks at.
CACHED_RECORDS = 16
# So many records are read one after the other: threads would cost more than they save.
FEW_RECORDS = 4
READ_THREADS = 16


class LogMoved(Exception):  # noqa: N818 - a signal between two rooms, never an error to users
    """Records came and went between listing and reading; caught by whoever listed, who lists again."""


@dataclass(frozen=True, slots=True)
class View:
    """One listing of a log.

    ``names`` maps a slot to its records' names: one, except on stores without a conditional create.
    ``slots`` is ascending. Unless ``complete``, only the newest records are in it.
    """

    names: dict[int, tuple[SlotName, ...]]
    slots: tuple[int, ...]
    complete: bool

    @property
    def has_nonces(self) -> bool:
        """Whether some writer found that this store has no conditional create."""
        return any(name.nonce is not None for names in self.names.values() for name in names)

    @property
    def top(self) -> int:
        """The newest slot; 0 where the log is empty."""
        return self.slots[-1] if self.slots else 0

    def below(self, slot: int) -> int | None:
        """The next lower slot that has a record."""
        index = bisect.bisect_left(self.slots, slot)
        return self.slots[index - 1] if index else None


@dataclass(frozen=True, slots=True)
class Damaged:
    """A record that cannot be read, in place of what it would have said."""

    slot: int
    error: CorruptCheckpointError
    torn: bool = False


Found: TypeAlias = Record | Damaged


@dataclass(frozen=True, slots=True)
class Survey:
    """What a writer needs to know of the log before it adds to it.

    Attributes:
        newest: The newest record that can be read, if any; the task belongs to its claim.
        head: The newest commit or clear, if any can be read.
        unreadable: Slots above ``head`` whose records could not be read, newest first.
        continues_from: Where the payload comes from, if not from the head: as that or the newest claim says.
    """

    view: View
    newest: Record | None = None
    head: Commit | Clear | None = None
    unreadable: tuple[int, ...] = ()
    continues_from: tuple[str, ...] = ()

    @property
    def owner(self) -> ClaimId | None:
        return None if self.newest is None else self.newest.stamp.claim


class LogReader:
    """The log below one store root."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._cache: OrderedDict[SlotName, Record] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._torn: set[SlotName] = set()

    def look(self, *, first_page: bool = True) -> View:
        """A fresh listing; by default only of the newest records where the store can stop early."""
        listing = self.store.list_below(LOG, first_page=first_page)
        names: dict[int, tuple[SlotName, ...]] = {}
        for text in listing.names:
            name = parse_slot_name(text)
            if name is not None:  # other files may lie there (.nfs..., backups): not ours, not read
                names[name.slot] = (*names.get(name.slot, ()), name)
        if not listing.complete and (not names or any(name.nonce for same in names.values() for name in same)):
            # None of ours on that page; or the names of those below cannot be told from their slots.
            return self.look(first_page=False)
        return View(names, tuple(sorted(names)), listing.complete)

    def remember(self, name: SlotName, record: Record) -> None:
        with self._cache_lock:
            self._cache[name] = record
            self._cache.move_to_end(name)
            while len(self._cache) > CACHED_RECORDS:
                self._cache.popitem(last=False)

    def read(self, name: SlotName) -> Record:
        """One record.

        Raises:
            NotFoundError: There is none in that slot.
            CorruptCheckpointError: It is damaged, and was so again when read a second time.
            UnsupportedFormatError: A newer taskckpt wrote it.
        """
        cached = self._cache.get(name)
        if cached is not None:
            return cached
        key = slot_key(name.slot, name.nonce)
        uri = f"{self.store.uri}/{key}"
        try:
            record = _records.decode(self.store.read(key), slot=name.slot, uri=uri)
        except CorruptCheckpointError:  # a bit may have flipped on the way, not at rest
            data = self.store.read(key)
            if not data.endswith(b"}\n"):
                self._torn.add(name)
            record = _records.decode(data, slot=name.slot, uri=uri)
        self.remember(name, record)
        return record

    def read_slot(self, view: View, slot: int) -> list[Found]:
        """All records of a slot, newest first; one Damaged where a record should be and is not."""
        found: list[Found] = []
        for name in sorted(
            view.names.get(slot, (SlotName(slot, None),)), key=lambda name: name.nonce or "", reverse=True
        ):
            try:
                found.append(self.read(name))
            except CorruptCheckpointError as error:
                found.append(Damaged(slot, error, torn=name in self._torn))
            except NotFoundError as error:
                if self.look().top > view.top:
                    raise LogMoved from error
                missing = CorruptCheckpointError(f"Record {slot} is missing.", uri=error.uri)
                found.append(Damaged(slot, missing))
        return found

    def read_slots(self, view: View, slots: Iterable[int]) -> Iterable[list[Found]]:
        """``read_slot`` of many slots, in parallel."""
        slots = list(slots)
        if len(slots) <= FEW_RECORDS:
            return [self.read_slot(view, slot) for slot in slots]
        return ordered_map(lambda slot: self.read_slot(view, slot), slots, threads=READ_THREADS)

    def expect_top(self, view: View) -> None:
        """Raises LogMoved unless the log still ends where the view does.

        While a record was on its way, its slot may have been pruned (64 slots further on) and filled again
        by a claim that came too late: such a claim knows nothing of what was saved meanwhile.
        """
        if self.look().top != view.top:
            raise LogMoved

    def walk(self, view: View, *, confirm: bool = False) -> Iterator[Found]:
        """What a load meets, newest first: it jumps from claims to their head, and ends at a clear.

        Of the commits, only those that the newest one retains are followed: others may be half deleted. And of
        those only its ancestors: nobody wants what was rolled back.
        With ``confirm``, a claim or join at the top is believed only after a second listing. (A writer lists
        again anyway, and commits are never pruned from slots that a late commit could fill.)
        """
        known = {name for name in view.names.get(view.top, ()) if name in self._cache}
        pending = {view.top} if view.top else set()
        seen: set[int] = set()
        newest: Commit | None = None
        while pending:
            slot = max(pending)
            pending.discard(slot)
            if slot in seen:
                continue
            seen.add(slot)
            for found in self.read_slot(view, slot):
                if confirm and not known and slot == view.top and isinstance(found, (Claim, Join)):
                    self.expect_top(view)
                if isinstance(found, Commit):
                    newest = newest or found
                    if not _is_living_ancestor(newest, found.stamp.slot):
                        continue
                yield found
                if isinstance(found, Clear):
                    return
                pending |= self._next(view, found, newest)

    def _next(self, view: View, found: Found, newest: Commit | None) -> set[int]:
        match found:
            case Claim() | Join():
                # A join leads to its claim too, which says where the task comes from.
                below = {slot for slot in (found.head, *found.unreadable) if slot is not None}
                return below | ({found.stamp.claim.slot} if isinstance(found, Join) else set())
            case Commit():
                newest = newest or found
                older = (found.previous, *newest.kept)
                return {s for s in older if s is not None and s < found.stamp.slot and _is_living_ancestor(newest, s)}
            case Damaged():
                lower = view.below(found.slot)
                if lower is None and not view.complete:
                    lower = self.look(first_page=False).below(found.slot)
                return set() if lower is None else {lower}
            case Clear():
                return set()

    def survey(self, view: View, *, confirm: bool = False) -> Survey:
        """The log as a writer sees it. Raises LogMoved if records went away meanwhile."""
        newest: Record | None = None
        unreadable: list[int] = []
        continues_from: tuple[str, ...] = ()
        for found in self.walk(view, confirm=confirm):
            if isinstance(found, Damaged):
                unreadable.append(found.slot)
                continue
            newest = newest or found
            if isinstance(found, (Commit, Clear)):
                continues_from = found.continues_from if isinstance(found, Commit) else ()
                return Survey(view, newest, found, tuple(unreadable), continues_from)
            if isinstance(found, Claim):
                continues_from = continues_from or found.continues_from
        return Survey(view, newest, None, tuple(unreadable), continues_from)

    def sources(self, view: View, *, at_most: int) -> tuple[str, ...]:
        """Where the newest claim that says so comes from; looks at no more than ``at_most`` records."""
        if not view.complete and len(view.slots) < at_most:
            view = self.look(first_page=False)
        for slot in view.slots[::-1][:at_most]:
            for found in self.read_slot(view, slot):
                if isinstance(found, Claim) and found.continues_from:
                    return found.continues_from
        return ()


def _is_living_ancestor(newest: Commit, slot: int) -> bool:
    return newest.retains(slot) and newest.lineage.has(slot)
