"""The newest good checkpoint: in a task's own log, else in those it continues from. Never writes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from taskckpt import _foreign
from taskckpt._foreign import ForeignObject
from taskckpt._layout import LOG, slot_of_record
from taskckpt._log import catalogue
from taskckpt._log.history import Damaged, LogMoved, LogReader, View
from taskckpt._log.records import Claim, Clear, Commit
from taskckpt._operation import Stop
from taskckpt._selection import Selection, infos_of
from taskckpt._stores import Location, Store, parse
from taskckpt.errors import CorruptCheckpointError, NotFoundError, StepNotFoundError, TaskckptError, UnavailableError

logger = logging.getLogger("taskckpt")

T = TypeVar("T")

# What a load may end with: a commit of ours, or somebody else's object.
Loadable: TypeAlias = Commit | ForeignObject

# How often a load starts over because records came and went while it read them.
MAX_ROUNDS = 64
# How many records are read to find out where a task comes from whose own checkpoints are all damaged.
MAX_RECORDS_BACK = 64


@dataclass(frozen=True)
class Origin:
    """A place to load from: its newest checkpoint, or the one whose record is in ``slot``."""

    location: Location
    store: Store
    known_reader: LogReader | None = None
    slot: int | None = None

    @property
    def reader(self) -> LogReader:
        return self.known_reader or LogReader(self.store)


@dataclass(frozen=True)
class Found(Generic[T]):
    """What a search ended with."""

    origin: Origin
    what: Loadable
    result: T


@dataclass
class _Search(Generic[T]):
    """What a search has met so far."""

    problems: list[CorruptCheckpointError] = field(default_factory=list)
    cleared: bool = False
    continues_from: list[str] = field(default_factory=list)
    without_payload: Found[T] | None = None
    steps: set[int] = field(default_factory=set)
    unreadable: list[CorruptCheckpointError] = field(default_factory=list)


def place_of(location: Location) -> tuple[Location, int | None]:
    """The place that a location names, and the slot if it names one checkpoint of it, by its record."""
    slot = slot_of_record(location.path)
    if slot is None:
        return location, None
    return Location(location.protocol, location.path.rpartition(f"/{LOG}/")[0]), slot


class Chain:
    """A task's own log first, then its sources in order, each with what it continues from; a clear ends it."""

    def __init__(
        self,
        sources: tuple[Location, ...],
        open_source: Callable[[Location], Store],
        *,
        src_kind: str,
        stop: Stop,
    ) -> None:
        self._sources = sources
        self._open_source = open_source
        self._src_kind = src_kind
        self._stop = stop

    def newest_good(
        self,
        own: Origin,
        view: View | None,
        use: Callable[[Origin, Loadable], T],
        which: Selection | None = None,
    ) -> tuple[Found[T] | None, Found[T] | None]:
        """The first checkpoint that ``use`` can restore, newest first; None if nothing was ever saved.

        And the newest commit without a payload, if there is one above it: the task's positions are there.

        Raises:
            CorruptCheckpointError: There was something, and none of it is intact.
            StepNotFoundError: ``which`` is nowhere.
        """
        search = _Search[T]()
        for origin in self._origins(own, search):
            try:
                found = self._from(origin, own, view, use, which, search)
            except TaskckptError as error:
                if origin is not own and origin.location not in self._sources:
                    error.add_note("An earlier attempt named this place as its src; clear() forgets it.")
                raise
            if found is not None:
                for problem in search.problems:
                    logger.warning("Passed over a damaged checkpoint and took the one before: %s", problem)
                return found, search.without_payload
            if search.cleared:
                break
        if search.problems:
            raise _nothing_intact(own, search.problems)
        if which is not None:
            raise _nowhere(own, which, search.steps, search.unreadable)
        _expect_no_payload(search.without_payload)
        return None, search.without_payload

    def _from(
        self,
        origin: Origin,
        own: Origin,
        view: View | None,
        use: Callable[[Origin, Loadable], T],
        which: Selection | None,
        search: _Search[T],
    ) -> Found[T] | None:
        if origin is own:
            return self._from_log(origin, view, use, which, search)
        found: Found[T] | None = None
        if not _is_local_file(origin):
            found = self._from_log(origin, None, use, which, search)
        if found is None and origin.slot is None and which is None:
            return self._from_foreign(origin, use, search)
        return found

    def has_something(self, own: Origin) -> bool:
        """Whether ``newest_good`` would find something, or something damaged."""
        try:
            return self.newest_good(own, None, lambda _origin, _found: True)[0] is not None
        except CorruptCheckpointError:
            return True

    def _origins(self, own: Origin, search: _Search[T]) -> Iterator[Origin]:
        """Depth first: what each place said it continues from comes right after it."""
        yield own
        seen = {own.location}
        pending = [*self._sources, *self._parsed(search)]
        while pending:
            location = pending.pop(0)
            if location in seen:
                continue
            seen.add(location)
            place, slot = place_of(location)
            yield Origin(location, self._open_source(place), slot=slot)
            pending = [*self._parsed(search), *pending]

    def _parsed(self, search: _Search[T]) -> list[Location]:
        found = [parse(uri, what="src") for uri in search.continues_from]
        search.continues_from.clear()
        return found

    def _from_log(
        self,
        origin: Origin,
        view: View | None,
        use: Callable[[Origin, Loadable], T],
        which: Selection | None,
        search: _Search[T],
    ) -> Found[T] | None:
        reader = origin.reader
        for _ in range(MAX_ROUNDS):
            round_ = _Search[T]()
            view = view or reader.look()
            try:
                found = self._in_order(origin, reader, view, use, which, round_)
                if found is None and round_.problems and not round_.continues_from:
                    round_.continues_from = list(reader.sources(view, at_most=MAX_RECORDS_BACK))
            except LogMoved:
                view = None
                continue
            search.problems += round_.problems
            search.steps |= round_.steps
            search.unreadable += round_.unreadable
            search.cleared = round_.cleared
            search.without_payload = search.without_payload or round_.without_payload
            if found is None and not round_.cleared:
                search.continues_from = round_.continues_from
            return found
        raise UnavailableError(f"The log kept changing during {MAX_ROUNDS} looks at it.", uri=origin.store.uri)

    def _in_order(
        self,
        origin: Origin,
        reader: LogReader,
        view: View,
        use: Callable[[Origin, Loadable], T],
        which: Selection | None,
        search: _Search[T],
    ) -> Found[T] | None:
        """The first commit that ``use`` can restore: from the newest down, or of those that are meant."""
        newest_first = self._walk(reader, view, search)
        if which is not None or origin.slot is not None:
            newest_first = self._meant(origin, reader, view, which, search)
        for commit in newest_first:
            try:
                complete = whole(reader, view, commit)
                found = Found(origin, complete, use(origin, complete))
            except NotFoundError as error:
                search.problems.append(_lost(origin, reader, view, commit, error))
            except CorruptCheckpointError as error:
                search.problems.append(error)
            else:
                if commit.has_payload:
                    return found
                search.without_payload = found
                search.continues_from = [*commit.continues_from]
                return None
        return None

    def _walk(self, reader: LogReader, view: View, search: _Search[T]) -> Iterator[Commit]:
        """The commits that a load meets, newest first."""
        for found in reader.walk(view, confirm=True):
            match found:
                case Damaged(slot=1, torn=True):
                    # The first slot always holds a claim, and this one was killed while it was written (on a
                    # disk without hard links), so nobody ever went on from it.
                    logger.warning("The first record of the log is damaged: %s", found.error)
                case Damaged():
                    search.problems.append(found.error)
                case Clear():
                    search.cleared = True
                case Claim():
                    search.continues_from += found.continues_from
                case Commit():
                    yield found
                case _:
                    pass

    def _meant(
        self, origin: Origin, reader: LogReader, view: View, which: Selection | None, search: _Search[T]
    ) -> Iterator[Commit]:
        """The commits that were asked for, in the order to try them."""
        passed_over = _Search[T]()
        newest = next(self._walk(reader, view, passed_over), None)
        search.unreadable += passed_over.problems
        search.cleared = passed_over.cleared
        search.continues_from += passed_over.continues_from
        commits: list[Commit] = []
        if newest is not None:
            everything = catalogue.retained(reader, view, newest)
            commits = [one for one in everything.commits if one.has_payload]
            search.unreadable += [damaged.error for damaged in everything.damaged]
        if origin.slot is not None:
            original = catalogue.original_of(reader, origin.slot)
            commits = [one for one in commits if one.original == original]
            if not commits:
                raise _pruned(origin, search.unreadable)
        told = infos_of(commits, origin.store.uri)
        search.steps |= {info.step for info, _ in told if info.step is not None}
        found = {info.slot: commit for info, commit in told}
        yield from (
            found.values() if which is None else (found[one.slot] for one in which.order([one for one, _ in told]))
        )

    def _from_foreign(
        self, origin: Origin, use: Callable[[Origin, Loadable], T], search: _Search[T]
    ) -> Found[T] | None:
        if search.cleared or search.continues_from:
            return None
        foreign = _foreign.look(origin.store, self._src_kind, self._stop)
        if foreign is None:
            return None
        try:
            return Found(origin, foreign, use(origin, foreign))
        except CorruptCheckpointError as error:
            search.problems.append(error)
            return None


def _is_local_file(origin: Origin) -> bool:
    """On a disk, listing what lies below a file is an error; in a bucket it is just empty."""
    return origin.location.is_local and origin.store.size("") is not None


def _lost(
    origin: Origin, reader: LogReader, view: View, commit: Commit, error: NotFoundError
) -> CorruptCheckpointError:
    """A payload that is named and gone is damage, unless it was pruned since the log was listed."""
    if error.uri not in [f"{origin.store.uri}/{key}" for key in commit.keys]:
        raise error  # not the payload: a folder here that somebody removed meanwhile
    if reader.look().top > view.top:
        raise LogMoved from error
    return CorruptCheckpointError(f"The payload of slot {commit.stamp.slot} is gone.", uri=error.uri)


def _expect_no_payload(found: Found[T] | None) -> None:
    """Positions are all there is, and yet there was a payload, elsewhere: that is no beginning from zero."""
    if found is None or not isinstance(found.what, Commit):
        return
    commit = found.what
    source = commit.resumed_from if commit.repeats is None else commit.repeats.resumed_from
    if isinstance(source, str):
        raise NotFoundError(
            "The checkpoint that this task has begun with, in another place, is gone; its own ones are positions only.",
            uri=source,
            hint="Bring that place back, or clear() and start over.",
        )


def _nowhere(
    own: Origin, which: Selection, steps: set[int], unreadable: list[CorruptCheckpointError]
) -> StepNotFoundError:
    error = which.not_among(steps, own.store.uri)
    if unreadable:
        error.add_note(f"It may be one of these, which cannot be read: {'; '.join(map(str, unreadable[:10]))}.")
    return error


def _pruned(origin: Origin, unreadable: list[CorruptCheckpointError]) -> NotFoundError:
    error = NotFoundError(
        "The checkpoint that this task begins with is not there any more.",
        uri=origin.location.uri,
        hint="Fork from another one, or clear() and start over. pin() keeps what others fork from.",
    )
    if unreadable:
        error.add_note(f"It may be one of these, which cannot be read: {'; '.join(map(str, unreadable[:10]))}.")
    return error


def whole(reader: LogReader, view: View, commit: Commit) -> Commit:
    """The commit with what a page of the index leaves out."""
    if commit.is_whole:
        return commit
    for found in reader.read_slot(view, commit.stamp.slot):
        if isinstance(found, Commit):
            return found
        if isinstance(found, Damaged):
            raise found.error
    raise LogMoved


def _nothing_intact(own: Origin, problems: list[CorruptCheckpointError]) -> CorruptCheckpointError:
    tried = "; ".join(str(problem) for problem in problems[:10])
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    return CorruptCheckpointError(
        f"Something was saved, and no copy of it is intact: {tried}{more}.",
        uri=own.store.uri,
        hint="Restore the store from a backup, or call clear() to start over.",
    )
