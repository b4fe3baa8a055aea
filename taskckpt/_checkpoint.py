"""``Checkpoint``: what a task saves, and what its next attempt loads."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from taskckpt import _payload, _workspace
from taskckpt._arguments import (
    SourceKind,
    Target,
    as_sources,
    checked_keep,
    checked_kind,
    checked_options,
    checked_timeout,
)
from taskckpt._chain import Chain, Loadable, Origin
from taskckpt._foreign import ForeignObject
from taskckpt._layout import LOG, keyed_prefix, task_prefix
from taskckpt._log import TaskLog, new_nonce
from taskckpt._operation import Stop
from taskckpt._payload import PAYLOAD, Data, Source
from taskckpt._records import Commit
from taskckpt._retention import Kept
from taskckpt._store import Location, Store, is_unset, open_store, parse
from taskckpt.errors import (
    NotFoundError,
    SourceChangedError,
    StaleAttemptError,
    UsageError,
)

if TYPE_CHECKING:
    from typing import Self

logger = logging.getLogger("taskckpt")

T = TypeVar("T")

# A folder that changes while it is read is read again this often.
SAVE_TRIES = 3
LOCK_POLL_S = 0.05


class Checkpoint:
    """The checkpoint of one attempt of a task: ``load`` gives what an earlier one saved, ``save`` saves.

    Making one does no I/O. Threads may share it; a forked child, or a spawned one that gets it as an
    argument, goes on under the same claim. Each ``Checkpoint`` made anew is a new attempt: its first
    ``load`` or ``save`` takes the task over, and older ones end with ``StaleAttemptError``.

    Args:
        dest: The task's place: a URL (``s3://bucket/runs/7/train``) or a local path.
        src: Where to look if ``dest`` has nothing yet: a URL or path, or several, newest first: other
            tasks' places, or one object that Flyte wrote. None, blank and ``{{...}}`` mean nowhere.
        keep: How many of the newest checkpoints stay; None keeps all.
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
        keep: int | None = 3,
        storage_options: Mapping[str, Any] | None = None,
        timeout_s: float = 300,
        read_only: bool = False,
        src_kind: SourceKind = "auto",
    ) -> None:
        self._setup(
            parse(dest),
            tuple(parse(one, what="src") for one in as_sources(src) if not is_unset(one)),
            keep=checked_keep(keep),
            storage_options=checked_options(storage_options),
            timeout_s=checked_timeout(timeout_s),
            read_only=read_only,
            src_kind=checked_kind(src_kind),
        )

    def _setup(
        self,
        dest: Location,
        sources: tuple[Location, ...],
        *,
        keep: int | None = 3,
        storage_options: dict[str, Any],
        timeout_s: float = 300,
        read_only: bool = False,
        src_kind: SourceKind = "auto",
        claim_nonce: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._dest = dest
        self._sources = sources
        self._keep = keep
        self._storage_options = storage_options
        self._timeout_s = timeout_s
        self._read_only = read_only
        self._src_kind: SourceKind = src_kind
        self._claim_nonce = claim_nonce or new_nonce()
        self._about = dict(about or {})
        self._on_hold: Callable[[], None] | None = None
        self._resumed_from: Kept | None = None
        self._ended = False
        self._path: Path | None = None
        self._home = self._pid = os.getpid()
        self._forget()

    @classmethod
    def _for_context(
        cls,
        dest: Location,
        *,
        keep: int | None,
        storage_options: dict[str, Any],
        timeout_s: float,
        claim_nonce: str,
        inherited: bool,
        about: Mapping[str, Any],
        on_hold: Callable[[], None] | None,
    ) -> Self:
        """A context's own checkpoint: one place, and a claim that child processes may share.

        ``on_hold`` is called once when this process has claimed or joined.
        """
        self = cls.__new__(cls)
        self._setup(
            dest,
            (),
            keep=checked_keep(keep),
            storage_options=storage_options,
            timeout_s=checked_timeout(timeout_s),
            claim_nonce=claim_nonce,
            about=about,
        )
        self._on_hold = on_hold
        self._home = 0 if inherited else self._home  # made in a process above this one
        return self

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._store: Store | None = None
        self._log: TaskLog | None = None
        self._saves_under_way = 0

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
        from taskckpt import context

        if (key is None) == (task is None):
            raise UsageError("Checkpoint.of takes either key= or task=.")
        root = parse(context.base_and_origin(base)[0], what="base")
        prefix = keyed_prefix(key) if key is not None else task_prefix(context.run_and_origin(run)[0], str(task))
        self = cls.__new__(cls)
        self._setup(
            root.child(prefix),
            (),
            storage_options=checked_options(storage_options),
            timeout_s=checked_timeout(timeout_s),
            read_only=True,
        )
        run_folder, _, name = prefix.partition("/")
        self._expect_known(root.child(run_folder), name)
        return self

    def _expect_known(self, run: Location, name: str) -> None:
        if self._open().list_below(LOG, first_page=True).sizes:
            return
        store = open_store(run, storage_options=self._storage_options, timeout_s=self._timeout_s)
        names = sorted({key.partition("/")[0] for key in store.list_below("").sizes})
        raise NotFoundError(
            f"There is no task {name!r}.",
            uri=self.remote_destination,
            hint=f"There are: {', '.join(_nearest(name, names))}." if names else "This run has no tasks at all.",
        )

    # --- what it is ----------------------------------------------------------------------------

    @property
    def path(self) -> Path | None:
        """The newest restored workspace, or None before a load found something."""
        return self._path

    @property
    def remote_destination(self) -> str:
        """Where this task saves to."""
        return self._dest.uri

    @property
    def remote_source(self) -> str | None:
        """The first ``src``; None if there is none."""
        return self._sources[0].uri if self._sources else None

    def __repr__(self) -> str:
        source = f", src={self.remote_source!r}" if self._sources else ""
        return f"Checkpoint({self.remote_destination!r}{source}{', read_only=True' if self._read_only else ''})"

    # --- load ----------------------------------------------------------------------------------

    def load_sync(self, *, to: Target | None = None, replace: bool = False) -> Path | None:
        """Restores the newest good checkpoint of any earlier attempt (or of this one).

        A checkpoint that turns out damaged is passed over with a warning, and the one before is taken.

        Args:
            to: Restore there instead of into a fresh private folder: an absent or empty folder.
            replace: ``to`` may be full: its content is replaced once the new one is complete.

        Returns:
            The root of the restored folder, or a file: ``path/"payload"`` (below ``to``, a file has its
            own name). None if nothing was saved yet. A private folder stays as long as this process.

        Raises:
            CorruptCheckpointError: Something was saved, and no copy of it is intact.
            StaleAttemptError: A newer attempt has the task.
            UnavailableError, DeniedError, NotFoundError: The store could not be asked; nothing is known.
            AlreadyExistsError: ``to`` is not empty.
        """
        return self._load(Stop(), to=to, replace=replace)

    async def load(self, *, to: Target | None = None, replace: bool = False) -> Path | None:
        """``load_sync`` without blocking the event loop."""
        from taskckpt._bridge import in_thread

        return await in_thread(partial(self._load, to=to, replace=replace))

    def load_bytes_sync(self) -> bytes | None:
        """The newest good checkpoint of bytes or of a file, as bytes; None if nothing was saved yet.

        Raises: As ``load_sync``; UsageError if it is a folder.
        """
        return self._load_bytes(Stop())

    async def load_bytes(self) -> bytes | None:
        """``load_bytes_sync`` without blocking the event loop."""
        from taskckpt._bridge import in_thread

        return await in_thread(self._load_bytes)

    def prev_exists(self) -> bool:
        """Whether ``load`` would find something (or something damaged). Looks, and never takes the task over."""
        return self._chain(Stop()).has_something(self._origin(self._open()))

    def _load(self, stop: Stop, *, to: Target | None = None, replace: bool = False) -> Path | None:
        began = time.monotonic()
        target = None if to is None else self._expect_harmless(to)
        if target is None and replace:
            raise UsageError("replace=True belongs to load(to=...).")

        def restore(origin: Origin, found: Loadable) -> tuple[str, str]:
            if target is None:
                return _workspace.restore_fresh(partial(_fill, origin.store, found, stop, PAYLOAD)), PAYLOAD
            name = _payload.restored_name(found)
            _workspace.restore_into(target, partial(_fill, origin.store, found, stop, name), replace=replace)
            return target, name

        found = self._newest_good(restore, stop)
        if found is None:
            logger.info("Nothing to resume from in %s.", self.remote_destination)
            return None
        where, loaded, (folder, name) = found
        self._path = Path(folder)
        logger.info("Resumed from %s in %.2f s.", _described(where, loaded), time.monotonic() - began)
        return self._path if _payload.kind_of(loaded) == "folder" else self._path / name

    def _load_bytes(self, stop: Stop) -> bytes | None:
        found = self._newest_good(lambda origin, found: _payload.read_all(origin.store, found, stop), stop)
        return None if found is None else found[2]

    def _newest_good(self, use: Callable[[Origin, Loadable], T], stop: Stop) -> tuple[Origin, Loadable, T] | None:
        store = self._open()
        view = None
        if self._claims:
            with self._exclusively(stop):
                view = self._own_log(store).view(stop)
                self._tell_hold()
        origin = self._origin(store)
        found = self._chain(stop).newest_good(origin, view, use)
        if found is None:
            return None
        where, loaded, _ = found
        if where is origin and self._claims and isinstance(loaded, Commit):
            with self._exclusively(stop):
                self._resumed_from = self._own_log(store).resumed_from = Kept.of(loaded)
        return found

    def _origin(self, store: Store) -> Origin:
        reader = None if self._log is None else self._log.reader
        return Origin(self._dest, store, reader)

    def _chain(self, stop: Stop) -> Chain:
        def open_source(location: Location) -> Store:
            return open_store(location, storage_options=self._storage_options, timeout_s=self._timeout_s)

        return Chain(self._sources, open_source, src_kind=self._src_kind, stop=stop)

    # --- save ----------------------------------------------------------------------------------

    def save_sync(self, data: Data) -> None:
        """Saves bytes, a file or a folder. When it returns, no kill and no power cut undoes it.

        When it raises or is interrupted, the checkpoint before is still the one that loads.

        Args:
            data: ``bytes``, ``bytearray`` or ``memoryview``; or a ``str`` or ``Path`` to a file or folder.
                Of a folder, names, contents, modes (rwx), mtimes, empty folders, and symlinks and hard
                links inside the tree are kept. Owners and extended attributes are not.

        Raises:
            StaleAttemptError: A newer attempt has the task. Final: end this one.
            SourceChangedError: The file or folder kept changing while it was read.
            CommitUnknownError: The store never told whether the save counts; the next save settles it.
            UnavailableError, StorageFullError, DeniedError: Nothing was saved.
            UsageError, NotFoundError: ``data`` is nothing that can be saved.
        """
        self._save(data, Stop())

    async def save(self, data: Data) -> None:
        """``save_sync`` without blocking the event loop.

        A cancelled save has ended when the cancellation arrives: it never commits afterwards.
        """
        from taskckpt._bridge import in_thread

        await in_thread(partial(self._save, data))

    def _save(self, data: Data, stop: Stop) -> None:
        self._expect_writable("save")
        self._expect_outside(data)
        source = _payload.source_of(data)  # what cannot be saved is refused before anything is written
        store = self._open()
        with self._exclusively(stop):
            log = self._own_log(store)
            log.hold(stop)
            self._tell_hold()
            for remaining in reversed(range(SAVE_TRIES)):
                try:
                    with self._saving():
                        self._save_once(store, log, source, stop)
                except SourceChangedError as error:
                    if not remaining:
                        raise
                    logger.info("Reading it again: %s", error)
                    source = _payload.source_of(data)
                else:
                    return

    def _save_once(self, store: Store, log: TaskLog, source: Source, stop: Stop) -> None:
        began = time.monotonic()
        nonce = new_nonce()
        try:
            content, stored = _payload.upload(store, source, partial(log.next_payload_key, nonce), stop)
        except NotFoundError:
            # A newer attempt removes what older ones have half uploaded: if that is why, say so.
            log.view(stop)
            raise
        uploaded = time.monotonic()
        commit = log.commit(nonce, content, stored, stop)
        logger.info(
            "Saved %s to slot %d of %s: %d bytes, stored as %d, in %.2f s (commit %.3f s).",
            content.kind,
            commit.stamp.slot,
            self.remote_destination,
            content.digest.size_bytes,
            stored.digest.size_bytes,
            time.monotonic() - began,
            time.monotonic() - uploaded,
        )

    def clear_sync(self) -> None:
        """Starts over: what was saved so far exists no more, for this and every later attempt.

        Raises:
            StaleAttemptError: A newer attempt has the task; nothing was cleared.
        """
        self._clear(Stop())

    async def clear(self) -> None:
        """``clear_sync`` without blocking the event loop."""
        from taskckpt._bridge import in_thread

        await in_thread(self._clear)

    def _clear(self, stop: Stop) -> None:
        self._expect_writable("clear")
        store = self._open()
        with self._exclusively(stop):
            if self._saves_under_way:
                raise UsageError("clear was called in the middle of a save of the same thread.", uri=store.uri)
            log = self._own_log(store)
            if not store.list_below(LOG, first_page=True).sizes and not self._sources:
                return  # nothing was ever saved here
            log.hold(stop)
            self._tell_hold()
            log.clear(stop)
        logger.info("Cleared %s.", self.remote_destination)

    # --- inside --------------------------------------------------------------------------------

    @property
    def _claims(self) -> bool:
        """Whether a load takes the task over."""
        return not self._read_only and not self._ended

    def _end(self) -> None:
        """The task call that this belongs to has ended: what it left running in this process may save no more."""
        self._ended = True

    def _tell_hold(self) -> None:
        if self._on_hold is not None and self._log is not None and self._log.holds:
            tell, self._on_hold = self._on_hold, None
            tell()

    @contextmanager
    def _saving(self) -> Generator[None]:
        self._saves_under_way += 1
        try:
            yield
        finally:
            self._saves_under_way -= 1

    def _expect_writable(self, verb: str) -> None:
        if self._ended:
            raise StaleAttemptError(
                f"The task call that this checkpoint belongs to has ended; it cannot {verb}.",
                uri=self.remote_destination,
                hint="Let what the call left running end; a new call has a checkpoint of its own.",
            )
        if self._read_only:
            raise UsageError(
                f"This is a read-only view; it cannot {verb}.",
                uri=self.remote_destination,
                hint="Use the task's own checkpoint: taskckpt.checkpoint() or Checkpoint(dest).",
            )

    def _expect_outside(self, data: object) -> None:
        """A folder that holds its own checkpoints would be saved with all of them, for ever growing."""
        if not self._dest.is_local or not isinstance(data, (str, os.PathLike)) or not os.path.isdir(data):
            return
        if _workspace.contains(os.path.realpath(os.fsdecode(data)), os.path.realpath(self._dest.path)):
            raise UsageError(
                "The folder to be saved contains the place that it is saved to.",
                uri=self.remote_destination,
                hint="Save a subfolder, or set TASKCKPT_BASE to a place outside.",
            )

    def _expect_harmless(self, to: Target) -> str:
        """Restoring must touch no checkpoint: neither replace the store nor write into it."""
        folder = parse(to, what="to")
        if not folder.is_local:
            raise UsageError("load(to=...) restores into a local folder.", uri=folder.uri)
        real = os.path.realpath(folder.path)
        for place in self._local_places():
            if _workspace.contains(real, place) or _workspace.contains(place, real):
                raise UsageError(
                    "This folder is, contains or lies in a place where checkpoints are.",
                    uri=folder.path,
                    hint=f"Restore elsewhere than {place}.",
                )
        return folder.path

    def _local_places(self) -> list[str]:
        return [os.path.realpath(place.path) for place in (self._dest, *self._sources) if place.is_local]

    def _open(self) -> Store:
        self._notice_fork()
        if self._dest.in_one_process and self._home != os.getpid():
            raise UsageError(
                "memory:// is one process only, and this is a child process.",
                uri=self.remote_destination,
                hint="Use a folder or a bucket to share state between processes.",
            )
        if self._store is not None:
            return self._store  # without the lock: a call that was cancelled must not wait for a long save
        with self._lock:
            if self._store is None:
                self._store = open_store(self._dest, storage_options=self._storage_options, timeout_s=self._timeout_s)
            return self._store

    def _own_log(self, store: Store) -> TaskLog:
        if self._log is None:
            about = {"host": platform.node(), "pid": os.getpid()} | self._about
            self._log = TaskLog(
                store,
                claim_nonce=self._claim_nonce,
                keep=self._keep,
                about={key: _plain(value) for key, value in about.items() if value is not None},
                sources=tuple(source.record_uri for source in self._sources),
            )
            self._log.resumed_from = self._resumed_from
        return self._log

    def _notice_fork(self) -> None:
        """In a forked child: the same claim, but a writer, connections and locks of its own."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._forget()

    @contextmanager
    def _exclusively(self, stop: Stop) -> Generator[None]:
        # Re-entrant, so that a signal handler may save while the same thread is saving.
        while not self._lock.acquire(timeout=LOCK_POLL_S):
            stop.check()
        try:
            yield
        finally:
            self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("_lock", "_store", "_log"):
            del state[name]
        state["_on_hold"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
        self._pid = os.getpid()


def _fill(store: Store, found: Loadable, stop: Stop, name: str, folder: str) -> None:
    if isinstance(found, ForeignObject):
        _payload.restore_foreign(store, found, folder, name, stop)
    else:
        _payload.restore(store, found, folder, name, stop)


def _described(where: Origin, found: Loadable) -> str:
    if isinstance(found, ForeignObject):
        return f"the {found.kind} of {found.size_bytes} bytes at {where.store.uri}"
    size = found.content.digest.size_bytes
    return (
        f"slot {found.stamp.slot} of {where.store.uri} ({found.content.kind}, {size} bytes, saved {found.stamp.time})"
    )


def _nearest(name: str, names: Sequence[str]) -> Sequence[str]:
    import difflib

    return difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]


def _plain(value: object) -> object:
    """Fit for a record: names from the operating system may not be valid Unicode."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
