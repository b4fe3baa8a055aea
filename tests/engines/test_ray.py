"""Ray: tasks and actors that fail or are killed, two clusters, and Ray Train."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import EXAMPLES, TASKS, numbers

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def quiet() -> Iterator[dict[str, str]]:
    """Nothing is sent anywhere, each line is printed, and Ray Train starts less and looks at its workers more often."""
    # Not in tmp_path: the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield {
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        }


def told(journal: Path, what: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, journal.read_text().splitlines()) if line["what"] == what]


def began(journal: Path, what: str) -> list[list[int]]:
    """From where each task began, execution by execution: one list for each task."""
    tasks: dict[Any, list[int]] = defaultdict(list)
    for line in told(journal, what):
        tasks[line.get("name")].append(line["began"])
    return sorted(tasks.values())


def values(journal: Path, what: str, name: str) -> list[Any]:
    return [line[name] for line in told(journal, what)]


def test_tasks_and_actors(quiet, engine_of, tmp_path):
    journal = tmp_path / "journal"
    output = engine_of("ray").run("python", TASKS / "ray_tasks.py", env={**quiet, "JOURNAL": str(journal)})

    # Equal calls at once, each with its own state; the first task of a second cluster has the same id.
    for what, tasks in {"exception": 2, "kill": 2, "inside": 1}.items():
        assert began(journal, what) == [[0, 2]] * tasks, what
        assert sorted(values(journal, what, "attempt")) == [0] * tasks + [1] * tasks
    assert "names 4" in output
    assert values(journal, "exception", "run")[0].startswith("ray/session_")
    assert "kept b'driver 9'" in output, "workers inherit the driver's environment, and are no part of its task"
    assert all(" <in> driver() @ " in task for task in values(journal, "inside", "task"))

    assert "thread sees nothing of" in output
    assert len(set(values(journal, "child", "task"))) == 2, "what a retry submits is new to Ray"

    # An actor that is killed goes on, and so does each of its calls; calls of one actor never mix.
    assert "actor counts [1, 2, 3, 4]" in output
    assert values(journal, "actor begins", "number")[:2] == [0, 2]
    assert values(journal, "actor begins", "attempt")[:2] == [0, 1]
    assert [starts[:2] for starts in began(journal, "call")] == [[0, 2]] * 4
    assert {start for starts in began(journal, "call") for start in starts[2:]} <= {4}, "done, and the answer was lost"
    pair, other = json.loads(output.split("async ")[1].splitlines()[0].replace("'", '"'))
    assert pair[0] == pair[1] != other[0] == other[1]

    # Ray retries what it was told to retry, and every error if it was told so.
    assert began(journal, "stale, listed") == [[0]]
    assert began(journal, "stale, any") == [[0, 2, 4]]
    assert output.count("ends with RayTaskError(StaleAttemptError)") == 2


def test_train(quiet, engine_of, tmp_path):
    journal, storage = tmp_path / "journal", tmp_path / "storage"
    env = {**quiet, "JOURNAL": str(journal), "TASKCKPT_BASE": ""}
    engine_of("ray").run("python", TASKS / "ray_training.py", storage, env=env)

    assert values(journal, "first", "began") == [0, 0]
    assert values(journal, "again", "began") == [2, 2], "the same experiment goes on, as in Ray Train"
    for what in ("first", "again"):
        assert sorted(values(journal, what, "rank")) == [0, 1]
        assert values(journal, what, "world_size") == [2, 2]
        assert set(values(journal, what, "base")) == {str(storage / "counting")}
        assert set(values(journal, what, "thread") + values(journal, what, "child")) == {"train"}
        assert values(journal, what, "attempt") == [None, None]
    assert len(set(values(journal, "first", "run") + values(journal, "again", "run"))) == 1
    assert not told(journal, "rank 1 saved")
    assert len(told(journal, "key")) == 4
    assert "this run's only" in told(journal, "key")[0]["error"]


def test_example(quiet, engine_of):
    output = engine_of("ray").run("python", EXAMPLES / "with_ray.py", env=quiet)

    assert numbers(output, "resumes from") == [0, 2]
    assert "counted to 5" in output


def test_example_of_train(quiet, engine_of):
    output = engine_of("ray").run("python", EXAMPLES / "with_ray_train.py", env={**quiet, "TASKCKPT_BASE": ""})

    # Ray Train prints what a rank prints, and logs it.
    assert set(numbers(output, "rank 0 of 2 resumes from")) == {0, 2}
    assert set(numbers(output, "rank 1 of 2 resumes from")) == {0, 2}
