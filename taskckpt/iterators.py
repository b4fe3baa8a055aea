"""Resumable iterators: the state of a data pipeline, saved and put back, under the names that Datarax gave them.

What counts is the state of the iterator, not how it is made: ``get_state`` and ``set_state``, as those of Datarax and
Grain have them, or ``state_dict`` and ``load_state_dict``, as PyTorch's have them.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

from taskckpt import _payload
from taskckpt._arguments import Target
from taskckpt._chain import Loadable
from taskckpt._checkpoint import Checkpoint, Saying
from taskckpt._keep import Candidate, KeepPolicy, LatestN, policy_of, text_of
from taskckpt._layout import slot_key
from taskckpt._log.records import Commit, Json
from taskckpt._operation import Stop
from taskckpt._progress import Report
from taskckpt._selection import info_of, of_slot, of_step
from taskckpt._stores import Store
from taskckpt.errors import (
    CorruptCheckpointError,
    IdentityMismatchError,
    StepNotFoundError,
    UsageError,
    UsageTypeError,
)

if TYPE_CHECKING:
    from typing import Self

    from taskckpt._pending import PendingSave

T_co = TypeVar("T_co", covariant=True)

# What must be the same in a state and in the iterator that it is put into, if both have it. The names are Grain's.
IDENTITY_FIELDS = ("sampler_repr", "data_source_repr", "shard_count", "worker_count")

# The one name in a checkpoint's metadata that is not the user's.
FINGERPRINT = "taskckpt.fingerprint"

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
R = TypeVar("R", bound=Resumable)


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


class IteratorCheckpoint:
    """Saves the state of iterators in one place, and puts it back: Datarax's names, on any store.

    The place holds nothing else: a model that must fit the position goes into the same commit with
    ``Checkpoint.iterate``. Like every ``Checkpoint`` this is a new attempt: its first save or restore takes the place
    over, and older ones, in whatever process, end with ``StaleAttemptError``. Listings never do that. It is for
    one thread at a time. As a context manager it waits in the end for what is saved in the background.

    Args:
        base_dir: The place: a folder, a URL (``s3://bucket/run/pipeline``), or a ``Checkpoint``. A ``Checkpoint`` has
            a ``keep`` of its own, and that one decides what stays, not the ``keep`` of single saves.
        handler: What turns a state into stored content; None: ``save_state``'s codec.
        async_checkpointing: Saves go on in the background, from a copy of the state.
        fingerprint: What the data are (their version, or a hash of the list of files). It is saved with each
            checkpoint, and must be the same when that is restored; having none is a fingerprint too.

    Attributes:
        checkpoint: The ``Checkpoint`` under it, for all that one can do: metadata, pins, rollback, clear.
        handler: What turns a state into stored content.
        fingerprint: As given; it may be changed between calls.
    """

    def __init__(
        self,
        base_dir: Target | Checkpoint,
        handler: StateHandler | None = None,
        async_checkpointing: bool = False,
        *,
        fingerprint: str | None = None,
    ) -> None:
        self.handler: StateHandler = StateCodec() if handler is None else handler
        self.fingerprint = fingerprint
        self._in_background = async_checkpointing
        self._retention = None if isinstance(base_dir, Checkpoint) else _Retention(base_dir)
        if isinstance(base_dir, Checkpoint):
            self.checkpoint = base_dir
        else:
            assert self._retention is not None
            self.checkpoint = Checkpoint(base_dir, keep=self._retention.policy)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.checkpoint.remote_destination!r})"

    # --- save ----------------------------------------------------------------------------------

    def save_to_directory(
        self,
        iterator: Resumable,
        step: int | None = None,
        keep: int | None = 1,
        overwrite: bool = False,
        metadata: Mapping[str, Json] | None = None,
    ) -> str:
        """Saves the state of an iterator. When it returns, no kill undoes it.

        What is older goes only after the new checkpoint was read back and found to be as it was saved. What is newer
        is decided by the order of the saves, not by the steps.

        Args:
            iterator: It has ``get_state`` or ``state_dict``.
            step: A number to find it by, from 0 on; None: only ``restore`` without a step finds it.
            keep: How many of the newest checkpoints stay; None keeps all. What is pinned stays besides, and for a
                while what was resumed from.
            overwrite: The step may be there already, and is saved anew.
            metadata: What to say about it: whatever JSON can say, under any name but ``taskckpt.fingerprint``.

        Returns:
            The checkpoint's URI; with ``async_checkpointing``, where it has none yet, that of the place.

        Raises:
            UsageError: The iterator has no state to give, or there is something in it that would not come back (the
                message names its path). Nothing was saved.
            StepExistsError: The step is there, and ``overwrite`` is False. Also a ValueError.
            CorruptCheckpointError: It cannot be read back as it was saved. What is older is still there.
            StaleAttemptError, UnavailableError, DeniedError: As ``Checkpoint.save``.
        """
        policy_of(keep)
        content = self.handler.to_content(_state_of(iterator))
        notes: Saying = {
            "step": None if step is None else _index("step", step),
            "metadata": self._described(metadata),
            "overwrite": overwrite,
        }
        if self._retention is not None:
            self._retention.begin(self.checkpoint, keep)
        if self._in_background:
            pending = self.checkpoint.save_later(content, policy="queue", **notes)
            if self._retention is not None:
                self._retention.pending.append(pending)
            return self.checkpoint.remote_destination
        if isinstance(content, bytes):
            saved = self.checkpoint.save_sync(content, **notes)
        else:
            saved = self.checkpoint.save_state_sync(content, **notes)
        if self._retention is None:
            return saved.uri
        self._retention.end(self.checkpoint)
        newest = _newest_of(self.checkpoint)
        assert newest is not None
        return info_of(newest, newest, self.checkpoint.remote_destination).uri  # dropping gave it a new record

    def _described(self, metadata: Mapping[str, Json] | None) -> Mapping[str, Json]:
        metadata = {} if metadata is None else metadata
        if FINGERPRINT in metadata:
            raise UsageError(f"metadata may not have the name {FINGERPRINT!r}.", hint="fingerprint= is stored there.")
        if self.fingerprint is None:
            return metadata
        if not isinstance(self.fingerprint, str):
            raise UsageTypeError(f"fingerprint must be a str, not {type(self.fingerprint).__name__}.")
        return {**metadata, FINGERPRINT: self.fingerprint}

    def wait_until_finished(self) -> None:
        """Waits for all saves in the background; then goes what is older than ``keep``.

        Raises:
            The first error of those saves that nobody got yet.
            CorruptCheckpointError: The newest cannot be read back as it was saved. What is older is still there.
        """
        self.checkpoint.wait()
        if self._retention is not None:
            self._retention.end(self.checkpoint)

    def close(self) -> None:
        """Waits for all saves in the background, as ``wait_until_finished`` does. Repeatable."""
        self.wait_until_finished()

    # --- restore -------------------------------------------------------------------------------

    def restore(self, iterator: R, step: int | None = None) -> R:
        """Puts a saved state into an iterator, which then goes on where it was saved.

        Nothing is set before all is known to fit. Without a step, a checkpoint that turns out damaged is passed over
        with a warning, and the one before is taken.

        Args:
            iterator: It has ``set_state`` or ``load_state_dict``, and is made as the one that was saved.
            step: Which checkpoint: the newest of this step; None: the newest of all, with or without a step.

        Returns:
            The same iterator.

        Raises:
            StepNotFoundError: There is no such checkpoint, or none at all; it lists the steps there are. Also a
                ValueError.
            IdentityMismatchError: It belongs to other data, or to another split of them; it shows both sides. Also a
                ValueError.
            CorruptCheckpointError: It is damaged. Also a ValueError.
            UsageError: The iterator takes no state.
            StaleAttemptError, UnavailableError, DeniedError: As ``Checkpoint.load``.
        """
        set_state = _setter_of(iterator)
        found = self._load(None if step is None else _index("step", step))
        if found is None:
            raise StepNotFoundError(
                "There is no checkpoint to restore.",
                uri=self.checkpoint.remote_destination,
                hint="has_checkpoint() tells whether there is one.",
            )
        state = _expect_dict(self.handler.from_content(found.content), "The handler's from_content()")
        self._expect_same_data(iterator, state, found)
        set_state(state)
        return iterator

    def restore_latest(self, iterator: R) -> R:
        """``restore`` without a step: the newest checkpoint, with or without one."""
        return self.restore(iterator)

    def _load(self, step: int | None) -> _Found | None:
        which = None if step is None else of_step(step)
        return self.checkpoint._read(Stop(), which, _content_of, None)  # noqa: SLF001 - what is public tells no metadata

    def _expect_same_data(self, iterator: Resumable, state: Mapping[str, Any], found: _Found) -> None:
        differences: list[tuple[str, object, object]] = []
        saved = found.metadata.get(FINGERPRINT)
        if saved != self.fingerprint:
            differences.append(("fingerprint", saved, self.fingerprint))
        if any(name in state for name in IDENTITY_FIELDS):
            now = _state_of(iterator)
            names = [name for name in IDENTITY_FIELDS if name in state and name in now]
            differences += [(name, state[name], now[name]) for name in names if state[name] != now[name]]
        if differences:
            told = "; ".join(f"{name} was {_shown(old)} and is {_shown(new)}" for name, old, new in differences)
            raise IdentityMismatchError(
                f"The checkpoint does not belong to this iterator: {told}.",
                uri=found.uri,
                hint="Make the iterator as it was when it was saved, or start over: .checkpoint.clear_sync().",
            )

    # --- what there is -------------------------------------------------------------------------

    def get_latest_step(self) -> int | None:
        """The step of the newest checkpoint that has one; None if there is none."""
        latest = self.checkpoint.latest_step_sync()
        if latest is not None:
            return latest
        return next((one.step for one in self.checkpoint.checkpoints_sync() if one.step is not None), None)

    def list_checkpoints(self) -> dict[int, str]:
        """The URI of each checkpoint that has a step, by its step, in ascending order."""
        oldest_first = reversed(self.checkpoint.checkpoints_sync())
        uris = {one.step: one.uri for one in oldest_first if one.step is not None}
        return dict(sorted(uris.items()))

    def has_checkpoint(self) -> bool:
        """Whether there is one, with or without a step. One that is damaged counts: ``restore`` tells what it is."""
        return self.checkpoint.prev_exists()


class PipelineCheckpoint(IteratorCheckpoint):
    """``IteratorCheckpoint``, with saves at every so many steps."""

    def save(
        self,
        pipeline: Resumable,
        step: int | None = None,
        metadata: Mapping[str, Json] | None = None,
        keep: int | None = 3,
        overwrite: bool = False,
    ) -> str:
        """``save_to_directory``, in the words of Datarax's quick reference."""
        return self.save_to_directory(pipeline, step=step, keep=keep, overwrite=overwrite, metadata=metadata)

    def save_to_step(
        self,
        data_stream: Resumable,
        step: int,
        interval: int = 1000,
        keep: int | None = 5,
        overwrite: bool = False,
        metadata: Mapping[str, Json] | None = None,
    ) -> str | None:
        """``save_to_directory`` if the step is a multiple of ``interval``; 0 is one.

        Returns:
            The checkpoint's URI; None if it was not the time for one.

        Raises:
            UsageError: ``interval`` is below 1.
            As ``save_to_directory``.
        """
        if _index("interval", interval) < 1:
            raise UsageError(f"interval={interval!r} must be at least 1.")
        if _index("step", step) % interval:
            return None
        return self.save_to_directory(data_stream, step=step, keep=keep, overwrite=overwrite, metadata=metadata)


class _Found(NamedTuple):
    """What was loaded."""

    content: Content
    metadata: Mapping[str, Json]
    uri: str


def _content_of(store: Store, found: Loadable, stop: Stop, report: Report | None) -> _Found:
    is_state = _payload.kind_of(found) == "state"
    content = (
        _payload.read_state(store, found, stop, report) if is_state else _payload.read_all(store, found, stop, report)
    )
    if isinstance(found, Commit):
        return _Found(content, found.notes.metadata, f"{store.uri}/{slot_key(found.stamp.slot)}")
    return _Found(content, {}, found.uri)


# --- what is older -----------------------------------------------------------------------------


class _Newest(KeepPolicy):
    """The newest ``n``, where each save says how many; None for all."""

    n: int | None = 1

    @property
    def reach(self) -> int | None:
        return self.n

    def picks(self, newest_first: Sequence[Candidate]) -> Iterable[tuple[int, str]]:
        return LatestN(len(newest_first) or 1 if self.n is None else self.n).picks(newest_first)

    def __str__(self) -> str:
        return text_of(None if self.n is None else LatestN(self.n))


class _Retention:
    """What is older goes only after what is new was read back: until then, one more stays for each that is new."""

    def __init__(self, place: Target) -> None:
        self.policy = _Newest()
        self.pending: list[PendingSave] = []
        self._view = Checkpoint(place, read_only=True)
        self._keep: int | None = None
        self._unchecked = 0

    def begin(self, checkpoint: Checkpoint, keep: int | None) -> None:
        """One more will be saved."""
        still_pending = [save for save in self.pending if not save.done()]
        if len(still_pending) < len(self.pending):
            self._read_back(checkpoint)
            self._unchecked = len(still_pending)
        self.pending = still_pending
        self._keep = keep
        self._unchecked += 1
        self.policy.n = None if keep is None else keep + self._unchecked

    def end(self, checkpoint: Checkpoint) -> None:
        """All that began is saved."""
        self.pending.clear()
        if self._unchecked == 0:
            return
        self._read_back(checkpoint)
        self._unchecked = 0
        if self._keep is not None:
            self.policy.n = self._keep
            checkpoint.prune_sync()

    def _read_back(self, checkpoint: Checkpoint) -> None:
        """The newest that this checkpoint has saved: it stands for those before it."""
        newest = _newest_of(checkpoint)
        if self._keep is None or newest is None:
            return  # nothing goes, or nothing was saved
        try:
            self._view._read(Stop(), of_slot(newest.stamp.slot), _read_to_its_end, None)  # noqa: SLF001
        except (CorruptCheckpointError, StepNotFoundError) as error:  # the latter if the record itself is damaged
            raise CorruptCheckpointError(
                f"What was saved just now cannot be read back as it was: {error.message}",
                uri=error.uri,
                hint="What is older is still there. Look for a disk that fails, and save again.",
            ) from error


def _newest_of(checkpoint: Checkpoint) -> Commit | None:
    log = checkpoint._attempt._log  # noqa: SLF001 - a listing leaves out a damaged record; its writer does not
    return None if log is None else log.newest


def _read_to_its_end(store: Store, found: Loadable, stop: Stop, _: Report | None) -> None:
    _payload.verify(store, found, stop)


# --- states ------------------------------------------------------------------------------------


def _state_of(iterator: object) -> dict[str, Any]:
    """What the iterator gives.

    Raises:
        UsageTypeError: It gives nothing, or no dict.
    """
    for name in ("get_state", "state_dict"):
        get_state = getattr(iterator, name, None)
        if callable(get_state):
            return _expect_dict(get_state(), f"{type(iterator).__name__}.{name}()")
    raise _without("get_state() nor state_dict()", iterator)


def _setter_of(iterator: object) -> Callable[[dict[str, Any]], object]:
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


def _expect_dict(state: object, source: str) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise UsageTypeError(f"{source} gave no dict, but {type(state).__name__}.")
    return cast("dict[str, Any]", state)


def _index(name: str, value: int) -> int:
    """An int, also from the integers of NumPy and JAX."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageTypeError(f"{name} must be an int, not {type(value).__name__}.")
    return operator.index(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
