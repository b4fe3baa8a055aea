"""One loop over an ``iterate``: how far it is, when that is committed, and what a save in its body carries.

It is driven from outside, by a loop that is synchronous or not; so here is what both have in common.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count, pairwise
from types import FrameType
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from taskckpt._operation import Stop
from taskckpt._positions import Position, Positions, restored, stored
from taskckpt._sources import Mark, Opened, Source, state_of
from taskckpt._when import EverySteps, SavePolicy, Schedule
from taskckpt.errors import IdentityMismatchError, TaskckptError, UsageError, UsageTypeError

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

    def save_positions(self, look: Callable[[], dict[str, Position]], stop: Stop) -> None:
        """Commits them, with the last payload again."""
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

_CO_VARARGS = 4  # inspect.CO_VARARGS, without importing all of that

# Time-based policies are asked no more often than this.
_PAUSE_S = 0.01


class Loop(Generic[T]):
    """Where a loop is. All of it runs in the loop's own thread, except ``position`` and ``forget``.

    Attributes:
        consumer: The frame that asked for the item that is out, as its ``id``; None if there is none.
    """

    def __init__(self, what: Iteration[T]) -> None:
        self.consumer: int | None = None
        self._what = what
        self._number = next(_numbers)
        self._around = _body.get()
        self._has_entered = False
        self._epoch = _Epoch(0)
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
        self._cleared_at: int | None = None

    # --- its beginning -------------------------------------------------------------------------

    def look(self, stop: Stop) -> None:
        """Asks the store where earlier loops were, if that is not known. May block."""
        what = self._what
        what.attempt.expect_writable("iterate")
        if not what.positions.are_known:
            what.later.settle(stop)
            what.positions.learn(what.attempt.find_positions(stop))

    def begin(self, *, prefers_async: bool) -> None:
        """Goes to where the last loop of this name stopped."""
        what = self._what
        found = what.positions.left_by(what.name, what.place)
        if found is not None:
            self._epoch = _Epoch(*restored(found, what.name, what.identity, what.epochs))
            self._committed = self._reached if what.positions.is_committed(what.name) else None
        what.positions.enter(what.name, self)
        self._has_entered = True
        self._prefers_async = prefers_async
        if self._epoch.number < what.epochs:
            self._open(is_there=False)

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
            if item is _END:
                self._end_epoch(self._opened)
            elif self._skip:
                self._skip -= 1
            else:
                self._hand_out(item, box)
                return True
        return False

    async def pull_async(self, box: list[T]) -> bool:
        """The same, of a source of either kind."""
        while self._opened is not None:
            item = await anext(self._items, _END) if self._opened.is_async else next(self._items, _END)
            if item is _END:
                self._end_epoch(self._opened)
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
        if epoch.number and not epoch.done and self._item:
            raise UsageError(
                f"The source of the iterate {name!r} gave nothing in epoch {epoch.number}: "
                "it can be gone over only once.",
                hint="epochs= takes a source that begins anew each time; or a function that makes one.",
            )
        keeps_state = opened.keeper is not None and opened.outlives_epochs
        self._epoch = _Epoch(epoch.number + 1, mark=state_of(opened.keeper, 0) if keeps_state else None)
        self._close()
        if self._epoch.number < self._what.epochs:
            self._open(is_there=True)

    def _close(self) -> None:
        opened, self._opened, self._items = self._opened, None, None
        if opened is not None and opened.close is not None:
            opened.close()

    # --- positions -----------------------------------------------------------------------------

    def position(self) -> Position:
        """Where it stands: the item that is out is not done. Other threads call this, too."""
        epoch = self._epoch
        mark = epoch.mark  # before what is done: see there
        return stored(epoch.number, epoch.done, mark, self._what.identity)

    def position_here(self) -> Position | None:
        """Where it stands when the item that is out is done; None if this code does not run in its body."""
        epoch, item = self._epoch, self._item
        if not self._is_out or not _is_in(_body.get(), self._number, item) or _is_interrupting(self.consumer):
            return None
        mark = self._mark(epoch.done + 1)
        self._carried = (item, mark)
        self._cleared_at = None
        return stored(epoch.number, epoch.done + 1, mark, self._what.identity)

    def _mark(self, done: int) -> Mark | None:
        """The state as it is now, when so many items have come out; or else the latest one."""
        mark, opened = self._epoch.mark, self._opened
        if opened is None or opened.keeper is None or (mark is not None and mark.after == done):
            return mark
        return state_of(opened.keeper, done)

    @property
    def _reached(self) -> tuple[int, int]:
        return self._epoch.number, self._epoch.done

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
        if self._item in (self._carried[0], self._cleared_at):
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
        self._epoch.mark = self._mark(self._epoch.done)

    def commit(self, stop: Stop) -> None:
        """Commits all positions, with the last payload again. Blocks."""
        began = time.monotonic()
        try:
            self._what.attempt.expect_writable("save")
            look = self._what.positions.snapshot()
            assert look is not None
            self._what.attempt.save_positions(look, stop)
        finally:
            if self._schedule is not None:
                self._schedule.saved(time.monotonic() - began, None)
        self._committed = self._reached
        self._is_overdue = False

    def finish(self, stop: Stop) -> None:
        """All items of all epochs are done. Commits that if ``every=`` was given, or nothing but positions is saved.

        Without ``every=`` a payload stays together with its positions: then the next save carries them.
        """
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
        if self._committed == self._reached or self._cleared_at == self._item:
            return False
        if self._schedule is not None:
            return True
        return self._what.later.is_idle and not self._what.attempt.has_payload  # what is pending is a payload

    # --- its end -------------------------------------------------------------------------------

    def forget(self) -> None:
        """All was cleared: if no more items are asked for, this loop leaves nothing."""
        self._cleared_at = self._item

    def leave(self) -> None:
        """The loop has ended, in whatever way. Repeatable."""
        self.consumer = None
        self._is_out = False
        self._close()
        if self._here is not None and _body.get() is self._here:
            _body.set(self._around)
        if self._has_entered:
            self._has_entered = False
            position = None if self._cleared_at == self._item else self.position()
            is_committed = self._committed == self._reached
            self._what.positions.leave(self._what.name, position, is_committed=is_committed)


def _is_interrupting(consumer: int | None) -> bool:
    """Whether a signal handler calls this, in the middle of that frame's body, or of a loop here.

    Then the item is not done, whatever the handler saves.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None and id(frame) != consumer:
        if _is_signal_handler(frame):
            return True
        frame = frame.f_back
    return False


def _is_signal_handler(frame: FrameType) -> bool:
    """Whether it was called by Python itself: with a number, and the frame that it interrupts, which is its caller."""
    code = frame.f_code
    has_more = bool(code.co_flags & _CO_VARARGS)
    if code.co_argcount < 2 and not has_more:
        return False
    values = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
    if has_more:
        values += frame.f_locals.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount]) or ()
    return any(isinstance(number, int) and value is frame.f_back for number, value in pairwise(values))


def _is_in(body: _Body | None, loop: int, item: int) -> bool:
    while body is not None:
        if body[0] == loop:
            return body[1] == item
        body = body[2]
    return False
