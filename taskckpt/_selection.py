"""``CheckpointInfo``: a saved checkpoint as a user sees it, without its payload; and which one is meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isnan
from typing import TYPE_CHECKING, Any, Never, TypeAlias, TypeVar

from taskckpt._arguments import checked_metadata, checked_step
from taskckpt._keep import Mode
from taskckpt._layout import slot_key
from taskckpt._log.records import Commit, Json, Kind
from taskckpt.errors import StepNotFoundError, UsageError, UsageTypeError

T = TypeVar("T")


class Said(dict[str, T]):
    """A dict that cannot be changed. Unlike a read-only view it can be pickled, and ``dataclasses.asdict`` takes it."""

    def _refuse(self, *_: object, **__: object) -> Never:
        raise UsageTypeError("What was said about a checkpoint cannot be changed.")

    if not TYPE_CHECKING:  # to type checkers it is a dict, and shown as a Mapping
        __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


NOTHING_SAID: Mapping[str, Any] = Said()

# A hint that lists more steps than this shows the first and the last ones.
MOST_LISTED = 20


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint of a task. Nothing of its payload was read.

    Attributes:
        uri: Names it for good, everywhere that a checkpoint can be named: the URI of the record of its first commit.
        slot: Its place in the task's log: a higher one was committed later. A pin or a rollback commits it again.
        step: As it was saved; None without one.
        attempt: Which attempt saved it, counted from 0; None if nobody knew.
        time: When it was saved, in UTC; the earliest time there is if the record does not tell.
        kind: ``bytes``, ``file``, ``folder``, ``state``; or ``nothing``: only positions of iterations.
        name: What the file or folder was called.
        size_bytes: Of the content.
        stored_bytes: Of what is stored: a folder is compressed.
        metadata: As it was saved.
        metrics: As they were saved.
        pinned: Whether it stays until it is unpinned.
        resumed_from: The URI of the checkpoint that its attempt had resumed from.
        in_lineage: Whether the newest checkpoint goes on from it, or is it. Not so for what was rolled back.
    """

    uri: str
    slot: int
    step: int | None
    attempt: int | None
    time: datetime
    kind: Kind
    name: str | None
    size_bytes: int
    stored_bytes: int
    metadata: Mapping[str, Json]
    metrics: Mapping[str, float]
    pinned: bool
    resumed_from: str | None
    in_lineage: bool

    def __hash__(self) -> int:
        return hash((self.uri, self.slot))

    def __repr__(self) -> str:
        named = f", name={self.name!r}" if self.name is not None else ""
        when = self.time.isoformat(timespec="seconds")
        return (
            f"CheckpointInfo(step={self.step}, kind={self.kind!r}{named}, size_bytes={self.size_bytes}, time={when}, "
            f"metrics={dict(self.metrics)}, uri={self.uri!r})"
        )


def info_of(commit: Commit, newest: Commit, place: str) -> CheckpointInfo:
    """What users see of a commit in a log whose newest commit is ``newest``."""
    about = commit.stamp.about if commit.repeats is None else commit.repeats.about
    attempt = about.get("attempt")
    source = commit.resumed_from if commit.repeats is None else commit.repeats.resumed_from
    return CheckpointInfo(
        uri=f"{place}/{slot_key(commit.original)}",
        slot=commit.stamp.slot,
        step=commit.notes.step,
        attempt=attempt if isinstance(attempt, int) else None,
        time=_time_of(commit.stamp.time if commit.repeats is None else commit.repeats.time),
        kind=commit.content.kind,
        name=commit.content.name,
        size_bytes=commit.content.digest.size_bytes,
        stored_bytes=commit.stored.digest.size_bytes,
        metadata=Said(commit.notes.metadata) if commit.notes.metadata else NOTHING_SAID,
        metrics=Said(commit.notes.metrics) if commit.notes.metrics else NOTHING_SAID,
        pinned=commit.original in newest.pinned,
        resumed_from=f"{place}/{slot_key(source)}" if isinstance(source, int) else source,
        in_lineage=newest.lineage.has(commit.stamp.slot),
    )


def _time_of(text: str) -> datetime:
    """Nothing is decided from it, so one that cannot be read is no reason to fail."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.min.replace(tzinfo=UTC)


def infos_of(commits: Sequence[Commit], place: str) -> list[tuple[CheckpointInfo, Commit]]:
    """The checkpoints that these commits, newest first, stand for.

    Of several that repeat one, the newest that the newest of all goes on from; or else the newest.
    """
    newest = commits[0] if commits else None
    chosen: dict[int, Commit] = {}
    for commit in reversed(commits):
        before = chosen.get(commit.original)
        assert newest is not None
        if before is None or newest.lineage.has(commit.stamp.slot) or not newest.lineage.has(before.stamp.slot):
            chosen[commit.original] = commit
    ordered = sorted(chosen.values(), key=lambda commit: -commit.stamp.slot)
    return [(info_of(commit, newest, place), commit) for commit in ordered if newest is not None]


Where: TypeAlias = Callable[[CheckpointInfo], bool] | Mapping[str, Json] | CheckpointInfo


@dataclass(frozen=True, slots=True)
class Selection:
    """Which checkpoint is meant, if not the newest.

    Attributes:
        text: For errors.
        order: The checkpoints that fit, of all, newest first: in the order to try them.
    """

    text: str
    order: Callable[[Sequence[CheckpointInfo]], list[CheckpointInfo]]

    def not_among(self, steps: Iterable[int], uri: str) -> StepNotFoundError:
        """The error that says what there is instead."""
        return StepNotFoundError(f"There is no checkpoint {self.text}.", uri=uri, hint=_listed(sorted(set(steps))))


def selection(
    step: int | None = None, where: Where | None = None, best: str | None = None, mode: Mode = "min"
) -> Selection | None:
    """What ``load`` was asked for; None: the newest.

    Raises:
        UsageError: Several of them, or one that makes no sense.
    """
    if sum(one is not None for one in (step, where, best)) > 1:
        raise UsageError("load takes one of step=, where= and best=.")
    if mode not in ("min", "max"):
        raise UsageError(f"mode={mode!r} must be 'min' or 'max'.")
    if step is not None:
        return of_step(step)
    if where is not None:
        return _where(where)
    return None if best is None else _best(best, mode)


def of_step(step: int) -> Selection:
    """The checkpoints of a step: those that the newest goes on from first."""
    step = checked_step(step)

    def order(infos: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        return sorted((one for one in infos if one.step == step), key=lambda one: not one.in_lineage)

    return Selection(f"of step {step}", order)


def of_slot(slot: int) -> Selection:
    """The checkpoint in a slot of the log."""
    return Selection(f"in slot {slot}", lambda infos: [one for one in infos if one.slot == slot])


def of_uri(uri: str) -> Selection:
    """The checkpoint of that name."""
    return Selection(f"named {uri}", lambda infos: [one for one in infos if one.uri == uri])


def _where(where: Where) -> Selection:
    if isinstance(where, CheckpointInfo):
        return of_uri(where.uri)
    if callable(where):
        return Selection("for which where= holds", lambda infos: [one for one in infos if where(one)])
    if not isinstance(where, Mapping):
        raise UsageTypeError(
            f"where= takes a function, a dict of metadata or a CheckpointInfo, not {type(where).__name__}."
        )
    wanted = checked_metadata(where, "where")  # as it was saved: a tuple has become a list

    def fits(info: CheckpointInfo) -> bool:
        return all(name in info.metadata and info.metadata[name] == value for name, value in wanted.items())

    return Selection(f"with the metadata {wanted!r}", lambda infos: [one for one in infos if fits(one)])


def _best(metric: str, mode: Mode) -> Selection:
    if not isinstance(metric, str):
        raise UsageTypeError(f"best= takes the name of a metric, not {type(metric).__name__}.")

    def order(infos: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        sign = 1 if mode == "min" else -1
        measured = [one for one in infos if not isnan(one.metrics.get(metric, float("nan")))]
        return sorted(measured, key=lambda one: sign * one.metrics[metric])  # stable: of equal ones the newer is first

    return Selection(f"with the metric {metric!r}", order)


def _listed(steps: Sequence[int]) -> str:
    if not steps:
        return "No checkpoint has a step."
    if len(steps) > MOST_LISTED:
        half = MOST_LISTED // 2
        shown = f"{', '.join(map(str, steps[:half]))}, ..., {', '.join(map(str, steps[-half:]))} ({len(steps)} in all)"
    else:
        shown = ", ".join(map(str, steps))
    return f"There are the steps {shown}." if len(steps) > 1 else f"There is the step {shown}."
