"""``PendingSave``: one save in the background, who waits for it, and who gets its error."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from taskckpt._aside import Aside
from taskckpt._attempt import LOCK_POLL_S
from taskckpt._operation import Stop
from taskckpt.errors import StillPendingError, UsageError

if TYPE_CHECKING:
    from taskckpt._later import Later

Policy: TypeAlias = Literal["latest", "queue"]

# Decided once, for each save: the one that took its place, or this.
_IN_FLIGHT = "in flight"


class _Gate:
    """Opens once, for all who wait at it. Of a ``threading.Event`` a signal handler could not wait for the one that the
    code it interrupted is waiting for.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        self._lock.release()

    def wait(self, seconds: float) -> None:
        """Until it is open, or so long; or longer by as much, if another one is stopped on the way through."""
        if self._lock.acquire(timeout=seconds):
            self._lock.release()


class PendingSave:
    """A save in the background, made by ``Checkpoint.save_later``. Threads and event loops may share it.

    ``await`` gives what ``result`` gives, without blocking the event loop; to cancel that does not cancel the save.
    """

    __slots__ = ("_save",)

    def __init__(self, save: Save) -> None:
        self._save = save

    def result(self, timeout_s: float | None = None) -> bool:
        """Waits until the save has ended. Ctrl-C ends the waiting, not the save.

        Args:
            timeout_s: How many seconds to wait at most; None: for ever.

        Returns:
            True when the data is saved, as durable as ``save_sync`` leaves it; False when a newer save took
            its place.

        Raises:
            StillPendingError: It has not ended in time. Also a ``TimeoutError``.
            UsageError: The wait would never end: in a child process, or in the middle of a save of the same
                thread (in a signal handler, or a ``progress`` function).
            The error of the save, or of the one that took its place: one of those that ``save_sync`` raises.
        """
        self._save.wait(deadline_in(timeout_s))
        return self._save.outcome()

    def __await__(self) -> Generator[Any, None, bool]:
        return self._save.awaited().__await__()

    def done(self) -> bool:
        """Whether it has ended: it is saved, it failed, or a newer one took its place."""
        return self._save.has_ended

    def __repr__(self) -> str:
        return f"<PendingSave to {self._save.later.uri}: {self._save.state}>"


class Save:
    """What a ``PendingSave`` is about, for those who take part in it.

    Attributes:
        later: Where it is one of.
        may_be_superseded: Whether a newer save may take its place.
        error: Why it failed.
    """

    __slots__ = (
        *("_aside", "_calls", "_decided", "_ended", "_fate", "_pid", "_run", "_was_run"),
        *("error", "later", "may_be_superseded"),
    )

    def __init__(self, later: Later, policy: Policy, run: Callable[[Aside], None]) -> None:
        self.later = later
        self.may_be_superseded = policy == "latest"
        self.error: BaseException | None = None
        self._run: Callable[[Aside], None] | None = run
        self._aside: Aside | None = None
        self._fate: dict[str, Save | str] = {}  # empty as long as it waits
        self._was_run = False
        self._decided, self._ended = _Gate(), _Gate()
        self._calls: deque[Callable[[], None]] = deque()
        self._pid = os.getpid()

    @property
    def has_ended(self) -> bool:
        """Whether it was saved, failed or was superseded."""
        return self._was_run or self.successor is not None

    @property
    def state(self) -> str:
        """In words."""
        if self.successor is not None:
            return "superseded"
        if self._was_run:
            return "saved" if self.error is None else f"failed with {type(self.error).__name__}"
        return _IN_FLIGHT if self._fate else "waiting"

    # --- for who waits -------------------------------------------------------------------------

    @property
    def successor(self) -> Save | None:
        """What took its place."""
        fate = self._fate.get("")
        return fate if isinstance(fate, Save) else None

    @property
    def is_waiting(self) -> bool:
        """Whether it has neither begun nor been superseded."""
        return not self._fate

    async def awaited(self) -> bool:
        """Waits for its end in a coroutine; see ``outcome``."""
        from taskckpt._bridge import called_back  # asyncio takes 30 ms to import, and plain tasks do without

        self._expect_to_end()
        await called_back(self._call_at_the_end)
        return self.outcome()

    def wait(self, deadline: float | None, stop: Stop | None = None) -> None:
        """Waits for its end."""
        while not self.has_ended:
            self._expect_to_end()
            if stop is not None:
                stop.check()
            left = LOCK_POLL_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise StillPendingError(
                    "The save in the background has not ended yet.", uri=self.later.uri, hint="It goes on: wait again."
                )
            self._ended.wait(min(left, LOCK_POLL_S))

    def wait_for_turn(self) -> None:
        """Waits until it waits no more."""
        while self.is_waiting:
            self._expect_to_end()
            self._decided.wait(LOCK_POLL_S)

    def _expect_to_end(self) -> None:
        if self.has_ended:
            return
        if self._pid != os.getpid():
            raise UsageError("This save belongs to the parent process, and ends there.", uri=self.later.uri)
        if self.later.is_busy_here:
            raise UsageError("A save was waited for in the middle of a save of the same thread.", uri=self.later.uri)
        self.later.see_to_it()

    def _call_at_the_end(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        if self.has_ended:
            self._call_all()

    def _call_all(self) -> None:
        with suppress(IndexError):
            while True:
                self._calls.popleft()()

    def outcome(self) -> bool:
        """Whether it was saved, or its error, which somebody has got now."""
        untold.pop(self, None)
        newest = self
        while newest.successor is not None:
            newest = newest.successor
        if newest.error is not None:
            raise newest.error  # what took its place is not saved either
        return newest is self

    # --- for who saves -------------------------------------------------------------------------

    def keep(self, aside: Aside) -> None:
        """This is what is to be saved."""
        self._aside = aside

    def begin(self) -> bool:
        """Whether it is its turn: not if something took its place."""
        if self._fate.setdefault("", _IN_FLIGHT) is not _IN_FLIGHT:
            return False
        self._decided.open()
        return True

    def supersede(self, by: Save) -> None:
        """If it has not begun, ``by`` takes its place."""
        if self.may_be_superseded and self._fate.setdefault("", by) is by:
            self._decided.open()
            self._free()
            self._end()

    def run(self) -> None:
        """Saves, and remembers what came of it."""
        assert self._aside is not None
        assert self._run is not None
        try:
            try:
                self._run(self._aside)
            finally:
                self._free()
        except BaseException as error:  # noqa: BLE001 - for whoever asks next, in another thread
            self.fail(error)
        else:
            self._end()

    def fail(self, error: BaseException) -> None:
        """Ends it so."""
        self.error = error
        untold[self] = None
        self._free()
        self._end()

    def _free(self) -> None:
        aside, self._aside, self._run = self._aside, None, None
        if aside is not None:
            aside.release()

    def _end(self) -> None:
        self._was_run = True
        self._ended.open()
        self._call_all()


def deadline_in(timeout_s: float | None) -> float | None:
    """The moment until which to wait.

    Raises:
        UsageError: It is no time.
    """
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s >= 0:
        raise UsageError(f"timeout_s={timeout_s!r} must be a number of seconds from 0 on, or None.")
    return time.monotonic() + timeout_s


# --- errors that nobody got yet ----------------------------------------------------------------

untold: dict[Save, None] = {}


def raise_failures(laters: Collection[Later]) -> None:
    """The first error that nobody got yet, with a note of each further one."""
    failed = [pending for pending in untold.copy() if pending.later in laters]
    for pending in failed:
        untold.pop(pending, None)
    errors = [pending.error for pending in failed if pending.error is not None]
    if errors:
        for further in errors[1:]:
            errors[0].add_note(f"And a later save failed: {type(further).__name__}: {further}")
        raise errors[0]
