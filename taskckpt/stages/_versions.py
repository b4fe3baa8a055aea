"""A version of a stage, and how the metadata of its checkpoint says what it is. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from taskckpt._log.records import Json
from taskckpt._selection import CheckpointInfo
from taskckpt.errors import CorruptCheckpointError

# The key in a checkpoint's metadata that is ours; all others are the user's.
OURS = "stage"


@dataclass(frozen=True)
class Done:
    """A version of a stage.

    Attributes:
        id: No two versions have the same one, not even after a clear.
        version: Its number; None for a marker of the old manager.
        has_result: Whether it was saved with a result.
        kind: What holds the result: ``state``, ``bytes``, ``file`` or ``folder``.
        file_name: What a file or folder was called.
        fingerprint: The digest of what was given, if anything was.
        after: The folders of the stages that it was built from, each with the id of its version.
        size_bytes: Of the result.
    """

    id: str
    version: int | None = None
    has_result: bool = False
    kind: str | None = None
    file_name: str | None = None
    fingerprint: str | None = None
    after: Mapping[str, str] = field(default_factory=dict)
    time: datetime | None = None
    host: str | None = None
    user: str | None = None
    attempt: int | None = None
    metadata: Mapping[str, Json] = field(default_factory=dict)
    size_bytes: int | None = None

    def is_at(self, info: CheckpointInfo) -> bool:
        """Whether that is the checkpoint that holds it."""
        return _ours(info).get("id") == self.id


def notes_of(done: Done, name: str) -> dict[str, Json]:
    """The metadata with which a version is saved, its stage's name included."""
    said: dict[str, Json] = {
        **name_to_json(name),
        "id": done.id,
        "result": done.has_result,
        "fingerprint": done.fingerprint,
        "after": dict(done.after),
        "host": done.host,
        "user": done.user,
        "attempt": done.attempt,
    }
    return {**done.metadata, OURS: {key: value for key, value in said.items() if value is not None}}


def version_at(info: CheckpointInfo) -> tuple[Done, str]:
    """The version that a checkpoint is, and its stage's name.

    Raises:
        CorruptCheckpointError: No stage was saved there.
    """
    ours = _ours(info)
    version_id, after = ours.get("id"), ours.get("after")
    if not isinstance(version_id, str) or not isinstance(after, dict):
        raise CorruptCheckpointError("Something was saved here that is no stage.", uri=info.uri)
    attempt, has_result = ours.get("attempt"), ours.get("result") is True
    done = Done(
        version_id,
        info.step,
        has_result,
        info.kind,
        info.name,
        _text(ours.get("fingerprint")),
        {folder: one for folder, one in after.items() if isinstance(one, str)},
        info.time,
        _text(ours.get("host")),
        _text(ours.get("user")),
        attempt if isinstance(attempt, int) else None,
        {key: value for key, value in info.metadata.items() if key != OURS},
        info.size_bytes if has_result else None,
    )
    return done, name_from_json(ours)


def _ours(info: CheckpointInfo) -> dict[str, Json]:
    ours = info.metadata.get(OURS)
    return ours if isinstance(ours, dict) else {}


def _text(value: Json) -> str | None:
    return value if isinstance(value, str) else None


def name_to_json(name: str) -> dict[str, Json]:
    """Names may come from files and variables that are no valid Unicode, which a record must be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return {"escaped_name": name.encode("unicode_escape").decode()}
    return {"name": name}


def name_from_json(ours: Mapping[str, Json]) -> str:
    """What ``name_to_json`` was given; blank if there is no name."""
    escaped = _text(ours.get("escaped_name"))
    if escaped is None:
        return _text(ours.get("name")) or ""
    return escaped.encode().decode("unicode_escape", "replace")
