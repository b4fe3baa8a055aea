"""Where the iterates of a task stand: those whose loops run in this process, and those that others left."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

from taskckpt._sources import Mark
from taskckpt.errors import IdentityMismatchError, UnsupportedFormatError, UsageError

# What is stored of one iterate: a dict that the codec of states can store.
Position: TypeAlias = dict[str, Any]


class Running(Protocol):
    """A loop that has begun and not ended."""

    def position(self) -> Position:
        """Where it stands: the item that is out is not done. Any thread may ask."""
        ...

    def position_here(self) -> Position | None:
        """Where it stands when the item that is out is done; None if this code does not run in its body."""
        ...

    def forget(self) -> None:
        """All was cleared."""
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
        self._committed: set[str] = set()
        self._ended: set[str] = set()

    # --- for Checkpoint ------------------------------------------------------------------------

    def snapshot(self) -> Callable[[], dict[str, Position]] | None:
        """What a save that begins here and now carries; None if this process knows of no iterate at all.

        To be called in the thread, and in the asyncio task, that saves: the item in whose body that is counts as done.
        Where all others are is told by what this returns, when it comes to the commit: by then other threads may have
        committed later ones.
        """
        if not self._left:
            return None
        running = self._running.copy()
        here = {name: position for name, loop in running.items() if (position := loop.position_here()) is not None}
        return partial(self._with, here)

    def _with(self, here: dict[str, Position]) -> dict[str, Position]:
        running = self._running.copy()  # first: a loop that ends leaves its position before it runs no more
        return self._left[""] | {name: loop.position() for name, loop in running.items()} | here

    def adopt(self, found: Mapping[str, Position]) -> None:
        """A checkpoint was loaded, with these. Loops that run go on from where they are."""
        self._left[""] = dict(found)
        self._committed = set(found)
        self._ended.clear()

    def forget(self) -> None:
        """All was cleared. Loops that run, and go on, do so from where they are."""
        self.adopt({})
        for loop in self._running.copy().values():
            loop.forget()

    # --- for loops -----------------------------------------------------------------------------

    @property
    def are_known(self) -> bool:
        """Whether it is known what earlier loops left."""
        return bool(self._left)

    def learn(self, found: Mapping[str, Position]) -> None:
        """The store has these, if that was not known yet."""
        if self._left.setdefault("", given := dict(found)) is given:
            self._committed = set(given)

    def left_by(self, name: str, place: Hashable | None) -> Position | None:
        """Where the last loop of this name stopped; None if there was none.

        Args:
            name: Of the iterate.
            place: Of one that was given no name: where it is in the program, by which it is known again.

        Raises:
            UsageError: There is another one that was given no name.
        """
        if place is not None and self._places.setdefault(name, place) != place:
            raise UsageError(
                "Two iterates of this task have no name: they would share one position.",
                hint="Name them: cp.iterate(..., name='train') and cp.iterate(..., name='test').",
            )
        return self._left.get("", {}).get(name)

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

    def leave(self, name: str, position: Position | None, *, is_committed: bool) -> None:
        """A loop that had entered has ended; the next one of this name goes on from there. None: from the start."""
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
                hint="For several epochs: cp.iterate(..., epochs=3). For several loops: a name for each. "
                "To do all of it again: cp.clear().",
            )

    def note_end(self, name: str) -> None:
        """A loop has come to the end, and that is committed if it is to be."""
        self._ended.add(name)

    def __reduce__(self) -> tuple[Any, ...]:
        look = self.snapshot()
        return _copy, (None if look is None else look(),)


def _copy(found: dict[str, Position] | None) -> Positions:
    positions = Positions()
    if found is not None:
        positions.learn(found)
    return positions


# --- what is stored of one ---------------------------------------------------------------------


def stored(epoch: int, done: int, mark: Mark | None, identity: dict[str, object]) -> Position:
    """A position, to be stored: so many items of an epoch are done, of a source that is known by its identity."""
    position: Position = {"source": identity, "epoch": epoch, "done": done}
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


def _expect_same(name: str, saved: dict[str, object], identity: dict[str, object]) -> None:
    differing = [key for key in {**saved, **identity} if saved.get(key) != identity.get(key)]
    if differing:
        raise IdentityMismatchError(
            f"The iterate {name!r} was saved over something else: "
            + "; ".join(f"{key} was {saved.get(key)!r}, and is {identity.get(key)!r}" for key in differing)
            + ".",
            hint="Go on with what it was. To begin anew: another name=, or cp.clear().",
        )
