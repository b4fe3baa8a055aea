"""When to save: steps that jump, repeat and go back; and an hour of budgets on a clock that the test winds."""

from __future__ import annotations

import pickle
import threading
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskckpt._when import (
    FIRST_SAVE_S,
    Budget,
    EverySeconds,
    EverySteps,
    SavePolicy,
    Schedule,
    optimum_interval_s,
    save_policy_of,
    schedule_of,
)
from taskckpt.errors import UsageError, UsageTypeError


@dataclass
class Clock:
    now: float = 1e6

    def __call__(self) -> float:
        return self.now


def scheduled(policy: SavePolicy) -> tuple[Schedule, Clock]:
    clock = Clock()
    return Schedule(policy, clock=clock), clock


def asked(schedule: Schedule, *steps: int, saves: bool = True) -> list[int]:
    """The steps at which a save is due, each of which is then saved."""
    due = []
    for step in steps:
        if schedule.should_save(step):
            due.append(step)
            if saves:
                schedule.saved(1.0, step)
    return due


# --- by steps ----------------------------------------------------------------------------------


def test_each_multiple_is_due():
    schedule, _ = scheduled(EverySteps(100))
    assert asked(schedule, *range(350)) == [0, 100, 200, 300]
    schedule, _ = scheduled(EverySteps(100))
    assert asked(schedule, *range(1, 350)) == [100, 200, 300]
    schedule, _ = scheduled(EverySteps(1))
    assert asked(schedule, *range(5)) == [0, 1, 2, 3, 4]


def test_steps_that_jump_over_a_multiple():
    schedule, _ = scheduled(EverySteps(100))
    assert asked(schedule, 8, 53, 98, 103, 148, 199, 202, 550, 599) == [103, 202, 550]


def test_the_answer_does_not_depend_on_whether_it_is_followed():
    """Ranks that only ask, and the one that saves, agree."""
    one, _ = scheduled(EverySteps(100))
    other, _ = scheduled(EverySteps(100))
    steps = range(7, 1000, 13)
    assert asked(one, *steps) == asked(other, *steps, saves=False)


def test_asked_twice_at_one_step():
    schedule, _ = scheduled(EverySteps(100))
    assert schedule.should_save(100)
    assert schedule.should_save(100)
    schedule.saved(1.0, 100)
    assert not schedule.should_save(100)
    assert not schedule.should_save(101)


def test_a_save_without_a_step_is_one_of_the_step_asked_about():
    schedule, _ = scheduled(EverySteps(100))
    assert schedule.should_save(100)
    schedule.saved(1.0, None)
    assert not schedule.should_save(100)
    assert asked(schedule, 101, 200) == [200]


def test_a_resume_begins_with_the_step_that_is_saved():
    schedule, _ = scheduled(EverySteps(100))
    schedule.resumed(300)
    assert asked(schedule, *range(300, 450)) == [400]
    schedule, _ = scheduled(EverySteps(100))
    schedule.resumed(298)  # saved at a signal
    assert asked(schedule, 303, 304) == [303]
    schedule, _ = scheduled(EverySteps(100))
    schedule.resumed(None)
    assert asked(schedule, 303, 400) == [400]


def test_steps_that_come_again_after_a_rollback_are_due_again():
    schedule, _ = scheduled(EverySteps(100))
    assert asked(schedule, 100, 200, 300, 350) == [100, 200, 300]
    schedule.resumed(200)
    assert asked(schedule, 200, 201, 299, 300) == [300]
    assert asked(schedule, 350, 200, 299, 100) == [200, 100]  # gone back without a word


def test_a_save_for_another_reason_changes_no_multiple():
    schedule, _ = scheduled(EverySteps(100))
    assert asked(schedule, 98) == []
    schedule.saved(1.0, 98)
    assert asked(schedule, 99, 100, 101) == [100]


@pytest.mark.parametrize("step", [-1, True, 1.0, "1", None])
def test_a_step_is_a_whole_number(step):
    schedule, _ = scheduled(EverySteps(100))
    with pytest.raises(UsageError, match=r"step=.* must be a whole number of at least 0\."):
        schedule.should_save(step)


@given(st.integers(1, 50), st.lists(st.integers(0, 60), max_size=30), st.integers(0, 100))
def test_a_save_is_due_once_for_each_stretch_that_holds_a_multiple(n, jumps, first):
    schedule, _ = scheduled(EverySteps(n))
    steps = [first]
    for jump in jumps:
        steps.append(steps[-1] + jump)
    expected = [first] if first % n == 0 else []
    for before, step in pairwise(steps):
        expected += [step] if any(between % n == 0 for between in range(before + 1, step + 1)) else []
    assert asked(schedule, *steps) == expected


# --- by time -----------------------------------------------------------------------------------


def test_each_minute():
    schedule, clock = scheduled(EverySeconds(60))
    due = []
    for step in range(30):
        if schedule.should_save(step):
            due.append(clock.now - 1e6)
            clock.now += 5
            schedule.saved(5.0, step)
        clock.now += 10
    assert due == [60, 125, 190, 255]  # 60 s of work in between, and 5 s for each save


def test_what_is_due_by_time_stays_due_until_something_is_saved():
    schedule, clock = scheduled(EverySeconds(60))
    clock.now += 59.9
    assert asked(schedule, 1, saves=False) == []
    clock.now += 0.2
    assert asked(schedule, 2, 2, 3, saves=False) == [2, 2, 3]
    schedule.saved(1.0, None)  # for another reason
    assert asked(schedule, 3, 4) == []


def test_policies_combine():
    schedule, clock = scheduled(EverySteps(100) | EverySeconds(60))
    assert asked(schedule, 1, 100, 101) == [100]
    clock.now += 61
    assert asked(schedule, 102, 103, 200, 201) == [102, 200]


# --- by share ----------------------------------------------------------------------------------


@dataclass
class Save:
    at_s: float  # when it ended
    cost_s: float
    spent_s: float  # on it and all before it


def simulated(policy: SavePolicy, costs, *, step_s=0.25, hours=1.0) -> list[Save]:
    """A task whose steps take ``step_s``, and whose save at a time costs ``costs(time)``."""
    schedule, clock = scheduled(policy)
    saves: list[Save] = []
    step, spent = 0, 0.0
    while clock.now - 1e6 < hours * 3600:
        clock.now += step_s
        step += 1
        if schedule.should_save(step):
            cost = costs(clock.now - 1e6)
            clock.now += cost
            spent += cost
            schedule.saved(cost, step)
            saves.append(Save(clock.now - 1e6, cost, spent))
    return saves


@given(
    share=st.sampled_from([0.005, 0.02, 0.1, 0.5]),
    cost=st.floats(0.01, 5),
    factor=st.sampled_from([0.1, 1, 10]),
    step_s=st.sampled_from([0.1, 1, 7]),
)
def test_the_share_is_held_over_an_hour(share, cost, factor, step_s):
    saves = simulated(Budget(share), lambda at_s: cost * (factor if at_s > 1800 else 1), step_s=step_s)
    first_s = saves[0].at_s - saves[0].cost_s
    assert first_s <= FIRST_SAVE_S + step_s + 1e-6, "early enough to measure"
    dearest = 0.0
    for save in saves[1:]:
        if save.cost_s <= max(dearest, saves[0].cost_s) * (
            1 + 1e-9
        ):  # after each, but for one that nobody could foresee
            assert save.spent_s <= share * save.at_s * (1 + 1e-9)
        dearest = max(dearest, save.cost_s)


@pytest.mark.parametrize("factor", [1, 10, 0.1])
def test_the_share_is_used_up(factor):
    saves = simulated(Budget("2%"), lambda at_s: 0.5 * (factor if at_s > 1800 else 1))
    assert 0.018 * 3600 <= saves[-1].spent_s <= 0.02 * 3600
    assert len(saves) == pytest.approx({1: 144, 10: 72 + 7, 0.1: 72 + 720}[factor], rel=0.05)


def test_the_interval_is_what_the_share_says():
    saves = simulated(Budget(0.02), lambda _: 2.0, step_s=0.01)
    between = [later.at_s - later.cost_s - earlier.at_s for earlier, later in pairwise(saves[1:])]
    assert len(between) > 30
    assert between == pytest.approx([2.0 * 0.98 / 0.02] * len(between), abs=0.02)


def test_the_first_save_is_early_and_not_at_once():
    schedule, clock = scheduled(Budget("1%", mtbf_s=1e6))
    assert asked(schedule, 0) == []
    clock.now += 9.9
    assert asked(schedule, 1) == []
    clock.now += 0.2
    assert asked(schedule, 2) == [2]


@pytest.mark.parametrize("mtbf_s", [None, 5])
def test_time_without_questions_is_no_reason_for_many_saves_at_once(mtbf_s):
    schedule, clock = scheduled(Budget("10%", mtbf_s=mtbf_s))
    clock.now += 10_000
    assert asked(schedule, 1, 2, 3) == [1]
    clock.now += 8.9
    assert asked(schedule, 4) == []
    clock.now += 0.2
    assert asked(schedule, 5, 6) == [5]


def test_one_cheap_save_is_no_reason_to_save_twice_as_often():
    schedule, clock = scheduled(Budget("10%"))
    clock.now += 10_000
    assert schedule.should_save(1)
    schedule.saved(8.0, 1)
    schedule.saved(0.0, 1)  # 4 s are expected
    clock.now += 35
    assert not schedule.should_save(2)
    clock.now += 2
    assert schedule.should_save(2)


def test_saves_that_cost_nothing_are_always_due():
    schedule, clock = scheduled(Budget("2%"))
    clock.now += 11
    schedule.saved(0.0, 1)
    assert schedule.should_save(2)


# Daly (2006), the captions of figures 3 to 5: what his model gives, for a save of 5 minutes.
@pytest.mark.parametrize(("mtbf_min", "optimum_min", "digits"), [(24 * 60, 117, 0), (6 * 60, 57, 0), (15, 9.1, 1)])
def test_the_optimum_interval_is_the_published_one(mtbf_min, optimum_min, digits):
    assert round(optimum_interval_s(300, mtbf_min * 60) / 60, digits) == optimum_min


def test_the_optimum_interval_where_little_fails_or_all_does():
    assert optimum_interval_s(1, 1e8) == pytest.approx((2 * 1e8) ** 0.5, rel=1e-3)  # Young's
    assert optimum_interval_s(100, 50) == 50
    assert optimum_interval_s(100, 50.001) == pytest.approx(44.4, abs=0.1)  # the formula's end, as published
    assert optimum_interval_s(0.0, 100) == 0


def test_failures_that_are_rare_space_the_saves_further_apart():
    day_s = 86_400.0
    saves = simulated(Budget("10%", mtbf_s=day_s), lambda _: 2.0, step_s=1, hours=2)
    between = [later.at_s - later.cost_s - earlier.at_s for earlier, later in pairwise(saves)]
    assert between == pytest.approx([optimum_interval_s(2.0, day_s)] * len(between), abs=1)
    assert 580 < between[0] < 600


def test_failures_that_are_frequent_do_not_break_the_share():
    often = simulated(Budget("1%", mtbf_s=60), lambda _: 2.0)
    assert often == simulated(Budget("1%"), lambda _: 2.0)


# --- what is taken -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        (100, EverySteps(100)),
        ("100", EverySteps(100)),
        ("60s", EverySeconds(60)),
        (" 0.5 s ", EverySeconds(0.5)),
        ("5m", EverySeconds(300)),
        ("1.5h", EverySeconds(5400)),
        ("2%", Budget(0.02)),
        ("0.5 %", Budget("0.5%")),
        ("100|5m | 2%", EverySteps(100) | EverySeconds(300) | Budget("2%")),
    ],
)
def test_shorthands(given, policy):
    assert save_policy_of(given) == policy
    schedule = schedule_of(given)
    assert schedule is not None
    assert schedule.policy == policy


def test_no_policy_is_no_schedule():
    assert save_policy_of(None) is None
    assert schedule_of(None) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "|", "100|", "steps", "100 steps", "-1", "+1", "1e3", "1.5", "٣", "9" * 5000, "60 sec", "5min"),
        *("60S", "1d", "%", "2 percent", "1h30m", ".5s", "nan", "infs", "1_000"),
    ],
)
def test_a_text_that_is_no_policy_lists_the_forms(text):
    with pytest.raises(UsageError, match=r"does not say when to save\..*'60s', '5m', '1h' .*'2%'"):
        save_policy_of(text)


@pytest.mark.parametrize("given", ["0", "0s", "0.0m", "0%", "100%", "250%", 0, -5])
def test_a_policy_out_of_range_is_refused(given):
    with pytest.raises(UsageError, match="takes a"):
        save_policy_of(given)


@pytest.mark.parametrize("given", [True, 2.5, b"100", [100], EverySteps])
def test_other_things_are_no_policies(given):
    with pytest.raises(UsageTypeError, match="does not say when to save"):
        save_policy_of(given)


@pytest.mark.parametrize("n", [0, -1, True, 1.0, "1", None])
def test_a_number_of_steps(n):
    with pytest.raises(UsageError, match="at least 1, not"):
        EverySteps(n)


@pytest.mark.parametrize("seconds", [0, -1.0, True, float("nan"), float("inf"), 10**400, "60s", None])
def test_a_number_of_seconds(seconds):
    with pytest.raises(UsageError, match="number of seconds above 0, not"):
        EverySeconds(seconds)
    if seconds is not None:
        with pytest.raises(UsageError, match="mtbf_s is a number of seconds above 0, not"):
            Budget("2%", mtbf_s=seconds)


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1, True, float("nan"), "2", "0%", "100%", "two%", None])
def test_a_share(share):
    with pytest.raises(UsageError, match=r"above 0 and below 1, or a text such as '2%', not"):
        Budget(share)


def test_policies_are_values():
    policy = EverySteps(100) | EverySeconds(60) | Budget("2%", mtbf_s=3600)
    assert repr(policy) == "EverySteps(n=100) | EverySeconds(seconds=60) | Budget(share=0.02, mtbf_s=3600)"
    assert policy == Budget(0.02, mtbf_s=3600) | EverySteps(100) | EverySeconds(60)
    assert hash(policy) == hash(EverySeconds(60) | EverySteps(100) | Budget(0.02, mtbf_s=3600))
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert EverySteps(5) | EverySteps(5) == EverySteps(5)
    assert Budget("2%") != Budget("2%", mtbf_s=3600)
    with pytest.raises(TypeError):
        EverySteps(5) | 60  # type: ignore[operator]


def test_threads_share_a_schedule():
    schedule, clock = scheduled(Budget("50%"))
    clock.now += 1000

    def work() -> None:
        for step in range(500):
            schedule.should_save(step)
            schedule.saved(0.5, step)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.now += 1000.5 - 0.5 * 2  # all 2000 saves cost 1000 s: half of the time, as soon as 2000.5 s are over
    assert not schedule.should_save(1)
    clock.now += 1
    assert schedule.should_save(1)
