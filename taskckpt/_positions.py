"""Where the iterates of a task stand: those whose loops run in this process, and those that others left."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol, TypeAlias, cast

from taskckpt._sources import Mark
from taskckpt.errors import IdentityMismatchError, UnsupportedFormatError, UsageError

# What is stored of one iterate: a dict that the codec of states can store.
Position: TypeAlias = dict[str, Any]

# In the body of which item a loop was begun: the name, the epoch and the items done of each loop around it.
Inside: TypeAlias = list[list[Any]]


class Running(Protocol):
    """A loop that has begun and not ended."""

    @property
    def inside(self) -> Inside:
        """The items in whose body it was begun."""
        ...

    @property
    def reached(self) -> tuple[int, int]:
        """Its epoch, and how many items of it are done."""
        ...

    @property
    def is_here(self) -> bool:
        """Whether this code runs in its body."""
        ...

    @property
    def commits_itself(self) -> bool:
        """Whether its position is committed without a save."""
        ...

    def position(self) -> Position | None:
        """Where it stands: the item that is out is not done. None if it was overtaken. Any thread may ask."""
        ...

    def position_here(self) -> Position | None:
        """Where it stands when the item that is out is done; None if this code does not run in its body."""
        ...

    def compare(self, adopted: Position | None) -> None:
        """The task has this position now: if that is not where this loop stands, it is overtaken."""
        ...

    def overtake(self) -> None:
        """The task is elsewhere now: this loop gives no more items, and what it leaves does not count."""
        ...

    def expect_in_place(self) -> None:
        """Raises UsageError in the thread or the body of a loop that was overtaken."""
        ...


class Positions:
    """The positions of a task's iterates, by name. Threads may share it.

    It has no lock, because a signal handler may save between any two lines here: what counts is done in single steps
    of a dict. A forked child and a pickled copy have what was true at that moment, and share nothing afterwards.
    """

    def __init__(self) -> None:
        self._left: dict[str, dict[str, Position]] = {}  # empty until it is known what earlier loops left
        self._running: dict[str, Running] = {}
        self._places: dict[str, Hashable] = {}
        self.is_payload_unread = False  # of the checkpoint that these positions come from
        self._committed: set[str] = set()
        self._ended: set[str] = set()

    # --- for Checkpoint ------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Position] | None:
        """What a save that begins here and now carries; None if this process knows of no iterate at all.

        To be called in the thread, and in the asyncio task, that saves: the item in whose body that is counts as done.
        What other threads do until the commit comes again, even if they have committed it by then: the payload, which
        is as old as this, may lack it.

        Raises:
            UsageError: This is the thread or the body of a loop that was overtaken.
        """
        if not self._left:
            return None
        running = self._in_place()
        now = self._now(running)
        here = {name: position for name, loop in running.items() if (position := loop.position_here()) is not None}
        return now | here

    def _in_place(self) -> dict[str, Running]:
        running = self._running.copy()
        for loop in running.values():
            loop.expect_in_place()
        return running

    def _now(self, running: dict[str, Running]) -> dict[str, Position]:
        # Who runs comes first: a loop that ends leaves its position before it runs no more.
        found = {name: position for name, loop in running.items() if (position := loop.position()) is not None}
        return self._left[""] | found

    def adopt(self, found: Mapping[str, Position]) -> None:
        """A checkpoint was loaded, with these. Loops that run and stand elsewhere are overtaken."""
        self._left[""] = dict(found)
        self._committed = set(found)
        self._ended.clear()
        self.is_payload_unread = False
        for name, loop in self._running.copy().items():
            loop.compare(found.get(name))

    def forget(self) -> None:
        """All was cleared. Loops that run are overtaken."""
        self.adopt({})
        for loop in self._running.copy().values():
            loop.overtake()

    # --- for loops -----------------------------------------------------------------------------

    @property
    def are_known(self) -> bool:
        """Whether it is known what earlier loops left."""
        return bool(self._left)

    def learn(self, found: Mapping[str, Position], *, is_payload_unread: bool = False) -> None:
        """The store has these, if that was not known yet; and beside them a payload that nobody has loaded."""
        if self._left.setdefault("", given := dict(found)) is given:
            self._committed = set(given)
            self.is_payload_unread = is_payload_unread

    def inside(self) -> Inside:
        """In the body of which items this code runs."""
        inside: Inside = []
        for name, loop in self._running.copy().items():
            if loop.is_here:
                inside += [one for one in [*loop.inside, [name, *loop.reached]] if one not in inside]
        return inside

    def is_still(self, inside: Inside) -> bool:
        """Whether those loops are at these items. (If not, the loop that was begun in there goes in step with them.)"""
        return all(self._reached(name) == (epoch, done) for name, epoch, done in inside)

    def _reached(self, name: str) -> tuple[Any, Any] | None:
        loop = self._running.get(name)
        if loop is not None:
            return loop.reached
        left = self._left.get("", {}).get(name)
        return None if left is None else reached_in(left)

    def now_at(self, name: str, inside: Inside) -> Position | None:
        """Where the loop of this name is, or the last one stopped. None: a loop in there begins at the start."""
        loop = self._running.get(name)
        position = None if loop is None else loop.position()
        left = self._left.get("", {}).get(name) if position is None else position
        return None if left is None or belongs_elsewhere(left, inside) else left

    def left_by(
        self, name: str, place: Hashable | None, identity: dict[str, object], inside: Inside
    ) -> Position | None:
        """Where the last loop of this name stopped; None if there was none, or in another item of the loops around.

        Args:
            name: Of the iterate.
            place: Of one that was given no name: where it is in the program, by which it is known again.
            identity: What it goes over.
            inside: In the body of which items it begins.

        Raises:
            UsageError: There is another one that was given no name, and it goes over something else, or still runs.
        """
        left = self._left.get("", {}).get(name)
        # Another place, but the same loop: in a cell that was edited, or written once more further down.
        goes_on = name not in self._running and (left is None or _is_surely_the_same(left, identity))
        if place is not None and self._places.setdefault(name, place) != place and not goes_on:
            raise UsageError(
                "Two iterates of this task have no name: they would share one position.",
                hint="Name them: cp.iterate(..., name='train') and cp.iterate(..., name='test'). "
                f"To go on with the one before: name={name!r}.",
            )
        if left is not None and belongs_elsewhere(left, inside):
            self._ended.discard(name)
            return None
        return left

    def enter(self, name: str, loop: Running) -> None:
        """A loop begins: from now on, saves ask it.

        Raises:
            UsageError: One of this name is running already.
        """
        if self._running.setdefault(name, loop) is not loop:
            raise UsageError(
                f"The iterate {name!r} is running already.",
                hint="Give those that run at the same time different names: cp.iterate(..., name='left').",
            )

    def between_items(
        self, name: str, position: Position | None, committed: Mapping[str, Position] | None
    ) -> dict[str, Position]:
        """What is committed by a loop itself: no item counts that is out, in whatever body this is.

        Args:
            name: Of that loop.
            position: What it has instead of where it stands.
            committed: What was committed with the payload that is committed again; None if there is none. Other loops
                stay there that only move on with saves: where they are now belongs to a payload that is to come.

        Raises:
            UsageError: As ``snapshot``.
        """
        running = self._in_place()
        now = self._now(running)
        if committed is not None:
            others = [other for other, loop in running.items() if other != name and not loop.commits_itself]
            now = {one: where for one, where in now.items() if one not in others}
            now |= {other: committed[other] for other in others if other in committed}
        return now if position is None else now | {name: position}

    def leave(self, name: str, position: Position | None, *, is_committed: bool) -> None:
        """A loop that had entered has ended; the next one of this name goes on from there. None: it was overtaken."""
        if position is not None:
            self._left.setdefault("", {})[name] = position
            (self._committed.add if is_committed else self._committed.discard)(name)
        del self._running[name]

    def is_committed(self, name: str) -> bool:
        """Whether the store has what the last loop of this name left."""
        return name in self._committed

    def expect_first_end(self, name: str) -> None:
        """A loop has got no items, because there are no more: the first one may, the next one would wonder why.

        Raises:
            UsageError: Another one has noted the end, and nothing was loaded since then.
        """
        if name in self._ended:
            raise UsageError(
                f"The iterate {name!r} has come to its end: this second loop over it would get no items.",
                hint="For several epochs: cp.iterate(..., epochs=3), or an iterate around it. "
                "For several loops: a name for each. To do all of it again: cp.clear().",
            )

    def note_end(self, name: str) -> None:
        """A loop has come to the end, and that is committed if it is to be."""
        self._ended.add(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copy, (self.snapshot(),)


def _copy(found: dict[str, Position] | None) -> Positions:
    positions = Positions()
    if found is not None:
        positions.learn(found)
    return positions


# --- what is stored of one ---------------------------------------------------------------------


def stored(epoch: int, done: int, mark: Mark | None, identity: dict[str, object], inside: Inside) -> Position:
    """A position, to be stored: so many items of an epoch are done, of a source that is known by its identity."""
    position: Position = {"source": identity, "epoch": epoch, "done": done}
    if inside:
        position["inside"] = inside
    if mark is not None:
        position |= {"state": mark.state, "state_after": mark.after}
    return position


def restored(position: Position, name: str, identity: dict[str, object], epochs: int) -> tuple[int, int, Mark | None]:
    """Epoch, items done and mark of a stored position, if it is one of this source.

    Raises:
        IdentityMismatchError: It is not, or it lies beyond ``epochs``.
    """
    mark: Mark | None = None
    match position:
        case {"source": dict(saved), "epoch": int(epoch), "done": int(done), "state": state, "state_after": int(after)}:
            mark = Mark(after, state)
        case {"source": dict(saved), "epoch": int(epoch), "done": int(done)} if "state" not in position:
            pass
        case _:
            raise UnsupportedFormatError(
                f"The position of the iterate {name!r} cannot be understood.",
                hint="A newer taskckpt wrote it: upgrade this one (pip install -U taskckpt).",
            )
    _expect_same(name, cast("dict[str, object]", saved), identity)
    if (epoch, done) > (epochs, 0):
        raise IdentityMismatchError(
            f"The iterate {name!r} is at item {done} of epoch {epoch}, counted from 0: that is beyond epochs={epochs}.",
            hint="More epochs than before are possible, fewer than were begun are not. To begin anew: cp.clear().",
        )
    return epoch, done, mark


def reached_in(position: Position) -> tuple[Any, Any]:
    """Its epoch, and how many items of it are done."""
    return position.get("epoch"), position.get("done")


def belongs_elsewhere(position: Position, inside: Inside) -> bool:
    """Whether it was left in another item of the same loops around: in this one, its loop begins anew."""
    then: Inside = position.get("inside", [])
    return then != inside and [name for name, *_ in then] == [name for name, *_ in inside]


def _is_surely_the_same(position: Position, identity: dict[str, object]) -> bool:
    says_something = identity["length"] is not None or identity["fingerprint"] is not None
    return says_something and position.get("source") == identity


def _expect_same(name: str, saved: dict[str, object], identity: dict[str, object]) -> None:
    differing = [key for key in {**saved, **identity} if saved.get(key) != identity.get(key)]
    if differing:
        raise IdentityMismatchError(
            f"The iterate {name!r} was saved over something else: "
            + "; ".join(f"{key} was {saved.get(key)!r}, and is {identity.get(key)!r}" for key in differing)
            + ".",
            hint="Go on with what it was. To begin anew: another name=, or cp.clear().",
        )
