"""``IteratorCheckpoint`` and ``PipelineCheckpoint``: Datarax's names for saving and restoring iterators."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from taskckpt import _payload
from taskckpt._arguments import Target
from taskckpt._chain import Loadable
from taskckpt._checkpoint import Checkpoint, Saying
from taskckpt._layout import slot_key
from taskckpt._log.records import Commit, Json
from taskckpt._operation import Stop
from taskckpt._progress import Report
from taskckpt._selection import info_of, of_step
from taskckpt._stores import Store
from taskckpt.errors import IdentityMismatchError, StepNotFoundError, UsageError, UsageTypeError
from taskckpt.iterators._retention import Retention
from taskckpt.iterators._states import (
    Content,
    Difference,
    Resumable,
    StateCodec,
    StateHandler,
    differences,
    expect_dict,
    setter_of,
    state_of,
)

if TYPE_CHECKING:
    from typing import Any, Self

R = TypeVar("R", bound=Resumable)

# The one name in a checkpoint's metadata that is not the user's.
FINGERPRINT = "taskckpt.fingerprint"


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
        self._retention: Retention | None = None
        if isinstance(base_dir, Checkpoint):
            self.checkpoint = base_dir
        else:
            self._retention = Retention(base_dir)
            self.checkpoint = self._retention.checkpoint

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
        if keep is not None and _index("keep", keep) < 1:
            raise UsageError(f"keep={keep!r} must be at least 1, or None to keep all.")
        content = self.handler.to_content(state_of(iterator))
        notes: Saying = {
            "step": None if step is None else _index("step", step),
            "metadata": self._described(metadata),
            "overwrite": overwrite,
        }
        if self._retention is not None:
            self._retention.begin(keep)
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
        self._retention.end()
        newest = self._retention.newest
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
            self._retention.end()

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
        set_state = setter_of(iterator)
        found = self._load(None if step is None else _index("step", step))
        if found is None:
            raise StepNotFoundError(
                "There is no checkpoint to restore.",
                uri=self.checkpoint.remote_destination,
                hint="has_checkpoint() tells whether there is one.",
            )
        state = expect_dict(self.handler.from_content(found.content), "The handler's from_content()")
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
        different = differences(state, iterator)
        saved = found.metadata.get(FINGERPRINT)
        if saved != self.fingerprint:
            different = [Difference("fingerprint", saved, self.fingerprint), *different]
        if different:
            raise IdentityMismatchError(
                f"The checkpoint does not belong to this iterator: {'; '.join(map(str, different))}.",
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
        # Of several with one step that one which ``restore`` takes: the newest that was not rolled back.
        in_turn = sorted(oldest_first, key=lambda one: one.in_lineage)
        uris = {one.step: one.uri for one in in_turn if one.step is not None}
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


def _index(name: str, value: int) -> int:
    """An int, also from the integers of NumPy and JAX."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageTypeError(f"{name} must be an int, not {type(value).__name__}.")
    return operator.index(value)
