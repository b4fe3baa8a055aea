"""When a task should save: every so many steps or seconds, or within a share of its time. Pure, but for a clock."""

from __future__ import annotations

import re
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from numbers import Integral
from typing import NamedTuple, TypeAlias

from taskckpt.errors import UsageError, UsageTypeError

FORMS = "100 or '100' (steps), '60s', '5m', '1h' (time), '2%' (share of the time), or several as '100|5m'"
SECONDS = {"s": 1, "m": 60, "h": 3600}

# A budget makes its first save this early, to measure what one costs. Until then no more than this is at risk,
# and a save that takes 0.2 s stays within 2%.
FIRST_SAVE_S = 10.0


class Moment(NamedTuple):
    """What a policy knows when it is asked whether a save is due.

    Attributes:
        step: How far the task is.
        before: The step before it that is known: asked about, saved or resumed from; None if there is none.
        since_s: Time since the last save ended, or since the task began.
        elapsed_s: Time since the task began.
        spent_s: How much of that the task waited for saves.
        cost_s: What the next save is expected to cost; None before the first one.
    """

    step: int
    before: int | None
    since_s: float
    elapsed_s: float
    spent_s: float
    cost_s: float | None


class SavePolicy(ABC):
    """What ``save_policy=`` takes: ``EverySteps``, ``EverySeconds``, ``Budget``, or several of them.

    With ``a | b`` a save is due when ``a`` or ``b`` says so.
    """

    def __or__(self, other: SavePolicy) -> SavePolicy:
        if not isinstance(other, SavePolicy):
            return NotImplemented
        parts = tuple(dict.fromkeys((*self.parts, *other.parts)))
        return parts[0] if len(parts) == 1 else _AnyOf(parts)

    @property
    def parts(self) -> tuple[SavePolicy, ...]:
        """The policies that it is made of."""
        return (self,)

    @abstractmethod
    def is_due(self, now: Moment) -> bool:
        """Whether a save is due."""


Policy: TypeAlias = SavePolicy | int | str


@dataclass(frozen=True, slots=True)
class EverySteps(SavePolicy):
    """A save is due at each step that is a multiple of ``n`` (0 is one), or the first that is past a multiple.

    The answer depends on steps alone, so that all ranks of a job that ask at the same steps agree.

    Raises:
        UsageError: ``n`` is not an int of at least 1.
    """

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise UsageError(f"EverySteps takes a number of steps of at least 1, not {self.n!r}.")

    def is_due(self, now: Moment) -> bool:
        if now.before is None or now.step < now.before:  # it begins, or has gone back: only the step itself tells
            return now.step % self.n == 0
        return now.step // self.n > now.before // self.n


@dataclass(frozen=True, slots=True)
class EverySeconds(SavePolicy):
    """A save is due ``seconds`` after the last one ended, whatever made it, or after the task began.

    Raises:
        UsageError: ``seconds`` is not a finite number above 0.
    """

    seconds: float

    def __post_init__(self) -> None:
        _check_seconds("EverySeconds takes", self.seconds)

    def is_due(self, now: Moment) -> bool:
        return now.since_s >= self.seconds


@dataclass(frozen=True, slots=True, init=False)
class Budget(SavePolicy):
    """Saves as often as a share of the task's time allows: measured, as the task waits for saves, not guessed.

    The first save comes early, after 10 seconds, to measure what one costs. Then a save is due when

    - the time since the last one is at least ``cost * (1 - share) / share``, and
    - with it, the time spent on all saves stays below ``share`` of the time since the task began.

    ``cost`` is what the last save cost, or, if it cost less than expected, the mean of both. So the share holds after
    each save but the first and those that cost more than the ones before them, and these are made up for.

    With a mean time between failures the saves are further apart where that loses less time altogether: by

        sqrt(2 * cost * mtbf) * (1 + sqrt(cost / (2 * mtbf)) / 3 + cost / (2 * mtbf) / 9) - cost

    or by ``mtbf`` if a save costs more than ``2 * mtbf``. (J. T. Daly, "A higher order estimate of the optimum
    checkpoint interval for restart dumps", Future Generation Computer Systems 22(3), 2006; its first factor is from
    J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974.)

    Args:
        share: A number above 0 and below 1, or a text such as "2%".
        mtbf_s: Mean time between failures, in seconds. None: as often as the share allows.

    Raises:
        UsageError: The share or the time is out of its range.
    """

    share: float
    mtbf_s: float | None

    def __init__(self, share: float | str, *, mtbf_s: float | None = None) -> None:
        if mtbf_s is not None:
            _check_seconds("mtbf_s is", mtbf_s)
        object.__setattr__(self, "share", _checked_share(share))
        object.__setattr__(self, "mtbf_s", mtbf_s)

    def is_due(self, now: Moment) -> bool:
        cost_s = now.cost_s
        if cost_s is None:
            return now.since_s >= FIRST_SAVE_S
        interval_s = cost_s * (1 - self.share) / self.share
        if self.mtbf_s is not None:
            interval_s = max(interval_s, optimum_interval_s(cost_s, self.mtbf_s))
        return now.since_s >= interval_s and now.spent_s + cost_s <= self.share * (now.elapsed_s + cost_s)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _AnyOf(SavePolicy):
    policies: tuple[SavePolicy, ...]

    @property
    def parts(self) -> tuple[SavePolicy, ...]:
        return self.policies

    def is_due(self, now: Moment) -> bool:
        return any(policy.is_due(now) for policy in self.policies)

    def __eq__(self, other: object) -> bool:  # in whatever order they were combined
        return isinstance(other, _AnyOf) and set(self.policies) == set(other.policies)

    def __hash__(self) -> int:
        return hash(frozenset(self.policies))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))


class Schedule:
    """Says when the saves of one task are due. Thread-safe.

    Args:
        policy: When to save.
        clock: Seconds, from any beginning, that never go back.
    """

    def __init__(self, policy: SavePolicy, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.policy = policy
        self._clock = clock
        self._lock = threading.Lock()
        self._begun = self._last_save = clock()
        self._spent_s = 0.0
        self._cost_s: float | None = None
        self._step: int | None = None
        self._before: int | None = None

    def should_save(self, step: int) -> bool:
        """Whether a save is due now.

        Steps may be left out: 103 after 98 is due if 100 is. Asked again at one step, the answer by steps is the
        same, until something is saved. What is due by time stays due until something is saved.

        Args:
            step: How far the task is.

        Raises:
            UsageError: ``step`` is not an int of at least 0.
        """
        if isinstance(step, bool) or not isinstance(step, Integral) or step < 0:
            raise UsageError(f"step={step!r} must be a whole number of at least 0.")
        with self._lock:
            if step != self._step:
                self._before, self._step = self._step, int(step)
            now = self._clock()
            since_s, elapsed_s = now - self._last_save, now - self._begun
            return self.policy.is_due(Moment(int(step), self._before, since_s, elapsed_s, self._spent_s, self._cost_s))

    def saved(self, cost_s: float, step: int | None) -> None:
        """To be told after each save, whatever made it; of one that failed too, for its time is spent.

        Args:
            cost_s: For how long the task could not go on, in seconds.
            step: The step that was saved; None for the one that was last asked about.
        """
        with self._lock:
            self._is_at(step)
            self._last_save = self._clock()
            self._spent_s += cost_s
            # Up at once, and down by halves: one cheap save is no reason to save twice as often.
            self._cost_s = cost_s if self._cost_s is None else max(cost_s, (self._cost_s + cost_s) / 2)

    def resumed(self, step: int | None) -> None:
        """To be told after a load or a rollback: the task goes on from that step, and it is saved."""
        with self._lock:
            self._is_at(step)

    def _is_at(self, step: int | None) -> None:
        if step is not None:
            self._step = step
        self._before = self._step


def schedule_of(policy: Policy | None) -> Schedule | None:
    """A new schedule for what ``save_policy=`` was given; None for None. Raises as ``save_policy_of`` does."""
    checked = save_policy_of(policy)
    return None if checked is None else Schedule(checked)


def save_policy_of(policy: Policy | None) -> SavePolicy | None:
    """What ``save_policy=`` or ``every=`` means: a number is steps; texts are steps, times or shares.

    >>> save_policy_of("100|5m")
    EverySteps(n=100) | EverySeconds(seconds=300.0)

    Raises:
        UsageError: It is out of range, or a text of no known form; the message lists the forms.
        UsageTypeError: It is neither a policy, a number nor a text.
    """
    if policy is None or isinstance(policy, SavePolicy):
        return policy
    if isinstance(policy, str):
        first, *others = (_parse_part(part.strip(), policy) for part in policy.split("|"))
        for other in others:
            first |= other
        return first
    if isinstance(policy, bool) or not isinstance(policy, int):
        raise UsageTypeError(f"{policy!r} does not say when to save.", hint=f"Pass a policy, or {FORMS}.")
    return EverySteps(policy)


def _parse_part(part: str, whole: str) -> SavePolicy:
    number = re.fullmatch(r"([0-9]{1,15})|([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([smh%])", part)
    if number is None:
        raise UsageError(f"{whole!r} does not say when to save.", hint=f"The forms are {FORMS}.")
    steps, amount, unit = number.groups()
    if steps is not None:
        return EverySteps(int(steps))
    if unit == "%":
        return Budget(float(amount) / 100)
    return EverySeconds(float(amount) * SECONDS[unit])


def _checked_share(share: float | str) -> float:
    given = share
    if isinstance(share, str):
        percent = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?%", share.strip())
        share = float(percent[1]) / 100 if percent else 0.0
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise UsageError(f"Budget takes a share above 0 and below 1, or a text such as '2%', not {given!r}.")
    return float(share)


def _check_seconds(what: str, seconds: float) -> None:
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not 0 < seconds <= sys.float_info.max:
        raise UsageError(f"{what} a number of seconds above 0, not {seconds!r}.")


def optimum_interval_s(cost_s: float, mtbf_s: float) -> float:
    """How long to work between two saves so that saves and failures together cost least time.

    Daly's formula; see ``Budget``.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return sqrt(2 * cost_s * mtbf_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - cost_s
