"""One stage: the ``Checkpoint`` that holds its results, and what that says of each."""

from __future__ import annotations

import getpass
import logging
import os
import platform
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from taskckpt import _workspace, context
from taskckpt._attempt import Attempt, Owner
from taskckpt._checkpoint import Checkpoint
from taskckpt._keep import KeepPolicy, policy_of
from taskckpt._layout import folder_name
from taskckpt._log import catalogue
from taskckpt._log.records import Clear, Json
from taskckpt._operation import Stop
from taskckpt._selection import CheckpointInfo
from taskckpt._stores import Location, Store, open_store
from taskckpt.errors import (
    AmbiguousIdentityError,
    CorruptCheckpointError,
    StepNotFoundError,
    UsageError,
    UsageTypeError,
)
from taskckpt.stages import _markers
from taskckpt.stages._fingerprint import naming
from taskckpt.stages._status import shown
from taskckpt.stages._versions import OURS, Done, name_from_json, name_to_json, notes_of, version_at

logger = logging.getLogger("taskckpt")

SUFFIX = ".stage"
# Names lie in the records, which have room for metadata as well.
_LONGEST_NAME = 10_000
# In the place of a result: there is none.
NO_RESULT = object()
# What is stored then: something to read for who looks into the store.
_COMPLETED = b"COMPLETED"
# Of what a state can hold.
_CONTAINERS = (Mapping, list, tuple, set, frozenset)
_HOLD_PATHS = (Path, *_CONTAINERS)


@dataclass(frozen=True)
class Begun:
    """Somebody took the stage over, and has saved nothing yet. Whether that process lives, nobody knows.

    Attributes:
        name: The stage's name; blank if it does not say.
        time: Since when, in UTC.
    """

    name: str
    time: datetime
    host: str | None
    pid: int | None


@dataclass(frozen=True)
class Record:
    """What the store says of a stage at one moment.

    Attributes:
        name: The stage's name, or that of its folder where nobody knows better.
        done: The current version; None if there is none.
        versions: The numbers of all that can be loaded, ascending.
        damage: Why what is there does not count, or None.
        begun: Who took it over, if there is no version.
    """

    name: str
    done: Done | None = None
    versions: tuple[int, ...] = ()
    damage: str | None = None
    begun: Begun | None = None

    @property
    def is_something(self) -> bool:
        """Whether there is anything. A stage that was cleared is nothing."""
        return not (self.done is None and self.damage is None and self.begun is None)


@dataclass(frozen=True)
class Place:
    """Where the stages of one pipeline lie, and how that is reached."""

    location: Location
    storage_options: Mapping[str, Any] = field(repr=False)
    timeout_s: float
    read_only: bool
    keep: int | KeepPolicy | None

    @cached_property
    def folder(self) -> str | None:
        """The local folder, if it is one."""
        return self.location.path if self.location.is_local else None

    def stage(self, name: str) -> Stage:
        """The stage of a name. Any text is one, and none leads elsewhere.

        Raises:
            UsageError: It is no text, or blank.
        """
        if not isinstance(name, str) or not name.strip():
            raise UsageError(f"{name!r} is no name of a stage: any text is that is not blank.")
        if len(name) > _LONGEST_NAME:
            raise UsageError(f"A stage's name may have {_LONGEST_NAME} characters; this one has {len(name)}.")
        return Stage(self, folder_name(name), name)

    def stages(self) -> Iterator[Stage]:
        """All that were ever begun here. Those of pipelines in folders below are not among them."""
        for folder in self.folders():
            if folder.endswith(SUFFIX):
                yield Stage(self, folder.removesuffix(SUFFIX))

    def folders(self) -> list[str]:
        """The names of the folders here."""
        return self._store.folders("")

    @cached_property
    def _store(self) -> Store:
        return open_store(self.location, storage_options=self.storage_options, timeout_s=self.timeout_s)

    @cached_property
    def views(self) -> dict[str, Checkpoint]:
        """Read-only checkpoints by folder: a new connection takes longer than most of what is asked."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}  # no connections


class Stage:
    """A stage's checkpoint, and what it says. Makes no request before it is asked.

    Args:
        name: As the user gave it; None if only its folder is known.
    """

    def __init__(self, place: Place, folder: str, name: str | None = None) -> None:
        self._place = place
        self.location = place.location.child(f"{folder}{SUFFIX}")
        self.folder = folder
        self.name = name

    def __repr__(self) -> str:
        return repr(str(self))

    def __str__(self) -> str:
        return shown(self.name or self.folder)

    @property
    def uri(self) -> str:
        """Where it lies."""
        return self.location.uri

    # --- reading, which never fences anybody ---------------------------------------------------

    @property
    def _view(self) -> Checkpoint:
        return self._place.views.setdefault(self.folder, self._checkpoint(read_only=True))

    def read(self) -> Record:
        """What the store says now. Damage is told in the log as well."""
        try:
            infos = self._view.checkpoints_sync()
            record = self._record(infos) if infos else self._without_versions()
        except CorruptCheckpointError as error:
            record = Record(self.name or self.folder, damage=str(error))
        if record.damage is not None:
            logger.warning("Stage %r counts as not done: %s.", self, record.damage.rstrip("."))
        return record

    def _record(self, infos: list[CheckpointInfo]) -> Record:
        done, name = version_at(infos[0])
        versions = tuple(sorted({info.step for info in infos if info.step is not None}))
        return Record(self._known_as(name), done, versions)

    def _known_as(self, name: str) -> str:
        """The stage's name, given what the store says; somebody may have copied its folder."""
        return self.name or (name if folder_name(name) == self.folder else self.folder)

    def _without_versions(self) -> Record:
        marker = self._marker()
        if marker is None:
            begun = self._begun()
            return Record(self._known_as("" if begun is None else begun.name), begun=begun)
        name = self.name or self.folder
        if marker.damage is not None:
            return Record(name, damage=f"{os.path.basename(marker.path)}: {marker.damage}")
        return Record(name, Done(marker.digest, time=marker.time))

    def _begun(self) -> Begun | None:
        """Who has the stage, by the newest record of its log."""
        reader = self._view._attempt.reader()  # noqa: SLF001 - only looks
        newest = catalogue.beginning(reader).newest
        if newest is None or isinstance(newest, Clear):
            return None
        about = newest.stamp.about
        ours, host, pid = about.get(OURS), about.get("host"), about.get("pid")
        return Begun(
            name_from_json(ours) if isinstance(ours, dict) else "",
            _time_of(newest.stamp.time),
            host if isinstance(host, str) else None,
            pid if isinstance(pid, int) else None,
        )

    def _marker(self) -> _markers.Marker | None:
        name, folder = self.name or self.folder, self._place.folder
        return None if folder is None else _markers.find(folder, name)

    def load(self, done: Done) -> object:
        """The result of a version; None if it was saved without one.

        Raises:
            CorruptCheckpointError: It is damaged.
            StepNotFoundError: It is there no more.
        """
        if not done.has_result:
            return None
        found: Any
        if done.kind == "state":
            found = self._view.load_state_sync(where=done.is_at)
        elif done.kind == "bytes":
            found = self._view.load_bytes_sync(where=done.is_at)
        else:
            found = self._load_files(done)
        if found is None:
            raise StepNotFoundError(f"Stage {self!r} was cleared just now.", uri=self.uri)
        return found["result"] if done.kind == "state" else found

    def _load_files(self, done: Done) -> Path | None:
        """A file or folder as it was, under its own name, in a private folder that lives as long as this process."""
        private = os.path.join(_workspace.process_root(), secrets.token_hex(6))
        name = os.path.basename(done.file_name or "")
        if done.kind == "folder":
            private = os.path.join(private, name if name not in ("", ".", "..") else "result")
        return self._view.load_sync(where=done.is_at, to=private)

    def version(self, number: int) -> Done | None:
        """An earlier version; None if there is none of that number."""
        found = next((info for info in self._view.checkpoints_sync() if info.step == number), None)
        return None if found is None else version_at(found)[0]

    # --- writing -------------------------------------------------------------------------------

    def take_over(self, stop: Stop) -> Checkpoint:
        """A new attempt at this stage, which has taken it over: older ones can save no more.

        Raises:
            StaleAttemptError: Another one did so just now.
        """
        attempt = self._checkpoint(read_only=self._place.read_only)
        inner = attempt._attempt  # noqa: SLF001 - the claim that its first save would make
        inner.expect_writable("save")
        with inner.holding(stop):
            return attempt

    def _checkpoint(self, *, read_only: bool) -> Checkpoint:
        attempt = Attempt(
            self.location,
            policy=policy_of(self._place.keep),
            storage_options=dict(self._place.storage_options),
            timeout_s=self._place.timeout_s,
            read_only=read_only,
            owner=None if self.name is None else Owner(about={OURS: name_to_json(self.name)}),
        )
        return Checkpoint._with(attempt)  # noqa: SLF001 - an attempt that says which stage it is at

    def save(
        self,
        attempt: Checkpoint,
        result: object,
        metadata: Mapping[str, Json],
        fingerprint: str | None,
        built_from: Mapping[str, str],
    ) -> None:
        """Makes a new version of the stage, and so marks it as done. ``attempt`` has taken it over."""
        assert self.name is not None
        done = Done(
            secrets.token_hex(8),
            has_result=result is not NO_RESULT,
            fingerprint=fingerprint,
            after=built_from,
            host=_valid(platform.node()),
            user=_valid(_user()),
            attempt=_attempt_number(),
            metadata=metadata,
        )
        notes = notes_of(done, self.name)
        number = _newest_version(attempt) + 1
        with naming("result", f"the result of stage {self!r}"):
            if result is NO_RESULT:
                attempt.save_sync(_COMPLETED, step=number, metadata=notes)
            elif type(result) is bytes or isinstance(result, Path):
                attempt.save_sync(result, step=number, metadata=notes)
            else:
                _expect_no_files(result, f"the result of stage {self!r}")
                attempt.save_state_sync({"result": result}, step=number, metadata=notes)
        logger.info("Checkpoint saved: %s", self)

    def clear(self) -> None:
        """It is not done any more, and an older attempt at it can save no more."""
        marker = self._marker()
        self._checkpoint(read_only=self._place.read_only).clear_sync()
        if marker is not None and marker.ours:
            marker.remove()


def _expect_no_files(result: object, what: str) -> None:
    """Refuses paths inside of a result: of what they lead to, nothing would be stored.

    Raises:
        UsageTypeError: There is one; the message says where.
    """
    pending: list[tuple[object, str]] = [(result, what)]
    seen: set[int] = set()  # what contains itself is refused elsewhere
    while pending:
        container, place = pending.pop()
        for one, key in _inside_of(container):
            where = f"{place}{key}"
            if isinstance(one, Path):
                raise UsageTypeError(
                    f"{where} is a path, and what it leads to would not be stored.",
                    hint="Return the Path itself; or its text, if only the name is meant: str(path).",
                )
            if isinstance(one, _CONTAINERS) and id(one) not in seen:
                seen.add(id(one))
                pending.append((one, where))


def _inside_of(container: object) -> Iterator[tuple[object, str]]:
    """What a container holds, and where, as text; of that, only what may be or hold a path."""
    if isinstance(container, Mapping):
        yield from ((one, f": the key {one!r}") for one in container if isinstance(one, _HOLD_PATHS))
        yield from ((one, f"[{key!r}]") for key, one in container.items() if isinstance(one, _HOLD_PATHS))
    elif isinstance(container, (list, tuple)):
        yield from ((one, f"[{index}]") for index, one in enumerate(container) if isinstance(one, _HOLD_PATHS))
    elif isinstance(container, (set, frozenset)):
        yield from ((one, f": the element {one!r}") for one in container if isinstance(one, _HOLD_PATHS))


def _time_of(text: str) -> datetime:
    """Nothing is decided from it, so one that cannot be read is no reason to fail."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.min.replace(tzinfo=UTC)


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container whose user has a number and no name
        return str(os.getuid())


def _newest_version(attempt: Checkpoint) -> int:
    try:
        return max(attempt.steps_sync(), default=0)
    except CorruptCheckpointError as error:  # the work is done, and what cannot be read is no reason to throw it away
        logger.warning("Earlier versions cannot be read, and are not counted: %s", error)
        return 0


def _valid(text: str) -> str:
    """Fit for a record: what the operating system says may not be valid Unicode."""
    return text.encode("utf-8", "replace").decode()


def _attempt_number() -> int | None:
    try:
        current = context.ctx()
    except AmbiguousIdentityError:
        return None  # a thread that could belong to several tasks: the number is information only
    return None if current is None else current.attempt
