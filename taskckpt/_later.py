"""Saves in the background: at most one in flight and one waiting, committed in the order of the calls.

A signal handler runs between any two lines of the main thread, and may save and wait as well. So nobody who waits
holds a lock that others need: what becomes of a save is decided in single steps of a dict, and who waits looks again
and again.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

from taskckpt._aside import Aside, set_aside
from taskckpt._attempt import Attempt, SaveRequest
from taskckpt._operation import Stop
from taskckpt._payload import Data
from taskckpt._pending import PendingSave, Policy, Save, raise_failures, untold
from taskckpt._progress import Progress, reporting
from taskckpt.errors import StaleAttemptError, UsageError

if TYPE_CHECKING:
    from taskckpt._states import HostBuffers

logger = logging.getLogger("taskckpt")


class _Worker(threading.Thread):
    def __init__(self, later: Later) -> None:
        super().__init__(name="taskckpt-later")
        self._later = later
        self.uri = later.uri
        self.is_leaving = False

    def run(self) -> None:
        try:
            self._later.save_all(self)
        finally:
            _workers.discard(self)


class Later:
    """The saves in the background of one attempt, in this process. A forked child or a copy begins with none."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._door = threading.RLock()  # one caller of save at a time
        self._turn = threading.RLock()  # one worker at a time
        self._queue: deque[Save] = deque()
        self._in_flight: Save | None = None
        self._worker: _Worker | None = None
        self._saving_in: int | None = None  # a thread
        self._buffers: HostBuffers | None = None
        self._stale: StaleAttemptError | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Later, (self._attempt,)

    @property
    def uri(self) -> str:
        """Where this saves to."""
        return self._attempt.dest.uri

    @property
    def is_busy_here(self) -> bool:
        """Whether this thread is in the middle of a save, so that it must not wait for another one."""
        return self._attempt.is_busy_here or self._saving_in == threading.get_ident()

    # --- for callers ---------------------------------------------------------------------------

    def save(
        self, data: Data | Mapping[str, Any], request: SaveRequest, policy: Policy, progress: Progress | None
    ) -> PendingSave:
        """See ``Checkpoint.save_later``."""
        self._notice_fork()
        self._attempt.expect_writable("save")
        self._attempt.expect_outside(data)
        self.raise_failures()
        if self._stale is not None:
            raise self._stale
        begun = _begun.get()
        if begun is not None:
            begun.add(self)
        while True:
            for pending in self._in_the_way(policy):  # not waited for at the door: a progress function may want to pass
                pending.wait_for_turn()
            with self._door:
                if not self._in_the_way(policy):
                    begun_now = self._begin(data, request, policy, progress)
                    break
        self.see_to_it()
        return PendingSave(begun_now)

    def _in_the_way(self, policy: Policy) -> list[Save]:
        """What waits and is not to be superseded."""
        if self.is_busy_here:
            return []  # a signal handler in the middle of the save that would make room must not wait for it
        waiting = [pending for pending in self._queue.copy() if pending.is_waiting]
        return [pending for pending in waiting if policy == "queue" or not pending.may_be_superseded]

    def _begin(
        self, data: Data | Mapping[str, Any], request: SaveRequest, policy: Policy, progress: Progress | None
    ) -> Save:
        context = copy_context()  # for filters of the log, and the progress function
        pending = Save(self, policy, lambda aside: context.run(self._save, request, progress, aside))
        try:
            pending.keep(set_aside(data, self._host_buffers, partial(self._supersede, pending)))
            self._attempt.expect_writable("save")  # the task may have ended while it was copied
            self._queue.append(pending)
        except BaseException as error:
            if not self._has(pending):  # else it was interrupted just behind that: what is in flight may be read now
                pending.fail(error)  # something may have made room for it, and is waited for
                untold.pop(pending, None)
            raise
        self._supersede(pending)
        return pending

    def _has(self, pending: Save) -> bool:
        # In the order in which a save goes through these.
        return pending in self._queue.copy() or self._in_flight is pending or not pending.is_waiting

    def _supersede(self, by: Save) -> None:
        for pending in self._queue.copy():
            if pending is by:
                break
            pending.supersede(by)
            if pending.successor is not None:
                with suppress(ValueError):  # the worker came to it first
                    self._queue.remove(pending)

    def _host_buffers(self) -> HostBuffers:
        if self._buffers is None:
            from taskckpt._states import HostBuffers

            self._buffers = HostBuffers()
        return self._buffers

    def wait(self, deadline: float | None, stop: Stop | None = None) -> None:
        """Until all that was begun so far has ended."""
        self._notice_fork()
        waiting = self._queue.copy()  # first: a save is in flight before it leaves the queue
        for pending in (self._in_flight, *waiting):
            while pending is not None:
                pending.wait(deadline, stop)
                pending = pending.successor  # noqa: PLW2901 - then that one must have ended

    def settle(self, stop: Stop) -> None:
        """Before anything else is done: all that was begun so far has ended, and well.

        Not in the middle of a save of the same thread: what a signal handler saves then comes first.
        """
        if not self.is_busy_here:
            self.wait(None, stop)
            self.raise_failures()

    def raise_failures(self) -> None:
        """The first error that nobody got yet."""
        raise_failures((self,))

    @property
    def is_idle(self) -> bool:
        """Whether nothing is pending, and no error that nobody got yet."""
        return not (self._queue or self._in_flight or any(one.later is self for one in untold.copy()))

    def end(self) -> None:
        """No more is to be expected; what was begun goes on."""
        self._buffers = None

    def _notice_fork(self) -> None:
        if self._pid != os.getpid():
            self._forget()

    # --- for the worker ------------------------------------------------------------------------

    def see_to_it(self) -> None:
        """Starts a thread that saves what waits, unless one is there. It ends when nothing waits."""
        if not self._queue or (self._worker is not None and not self._worker.is_leaving):
            return
        worker = _Worker(self)
        try:
            if _exit.has_begun:
                raise RuntimeError  # noqa: TRY301 - it could be started, but nobody would wait for it
            _workers.add(worker)
            worker.start()
            self._worker = worker
        except BaseException as error:
            _workers.discard(worker)
            if not isinstance(error, RuntimeError):
                raise
            self.save_all(worker)  # no thread can be started any more: here and now

    def save_all(self, worker: _Worker) -> None:
        """Saves what waits, and what is added meanwhile."""
        with self._turn:
            outer, self._saving_in = self._saving_in, threading.get_ident()
            worker.is_leaving = True  # until it is seen that something waits
            try:
                while self._queue:
                    worker.is_leaving = False
                    self._save_all()
                    # In this order: whoever adds to the queue looks at this flag afterwards.
                    worker.is_leaving = True
            finally:
                worker.is_leaving = True
                self._saving_in = outer

    def _save_all(self) -> None:
        with suppress(IndexError):
            while True:
                pending = self._in_flight = self._queue[0]
                with suppress(ValueError):  # removed just now: something took its place
                    self._queue.remove(pending)
                if pending.begin():
                    pending.run()
                self._in_flight = None

    def _save(self, request: SaveRequest, progress: Progress | None, aside: Aside) -> None:
        try:
            with reporting(progress, "save") as report:
                self._attempt.save(aside.look, request, Stop(), report)
        except BaseException as error:
            logger.warning("A save to %s in the background failed: %s: %s", self.uri, type(error).__name__, error)
            if isinstance(error, StaleAttemptError):
                self._stale = error
            raise


def checked_policy(policy: str) -> Policy:
    """Raises UsageError if there is no such policy."""
    if policy in ("latest", "queue"):
        return policy  # type: ignore[return-value]
    raise UsageError(f"policy={policy!r} must be 'latest' or 'queue'.")


# --- the end of a task -------------------------------------------------------------------------

_begun: ContextVar[set[Later] | None] = ContextVar("taskckpt_begun", default=None)


def collect() -> tuple[set[Later], Callable[[], None]]:
    """From now on, whatever saves in the background in this context is put into the set; call the other to end that."""
    begun: set[Later] = set()
    return begun, partial(_begun.reset, _begun.set(begun))


def flush(laters: Collection[Later], stop: Stop) -> None:
    """Waits for all of them, and raises what nobody got yet."""
    for later in laters:
        later.wait(None, stop)
    raise_failures(laters)


# --- the end of the process --------------------------------------------------------------------


# After so long it is said why the process does not end.
_SILENT_AT_EXIT_S = 5.0


class _Exit:
    has_begun = False


_exit = _Exit()
_workers: set[_Worker] = set()


def _flush_at_exit() -> None:
    while workers := list(_workers):
        for thread in workers:
            with suppress(RuntimeError):  # it was never started
                thread.join(_SILENT_AT_EXIT_S)
                if thread.is_alive():
                    logger.warning("Waiting for a save to %s in the background. Ctrl-C gives it up.", thread.uri)
                    thread.join()
            _workers.discard(thread)
    _exit.has_begun = True
    for pending in list(untold):
        logger.error(
            "A save to %s in the background failed, and nobody asked for it: "
            "the next attempt resumes from the one before.",
            pending.later.uri,
            exc_info=pending.error,
        )


def _forget_parent() -> None:
    _workers.clear()
    untold.clear()
    _exit.has_begun = False


os.register_at_fork(after_in_child=_forget_parent)
# atexit is too late: concurrent.futures has closed by then, and with it what resolves host names for S3. It uses this
# hook itself, and the newest comes first. Children of multiprocessing, which run no atexit, run this one.
with suppress(RuntimeError):
    getattr(threading, "_register_atexit", atexit.register)(_flush_at_exit)
