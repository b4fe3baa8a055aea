"""Flyte v2: local runs, and the entry point of its pods, which is all of Flyte that runs there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import EXAMPLES, TASKS, Engine, numbers

LOCAL = TASKS / "flyte_local.py"
POD = TASKS / "flyte_pod.py"

EngineOf = Callable[[str], Engine]
KILLED = -9


def said(output: str, about: str) -> list[list[Any]]:
    lines = [json.loads(line[2:]) for line in output.splitlines() if line.startswith("> ")]
    return [line[1:] for line in lines if line[0] == about]


@pytest.mark.timeout(120)
def test_local_runs(engine_of: EngineOf) -> None:
    first, second, rest = engine_of("flyte").run("python", LOCAL, "all").split('> ["end of run"]')

    assert rest.strip() == ""
    for run in (first, second):  # the second one starts afresh
        for how in ("side by side", "one by one"):
            attempts = said(run, how)
            assert len(attempts) == 6
            assert [mine for mine, loaded, _ in attempts if loaded is None] == sorted({mine for mine, *_ in attempts})
            assert all(loaded in (None, mine) for mine, loaded, _ in attempts)
            assert {number for *_, number in attempts} == {None}  # Flyte says 0 for ever
        assert said(run, "trace") == [[True, False]]
        [[task, threads, child]] = said(run, "helpers")
        # Other tasks may run in the process of a local run, which a thread could belong to as well.
        assert threads == ["AmbiguousIdentityError", task]
        assert child == task
        assert said(run, "overtaken") == [[]]
        [[code, message]] = said(run, "ended")
        assert code == "stale-attempt"
        assert "took the task over" in message


@pytest.mark.timeout(120)
def test_a_local_run_that_is_killed_goes_on_under_its_name_only(engine_of: EngineOf) -> None:
    flyte = engine_of("flyte")
    base = {"TASKCKPT_BASE": ""}  # nor is what Flyte has below /tmp used

    def done_before(*name: str, code: int) -> int:
        [[done, where, _]] = said(flyte.run("python", LOCAL, "dying", *name, env=base, code=code), "dying")
        assert where == str(flyte.folder / ".taskckpt")
        return int(done)

    assert done_before("mine", code=KILLED) == 0
    assert done_before("mine", code=0) == 3
    assert done_before("other", code=KILLED) == 0
    assert done_before(code=KILLED) == 0


class Cluster:
    """Starts pods as Flyte's backend does: the arguments and variables are those of its task executor."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.folder = engine.folder / "bucket"

    def outputs(self, attempt: int, action: str = "a0", run: str = "r1") -> Path:
        return self.folder / "org/proj/dev" / run / action / str(attempt + 1)

    def helper(self, attempt: int, action: str, run: str) -> str:
        return str(self.folder / "ab" / run / action / str(attempt + 1) / "_flytecheckpoints")

    def pod(
        self,
        attempt: int = 0,
        *,
        action: str = "a0",
        run: str = "r1",
        die: str = "",
        task: str = "count",
        code: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> str:
        outputs = self.outputs(attempt, action, run)
        outputs.mkdir(parents=True, exist_ok=True)
        inputs = outputs / "inputs.pb"
        inputs.touch()
        variables = {
            "RUN_NAME": run,
            "ACTION_NAME": action,
            "FLYTE_ATTEMPT_NUMBER": str(attempt),
            "FLYTE_INTERNAL_EXECUTION_PROJECT": "proj",
            "FLYTE_INTERNAL_EXECUTION_DOMAIN": "dev",
            "_U_ORG_NAME": "org",
            "_U_RUN_BASE": str(outputs.parent.parent),
            "TASKCKPT_BASE": "",
            "DIE": die,
            **(env or {}),
        }
        previous = self.helper(attempt - 1, action, run) if attempt else '""'
        checkpoints = ["--checkpoint-path", self.helper(attempt, action, run), "--prev-checkpoint", previous]
        return self.engine.run(
            "a0", "--inputs", inputs, "--outputs-path", outputs, "--version", "v1",
            "--raw-data-path", f"{self.folder}/ab/{run}/{action}/{attempt + 1}", *checkpoints,
            "--resolver", "flyte._internal.resolvers.default.DefaultTaskResolver", "mod", "flyte_pod", "instance", task,
            env=variables, code=code,
        )  # fmt: skip

    def error(self, attempt: int) -> list[Any]:
        """What the backend is told of it."""
        return said(self.engine.run("python", POD, self.outputs(attempt) / "error.pb"), "error")[0]


@pytest.fixture
def cluster(engine_of: EngineOf) -> Cluster:
    return Cluster(engine_of("flyte"))


@pytest.mark.timeout(120)
def test_pods(cluster: Cluster) -> None:
    def begins(*args: Any, **more: Any) -> int:
        return int(said(cluster.pod(*args, **more), "from")[0][0])

    assert begins(0, die="killed 2", code=KILLED) == 0
    assert begins(0, die="killed 3", code=KILLED) == 2  # it was preempted: the same number, and the same paths
    assert begins(1, die="fails 3") == 3
    assert cluster.error(1)[0] == "RECOVERABLE"
    assert begins(3) == 3  # attempt 2 never ran
    assert begins(action="4a7", die="killed 1", code=KILLED) == 0  # another item of a map
    assert begins(run="r2", die="killed 1", code=KILLED) == 0
    assert begins(action="4a7") == 1
    assert (cluster.folder / "org/proj/dev/r1").is_dir()


@pytest.mark.timeout(120)
def test_a_stale_pod_is_not_retried(cluster: Cluster) -> None:
    cluster.pod(die="overtaken 2")
    kind, code, message = cluster.error(0)
    assert (kind, code) == ("NON_RECOVERABLE", "stale-attempt")
    assert "took the task over" in message


@pytest.mark.timeout(120)
def test_who(cluster: Cluster) -> None:
    base = str(cluster.folder / "org/proj/dev/r1")
    output = cluster.pod(2, action="4a7", task="who")
    assert said(output, "who") == [["flyte/org/proj/dev/r1", "4a7", 2, None, None, base]]
    assert said(output, "helpers") == [[["4a7"], "4a7"]]

    worker = {"FLYTE_CLUSTERED_WORKER": "1", "RANK": "1", "WORLD_SIZE": "2", "JOBSET_RESTART_ATTEMPT": "3"}
    output = cluster.pod(0, task="who", env=worker)
    assert said(output, "who") == [["flyte/org/proj/dev/r1", "a0", 0, 1, 2, base]]

    # A shell's RANK is no rank of Flyte's; and a run that nobody named is nobody's own.
    output = cluster.pod(0, action="a0", run="a0", task="who", env={"RANK": "1"})
    assert "AmbiguousIdentityError" in output
    assert "with_runcontext(name=" in output


HELPER = {"HELPER": "flyte"}


@pytest.mark.timeout(120)
def test_what_flytes_helper_saved_is_where_to_begin(cluster: Cluster) -> None:
    """The changed line gets to a run in its midst: its image was built anew under the same tag."""

    def begins(*args: Any, **more: Any) -> int:
        return int(said(cluster.pod(*args, **more), "from")[0][0])

    assert begins(0, env=HELPER, die="fails 2") == 0
    assert begins(1, die="fails 3") == 2
    assert begins(2) == 3
    assert begins(0, action="4a7", env=HELPER, die="killed 1", code=KILLED) == 0
    assert begins(0, action="4a7") == 1  # it was preempted
    assert begins(0, action="9c2") == 0


@pytest.mark.timeout(120)
def test_the_example(engine_of: EngineOf) -> None:
    output = engine_of("flyte").run("python", EXAMPLES / "with_flyte.py")
    assert numbers(output, "resumes from") == [0, 3, 7]
    assert numbers(output, "counted to") == [10]
