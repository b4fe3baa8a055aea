"""Which checkpoints stay, and which objects may go once that is decided. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from taskckpt._keep import KeepPolicy, LatestN, decide
from taskckpt._layout import claim_of_payload
from taskckpt._log.records import Commit, Lineage

# Records this close to the top of the log are never deleted, nor are claims and joins: no writer may
# ever find the slot after its own last one empty unless that is the end of the log.
GUARDED_SLOTS = 64
RECORD_BATCH = 32


NOTHING: Mapping[int, str] = {}
# Of a commit that goes on from all that were before it.
UNBROKEN = Lineage()


@dataclass(frozen=True, slots=True)
class Kept:
    """A commit that is still there, as far as it matters for what stays.

    Attributes:
        keys: Its payload and its positions, as far as they lie in objects.
        original: The slot of the commit that first had this payload.
    """

    slot: int
    keys: tuple[str, ...]
    original: int
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, commit: Commit) -> Kept:
        return cls(commit.stamp.slot, commit.keys, commit.original, commit.notes.step, commit.notes.metrics)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a new commit says about those before it."""

    floor: int
    kept: tuple[int, ...]


class Retention:
    """The commits that one writer knows of, newest first, and which of them stay.

    Args:
        policy: What stays; None: everything.
        head: The newest commit that was found at the claim or join.
        older: The other commits that it retains, newest first. Not needed where everything stays.
        unknown: Those that it retains and that cannot be read: they stay.
    """

    def __init__(
        self,
        policy: KeepPolicy | None,
        head: Commit | None = None,
        older: Iterable[Kept] = (),
        unknown: Iterable[int] = (),
    ) -> None:
        self._policy = policy
        self._known = [] if head is None else [Kept.of(head), *older]
        self._unknown = tuple(unknown)
        self._floor, self._below = (0, ()) if head is None else (head.floor, head.kept)
        self.pinned: tuple[int, ...] = () if head is None else head.pinned

    def __len__(self) -> int:
        """How many commits are known."""
        return len(self._known)

    @property
    def newest(self) -> int | None:
        """The slot of the newest commit, if there is one."""
        return self._known[0].slot if self._known else None

    def keys(self) -> set[str]:
        """The objects of all commits that are known, which are all that stay, unless everything does."""
        return {key for commit in self._known for key in commit.keys}

    def slots_after(self, slot: int) -> list[int]:
        """The known commits above a slot, ascending."""
        return [commit.slot for commit in reversed(self._known) if commit.slot > slot]

    def plan(
        self, new: Kept, pinned: Collection[int], protected: Mapping[int, str] = NOTHING, lineage: Lineage = UNBROKEN
    ) -> Plan:
        """What a commit retains that adds a checkpoint: what the policy says, and what is pinned or ``protected``.

        Both are told by their original slots; of what is protected, why. Of several commits that repeat one checkpoint,
        one stays: an ancestor if there is one.
        """
        if self._policy is None:
            return self.plan_all(new)
        if isinstance(self._policy, LatestN) and not protected and self._is_plain:
            return Plan(
                new.slot, _descending((*self._unknown, *(one.slot for one in self._known[: self._policy.n - 1])))
            )
        stay = set(self.reasons(new, pinned, protected, lineage)) - {new.slot}
        return Plan(new.slot, _descending(stay.union(self._unknown)))

    @property
    def _is_plain(self) -> bool:
        """Whether nothing is pinned or repeated, so that the newest are simply the first."""
        return not self.pinned and all(one.original == one.slot for one in self._known)

    def plan_all(self, new: Kept) -> Plan:
        """What a commit retains that only repeats another one: everything, but for the newest if it repeats that."""
        if self._policy is None:
            return Plan(self._floor or new.slot, self._below)
        stay = {one.slot for one in self._known if one.original != new.original or one.slot != self.newest}
        return Plan(new.slot, _descending(stay.union(self._unknown)))

    def reasons(
        self, new: Kept, pinned: Collection[int], protected: Mapping[int, str] = NOTHING, lineage: Lineage = UNBROKEN
    ) -> dict[int, str]:
        """Why each one stays that does, ``new`` among them."""
        if self._policy is None:
            return dict.fromkeys((new.slot, *(one.slot for one in self._known)), "all are kept")
        chosen = {one.original: one for one in sorted(self._known, key=lambda one: (lineage.has(one.slot), one.slot))}
        chosen[new.original] = new
        known = sorted(chosen.values(), key=lambda one: -one.slot)
        reasons = {one.slot: protected[one.original] for one in known if one.original in protected}
        reasons |= {one.slot: "pinned" for one in known if one.original in pinned}
        return reasons | decide(self._policy, known)

    def committed(self, commit: Commit) -> list[Kept]:
        """Takes a commit in that exists now; gives those that are retained no more."""
        self.pinned = commit.pinned
        if self._policy is None:
            if not self._known:
                self._floor, self._below = commit.floor, commit.kept
            self._known = [Kept.of(commit)]  # all of them stay, so only the newest is ever asked for
            return []
        stays, gone = [Kept.of(commit)], list[Kept]()
        for one in self._known:
            (stays if commit.retains(one.slot) else gone).append(one)
        self._known = stays
        return gone

    def cleared(self) -> list[Kept]:
        """Forgets everything; gives what was known."""
        gone, self._known = self._known, []
        self._unknown, self._below, self._floor, self.pinned = (), (), 0, ()
        return gone


def _descending(slots: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(slots, reverse=True))


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
