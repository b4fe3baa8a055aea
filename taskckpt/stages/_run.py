"""One call of a stage: it gives the result that is there, or makes one, of which exactly one counts."""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from taskckpt._checkpoint import Checkpoint
from taskckpt._log.records import Json
from taskckpt._operation import Stop
from taskckpt.errors import CorruptCheckpointError, StaleAttemptError, StepNotFoundError, UsageError, UsageTypeError
from taskckpt.stages._look import Look, Terms
from taskckpt.stages._stage import Stage
from taskckpt.stages._versions import Done

logger = logging.getLogger("taskckpt")

# How often somebody who waits for another process looks: at first, and in the end.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 2.0


class Found(NamedTuple):
    """A result, which may be None."""

    value: Any


@dataclass
class Call:
    """One call of ``run``. Its steps are synchronous; who drives it says in which thread.

    Args:
        look: Takes a fresh look at all stages.
        wait_s: How many seconds to wait for another process's result; None: not at all.
    """

    stage: Stage
    terms: Terms
    look: Callable[[], Look]
    metadata: Mapping[str, Json]
    wait_s: float | None

    def __post_init__(self) -> None:
        self._attempt: Checkpoint | None = None
        self._built_from: dict[str, str] = {}

    def begin(self, stop: Stop) -> Found | None:
        """The result, if the stage is done. Else this call has the stage now, and must run it."""
        look = self.look()
        found = self._result(look)
        if found is not None:
            return found
        look.built_from(self.stage, self.terms)  # a wrong call takes nothing over
        try:
            attempt = self.stage.take_over(stop)
        except StaleAttemptError as error:
            return self._of_the_winner(error, stop)
        # Nobody before us can save any more. Who had saved by now was first.
        look = self.look()
        found = self._result(look)
        if found is None:
            self._built_from = look.built_from(self.stage, self.terms)
            self._attempt = attempt
        return found

    def finish(self, result: Any, stop: Stop) -> Any:
        """Saves what the function gave; the result, be it ours or that of who took the stage over."""
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise UsageTypeError(
                f"Stage {self.stage!r} gave a {type(result).__name__}: it has not run yet.",
                hint="Pass the async function itself, and await what run gives.",
            )
        assert self._attempt is not None
        try:
            self.stage.save(self._attempt, result, self.metadata, self.terms.fingerprint, self._built_from)
        except StaleAttemptError as error:
            return self._of_the_winner(error, stop).value
        return result

    def _result(self, look: Look) -> Found | None:
        done = look.usable(self.stage, self.terms)
        if done is None:
            return None
        if not done.has_result:
            logger.warning("Stage %r is done, but was saved without a result; it runs again to have one.", self.stage)
            return None
        return self._loaded(done)

    def _loaded(self, done: Done) -> Found | None:
        try:
            value = self.stage.load(done)
        except (CorruptCheckpointError, StepNotFoundError) as error:
            logger.warning("Stage %r runs again, since its result cannot be loaded: %s", self.stage, error)
            return None
        logger.info("Stage %r is done: its result was loaded.", self.stage)
        return Found(value)

    def _of_the_winner(self, error: StaleAttemptError, stop: Stop) -> Found:
        """Waits for the result of who took the stage over; raises ``error`` if it does not come."""
        if self.wait_s is None:
            error.add_note(f"This was stage {self.stage!r}; wait_s= would wait for the other one's result.")
            raise error
        logger.info("Stage %r: waiting up to %g s for another one's result: %s", self.stage, self.wait_s, error)
        deadline = time.monotonic() + self.wait_s
        pause_s = FIRST_WAIT_S
        while True:
            found = self._result(self.look())
            if found is not None:
                return found
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                error.add_note(f"This was stage {self.stage!r}, and in {self.wait_s:g} s no other result came.")
                raise error
            stop.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, LONGEST_WAIT_S)


# --- one at a time -----------------------------------------------------------------------------

# The stages that this thread or coroutine is inside of.
_inside: ContextVar[frozenset[object]] = ContextVar("taskckpt_stages", default=frozenset())


class Turns:
    """Threads and coroutines of one manager take turns at a stage: the second one finds it done."""

    def __init__(self) -> None:
        self._taken: dict[object, tuple[Future[None], int]] = {}

    def _take(self, key: object) -> tuple[Future[None], int] | None:
        """Whose turn it is; None: ours, from now on."""
        mine = Future[None](), threading.get_ident()
        taken = self._taken.setdefault(key, mine)  # atomic
        return None if taken is mine else taken

    @contextmanager
    def _ours(self, key: object) -> Generator[None]:
        token = _inside.set(_inside.get() | {key})
        try:
            yield
        finally:
            self._taken.pop(key)[0].set_result(None)
            with suppress(ValueError):  # a coroutine that was given up is closed in the context of somebody else
                _inside.reset(token)

    @contextmanager
    def turn(self, stage: Stage) -> Generator[None]:
        """Waits until nobody else in this process runs the stage."""
        key = self._key(stage)
        while (taken := self._take(key)) is not None:
            future, thread = taken
            if thread == threading.get_ident():
                raise UsageError(
                    f"Stage {stage!r} is running in this very thread.", hint="Await it there, or run it in a thread."
                )
            future.result()
        with self._ours(key):
            yield

    @asynccontextmanager
    async def async_turn(self, stage: Stage) -> AsyncGenerator[None]:
        """``turn`` without blocking the event loop."""
        from taskckpt._bridge import called_back

        key = self._key(stage)
        while (taken := self._take(key)) is not None:
            await called_back(partial(_when_done, taken[0]))
        with self._ours(key):
            yield

    def _key(self, stage: Stage) -> object:
        key = (id(self), os.getpid(), stage.folder)  # a forked child has none of its parent's calls
        if key in _inside.get():
            raise UsageError(f"Stage {stage!r} runs itself.", hint="Call the function directly there.")
        return key

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()


def _when_done(future: Future[None], call: Callable[[], None]) -> None:
    future.add_done_callback(lambda _: call())
