"""Flyte v1: the entry points of its pods, which are all of Flyte that runs there; and a local run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import TASKS, Engine

POD = TASKS / "flytekit_pod.py"

EngineOf = Callable[[str], Engine]
KILLED = -9


def said(output: str, about: str) -> list[list[Any]]:
    lines = [json.loads(line[2:]) for line in output.splitlines() if line.startswith("> ")]
    return [line[1:] for line in lines if line[0] == about]


class Cluster:
    """Starts pods as flytepropeller does, with its layout of paths."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.execution = "f1a2"

    @property
    def folder(self) -> Path:
        return self.engine.folder / "metadata/propeller" / f"proj-dev-{self.execution}"

    def pod(
        self, node: str, attempt: int = 0, *, die: str = "", task: str = "count", items: Path | None = None,
        index: int = 0, prev: str = '""', code: int = 0, **env: str,
    ) -> str:  # fmt: skip
        """A pod of the node whose outputs go to ``node`` and what comes below."""
        outputs = self.folder / node
        outputs.mkdir(parents=True, exist_ok=True)
        inputs = items or outputs / "inputs.pb"
        if items is None:
            inputs.touch()
        variables = {
            "FLYTE_INTERNAL_EXECUTION_ID": self.execution,
            "FLYTE_INTERNAL_EXECUTION_PROJECT": "proj",
            "FLYTE_INTERNAL_EXECUTION_DOMAIN": "dev",
            "FLYTE_INTERNAL_TASK_NAME": f"flytekit_pod.{task}",
            "FLYTE_ATTEMPT_NUMBER": str(attempt),
            "BATCH_JOB_ARRAY_INDEX_VAR_NAME": "FLYTE_K8S_ARRAY_INDEX",
            "FLYTE_K8S_ARRAY_INDEX": str(index),
            "TASKCKPT_BASE": "",
            "DIE": die,
            **env,
        }
        if items is None:
            del variables["BATCH_JOB_ARRAY_INDEX_VAR_NAME"]
        name = "pyflyte-execute" if items is None else "pyflyte-map-execute"
        of_map = (
            ()
            if items is None
            else ("flytekit.core.array_node_map_task.ArrayNodeMapTaskResolver", "vars", "", "resolver")
        )
        raw = str(self.engine.folder / "ab" / f"{self.execution}-{attempt}")
        return self.engine.run(
            name, "--inputs", inputs, "--output-prefix", outputs, "--raw-output-data-prefix", raw,
            "--checkpoint-path", f"{raw}/_flytecheckpoints", "--prev-checkpoint", prev,
            "--resolver", *of_map, "flytekit.core.python_auto_container.default_task_resolver",
            "task-module", "flytekit_pod", "task-name", task,
            env=variables, code=code,
        )  # fmt: skip

    def begins(self, node: str, attempt: int, **more: Any) -> int:
        return int(said(self.pod(node, attempt, **more), "from")[0][0])

    def errors(self, *nodes: str) -> list[list[Any]]:
        """What the backend is told of them."""
        return said(
            self.engine.run("python", POD, "errors", *(self.folder / node / "error.pb" for node in nodes)), "error"
        )


@pytest.fixture
def cluster(engine_of: EngineOf) -> Cluster:
    return Cluster(engine_of("flytekit"))


@pytest.mark.timeout(120)
def test_pods(cluster: Cluster) -> None:
    output = cluster.pod("n0/data/0", 0, die="killed 2", code=KILLED)
    assert said(output, "from") == [[0, 0, "flytekit/proj/dev/f1a2", "n0", 0, str(cluster.folder)]]
    assert cluster.begins("n0/data/1", 1, die="fails 3") == 2
    assert cluster.begins("n0/data/3", 3, die="overtaken 4") == 3  # attempt 2 never ran
    assert said(cluster.pod("n1/data/0", 0, task="with_helpers"), "helpers") == [[["n1"], "n1"]]
    [fails, overtaken] = cluster.errors("n0/data/1", "n0/data/3")
    assert fails[0] == "RECOVERABLE"
    assert overtaken[0] == "NON_RECOVERABLE"
    assert "took the task over" in overtaken[1]


@pytest.mark.timeout(120)
def test_items_of_a_map_task(cluster: Cluster) -> None:
    items = cluster.engine.folder / "inputs.pb"
    cluster.engine.run("python", POD, "inputs", items, "7", "7")
    for index in range(2):
        output = cluster.pod(
            f"n0/data/0/{index}/0", 0, items=items, index=index, die=f"killed {index + 1}", code=KILLED
        )
        assert said(output, "from")[0][:2] == [0, 7]
    for index in range(2):  # of the second one, because the whole node was begun again
        node = f"n0/data/1/{index}/0" if index else f"n0/data/0/{index}/1"
        [[done, _, _, task, *_]] = said(cluster.pod(node, 1, items=items, index=index), "from")
        assert (done, task) == (index + 1, f"n0/{index}")


FOLDER = "s3://bucket/metadata/propeller/proj-dev-f1a2"
OLDER_MAP = {"BATCH_JOB_ARRAY_INDEX_VAR_NAME": "AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_INDEX": "3"}


@pytest.mark.timeout(60)
def test_identities(engine_of: EngineOf) -> None:
    """The paths are those of flytepropeller 1.16.8."""
    pods: list[tuple[str, str, dict[str, str], str, str | None]] = [
        # outputs, previous checkpoint, more variables: task, why it is ambiguous
        (f"{FOLDER}/n0/data/0", "", {}, "n0", None),
        (f"{FOLDER}/n0/data/12", "s3://bucket/previous", {"FLYTE_ATTEMPT_NUMBER": "12"}, "n0", None),
        (f"{FOLDER}/n0-0-dn2/data/0", "", {}, "n0-0-dn2", None),
        (f"{FOLDER}/n0/data/0/5/1", "", {}, "n0/5", None),
        # Map tasks of before there were array nodes have one folder for all items.
        (f"{FOLDER}/n0/data/1", "", OLDER_MAP, "n0/3", None),
        (f"{FOLDER}/n0/data/1", "", {**OLDER_MAP, "BATCH_JOB_ARRAY_INDEX_OFFSET": "10"}, "n0/13", None),
        (f"{FOLDER}/n0/data/0", "s3://bucket/previous", {}, "n0", "recovers another one"),
        (f"{FOLDER}/n0-1-dn2/data/0", "", {}, "n0-1-dn2", "dynamic task"),
        (f"{FOLDER}/n0", "", {}, "n0", "which part of that is the attempt"),
        ("", "", {}, "unknown", "which node of a workflow"),  # as in a worker of an elastic task
    ]
    variables = {
        "FLYTE_INTERNAL_EXECUTION_ID": "f1a2",
        "FLYTE_INTERNAL_EXECUTION_PROJECT": "proj",
        "FLYTE_INTERNAL_EXECUTION_DOMAIN": "dev",
        "FLYTE_ATTEMPT_NUMBER": "0",
    }
    flytekit = engine_of("flytekit")
    told = flytekit.folder / "pods.json"
    told.write_text(json.dumps([(outputs, previous, variables | more) for outputs, previous, more, *_ in pods]))
    output = flytekit.run("sh", "-c", f"python {POD} contexts < {told}")
    for (outputs, *_, task, why), context in zip(pods, said(output, "context"), strict=True):
        assert context[:3] == ["flytekit/proj/dev/f1a2", task, FOLDER if outputs else None]
        assert why in context[3] if why else context[3] is None


@pytest.mark.timeout(60)
def test_a_local_run_needs_a_key(engine_of: EngineOf) -> None:
    output = engine_of("flytekit").run("python", POD, "local")
    assert said(output, "outside") == [[None]]
    [[message]] = said(output, "ambiguous")
    assert "which node of a workflow" in message
    assert "taskckpt.checkpoint('name')" in message
    assert said(output, "key") == [["None"]]
