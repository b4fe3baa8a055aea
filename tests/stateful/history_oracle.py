"""What the history of a task must be: numbers, labels and sets of them. Knows nothing of the package."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """One part of a keep policy: ``kind`` is "latest", "best" or "every"."""

    kind: str
    n: int
    metric: str = ""
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True, eq=False)
class Point:
    """What was saved once."""

    label: str
    step: int | None
    metadata: Mapping[str, object]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Commit:
    """A point, as it was saved, or as a rollback or other bookkeeping committed it once more.

    ``ancestors`` are the numbers of the commits that it goes on from, its own among them. It says which attempt
    made it, what that had resumed from, and how many commits ago.
    """

    number: int
    label: str
    ancestors: frozenset[int]
    by: object = None
    resumed: str | None = None
    count: int = 0


@dataclass(frozen=True)
class World:
    """The commits that are there, newest first."""

    commits: tuple[Commit, ...] = ()
    pinned: frozenset[str] = frozenset()

    @property
    def newest(self) -> Commit | None:
        return self.commits[0] if self.commits else None

    @property
    def lineage(self) -> list[Commit]:
        """What the newest one goes on from, itself included."""
        return [one for one in self.commits if one.number in self.commits[0].ancestors]

    @property
    def shown(self) -> list[Commit]:
        """One for each point: an ancestor of the newest if there is one, and of those the newest; newest first."""
        return one_for_each(self.commits, self.commits[0].ancestors) if self.commits else []

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(one.label for one in self.shown)

    def __str__(self) -> str:
        return f"{' '.join(self.labels) or 'nothing'}, pinned {sorted(self.pinned)}"


def one_for_each(commits: Iterable[Commit], lineage: frozenset[int]) -> list[Commit]:
    chosen: dict[str, Commit] = {}
    for commit in sorted(commits, key=lambda one: (one.number in lineage, one.number)):
        chosen[commit.label] = commit
    return sorted(chosen.values(), key=lambda one: -one.number)


@dataclass
class Attempt:
    """What one attempt goes on from.

    Attributes:
        rules: What it keeps; None: everything.
        has_claimed: Whether it tried to take the task over, perhaps in vain.
        owns: Whether it surely has.
        position: The commit that its next save goes on from.
        resumed: What it loaded or rolled back to.
        saves: How many checkpoints it saved since then.
    """

    rules: tuple[Rule, ...] | None
    has_claimed: bool = False
    owns: bool = False
    position: Commit | None = None
    resumed: str | None = None
    saves: int = 0
    name: object = field(default_factory=object)

    def protected(self, until: int) -> str | None:
        """Stays until two own commits exist: so when the second one is made it may go, and no prune drops it before."""
        if self.saves >= until:
            return None
        return self.resumed or (None if self.position is None else self.position.label)

    def claims(self, world: World) -> None:
        if not self.has_claimed:
            self.has_claimed, self.position = True, world.newest

    def goes_on_from(self, commit: Commit) -> None:
        self.resumed = commit.label
        if commit != self.position:
            self.position, self.saves = commit, 0

    def went_back_to(self, commit: Commit) -> None:
        self.position, self.resumed, self.saves = commit, commit.label, 0

    def saved(self, commit: Commit) -> None:
        self.position = commit
        self.saves += 1

    def annotated(self, commit: Commit) -> None:
        """The newest was committed once more: whoever stood there stands on that now."""
        if self.position is not None and self.position.label == commit.label:
            self.position = commit

    def cleared(self) -> None:
        self.position = self.resumed = None


@dataclass
class Oracle:
    """The world, and what the verbs make of it."""

    points: dict[str, Point] = field(default_factory=dict)
    world: World = World()
    damaged: set[str] = field(default_factory=set)
    count: int = 0

    # -- what the verbs make of the world ---------------------------------------------------------------

    def after_save(self, label: str, attempt: Attempt, *, pin: bool) -> World:
        saves = attempt.saves + 1
        commit = replace(self._next(label, attempt.position), by=attempt.name, resumed=attempt.resumed, count=saves)
        world = World((commit, *self.world.commits), self.world.pinned | ({label} if pin else set()))
        return world if attempt.rules is None else self._pruned(world, attempt, attempt.rules)

    def after_rollback(self, commit: Commit, attempt: Attempt) -> World:
        return self._again(commit, attempt, count=0)

    def after_pin(self, label: str, attempt: Attempt, *, on: bool) -> World:
        if (label in self.world.pinned) == on or not self.world.commits:
            return self.world
        pinned = self.world.pinned | {label} if on else self.world.pinned - {label}
        return replace(self._again(self.world.commits[0], attempt), pinned=pinned)

    def after_prune(self, attempt: Attempt) -> World:
        if attempt.rules is None or self.kept(attempt) == set(self.world.labels):
            return self.world
        kept, world = self.kept(attempt), self._again(self.world.commits[0], attempt)
        return replace(world, commits=tuple(one for one in world.shown if one.label in kept))

    def kept(self, attempt: Attempt) -> set[str]:
        """What a prune would keep."""
        if attempt.rules is None:
            return set(self.world.labels)
        ancestors = [one for one in self.world.shown if one.number in self.world.commits[0].ancestors]
        good = {one.label for one in self.intact(ancestors)[:1]} if self.world.commits else set()
        return self._staying(self.world, attempt, attempt.rules, until=2) | good | self._written_down(attempt)

    def _written_down(self, attempt: Attempt) -> set[str]:
        """What the newest commit says that the attempt had resumed from, where that was one commit ago.

        The attempt may have loaded again since, and what it knows is not what a tool beside it reads.
        """
        newest = self.world.newest
        told = newest.resumed if newest and newest.by is attempt.name and newest.count == 1 else None
        return {told} & set(self.world.labels) if told else set()

    def _next(self, label: str, position: Commit | None) -> Commit:
        self.count += 1
        return Commit(self.count, label, (position.ancestors if position else frozenset()) | {self.count})

    def _again(self, commit: Commit, attempt: Attempt, count: int | None = None) -> World:
        """It is the newest again. Where not everything stays, it takes its own place if it is the newest already."""
        others = self.world.commits
        if attempt.rules is not None and commit == self.world.newest:
            others = others[1:]
        again = replace(
            self._next(commit.label, commit),
            by=attempt.name,
            resumed=commit.resumed,
            count=attempt.saves if count is None else count,
        )
        return replace(self.world, commits=(again, *others))

    def _pruned(self, world: World, attempt: Attempt, rules: tuple[Rule, ...]) -> World:
        stay = self._staying(world, attempt, rules)
        return replace(world, commits=tuple(one for one in world.shown if one.label in stay))

    def _staying(self, world: World, attempt: Attempt, rules: tuple[Rule, ...], until: int = 1) -> set[str]:
        protected = {attempt.protected(until)} & set(world.labels)
        return self._chosen(world.labels, rules) | world.pinned | {one for one in protected if one}

    def _chosen(self, newest_first: Sequence[str], rules: Iterable[Rule]) -> set[str]:
        """What the policy keeps, told one checkpoint at a time."""
        stays = set(newest_first[:1])
        for age, label in enumerate(newest_first):
            if any(self._keeps(rule, label, newest_first[:age], newest_first) for rule in rules):
                stays.add(label)
        return stays

    def _keeps(self, rule: Rule, label: str, newer: Sequence[str], everything: Sequence[str]) -> bool:
        if rule.kind == "latest":
            return len(newer) < rule.n
        if rule.kind == "every":
            step = self.points[label].step
            return step is not None and step % rule.n == 0 and step not in [self.points[one].step for one in newer]
        value = self.value(label, rule.metric, rule.mode)
        better = [one for one in everything if self.value(one, rule.metric, rule.mode) < value]
        better += [one for one in newer if self.value(one, rule.metric, rule.mode) == value]
        return not math.isnan(value) and len(better) < rule.n

    def value(self, label: str, metric: str, mode: str) -> float:
        """The lower the better; NaN if it has none."""
        return self.points[label].metrics.get(metric, math.nan) * (1 if mode == "min" else -1)

    # -- what is found in it ----------------------------------------------------------------------------

    def intact(self, commits: Iterable[Commit]) -> list[Commit]:
        return [one for one in commits if one.label not in self.damaged]

    def of_step(self, step: int) -> list[Commit]:
        """Those of a step, in the order to try them: ancestors first, the newer ones first."""
        found = [one for one in self.world.shown if self.points[one.label].step == step]
        return sorted(found, key=lambda one: one not in self.world.lineage)

    def by_metric(self, metric: str, mode: str) -> list[Commit]:
        """The best first; of equal ones the newer."""
        measured = [one for one in self.world.shown if not math.isnan(self.value(one.label, metric, mode))]
        return sorted(measured, key=lambda one: self.value(one.label, metric, mode))

    def by_metadata(self, wanted: Mapping[str, object]) -> list[Commit]:
        return [one for one in self.world.shown if wanted.items() <= self.points[one.label].metadata.items()]

    def blocks(self, step: int | None, attempt: Attempt) -> bool:
        """Whether the next save goes on from an intact checkpoint of this step."""
        if step is None or attempt.position is None:
            return False
        ancestors = [one for one in self.world.commits if one.number in attempt.position.ancestors]
        return step in [self.points[one.label].step for one in self.intact(ancestors)]
