"""One attempt at a task, in one process: it takes the task over, loads, saves and clears.

``Checkpoint`` is the front of it, with the words for users; saves in the background come here as well.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from taskckpt import _payload, _workspace
from taskckpt._arguments import SourceKind, Target
from taskckpt._chain import Chain, Found, Loadable, Origin, place_of
from taskckpt._keep import KeepPolicy, text_of
from taskckpt._layout import LOG, slot_key
from taskckpt._log import catalogue
from taskckpt._log.history import LogReader
from taskckpt._log.records import NO_NOTES, Commit, Notes, Stored
from taskckpt._log.slots import new_nonce
from taskckpt._log.writer import Saved, TaskLog
from taskckpt._operation import Stop
from taskckpt._payload import PAYLOAD, Source
from taskckpt._progress import Report
from taskckpt._selection import CheckpointInfo, Selection, info_of
from taskckpt._stores import Location, Store, open_store, parse
from taskckpt._telling import tell_loaded, tell_saved
from taskckpt.errors import (
    AmbiguousIdentityError,
    CorruptCheckpointError,
    NotFoundError,
    SourceChangedError,
    StaleAttemptError,
    StepExistsError,
    UsageError,
)

logger = logging.getLogger("taskckpt")

T = TypeVar("T")

# A folder that changes while it is read is read again this often.
SAVE_TRIES = 3
LOCK_POLL_S = 0.05


# Makes something of a checkpoint that lies in a store.
Use: TypeAlias = Callable[[Store, Loadable, Stop, Report | None], T]


class Restored(NamedTuple):
    """A workspace, and what was restored in it: all of it, or a file."""

    folder: Path
    path: Path


class SaveRequest(NamedTuple):
    """What is to be saved, beside the data.

    Attributes:
        positions: Where the iterations of the task were when the save was called; None: there are none.
        overwrite: Whether there may be a checkpoint of that step already.
        pin: Whether it is pinned from the start.
    """

    notes: Notes = NO_NOTES
    positions: dict[str, Any] | None = None
    overwrite: bool = False
    pin: bool = False


@dataclass(frozen=True)
class Owner:
    """Whose attempt it is: what the context of a task says to its checkpoint.

    Attributes:
        claim_nonce: Names the claim; decided before any child process, so that those join it.
        inherited: Made in a process above this one.
        about: What records tell people about this attempt.
        rank: Which of the processes this is that do the task together; only the first, 0, may write.
        stale: What is raised once a newer attempt has the task.
        stands_for: What else must be the same in all attempts, where a name might be given to several tasks.
        on_hold: Called once, when this process has claimed or joined.
        on_nothing: Called when a load finds nothing.
    """

    claim_nonce: str = field(default_factory=new_nonce)
    inherited: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    stale: type[StaleAttemptError] = StaleAttemptError
    stands_for: str | None = None
    on_hold: Callable[[], None] | None = None
    on_nothing: Callable[[], None] | None = None


class Attempt:
    """Threads may share it; a child process that gets it, by fork or pickled, goes on under the same claim.

    All verbs are synchronous, and look at their ``stop`` before each write.

    Args:
        dest: The task's place.
        sources: Where to look if it has nothing yet.
        policy: Which checkpoints stay; None: all.
        fork: The checkpoint to begin with, or the place whose newest it is; unless an earlier attempt did already.
        owner: Whose attempt it is; None: its own.

    Attributes:
        has_payload: Whether what was loaded or saved last is more than positions.
        loaded: What was loaded last; None if that was nothing, or somebody else's object.
    """

    def __init__(
        self,
        dest: Location,
        sources: tuple[Location, ...] = (),
        *,
        storage_options: dict[str, Any],
        timeout_s: float,
        policy: KeepPolicy | None = None,
        fork: Location | None = None,
        read_only: bool = False,
        src_kind: SourceKind = "auto",
        owner: Owner | None = None,
    ) -> None:
        self._owner = owner = owner or Owner()
        self._on_hold = owner.on_hold
        self.dest = dest
        self.sources = sources
        self.read_only = read_only or owner.rank != 0
        self._storage_options = storage_options
        self._timeout_s = timeout_s
        self.policy = policy
        self._fork = fork
        self._src_kind: SourceKind = src_kind
        self._resumed_from: Commit | str | None = None
        self._positions: dict[str, Any] | None = None  # None: not known yet
        self.has_payload = False
        self.loaded: CheckpointInfo | None = None
        self._ended = False
        self._pid = os.getpid()
        self._home = 0 if owner.inherited else self._pid
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._store: Store | None = None
        self._log: TaskLog | None = None
        self._saves_under_way = 0
        self._holder: int | None = None

    @property
    def claim_nonce(self) -> str:
        """Names the claim: this attempt's, and that of its child processes."""
        return self._owner.claim_nonce

    def end(self) -> None:
        """The task call that this belongs to has ended: what it left running in this process may save no more."""
        self._ended = True

    # --- load ----------------------------------------------------------------------------------

    def restore(
        self, which: Selection | None, stop: Stop, report: Report | None, *, to: Target | None, replace: bool
    ) -> Restored | None:
        """The newest good checkpoint as files, in a fresh private folder or in ``to``. See ``Checkpoint``."""
        target = None if to is None else self._expect_harmless(to)
        if target is None and replace:
            raise UsageError("replace=True belongs to load(to=...).")

        def restore(origin: Origin, found: Loadable) -> Restored:
            name = PAYLOAD if target is None else _payload.restored_name(found)
            fill = partial(_payload.restore, origin.store, found, name, stop, report)
            if target is None:
                folder = Path(_workspace.restore_fresh(fill))
            else:
                _workspace.restore_into(target, fill, replace=replace)
                folder = Path(target)
            return Restored(folder, folder if _payload.kind_of(found) == "folder" else folder / name)

        return self._newest_good(restore, which, stop)

    def read(self, which: Selection | None, use: Use[T], stop: Stop, report: Report | None) -> T | None:
        """What ``use`` makes of the newest good checkpoint; None if there is none."""
        return self._newest_good(lambda origin, found: use(origin.store, found, stop, report), which, stop)

    def find_positions(self, stop: Stop) -> dict[str, Any]:
        """Where the iterations were when that was saved which this attempt resumed from or saved last.

        If it has neither loaded nor saved, it resumes from the newest good checkpoint now, whose payload is read to
        the end and not kept.
        """
        with self._exclusively(stop):  # what another thread commits meanwhile is not to be gone back from
            if self._positions is None:
                self.read(None, lambda store, found, stop, _report: _payload.verify(store, found, stop), stop, None)
            return dict(self._positions or {})

    def has_something(self) -> bool:
        """Whether a load would find something (or something damaged). Looks, and never takes the task over."""
        return self._chain(Stop()).has_something(self._origin(self.open_store()))

    def _newest_good(self, use: Callable[[Origin, Loadable], T], which: Selection | None, stop: Stop) -> T | None:
        began = time.monotonic()
        store = self.open_store()
        self._find_fork(store)
        view = newest_then = None
        if self._claims:
            with self._exclusively(stop):
                log = self._own_log(store)
                view, newest_then = log.view(stop), log.newest
                self._tell_hold()
        using = _Timed(use)

        def load(origin: Origin, found: Loadable) -> tuple[dict[str, Any], T | None]:
            self._expect_same_task(found)
            # A fork begins its own iterations; only the task's own places, and src, say where they were.
            positions = _payload.read_positions(origin.store, found, stop) if origin.slot is None else {}
            return positions, using(origin, found) if _payload.kind_of(found) != "nothing" else None

        found, without_payload = self._chain(stop).newest_good(self._origin(store), view, load, which)
        self.loaded = None if found is None else _told(found)
        with self._exclusively(stop):
            # What another thread has saved meanwhile is newer than what was loaded.
            if self._log is None or self._log.newest is newest_then:
                self.has_payload = found is not None
                self._resume_from(without_payload or found, store)
        if found is None:
            logger.info("Nothing to resume from in %s.", self.dest.uri)
            if self._owner.on_nothing is not None:
                self._owner.on_nothing()
            return None
        tell_loaded(found.origin, found.what, find_s=time.monotonic() - began - using.seconds, restore_s=using.seconds)
        return found.result[1]

    def _expect_same_task(self, found: Loadable) -> None:
        """Two tasks that were given one name must not load each other's state."""
        mine = self._owner.stands_for
        if mine is None or not isinstance(found, Commit):
            return
        theirs = (found.repeats or found.stamp).about.get("for", mine)
        if theirs != mine:
            raise AmbiguousIdentityError(
                f"What was saved here was saved by {theirs!r}, and this is {mine!r}: two tasks have one name, or the "
                "program was moved, or is called in another way.",
                uri=self.dest.uri,
                hint="Two tasks: give each a name by TASKCKPT_INDEX, TASKCKPT_TASK or key=. One: name it by key=, or "
                "start it as before.",
            )

    def _resume_from(self, found: Found[tuple[dict[str, Any], T | None]] | None, store: Store) -> None:
        """What is saved next goes on from there."""
        self._positions = {} if found is None else found.result[0]
        if found is None or not self._claims:
            return
        if not isinstance(found.what, Commit):
            self._resumed_from = found.what.uri
        elif found.origin.store is store:
            self._resumed_from = found.what
        else:
            self._resumed_from = f"{found.origin.store.uri}/{slot_key(found.what.original)}"
        self._own_log(store).resumed(self._resumed_from)

    def reader(self) -> LogReader:
        """The log, to be looked at only."""
        return LogReader(self.open_store()) if self._log is None else self._log.reader

    def protected(self, *, until: int) -> dict[int, str]:
        """The original of what stays because this attempt resumed from it, until it has made so many commits."""
        return {} if self._log is None else self._log.protected(until=until)

    def went_back(self, commit: Commit, positions: dict[str, Any]) -> None:
        """The task was rolled back."""
        self._resumed_from, self._positions, self.has_payload = commit, positions, commit.has_payload
        self.loaded = info_of(commit, commit, self.dest.uri)

    @property
    def positions(self) -> dict[str, Any]:
        """Where the iterations were when that was saved which was loaded last."""
        return dict(self._positions or {})

    def _origin(self, store: Store) -> Origin:
        return Origin(self.dest, store, None if self._log is None else self._log.reader)

    def _chain(self, stop: Stop) -> Chain:
        def open_source(location: Location) -> Store:
            return open_store(location, storage_options=self._storage_options, timeout_s=self._timeout_s)

        return Chain(self.sources, open_source, src_kind=self._src_kind, stop=stop)

    # --- save ----------------------------------------------------------------------------------

    def save(self, look: Callable[[], Source], request: SaveRequest, stop: Stop, report: Report | None) -> Commit:
        """Saves what ``look`` finds; a source that changes while it is read is looked at again. See ``Checkpoint``.

        Not refused after the end of the task call: the caller has asked ``expect_writable``, perhaps a while ago.
        """
        began = time.monotonic()
        source = look()  # what cannot be saved is refused before anything is written
        with self.holding(stop) as log:
            if not request.overwrite and request.notes.step is not None:
                self._expect_new_step(log, request.notes.step, stop)
            for remaining in reversed(range(SAVE_TRIES)):
                try:
                    with self._saving():
                        return self._save_once(log, source, request, stop, report, began)
                except SourceChangedError as error:
                    if not remaining:
                        raise
                    logger.info("Reading it again: %s", error)
                    source = look()
        raise AssertionError("unreachable")  # the last try returns or raises

    def _save_once(
        self, log: TaskLog, source: Source, request: SaveRequest, stop: Stop, report: Report | None, began: float
    ) -> Commit:
        ready = time.monotonic()
        store, nonce = self.open_store(), new_nonce()
        key_for = partial(log.next_payload_key, nonce)
        try:
            content, stored = _payload.upload(store, source, key_for, stop, report)
            stored_positions = self._store_positions(request.positions, key_for, stop)
        except NotFoundError:
            # A newer attempt removes what older ones have half uploaded: if that is why, say so.
            log.view(stop)
            raise
        uploaded = time.monotonic()
        # An attempt that knows of no positions carries on what earlier ones left.
        saved = Saved(content, stored, request.notes, stored_positions, request.positions is None, request.pin)
        commit = log.commit(nonce, saved, stop)
        self.has_payload = True
        if request.positions is not None:
            self._positions = request.positions
        tell_saved(
            commit,
            self.dest.uri,
            prepare_s=ready - began,
            upload_s=uploaded - ready,
            commit_s=time.monotonic() - uploaded,
        )
        return commit

    def save_positions(self, look: Callable[[], dict[str, Any]], stop: Stop, *, alone: bool = False) -> None:
        """Commits the positions of iterations, with the last payload again, or with none.

        They are looked at when no other thread can commit any more, which may have later ones of its own. ``alone``:
        not if a payload was saved meanwhile, by a child process, that belongs to another position.
        """
        with self.holding(stop) as log, self._saving():
            if alone:
                head = catalogue.beginning(self.reader()).head
                if isinstance(head, Commit) and head.has_payload:
                    return
            nonce, positions = new_nonce(), look()
            stored = self._store_positions(positions, partial(log.next_payload_key, nonce), stop)
            if stored is not None:
                log.move_on(nonce, stored, stop)
            self._positions = positions

    def _store_positions(
        self, positions: Mapping[str, Any] | None, key_for: Callable[[str], str], stop: Stop
    ) -> Stored | None:
        if not positions:
            return None
        source = _payload.state_source(positions)
        return _payload.upload(self.open_store(), source, lambda _: key_for(".positions"), stop)[1]

    def _expect_new_step(self, log: TaskLog, step: int, stop: Stop) -> None:
        """Raises StepExistsError if the lineage has an intact checkpoint of that step."""
        position = log.position
        if position is None or position.lineage.highest_step is None or step > position.lineage.highest_step:
            return
        store = self.open_store()
        for commit in log.ancestors():
            if commit.notes.step != step:
                continue
            try:
                _payload.verify(store, commit, stop)
            except (CorruptCheckpointError, NotFoundError) as error:
                logger.warning("The checkpoint of step %d is damaged, and saved anew: %s", step, error)
            else:
                raise StepExistsError(
                    f"There is a checkpoint of step {step} already, saved at {commit.stamp.time}.",
                    uri=f"{store.uri}/{slot_key(commit.stamp.slot)}",
                    hint="To save it once more: overwrite=True. To go on from an earlier one: load(step=...) first.",
                )

    @contextmanager
    def holding(self, stop: Stop) -> Generator[TaskLog]:
        """This process alone adds to the log inside; the attempt has taken the task over."""
        store = self.open_store()
        self._find_fork(store)
        with self._exclusively(stop):
            log = self._own_log(store)
            log.hold(stop)
            self._tell_hold()
            yield log

    @contextmanager
    def _saving(self) -> Generator[None]:
        self._saves_under_way += 1
        try:
            yield
        finally:
            self._saves_under_way -= 1

    # --- clear ---------------------------------------------------------------------------------

    def clear(self, stop: Stop) -> None:
        """What was saved so far exists no more. See ``Checkpoint.clear_sync``; the caller asks ``expect_writable``."""
        store = self.open_store()
        with self._exclusively(stop):
            if self._saves_under_way:
                raise UsageError("clear was called in the middle of a save of the same thread.", uri=store.uri)
            log = self._own_log(store)
            if not store.list_below(LOG, first_page=True).names and not self.sources:
                return  # nothing was ever saved here
            log.hold(stop)
            self._tell_hold()
            log.clear(stop)
            self._positions, self._resumed_from, self.has_payload, self.loaded = {}, None, False, None
        logger.info("Cleared %s.", self.dest.uri)

    # --- what is refused -----------------------------------------------------------------------

    def expect_writable(self, verb: str) -> None:
        """Raises if this attempt has ended (StaleAttemptError) or is a view (UsageError)."""
        if self._ended:
            raise self._owner.stale(
                f"The task call that this checkpoint belongs to has ended; it cannot {verb}.",
                uri=self.dest.uri,
                hint="Let what the call left running end; a new call has a checkpoint of its own.",
            )
        if self._owner.rank:
            raise UsageError(
                f"Rank {self._owner.rank} does not {verb}: several processes do this task together, and rank 0 saves.",
                uri=self.dest.uri,
                hint="Save on rank 0 only: if taskckpt.ctx().rank == 0. For a checkpoint of each rank's own: "
                "taskckpt.checkpoint('my-task', per_rank=True).",
            )
        if self.read_only:
            raise UsageError(
                f"This is a read-only view; it cannot {verb}.",
                uri=self.dest.uri,
                hint="Use the task's own checkpoint: taskckpt.checkpoint() or Checkpoint(dest).",
            )

    def expect_outside(self, data: object) -> None:
        """A folder that holds its own checkpoints would be saved with all of them, for ever growing."""
        if not self.dest.is_local or not isinstance(data, (str, os.PathLike)) or not os.path.isdir(data):
            return
        if _workspace.contains(os.path.realpath(os.fsdecode(data)), os.path.realpath(self.dest.path)):
            raise UsageError(
                "The folder to be saved contains the place that it is saved to.",
                uri=self.dest.uri,
                hint="Save a subfolder, or set TASKCKPT_BASE to a place outside.",
            )

    def _expect_harmless(self, to: Target) -> str:
        """Restoring must touch no checkpoint: neither replace the store nor write into it."""
        folder = parse(to, what="to")
        if not folder.is_local:
            raise UsageError("load(to=...) restores into a local folder.", uri=folder.uri)
        real = os.path.realpath(folder.path)
        for place in (os.path.realpath(one.path) for one in (self.dest, *self.sources) if one.is_local):
            if _workspace.contains(real, place) or _workspace.contains(place, real):
                raise UsageError(
                    "This folder is, contains or lies in a place where checkpoints are.",
                    uri=folder.path,
                    hint=f"Restore elsewhere than {place}.",
                )
        inside = _workspace.place_around(real)
        if inside is not None:
            raise UsageError("Checkpoints of a task lie here.", uri=inside, hint="Restore into a folder of its own.")
        return folder.path

    # --- inside --------------------------------------------------------------------------------

    @property
    def _claims(self) -> bool:
        """Whether a load takes the task over."""
        return not self.read_only and not self._ended

    def _tell_hold(self) -> None:
        if self._on_hold is not None and self._log is not None and self._log.holds:
            tell, self._on_hold = self._on_hold, None
            tell()

    def open_store(self) -> Store:
        """The task's store, opened at first use, and anew in a forked child."""
        self._notice_fork()
        if self.dest.in_one_process and self._home != os.getpid():
            raise UsageError(
                "memory:// is one process only, and this is a child process.",
                uri=self.dest.uri,
                hint="Use a folder or a bucket to share state between processes.",
            )
        if self._store is not None:
            return self._store  # without the lock: a call that was cancelled must not wait for a long save
        with self._lock:
            if self._store is None:
                self._store = open_store(self.dest, storage_options=self._storage_options, timeout_s=self._timeout_s)
            return self._store

    def _find_fork(self, store: Store) -> None:
        """Where this task begins, unless an earlier attempt has saved, or said where, already."""
        if self._fork is None:
            return
        with self._lock:
            before = catalogue.beginning(LogReader(store))
            if before.head is None and not before.continues_from:
                place, slot = place_of(self._fork)
                if slot is None:
                    self._fork = place.child(slot_key(self._newest_slot(place)))
                self.sources = (self._fork,)
            self._fork = None

    def _newest_slot(self, place: Location) -> int:
        """The slot of the newest checkpoint of another task."""
        reader = LogReader(open_store(place, storage_options=self._storage_options, timeout_s=self._timeout_s))
        commits = [one for one in catalogue.everything(reader).commits if one.has_payload]
        if not commits:
            raise NotFoundError("There is no checkpoint to fork from.", uri=place.uri)
        return commits[0].stamp.slot

    def _own_log(self, store: Store) -> TaskLog:
        if self._log is None:
            about = {"host": platform.node(), "pid": os.getpid(), "keep": text_of(self.policy), **self._owner.about}
            about["for"] = self._owner.stands_for
            self._log = TaskLog(
                store,
                claim_nonce=self.claim_nonce,
                policy=self.policy,
                about={key: _plain(value) for key, value in about.items() if value is not None},
                sources=tuple(source.record_uri for source in self.sources),
                resumed_from=self._resumed_from,
                stale=self._owner.stale,
            )
        return self._log

    def _notice_fork(self) -> None:
        """In a forked child: the same claim, but a writer, connections and locks of its own."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._forget()

    @contextmanager
    def _exclusively(self, stop: Stop) -> Generator[None]:
        # Re-entrant, so that a signal handler may save while the same thread is saving.
        inside = self.is_busy_here
        while not self._lock.acquire(timeout=LOCK_POLL_S):
            stop.check()
        try:
            self._holder = threading.get_ident()
            yield
        finally:
            if not inside:
                self._holder = None
            self._lock.release()

    @property
    def is_busy_here(self) -> bool:
        """Whether this thread is in the middle of a verb, and this is a signal handler or a report of progress.

        It must wait for no other thread that wants to save.
        """
        return self._holder == threading.get_ident()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("_lock", "_store", "_log"):
            del state[name]
        state["_on_hold"] = None
        state["_owner"] = Owner(self._owner.claim_nonce, self._owner.inherited, self._owner.about, self._owner.rank)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
        self._pid = os.getpid()


class _Timed(Generic[T]):
    """A function, and how long its latest call took."""

    def __init__(self, function: Callable[[Origin, Loadable], T]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, origin: Origin, found: Loadable) -> T:
        began = time.monotonic()
        try:
            return self._function(origin, found)
        finally:
            self.seconds = time.monotonic() - began


def _told(found: Found[Any]) -> CheckpointInfo | None:
    return info_of(found.what, found.what, found.origin.store.uri) if isinstance(found.what, Commit) else None


def _plain(value: object) -> object:
    """Fit for a record: names from the operating system may not be valid Unicode."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
