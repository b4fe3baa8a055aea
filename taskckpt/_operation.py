"""One operation on a store: may it go on, and how are passing faults tried again."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from taskckpt._testing import switches
from taskckpt.errors import StorageFullError, UnavailableError

if TYPE_CHECKING:
    import tenacity

logger = logging.getLogger("taskckpt")

TRIES = 5
# Then, drawn at random, up to 0.4, 0.8 and 1.6 s.
FIRST_WAIT_S = 0.4
LONGEST_WAIT_S = 10.0

T = TypeVar("T")
R = TypeVar("R")


class Stopped(BaseException):
    """The caller gave the operation up (its coroutine was cancelled).

    A BaseException, like the CancelledError it stands for; it never leaves ``_bridge``.
    """


class Stop:
    """A flag that the caller raises, and the core checks before each write and before the commit."""

    def __init__(self) -> None:
        self._is_set = False
        # Made when the first one sleeps: to make one takes as long as a tenth of a small save.
        self._alarm: dict[str, threading.Event] = {}

    def set(self) -> None:
        self._is_set = True
        for alarm in self._alarm.values():
            alarm.set()

    def check(self) -> None:
        """Raises Stopped if the caller gave up."""
        if self._is_set:
            raise Stopped

    def sleep(self, seconds: float) -> None:
        """Sleeps, but not longer than the caller waits for."""
        alarm = self._alarm.setdefault("", threading.Event())
        if not self._is_set:  # looked at after the alarm was set up: whoever sets it now rings
            alarm.wait(seconds)
        self.check()


def with_retries(request: Callable[[], T], *, timeout_s: float, stop: Stop | None = None) -> T:
    """The answer of ``request``, which is tried again while the store is unavailable.

    Five tries with exponential back-off and jitter, all within ``timeout_s`` seconds. Clients below
    (s3fs, botocore) are told not to retry by themselves, so these are all the tries there are.

    Raises:
        UnavailableError: The last one, with a note that says how often it was tried.
    """
    if stop is not None:
        stop.check()
    began = time.monotonic()
    try:
        return request()
    except UnavailableError as error:
        if not _is_passing(error):
            raise
        if time.monotonic() - began >= timeout_s:
            error.add_note(f"Tried once, for {time.monotonic() - began:.1f} s.")
            raise
    retrying = _retrying(timeout_s - (time.monotonic() - began), stop)
    retrying.sleep(_first_wait_s())
    try:
        return retrying(request)
    except UnavailableError as error:
        tries = 1 + int(retrying.statistics.get("attempt_number", 0))
        error.add_note(f"Tried {tries} times within {time.monotonic() - began:.1f} s.")
        raise


def _retrying(timeout_s: float, stop: Stop | None) -> tenacity.Retrying:
    import tenacity  # only now: it costs 40 ms to import, and most requests succeed the first time

    return tenacity.Retrying(
        sleep=time.sleep if stop is None else stop.sleep,
        stop=tenacity.stop_after_attempt(TRIES - 1) | tenacity.stop_before_delay(max(timeout_s, 0.0)),
        wait=tenacity.wait_random_exponential(multiplier=_first_wait_s(), max=LONGEST_WAIT_S),
        retry=tenacity.retry_if_exception(_is_passing),
        before_sleep=lambda state: logger.info("The store is unavailable, trying again: %s", _reason(state)),
        reraise=True,
    )


def _first_wait_s() -> float:
    return 0.0 if switches.instant_retries else FIRST_WAIT_S


def _is_passing(error: BaseException) -> bool:
    # Trying again in a second does not make room.
    return isinstance(error, UnavailableError) and not isinstance(error, StorageFullError)


def _reason(state: tenacity.RetryCallState) -> object:
    return state.outcome.exception() if state.outcome else None


class Call(Generic[R]):
    """A call that a thread of a pool makes, or who asks for it if no thread can be started; but never both.

    The pool alone could not be relied on: it keeps a call whose thread did not start, and makes it later all the same;
    and it does not wait for a thread whose start was interrupted, which may still use buffers of ours.
    """

    def __init__(self, function: Callable[[], R]) -> None:
        self._todo = [function]  # to pop is one step: whoever gets it makes the call
        self._future: Future[R] = Future()

    def start(self, pool: ThreadPoolExecutor) -> None:
        try:
            pool.submit(self._make)
        except RuntimeError:  # the interpreter is shutting down, or there may be no more threads
            self._make()

    def _make(self) -> None:
        try:
            function = self._todo.pop()
        except IndexError:
            return
        try:
            self._future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - for whoever asks for the result
            self._future.set_exception(error)

    def result(self) -> R:
        """Waits for what came of it."""
        return self._future.result()

    def give_up(self) -> None:
        """Afterwards it has ended, or will never begin."""
        try:
            self._todo.pop()
        except IndexError:
            wait((self._future,))


def ordered_map(function: Callable[[T], R], items: Iterable[T], *, threads: int, ahead: int = 0) -> Generator[R]:
    """``map`` on several threads: results in order, at most ``threads + ahead`` items under way.

    When the consumer stops early, running calls are waited for.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="taskckpt")
    under_way: deque[Call[R]] = deque()
    try:
        for item in items:
            under_way.append(Call(partial(function, item)))
            under_way[-1].start(pool)
            if len(under_way) >= threads + ahead:
                result = under_way[0].result()
                under_way.popleft()
                yield result
        while under_way:
            yield under_way.popleft().result()
    finally:
        for call in under_way:
            call.give_up()
        pool.shutdown(wait=True, cancel_futures=True)


_END = object()


def made_ahead(items: Iterable[T]) -> Generator[T]:
    """The items, of which the next is made in a thread of its own while the consumer works on the latest.

    So an item must stay valid while the next is made. When the consumer stops early, the one that is being made is
    waited for; the caller closes ``items``.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="taskckpt") as pool:
        coming = Call(partial(next, iterator, _END))
        try:
            coming.start(pool)
            while (item := coming.result()) is not _END:
                coming = Call(partial(next, iterator, _END))
                coming.start(pool)
                yield cast("T", item)
        finally:
            coming.give_up()
