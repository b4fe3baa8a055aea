"""The protocol of the task log, explored exhaustively: no violation with all rules on, and one without each."""

from __future__ import annotations

import os
from dataclasses import fields

import pytest

from tests.model.model_explorer import explore, follow
from tests.model.protocol_model import Rules
from tests.model.schedules import SCHEDULES, Schedule
from tests.model.worlds import FULL, SAFE, shallow_fenced, slow_listing, world_of

NEEDS_FULL = pytest.mark.skipif(
    os.environ.get("TASKCKPT_MODEL") != "full",
    reason="larger worlds of the protocol model: set TASKCKPT_MODEL=full (about seven minutes, 1 GiB of memory)",
)
# What must happen in a world of this kind, or its "0 violations" would say nothing.
MUST_HAPPEN = {
    "child": "joined",
    "joiner": "joined",
    "rollback": "saved",
    "reader": "loaded",
    "late": "unknown",
    "attempts": "stale",
}


@pytest.mark.parametrize("name", SAFE)
def test_no_schedule_breaks_the_protocol(name: str) -> None:
    result = explore(SAFE[name])
    assert not result.violations, f"{name}: {result}"
    assert result.complete
    for word, event in MUST_HAPPEN.items():
        assert word not in name or result.seen[event], f"{name}: nothing was ever {event}"


@NEEDS_FULL
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FULL)
def test_no_schedule_breaks_the_protocol_in_larger_worlds(name: str) -> None:
    result = explore(FULL[name])
    assert not result.violations, f"{name}: {result}"
    assert result.complete


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
class TestKnownBadSchedules:
    """Each is found again with its rule off, is as written down, and does no harm with the rule on."""

    def test_is_found_with_the_rule_off(self, schedule: Schedule) -> None:
        result = explore(world_of(schedule, rules_on=False), only=(schedule.violates,))
        assert result.violations, f"{schedule.name}: {result}"
        assert len(result.schedule) <= len(schedule.steps)  # breadth first: no shorter one exists

    def test_violates_as_written_down(self, schedule: Schedule) -> None:
        violations = follow(world_of(schedule, rules_on=False), schedule.steps)
        assert any(name.startswith(schedule.violates) for name in violations), violations

    def test_nothing_is_violated_with_the_rule_on(self, schedule: Schedule) -> None:
        result = explore(world_of(schedule, rules_on=True))
        assert not result.violations, f"{schedule.name}: {result}"


def test_every_rule_is_shown_to_be_needed() -> None:
    shown = {rule for schedule in SCHEDULES for rule in schedule.off}
    # How deep the guard must be is the next test; to confirm every record would be needed without `late_slots`.
    assert shown == {field.name for field in fields(Rules)} - {"newest", "confirm_all"}


def test_a_step_that_nobody_can_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step 2 \('A', 'list', 7\)"):
        follow(world_of(SCHEDULES[0], rules_on=True), [("A", "list", 0), ("A", "list", 7)])


@pytest.mark.parametrize(("newest", "agree", "saves"), [(1, False, 3), (1, True, 4), (2, False, 5), (3, False, 7)])
def test_the_guard_must_be_deeper_than_a_listing_is_slow(newest: int, saves: int, *, agree: bool) -> None:
    """A scan during which as many records are made as the guard keeps proves nothing, even done twice.

    So the real guard of 64 bounds the saves that one process may make while another reads the folder once.
    """
    assert not explore(slow_listing(newest, saves - 1, agree=agree)).violations
    result = explore(slow_listing(newest, saves, agree=agree))
    assert any(name.startswith("I2 held") for name in result.violations), result


def test_a_record_must_name_as_many_claims_as_an_attempt_may_lag_behind() -> None:
    """One who is not in yet finds itself among the newest `fenced` claims; after that many others, it claims again.

    So the real 16 bounds how many attempts may come between a process and a child of its that begins to write.
    """
    assert not explore(shallow_fenced(2)).violations
    result = explore(shallow_fenced(1))
    assert any(name.startswith("I2 a fenced attempt claims again") for name in result.violations), result
