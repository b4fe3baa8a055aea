"""All checkpoints of a task, at a bounded cost: pages of the index say what many records say.

A page holds the commits of a range of slots that were retained when it was written, without their inline content.
Commits never change, and what was dropped once never comes back, so a page stays true for ever. It is never needed:
whatever no good page says is read from the records themselves.
"""

from __future__ import annotations

import bisect
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from blake3 import blake3

from taskckpt._layout import INDEX, page_key, parse_page_name
from taskckpt._log import records as _records
from taskckpt._log.history import Damaged, LogMoved, LogReader, Survey, View
from taskckpt._log.records import Commit, Stored
from taskckpt._operation import Stop, ordered_map
from taskckpt.errors import CorruptCheckpointError, NotFoundError, UnavailableError, UnsupportedFormatError

logger = logging.getLogger("taskckpt")

T = TypeVar("T")

# How often a listing starts over because records went away while it read them.
MAX_ROUNDS = 64

# A task with 10,000 checkpoints has 79 pages, and up to 127 records that are in none.
PAGE_COMMITS = 128
# Fewer records than this are read one by one.
FEW_RECORDS = 48
READ_THREADS = 16


@dataclass(frozen=True, slots=True)
class Retained:
    """What the newest commit retains, itself included: newest first."""

    commits: list[Commit]
    damaged: list[Damaged]


@dataclass(frozen=True, slots=True)
class Page:
    """What a page says: of the slots ``first`` to ``last``, these commits were retained."""

    first: int
    last: int
    commits: tuple[Commit, ...]


def everything(reader: LogReader) -> Retained:
    """All checkpoints of a log: what its newest readable commit retains."""

    def read(view: View) -> Retained:
        survey = reader.survey(view, confirm=True)
        damaged = [found for slot in survey.unreadable for found in reader.read_slot(view, slot)]
        unreadable = [found for found in damaged if isinstance(found, Damaged)]
        if not isinstance(survey.head, Commit):
            return Retained([], unreadable)
        found = retained(reader, view, survey.head)
        return Retained(found.commits, unreadable + found.damaged)

    return at_rest(reader, read)


def beginning(reader: LogReader) -> Survey:
    """The log as a reader sees it now."""
    return at_rest(reader, lambda view: reader.survey(view, confirm=True))


def at_rest(reader: LogReader, read: Callable[[View], T]) -> T:
    """What is read from one listing, when no record went away meanwhile."""
    for _ in range(MAX_ROUNDS):
        with suppress(LogMoved):
            return read(reader.look())
    raise UnavailableError(f"The log kept changing during {MAX_ROUNDS} looks at it.", uri=reader.store.uri)


def retained(reader: LogReader, view: View, newest: Commit) -> Retained:
    """All commits that ``newest`` retains. Inline content may have been left out of them (``is_whole`` tells).

    Raises:
        LogMoved: Records went away meanwhile.
    """
    if newest.floor < newest.stamp.slot and not view.complete and newest.floor < view.slots[0]:
        view = reader.look(first_page=False)
    slots = {slot for slot in newest.kept if slot < newest.stamp.slot}
    slots |= {slot for slot in view.slots if newest.floor <= slot < newest.stamp.slot}
    commits = {newest.stamp.slot: newest}
    if newest.catalogued.through and len(slots) > FEW_RECORDS:
        ascending = sorted(slots)
        for page in _pages(reader, ascending):
            commits |= {one.stamp.slot: one for one in page.commits if one.stamp.slot in slots}
            slots.difference_update(_among(ascending, page.first, page.last))
    damaged: list[Damaged] = []
    for records in reader.read_slots(view, sorted(slots)):
        for found in records:
            if isinstance(found, Damaged):
                damaged.append(found)
            elif isinstance(found, Commit):
                commits.setdefault(found.stamp.slot, found)
    return Retained([commits[slot] for slot in sorted(commits, reverse=True)], damaged)


def original_of(reader: LogReader, slot: int) -> int:
    """The slot of the commit that first had the payload of the one in ``slot``, as long as that record is there."""
    found = at_rest(reader, lambda view: reader.read_slot(view, slot))
    return next((one.original for one in found if isinstance(one, Commit)), slot)


def next_page(reader: LogReader, view: View, newest: Commit, through: int, known: Mapping[int, Commit]) -> Page | None:
    """A page of the oldest retained commits above a slot, if one can be read. Those that are ``known`` are not read.

    It ends before the first record that cannot be read, or begins behind it: that one may be readable later.
    """
    slots = [one for one in view.slots if through < one <= newest.stamp.slot and newest.retains(one)]
    records = [one for found in reader.read_slots(view, [s for s in slots if s not in known]) for one in found]
    commits = {one.stamp.slot: one for one in records if isinstance(one, Commit)} | dict(known)
    unreadable = {one.slot for one in records if isinstance(one, Damaged)}
    first, page = through + 1, list[Commit]()
    for slot in slots:
        if slot in unreadable:
            if page:
                break
            first = slot + 1
        elif slot in commits:
            page.append(commits[slot])
            if len(page) == PAGE_COMMITS:
                break
    return Page(first, page[-1].stamp.slot, tuple(page)) if page else None


def _pages(reader: LogReader, slots: Sequence[int]) -> Iterable[Page]:
    """The good pages that say something about these slots, which ascend."""
    spans = {name: span for name in reader.store.list_below(INDEX).names if (span := parse_page_name(name)) is not None}
    wanted = [name for name, span in spans.items() if _among(slots, *span)]
    for page in ordered_map(lambda name: _read_page(reader, name, spans[name]), wanted, threads=READ_THREADS):
        if page is not None:
            yield page


def _among(slots: Sequence[int], first: int, last: int) -> Sequence[int]:
    """Those of some ascending slots that a page is about."""
    return slots[bisect.bisect_left(slots, first) : bisect.bisect_right(slots, last)]


def _read_page(reader: LogReader, name: str, span: tuple[int, int]) -> Page | None:
    key = f"{INDEX}/{name}"
    try:
        return decode_page(reader.store.read(key), span, uri=f"{reader.store.uri}/{key}")
    except (CorruptCheckpointError, UnsupportedFormatError, NotFoundError) as error:
        logger.info("A page of the index is no use; the records themselves are read: %s", error)
        return None


def encode_page(page: Page) -> bytes:
    """The records of a page, as in the log but without inline content, and a line that says which slots it is about."""
    body = b"".join(_records.encode(without_inline(commit)) for commit in page.commits)
    end = {"first": page.first, "last": page.last, "blake3": blake3(body).hexdigest()}
    return body + json.dumps(end).encode() + b"\n"


def decode_page(data: bytes, span: tuple[int, int], *, uri: str) -> Page:
    """The page whose name gives these first and last slots.

    Raises:
        CorruptCheckpointError: It is damaged, or says what cannot be.
        UnsupportedFormatError: A newer taskckpt wrote it.
    """
    lines = data.splitlines(keepends=True)
    try:
        end = json.loads(lines[-1])
        told, digest = (end["first"], end["last"]), end["blake3"]
    except (IndexError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError("A page of the index is cut short.", uri=uri) from error
    if blake3(b"".join(lines[:-1])).hexdigest() != digest:
        raise CorruptCheckpointError("A page of the index is damaged: its digest does not fit.", uri=uri)
    pairs = [b"".join(lines[index : index + 2]) for index in range(0, len(lines) - 1, 2)]
    records = [_records.decode(pair, slot=None, uri=uri) for pair in pairs]
    commits = tuple(record for record in records if isinstance(record, Commit))
    slots = [span[0] - 1, *(commit.stamp.slot for commit in commits)]
    ascends = all(before < slot for before, slot in itertools.pairwise(slots))
    if told != span or len(commits) != len(records) or not ascends or slots[-1] != span[1]:
        raise CorruptCheckpointError("A page of the index is not about the slots that its name gives.", uri=uri)
    return Page(*span, commits)


def without_inline(commit: Commit) -> Commit:
    """What a page says of a commit."""
    positions = commit.positions
    return replace(
        commit,
        stored=Stored(commit.stored.digest, key=commit.stored.key),
        positions=None if positions is None else Stored(positions.digest, key=positions.key),
    )


def write_page(reader: LogReader, page: Page, nonce: str, stop: Stop) -> None:
    """Stores a page under a key that no other one has."""
    data = encode_page(page)
    reader.store.write(page_key(page.first, page.last, nonce), [data], len(data), stop)


def dead_pages(names: Iterable[str], newest: Commit) -> list[str]:
    """Keys of the pages that say nothing about what is retained."""
    spans = {name: span for name in names if (span := parse_page_name(name)) is not None}
    kept = sorted(newest.kept)
    return [
        f"{INDEX}/{name}"
        for name, (first, last) in spans.items()
        if last < newest.floor and not _among(kept, first, last)
    ]
