"""Dask: retries, lost workers, mapped items, actors, coroutines, and one task making room for another."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import EXAMPLES, TASKS, numbers

pytestmark = pytest.mark.timeout(120)


def began(journal: Path, what: str) -> list[list[int]]:
    """From where each task began, execution by execution: one list for each task."""
    tasks: dict[Any, list[int]] = defaultdict(list)
    for line in told(journal, what):
        tasks[line.get("name")].append(line["began"])
    return sorted(tasks.values())


def told(journal: Path, what: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, journal.read_text().splitlines()) if line["what"] == what]


def test_tasks(engine_of, tmp_path):
    journal = tmp_path / "journal"
    output = engine_of("dask").run("python", TASKS / "dask_tasks.py", env={"JOURNAL": str(journal)})

    # After an exception and after the death of its worker; a finished task whose result died runs once more.
    for what, tasks in {"typed": 2, "killed": 1, "mapped": 8, "second cluster": 1}.items():
        assert [starts[:2] for starts in began(journal, what)] == [[0, 2]] * tasks, what
        assert {start for starts in began(journal, what) for start in starts[2:]} <= {4}, what
    assert "names 3" in output
    assert "mapped 8" in output
    assert {line["task"] for line in told(journal, "typed")} == {"1", "int/1"}
    assert {line["attempt"] for line in told(journal, "typed")} == {None}

    # One task for Dask, and two.
    assert "equal items 1" in output
    assert "impure 2" in output

    # A lost state is no restart from zero, and a client that begins again gets a task of its own.
    assert began(journal, "stale, 0 retries") == [[0]]
    assert began(journal, "stale, 2 retries") == [[0, 2, 4]]
    assert "stale, 2 retries: StaleAttemptError" in output
    assert began(journal, "submitted again") == [[0, 0, 0]]
    assert began(journal, "submitted again in a span") == [[0, 1, 2]]
    assert began(journal, "retried by the client") == [[0, 1, 2]]
    runs = [line["run"] for line in told(journal, "killed") + told(journal, "second cluster")]
    assert len(set(runs)) == 2, "the same key in another cluster is another task"

    assert began(journal, "coroutine") == [[0, 2]]
    assert "coroutine loud: Get the checkpoint in the task itself" in output
    assert "thread sees AmbiguousIdentityError" in output
    assert "child sees taskckpt.errors.AmbiguousIdentityError" in output
    assert "actor is loud" in output

    assert began(journal, "in a process") == [[0, 2]]
    assert began(journal, "called") == [[0, 2]], "begun in a copy of another task's context, and retried elsewhere"
    assert "kept b'outer 9'" in output


def test_example(engine_of):
    output = engine_of("dask").run("python", EXAMPLES / "with_dask.py")

    assert numbers(output, "resumes from") == [0, 2]
    assert "counted to 5" in output
