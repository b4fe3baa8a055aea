"""Airflow: its scheduler, its API server and its workers really run tasks that are killed, mapped and cleared."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.engines.conftest import EXAMPLES, TASKS, numbers

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("version", ["airflow", "airflow2"])
def test_the_scheduler_its_workers_and_an_operator_who_clears(version, engine_of, tmp_path):
    journal = tmp_path / "journal"
    journal.touch()
    engine_of(version).run("python", TASKS / "airflow_scheduled.py", env={"JOURNAL": str(journal)})
    notes: list[dict[str, Any]] = [json.loads(line) for line in journal.read_text().splitlines()]

    def of(what, run_id="one"):
        return [note for note in notes if note["what"] == what and note.get("run_id", run_id) == run_id]

    # Item 0 fails, the process of item 1 is killed, both at once; a second run begins afresh.
    for run_id in ("one", "two"):
        for item in (0, 1):
            tries = [note for note in of("count", run_id) if note["item"] == item]
            said = [(note["attempt"], note["resumes_from"], note["of"], note["task"]) for note in tries]
            assert said == [(0, 0, item, f"mapped/{item}"), (1, 2, item, f"mapped/{item}")]
            assert {note["run"] for note in tries} == {f"airflow/resuming/{run_id}"}
            assert {note["generation"] for note in tries} == {"2"}, "a retry is no clear"
        # It has retries left, and its error ended it.
        assert [note["attempt"] for note in of("stale", run_id)] == [0]

    # A worker runs each try in a process of its own; who only looks at the environment of that finds the task, too.
    assert {note["execution"] for note in notes if "execution" in note} == {"PROCESS"}
    [parent], [child] = of("parent"), of("child")
    assert (child["task"], child["state"]) == (parent["task"], {"step": 7})

    # A clear: the next try, the same task, another generation; of the others nothing changes.
    # With on_clear="fresh" it means to start over.
    for task, at in (("cleared_after", 2), ("cleared_within", 4), ("cleared_anew", 0)):
        tries = of(task)
        assert [(note["attempt"], note["resumes_from"]) for note in tries] == [(0, 0), (1, at)]
        # What Airflow 2 clears while it runs it cannot tell from a retry.
        shown = ["0", "0"] if (version, task) == ("airflow2", "cleared_within") else ["0", "1"]
        assert [note["generation"] for note in tries] == shown
    assert [note["generation"] for note in of("other")] == ["0"]

    # A command sees its environment only: it says what to pass, and then mapped tasks do not mix.
    unclear = [note for note in of("shell") if "unclear" in note]
    assert [note["item"] for note in sorted(unclear, key=lambda note: note["item"])] == [0, 1]
    assert all("{{ ti.map_index }}" in note["hint"] for note in unclear)
    for item in (0, 1):
        tries = [note for note in of("shell") if note["item"] == item and "unclear" not in note]
        assert [(note["attempt"], note["resumes_from"], note["of"]) for note in tries] == [(0, 0, item), (1, 2, item)]


def test_the_example_in_one_process(engine_of, tmp_path):
    engine = engine_of("airflow")
    environ = {
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(EXAMPLES),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }
    engine.run("airflow", "db", "migrate", env=environ)
    output = engine.run("python", EXAMPLES / "with_airflow.py", env=environ)
    assert numbers(output, "resumes from") == [0, 3, 7]
    assert numbers(output, "counted to") == [10]


def test_tasks_of_one_process_in_turn(engine_of, tmp_path):
    """``dag.test()`` runs all of them in its own: none may hand its name to the children of the next."""
    journal = tmp_path / "journal"
    journal.touch()
    environ = {
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(TASKS / "airflow_dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "JOURNAL": str(journal),
    }
    engine = engine_of("airflow")
    engine.run("airflow", "db", "migrate", env=environ)
    engine.run("python", TASKS / "airflow_in_turn.py", env=environ)
    notes = [json.loads(line) for line in journal.read_text().splitlines()]
    tries = [(note["task"], note["attempt"], note["resumes_from"]) for note in notes if note["what"] == "first"]
    assert tries == [("first", 0, 0), ("first", 1, 2)]
    assert "PROCESS" not in {note["execution"] for note in notes if "execution" in note}
    [after] = [note for note in notes if note["what"] == "after"]
    assert after["handed_down"] == []
    [outside] = [note for note in notes if note["what"] == "outside"]
    assert outside["found"] is None
