"""Ray: tasks, actors, Ray Train.

The id of a task or of an actor's method call is the same on each of Ray's retries, and in every cluster: the first task
of each is ``c8ef45cc...01000000``, in job ``01000000``. So the run is the cluster's session, which is another one each
time that a cluster starts, and the job in it, which is one driver.

An actor has the identity of its creation within ``__init__``: that one stays over its restarts. What its methods do is
a task each, so that the items of a pool of actors never mix; an actor that keeps state saves it with the checkpoint
that it got in ``__init__``.

What lies: a plain thread gets a random task id (but no name, by which it is known here), and ``RAY_JOB_ID`` is
``ffffffff`` in workers that were started in advance, so it is not read. What a task that is retried submits again are
new tasks for Ray, with new ids and attempt 0: name them with ``key=``. The attempt comes from a call that is not
public; without it nobody knows. It also counts for calls that only waited when their actor died, and a call that was
done runs again if the answer was lost.

Ray Train: the experiment's folder is the identity, as it is for Ray Train, which goes on from what it finds there. All
ranks do one task. Restarts of the workers (``max_failures``) are not counted anywhere.

Checked with Ray 2.60.0, Ray Train V2.
"""

from __future__ import annotations

import sys
from typing import Any

from taskckpt.engines._task import EngineTask, name_of

# ray.WORKER_MODE: this process runs tasks. Asked anywhere else for its task, Ray logs a warning.
WORKER_MODE = 1


def find() -> EngineTask | None:
    """The task, method call or Ray Train worker that this thread runs."""
    worker = getattr(sys.modules.get("ray._private.worker"), "global_worker", None)
    if getattr(worker, "mode", None) != WORKER_MODE:
        return None
    train = getattr(sys.modules.get("ray.train.v2._internal.execution.context"), "_train_context", None)
    return _task(worker) if train is None else _train(train)


def _task(worker: Any) -> EngineTask | None:
    context = sys.modules["ray"].get_runtime_context()
    name = context.get_task_name()
    if not name:  # a thread that Ray did not start
        return None
    task_id = context.get_task_id()
    attempt = _attempt(worker)
    return EngineTask(
        "ray",
        run=name_of("ray", context.get_session_name(), context.get_job_id()),
        task=name_of(name, task_id),
        attempt=attempt,
        execution=None if attempt is None else (task_id, attempt),
        sources={
            "run": "ray.get_runtime_context().get_session_name(), .get_job_id()",
            "task": "ray.get_runtime_context().get_task_name(), .get_task_id()",
            "attempt": "ray._private.worker.global_worker.core_worker.get_current_task_attempt_number()",
        },
    )


def _attempt(worker: Any) -> int | None:
    try:
        attempt: int = worker.core_worker.get_current_task_attempt_number()
    except AttributeError:  # not public: another version may have another
        return None
    return attempt


def _train(context: Any) -> EngineTask:
    storage = context.get_storage()
    return EngineTask(
        "ray",
        run=name_of("ray-train", storage.storage_filesystem.type_name, storage.experiment_fs_path),
        task="train",
        base=_base(storage, context.train_run_context.run_config),
        base_is_of_run=True,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        in_all_threads=True,
        alone=True,  # the process is one of Ray Train's workers, and nothing else
        # It runs the training function, and is another one after each restart of the workers.
        execution=context.execution_context.training_thread_runner,
        sources={
            "run": "ray.train.get_context().get_storage().experiment_fs_path",
            "task": "ray.train: all ranks do one task",
            "base": "ray.train.RunConfig(storage_path=..., name=...)",
            "rank": "ray.train.get_context().get_world_rank()",
            "world_size": "ray.train.get_context().get_world_size()",
        },
    )


def _base(storage: Any, config: Any) -> str | None:
    """The experiment's folder: whoever deletes it starts over, with Ray Train and here."""
    if storage.storage_filesystem.type_name == "local":
        folder: str = storage.experiment_fs_path
        return folder
    url = str(config.storage_path)
    # What a file system of the user's own, or the options in a URL, need to know is not known here.
    if config.storage_filesystem is not None or "://" not in url or "?" in url:
        return None
    return f"{url.rstrip('/')}/{storage.experiment_dir_name}"
