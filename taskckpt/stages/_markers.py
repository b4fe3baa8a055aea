"""What the Checkpoint Manager of old wrote: ``<stage>.checkpoint``, a text file that says COMPLETED.

It knew no store but a folder on this machine, so markers are looked for only there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime

from taskckpt._stores.local import translating

SUFFIX = ".checkpoint"
_COMPLETED = "COMPLETED"
_TIMESTAMP = "Timestamp: "
# Whatever is longer was written by somebody else.
_LONGEST_BYTES = 200


@dataclass(frozen=True)
class Marker:
    """A file that marks a stage as done, or that once was to.

    Attributes:
        time: What it says; None if it says nothing.
        damage: What is wrong with it, or None: then the stage is done.
        ours: Whether the old manager wrote it, or began to.
    """

    stage: str
    path: str
    digest: str
    time: datetime | None = None
    damage: str | None = None
    ours: bool = True

    def remove(self) -> None:
        """It marks nothing any more."""
        with translating(self.path), contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def find(folder: str, stage: str) -> Marker | None:
    """The marker of one stage in a local folder."""
    # A name with a slash would lead elsewhere; one that no file can have is answered by isfile.
    return None if "/" in stage else _read(os.path.join(folder, f"{stage}{SUFFIX}"), stage)


def find_all(folder: str) -> list[Marker]:
    """All markers in a local folder."""
    with translating(folder):
        try:
            names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(SUFFIX))
        except FileNotFoundError:
            return []
    found = (_read(os.path.join(folder, name), name.removesuffix(SUFFIX)) for name in names if name != SUFFIX)
    return [marker for marker in found if marker is not None]


def _read(path: str, stage: str) -> Marker | None:
    with translating(path):
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            data = file.read(_LONGEST_BYTES + 1)
    digest = hashlib.sha256(data).hexdigest()
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    first, _, second = text.removesuffix("\n").partition("\n")
    if first != _COMPLETED:
        ours = _COMPLETED.startswith(text)
        damage = "it is empty" if not text else "it is cut short" if ours else f"it does not say {_COMPLETED}"
        return Marker(stage, path, digest, damage=damage, ours=ours)
    if not second:
        return Marker(stage, path, digest)
    try:
        time = datetime.fromisoformat(second.removeprefix(_TIMESTAMP))
    except ValueError:
        return Marker(stage, path, digest, damage="its second line is no timestamp")
    if not second.startswith(_TIMESTAMP):
        return Marker(stage, path, digest, damage="its second line is no timestamp")
    return Marker(stage, path, digest, time.astimezone(UTC))  # without a zone, it is this machine's
