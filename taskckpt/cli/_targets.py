"""What a user points at, and which tasks lie there. Only looks: never claims and never writes."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from taskckpt import Checkpoint, context
from taskckpt._layout import LOG, keyed_prefix, parse_slot_name, run_folder, slot_of_record, task_prefix
from taskckpt._operation import Stop, ordered_map
from taskckpt._stores import Listing, Location, Store, is_unset, open_store, parse
from taskckpt.errors import NotFoundError, UsageError

T = TypeVar("T")
R = TypeVar("R")

# A task lies two folders below its base; so deep is looked, that a folder of several bases may be named too.
MOST_DEEP = 4
THREADS = 16
MOST_NAMES = 5


@dataclass(frozen=True)
class Pointer:
    """What was said on the command line."""

    target: str | None = None
    base: str | None = None
    run: str | None = None
    task: str | None = None
    key: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 300


@dataclass(frozen=True)
class Task:
    """A task that was found.

    Attributes:
        path: Its folders' names, from what was pointed at; its own name only, if it was itself.
        is_target: Whether it was itself.
        store: Its place, to be read.
    """

    location: Location
    path: str
    pointer: Pointer
    is_target: bool
    store: Store = field(repr=False)

    @property
    def uri(self) -> str:
        return self.location.uri

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def run(self) -> str | None:
        """The folder above it, if that was looked at."""
        return self.path.rpartition("/")[0].rpartition("/")[2] or None

    @property
    def view(self) -> Checkpoint:
        """Reads, and never takes the task over."""
        return Checkpoint(self.uri, read_only=True, **self.access)

    @property
    def access(self) -> dict[str, Any]:
        return {"storage_options": dict(self.pointer.storage_options), "timeout_s": self.pointer.timeout_s}


def tasks_at(pointer: Pointer) -> list[Task]:
    """All tasks at or below what was pointed at, by path.

    Raises:
        NotFoundError: There is none; the hint lists near names.
    """
    where, slot = _location(pointer)
    if slot is not None:
        raise UsageError("This is one checkpoint; name the task or the folder above it.", uri=pointer.target)
    return _tasks_below(where, pointer)


def task_at(pointer: Pointer) -> tuple[Task, int | None]:
    """The one task that was pointed at, and the slot of the checkpoint if that was.

    If nothing was, it is the task that this process's environment names, or the only one of the base.

    Raises:
        NotFoundError: There is none; the hint lists near names.
        UsageError: There are several.
    """
    where, slot = _location(pointer, default_task=True)
    found = _tasks_below(where, pointer)
    if len(found) > 1:
        names = ", ".join(one.path for one in found[:MOST_NAMES])
        more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
        raise UsageError(
            f"There are {len(found)} tasks here: {names}{more}.",
            uri=where.uri,
            hint=f"Name one, for instance {found[0].uri}",
        )
    return found[0], slot


def _location(pointer: Pointer, *, default_task: bool = False) -> tuple[Location, int | None]:
    """Where to look, and the slot of a checkpoint's own URI."""
    names = {"--base": pointer.base, "--run": pointer.run, "--task": pointer.task, "--key": pointer.key}
    said = [name for name, value in names.items() if value is not None]
    if pointer.target is not None:
        if said:
            raise UsageError(f"TARGET says it all: leave out {' and '.join(said)}.")
        where = parsed(pointer.target, "TARGET")
        slot = slot_of_record(where.path)
        if slot is None and where.is_local and os.path.isfile(where.path):
            raise UsageError("TARGET is a file.", uri=where.uri, hint="Name the folder of a base, a run or a task.")
        return (where, None) if slot is None else (Location(where.protocol, _without(where.path, 2)), slot)
    if pointer.key is not None and (pointer.task is not None or pointer.run is not None):
        raise UsageError("A task with a key spans runs: --key goes with neither --task nor --run.")
    current = context.ctx() if default_task and not said else None
    if current is not None:
        return current.place, None
    base = _base(pointer)
    if pointer.key is not None:
        return base.child(keyed_prefix(pointer.key)), None
    if pointer.task is not None:
        return base.child(task_prefix(context.run_and_origin(pointer.run)[0], pointer.task)), None
    return (base if pointer.run is None else base.child(run_folder(pointer.run))), None


def _base(pointer: Pointer) -> Location:
    if pointer.base is not None:
        return parsed(pointer.base, "--base")
    return parse(context.base_and_origin()[0], what="base")


def parsed(text: str, what: str) -> Location:
    """Where a word of the command line points to.

    Raises:
        UsageError: Nowhere: it is blank, or malformed.
    """
    if is_unset(text):
        blank = "empty" if not text.strip() else f"{text}, which nobody filled in"
        raise UsageError(f"{what} is {blank}.", hint="Name a path, or a URL such as s3://bucket/runs.")
    return parse(text, what=what)


def _without(path: str, parts: int) -> str:
    return path.rsplit("/", parts)[0]


def _tasks_below(where: Location, pointer: Pointer) -> list[Task]:
    store = _opened(where, pointer)
    found: list[str] = []
    level = [""]
    for _ in range(MOST_DEEP + 1):
        looked = in_parallel(lambda path: _look(store, path), level)
        found += [path for path, (is_task, _) in zip(level, looked, strict=True) if is_task]
        level = [_joined(path, name) for path, (_, names) in zip(level, looked, strict=True) for name in names]
    if not found:
        raise _nothing_there(where, pointer)
    if found == [""]:
        return [Task(where, os.path.basename(where.path), pointer, is_target=True, store=store)]
    places = [(path, where.child(path)) for path in sorted(found, key=_as_counted)]
    return [
        Task(place, path, pointer, is_target=False, store=cast("Store", _Below(store, path, place.uri)))
        for path, place in places
    ]


def _as_counted(path: str) -> tuple[list[list[str | int]], str]:
    """Sorts 2 before 10: text and numbers take turns in each name; text is first, though it be blank."""
    names = [re.split("([0-9]+)", name) for name in path.split("/")]
    return [[int(part) if at % 2 else part for at, part in enumerate(parts)] for parts in names], path


class _Below:
    """A task's place in a store that is open already: to open one for each task takes s3fs 0.3 s.

    It has the verbs of a ``Store`` that read a log and payloads.
    """

    def __init__(self, store: Store, path: str, uri: str) -> None:
        self.uri = uri
        self._store = store
        self._path = path

    def list_below(self, folder: str, *, first_page: bool = False) -> Listing:
        return self._store.list_below(f"{self._path}/{folder}", first_page=first_page)

    def sizes_below(self, folder: str) -> dict[str, int]:
        return self._store.sizes_below(_joined(self._path, folder))

    def read(self, key: str) -> bytes:
        return self._store.read(f"{self._path}/{key}")

    def stream(self, key: str, size_bytes: int, stop: Stop) -> Iterator[bytes | memoryview]:
        return self._store.stream(f"{self._path}/{key}", size_bytes, stop)


def _look(store: Store, path: str) -> tuple[bool, list[str]]:
    """Whether a folder is a task's place; if not, the folders in it."""
    names = store.folders(path)
    if LOG in names:
        records = store.list_below(_joined(path, LOG), first_page=True).names
        if any(parse_slot_name(name) for name in records):
            return True, []
    return False, names


def _joined(path: str, name: str) -> str:
    return "/".join(part for part in (path, name) if part)


def _nothing_there(where: Location, pointer: Pointer) -> NotFoundError:
    parent, _, name = where.path.rpartition("/")
    names: Sequence[str] = ()
    if parent.strip("/"):
        names = _opened(Location(where.protocol, parent), pointer).folders("")
    near = [one for one in difflib.get_close_matches(name, names, n=MOST_NAMES, cutoff=0.4) if one != name]
    hint = "Name a base, a run, a task or a checkpoint: a path or a URL; or set TASKCKPT_BASE."
    if pointer.target is not None and "/" not in pointer.target:
        hint = f"That is a path. For a name: --key {pointer.target}, or --task {pointer.target}."
    if near:
        hint = f"There are, beside it: {', '.join(near)}."
    return NotFoundError("There is no task here or below.", uri=where.uri, hint=hint)


def _opened(location: Location, pointer: Pointer) -> Store:
    return open_store(location, storage_options=pointer.storage_options, timeout_s=pointer.timeout_s)


def in_parallel(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``map`` on several threads; what one raises ends it. A single call is made here, where Ctrl-C ends it at once."""
    if len(items) <= 1:
        return [function(item) for item in items]
    return list(ordered_map(function, items, threads=min(THREADS, len(items))))
