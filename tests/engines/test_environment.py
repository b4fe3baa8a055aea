"""The table of systems, on environments that their documentation shows: one small file each, with its source."""

from __future__ import annotations

import os
import pty
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

from taskckpt._layout import task_prefix
from taskckpt.engines import EngineTask, environment, systems
from taskckpt.errors import UsageError

ENVIRONMENTS = Path(__file__).parent / "environments"
BY_NAME = {system.name: system for system in systems.SYSTEMS}

pytestmark = pytest.mark.usefixtures("of_a_script")


@pytest.fixture
def of_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a batch job that runs train.py."""
    monkeypatch.setattr(environment, "program", lambda: "train.py")
    monkeypatch.setattr(environment, "_at_a_terminal", lambda: False)


def recorded(name: str) -> dict[str, str]:
    source, *lines = (ENVIRONMENTS / f"{name}.env").read_text().splitlines()
    assert source.startswith("# https://"), f"{name}: where is this from?"
    values = dict(line.split("=", 1) for line in lines)
    if "_CONDOR_JOB_AD" in values:
        values["_CONDOR_JOB_AD"] = str(ENVIRONMENTS / values["_CONDOR_JOB_AD"])
    return values


def found_in(environ: dict[str, str]) -> list[EngineTask]:
    return [task for system in systems.SYSTEMS if (task := environment.find(system, environ)) is not None]


@dataclass(frozen=True)
class Said:
    """What a system must say: itself, run, task, attempt, rank of size, base, and if it is ambiguous."""

    engine: str
    run: str
    task: str = "train.py"
    attempt: int | None = None
    rank: tuple[int, int] | None = None
    base: str | None = None
    ambiguous: bool = False

    @classmethod
    def of(cls, task: EngineTask) -> Said:
        rank = (task.rank, task.world_size) if task.rank is not None and task.world_size is not None else None
        assert (task.ambiguous is None) == (task.hint is None)
        return cls(task.engine, task.run, task.task, task.attempt, rank, task.base, task.ambiguous is not None)


JOB = "6f1c0b9e-1f6a-4c5c-9f0e-0a1b2c3d4e5f"
AIP = "gs://bucket/out"
GITHUB = "github-actions/https:%2F%2Fgithub.com/acme%2Fmodels/1658821493"
AIRFLOW = "airflow/nightly/scheduled__2026-11-21T00:00:00+00:00"
ARN = "arn:aws:sagemaker:eu-west-1:123456789012:training-job%2Ftrain-2026"

EXPECTED: dict[str, list[Said]] = {
    "slurm-batch": [Said("slurm", "slurm/hpc/4711", attempt=0)],
    "slurm-requeued": [Said("slurm", "slurm/hpc/4711", attempt=2)],
    "slurm-array": [Said("slurm", "slurm/hpc/36", "train.py/2", 0)],
    "slurm-step": [Said("slurm", "slurm/hpc/4711", attempt=0, rank=(3, 4))],
    "slurm-heterogeneous": [Said("slurm", "slurm/hpc/92", attempt=0, rank=(5, 6))],
    "slurm-salloc": [],
    "slurm-salloc-step": [],
    "slurm-srun-pty": [],
    "slurm-batch-from-pty": [Said("slurm", "slurm/hpc/4714", attempt=0, rank=(0, 1))],
    "sge-job": [Said("sge", "sge/default/login1/815")],
    "sge-array": [Said("sge", "sge/default/login1/816", "train.py/5")],
    "sge-leaked-job-id": [],
    "lsf-job": [Said("lsf", "lsf/login1/1234")],
    "lsf-array-restarted": [Said("lsf", "lsf/login1/1235", "train.py/7")],
    "lsf-interactive": [],
    "pbs-job": [Said("pbs", "pbs/1234.server.example.org")],
    "pbs-array": [Said("pbs", "pbs/1235[].server", "train.py/7")],
    "torque-array": [Said("pbs", "pbs/1236[].server", "train.py/3")],
    "pbs-interactive": [],
    "htcondor-job": [Said("htcondor", "htcondor/submit.example.org/52", "train.py//3")],
    "htcondor-dag": [Said("htcondor", "htcondor/submit.example.org/60", "train.py/train/0", rank=(1, 4))],
    "htcondor-without-ad": [Said("htcondor", "htcondor//", ambiguous=True)],
    "aws-batch-job": [Said("aws-batch", f"aws-batch/{JOB}", attempt=0)],
    "aws-batch-array": [Said("aws-batch", f"aws-batch/{JOB}", "train.py/4", 2)],
    "aws-batch-multi-node": [Said("aws-batch", f"aws-batch/{JOB}", attempt=1, rank=(1, 3))],
    "gcp-batch-task": [Said("gcp-batch", "gcp-batch/job-12345678-abcd", "train.py/2", 1)],
    "gcp-batch-without-uid": [Said("gcp-batch", "gcp-batch/", "train.py/2", 0, ambiguous=True)],
    "cloud-run-jobs-task": [Said("cloud-run-jobs", "cloud-run-jobs/train/train-x7k2p", "train.py/3", 1)],
    "cloud-run-service": [],
    "azure-batch-task": [Said("azure-batch", "azure-batch/acme/batchjob001", "train.py/task001")],
    "azure-ml-run": [
        Said("azure-ml", "azure-ml/00000000-1111/ws/teal_sponge_x1", "train.py/teal_sponge_x1_2", rank=(5, 8))
    ],
    "sagemaker-training": [Said("sagemaker", f"sagemaker/{ARN}/train-2026", rank=(1, 2))],
    "sagemaker-processing": [],
    "vertex-custom-job": [
        Said("vertex", "vertex/123456/7251234567890", rank=(2, 3), base=f"{AIP}/checkpoints/")
    ],
    "vertex-trial": [
        Said("vertex", "vertex/123456/7251234567891", "train.py/3", rank=(0, 1), base=f"{AIP}/3/checkpoints/")
    ],
    "vertex-workbench": [],
    "skypilot-managed-job": [
        Said("skypilot", "skypilot/sky-managed-2026-11-21-10-00-00-000000_train_12-0", rank=(1, 2))
    ],
    "github-actions-job": [Said("github-actions", GITHUB, "train.py/train/__run_2", 1, ambiguous=True)],
    "github-actions-tests": [],
    "argo-pod": [Said("argo", "argo/nightly-x7k2p", ambiguous=True)],
    "kfp-pod": [Said("kfp", "kfp", attempt=1, ambiguous=True), Said("argo", "argo/", ambiguous=True)],
    "nextflow-task": [Said("nextflow", "nextflow", ambiguous=True)],
    "airflow-bash-operator": [
        Said("airflow-environment", f"airflow-environment/{AIRFLOW[8:]}", "train.py/train", 1, ambiguous=True)
    ],
    "kubernetes-indexed": [Said("kubernetes-job", "kubernetes-job/", "train.py/2", ambiguous=True)],
    "kubernetes-indexed-mapped": [Said("kubernetes-job", "kubernetes-job/5c9a1c8e", "train.py/2")],
    "kubernetes-plain-mapped": [Said("kubernetes-job", "kubernetes-job/5c9a1c8e")],
    "kubernetes-pod": [],
    "jobset-mapped": [Said("jobset", "jobset/77aa", "train.py/pretrain-workers-0/1", 2)],
    "jobset-torchrun": [
        Said("torchrun", "torchrun/pretrain", attempt=1, rank=(9, 16)),
        Said("jobset", "jobset/77aa", attempt=0),
    ],
    "torchrun-standalone": [
        Said("torchrun", "torchrun/de2cbd9b-ee19-419b-94d5-f7c9f4bb75f9", attempt=1, rank=(1, 2))
    ],
    "torchrun-without-id": [Said("torchrun", "torchrun/", attempt=0, rank=(0, 2), ambiguous=True)],
    "ddp-without-torchrun": [],
    "mpirun": [Said("mpirun", "mpirun", rank=(1, 4), ambiguous=True)],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for path in ENVIRONMENTS.glob("*.env")))
def test_an_environment_as_it_is_documented(name: str) -> None:
    assert [Said.of(task) for task in found_in(recorded(name))] == EXPECTED[name]


def test_every_row_has_an_environment_a_source_and_a_rule() -> None:
    seen = {said.engine for all_of_one in EXPECTED.values() for said in all_of_one}
    assert seen == BY_NAME.keys() - {"torch-distributed"}  # that one is asked in test_torchrun.py
    for system in systems.SYSTEMS:
        assert system.source.startswith("https://")
        assert system.rule.endswith(".")
        assert system.layer in ("system", "launcher")
    assert len(BY_NAME) == len(systems.SYSTEMS)


def test_each_value_says_where_it_is_from() -> None:
    for name in EXPECTED:
        for task in found_in(recorded(name)):
            told = ("attempt", "base", "rank", "world_size")
            values = {"run", "task", *(value for value in told if getattr(task, value) is not None)}
            assert values <= task.sources.keys()
    (slurm,) = found_in(recorded("slurm-array"))
    assert slurm.sources == {
        "run": "SLURM_CLUSTER_NAME, SLURM_ARRAY_JOB_ID",
        "task": "main program, SLURM_ARRAY_TASK_ID",
        "attempt": "SLURM_RESTART_COUNT",
    }


# --- which task of the job


SIMILAR = {
    "slurm-array": "SLURM_ARRAY_TASK_ID", "sge-array": "SGE_TASK_ID", "lsf-array-restarted": "LSB_JOBINDEX",
    "pbs-array": "PBS_ARRAY_INDEX", "aws-batch-array": "AWS_BATCH_JOB_ARRAY_INDEX",
    "gcp-batch-task": "BATCH_TASK_INDEX",
    "cloud-run-jobs-task": "CLOUD_RUN_TASK_INDEX", "azure-batch-task": "AZ_BATCH_TASK_ID",
    "kubernetes-indexed-mapped": "JOB_COMPLETION_INDEX", "jobset-mapped": "JOB_COMPLETION_INDEX",
}  # fmt: skip


@pytest.mark.parametrize("name", SIMILAR)
def test_items_are_tasks_of_one_run(name: str) -> None:
    one, other = recorded(name), recorded(name) | {SIMILAR[name]: "8"}
    ((first,), (second,)) = found_in(one), found_in(other)
    assert first.run == second.run
    assert first.task != second.task
    assert first.rank is second.rank is None


SAME_TASK = {
    "slurm-step": {"SLURM_PROCID": "0", "SLURM_STEP_ID": "9", "SLURMD_NODENAME": "node99", "SLURM_RESTART_COUNT": "1"},
    "aws-batch-multi-node": {"AWS_BATCH_JOB_NODE_INDEX": "0", "AWS_BATCH_JOB_ID": f"{JOB}#0"},
    "sagemaker-training": {"SM_CURRENT_HOST": "algo-1"},
    "skypilot-managed-job": {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.9.9.9"},
    "jobset-torchrun": {"HOSTNAME": "pretrain-workers-0-0", "JOB_COMPLETION_INDEX": "0", "RANK": "0"},
    "sge-array": {"RESTARTED": "0"},
    "github-actions-job": {"GITHUB_RUN_ATTEMPT": "7"},
    "argo-pod": {"ARGO_NODE_ID": "nightly-x7k2p-99", "HOSTNAME": "nightly-x7k2p-train-99"},
    "cloud-run-jobs-task": {"CLOUD_RUN_TASK_ATTEMPT": "0"},
    "jobset-mapped": {"JOBSET_RESTART_ATTEMPT": "3"},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME_TASK)
def test_ranks_and_attempts_share_their_task(name: str) -> None:
    one, other = found_in(recorded(name)), found_in(recorded(name) | SAME_TASK[name])
    assert [(task.run, task.task) for task in one] == [(task.run, task.task) for task in other]
    assert one != other or name in ("sge-array", "argo-pod")


def test_programs_of_one_job_are_tasks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = []
    for program in ("prepare.py", "train.py", "package.train"):
        monkeypatch.setattr(environment, "program", lambda program=program: program)
        tasks += found_in(recorded("slurm-batch"))
    assert len({task.task for task in tasks}) == 3
    assert {task.run for task in tasks} == {"slurm/hpc/4711"}


def test_a_program_without_a_name_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "program", lambda: None)
    (task,) = found_in(recorded("slurm-array"))
    assert "no name" in (task.ambiguous or "")
    assert "TASKCKPT_INDEX" in (task.hint or "")
    (task,) = found_in(recorded("slurm-array") | {"TASKCKPT_INDEX": "train"})
    assert (task.task, task.ambiguous) == ("/2/train", None)


PROGRAM = "from taskckpt.engines import environment; print('program', environment.program())"


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (["there/train.py"], "train.py"),
        (["-m", "there.train"], "there.train"),
        (["-m", "there"], "there"),
        (["there"], "there"),
        (["-c", PROGRAM], None),
        (["-"], None),
    ],
)
def test_how_a_program_is_called(tmp_path: Path, command: list[str], program: str | None) -> None:
    (tmp_path / "there").mkdir()
    for name in ("train.py", "__main__.py", "__init__.py"):
        (tmp_path / "there" / name).write_text(PROGRAM if name != "__init__.py" else "")
    done = subprocess.run(
        [sys.executable, *command], input=PROGRAM, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines() == [f"program {program}"]


SPAWNS = f"""
import multiprocessing
{PROGRAM}
def child():
    print('child', environment.program(), flush=True)
if __name__ == "__main__":
    for way in ("spawn", "fork", "forkserver"):
        process = multiprocessing.get_context(way).Process(target=child)
        process.start()
        process.join()
"""


def test_children_of_multiprocessing_run_the_same_program(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SPAWNS)
    for command in (["train.py"], ["-m", "train"]):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *command], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        named = {line.split()[1] for line in done.stdout.splitlines()}
        assert named == {command[-1]}
        assert done.stdout.count("child") == 3


# --- what to pass


@pytest.mark.parametrize(
    ("name", "passed", "task"),
    [
        ("github-actions-job", {"TASKCKPT_INDEX": "3"}, "train.py/train/__run_2/3"),
        ("airflow-bash-operator", {"TASKCKPT_INDEX": "-1"}, "train.py/train/-1"),
        ("argo-pod", {"TASKCKPT_INDEX": "train(0:a)", "TASKCKPT_RUN": "0d4f-uid"}, "train.py/train(0:a)"),
        ("nextflow-task", {"TASKCKPT_INDEX": "TRAIN 7", "TASKCKPT_RUN": "session"}, "train.py/TRAIN 7"),
        ("kubernetes-indexed", {"TASKCKPT_RUN": "0d4f-uid"}, "train.py/2"),
        ("gcp-batch-without-uid", {"TASKCKPT_RUN": "nightly"}, "train.py/2"),
        ("slurm-batch", {"TASKCKPT_INDEX": "seed-1"}, "train.py//seed-1"),
        ("slurm-array", {"TASKCKPT_INDEX": "seed-1"}, "train.py/2/seed-1"),
    ],
)  # fmt: skip
def test_what_was_passed_settles_it(name: str, passed: dict[str, str], task: str) -> None:
    (said,) = found_in(recorded(name) | passed)
    assert (said.task, said.ambiguous, said.hint) == (task, None, None)


@pytest.mark.parametrize(
    ("name", "passed", "still"),
    [
        ("argo-pod", {"TASKCKPT_INDEX": "train"}, "which workflow"),
        ("argo-pod", {"TASKCKPT_RUN": "uid"}, "which task"),
        ("github-actions-job", {"TASKCKPT_RUN": "nightly"}, "matrix"),
        ("kubernetes-indexed", {"TASKCKPT_INDEX": "2"}, "which run"),
        ("mpirun", {"TASKCKPT_INDEX": "2"}, "ranks"),
    ],
)
def test_half_of_it_does_not(name: str, passed: dict[str, str], still: str) -> None:
    (said,) = found_in(recorded(name) | passed)
    assert still in (said.ambiguous or "")


def test_every_hint_says_what_to_set() -> None:
    for name in EXPECTED:
        for task in found_in(recorded(name)):
            if task.ambiguous:
                assert any(word in (task.hint or "") for word in ("TASKCKPT_", "JOBSET_UID", "key="))


# --- leaks


def test_a_person_at_a_terminal_is_no_batch_job() -> None:
    leader, follower = pty.openpty()
    command = (
        "from taskckpt.engines import environment as e, systems; print([s.name for s in systems.SYSTEMS if e.find(s)])"
    )
    answers = []
    for stdin in (follower, subprocess.DEVNULL):
        environ = {**recorded("slurm-batch"), **recorded("pbs-job"), **recorded("lsf-job"), **recorded("sge-job")}
        done = subprocess.run(
            [sys.executable, "-c", command], stdin=stdin, env={**_without_tests(), **environ},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        answers.append(done.stdout.strip())
    os.close(leader)
    os.close(follower)
    assert answers == ["[]", "['slurm', 'sge', 'lsf', 'pbs']"]


def _without_tests() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "GITHUB_"))}


def test_github_under_a_test_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "PYTEST_CURRENT_TEST" in os.environ  # as here
    for leak in ("PYTEST_CURRENT_TEST", "PYTEST_VERSION", "TOX_ENV_NAME", "NOX_CURRENT_SESSION"):
        assert found_in(recorded("github-actions-job") | {leak: "1"}) == []
    for program in ("pytest", "unittest"):
        monkeypatch.setattr(environment, "program", lambda program=program: program)
        assert found_in(recorded("github-actions-job")) == []


def test_a_blank_variable_says_nothing() -> None:
    for name, expected in EXPECTED.items():
        for said in expected:
            for variable in recorded(name):
                blank = recorded(name) | {variable: " "}
                tasks = [task for task in found_in(blank) if task.engine == said.engine]
                assert all(task.run.strip("/") and task.task for task in tasks)


def test_sagemaker_offers_its_folder_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/opt/ml/checkpoints")
    (task,) = found_in(recorded("sagemaker-training"))
    assert task.base == "/opt/ml/checkpoints"
    assert task.sources["base"] == "/opt/ml/checkpoints"
    assert not task.base_is_of_run
    (task,) = found_in(recorded("vertex-custom-job"))
    assert task.base_is_of_run  # without an output folder of its own, Vertex makes one for each job


# --- bad input


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("aws-batch-job", {"AWS_BATCH_JOB_ATTEMPT": "0"}),
        ("aws-batch-job", {"AWS_BATCH_JOB_ATTEMPT": "-3"}),
        ("slurm-requeued", {"SLURM_RESTART_COUNT": "10000000000000"}),
        ("slurm-requeued", {"SLURM_RESTART_COUNT": "two"}),
        ("slurm-step", {"SLURM_PROCID": "4"}),
        ("slurm-step", {"SLURM_PROCID": "-1"}),
        ("torchrun-standalone", {"WORLD_SIZE": "a"}),
        ("sagemaker-training", {"SM_HOSTS": "algo-1"}),
        ("sagemaker-training", {"SM_HOSTS": "{}"}),
        ("vertex-custom-job", {"CLUSTER_SPEC": "[1]"}),
        ("github-actions-job", {"TASKCKPT_INDEX": "{{ ti.map_index }}"}),
    ],
)
def test_nonsense_is_said_with_the_name_of_its_variable(name: str, bad: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        found_in(recorded(name) | bad)


HOSTILE = 300
PIECES = [
    "/", "..", "%", "%2F", "\n", "\r", "\t", ".", "-", "~", "\\", ":", "#", "[1]", "local", "by-key", "train.py", "con",
    "ä", "木", "\U0001f4a5", "\udc80", "{{x}}", "s3://b", "slurm/hpc/4711", "undefined", "0", "a" * 10_000, " ", "A",
]  # fmt: skip


def hostile(seed: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Environments whose names and numbers are anything that a variable can hold."""
    chance = random.Random(seed)
    names = sorted(name for name, said in EXPECTED.items() if said and "condor" not in name)
    for _ in range(HOSTILE):
        name = chance.choice(names)
        values = recorded(name)
        for variable in chance.sample(sorted(values), min(len(values), 3)):
            values[variable] = "".join(chance.choices(PIECES, k=chance.randint(1, 4)))
        if chance.random() < 0.3:
            values["TASKCKPT_INDEX"] = "".join(chance.choices(PIECES, k=2))
        yield name, values


def test_hostile_identities_touch_nobody_else() -> None:
    known = {task_prefix(one.run, one.task) for all_of_one in EXPECTED.values() for one in all_of_one}
    by_prefix: dict[str, tuple[str, str]] = {}
    said: list[str] = []
    names = 0
    for name, values in hostile(5):
        try:
            tasks = found_in(values)
        except UsageError as error:
            said.append(str(error))
            continue
        for task in tasks:
            names += 1
            identity = (task.run, task.task)
            prefix = task_prefix(*identity)
            parts = PurePosixPath(prefix).parts
            assert len(parts) == 2
            assert not {"..", ".", "/"} & set(parts)
            assert prefix.isascii()
            assert prefix.isprintable()
            assert len(prefix.encode()) < 400
            assert parts[0] not in ("by-key", "local")
            assert by_prefix.setdefault(prefix, identity) == identity
            if prefix in known:
                assert Said.of(task).run in {one.run for one in EXPECTED[name]}
    assert len(said) > 20
    assert all(text.isprintable() for text in said)
    assert names > 100


def test_no_two_answers_share_a_name_unless_they_are_ambiguous() -> None:
    """Each variable that counts, changed to each piece: another identity, or the same one on purpose."""
    for name, expected in EXPECTED.items():
        if not expected or "condor" in name:
            continue
        system = BY_NAME[expected[0].engine]
        for names in (*system.run, *system.items):
            variable = next((one for one in names.removesuffix("?").split("|") if one in recorded(name)), None)
            if (
                variable is None or variable in system.cut or "HOSTNAME.job" in system.items
            ):  # an index must fit its host
                continue
            seen = set()
            for piece in ("1", "2", "1/2", "1%2F2", "1/", "/1", "x"):
                task = environment.find(system, recorded(name) | {variable: piece})
                if task is not None and task.ambiguous is None:
                    seen.add((task.run, task.task))
            assert len(seen) in (0, 7), (name, variable)


# --- cost


def test_the_whole_table_is_asked_in_less_than_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        monkeypatch.setenv(f"SOME_VARIABLE_{number}", "x" * 100)
    for name, value in recorded("slurm-step").items():
        monkeypatch.setenv(name, value)
    best = min(_seconds_of_one_look() for _ in range(20))
    assert best < 0.001  # 0.0001 on a machine of 2026


def _seconds_of_one_look() -> float:
    began = time.perf_counter()
    for system in systems.SYSTEMS:
        environment.find(system)
    return time.perf_counter() - began
