"""Temporal: activities in its ActivityEnvironment, which runs them as a worker does. There is no server here."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

import pytest

from tests.engines.conftest import EXAMPLES, TASKS, Engine, numbers

SCRIPT = TASKS / "temporal_activities.py"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def temporal(engine_of: Callable[[str], Engine]) -> Engine:
    return engine_of("temporal")


def test_an_activity_that_fails_goes_on(temporal: Engine) -> None:
    output = temporal.run("python", SCRIPT, "retried")
    assert numbers(output, "resumes from") == [0, 3, 5]
    assert numbers(output, "attempt") == [0, 1, 2]
    assert "counted to 7" in output
    output = temporal.run("python", SCRIPT, "retried_async")
    assert numbers(output, "resumes from") == [0, 2]
    assert "counted to 4" in output


@pytest.mark.parametrize("attempt", [1, 2])  # Temporal counts a lost worker; an operator's reset begins again at 1
def test_a_worker_that_is_killed_and_a_second_run(temporal: Engine, attempt: int) -> None:
    first, again, other_run = (
        json.dumps({"activity_id": "1", "workflow_run_id": run, "attempt": number})
        for run, number in (("r1", 1), ("r1", attempt), ("r2", 1))
    )
    output = temporal.run("python", SCRIPT, "once", first, env={"HOW": "kill"}, code=-signal.SIGKILL)
    output += temporal.run("python", SCRIPT, "once", again, env={"HOW": "kill"})
    output += temporal.run("python", SCRIPT, "once", other_run, env={"HOW": "kill"}, code=-signal.SIGKILL)
    assert numbers(output, "resumes from") == [0, 2, 0]


def test_activities_side_by_side_never_mix(temporal: Engine) -> None:
    output = temporal.run("python", SCRIPT, "mapped")
    for number in (2, 4):
        (mine,) = {line for line in output.splitlines() if line.startswith(f"item-{number} attempt 1")}
        assert numbers(mine, "resumes from") == [number]


def test_who_an_activity_is(temporal: Engine) -> None:
    lines = temporal.run("python", SCRIPT, "identities").splitlines()
    assert [line.split()[1:] for line in lines[:4]] == [
        ["temporal/default/order%2F7/r1", "count/5", "2"],
        ["temporal/default/order%2F7/r2", "count/5", "0"],
        ["temporal/default//mine/a1", "count/mine", "0"],
        ["temporal/default//mine/a2", "count/mine", "0"],
    ]
    assert lines[4] == "outside None"
    lines = temporal.run("python", SCRIPT, "identities", env={"TASKCKPT_SCOPE": "lineage"}).splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["temporal/default/order%2F7"] * 2 + [
        "temporal/default//mine"
    ] * 2


def test_threads_of_an_activity(temporal: Engine) -> None:
    output = temporal.run("python", SCRIPT, "threads")
    assert output.count("plain thread is told that it is ambiguous") == 2
    assert output.count("handed thread sees the same True") == 2
    assert "let go of [True, True]" in output


def test_an_attempt_that_was_overtaken_is_not_retried(temporal: Engine) -> None:
    output = temporal.run("python", SCRIPT, "stale")
    assert "failure True StaleAttemptError Another Checkpoint object" in output
    assert "in the workflow ApplicationError True True" in output
    assert "pickled True True True" in output


def test_the_example(temporal: Engine) -> None:
    output = temporal.run("python", EXAMPLES / "with_temporal.py")
    assert numbers(output, "resumes from") == [0, 3, 7]
    assert "counted to 10" in output
    assert os.listdir(temporal.folder / "base")
