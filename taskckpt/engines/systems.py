"""The table of batch systems, clouds and launchers, from the inside out: one row each. See ``environment``.

Of these only torchrun was run. The variables of the others come from the documentation that each row names, as far as
they tell; the rest is known from public code that uses them. Recorded ones stand in ``tests/engines/environments``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from taskckpt.engines.environment import System, Values
from taskckpt.errors import UsageError

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
    me: tuple[Any, Any] = (task.get("type"), task.get("index"))
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
            lines = [line.rstrip("\n").partition(" = ") for line in file]
    except OSError:
        lines = []
    ad = {f"ad.{name.lower()}": value.strip('"') for name, _, value in lines}
    return {**values, **ad, "ad.schedd": ad.get("ad.globaljobid", "").partition("#")[0]}


def _by_indexed_host(values: Values) -> Values:
    """The pods of an indexed Job are called ``<job>-<index>``, unless they have the network of their host."""
    job, dash, index = values.get("HOSTNAME", "").rpartition("-")
    return {**values, "HOSTNAME.job": job} if dash and index == values["JOB_COMPLETION_INDEX"] else values


_ranks: dict[int, dict[str, str]] = {}  # of this process, which may be a fork of one that had others


def _by_torch(values: Values) -> Values | None:
    distributed: Any = sys.modules.get("torch.distributed")
    if getattr(distributed, "is_available", bool)() and getattr(distributed, "is_initialized", bool)():
        ranks = {"get_rank()": str(distributed.get_rank()), "get_world_size()": str(distributed.get_world_size())}
        _ranks.clear()
        _ranks[os.getpid()] = ranks
    # A rank stays one when the group has ended, and may save no more than before.
    known = _ranks.get(os.getpid())
    return None if known is None else {**values, **known}


def _unless_alone(values: Values) -> Values | None:
    """Dask and Ray are started by mpirun, too; the tasks of their workers are no ranks of anything."""
    if any(name in sys.modules for name in ("dask_mpi", "distributed", "ray")):
        return None
    return None if (values.get("OMPI_COMM_WORLD_SIZE") or values.get("PMI_SIZE")) == "1" else values


# --- the table

_UID = "TASKCKPT_JOB_UID"
_JOB_UID_HINT = (
    f"Map {_UID} in the pod: valueFrom: fieldRef: fieldPath: "
    "metadata.labels['batch.kubernetes.io/controller-uid']; or name the task by TASKCKPT_TASK or key=."
)
_JOBSET_UID_HINT = (
    "Map JOBSET_UID in the pod: valueFrom: fieldRef: fieldPath: metadata.labels['jobset.sigs.k8s.io/jobset-uid'] "
    "(the Job's own uid is another one after a restart); or name the task by TASKCKPT_TASK or key=."
)
_RANKS_ONLY = "it tells ranks, and not which run they are of"
# What test runners set for the tests, and for what these start.
_TESTS = {"PYTEST_CURRENT_TEST": (), "PYTEST_VERSION": (), "TOX_ENV_NAME": (), "NOX_CURRENT_SESSION": ()}


_LAUNCHERS = (
    System(
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
    ),
    System(
        name="torch-distributed",
        title="torch.distributed",
        source="https://docs.pytorch.org/docs/stable/distributed.html",
        rule="It counts while the process group is initialised, and only for rank and world size.",
        detect=(),
        ranks=(("get_rank()", "get_world_size()"),),
        same_run=_RANKS_ONLY,
        more=_by_torch,
        hint="Name the task by TASKCKPT_TASK or key=.",
        layer="launcher",
    ),
    System(
        name="mpirun",
        title="mpirun",
        source="https://docs.open-mpi.org/en/main/tuning-apps/environment-var.html",
        rule="Workers of Dask or Ray that mpirun started are no ranks: their tasks are not done together.",
        detect=("OMPI_COMM_WORLD_RANK|PMI_RANK", "OMPI_COMM_WORLD_SIZE|PMI_SIZE"),
        ranks=(("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")),
        same_run=_RANKS_ONLY,
        more=_unless_alone,
        hint="Name the task by TASKCKPT_TASK or key=.",
        layer="launcher",
    ),
)

_WORKFLOWS = (
    System(
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
    ),
    System(
        name="nextflow",
        title="Nextflow",
        source="https://www.nextflow.io/docs/latest/reference/process.html",
        rule="The work folder is another one on each attempt: it tells that Nextflow runs this, and nothing else.",
        detect=("NXF_TASK_WORKDIR",),
        same_item="the environment of a Nextflow task does not say which task it is",
        hint="Begin the script with: export TASKCKPT_RUN='${workflow.sessionId}' "
        "TASKCKPT_INDEX='${task.process} ${task.index}' TASKCKPT_ATTEMPT=${task.attempt - 1}",
    ),
    System(
        name="kfp",
        title="Kubeflow Pipelines",
        source="https://www.kubeflow.org/docs/components/pipelines/reference/",
        rule="The name of the pod is another one on each attempt: it tells that KFP runs this, and nothing else.",
        detect=("KFP_POD_NAME",),
        attempt="KFP_RETRY_INDEX",
        same_item="the environment of a KFP task does not say which task it is",
        hint="Take dsl.PIPELINE_JOB_ID_PLACEHOLDER and dsl.PIPELINE_TASK_ID_PLACEHOLDER as arguments, "
        "and use both in key=.",
    ),
    System(
        name="argo",
        title="Argo Workflows",
        source="https://argo-workflows.readthedocs.io/en/latest/variables/",
        rule="ARGO_NODE_ID is another one on each attempt: the workflow counts, and what you pass.",
        detect=("ARGO_WORKFLOW_NAME|ARGO_TEMPLATE", "ARGO_NODE_ID|ARGO_CONTAINER_NAME"),
        run=("ARGO_WORKFLOW_NAME?",),
        same_run="the environment of an Argo pod does not say which workflow of that name it is",
        same_item="the environment of an Argo pod does not say which task it is",
        hint="Hand '{{tasks.name}} {{item}}' to the template as a parameter, and set in its env: TASKCKPT_INDEX to "
        "that, TASKCKPT_RUN: '{{workflow.uid}}', and with a retryStrategy TASKCKPT_ATTEMPT: '{{retries}}'.",
    ),
    System(
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
    ),
    System(
        name="skypilot",
        title="SkyPilot",
        source="https://docs.skypilot.co/en/latest/running-jobs/environment-variables.html",
        rule="SKYPILOT_TASK_ID is set for the commands of a task only, not in a shell by ssh.",
        detect=("SKYPILOT_TASK_ID",),
        run=("SKYPILOT_TASK_ID",),
        ranks=(("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),),
    ),
)

_SCHEDULERS = (
    System(
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
    ),
    System(
        name="sge",
        title="Grid Engine",
        source="https://gridscheduler.sourceforge.net/htmlman/htmlman1/qsub.html",
        rule="JOB_ID is set by many: it counts beside SGE_TASK_ID only, and not at a terminal (qlogin, qrsh).",
        detect=("JOB_ID", "SGE_TASK_ID|JOB_SCRIPT", "SGE_ROOT|SGE_CELL|SGE_O_HOST"),
        run=("SGE_CELL?", "SGE_O_HOST?", "JOB_ID"),
        items=("SGE_TASK_ID?",),
        undefined={"SGE_TASK_ID": "undefined"},
        batch=True,
    ),
    System(
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
    ),
    System(
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
    ),
    System(
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
    ),
)

_CLOUDS = (
    System(
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
    ),
    System(
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
    ),
    System(
        name="cloud-run-jobs",
        title="Cloud Run Jobs",
        source="https://cloud.google.com/run/docs/container-contract",
        rule="A service has K_SERVICE and no CLOUD_RUN_EXECUTION.",
        detect=("CLOUD_RUN_JOB", "CLOUD_RUN_EXECUTION", "CLOUD_RUN_TASK_INDEX"),
        run=("CLOUD_RUN_JOB", "CLOUD_RUN_EXECUTION"),
        items=("CLOUD_RUN_TASK_INDEX",),
        attempt="CLOUD_RUN_TASK_ATTEMPT",
    ),
    System(
        name="azure-batch",
        title="Azure Batch",
        source="https://learn.microsoft.com/azure/batch/batch-compute-node-environment-variables",
        rule="AZ_BATCH_NODE_* is set on the node, AZ_BATCH_TASK_ID for tasks only.",
        detect=("AZ_BATCH_JOB_ID", "AZ_BATCH_TASK_ID"),
        run=("AZ_BATCH_ACCOUNT_NAME?", "AZ_BATCH_JOB_ID"),
        items=("AZ_BATCH_TASK_ID",),
    ),
    System(
        name="azure-ml",
        title="Azure Machine Learning",
        source="https://learn.microsoft.com/azure/machine-learning/how-to-train-distributed-gpu",
        rule="A compute instance and its notebooks have no AZUREML_RUN_ID.",
        detect=("AZUREML_RUN_ID",),
        run=("AZUREML_ARM_SUBSCRIPTION?", "AZUREML_ARM_WORKSPACE_NAME?", "AZUREML_ROOT_RUN_ID|AZUREML_RUN_ID"),
        items=("AZUREML_RUN_ID",),
        ranks=(("RANK", "WORLD_SIZE"), ("NODE_RANK", "AZUREML_NODE_COUNT")),
    ),
    System(
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
    ),
    System(
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
    ),
)

_CLUSTERS = (
    System(
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
    ),
    System(
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
    ),
)

SYSTEMS: tuple[System, ...] = (*_LAUNCHERS, *_WORKFLOWS, *_SCHEDULERS, *_CLOUDS, *_CLUSTERS)
