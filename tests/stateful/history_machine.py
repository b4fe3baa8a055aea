"""The history of one task: saves, loads, rollbacks, pins and prunes of several attempts, against the oracle."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import fsspec
import hypothesis.strategies as st
from hypothesis import event, note
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from taskckpt import BestN, Checkpoint, EveryNSteps, LatestN, PruneDecision
from taskckpt._keep import KeepPolicy
from taskckpt.errors import (
    CorruptCheckpointError,
    StaleAttemptError,
    StepExistsError,
    StepNotFoundError,
    UnavailableError,
)
from taskckpt.testing import instant_retries, intercepted
from tests.stateful.history_oracle import Attempt, Commit, Oracle, Point, Rule, World
from tests.stateful.machine import Crash, Place

SIZES = {"small": 20, "large": 2000}
MOST_ATTEMPTS = 28  # a record names 32 claims before it
CORRUPT, MISSING = "CORRUPT", "MISSING"

steps = st.integers(0, 6)
values = st.sampled_from([0.0, 0.5, 1.0, math.nan, -math.inf])
rules = st.one_of(
    st.builds(Rule, st.just("latest"), st.integers(1, 3)),
    st.builds(Rule, st.just("best"), st.integers(1, 2), st.just("loss"), st.sampled_from(["min", "max"])),
    st.builds(Rule, st.just("every"), st.integers(1, 3)),
)
policies = st.none() | st.lists(rules, min_size=1, max_size=3, unique=True).map(tuple)
selections = st.one_of(
    st.just({}),
    st.builds(lambda step: {"step": step}, steps),
    st.builds(lambda mode: {"best": "loss", "mode": mode}, st.sampled_from(["min", "max"])),
    st.builds(lambda tag: {"where": {"tag": tag}}, st.sampled_from(["a", "b"])),
)


def policy_of(rules: Sequence[Rule] | None) -> KeepPolicy | None:
    return None if rules is None else reduce(or_, map(part_of, rules))


def part_of(rule: Rule) -> KeepPolicy:
    if rule.kind == "best":
        return BestN(rule.n, rule.metric, mode=rule.mode)
    return LatestN(rule.n) if rule.kind == "latest" else EveryNSteps(rule.n)


class History(RuleBasedStateMachine):
    """One attempt after the other; any request may fail, lose its reply, or be the last of its process."""

    def __init__(self, kind: str, root: Path) -> None:
        super().__init__()
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        self.place = Place(kind, root / "task")
        if kind == "memory" and self.place.keys(""):
            fsspec.filesystem("memory").rm(str(root), recursive=True)
        self.oracle = Oracle()
        self.count = self.attempts = self.top = 0
        self.objects: dict[str, str] = {}  # where the large ones lie
        self.fault: tuple[int, str] | None = None
        self.faults = 0
        self.crashing = False
        self.earlier: list[Checkpoint] = []
        self.stack = ExitStack()
        self.stack.enter_context(intercepted(self.hook))
        self.stack.enter_context(instant_retries())

    @property
    def world(self) -> World:
        return self.oracle.world

    # -- faults -----------------------------------------------------------------------------------------

    def hook(self, when: str, verb: str, keys: Sequence[str]) -> None:
        if self.crashing:
            raise Crash
        if self.fault is None or not self.fault[1].endswith(when):
            return
        left, how = self.fault
        self.fault = (left - 1, how)
        if left > 0:
            return
        self.fault = None
        self.faults += 1
        if how.startswith("crash"):
            self.crashing = True
            raise Crash
        raise UnavailableError(f"As wished, {how} {verb}.", uri=self.place.dest)

    @precondition(lambda self: self.attempts < MOST_ATTEMPTS)
    @rule(left=st.integers(0, 10), how=st.sampled_from(["lost before", "lost after", "crash before", "crash after"]))
    def arm(self, left: int, how: str) -> None:
        self.fault = (left, how)

    @rule(how=st.sampled_from(["flip", "cut", "gone"]))
    def rot(self, how: str) -> None:
        """The content of the newest good checkpoint is damaged, if it is an object of its own."""
        label = self.expected({})[1]
        if label in self.objects:
            self.place.damage(self.objects[label], how)
            self.oracle.damaged.add(label)

    # -- attempts ---------------------------------------------------------------------------------------

    @initialize(rules=policies)
    def first_attempt(self, rules: tuple[Rule, ...] | None) -> None:
        self.begin(rules)

    @precondition(lambda self: self.attempts < MOST_ATTEMPTS)
    @rule(rules=policies, loads=st.booleans())
    def next_attempt(self, rules: tuple[Rule, ...] | None, *, loads: bool) -> None:
        if self.attempt.owns:
            self.earlier.append(self.checkpoint)
        self.begin(rules)
        if loads:
            self.load({})

    def begin(self, rules: tuple[Rule, ...] | None) -> None:
        self.attempts += 1
        self.attempt = Attempt(rules)
        self.checkpoint = Checkpoint(self.place.dest, keep=policy_of(rules))

    @precondition(lambda self: self.earlier and self.attempt.owns and self.fault is None)
    @rule(which=st.integers(0, 99), step=steps, verb=st.sampled_from(["save", "rollback", "pin", "unpin", "prune"]))
    def an_earlier_attempt_can_do_nothing(self, which: int, step: int, verb: str) -> None:
        checkpoint = self.earlier[which % len(self.earlier)]
        words: dict[str, Callable[[], object]] = {
            "save": lambda: checkpoint.save_sync(b"stale"),
            "rollback": lambda: checkpoint.rollback_sync(step),
            "pin": lambda: checkpoint.pin_sync(step),
            "unpin": lambda: checkpoint.unpin_sync(step),
            "prune": checkpoint.prune_sync,
        }
        try:
            words[verb]()
        except (StaleAttemptError, StepNotFoundError, StepExistsError, CorruptCheckpointError):
            self.expect_one_of(self.world)
        else:
            assert verb in ("unpin", "prune"), f"{verb} of an attempt that has lost the task"  # nothing was to be done
            self.expect_one_of(self.world)

    # -- verbs that write -------------------------------------------------------------------------------

    @rule(
        step=st.none() | steps,
        metrics=st.dictionaries(st.sampled_from(["loss", "accuracy"]), values),
        tag=st.sampled_from(["a", "b"]),
        size=st.sampled_from(sorted(SIZES)),
        pin=st.sampled_from([False, False, False, True]),
        overwrite=st.booleans(),
    )
    def save(
        self, step: int | None, metrics: dict[str, float], tag: str, size: str, *, pin: bool, overwrite: bool
    ) -> None:
        self.count += 1
        label = f"{size}-{self.count}"
        attempt = self.as_if_claimed()
        self.oracle.points[label] = point = Point(label, step, {"label": label, "tag": tag}, metrics)
        is_refused = not overwrite and self.oracle.blocks(step, attempt)
        after = self.world if is_refused else self.oracle.after_save(label, attempt, pin=pin)

        def save() -> None:
            content = label.encode().ljust(SIZES[size], b".")
            given = {"step": step, "metadata": point.metadata, "metrics": metrics, "pin": pin, "overwrite": overwrite}
            self.checkpoint.save_sync(content, **given)  # type: ignore[arg-type]

        objects = self.place.keys("data")
        result = self.writes(save, after, refused=StepExistsError if is_refused else None)
        newest = self.world.newest
        if newest is not None and newest.label == label:
            if size == "large":
                (self.objects[label],) = [
                    key for key in self.place.keys("data") - objects if self.place.read(key).startswith(label.encode())
                ]
            if result != "crashed":
                self.attempt.saved(newest)

    def existing(self, which: int) -> int:
        """Mostly a step that is there; a missing one is an error that needs no second test."""
        there = sorted({step for label in self.world.labels if (step := self.oracle.points[label].step) is not None})
        return there[which % len(there)] if there and which else 99

    @precondition(lambda self: self.world.commits)
    @rule(which=st.integers(0, 20))
    def rollback(self, which: int) -> None:
        step = self.existing(which)
        found = self.oracle.of_step(step)
        refused = None if self.oracle.intact(found[:1]) else CorruptCheckpointError if found else StepNotFoundError
        before = self.world
        after = before if refused else self.oracle.after_rollback(found[0], self.as_if_claimed())
        result = self.writes(lambda: self.checkpoint.rollback_sync(step), after, refused=refused)
        newest = self.world.newest
        if result == "failed" and self.world == before:
            self.next_attempt(self.attempt.rules, loads=False)  # this one protects it in case, or does not
        elif newest is not None and self.world != before and result != "crashed":
            self.attempt.went_back_to(newest)

    @precondition(lambda self: self.world.commits)
    @rule(which=st.integers(0, 20), on=st.booleans())
    def pin(self, which: int, *, on: bool) -> None:
        step = self.existing(which)
        found = self.oracle.of_step(step)
        after = self.oracle.after_pin(found[0].label, self.as_if_claimed(), on=on) if found else self.world
        verb = self.checkpoint.pin_sync if on else self.checkpoint.unpin_sync
        self.annotates(lambda: verb(step), after, refused=None if found else StepNotFoundError)

    @precondition(lambda self: self.world.commits)
    @rule()
    def prune(self) -> None:
        told: list[PruneDecision] = []
        before, attempt = self.world, self.as_if_claimed()
        kept = self.oracle.kept(attempt)
        result = self.annotates(lambda: told.extend(self.checkpoint.prune_sync()), self.oracle.after_prune(attempt))
        if result == "done":
            self.expect_decisions(told, before, kept)

    @precondition(lambda self: self.world.commits and self.fault is None)
    @rule()
    def prune_as_it_was_foretold(self) -> None:
        objects = {key: self.place.read(key) for key in self.place.keys("")}
        foretold = self.checkpoint.prune_sync(dry_run=True)
        assert objects == {key: self.place.read(key) for key in self.place.keys("")}, "a dry run writes nothing"
        before, attempt = self.world, self.as_if_claimed()
        kept = self.oracle.kept(attempt)
        told: list[PruneDecision] = []
        self.annotates(lambda: told.extend(self.checkpoint.prune_sync()), self.oracle.after_prune(attempt))
        self.expect_decisions(told, before, kept)
        assert [(one.keeps, one.reason) for one in told] == [(one.keeps, one.reason) for one in foretold]

    def expect_decisions(self, told: Sequence[PruneDecision], before: World, kept: set[str]) -> None:
        assert tuple(one.checkpoint.metadata["label"] for one in told) == before.labels
        assert {one.checkpoint.metadata["label"] for one in told if one.keeps} == kept
        assert all(one.reason.strip() for one in told)

    def annotates(self, call: Callable[[], object], after: World, *, refused: type[Exception] | None = None) -> str:
        """Runs what commits the newest checkpoint once more, with other bookkeeping."""
        before = self.world
        result = self.writes(call, after, refused=refused)
        newest = self.world.newest
        if newest is not None and self.world != before and result != "crashed":
            self.attempt.annotated(newest)
        return result

    @precondition(lambda self: len(self.world.commits) > 2 and self.count % 4 == 0)
    @rule()
    def clear(self) -> None:
        result = self.writes(self.checkpoint.clear_sync, World())
        if result == "done" or (result == "failed" and not self.world.commits):
            self.attempt.cleared()

    def as_if_claimed(self) -> Attempt:
        attempt = copy(self.attempt)
        attempt.claims(self.world)
        return attempt

    def writes(
        self, call: Callable[[], object], after: World, *, refused: type[Exception] | None = None, surely: bool = True
    ) -> str:
        """Runs what makes ``after`` of the world; where it fails, it has made it or it has not."""
        before = self.world
        result = "done"
        try:
            call()
        except UnavailableError:
            result = "failed"
        except Crash:
            result = "crashed"
            self.crashing = False
        except (StepExistsError, StepNotFoundError, CorruptCheckpointError) as error:
            if refused is None or not isinstance(error, refused):
                raise
            result = "refused"
        else:
            assert refused is None, f"no {refused}"
        event(result)
        note(f"{result}: {before} -> {after}")
        self.expect_one_of(*{"done": [after], "refused": [before]}.get(result, [before, after]))
        if result == "crashed":
            self.begin(self.attempt.rules)
        else:
            self.attempt.claims(before)
            self.attempt.owns |= result == "done"
        return result

    # -- verbs that read --------------------------------------------------------------------------------

    @precondition(lambda self: self.world.commits)
    @rule(which=st.integers(0, 20))
    def load_a_step(self, which: int) -> None:
        """And go on from there."""
        self.load({"step": self.existing(which)})

    @rule(times=st.integers(2, 6), first=steps, keeps_going=st.booleans())
    def save_often(self, times: int, first: int, *, keeps_going: bool) -> None:
        for number in range(times):
            values = {"loss": 1 / (1 + (first * number) % 4)}
            size = "large" if number % 2 else "small"
            self.save(first + number if keeps_going else None, values, "b", size, pin=False, overwrite=True)

    @rule(selection=selections)
    def load(self, selection: dict[str, Any]) -> None:
        order, expected = self.expected(selection)
        try:
            found = label_of(self.checkpoint, selection)
        except UnavailableError:
            self.attempt.claims(self.world)
        except Crash:
            self.crashing = False
            self.begin(self.attempt.rules)
        else:
            assert found == expected
            self.attempt.claims(self.world)
            self.attempt.owns = True
            if isinstance(found, str) and found in self.oracle.points:
                self.attempt.goes_on_from(next(one for one in self.oracle.intact(order) if one.label == found))
        self.expect_one_of(self.world)

    @rule(selection=selections)
    def look(self, selection: dict[str, Any]) -> None:
        """A view that writes nothing finds the same, and nothing is taken over."""
        fault, self.fault = self.fault, None
        view = Checkpoint(self.place.dest, read_only=True)
        found = label_of(view, selection)
        assert found == self.expected(selection)[1]
        there = [self.oracle.points[label].step for label in self.world.labels]
        assert view.steps_sync() == sorted({step for step in there if step is not None})
        assert view.latest_step_sync() == (there[0] if there else None)
        self.fault = fault

    def expected(self, selection: Mapping[str, Any]) -> tuple[list[Commit], str | None]:
        """What a load tries, and what it gives: of those that fit the first that is intact."""
        match selection:
            case {"step": step}:
                order = self.oracle.of_step(step)
            case {"best": metric, "mode": mode}:
                order = self.oracle.by_metric(metric, mode)
            case {"where": wanted}:
                order = self.oracle.by_metadata(wanted)
            case _:
                order = self.world.lineage if self.world.commits else []
        good = self.oracle.intact(order)
        nothing = MISSING if selection else None
        return order, good[0].label if good else CORRUPT if order else nothing

    # -- what must hold ---------------------------------------------------------------------------------

    def expect_one_of(self, *worlds: World) -> None:
        """The task is seen to be in one of these worlds, and that is the one it is in from now on."""
        fault, self.fault = self.fault, None
        found = Checkpoint(self.place.dest, read_only=True).checkpoints_sync()
        self.fault = fault
        labels = tuple(str(one.metadata["label"]) for one in found)
        pinned = frozenset(label for label, one in zip(labels, found, strict=True) if one.pinned)
        fitting = [world for world in worlds if (world.labels, world.pinned) == (labels, pinned)]
        assert fitting, f"{labels}, pinned {pinned}, but it must be {' or '.join(map(str, worlds))}"
        slot = found[0].slot if found else 0
        self.oracle.world = fitting[0 if slot == self.top else -1]  # a rollback to the newest looks like none
        self.top = slot
        for commit, one in zip(self.world.shown, found, strict=True):
            point = self.oracle.points[commit.label]
            assert one.step == point.step
            assert one.metadata == point.metadata
            assert str(dict(one.metrics)) == str(point.metrics)  # a NaN is not equal to itself
            assert one.in_lineage == (commit in self.world.lineage), f"{commit} of {self.world.newest}"
        present = self.place.keys("data")
        missing = {label for label in labels if label in self.objects and self.objects[label] not in present}
        assert missing <= self.oracle.damaged

    def teardown(self) -> None:
        """In the end a clean attempt finds what must be there, and after its second save nothing else is left."""
        try:
            if hasattr(self, "attempt") and sys.exception() is None:
                self.end_well()
        finally:
            self.stack.close()

    def end_well(self) -> None:
        self.fault = None
        self.begin((Rule("latest", 1),))
        self.load({})
        for step in (101, 102):
            self.save(step, {}, "a", "large", pin=False, overwrite=False)
        expected = {self.objects[label] for label in self.world.labels if label in self.objects}
        gone = {self.objects[label] for label in self.oracle.damaged if label in self.objects}
        assert expected - gone <= self.place.keys("data") <= expected


def label_of(checkpoint: Checkpoint, selection: Mapping[str, Any]) -> str | None:
    """What a load gives, by its content; the whole of which is looked at."""
    try:
        data = checkpoint.load_bytes_sync(**selection)
    except CorruptCheckpointError:
        return CORRUPT
    except StepNotFoundError:
        return MISSING
    if data is None:
        return None
    label = data.rstrip(b".").decode()
    assert len(data) == SIZES[label.partition("-")[0]]
    return label
