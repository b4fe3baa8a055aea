"""Which checkpoints stay, and which objects may go once that is decided. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from taskckpt._layout import claim_of_payload
from taskckpt._log.records import Commit

# Records this close to the top of the log are never deleted, nor are claims and joins: no writer may
# ever find the slot after its own last one empty unless that is the end of the log.
GUARDED_SLOTS = 64
RECORD_BATCH = 32


@dataclass(frozen=True, slots=True)
class Kept:
    """A commit that is still there: its slot, and its payload's key if it has one."""

    slot: int
    key: str | None

    @classmethod
    def of(cls, commit: Commit) -> Kept:
        return cls(commit.stamp.slot, commit.stored.key)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a new commit says about those before it."""

    previous: int | None
    floor: int
    kept: tuple[int, ...]


class Retention:
    """The commits that one writer knows of, newest first, and how many of them to keep.

    Args:
        keep: The newest so many commits stay; None keeps all.
        inherited: The retained commits found at the claim or join, newest first.
        floor: The floor of the newest of them.
        pinned: Commits below that floor that it kept.
    """

    def __init__(
        self, keep: int | None, inherited: Iterable[Kept] = (), floor: int = 0, pinned: Iterable[Kept] = ()
    ) -> None:
        self._keep = keep
        self._chain = list(inherited)
        self._floor = floor
        self._pinned = {commit.slot: commit for commit in pinned}

    @property
    def newest(self) -> int | None:
        return self._chain[0].slot if self._chain else None

    def keys(self) -> set[str]:
        """The payloads of all retained commits."""
        return {commit.key for commit in (*self._chain, *self._pinned.values()) if commit.key is not None}

    def plan(self, slot: int, *, protected: Kept | None) -> Plan:
        """What a commit in ``slot`` retains: the newest ones, and ``protected`` in any case."""
        if self._keep is None:
            return Plan(self.newest, self._floor or slot, tuple(sorted(self._pinned, reverse=True)))
        window = [slot, *(commit.slot for commit in self._chain[: self._keep - 1])]
        floor = min(window)
        kept = (protected.slot,) if protected is not None and protected.slot < floor else ()
        return Plan(self.newest, floor, kept)

    def committed(self, commit: Commit, *, protected: Kept | None) -> list[Kept]:
        """Takes a commit in that exists now; gives those that are retained no more."""
        before = [*self._chain, *self._pinned.values()]
        self._floor = commit.floor
        self._chain = [Kept.of(commit), *(old for old in self._chain if old.slot >= commit.floor)]
        if self._keep is None:
            del self._chain[1:]  # all of them stay, so only the newest is ever asked for
            return []
        known = {old.slot: old for old in before} | ({protected.slot: protected} if protected else {})
        self._pinned = {slot: known[slot] for slot in commit.kept if slot in known}
        return [old for old in known.values() if old.slot < commit.floor and old.slot not in commit.kept]

    def cleared(self) -> list[Kept]:
        """Forgets everything; gives what was there."""
        gone = [*self._chain, *self._pinned.values()]
        self._chain, self._pinned, self._floor = [], {}, 0
        return gone


def dead_payloads(keys: Iterable[str], *, claim_slot: int, above: int, living: set[str]) -> list[str]:
    """Payloads of claims lower than our own that no retained commit names.

    Attempts with a lower claim can commit no more, so what they left without a commit is garbage.
    Only claims from slot ``above`` on are looked at. Keys that are not ours are left alone.
    """
    dead = []
    for key in keys:
        claim = claim_of_payload(key)
        if claim is not None and above <= claim[0] < claim_slot and key not in living:
            dead.append(key)
    return dead


def dead_records(own_dropped: list[int], *, first: int, last: int) -> list[int]:
    """Those of a writer's own dropped commits whose records may be deleted now.

    ``first`` to ``last`` is the run of slots that this writer filled without anyone else in between,
    so both neighbours of any slot strictly inside are its own.
    """
    return [slot for slot in own_dropped if first < slot <= last - GUARDED_SLOTS]
