"""One loop over an ``iterate``: how far it is, when that is committed, and what a save in its body carries.

It is driven from outside, by a loop that is synchronous or not; so here is what both have in common.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from taskckpt._interrupts import is_interrupting, note_handlers
from taskckpt._operation import Stop
from taskckpt._positions import Inside, Position, Positions, belongs_elsewhere, reached_in, restored, stored
from taskckpt._sources import Mark, Opened, Source, state_of
from taskckpt._when import EverySteps, SavePolicy, Schedule
from taskckpt.errors import IdentityMismatchError, TaskckptError, TaskckptWarning, UsageError, UsageTypeError

logger = logging.getLogger("taskckpt")

T = TypeVar("T")


class Keeper(Protocol):
    """Who keeps positions: an attempt at a task."""

    def expect_writable(self, verb: str) -> None:
        """Raises if it may not save."""
        ...

    def find_positions(self, stop: Stop) -> dict[str, Position]:
        """Those of the checkpoint that it goes on from."""
        ...

    def save_positions(self, look: Callable[[], dict[str, Position]], stop: Stop, *, alone: bool = False) -> None:
        """Commits them, with the last payload again."""
        ...

    @property
    def positions(self) -> dict[str, Position]:
        """Those that were committed or loaded last."""
        ...

    @property
    def has_payload(self) -> bool:
        """Whether the last checkpoint has more than positions."""
        ...


class Background(Protocol):
    """That attempt's saves in the background."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is pending, and no error that nobody got yet."""
        ...

    def settle(self, stop: Stop) -> None:
        """Waits for all, and raises the first error."""
        ...

    def wait(self, deadline: float | None, stop: Stop | None = None) -> None:
        """Waits for all."""
        ...

    def raise_failures(self) -> None:
        """Raises the first error that nobody got yet."""
        ...


@dataclass(frozen=True, slots=True)
class Iteration(Generic[T]):
    """What ``iterate`` was told.

    Attributes:
        source: What it goes over.
        identity: What must be the same in a later attempt, as plain values by name.
        name: Of its position.
        place: If it was given no name: where in the program it is.
        epochs: How often it goes over the source.
        policy: When positions are committed, beside those that saves carry; None: see ``Loop.finish``.
        attempt: Whose positions these are.
        later: Its saves in the background.
        positions: All of its positions.
    """

    source: Source[T]
    identity: dict[str, object]
    name: str
    place: Hashable | None
    epochs: int
    policy: SavePolicy | None
    attempt: Keeper
    later: Background
    positions: Positions


class _Epoch:
    """How far a loop is in one epoch. Other threads look at it: at the mark first.

    Attributes:
        number: From 0 on.
        mark: The latest known state of the source in it; None: it has none, or this is the beginning.
        done: How many items are done. Written before a later mark is, and so at least ``mark.after``.
    """

    __slots__ = ("done", "mark", "number")

    def __init__(self, number: int, done: int = 0, mark: Mark | None = None) -> None:
        self.number, self.done, self.mark = number, done, mark


# Where some code is: in the body of which loop, for which of its items; and of which other loops that go in step with
# that one, as by zip. A plain tuple, because one is made for each item.
_Body: TypeAlias = "tuple[int, int, _Body | None]"

# Where the code is that runs here. A context belongs to one thread, or to one task of an event loop; what is called by
# asyncio.to_thread has a copy.
_body: ContextVar[_Body | None] = ContextVar("taskckpt_body", default=None)
_numbers = count()

_END: Any = object()

# Time-based policies are asked no more often than this.
_PAUSE_S = 0.01


class Loop(Generic[T]):
    """Where a loop is. All of it runs in the loop's own thread, except what ``Positions`` asks.

    Attributes:
        consumer: The frame that asked for the item that is out, as its ``id``; None if there is none.
        inside: The items of other loops in whose body it was begun.
    """

    def __init__(self, what: Iteration[T]) -> None:
        self.consumer: int | None = None
        self._what = what
        self._number = -1  # loops have one in the order in which they begin
        self._around = _body.get()
        self.inside = what.positions.inside()
        self._thread: int | None = None
        self._has_entered = False
        self._is_overtaken = False
        self._epoch = _Epoch(0)
        self._end_before: tuple[int, int] | None = None  # of the epoch before, which is where this one begins
        # What it goes over now.
        self._prefers_async = False
        self._opened: Opened | None = None
        self._items: Any = None
        self._skip = 0
        # The item that is out.
        self._item = 0
        self._is_out = False
        self._here: _Body | None = None
        self._carried: tuple[int, Mark | None] = (0, None)  # by the latest save in a body: which item's
        # Commits.
        self._schedule = None if what.policy is None else Schedule(what.policy)
        # To ask a schedule at each item takes longer than all the rest.
        self._stride = what.policy.n if isinstance(what.policy, EverySteps) else 1 if what.policy else sys.maxsize
        self._is_overdue = False
        self._next_question = 0.0
        self._committed: tuple[int, int] | None = None
        self._behind: Position | None = None  # what the next commit has of this loop, if that is not where it stands

    # --- its beginning -------------------------------------------------------------------------

    def look(self, stop: Stop) -> None:
        """Asks the store where earlier loops were, if that is not known. May block."""
        what = self._what
        what.attempt.expect_writable("iterate")
        if not what.positions.are_known:
            what.later.settle(stop)
            found = what.attempt.find_positions(stop)
            what.positions.learn(found, is_payload_unread=what.attempt.has_payload)

    def remaining(self, stop: Stop) -> int:
        """How many items of all epochs are left to a loop that begins now, or runs. May block.

        Raises:
            UsageTypeError: The length of the source is not known. It is a ``TypeError``, as of what has no ``len()``.
        """
        what = self._what
        length = what.source.identity["length"]
        if not isinstance(length, int):
            raise UsageTypeError(f"How many items the iterate {what.name!r} has is not known.")
        self.look(stop)
        found = what.positions.now_at(what.name, self.inside)
        epoch, done = (0, 0) if found is None else restored(found, what.name, what.identity, what.epochs)[:2]
        return (what.epochs - epoch) * length - done

    def begin(self, *, prefers_async: bool) -> None:
        """Goes to where the last loop of this name stopped."""
        what = self._what
        found = what.positions.left_by(what.name, what.place, what.identity, self.inside)
        if found is not None:
            self._epoch = _Epoch(*restored(found, what.name, what.identity, what.epochs))
            self._committed = self.reached if what.positions.is_committed(what.name) else None
            self._warn_of_payload(stacklevel=5 if prefers_async else 4)
        what.positions.enter(what.name, self)
        self._has_entered = True
        self._number = next(_numbers)
        if not self.inside:  # else the loop around has done so, and it takes 0.1 ms
            note_handlers()
        self._thread = threading.get_ident()
        self._prefers_async = prefers_async
        if self._epoch.number < what.epochs:
            self._open(is_there=False)

    def _warn_of_payload(self, stacklevel: int) -> None:
        what = self._what
        if not what.positions.is_payload_unread or what.policy is not None:
            return
        if self.reached == (0, 0) or self._epoch.number == what.epochs:
            return
        warnings.warn(
            f"The iterate {what.name!r} resumes at item {self._epoch.done} of epoch {self._epoch.number}, counted from "
            "0, and what was saved with it was not loaded. Load it before the loop.",
            TaskckptWarning,
            stacklevel=stacklevel,
        )
        what.positions.is_payload_unread = False  # once is enough

    def _open(self, *, is_there: bool) -> None:
        epoch = self._epoch
        opened = self._what.source.open(
            epoch.number, epoch.done, epoch.mark, is_there=is_there, prefers_async=self._prefers_async
        )
        if opened.is_async and not self._prefers_async:
            raise UsageTypeError(
                "The source is asynchronous.", hint="Write: async for item in cp.iterate(...), in a coroutine."
            )
        epoch.mark = opened.mark
        self._opened, self._items, self._skip = opened, opened.items, opened.skip

    # --- items ---------------------------------------------------------------------------------

    def pull(self, box: list[T]) -> bool:
        """Puts the next item into the box; False if there is none."""
        while self._opened is not None:
            item = next(self._items, _END)
            if self._take(item, self._opened, box):
                return True
        return False

    async def pull_async(self, box: list[T]) -> bool:
        """The same, of a source of either kind."""
        while self._opened is not None:
            item = await anext(self._items, _END) if self._opened.is_async else next(self._items, _END)
            if self._take(item, self._opened, box):
                return True
        return False

    def _take(self, item: T, opened: Opened, box: list[T]) -> bool:
        """What comes out of the source; whether it is for the body."""
        if item is _END:
            self._end_epoch(opened)
        elif self._skip:
            self._skip -= 1
        else:
            self._hand_out(item, box)
            return True
        return False

    def _hand_out(self, item: T, box: list[T]) -> None:
        here = _body.get()
        beside = here[2] if here is not None and here is self._here else self._beside(here)
        self._item += 1
        self._here = here = (self._number, self._item, beside)
        _body.set(here)
        box.append(item)
        self._is_out = True

    def _beside(self, body: _Body | None) -> _Body | None:
        """Loops that go in step. The one around this loop does not: its item is not done as long as this loop runs."""
        beside: _Body | None = None
        while body is not None:
            loop, item, body = body
            if loop != self._number and not _is_in(self._around, loop, item):
                beside = (loop, item, beside)
        return beside

    def take_back(self) -> None:
        """The item that is out is done."""
        self._expect_not_overtaken()
        # In this order: a thread of the body that nobody waited for may count it too little now, but not twice.
        self._is_out = False
        self._epoch.done += 1
        if self._carried[0] == self._item:
            self._epoch.mark = self._carried[1]

    def _end_epoch(self, opened: Opened) -> None:
        epoch, name = self._epoch, self._what.name
        if self._skip:
            raise IdentityMismatchError(
                f"The iterate {name!r} is at item {epoch.done} of epoch {epoch.number}; "
                f"its source has only {epoch.done - self._skip} now."
            )
        least = self._what.source.least()
        if epoch.done < least:
            raise IdentityMismatchError(
                f"The iterate {name!r} has ended after {epoch.done} items of epoch {epoch.number}, "
                f"and its source has {least}.",
                hint="A sequence must stay as it is while it is gone over, and [] give an item for each index.",
            )
        if epoch.number and not epoch.done and self._item:
            raise UsageError(
                f"The source of the iterate {name!r} gave nothing in epoch {epoch.number}: "
                "it can be gone over only once.",
                hint="epochs= takes a source that begins anew each time; or a function that makes one.",
            )
        keeps_state = opened.keeper is not None and opened.outlives_epochs
        self._end_before = epoch.number, epoch.done
        self._epoch = _Epoch(epoch.number + 1, mark=state_of(opened.keeper, 0) if keeps_state else None)
        self._close()
        if self._epoch.number < self._what.epochs:
            self._open(is_there=True)

    def _close(self) -> None:
        opened, self._opened, self._items = self._opened, None, None
        if opened is not None and opened.close is not None:
            opened.close()

    # --- positions -----------------------------------------------------------------------------

    @property
    def reached(self) -> tuple[int, int]:
        """Its epoch, and how many items of it are done."""
        return self._epoch.number, self._epoch.done

    @property
    def is_here(self) -> bool:
        """Whether this code runs in the body of the item that is out."""
        return self._is_out and _is_in(_body.get(), self._number, self._item)

    @property
    def commits_itself(self) -> bool:
        """Whether ``every=`` was given."""
        return self._schedule is not None

    def position(self) -> Position | None:
        """Where it stands: the item that is out is not done. None if it was overtaken. Other threads call this, too."""
        if self._is_overtaken:
            return None
        epoch = self._epoch
        mark = epoch.mark  # before what is done: see there
        return stored(epoch.number, epoch.done, mark, self._what.identity, self._inside_now())

    def _inside_now(self) -> Inside:
        return self.inside if self._what.positions.is_still(self.inside) else []

    def position_here(self) -> Position | None:
        """Where it stands when the item that is out is done; None if this code does not run in its body."""
        epoch, item = self._epoch, self._item
        mark, done = epoch.mark, epoch.done  # in this order: see there; and before it is asked whether they still hold
        if not self.is_here or is_interrupting(self.consumer):
            return None
        latest = self._mark(done + 1)
        if self.is_here:  # else this is a thread, and the loop went on meanwhile
            mark = latest
            self._carried = (item, mark)
        return stored(epoch.number, done + 1, mark, self._what.identity, self._inside_now())

    def _mark(self, done: int) -> Mark | None:
        """The state as it is now, when so many items have come out; or else the latest one."""
        mark, opened = self._epoch.mark, self._opened
        if opened is None or opened.keeper is None or (mark is not None and mark.after == done):
            return mark
        return state_of(opened.keeper, done)

    # --- a task that goes elsewhere ------------------------------------------------------------

    def compare(self, adopted: Position | None) -> None:
        """The task has this position now, by a load or a rollback.

        That is fine if a save in this body, or the last one before it, has left it; what else is, would be skipped.
        """
        number, done = self.reached
        here = {(number, done)}
        if self._is_out:
            here.add((number, done + 1))
        if self._end_before is not None and not done:
            here.add(self._end_before)
        inside = self._inside_now()
        if adopted is None or belongs_elsewhere(adopted, inside):
            stands = (0, 0) in here
        else:
            stands = reached_in(adopted) in here
        self._is_overtaken = not stands

    def overtake(self) -> None:
        """The task was cleared."""
        self._is_overtaken = True

    def expect_in_place(self) -> None:
        """Raises UsageError in the thread or the body of a loop that was overtaken."""
        if self._thread == threading.get_ident() or self.is_here:
            self._expect_not_overtaken()

    def _expect_not_overtaken(self) -> None:
        if self._is_overtaken:
            raise UsageError(
                f"The task went back (by a load, a rollback or a clear) while the iterate {self._what.name!r} was "
                "running: it is not at this item any more.",
                hint="Leave the loop (break) and begin it anew: it goes on from what was loaded. "
                "Clear behind the loop.",
            )

    # --- commits -------------------------------------------------------------------------------

    def is_due(self) -> bool:
        """Between two items: whether it is time to commit."""
        if not self._is_overdue:
            if self._item % self._stride:
                return False
            self._is_overdue = self._ask_schedule()
            if not self._is_overdue:
                return False
        self._what.later.raise_failures()
        if self._item == self._carried[0]:
            self._is_overdue = False
            return False
        return self._what.later.is_idle  # else at the next item: nobody waits here for what goes on in the background

    def _ask_schedule(self) -> bool:
        if self._schedule is None:
            return False
        if not any(isinstance(part, EverySteps) for part in self._schedule.policy.parts):
            now = time.monotonic()
            if now < self._next_question:
                return False
            self._next_question = now + _PAUSE_S
        return self._schedule.should_save(self._item)

    def prepare(self) -> None:
        """Between two items: what comes next is a commit."""
        epoch = self._epoch
        before, epoch.mark = epoch.mark, self._mark(epoch.done)
        if self._has_followers():
            self._behind = stored(epoch.number, epoch.done - 1, before, self._what.identity, self._inside_now())

    def _has_followers(self) -> bool:
        """Whether the item that was out goes in step with one of a loop that began later, as in the body of a ``zip``.

        Such a loop is asked after this one: only then it is known that its item is done. To count this one before would
        bring them out of step.
        """
        body, has_followers = _body.get(), False
        while body is not None:
            loop, item, body = body
            if loop == self._number:
                return has_followers and item == self._item
            has_followers = has_followers or loop > self._number
        return False

    def commit(self, stop: Stop) -> None:
        """Commits all positions, with the last payload again. Blocks."""
        began = time.monotonic()
        what, (behind, self._behind) = self._what, (self._behind, None)
        try:
            what.attempt.expect_writable("save")
            committed = what.attempt.positions if what.attempt.has_payload else None
            look = partial(what.positions.between_items, what.name, behind, committed)
            what.attempt.save_positions(look, stop, alone=self._schedule is None)
        finally:
            if self._schedule is not None:
                self._schedule.saved(time.monotonic() - began, None)
        self._committed = self.reached if behind is None else None
        self._is_overdue = False

    def finish(self, stop: Stop) -> None:
        """All items of all epochs are done. Commits that if ``every=`` was given, or nothing but positions is saved.

        Without ``every=`` a payload stays together with its positions: then the next save carries them.
        """
        self._expect_not_overtaken()
        if not self._item:
            self._what.positions.expect_first_end(self._what.name)
        if self._is_to_commit():
            self._what.later.settle(stop)
            self.commit(stop)
        self._what.positions.note_end(self._what.name)

    def break_off(self) -> None:
        """The loop was left by ``break`` or ``return``: the item that is out is done. Commits as at the end.

        Nothing can be raised here, as Python is letting go of the loop. What was not committed comes again.
        """
        if self._is_overtaken:
            return
        self.take_back()
        self.prepare()
        try:
            if self._is_to_commit() and self._carried[0] != self._item:
                self._what.later.wait(None)
                self.commit(Stop())
        except TaskckptError as error:
            logger.warning(
                "The position of the iterate %r was not committed when its loop was left: %s: %s",
                self._what.name, type(error).__name__, error,
            )  # fmt: skip

    def _is_to_commit(self) -> bool:
        if self._committed == self.reached:
            return False
        if self._schedule is not None:
            return True
        return self._what.later.is_idle and not self._what.attempt.has_payload  # what is pending is a payload

    # --- its end -------------------------------------------------------------------------------

    def leave(self) -> None:
        """The loop has ended, in whatever way. Repeatable."""
        self.consumer = None
        self._is_out = False
        self._close()
        if self._here is not None and _body.get() is self._here:
            _body.set(self._around)
        if self._has_entered:
            self._has_entered = False
            is_committed = self._committed == self.reached
            self._what.positions.leave(self._what.name, self.position(), is_committed=is_committed)


def _is_in(body: _Body | None, loop: int, item: int) -> bool:
    while body is not None:
        if body[0] == loop:
            return body[1] == item
        body = body[2]
    return False
