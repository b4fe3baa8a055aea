"""What is known of a stage, and a table of it for people. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from taskckpt._log.records import Json

State: TypeAlias = Literal["done", "begun", "not done", "out of date", "damaged"]

# Longer names and metadata are cut in tables and log lines.
_SHOWN = 60
_TITLES = ("stage", "state", "version", "saved (UTC)", "size", "by", "attempt", "metadata")


@dataclass(frozen=True)
class StageStatus:
    """A stage, as it is now.

    Attributes:
        name: As it was given; the name of its folder where the store does not say.
        state: ``done``; ``begun``: somebody took it over and has saved nothing yet, so it runs, has failed or was
            killed; ``not done``; ``out of date``: it was built from something that has changed since; ``damaged``:
            what marks it as done cannot be read. All but ``done`` run again.
        time: When it was saved, in UTC.
        host, user: Where, and by whom. Of one that is begun: the host of that process.
        attempt: Which attempt of its ``@task``, if it ran in one.
        metadata: What the caller said.
        versions: The numbers of the results that can be loaded, ascending; the last one is the current one,
            unless somebody rolled back.
        version: The number of the current one; None for a marker of the old manager.
        size_bytes: Of the result.
        reason: Why it is out of date or damaged.
        begun: Since when it is begun, in UTC.
        pid: Which process began it.
    """

    name: str
    state: State
    time: datetime | None = None
    host: str | None = None
    user: str | None = None
    attempt: int | None = None
    metadata: Mapping[str, Json] = field(default_factory=dict)
    versions: tuple[int, ...] = ()
    version: int | None = None
    size_bytes: int | None = None
    reason: str | None = None
    begun: datetime | None = None
    pid: int | None = None


def table(stages: Sequence[StageStatus]) -> str:
    """Plain text: a line of titles, and one for each stage."""
    rows = [_TITLES, *(_cells(stage) for stage in stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    used = [index for index in range(len(_TITLES)) if any(row[index] for row in rows[1:])]
    return "\n".join("  ".join(row[index].ljust(widths[index]) for index in used).rstrip() for row in rows)


def _cells(stage: StageStatus) -> tuple[str, ...]:
    return (
        shown(stage.name),
        _state(stage),
        "" if stage.version is None else str(stage.version),
        "" if stage.time is None else _time(stage.time),
        "" if stage.size_bytes is None else _size(stage.size_bytes),
        "@".join(shown(one) for one in (stage.user, stage.host) if one),
        "" if stage.attempt is None else str(stage.attempt),
        shown(", ".join(f"{name}={value}" for name, value in stage.metadata.items())),
    )


def _state(stage: StageStatus) -> str:
    if stage.begun is not None:
        return f"{stage.state}: {_time(stage.begun)}" + ("" if stage.pid is None else f", pid {stage.pid}")
    return stage.state if stage.reason is None else f"{stage.state}: {stage.reason}"


def _time(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def shown(text: str) -> str:
    """A text of somebody else's as part of one line: no line breaks, nothing that moves a cursor, and not too long."""
    if not text.isprintable():
        text = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]}...{text[-17:]}"


def _size(size_bytes: int) -> str:
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"
