"""RQ: the job that this process works on.

A job keeps its id when it is retried or put back into its queue. When it was made is part of the identity, so that a
second job with an id of your own choice is another run; and so is what ``Repeat`` has left, as each repetition is.

What lies: ``retries_left`` counts down, and what it began with is not kept, so there is no attempt. A job whose
worker is gone is found only after its heartbeat has run out, and is then retried if retries are left, else
failed. A job may be retried while its first worker still runs; RQ knows no exception that ends a job without a
retry, so that a stale job is retried like any other, and then has the task again. Threads and children of a job
are told who they are where a process was made for it, so not with SimpleWorker.

Checked with RQ 2.12.0 and Redis: Worker and SimpleWorker.
"""

from __future__ import annotations

import sys

from taskckpt.engines._frames import local_of
from taskckpt.engines._task import PROCESS, EngineTask, name_of


def find() -> EngineTask | None:
    """The current job of this thread."""
    module = sys.modules.get("rq.job")
    current = getattr(module, "get_current_job", None)
    job = current() if current is not None else None
    if job is None:
        return None
    repetition = getattr(job, "repeats_left", None)
    return EngineTask(
        "rq",
        run=name_of("rq", job.id, job.created_at.isoformat(), *([] if repetition is None else [f"{repetition}-left"])),
        task=name_of(job.func_name),
        # Else the job is not let go of at a time that one could tell, as it stays in the traceback of its failure.
        execution=PROCESS if _is_horse() else (job.id, job.started_at),
        sources={
            "run": "get_current_job().id, .created_at" + ("" if repetition is None else ", .repeats_left"),
            "task": "get_current_job().func_name",
        },
    )


def _is_horse() -> bool:
    """Whether this process was made for this job. A SimpleWorker runs all jobs in its own."""
    return getattr(local_of("rq.worker.base", "perform_job", "self"), "_is_horse", False) is True
