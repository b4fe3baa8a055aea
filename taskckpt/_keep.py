"""Which checkpoints of a task stay: the newest, the best by a metric, one every so many steps. Pure."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import isnan
from typing import Literal, Protocol, TypeAlias
from urllib.parse import quote, unquote

from taskckpt.errors import UsageError, UsageTypeError

Mode: TypeAlias = Literal["min", "max"]

# More than any history has; a longer number is a mistake.
MOST = 2**63 - 1
FORMS = "3, all, latest:3, best:2:loss:min, best:2:accuracy:max, every:1000, and several of them with | in between"


class Candidate(Protocol):
    """A commit, as far as it is needed to say whether it stays.

    Commits that repeat one checkpoint (of a rollback or a pin) have one ``original``.
    """

    @property
    def slot(self) -> int: ...
    @property
    def original(self) -> int: ...
    @property
    def step(self) -> int | None: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


class KeepPolicy(ABC):
    """What ``keep=`` takes beside a number: ``LatestN``, ``BestN``, ``EveryNSteps``, or several of them.

    With ``a | b`` stays what ``a`` or ``b`` keeps. The newest checkpoint always stays, and so does what is pinned.
    ``str(policy)`` is its text for an environment variable or a command line.
    """

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        if not isinstance(other, KeepPolicy):
            return NotImplemented
        parts = tuple(dict.fromkeys((*self.parts, *other.parts)))
        return parts[0] if len(parts) == 1 else _Union(parts)

    @property
    def parts(self) -> tuple[KeepPolicy, ...]:
        """The policies that it is made of."""
        return (self,)

    @property
    def reach(self) -> int | None:
        """How many of the newest checkpoints it looks at; None for all."""
        return None

    @abstractmethod
    def picks(self, newest_first: Sequence[Candidate]) -> Iterable[tuple[int, str]]:
        """The slots that it keeps, each with the reason in plain words."""

    @abstractmethod
    def __str__(self) -> str: ...


@dataclass(frozen=True, slots=True)
class LatestN(KeepPolicy):
    """Keeps the newest ``n`` checkpoints, in the order of their commits.

    Raises:
        UsageError: ``n`` is not an int of at least 1.
    """

    n: int

    def __post_init__(self) -> None:
        _check_count("LatestN", self.n)

    @property
    def reach(self) -> int | None:
        return self.n

    def picks(self, newest_first: Sequence[Candidate]) -> Iterable[tuple[int, str]]:
        reason = f"among the newest {self.n}"
        return [(one.slot, reason) for one in newest_first[: self.n]]

    def __str__(self) -> str:
        return f"latest:{self.n}"


@dataclass(frozen=True, slots=True)
class BestN(KeepPolicy):
    """Keeps the ``n`` checkpoints whose ``metrics[metric]`` is lowest, or highest with ``mode="max"``.

    One that was saved without that metric, or with NaN, is never among them. Of equal ones the newer is better.

    Raises:
        UsageError: ``n`` is not an int of at least 1, ``metric`` not a name, or ``mode`` neither "min" nor "max".
    """

    n: int
    metric: str
    mode: Mode = field(default="min", kw_only=True)

    def __post_init__(self) -> None:
        _check_count("BestN", self.n)
        if not isinstance(self.metric, str) or not self.metric.strip():
            raise UsageError(f"BestN takes the name of a metric, such as 'loss', not {self.metric!r}.")
        try:
            self.metric.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"The metric's name {self.metric!r} is not text: it has no UTF-8.") from error
        if self.mode not in ("min", "max"):
            raise UsageError(f"mode={self.mode!r} must be 'min' or 'max'.")

    def picks(self, newest_first: Sequence[Candidate]) -> Iterable[tuple[int, str]]:
        sign = 1 if self.mode == "min" else -1
        measured = (
            (sign * value, age)
            for age, one in enumerate(newest_first)
            if (value := one.metrics.get(self.metric)) is not None and not isnan(value)
        )
        reason = f"among the best {self.n} by {self.metric}"
        return [(newest_first[age].slot, reason) for _, age in heapq.nsmallest(self.n, measured)]

    def __str__(self) -> str:
        return f"best:{self.n}:{quote(self.metric)}:{self.mode}"


@dataclass(frozen=True, slots=True)
class EveryNSteps(KeepPolicy):
    """Keeps each checkpoint whose step is a multiple of ``n``; 0 is one. Of several with one step the newest stays.

    Raises:
        UsageError: ``n`` is not an int of at least 1.
    """

    n: int

    def __post_init__(self) -> None:
        _check_count("EveryNSteps", self.n)

    def picks(self, newest_first: Sequence[Candidate]) -> Iterable[tuple[int, str]]:
        newest: dict[int, int] = {}
        for one in newest_first:
            if one.step is not None and one.step % self.n == 0:
                newest.setdefault(one.step, one.slot)
        return [(slot, f"step {step} is a multiple of {self.n}") for step, slot in newest.items()]

    def __str__(self) -> str:
        return f"every:{self.n}"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Union(KeepPolicy):
    policies: tuple[KeepPolicy, ...]

    @property
    def parts(self) -> tuple[KeepPolicy, ...]:
        return self.policies

    @property
    def reach(self) -> int | None:
        reaches = [policy.reach for policy in self.policies if policy.reach is not None]
        return max(reaches) if len(reaches) == len(self.policies) else None

    def picks(self, newest_first: Sequence[Candidate]) -> Iterable[tuple[int, str]]:
        return [pick for policy in self.policies for pick in policy.picks(newest_first)]

    def __eq__(self, other: object) -> bool:  # in whatever order they were combined
        return isinstance(other, _Union) and set(self.policies) == set(other.policies)

    def __hash__(self) -> int:
        return hash(frozenset(self.policies))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))

    def __str__(self) -> str:
        return "|".join(map(str, self.policies))


def policy_of(keep: int | KeepPolicy | None) -> KeepPolicy | None:
    """What ``keep=`` means: a number is that many of the newest, None keeps all.

    Raises:
        UsageError: It is a number below 1.
        UsageTypeError: It is neither a number nor a policy.
    """
    if keep is None or isinstance(keep, KeepPolicy):
        return keep
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise UsageTypeError(
            f"keep={keep!r} must be a number, None to keep all, or a policy such as LatestN(3) | BestN(2, 'loss')."
        )
    if keep < 1:
        raise UsageError(f"keep={keep!r} must be at least 1, or None to keep all.")
    return LatestN(keep)


def decide(policy: KeepPolicy | None, candidates: Sequence[Candidate]) -> dict[int, str]:
    """Which commits stay.

    Of commits that repeat one checkpoint only the newest counts and may stay. The newest commit always stays.

    Args:
        policy: What to keep; None for all.
        candidates: The commits that are there, newest first.

    Returns:
        The slot of each that stays, with the reason in plain words.
    """
    if not candidates:
        return {}
    stays = {candidates[0].slot: "the newest"}
    if policy is None:
        picks: Iterable[tuple[int, str]] = ((one.slot, "all are kept") for one in _distinct(candidates))
    else:
        picks = policy.picks(list(islice(_distinct(candidates), policy.reach)))
    for slot, reason in picks:
        stays.setdefault(slot, reason)
    return stays


def _distinct(newest_first: Sequence[Candidate]) -> Iterator[Candidate]:
    seen: set[int] = set()
    for one in newest_first:
        original = one.original
        if original not in seen:
            seen.add(original)
            yield one


def text_of(policy: KeepPolicy | None) -> str:
    """A policy as text, for an environment variable or a command line; ``all`` for None."""
    return "all" if policy is None else str(policy)


def parse_policy(text: str) -> KeepPolicy | None:
    """The policy that a text stands for: the inverse of ``text_of``, and a plain number is that many of the newest.

    >>> parse_policy("latest:3|best:2:loss")
    LatestN(n=3) | BestN(n=2, metric='loss', mode='min')

    Raises:
        UsageError: It is none of the forms, which the message lists.
    """
    if text.strip() == "all":
        return None
    first, *others = (_parse_part(part.strip(), text) for part in text.split("|"))
    for other in others:
        first |= other
    return first


def _parse_part(part: str, whole: str) -> KeepPolicy:
    match part.split(":"):
        case [n] | ["latest", n] if _is_count(n):
            return LatestN(int(n))
        case ["every", n] if _is_count(n):
            return EveryNSteps(int(n))
        case ["best", n, name] if _is_count(n):
            return BestN(int(n), _metric(name, whole))
        case ["best", n, name, "min" | "max" as mode] if _is_count(n):
            return BestN(int(n), _metric(name, whole), mode=mode)
        case _:
            raise UsageError(f"{whole!r} does not say which checkpoints to keep.", hint=f"The forms are {FORMS}.")


def _metric(quoted: str, whole: str) -> str:
    try:
        return unquote(quoted, errors="strict")
    except UnicodeDecodeError as error:
        raise UsageError(f"The name of the metric in {whole!r} is not percent-encoded UTF-8.") from error


def _is_count(text: str) -> bool:
    # int() reads more: signs, underscores, digits of other scripts, and a number too long for it is an error.
    return text.isascii() and text.isdigit() and len(text) <= len(str(MOST))


def _check_count(name: str, n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST:
        raise UsageError(f"{name} takes a number from 1 to {MOST}, not {n!r}.")
