"""The state of an iterator: who has one, what is stored of it, and whether it belongs to another iterator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

from taskckpt.errors import UsageError, UsageTypeError

T_co = TypeVar("T_co", covariant=True)

# What must be the same in a state and in the iterator that it is put into, if both have it. The names are Grain's.
IDENTITY_FIELDS = ("sampler_repr", "data_source_repr", "shard_count", "worker_count")

# What a handler makes of a state: as ``save`` and ``save_state`` take it.
Content: TypeAlias = "bytes | dict[str, Any]"

# Of a field that does not fit, so much is shown.
_LONGEST_SHOWN = 300


@runtime_checkable
class CheckpointableIterator(Protocol[T_co]):
    """An iterator whose position can be saved: a base class, and what ``isinstance`` finds in those of others.

    A subclass defines ``get_state``, ``set_state`` and ``__next__``. The state is a dict that ``save_state`` takes:
    plain values, containers, and arrays and random keys of NumPy, PyTorch and JAX.
    """

    def __iter__(self) -> CheckpointableIterator[T_co]:
        return self

    def __next__(self) -> T_co:
        raise NotImplementedError(f"{type(self).__name__} does not define __next__.")

    @abstractmethod
    def get_state(self) -> dict[str, Any]:
        """All that ``set_state`` needs to go on behind the last item that was given."""
        ...

    @abstractmethod
    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where ``get_state`` was called, in this process or in another."""
        ...


@runtime_checkable
class _HasState(Protocol):
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any], /) -> object: ...


@runtime_checkable
class _HasStateDict(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


# What can be saved and restored: the iterators of Datarax and Grain, and those of PyTorch.
Resumable: TypeAlias = _HasState | _HasStateDict


class StateHandler(Protocol):
    """What turns the state of an iterator into what is stored, and back."""

    def to_content(self, state: dict[str, Any], /) -> Content:
        """Bytes, which are stored as they are, or a dict, which is stored as ``save_state`` does."""
        ...

    def from_content(self, content: Any, /) -> dict[str, Any]:
        """The state, from what ``to_content`` made of it."""
        ...


class StateCodec:
    """The default handler: a state is stored as ``save_state`` does, without pickle.

    Plain values, containers and arrays come back equal and of the same type; what would not is refused at save time,
    by its path.
    """

    def to_content(self, state: dict[str, Any], /) -> Content:
        """The state itself."""
        return state

    def from_content(self, content: Any, /) -> dict[str, Any]:
        """The state itself.

        Raises:
            UsageError: Another handler has stored it.
        """
        if isinstance(content, bytes):
            raise UsageError(
                "The checkpoint holds bytes, and no state.", hint="Pass the handler= that it was saved with."
            )
        return cast("dict[str, Any]", content)


# --- what iterators give and take --------------------------------------------------------------


def state_of(iterator: object) -> dict[str, Any]:
    """What the iterator gives.

    Raises:
        UsageTypeError: It gives nothing, or no dict.
    """
    for name in ("get_state", "state_dict"):
        get_state = getattr(iterator, name, None)
        if callable(get_state):
            return expect_dict(get_state(), f"{type(iterator).__name__}.{name}()")
    raise _without("get_state() nor state_dict()", iterator)


def setter_of(iterator: object) -> Callable[[dict[str, Any]], object]:
    """What puts a state into the iterator.

    Raises:
        UsageTypeError: It has nothing of the kind.
    """
    for name in ("set_state", "load_state_dict"):
        set_state = getattr(iterator, name, None)
        if callable(set_state):
            return cast("Callable[[dict[str, Any]], object]", set_state)
    raise _without("set_state() nor load_state_dict()", iterator)


def _without(what: str, iterator: object) -> UsageTypeError:
    hint = None
    if hasattr(iterator, "__iter__") and not hasattr(iterator, "__next__"):
        hint = "Pass the iterator that items are taken from, if that has state: batches = iter(pipeline)."
    return UsageTypeError(f"{type(iterator).__name__} has neither {what}.", hint=hint)


def expect_dict(state: object, source: str) -> dict[str, Any]:
    """Raises UsageTypeError if what ``source`` gave is no dict."""
    if not isinstance(state, dict):
        raise UsageTypeError(f"{source} gave no dict, but {type(state).__name__}.")
    return cast("dict[str, Any]", state)


class Difference(NamedTuple):
    """A field of the identity that does not fit."""

    name: str
    saved: object
    now: object

    def __str__(self) -> str:
        return f"{self.name} was {_shown(self.saved)} and is {_shown(self.now)}"


def differences(saved: Mapping[str, Any], iterator: Resumable) -> list[Difference]:
    """The fields of the identity that differ, of those that both the saved state and the iterator's own have."""
    if not any(name in saved for name in IDENTITY_FIELDS):
        return []  # some loaders start their workers when they are asked for their state
    now = state_of(iterator)
    names = [name for name in IDENTITY_FIELDS if name in saved and name in now]
    return [Difference(name, saved[name], now[name]) for name in names if saved[name] != now[name]]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
