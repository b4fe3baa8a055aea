"""Dagster: steps in processes of their own and in one, re-executed runs, assets, Pipes, and the daemon's retries."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import EXAMPLES, TASKS, Engine, numbers

pytestmark = pytest.mark.timeout(120)

JOBS = TASKS / "dagster_jobs.py"


@pytest.fixture
def dagster(engine_of: Callable[[str], Engine], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    engine = engine_of("dagster")
    (tmp_path / "home").mkdir()
    settings = "telemetry: {enabled: false}\nrun_retries: {enabled: true, max_retries: 1}\n"
    (tmp_path / "home" / "dagster.yaml").write_text(settings)
    journal = tmp_path / "journal"
    environ = {"DAGSTER_HOME": str(tmp_path / "home"), "JOURNAL": str(journal)}

    def run(*arguments: str | Path) -> list[dict[str, Any]]:
        if arguments[0] == "daemon":
            engine.run("dagster", "run", "list", env=environ)  # makes the database, before two at once do
            engine.start("dagster-daemon", "run", "-f", JOBS, env=environ)
            engine.run("dagster", "job", "launch", "-f", JOBS, "-j", "dying", env=environ)
            end = time.monotonic() + 60
            while len(of("dies")) < 2 and time.monotonic() < end:
                time.sleep(0.2)
        else:
            engine.run("python", JOBS, *arguments, env=environ)
        return of()

    def of(*what: str) -> list[dict[str, Any]]:
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [one for line in lines if (one := json.loads(line))["what"] in what or not what]

    return run


def test_a_killed_step_goes_on_and_the_items_of_a_dynamic_output_never_mix(dagster):
    notes = dagster("processes")
    [run] = [note for note in notes if note["what"] == "run"]
    assert run["success"]
    assert run["retried"] == ["killed[a]", "killed[b]"]
    for item in ("a", "b"):
        tries = [note for note in notes if note["what"] == "count" and note["item"] == item]
        assert [(one["attempt"], one["resumes_from"], one["of"]) for one in tries] == [(0, 0, item), (1, 2, item)]
        assert {one["task"] for one in tries} == {f"killed[{item}]"}
        assert {one["run"] for one in tries} == {f"dagster/{run['run_id']}"}


def test_steps_in_one_process_one_after_the_other(dagster):
    notes = dagster("here")
    counts = [note for note in notes if note["what"] == "count"]
    tries = [(note["item"], note["of"], note["attempt"], note["resumes_from"]) for note in counts]
    assert sorted(tries) == [("a", "a", 0, 0), ("a", "a", 1, 2), ("b", "b", 0, 0), ("b", "b", 1, 2)]
    [run] = [note for note in notes if note["what"] == "run"]
    assert run["retried"] == ["raised[a]", "raised[b]"]
    # Its error ended the one that is stale, which has retries left, and is shown.
    assert list(run["errors"]) == ["stale"]
    assert "StaleAttemptError: Another Checkpoint object" in run["errors"]["stale"]
    assert [note["attempt"] for note in notes if note["what"] == "stale"] == [0]
    # A coroutine is a step like others; a thread and a child process belong to the step that started them.
    assert [note["task"] for note in notes if note["what"] == "within_loop"] == ["within_loop"]
    assert [note["task"] for note in notes if note["what"] == "thread"] == ["parent"]
    assert [(note["task"], note["state"]) for note in notes if note["what"] == "child"] == [("parent", {"step": 7})]


def test_a_run_again_begins_anew_unless_it_is_of_the_lineage_or_a_retry(dagster):
    notes = dagster("again")
    # The run, again by a person, and again with scope="lineage".
    assert [note["resumes_from"] for note in notes if note["what"] == "fails"] == [0, 0, 2]
    # The run, and its retry by Dagster. From the second retry on a person's run may stand in between.
    assert [note["resumes_from"] for note in notes if note["what"] == "dies"] == [0, 1]
    [unclear] = [note for note in notes if note["what"] == "unclear"]
    assert "perhaps a person began anew" in unclear["message"]
    assert "TASKCKPT_SCOPE=lineage" in unclear["hint"]


def test_a_run_that_the_daemon_retries_goes_on(dagster):
    first, second = [note for note in dagster("daemon") if note["what"] == "dies"]
    assert (first["resumes_from"], second["resumes_from"]) == (0, 1)
    assert first["run_id"] != second["run_id"]
    assert first["run"] == second["run"] == f"dagster/{first['run_id']}"
    assert (first["attempt"], second["attempt"]) == (0, 0), "Dagster counts from zero again"


def test_several_assets_are_one_step_and_the_resource_says_where(dagster, tmp_path):
    notes = dagster("assets", tmp_path / "elsewhere")
    tries = [note for note in notes if note["what"] == "several"]
    assert [(note["task"], note["attempt"], note["resumes_from"]) for note in tries] == [
        ("several", 0, 0),
        ("several", 1, 2),
    ]
    assert {note["base"] for note in tries} == {str(tmp_path / "elsewhere")}
    # What the deployment says goes before.
    assert (tmp_path / "base").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_pipes_tell_their_assets_and_otherwise_the_step_says_who_it_is(dagster):
    notes = dagster("pipes")
    assets, steps = [note for note in notes if note["what"] == "run"]
    assert assets["success"]
    tries = [note for note in notes if note["what"] == "piped"]
    assert [(note["task"], note["attempt"], note["resumes_from"]) for note in tries] == [
        ("piped/p%2F1", 0, 0),
        ("piped/p%2F1", 1, 2),
    ]
    assert {note["run"] for note in tries} == {f"dagster-pipes/{assets['run_id']}"}
    [unclear] = [note for note in notes if note["what"] == "unclear"]
    assert "does not tell the steps of a run apart" in unclear["unclear"]
    assert "env=taskckpt.ctx().environ()" in unclear["hint"]
    own = [note for note in notes if note["what"] == "own"]
    assert [(note["run"], note["task"], note["resumes_from"]) for note in own] == [
        (f"dagster/{steps['run_id']}", "starts_own", 0),
        (f"dagster/{steps['run_id']}", "starts_own", 2),
    ]


def test_the_example(engine_of):
    engine = engine_of("dagster")
    output = engine.run("python", EXAMPLES / "with_dagster.py", env={"DAGSTER_DISABLE_TELEMETRY": "1"})
    assert numbers(output, "resumes from") == [0, 3, 7]
    assert numbers(output, "counted to") == [10]
