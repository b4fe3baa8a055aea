"""What ``iterate`` goes over: where an epoch of it begins, and how it gets to an item in the middle.

Synchronous and asynchronous sources differ only in the iterator that comes out: whoever drives it knows how to.
"""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from array import array
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar, cast

from taskckpt.errors import IdentityMismatchError, UsageError, UsageTypeError

T = TypeVar("T")

Given: TypeAlias = "Iterable[T] | AsyncIterable[T] | Callable[[], Iterable[T] | AsyncIterable[T]]"


class Mark(NamedTuple):
    """The state of a source, after so many items of the epoch have come out of it."""

    after: int
    state: object


class Opened(NamedTuple):
    """The items of an epoch.

    Attributes:
        items: An iterator.
        is_async: Whether it is an asynchronous one.
        skip: How many of its items come first that are done already.
        mark: A state in this epoch, to come back to; None if there are none.
        keeper: What has states; None if nothing has.
        outlives_epochs: Whether that is there in the next epoch, too.
        close: To be called when no more items are wanted.
    """

    items: Any
    is_async: bool = False
    skip: int = 0
    mark: Mark | None = None
    keeper: object = None
    outlives_epochs: bool = False
    close: Callable[[], object] | None = None


class Source(ABC, Generic[T]):
    """A source, and what of it must be the same when a later attempt goes on.

    Attributes:
        identity: Plain values by name.
    """

    def __init__(self, type_name: str, length: int | None) -> None:
        self.identity: dict[str, object] = {"type": type_name, "length": length}

    @abstractmethod
    def open(self, epoch: int, done: int, mark: Mark | None, *, is_there: bool, prefers_async: bool) -> Opened:
        """The items of an epoch, from one of them on.

        Args:
            epoch: Which one, from 0 on.
            done: How many of its items are done.
            mark: A state that the source had in this epoch, at or before that item; None: it had none.
            is_there: It is in that state now, because it has just ended the epoch before.
            prefers_async: Of a source that can be iterated over in both ways, take the asynchronous one.
        """

    def least(self) -> int:
        """How many items must have come at the end of an epoch. What can tell only by its end: none."""
        return 0


def state_of(keeper: object, after: int) -> Mark:
    """The state of what keeps one, now, after so many items of the epoch: a copy."""
    get, _ = _state_methods(keeper) or _no_state(keeper)
    return Mark(after, copy.deepcopy(get()))  # many give out what they go on changing


def source_of(given: Given[T], shuffle: int | None) -> Source[T]:
    """What ``iterate`` was given.

    Raises:
        UsageTypeError: It cannot be gone over a second time, or in no stable order; the message says what can.
        UsageError: ``shuffle`` is given, and it is no sequence.
    """
    _refuse(given)
    if _is_sequence(given) and not _state_methods(given):
        return _Sequence(cast("Sequence[T]", given), shuffle)
    if shuffle is not None:
        raise UsageError(
            f"shuffle= takes a sequence, with len() and [], and not {_a(given)}.",
            hint="Shuffle in the source itself: its state, or the order in which it gives its items, is resumed.",
        )
    if _is_function(given):
        return _Walk(cast("Callable[[], Iterable[T]]", given), "function", None, makes_anew=True)
    if not _is_iterable(given):
        raise UsageTypeError(
            f"iterate() cannot go over {_a(given)}.", hint="Pass a sequence, an iterable, or a function."
        )
    _refuse_one_shot(given)
    return _Walk(lambda: cast("Iterable[T]", given), _name(given), _length(given), makes_anew=False)


# --- sequences ---------------------------------------------------------------------------------


class _Sequence(Source[T]):
    def __init__(self, given: Sequence[T], shuffle: int | None) -> None:
        if shuffle is not None and (isinstance(shuffle, bool) or not isinstance(shuffle, int)):
            raise UsageTypeError(f"shuffle={shuffle!r} must be a seed, which is an int, or None.")
        super().__init__(_name(given), len(given))
        self.identity["shuffle"] = shuffle
        self._given = given
        self._shuffle = shuffle

    def least(self) -> int:
        # A list may have got longer meanwhile; and a [] that raises StopIteration looks like the end.
        return max(cast("int", self.identity["length"]), len(self._given))

    def open(self, epoch: int, done: int, mark: Mark | None, *, is_there: bool, prefers_async: bool) -> Opened:  # noqa: ARG002
        length = cast("int", self.identity["length"])
        order = range(length) if self._shuffle is None else shuffled(length, self._shuffle, epoch)
        return Opened(map(self._given.__getitem__, order[done:]))


def shuffled(length: int, seed: int, epoch: int) -> Sequence[int]:
    """The numbers below ``length`` in an order that depends on nothing else: the same in every version of Python.

    A Fisher-Yates shuffle on ``random.Random.random()``. Of that alone Python promises that it stays the same;
    ``random.shuffle`` may change.
    """
    draw = random.Random(f"{seed} {epoch}").random  # noqa: S311 - no secret
    order = array("q", range(length))
    for last in range(length - 1, 0, -1):
        other = int(draw() * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order


# --- everything else ---------------------------------------------------------------------------


class _Walk(Source[T]):
    """What is gone over from its beginning, or from a state."""

    def __init__(
        self,
        make: Callable[[], Iterable[T] | AsyncIterable[T]],
        type_name: str,
        length: int | None,
        *,
        makes_anew: bool,
    ) -> None:
        super().__init__(type_name, length)
        self._make = make
        self._makes_anew = makes_anew

    def open(self, epoch: int, done: int, mark: Mark | None, *, is_there: bool, prefers_async: bool) -> Opened:  # noqa: ARG002
        made = self._make()
        if not _is_iterable(made) and not _is_iterator(made):
            raise UsageTypeError(f"The function that iterate() was given makes {_a(made)}, which has no items.")
        _refuse(made)
        has_states = _state_methods(made) is not None
        # What is its own iterator may begin anew in iter(), so a state in the middle of an epoch comes after that.
        # A DataLoader looks in iter() at the state that it was given; so does all else at one from before an epoch.
        is_early = has_states and (mark is None or mark.after == 0 or not _is_iterator(made))
        if is_early and mark is None and not done:
            mark = state_of(made, 0)
        elif is_early and mark is not None and not is_there:
            _set_state(made, mark)
        is_async = _has(made, "__aiter__") and (prefers_async or not _has(made, "__iter__"))
        items: Any = aiter(cast("AsyncIterable[T]", made)) if is_async else iter(cast("Iterable[T]", made))
        keeper = made if has_states else items if _state_methods(items) else None
        if mark is not None and not is_early:
            _set_state(keeper, mark)
        skip = done - (0 if mark is None else mark.after)
        close = getattr(made, "close", None) if self._makes_anew else None  # an open file, a generator
        return Opened(items, is_async, skip, mark, keeper, outlives_epochs=has_states, close=close)


def _set_state(keeper: object, mark: Mark) -> None:
    _, set_state = _state_methods(keeper) or _no_state(keeper)
    set_state(copy.deepcopy(mark.state))  # some go on changing what they are given


def _no_state(keeper: object) -> Any:
    raise IdentityMismatchError(
        f"The position was saved with the state of its source, and this one has none ({_name(keeper)}).",
        hint="A source with state has get_state and set_state, or state_dict and load_state_dict.",
    )


# --- what is it? -------------------------------------------------------------------------------


def _refuse(given: object) -> None:
    if isinstance(given, (str, bytes, bytearray)):
        raise UsageTypeError(
            f"iterate() does not go over the characters of {_a(given)}.",
            hint="For the lines of a file: cp.iterate(lambda: open(path)). For characters: cp.iterate(list(text)).",
        )
    if isinstance(given, (set, frozenset)):
        raise UsageTypeError(
            "A set gives its items in another order in each process.", hint="Pass sorted(...) of it, or a list."
        )
    if _state_methods(given) is None and any(
        (kind.__module__, kind.__name__) == ("torch.utils.data.dataloader", "DataLoader") for kind in type(given).mro()
    ):
        raise UsageTypeError(
            "A DataLoader of PyTorch cannot say where it is, and shuffles anew each time.",
            hint="torchdata.stateful_dataloader.StatefulDataLoader takes the same arguments, and can.",
        )


def _refuse_one_shot(given: object) -> None:
    if _is_iterator(given) and _state_methods(given) is None:
        raise UsageTypeError(
            f"iterate() cannot resume {_a(given)}: it can be gone over only once.",
            hint="Pass what it is made from; or a function that makes it: cp.iterate(lambda: read(path)); "
            "or give it get_state and set_state.",
        )


def _name(value: object) -> str:
    return type(value).__qualname__


def _a(value: object) -> str:
    name = _name(value)
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _has(value: object, *names: str) -> bool:
    return all(hasattr(type(value), name) for name in names)


def _is_iterator(value: object) -> bool:
    return _has(value, "__next__") or _has(value, "__anext__")


def _is_iterable(value: object) -> bool:
    return _has(value, "__iter__") or _has(value, "__aiter__") or _has(value, "__getitem__")


def _is_sequence(value: object) -> bool:
    # What has keys is indexed by them: dicts, and the frames and series of pandas.
    return _has(value, "__len__", "__getitem__") and not hasattr(value, "keys")


def _is_function(value: object) -> bool:
    return callable(value) and not _is_iterable(value) and not _is_iterator(value)


def _length(value: object) -> int | None:
    try:
        return len(cast("Sequence[object]", value))
    except (TypeError, NotImplementedError):  # those of IterableDatasets may say so as late as this
        return None


def _state_methods(value: object) -> tuple[Callable[[], object], Callable[[Any], object]] | None:
    for get, put in (("get_state", "set_state"), ("state_dict", "load_state_dict")):
        if _has(value, get, put):
            return getattr(value, get), getattr(value, put)
    return None
