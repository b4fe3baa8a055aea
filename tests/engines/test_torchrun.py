"""torchrun and PyTorch's other ways to start ranks: they do one task together, and rank 0 saves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest

from tests.engines.conftest import EXAMPLES, TASKS, Engine

RANKS, TASK = TASKS / "torchrun_ranks.py", TASKS / "torchrun_task.py"
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", "--monitor-interval", "0.1"]
SLURM = {
    "ENVIRONMENT": "BATCH", "SLURM_CLUSTER_NAME": "hpc", "SLURM_JOB_ID": "4711", "SLURMD_NODENAME": "node12",
    "SLURM_PROCID": "0", "SLURM_NTASKS": "1",
}  # fmt: skip

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def torchrun(engine_of: Callable[[str], Engine]) -> Engine:
    return engine_of("torchrun")


def run(engine: Engine, *command: object, code: int | None = 0, env: Mapping[str, str] | None = None) -> str:
    more = {"TMPDIR": str(engine.folder), "OMP_NUM_THREADS": "1", **(env or {})}
    return engine.run(*map(str, command), env=more, code=code, timeout_s=100)


def starts(output: str) -> set[tuple[int, int, int]]:
    """Rank, attempt and step of each start: always two ranks."""
    found = re.findall(r"rank (\d+) of 2, attempt (\d+), resumes from (\d+)", output)
    return {(int(rank), int(attempt), int(step)) for rank, attempt, step in found}


def both(*attempts: tuple[int, int]) -> set[tuple[int, int, int]]:
    return {(rank, *attempt) for rank in (0, 1) for attempt in attempts}


def places(output: str) -> set[str]:
    return set(re.findall(r"place (\S+)", output))


def test_ranks_that_die_go_on_and_a_second_launch_starts_afresh(torchrun: Engine) -> None:
    """One by exception, then one by SIGKILL; torchrun starts all again, and none fences another."""
    first = run(torchrun, *TORCHRUN, "--max-restarts", "3", RANKS, "1:3:raise", "0:5:kill")
    assert starts(first) == both((0, 0), (1, 3), (2, 5))
    assert first.count("rank may not save") == 3
    assert first.count("has done it") == 2
    assert "StaleAttemptError" not in first
    second = run(torchrun, *TORCHRUN, "--max-restarts", "0", RANKS, "0:2:kill", code=1)
    assert starts(second) == both((0, 0))
    assert len(places(first)) == len(places(second)) == 1
    assert places(first) != places(second)


def test_in_a_slurm_job_the_job_is_the_task(torchrun: Engine) -> None:
    """torchrun makes an id for each launch: a requeued job goes on all the same."""
    first = run(torchrun, *TORCHRUN, RANKS, code=1, env=SLURM | {"DEATHS": "1:3:raise"})
    second = run(torchrun, *TORCHRUN, RANKS, env=SLURM | {"SLURM_RESTART_COUNT": "1"})
    assert starts(first) == both((0, 0))
    assert starts(second) == both((1, 3))
    assert "slurm rank 0" in first
    assert len(places(first + second)) == 1


def test_a_task_in_each_rank(torchrun: Engine) -> None:
    """``@task`` in the script that torchrun starts: one task, not one for each rank."""
    output = run(torchrun, *TORCHRUN, "--max-restarts", "1", "--rdzv-id", "mine", TASK, "together")
    assert starts(output) == both((0, 0), (0, 2))  # attempts of @task, which does not know torchrun's
    assert len(places(output)) == 1
    assert output.count("rank may not save") == 2


@pytest.mark.parametrize(("way", "goes_on_from"), [("torchrun", 3), ("spawn", 2), ("accelerate", 2)])
def test_ranks_that_a_task_starts_belong_to_it(torchrun: Engine, way: str, goes_on_from: int) -> None:
    output = run(torchrun, "python", TASK, way, env={"LOADS_FIRST": "1"} if way == "spawn" else None)
    assert starts(output) == both((0, 0), (1, goes_on_from))
    assert len(places(output)) == 1
    assert output.count("rank may not save") == 2
    assert "task has done it" in output
    assert "StaleAttemptError" not in output


def test_the_example(torchrun: Engine) -> None:
    output = run(torchrun, *TORCHRUN, "--max-restarts", "3", EXAMPLES / "with_torchrun.py")
    assert re.findall(r"rank 0 of 2 resumes from (\d+)", output) == ["0", "3", "7"]
    assert "counted to 10" in output
