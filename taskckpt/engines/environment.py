"""Batch systems, clouds and launchers: what each says in the environment of its processes, as one table.

A job is known by its own ids and by the program that runs: a job's script often starts several programs, one
after the other, and these are several tasks. The program is the main module (``python -m a.b``) or the base name
of the script, which every rank and every child of ``multiprocessing`` shares. The same program started twice in
one job is told apart by ``TASKCKPT_INDEX``, any text, which is part of the task wherever it is set.

Items of an array are tasks of their own. Ranks are processes that do one task together. Where the environment does
not say which run or which of several tasks this is, the answer is ambiguous and says what to pass.

Everything is read from the one mapping that ``find`` takes, except the ad that HTCondor names in it, the folder
of SageMaker, and whether a person sits at a terminal. Nothing here was run under its system, but for torchrun:
each row was checked against the documentation that it names (``tests/engines/environments``).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from taskckpt.engines._task import EngineTask, name_of
from taskckpt.errors import UsageError

# Any text: which of several tasks this is, where the environment does not tell.
INDEX = "TASKCKPT_INDEX"
RUN = "TASKCKPT_RUN"

Values = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One row: what a system sets, and what that means.

    A variable may have others in its place (``A|B``: the first that is set). ``?`` at its end: it may be missing.

    Attributes:
        name: The engine's name, and the beginning of its runs.
        title: What people call it.
        source: The documentation that names the variables.
        rule: What keeps variables that leaked from misleading.
        detect: All of these are set where it runs a process.
        run: The variables that make up the run.
        items: The variables that tell apart its tasks of one program.
        attempt: The variable that counts attempts.
        counts_from: What that is on the first.
        if_missing: What it means that it is not set.
        ranks: Pairs of variables, rank and world size; the first pair that is set.
        gang: Where torchrun spans several of its items, these are nodes of one task.
        base: A variable, or a folder that counts if it is there.
        base_is_of_run: See ``EngineTask``.
        unless: Variables that mean "not here": with one of these values, or with any.
        sure: Values that only a batch job has: there, ``unless`` does not count.
        batch: No person sits at its terminal.
        not_programs: Programs that are no tasks.
        undefined: What a variable says instead of not being set.
        cut: What is not part of a variable's value.
        same_run: Why another run may have these values; ``TASKCKPT_RUN`` settles it.
        same_item: Why another task may have these values; ``TASKCKPT_INDEX`` settles it.
        hint: What to pass.
        more: Values from elsewhere, under names of their own; None: it does not run this process.
        layer: ``"system"`` or ``"launcher"``.
    """

    name: str
    title: str
    source: str
    rule: str
    detect: tuple[str, ...]
    run: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    attempt: str | None = None
    counts_from: int = 0
    if_missing: int | None = None
    ranks: tuple[tuple[str, str], ...] = ()
    gang: bool = False
    base: str | None = None
    base_is_of_run: bool = False
    unless: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sure: Mapping[str, str] = field(default_factory=dict)
    batch: bool = False
    not_programs: tuple[str, ...] = ()
    undefined: Mapping[str, str] = field(default_factory=dict)
    cut: Mapping[str, str] = field(default_factory=dict)
    same_run: str | None = None
    same_item: str | None = None
    hint: str | None = None
    more: Callable[[Values], Values | None] | None = None
    layer: str = "system"


def find(system: System, environ: Values | None = None) -> EngineTask | None:
    """What this system says of the process that this is; None if it does not run it.

    Raises:
        UsageError: A variable that counts something holds no number, or is a template that nobody replaced.
    """
    values: Values | None = os.environ if environ is None else environ
    assert values is not None
    if not all(_first(system, values, name) for name in system.detect):
        return None
    if system.more is not None:
        values = system.more(values)
        if values is None:
            return None
    here = program()
    if _leaked(system, values) or here in system.not_programs:
        return None
    return _told(system, values, here)


def _told(system: System, values: Values, here: str | None) -> EngineTask:
    run, run_from, run_known = _parts(system, values, system.run)
    spans_items = system.gang and values.get("TORCHELASTIC_RUN_ID") and values.get("GROUP_WORLD_SIZE", "1") != "1"
    items, items_from, items_known = ((), (), True) if spans_items else _parts(system, values, system.items)
    index = _index(values)
    rank, world_size, ranks_from = _rank(system, values)
    base = _base(system, values)
    unknown = []
    if not values.get(RUN, "").strip() and (system.same_run or not run_known or not run):
        unknown.append(system.same_run or f"{system.title} does not say here which run this is")
    if not index and (system.same_item or not items_known):
        unknown.append(system.same_item or f"{system.title} does not say here which of its tasks this is")
    hint = (system.hint or "Name the task by TASKCKPT_TASK or key=.") if unknown else None
    if not index and here is None:
        unknown.append("this program has no name (python -c, standard input or a notebook)")
        hint = hint or f"Set {INDEX} to a name for it; or name the task by TASKCKPT_TASK or key=."
    return EngineTask(
        engine=system.name,
        run=name_of(system.name, *run),
        task=name_of(*_without_end((here or "", *items, index or ""))) or "-",
        attempt=_attempt(system, values),
        base=base,
        rank=rank,
        world_size=world_size,
        ambiguous=_sentence(unknown),
        hint=hint,
        base_is_of_run=base is not None and system.base_is_of_run,
        in_environment=True,
        in_all_threads=True,
        sources=_sources(
            run=(*run_from,) or (system.title,),
            task=("main program", *items_from, *((INDEX,) if index else ())),
            attempt=(system.attempt,) if system.attempt else (),
            rank=ranks_from[:1],
            world_size=ranks_from[1:],
            base=(system.base,) if base and system.base else (),
        ),
    )


def _sources(**names: tuple[str, ...]) -> dict[str, str]:
    return {value: ", ".join(of) for value, of in names.items() if of}


def _without_end(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Parts that are missing keep their place, so that no others read the same; at the end they need not."""
    while parts and not parts[-1]:
        parts = parts[:-1]
    return parts


def _sentence(reasons: list[str]) -> str | None:
    text = "; ".join(reasons)
    return f"{text[:1].upper()}{text[1:]}." if text else None


def _get(system: System, values: Values, name: str) -> str | None:
    """A variable that says something."""
    value = values.get(name)
    if not value or not value.strip() or value == system.undefined.get(name):
        return None
    return re.sub(system.cut[name], "", value) or None if name in system.cut else value


def _first(system: System, values: Values, names: str) -> tuple[str, str] | None:
    """The first of several variables that says something, and what."""
    return next(((one, text) for one in names.split("|") if (text := _get(system, values, one))), None)


def _parts(system: System, values: Values, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """What these variables say, which they are, and if all are there that must be."""
    found = [_first(system, values, name.removesuffix("?")) for name in names]
    known = all(one or name.endswith("?") for one, name in zip(found, names, strict=True))
    return tuple(one[1] if one else "" for one in found), tuple(one[0] for one in found if one), known


def _leaked(system: System, values: Values) -> bool:
    if system.batch and _at_a_terminal():
        return True
    if system.sure and all(values.get(name) == value for name, value in system.sure.items()):
        return False
    return any(
        (value := values.get(name)) is not None and (not only or value in only) for name, only in system.unless.items()
    )


def _at_a_terminal() -> bool:
    try:
        return os.isatty(0)
    except OSError:
        return False


def _index(values: Values) -> str | None:
    text = values.get(INDEX, "")
    if text.strip().startswith("{{"):
        raise UsageError(f"{INDEX}={text!r} is a template that nobody replaced.")
    return text if text.strip() else None


def _attempt(system: System, values: Values) -> int | None:
    found = _first(system, values, system.attempt) if system.attempt else None
    return _count(*found, counts_from=system.counts_from) if found else system.if_missing


def _rank(system: System, values: Values) -> tuple[int | None, int | None, tuple[str, ...]]:
    for names in system.ranks:
        rank, size = (_get(system, values, name) for name in names)
        if rank and size:
            number, of = _count(names[0], rank), _count(names[1], size)
            if number >= max(of, 1):
                raise UsageError(f"{names[0]}={rank!r} is no rank of {names[1]}={size!r} processes.")
            return (number, of, names) if of > 1 else (None, None, ())
    return None, None, ()


def _count(name: str, text: str, *, counts_from: int = 0) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) < counts_from:
        raise UsageError(f"{name}={text[:80]!r} must be a whole number from {counts_from} on.")
    return int(text) - counts_from


def _base(system: System, values: Values) -> str | None:
    if system.base is None or not system.base.startswith("/"):
        return _get(system, values, system.base) if system.base else None
    return system.base if os.path.isdir(system.base) else None


@contextmanager
def acting_for(command: str) -> Generator[None]:
    """Inside, this process is the program that it is asked about, or that it is about to start."""
    token = _acting_for.set(command)
    try:
        yield
    finally:
        _acting_for.reset(token)


_acting_for: ContextVar[str | None] = ContextVar("taskckpt_program", default=None)


def program() -> str | None:
    """The program that this process runs, by name; None for ``python -c``, standard input and notebooks."""
    if (command := _acting_for.get()) is not None:
        return command
    # While a child of multiprocessing imports the main module, __main__ is still that of the child's command line.
    return next(filter(None, (_program(sys.modules.get(name)) for name in ("__main__", "__mp_main__"))), None)


def _program(main: Any) -> str | None:
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name not in ("__main__", "__mp_main__"):  # python -m package.module
        return str(spec.name).removesuffix(".__main__")
    path = getattr(main, "__file__", None)
    if not isinstance(path, str) or path.startswith("<"):
        return None
    folder, name = os.path.split(path)
    # A folder or an archive that is run is named like a script.
    return os.path.basename(os.path.abspath(folder)) if name in ("__main__.py", "__main__.pyc") else name


# --- values from elsewhere


def _by_host_list(values: Values) -> Values:
    """SageMaker lists its hosts in the order of their ranks."""
    hosts = _json("SM_HOSTS", values, list)
    current = values.get("SM_CURRENT_HOST")
    if current not in hosts:
        return values
    return {**values, "SM_HOSTS.index": str(hosts.index(current)), "SM_HOSTS.len": str(len(hosts))}


def _by_cluster_spec(values: Values) -> Values:
    """Vertex lists its pools of workers: the first of the first pool leads."""
    spec = _json("CLUSTER_SPEC", values, dict)
    pools, task = spec.get("cluster"), spec.get("task")
    if not isinstance(pools, dict) or not isinstance(task, dict):
        return values
    more = {"CLUSTER_SPEC.trial": str(task.get("trial") or "")}
    workers = [(pool, index) for pool in sorted(pools) for index in range(len(pools[pool]))]
    me = (task.get("type"), task.get("index"))
    if me in workers:
        more |= {"CLUSTER_SPEC.rank": str(workers.index(me)), "CLUSTER_SPEC.size": str(len(workers))}
    return {**values, **more}


def _json(name: str, values: Values, kind: type[Any]) -> Any:
    text = values.get(name, "").strip()
    try:
        found = json.loads(text) if text else kind()
    except ValueError as error:
        raise UsageError(f"{name}={text[:80]!r} is no JSON: {error}.") from error
    if not isinstance(found, kind):
        raise UsageError(f"{name}={text[:80]!r} is no {kind.__name__}.")
    return found


def _by_condor_ad(values: Values) -> Values:
    """HTCondor writes what it knows of the job to a file: lines of ``Name = value``."""
    try:
        with open(values["_CONDOR_JOB_AD"], encoding="utf-8", errors="surrogateescape") as file:
            lines = dict(line.rstrip("\n").partition(" = ")[::2] for line in file)
    except OSError:
        lines = {}
    ad = {f"ad.{name.lower()}": value.strip('"') for name, value in lines.items()}
    return {**values, **ad, "ad.schedd": ad.get("ad.globaljobid", "").partition("#")[0]}


def _by_indexed_host(values: Values) -> Values:
    """The pods of an indexed Job are called ``<job>-<index>``, unless they have the network of their host."""
    job, dash, index = values.get("HOSTNAME", "").rpartition("-")
    return {**values, "HOSTNAME.job": job} if dash and index == values["JOB_COMPLETION_INDEX"] else values


def _by_torch(values: Values) -> Values | None:
    distributed: Any = sys.modules.get("torch.distributed")
    if not getattr(distributed, "is_available", bool)() or not getattr(distributed, "is_initialized", bool)():
        return None
    if distributed.get_world_size() < 2:
        return None
    return {**values, "get_rank()": str(distributed.get_rank()), "get_world_size()": str(distributed.get_world_size())}


def _unless_alone(values: Values) -> Values | None:
    """Dask and Ray are started by mpirun, too; the tasks of their workers are no ranks of anything."""
    if any(name in sys.modules for name in ("dask_mpi", "distributed", "ray")):
        return None
    return None if (values.get("OMPI_COMM_WORLD_SIZE") or values.get("PMI_SIZE")) == "1" else values


# --- the table, from the inside out

_UID = "TASKCKPT_JOB_UID"
_JOB_UID_HINT = (
    f"Map {_UID} in the pod: valueFrom: fieldRef: fieldPath: "
    "metadata.labels['batch.kubernetes.io/controller-uid']; or name the task by TASKCKPT_TASK or key=."
)
_JOBSET_UID_HINT = (
    "Map JOBSET_UID in the pod: valueFrom: fieldRef: fieldPath: metadata.labels['jobset.sigs.k8s.io/jobset-uid'] "
    "(the Job's own uid is another one after a restart); or name the task by TASKCKPT_TASK or key=."
)
# What test runners set for the tests, and for what these start.
_TESTS = {"PYTEST_CURRENT_TEST": (), "PYTEST_VERSION": (), "TOX_ENV_NAME": (), "NOX_CURRENT_SESSION": ()}


def _rows() -> Iterator[System]:
    yield from _launchers()
    yield from _workflows()
    yield from _schedulers()
    yield from _clouds()
    yield from _clusters()


def _launchers() -> Iterator[System]:
    yield System(
        name="torchrun",
        title="torchrun",
        source="https://docs.pytorch.org/docs/stable/elastic/run.html",
        rule="RANK and WORLD_SIZE alone are anybody's: they count beside TORCHELASTIC_RUN_ID only.",
        detect=("TORCHELASTIC_RUN_ID|TORCHELASTIC_RESTART_COUNT", "RANK", "WORLD_SIZE"),
        run=("TORCHELASTIC_RUN_ID",),
        attempt="TORCHELASTIC_RESTART_COUNT",
        ranks=(("RANK", "WORLD_SIZE"),),
        undefined={"TORCHELASTIC_RUN_ID": "none"},
        hint="Start torchrun with an --rdzv-id of this run; or name the task by TASKCKPT_TASK or key=.",
        layer="launcher",
    )
    yield System(
        name="torch-distributed",
        title="torch.distributed",
        source="https://docs.pytorch.org/docs/stable/distributed.html",
        rule="It counts while the process group is initialised, and only for rank and world size.",
        detect=(),
        ranks=(("get_rank()", "get_world_size()"),),
        more=_by_torch,
        hint="Name the task by TASKCKPT_TASK or key=.",
        layer="launcher",
    )
    yield System(
        name="mpirun",
        title="mpirun",
        source="https://docs.open-mpi.org/en/main/tuning-apps/environment-var.html",
        rule="Workers of Dask or Ray that mpirun started are no ranks: their tasks are not done together.",
        detect=("OMPI_COMM_WORLD_RANK|PMI_RANK", "OMPI_COMM_WORLD_SIZE|PMI_SIZE"),
        ranks=(("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")),
        more=_unless_alone,
        hint="Name the task by TASKCKPT_TASK or key=.",
        layer="launcher",
    )


def _workflows() -> Iterator[System]:
    yield System(
        name="airflow-environment",
        title="Airflow",
        source="https://airflow.apache.org/docs/apache-airflow/stable/templates-ref.html",
        rule="Every descendant of an Airflow task has them: they count once TASKCKPT_INDEX says which mapped task "
        "it is.",
        detect=("AIRFLOW_CTX_DAG_ID", "AIRFLOW_CTX_TASK_ID", "AIRFLOW_CTX_DAG_RUN_ID"),
        run=("AIRFLOW_CTX_DAG_ID", "AIRFLOW_CTX_DAG_RUN_ID"),
        items=("AIRFLOW_CTX_TASK_ID",),
        attempt="AIRFLOW_CTX_TRY_NUMBER",
        counts_from=1,
        same_item="the environment of an Airflow task does not say which mapped task it is",
        hint="Pass env={'TASKCKPT_INDEX': '{{ ti.map_index }}'} to the operator (append_env=True).",
    )
    yield System(
        name="nextflow",
        title="Nextflow",
        source="https://www.nextflow.io/docs/latest/reference/process.html",
        rule="The work folder is another one on each attempt: it tells that Nextflow runs this, and nothing else.",
        detect=("NXF_TASK_WORKDIR",),
        same_item="the environment of a Nextflow task does not say which task it is",
        hint="Begin the script with: export TASKCKPT_RUN='${workflow.sessionId}' "
        "TASKCKPT_INDEX='${task.process} ${task.index}' TASKCKPT_ATTEMPT=${task.attempt - 1}",
    )
    yield System(
        name="kfp",
        title="Kubeflow Pipelines",
        source="https://www.kubeflow.org/docs/components/pipelines/reference/",
        rule="The name of the pod is another one on each attempt: it tells that KFP runs this, and nothing else.",
        detect=("KFP_POD_NAME",),
        attempt="KFP_RETRY_INDEX",
        same_item="the environment of a KFP task does not say which task it is",
        hint="Take dsl.PIPELINE_JOB_ID_PLACEHOLDER and dsl.PIPELINE_TASK_ID_PLACEHOLDER as arguments, "
        "and use both in key=.",
    )
    yield System(
        name="argo",
        title="Argo Workflows",
        source="https://argo-workflows.readthedocs.io/en/latest/variables/",
        rule="ARGO_NODE_ID is another one on each attempt: the workflow counts, and what you pass.",
        detect=("ARGO_WORKFLOW_NAME|ARGO_TEMPLATE", "ARGO_NODE_ID|ARGO_CONTAINER_NAME"),
        run=("ARGO_WORKFLOW_NAME?",),
        same_run="the environment of an Argo pod does not say which workflow of that name it is",
        same_item="the environment of an Argo pod does not say which task it is",
        hint="Set in the template's env: TASKCKPT_RUN: '{{workflow.uid}}', TASKCKPT_INDEX: '{{tasks.name}}' (with the "
        "item, if it has any), and with a retryStrategy TASKCKPT_ATTEMPT: '{{retries}}'.",
    )
    yield System(
        name="github-actions",
        title="GitHub Actions",
        source="https://docs.github.com/en/actions/reference/workflows-and-actions/variables",
        rule="Under a test runner (pytest, unittest, tox, nox) it is the tests that run there, and no task.",
        detect=("GITHUB_ACTIONS", "GITHUB_REPOSITORY", "GITHUB_RUN_ID", "GITHUB_JOB"),
        run=("GITHUB_SERVER_URL?", "GITHUB_REPOSITORY", "GITHUB_RUN_ID"),
        items=("GITHUB_JOB", "GITHUB_ACTION?"),
        attempt="GITHUB_RUN_ATTEMPT",
        counts_from=1,
        unless=_TESTS,
        not_programs=("pytest", "py.test", "unittest", "nose2", "tox", "nox"),
        same_item="all legs of a matrix, and all calls of one reusable workflow, have the same environment",
        hint="Set in the job's env: TASKCKPT_INDEX: ${{ strategy.job-index }}",
    )
    yield System(
        name="skypilot",
        title="SkyPilot",
        source="https://docs.skypilot.co/en/latest/running-jobs/environment-variables.html",
        rule="SKYPILOT_TASK_ID is set for the commands of a task only, not in a shell by ssh.",
        detect=("SKYPILOT_TASK_ID",),
        run=("SKYPILOT_TASK_ID",),
        ranks=(("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),),
    )


def _schedulers() -> Iterator[System]:
    yield System(
        name="slurm",
        title="Slurm",
        source="https://slurm.schedmd.com/sbatch.html",
        rule="Not in the shell of salloc or srun --pty, nor at any terminal: SLURMD_NODENAME must be set, and "
        "SLURM_PTY_* must not, unless ENVIRONMENT=BATCH says that such a shell submitted a batch job.",
        detect=("SLURM_JOB_ID", "SLURMD_NODENAME"),
        # One program may span the components of a heterogeneous job; a requeued job may skip steps that are done.
        run=("SLURM_CLUSTER_NAME?", "SLURM_ARRAY_JOB_ID|SLURM_HET_JOB_ID|SLURM_PACK_JOB_ID|SLURM_JOB_ID"),
        items=("SLURM_ARRAY_TASK_ID?",),
        attempt="SLURM_RESTART_COUNT",
        if_missing=0,
        # SLURM_NTASKS is what the job asked for, also where its script starts one process.
        ranks=(("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),),
        unless={
            "SLURM_PTY_PORT": (),
            "SLURM_PTY_WIN_COL": (),
            "SLURM_STEP_ID": ("4294967290",),  # the step of salloc's own shell
            "SLURM_JOB_NAME": ("interactive",),
        },
        sure={"ENVIRONMENT": "BATCH"},
        batch=True,
    )
    yield System(
        name="sge",
        title="Grid Engine",
        source="https://gridscheduler.sourceforge.net/htmlman/htmlman1/qsub.html",
        rule="JOB_ID is set by many: it counts beside SGE_TASK_ID only, and not at a terminal (qlogin, qrsh).",
        detect=("JOB_ID", "SGE_TASK_ID|JOB_SCRIPT", "SGE_ROOT|SGE_CELL|SGE_O_HOST"),
        run=("SGE_CELL?", "SGE_O_HOST?", "JOB_ID"),
        items=("SGE_TASK_ID?",),
        undefined={"SGE_TASK_ID": "undefined"},
        batch=True,
    )
    yield System(
        name="lsf",
        title="LSF",
        source="https://www.ibm.com/docs/en/spectrum-lsf/10.1.0?topic=variables-environment-set-job-execution",
        rule="Not in interactive jobs (LSB_INTERACTIVE=Y), nor at a terminal.",
        detect=("LSB_JOBID",),
        run=("LSB_SUB_HOST?", "LSB_JOBID"),
        items=("LSB_JOBINDEX?",),
        undefined={"LSB_JOBINDEX": "0"},
        unless={"LSB_INTERACTIVE": ("Y", "y")},
        batch=True,
    )
    yield System(
        name="pbs",
        title="PBS and Torque",
        source="https://manpages.ubuntu.com/manpages/xenial/man1/qsub.1B.html",
        rule="Not in interactive jobs (PBS_ENVIRONMENT=PBS_INTERACTIVE), nor at a terminal.",
        detect=("PBS_JOBID",),
        run=("PBS_JOBID",),
        items=("PBS_ARRAY_INDEX|PBS_ARRAYID?",),
        cut={"PBS_JOBID": r"(?<=\[)\d+(?=\])"},  # 1234[7].server
        unless={"PBS_ENVIRONMENT": ("PBS_INTERACTIVE",)},
        batch=True,
    )
    yield System(
        name="htcondor",
        title="HTCondor",
        source="https://htcondor.readthedocs.io/en/latest/users-manual/env-of-job.html",
        rule="Not in interactive jobs (InteractiveJob in the ad), nor at a terminal.",
        detect=("_CONDOR_JOB_AD",),
        # A node of a DAG that is retried is a new cluster; the DAG and the node stay.
        run=("ad.schedd", "ad.dagmanjobid|ad.clusterid"),
        items=("ad.dagnodename?", "ad.procid"),
        ranks=(("_CONDOR_PROCNO", "_CONDOR_NPROCS"),),
        unless={"ad.interactivejob": ("true", "TRUE", "True")},
        batch=True,
        more=_by_condor_ad,
    )


def _clouds() -> Iterator[System]:
    yield System(
        name="aws-batch",
        title="AWS Batch",
        source="https://docs.aws.amazon.com/batch/latest/userguide/job_env_vars.html",
        rule="AWS_BATCH_ is reserved: only containers of jobs have such variables.",
        detect=("AWS_BATCH_JOB_ID",),
        run=("AWS_BATCH_JOB_ID",),
        items=("AWS_BATCH_JOB_ARRAY_INDEX?",),
        attempt="AWS_BATCH_JOB_ATTEMPT",
        counts_from=1,
        ranks=(("AWS_BATCH_JOB_NODE_INDEX", "AWS_BATCH_JOB_NUM_NODES"),),
        cut={"AWS_BATCH_JOB_ID": r"[:#].*"},  # children of an array, nodes of a job
    )
    yield System(
        name="gcp-batch",
        title="Google Cloud Batch",
        source="https://cloud.google.com/batch/docs/create-run-basic-job",
        rule="BATCH_TASK_INDEX counts beside BATCH_TASK_COUNT only.",
        detect=("BATCH_TASK_INDEX", "BATCH_TASK_COUNT"),
        run=("BATCH_JOB_UID",),
        items=("BATCH_TASK_INDEX",),
        attempt="BATCH_TASK_RETRY_ATTEMPT",
        gang=True,
        hint="Set TASKCKPT_RUN in the job's environment to a name of this job; or use key=.",
    )
    yield System(
        name="cloud-run-jobs",
        title="Cloud Run Jobs",
        source="https://cloud.google.com/run/docs/container-contract",
        rule="A service has K_SERVICE and no CLOUD_RUN_EXECUTION.",
        detect=("CLOUD_RUN_JOB", "CLOUD_RUN_EXECUTION", "CLOUD_RUN_TASK_INDEX"),
        run=("CLOUD_RUN_JOB", "CLOUD_RUN_EXECUTION"),
        items=("CLOUD_RUN_TASK_INDEX",),
        attempt="CLOUD_RUN_TASK_ATTEMPT",
    )
    yield System(
        name="azure-batch",
        title="Azure Batch",
        source="https://learn.microsoft.com/azure/batch/batch-compute-node-environment-variables",
        rule="AZ_BATCH_NODE_* is set on the node, AZ_BATCH_TASK_ID for tasks only.",
        detect=("AZ_BATCH_JOB_ID", "AZ_BATCH_TASK_ID"),
        run=("AZ_BATCH_ACCOUNT_NAME?", "AZ_BATCH_JOB_ID"),
        items=("AZ_BATCH_TASK_ID",),
    )
    yield System(
        name="azure-ml",
        title="Azure Machine Learning",
        source="https://learn.microsoft.com/azure/machine-learning/how-to-train-distributed-gpu",
        rule="A compute instance and its notebooks have no AZUREML_RUN_ID.",
        detect=("AZUREML_RUN_ID",),
        run=("AZUREML_ARM_SUBSCRIPTION?", "AZUREML_ARM_WORKSPACE_NAME?", "AZUREML_ROOT_RUN_ID|AZUREML_RUN_ID"),
        items=("AZUREML_RUN_ID",),
        ranks=(("RANK", "WORLD_SIZE"), ("NODE_RANK", "AZUREML_NODE_COUNT")),
    )
    yield System(
        name="sagemaker",
        title="SageMaker",
        source="https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html",
        rule="SM_* is also set for processing, and by its toolkit: TRAINING_JOB_NAME is set for training jobs only.",
        detect=("TRAINING_JOB_NAME",),
        # The name is unique in a region of an account only, and the ARN has both.
        run=("TRAINING_JOB_ARN|AWS_REGION|AWS_DEFAULT_REGION?", "TRAINING_JOB_NAME"),
        ranks=(("SM_HOSTS.index", "SM_HOSTS.len"),),
        base="/opt/ml/checkpoints",
        more=_by_host_list,
    )
    yield System(
        name="vertex",
        title="Vertex AI",
        source="https://cloud.google.com/vertex-ai/docs/training/code-requirements",
        rule="AIP_* is also set for predictions and in Workbench: CLOUD_ML_JOB_ID is set for training jobs only.",
        detect=("CLOUD_ML_JOB_ID",),
        run=("CLOUD_ML_PROJECT_ID?", "CLOUD_ML_JOB_ID"),
        items=("CLUSTER_SPEC.trial|CLOUD_ML_TRIAL_ID?",),
        ranks=(("CLUSTER_SPEC.rank", "CLUSTER_SPEC.size"),),
        base="AIP_CHECKPOINT_DIR",
        base_is_of_run=True,
        more=_by_cluster_spec,
    )


def _clusters() -> Iterator[System]:
    yield System(
        name="jobset",
        title="Kubernetes JobSet",
        source="https://jobset.sigs.k8s.io/docs/overview/",
        rule="JOBSET_NAME is only there where a person mapped it; the completion index must be there, too.",
        detect=("JOBSET_NAME|JOBSET_UID", "JOB_COMPLETION_INDEX"),
        run=(f"JOBSET_UID|{_UID}",),
        items=("HOSTNAME.job", "JOB_COMPLETION_INDEX"),
        attempt="JOBSET_RESTART_ATTEMPT",
        gang=True,
        hint=_JOBSET_UID_HINT,
        more=_by_indexed_host,
    )
    yield System(
        name="kubernetes-job",
        title="Kubernetes",
        source="https://kubernetes.io/docs/concepts/workloads/controllers/job/",
        rule="KUBERNETES_SERVICE_HOST is set in every pod, also of services and notebooks: a Job is what has "
        f"JOB_COMPLETION_INDEX, or {_UID} from the label of its uid.",
        detect=(f"{_UID}|JOB_COMPLETION_INDEX",),
        run=(_UID,),
        items=("JOB_COMPLETION_INDEX?",),
        gang=True,
        unless={"JOBSET_NAME": (), "JOBSET_UID": ()},
        hint=_JOB_UID_HINT,
    )


SYSTEMS: tuple[System, ...] = tuple(_rows())
