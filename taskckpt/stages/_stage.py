"""One stage: the ``Checkpoint`` that holds its results, and what that says of each."""

from __future__ import annotations

import getpass
import logging
import os
import platform
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from taskckpt import _workspace, context
from taskckpt._checkpoint import Checkpoint
from taskckpt._keep import KeepPolicy
from taskckpt._layout import LOG, folder_name
from taskckpt._log.records import Json
from taskckpt._operation import Stop
from taskckpt._selection import CheckpointInfo
from taskckpt._stores import Location, Store, open_store
from taskckpt.errors import AmbiguousIdentityError, CorruptCheckpointError, StepNotFoundError, UsageError
from taskckpt.stages import _markers
from taskckpt.stages._fingerprint import naming
from taskckpt.stages._status import shown
from taskckpt.stages._versions import Done, notes_of, version_at

logger = logging.getLogger("taskckpt")

SUFFIX = ".stage"
# Names lie in the records, which have room for metadata as well.
_LONGEST_NAME = 10_000
# In the place of a result: there is none.
NO_RESULT = object()
# What is stored then: something to read for who looks into the store.
_COMPLETED = b"COMPLETED"


@dataclass(frozen=True)
class Record:
    """What the store says of a stage at one moment.

    Attributes:
        name: The stage's name, or that of its folder where nobody knows better.
        done: The current version; None if there is none.
        versions: The numbers of all that can be loaded, ascending.
        damage: Why what is there does not count, or None.
    """

    name: str
    done: Done | None = None
    versions: tuple[int, ...] = ()
    damage: str | None = None

    @property
    def is_something(self) -> bool:
        """Whether there is a version, or something damaged."""
        return self.done is not None or self.damage is not None


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

    def folders(self, below: str = "") -> list[str]:
        """The names of the folders here, or in one of them."""
        return self._store.folders(below)

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
        if self.name is None and folder_name(name) != self.folder:
            name = self.folder  # somebody copied it
        return Record(self.name or name, done, versions)

    def _without_versions(self) -> Record:
        marker = self._marker()
        name = self.name or self.folder
        if marker is None:
            return Record(name)
        if marker.damage is not None:
            return Record(name, damage=f"{os.path.basename(marker.path)}: {marker.damage}")
        return Record(name, Done(marker.digest, time=marker.time))

    def was_begun(self) -> bool:
        """Whether anybody ever took it over, be it to no end."""
        return LOG in self._place.folders(f"{self.folder}{SUFFIX}")

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
        dest = Path(self.location.path) if self.location.is_local else self.location.uri
        return Checkpoint(
            dest,
            keep=self._place.keep,
            storage_options=self._place.storage_options,
            timeout_s=self._place.timeout_s,
            read_only=read_only,
        )

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
        number = max(attempt.steps_sync(), default=0) + 1
        with naming("result", f"the result of stage {self!r}"):
            if result is NO_RESULT:
                attempt.save_sync(_COMPLETED, step=number, metadata=notes)
            elif type(result) is bytes or isinstance(result, Path):
                attempt.save_sync(result, step=number, metadata=notes)
            else:
                attempt.save_state_sync({"result": result}, step=number, metadata=notes)
        logger.info("Checkpoint saved: %s", self)

    def clear(self) -> None:
        """It is not done any more, and an older attempt at it can save no more."""
        marker = self._marker()
        self._checkpoint(read_only=self._place.read_only).clear_sync()
        if marker is not None and marker.ours:
            marker.remove()


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container whose user has a number and no name
        return str(os.getuid())


def _valid(text: str) -> str:
    """Fit for a record: what the operating system says may not be valid Unicode."""
    return text.encode("utf-8", "replace").decode()


def _attempt_number() -> int | None:
    try:
        current = context.ctx()
    except AmbiguousIdentityError:
        return None  # a thread that could belong to several tasks: the number is information only
    return None if current is None else current.attempt
