"""The newest good checkpoint: in a task's own log, else in those it continues from. Never writes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from taskckpt import _foreign
from taskckpt._foreign import ForeignObject
from taskckpt._log.history import Damaged, LogMoved, LogReader, View
from taskckpt._log.records import Claim, Clear, Commit
from taskckpt._operation import Stop
from taskckpt._stores import Location, Store, parse
from taskckpt.errors import CorruptCheckpointError, NotFoundError, TaskckptError, UnavailableError

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
    """A place to load from."""

    location: Location
    store: Store
    known_reader: LogReader | None = None

    @property
    def reader(self) -> LogReader:
        return self.known_reader or LogReader(self.store)


@dataclass
class _Search:
    """What a search has met so far."""

    problems: list[CorruptCheckpointError] = field(default_factory=list)
    cleared: bool = False
    continues_from: list[str] = field(default_factory=list)


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
        self, own: Origin, view: View | None, use: Callable[[Origin, Loadable], T]
    ) -> tuple[Origin, Loadable, T] | None:
        """The first checkpoint that ``use`` can restore, newest first; None if nothing was ever saved.

        Raises:
            CorruptCheckpointError: There was something, and none of it is intact.
        """
        search = _Search()
        for origin in self._origins(own, search):
            try:
                found = self._from(origin, own, view, use, search)
            except TaskckptError as error:
                if origin is not own and origin.location not in self._sources:
                    error.add_note("An earlier attempt named this place as its src; clear() forgets it.")
                raise
            if found is not None:
                for problem in search.problems:
                    logger.warning("Passed over a damaged checkpoint and took the one before: %s", problem)
                return origin, found[0], found[1]
            if search.cleared:
                break
        if search.problems:
            raise _nothing_intact(own, search.problems)
        return None

    def _from(
        self, origin: Origin, own: Origin, view: View | None, use: Callable[[Origin, Loadable], T], search: _Search
    ) -> tuple[Loadable, T] | None:
        if origin is own:
            return self._from_log(origin, view, use, search)
        found: tuple[Loadable, T] | None = None
        if not _is_local_file(origin):
            found = self._from_log(origin, None, use, search)
        return self._from_foreign(origin, use, search) if found is None else found

    def has_something(self, own: Origin) -> bool:
        """Whether ``newest_good`` would find something, or something damaged."""
        try:
            return self.newest_good(own, None, lambda _origin, _found: True) is not None
        except CorruptCheckpointError:
            return True

    def _origins(self, own: Origin, search: _Search) -> Iterator[Origin]:
        """Depth first: what each place said it continues from comes right after it."""
        yield own
        seen = {own.location}
        pending = [*self._sources, *self._parsed(search)]
        while pending:
            location = pending.pop(0)
            if location in seen:
                continue
            seen.add(location)
            yield Origin(location, self._open_source(location))
            pending = [*self._parsed(search), *pending]

    def _parsed(self, search: _Search) -> list[Location]:
        found = [parse(uri, what="src") for uri in search.continues_from]
        search.continues_from.clear()
        return found

    def _from_log(
        self, origin: Origin, view: View | None, use: Callable[[Origin, Loadable], T], search: _Search
    ) -> tuple[Commit, T] | None:
        reader = origin.reader
        for _ in range(MAX_ROUNDS):
            round_ = _Search()
            view = view or reader.look()
            try:
                found = self._walk(origin, reader, view, use, round_)
                if found is None and round_.problems and not round_.continues_from:
                    round_.continues_from = list(reader.sources(view, at_most=MAX_RECORDS_BACK))
            except LogMoved:
                view = None
                continue
            search.problems += round_.problems
            search.cleared = round_.cleared
            if found is None and not round_.cleared:
                search.continues_from = round_.continues_from
            return found
        raise UnavailableError(f"The log kept changing during {MAX_ROUNDS} looks at it.", uri=origin.store.uri)

    def _walk(
        self,
        origin: Origin,
        reader: LogReader,
        view: View,
        use: Callable[[Origin, Loadable], T],
        search: _Search,
    ) -> tuple[Commit, T] | None:
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
                    try:
                        return found, use(origin, found)
                    except NotFoundError as error:
                        search.problems.append(_lost(origin, reader, view, found, error))
                    except CorruptCheckpointError as error:
                        search.problems.append(error)
                case _:
                    pass
        return None

    def _from_foreign(
        self, origin: Origin, use: Callable[[Origin, Loadable], T], search: _Search
    ) -> tuple[Loadable, T] | None:
        if search.cleared or search.continues_from:
            return None
        foreign = _foreign.look(origin.store, self._src_kind, self._stop)
        if foreign is None:
            return None
        try:
            return foreign, use(origin, foreign)
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
    if error.uri != f"{origin.store.uri}/{commit.stored.key}":
        raise error  # not the payload: a folder here that somebody removed meanwhile
    if reader.look().top > view.top:
        raise LogMoved from error
    return CorruptCheckpointError(f"The payload of slot {commit.stamp.slot} is gone.", uri=error.uri)


def _nothing_intact(own: Origin, problems: list[CorruptCheckpointError]) -> CorruptCheckpointError:
    tried = "; ".join(str(problem) for problem in problems[:10])
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    return CorruptCheckpointError(
        f"Something was saved, and no copy of it is intact: {tried}{more}.",
        uri=own.store.uri,
        hint="Restore the store from a backup, or call clear() to start over.",
    )
