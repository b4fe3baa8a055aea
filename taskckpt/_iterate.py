"""``iterate``: a loop that goes on at the item where the last attempt stopped.

When is an item done? When the next one is asked for; when a save is made in its body; or when the loop is left there by
``break`` or ``return``. After an exception it is not, nor if there is any doubt: then it comes again, and none is lost.
"""

from __future__ import annotations

import copy
import math
import opcode
import sys
from collections.abc import AsyncIterator, Generator, Hashable
from types import FrameType
from typing import Generic, TypeVar

from taskckpt._loop import Background, Iteration, Keeper, Loop
from taskckpt._operation import Stop
from taskckpt._positions import Positions
from taskckpt._sources import Given, source_of
from taskckpt._when import Policy, save_policy_of
from taskckpt.errors import UsageError, UsageTypeError

T = TypeVar("T")

DEFAULT_NAME = "default"


class Iterate(Generic[T]):
    """What ``Checkpoint.iterate`` gives: each ``for`` or ``async for`` over it goes on where the last one stopped."""

    def __init__(
        self,
        source: Given[T],
        *,
        attempt: Keeper,
        later: Background,
        positions: Positions,
        every: Policy | None = None,
        name: str | None = None,
        shuffle: int | None = None,
        epochs: int = 1,
        fingerprint: object = None,
    ) -> None:
        if name is not None and (not isinstance(name, str) or not name):
            raise UsageTypeError(f"name={name!r} must be a text that is not empty.")
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise UsageError(f"epochs={epochs!r} must be a whole number of at least 1.")
        if not _is_plain(fingerprint):
            raise UsageTypeError(
                "fingerprint= must be made of None, finite numbers, texts, bytes, lists, tuples and dicts."
            )
        known_as = source_of(source, shuffle)
        self._what = Iteration(
            source=known_as,
            identity={**known_as.identity, "fingerprint": copy.deepcopy(fingerprint)},
            name=DEFAULT_NAME if name is None else name,
            place=_caller() if name is None else None,
            epochs=epochs,
            policy=save_policy_of(every),
            attempt=attempt,
            later=later,
            positions=positions,
        )

    def __iter__(self) -> Generator[T]:
        return _items(Loop(self._what))

    def __aiter__(self) -> AsyncIterator[T]:
        return _AsyncItems(Loop(self._what))

    def __len__(self) -> int:
        """How many items are left, of all epochs. Asks the store if nothing was loaded yet.

        Raises:
            UsageTypeError: The length of the source is not known. A ``TypeError``, as progress bars take it.
        """
        return Loop(self._what).remaining(Stop())

    def __repr__(self) -> str:
        known = self._what.identity
        given = {key: known.get(key) for key in ("length", "shuffle") if known.get(key) is not None}
        said = {"name": self._what.name, **given, "epochs": self._what.epochs}
        return f"iterate({known['type']}, {', '.join(f'{key}={value!r}' for key, value in said.items())})"


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)  # nan equals nothing: such a position could never be resumed
    return value is None or isinstance(value, (bool, int, str, bytes))


def _caller() -> Hashable:
    """Where ``iterate`` is called: equal when it is called there again."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - as inspect.currentframe, without all its imports
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "taskckpt":
        frame = frame.f_back
    return "" if frame is None else (frame.f_code, frame.f_lasti)


# --- who drives a loop -------------------------------------------------------------------------


def _items(loop: Loop[T]) -> Generator[T]:
    box: list[T] = []
    try:
        loop.look(Stop())
        loop.begin(prefers_async=False)
        while loop.pull(box):
            loop.consumer = id(sys._getframe(1))  # noqa: SLF001
            yield box.pop()  # out of the box, so that nobody holds it but the body
            loop.take_back()
            if loop.is_due():
                loop.prepare()
                loop.commit(Stop())
        loop.finish(Stop())
    except GeneratorExit:
        if _is_break(loop, sys._getframe().f_back):  # noqa: SLF001
            loop.break_off()
        raise
    finally:
        loop.leave()


class _AsyncItems(AsyncIterator[T]):
    def __init__(self, loop: Loop[T]) -> None:
        self._loop = loop
        self._box: list[T] = []
        self._guard: Generator[None] | None = None
        self._is_over = False

    async def __anext__(self) -> T:
        if self._is_over:
            raise StopAsyncIteration
        self._is_over = True  # whatever happens, unless there is an item
        try:
            has_item = await self._advance()
        except BaseException:
            self._loop.leave()
            raise
        if not has_item:
            self._loop.leave()
            raise StopAsyncIteration
        self._is_over = False
        self._loop.consumer = id(sys._getframe(1))  # noqa: SLF001
        return self._box.pop()

    async def _advance(self) -> bool:
        from taskckpt._bridge import in_thread  # asyncio takes 30 ms to import, and plain loops do without

        loop = self._loop
        if self._guard is None:
            await in_thread(loop.look)
            loop.begin(prefers_async=True)
            self._guard = _guard(loop)
            next(self._guard)
        else:
            loop.take_back()
            if loop.is_due():
                loop.prepare()  # here, since it asks the source
                await in_thread(loop.commit)
        if await loop.pull_async(self._box):
            return True
        await in_thread(loop.finish)
        return False


def _guard(loop: Loop[T]) -> Generator[None]:
    """Is closed when the asynchronous loop lets go of its iterator."""
    try:
        yield
    except GeneratorExit:
        if _is_break(loop, sys._getframe().f_back):  # noqa: SLF001
            loop.break_off()
        raise
    finally:
        loop.leave()


# --- how a loop was left -----------------------------------------------------------------------

# What takes the iterator off the stack after break or return; the second one since 3.14.
_LETS_GO = {"POP_TOP", "POP_ITER"}


def _is_break(loop: Loop[T], frame: FrameType | None) -> bool:
    """Whether that frame lets go of the loop because of a ``break`` or ``return``. False if there is any doubt.

    Python does not say. But CPython closes an iterator at once when the ``for`` lets go of it, and the frame then
    still is at the instruction that did so: one of the above, which never raises; or else the one that has raised.
    A loop that is held by a variable, or was asked from elsewhere, is let go of by other instructions and frames.
    """
    if frame is None or loop.consumer != id(frame) or sys.implementation.name != "cpython":
        return False
    return opcode.opname[frame.f_code.co_code[frame.f_lasti]] in _LETS_GO
