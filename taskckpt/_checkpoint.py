"""``Checkpoint``: what a task saves, and what its next attempt loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from taskckpt import _payload
from taskckpt._arguments import (
    SourceKind,
    Target,
    as_sources,
    checked_kind,
    checked_notes,
    checked_options,
    checked_timeout,
)
from taskckpt._attempt import Attempt, Owner, SaveRequest, Use
from taskckpt._history import History
from taskckpt._history_verbs import HistoryVerbs, in_thread
from taskckpt._keep import KeepPolicy, Mode, policy_of
from taskckpt._later import Later, checked_policy
from taskckpt._log.catalogue import beginning
from taskckpt._log.history import LogReader
from taskckpt._log.records import Json
from taskckpt._operation import Stop
from taskckpt._payload import Data, Source
from taskckpt._pending import PendingSave, Policy, deadline_in
from taskckpt._positions import Positions
from taskckpt._progress import Progress, checked_progress, reporting
from taskckpt._selection import CheckpointInfo, Selection, Where, info_of, selection
from taskckpt._stores import Location, is_unset, open_store, parse
from taskckpt._when import schedule_of
from taskckpt.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from typing import Self, Unpack

    from taskckpt._iterate import Iterate
    from taskckpt._sources import Given
    from taskckpt._when import SavePolicy

T = TypeVar("T")


class Which(TypedDict, total=False):
    """Which checkpoint to load; see ``Checkpoint.load_sync``."""

    step: int | None
    where: Where | None
    best: str | None
    mode: Mode


class Saying(TypedDict, total=False):
    """What to say about a checkpoint; see ``Checkpoint.save_sync``."""

    step: int | None
    metadata: Mapping[str, Json] | None
    metrics: Mapping[str, float] | None
    overwrite: bool
    pin: bool


class Checkpoint(HistoryVerbs):
    """The checkpoint of one attempt of a task: ``load`` gives what an earlier one saved, ``save`` saves.

    Making one does no I/O. Threads may share it; a forked child, or a spawned one that gets it as an
    argument, goes on under the same claim. Each ``Checkpoint`` made anew is a new attempt: its first
    ``load`` or ``save`` takes the task over, and older ones end with ``StaleAttemptError``.

    Args:
        dest: The task's place: a URL (``s3://bucket/runs/7/train``) or a local path.
        src: Where to look if ``dest`` has nothing yet: a URL or path, or several, newest first: other
            tasks' places, or one object that Flyte wrote. None, blank and ``{{...}}`` mean nowhere.
        keep: How many of the newest checkpoints stay, in the order of their commits; None keeps all. Or a
            policy: ``LatestN(3) | BestN(1, "loss") | EveryNSteps(1000)``.
        save_policy: What ``should_save`` goes by: ``EverySteps(100)``, ``EverySeconds(60)``, ``Budget("2%")``,
            or for short ``100``, ``"60s"``, ``"2%"``.
        fork_from: Another task's place, URL or ``CheckpointInfo``: this task begins with that checkpoint (of a
            place: the newest), and its records say so. It must be there. Once this task has begun, its own count.
        storage_options: Passed to the fsspec file system (``key``, ``secret``, ``endpoint_url``, ...).
        timeout_s: How long one request to the store may take, its retries included.
        read_only: Never writes and never takes the task over; ``save`` is an error.
        src_kind: What an object at ``src`` is that taskckpt did not write; ``"auto"`` looks inside.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> first = Checkpoint(folder)
    >>> first.load_sync() is None
    True
    >>> first.save_sync(b"step 7")
    >>> Checkpoint(folder).load_sync().read_bytes()
    b'step 7'
    """

    def __init__(
        self,
        dest: Target,
        src: Target | Sequence[Target] | None = None,
        *,
        keep: int | KeepPolicy | None = 3,
        save_policy: SavePolicy | int | str | None = None,
        fork_from: Target | CheckpointInfo | None = None,
        storage_options: Mapping[str, Any] | None = None,
        timeout_s: float = 300,
        read_only: bool = False,
        src_kind: SourceKind = "auto",
    ) -> None:
        sources = tuple(parse(one, what="src") for one in as_sources(src) if not is_unset(one))
        if sources and fork_from is not None:
            raise UsageError("src= and fork_from= both say where to begin: pass one of them.")
        attempt = Attempt(
            parse(dest),
            sources,
            policy=policy_of(keep),
            fork=None if fork_from is None else _fork(fork_from),
            storage_options=checked_options(storage_options),
            timeout_s=checked_timeout(timeout_s),
            read_only=read_only,
            src_kind=checked_kind(src_kind),
        )
        self._begin(attempt, save_policy)

    def _begin(self, attempt: Attempt, save_policy: SavePolicy | int | str | None = None) -> None:
        self._attempt = attempt
        self._later = Later(attempt)
        self._history = History(attempt)
        self._positions = Positions()
        self._schedule = schedule_of(save_policy)
        self._path: Path | None = None

    @classmethod
    def _with(cls, attempt: Attempt, save_policy: SavePolicy | int | str | None = None) -> Self:
        self = cls.__new__(cls)
        self._begin(attempt, save_policy)
        return self

    @classmethod
    def _joining(
        cls,
        dest: Target,
        *,
        keep: int | KeepPolicy | None,
        storage_options: Mapping[str, Any] | None = None,
        timeout_s: float = 300,
    ) -> Self:
        """For housekeeping beside a running attempt: what this writes is written in its name, and ends nobody."""
        location, options = parse(dest), checked_options(storage_options)
        timeout_s = checked_timeout(timeout_s)
        owner = beginning(LogReader(open_store(location, storage_options=options, timeout_s=timeout_s))).owner
        if owner is None:
            raise NotFoundError("Nobody has saved anything here.", uri=location.uri)
        policy = policy_of(keep)
        attempt = Attempt(
            location, policy=policy, storage_options=options, timeout_s=timeout_s, owner=Owner(owner.nonce)
        )
        return cls._with(attempt)

    @classmethod
    def _for_context(
        cls,
        dest: Location,
        *,
        keep: int | KeepPolicy | None,
        save_policy: SavePolicy | int | str | None,
        fork_from: Target | CheckpointInfo | None,
        storage_options: dict[str, Any],
        timeout_s: float,
        owner: Owner,
        src: tuple[str, ...] = (),
    ) -> Self:
        """A context's own checkpoint: one place, and a claim that child processes may share."""
        return cls._with(
            Attempt(
                dest,
                tuple(parse(one, what="src") for one in src),
                policy=policy_of(keep),
                fork=None if fork_from is None else _fork(fork_from),
                storage_options=storage_options,
                timeout_s=checked_timeout(timeout_s),
                owner=owner,
            ),
            save_policy,
        )

    @classmethod
    def of(
        cls,
        *,
        key: str | None = None,
        run: str | None = None,
        task: str | None = None,
        base: Target | None = None,
        storage_options: Mapping[str, Any] | None = None,
        timeout_s: float = 300,
    ) -> Self:
        """A read-only view of another task's checkpoint: it never writes, and never fences that task.

        Args:
            key: The task's ``key=``; or else
            run: its run (default: ``TASKCKPT_RUN`` or ``local``), and
            task: its name.
            base: Where tasks lie (default: ``TASKCKPT_BASE`` or ``./.taskckpt``).
            storage_options: As for ``Checkpoint``.
            timeout_s: As for ``Checkpoint``.

        Raises:
            NotFoundError: There is no such task; the hint lists near names.
        """
        from taskckpt._view import attempt_of

        return cls._with(attempt_of(key, run, task, base, checked_options(storage_options), checked_timeout(timeout_s)))

    # --- what it is ----------------------------------------------------------------------------

    @property
    def path(self) -> Path | None:
        """The newest restored workspace, or None before a load found something."""
        return self._path

    @property
    def loaded(self) -> CheckpointInfo | None:
        """What the last load gave: its step, its metadata; None if that was nothing, or not written by taskckpt."""
        return self._attempt.loaded

    @property
    def remote_destination(self) -> str:
        """Where this task saves to."""
        return self._attempt.dest.uri

    @property
    def remote_source(self) -> str | None:
        """The first ``src``; None if there is none."""
        sources = self._attempt.sources
        return sources[0].uri if sources else None

    def __repr__(self) -> str:
        source = "" if self.remote_source is None else f", src={self.remote_source!r}"
        return f"Checkpoint({self.remote_destination!r}{source}{', read_only=True' if self._attempt.read_only else ''})"

    # --- load ----------------------------------------------------------------------------------

    def load_sync(
        self,
        *,
        step: int | None = None,
        where: Where | None = None,
        best: str | None = None,
        mode: Mode = "min",
        to: Target | None = None,
        replace: bool = False,
        progress: Progress | None = None,
    ) -> Path | None:
        """Restores the newest good checkpoint of any earlier attempt (or of this one), or the one that is asked for.

        A checkpoint that turns out damaged is passed over with a warning, and the one before is taken: of those
        that were asked for, if some were. What is saved next goes on from what was loaded.

        Args:
            step: The checkpoint of that step.
            where: The newest one for which a function of ``CheckpointInfo`` is true, or that has this metadata.
            best: The one with the best metric of that name. One without it, or with NaN, is not considered.
            mode: Whether the lowest (``"min"``) or the highest (``"max"``) metric is the best.
            to: Restore there instead of into a fresh private folder: an absent or empty folder.
            replace: ``to`` may be full: its content is replaced once the new one is complete.
            progress: True for a bar, or a function of (bytes done, bytes in all), called in any thread.
                What it raises ends the load.

        Returns:
            The root of the restored folder, or a file: ``path/"payload"`` (below ``to``, a file has its
            own name). None if nothing was saved yet. A private folder stays as long as this process.

        Raises:
            CorruptCheckpointError: Something was saved, and no copy of it is intact.
            StepNotFoundError: There is none of that step, metadata or metric. The hint lists the steps there are.
            StaleAttemptError: A newer attempt has the task.
            UnavailableError, DeniedError, NotFoundError: The store could not be asked; nothing is known.
            AlreadyExistsError: ``to`` is not empty.
        """
        return self._load(Stop(), selection(step, where, best, mode), to, replace, checked_progress(progress))

    async def load(
        self,
        *,
        step: int | None = None,
        where: Where | None = None,
        best: str | None = None,
        mode: Mode = "min",
        to: Target | None = None,
        replace: bool = False,
        progress: Progress | None = None,
    ) -> Path | None:
        """``load_sync`` without blocking the event loop."""
        which, progress = selection(step, where, best, mode), checked_progress(progress)
        return await in_thread(partial(self._load, which=which, to=to, replace=replace, progress=progress))

    def _load(
        self, stop: Stop, which: Selection | None, to: Target | None, replace: bool, progress: Progress | None
    ) -> Path | None:
        self._later.settle(stop)
        with reporting(progress, "load") as report:
            restored = self._attempt.restore(which, stop, report, to=to, replace=replace)
        self._loaded()
        if restored is None:
            return None
        self._path = restored.folder
        return restored.path

    def _loaded(self) -> None:
        self._positions.adopt(self._attempt.positions)
        if self._schedule is not None:
            self._schedule.resumed(None if self.loaded is None else self.loaded.step)

    def load_bytes_sync(self, *, progress: Progress | None = None, **which: Unpack[Which]) -> bytes | None:
        """The newest good checkpoint of bytes or of a file, as bytes; None if nothing was saved yet.

        Args and raises: As ``load_sync``; UsageError if it is a folder.
        """
        return self._read(Stop(), selection(**which), _payload.read_all, checked_progress(progress))

    async def load_bytes(self, *, progress: Progress | None = None, **which: Unpack[Which]) -> bytes | None:
        """``load_bytes_sync`` without blocking the event loop."""
        chosen, progress = selection(**which), checked_progress(progress)
        return await in_thread(partial(self._read, which=chosen, use=_payload.read_all, progress=progress))

    def _read(self, stop: Stop, which: Selection | None, use: Use[T], progress: Progress | None) -> T | None:
        self._later.settle(stop)
        with reporting(progress, "load") as report:
            found = self._attempt.read(which, use, stop, report)
        self._loaded()
        return found

    def load_state_sync(self, *, progress: Progress | None = None, **which: Unpack[Which]) -> dict[str, Any] | None:
        """The newest good checkpoint of a state, as ``save_state_sync`` got it; None if nothing was saved yet.

        Arrays come back on the host, as those of the library that made them, which must be installed. Nothing
        in a checkpoint is ever executed.

        Args and raises: As ``load_sync``; UsageError if it is no state; MissingDependencyError.
        """
        return self._read(Stop(), selection(**which), _payload.read_state, checked_progress(progress))

    async def load_state(self, *, progress: Progress | None = None, **which: Unpack[Which]) -> dict[str, Any] | None:
        """``load_state_sync`` without blocking the event loop."""
        chosen, progress = selection(**which), checked_progress(progress)
        return await in_thread(partial(self._read, which=chosen, use=_payload.read_state, progress=progress))

    def prev_exists(self) -> bool:
        """Whether ``load`` would find something (or something damaged). Looks, and never takes the task over."""
        return self._attempt.has_something()

    # --- save ----------------------------------------------------------------------------------

    def save_sync(
        self,
        data: Data,
        *,
        step: int | None = None,
        metadata: Mapping[str, Json] | None = None,
        metrics: Mapping[str, float] | None = None,
        overwrite: bool = False,
        pin: bool = False,
        progress: Progress | None = None,
    ) -> CheckpointInfo:
        """Saves bytes, a file or a folder. When it returns, no kill and no power cut undoes it.

        When it raises or is interrupted, the checkpoint before is still the one that loads.

        Args:
            data: ``bytes``, ``bytearray`` or ``memoryview``; or a ``str`` or ``Path`` to a file or folder.
                Of a folder, names, contents, modes (rwx), mtimes, empty folders, and symlinks and hard
                links inside the tree are kept. Owners and extended attributes are not.
            step: How far the task is: a whole number from 0 on. A lower one than before is taken, and is the newest.
            metadata: What JSON can hold, at most 64 KiB with the metrics; to be seen without loading.
            metrics: Numbers by name, NaN and infinity included; ``load(best=)`` and ``BestN`` go by them.
            overwrite: There may be a checkpoint of that step already. It gives way to this one.
            pin: It stays until it is unpinned.
            progress: As for ``load_sync``.

        Returns:
            What ``checkpoints_sync`` says of it.

        Raises:
            StepExistsError: What this attempt goes on from has an intact checkpoint of that step.
            StaleAttemptError: A newer attempt has the task. Final: end this one.
            SourceChangedError: The file or folder kept changing while it was read.
            CommitUnknownError: The store never told whether the save counts; the next save settles it.
            UnavailableError, StorageFullError, DeniedError: Nothing was saved.
            UsageError, NotFoundError: ``data`` is nothing that can be saved, or metadata nothing that JSON can hold.
        """
        request = self._request(step, metadata, metrics, overwrite, pin)
        return self._save(Stop(), partial(_payload.source_of, data), data, request, checked_progress(progress))

    async def save(
        self,
        data: Data,
        *,
        step: int | None = None,
        metadata: Mapping[str, Json] | None = None,
        metrics: Mapping[str, float] | None = None,
        overwrite: bool = False,
        pin: bool = False,
        progress: Progress | None = None,
    ) -> CheckpointInfo:
        """``save_sync`` without blocking the event loop.

        A cancelled save has ended when the cancellation arrives: it never commits afterwards.
        """
        request = self._request(step, metadata, metrics, overwrite, pin)
        look, progress = partial(_payload.source_of, data), checked_progress(progress)
        return await in_thread(partial(self._save, look=look, data=data, request=request, progress=progress))

    def save_state_sync(
        self, state: Mapping[str, Any], *, progress: Progress | None = None, **notes: Unpack[Saying]
    ) -> CheckpointInfo:
        """Saves a dict of plain values, containers, and arrays of NumPy, PyTorch and JAX, without pickle.

        It is as durable as ``save_sync`` makes it. Stored is one safetensors file, which ``load`` gives as
        ``path/"payload"``. What else may be in a state, and what of it is kept, is said in the guide.

        Args:
            state: Nobody may change it before this returns.
            progress: As for ``load_sync``.
            notes: ``step``, ``metadata``, ``metrics``, ``overwrite`` and ``pin``, as for ``save_sync``.

        Raises:
            UsageTypeError: There is something in it that would not come back; the message names its path.
            As ``save_sync`` otherwise.
        """
        request = self._request(**notes)
        return self._save(Stop(), partial(_payload.state_source, state), state, request, checked_progress(progress))

    async def save_state(
        self, state: Mapping[str, Any], *, progress: Progress | None = None, **notes: Unpack[Saying]
    ) -> CheckpointInfo:
        """``save_state_sync`` without blocking the event loop."""
        request = self._request(**notes)
        look, progress = partial(_payload.state_source, state), checked_progress(progress)
        return await in_thread(partial(self._save, look=look, data=state, request=request, progress=progress))

    def _request(
        self,
        step: int | None = None,
        metadata: Mapping[str, Json] | None = None,
        metrics: Mapping[str, float] | None = None,
        overwrite: bool = False,
        pin: bool = False,
    ) -> SaveRequest:
        """Here and now, in the thread that saves: that is where iterations are."""
        return SaveRequest(checked_notes(step, metadata, metrics), self._positions.snapshot(), overwrite, pin)

    def _save(
        self, stop: Stop, look: Callable[[], Source], data: object, request: SaveRequest, progress: Progress | None
    ) -> CheckpointInfo:
        began = time.monotonic()
        self._attempt.expect_writable("save")
        self._attempt.expect_outside(data)
        self._later.settle(stop)
        try:
            with reporting(progress, "save") as report:
                commit = self._attempt.save(look, request, stop, report)
        finally:
            self._note_save(began, request)
        return info_of(commit, commit, self.remote_destination)

    def _note_save(self, began: float, request: SaveRequest) -> None:
        """The task could not go on since then: the time of a save that failed is spent as well."""
        if self._schedule is not None:
            self._schedule.saved(time.monotonic() - began, request.notes.step)

    def save_later(
        self,
        data: Data | Mapping[str, Any],
        *,
        policy: Policy = "latest",
        progress: Progress | None = None,
        **notes: Unpack[Saying],
    ) -> PendingSave:
        """Saves in the background: returns as soon as the caller may change ``data`` again.

        ``bytes`` are kept as they are; other memory, and the arrays of a state, are copied to memory; a file or
        folder is copied into this process's private folder (``TASKCKPT_TMP``), which costs nothing where that is
        on the same file system and this one can share blocks (XFS, Btrfs). One save at a time is in flight.
        Saves are committed in the order of the calls: ``save``, ``load`` and ``clear`` wait for those before.

        An error of the background is raised by whichever comes first: ``result()`` or ``await`` of what this
        returns, ``wait``, the next call of any verb that loads, saves or clears, and the end of the ``@task``
        call. What is pending when the ``@task`` call ends, or else the process (not if it is killed), is
        waited for there.

        Args:
            data: What ``save_sync`` takes, or a dict, as ``save_state_sync`` takes it.
            policy: With ``"latest"`` one save waits, and a newer one takes its place: what that would have
                saved never is. With ``"queue"`` every one is saved: this call waits until no other one does.
            progress: As for ``load_sync``.
            notes: ``step``, ``metadata``, ``metrics``, ``overwrite`` and ``pin``, as for ``save_sync``.

        Raises:
            UsageError, NotFoundError, SourceChangedError: As ``save_sync``, and at once.
            StorageFullError: There is no room for the copy.
            The error of an earlier save in the background: then this one has not begun.
        """
        began, request = time.monotonic(), self._request(**notes)
        try:
            return self._later.save(data, request, checked_policy(policy), checked_progress(progress))
        finally:
            self._note_save(began, request)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until all that ``save_later`` began so far has ended. Ctrl-C ends the waiting, not the saves.

        Args:
            timeout_s: How many seconds to wait at most; None: for ever.

        Raises:
            StillPendingError: It has not ended in time. Also a ``TimeoutError``.
            The first error of those saves that nobody got yet.
        """
        self._later.wait(deadline_in(timeout_s))
        self._later.raise_failures()

    def iterate(
        self,
        source: Given[T],
        *,
        every: int | str | SavePolicy | None = None,
        name: str | None = None,
        shuffle: int | None = None,
        epochs: int = 1,
        fingerprint: object = None,
    ) -> Iterate[T]:
        """The items of ``source``, from where the last attempt stopped: ``for item in cp.iterate(source):``.

        Its position is part of the task's checkpoints: each save in the body carries it, with the current item as
        done. A loop without any save commits its position when it ends or is left by ``break``.

        Args:
            source: A sequence; anything that can be iterated anew from its beginning; an object with ``get_state``
                and ``set_state``, or ``state_dict`` and ``load_state_dict``; or a function that makes one of these.
                For ``async for``, an asynchronous one.
            every: Commit the position that often, with the last payload: ``100`` (items), ``"60s"``, ``"2%"``. After
                a kill, at most so many items come again. What the body changes must lie elsewhere then: the payload
                stays as it was saved last.
            name: Tells the iterations of one task apart; needed if there are several.
            shuffle: A seed: the items of a sequence come in a random order, another one in each epoch.
            epochs: How often to go through the source.
            fingerprint: Plain values that say what the source is. Other ones than before are an error.

        Raises:
            IdentityMismatchError: The position belongs to another source, length, seed or fingerprint. At the loop.
            UsageTypeError: The source cannot be resumed: an iterator that can be gone through only once.
        """
        from taskckpt._iterate import Iterate

        return Iterate(
            source,
            attempt=self._attempt,
            later=self._later,
            positions=self._positions,
            every=every,
            name=name,
            shuffle=shuffle,
            epochs=epochs,
            fingerprint=fingerprint,
        )

    def should_save(self, step: int) -> bool:
        """Whether it is time to save, by ``save_policy``. Ask at each step, and save if so.

        Raises:
            UsageError: This checkpoint has no ``save_policy``.
        """
        if self._schedule is None:
            raise UsageError(
                "This checkpoint has no save_policy.", hint='Checkpoint(..., save_policy=100), "60s" or "2%".'
            )
        return self._schedule.should_save(step)

    def clear_sync(self) -> None:
        """Starts over: what was saved so far exists no more, for this and every later attempt.

        Raises:
            StaleAttemptError: A newer attempt has the task; nothing was cleared.
        """
        self._clear(Stop())

    async def clear(self) -> None:
        """``clear_sync`` without blocking the event loop."""
        await in_thread(self._clear)

    def _clear(self, stop: Stop) -> None:
        self._attempt.expect_writable("clear")
        self._later.settle(stop)
        self._attempt.clear(stop)
        self._positions.forget()

    def _end(self) -> None:
        self._attempt.end()
        self._later.end()


def _fork(source: Target | CheckpointInfo) -> Location:
    return parse(source.uri if isinstance(source, CheckpointInfo) else source, what="fork_from")
