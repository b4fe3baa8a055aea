"""Snakemake: the job of a ``script:`` (or ``notebook:``), which finds its ``snakemake`` object in the main module.

A job is known by its rule and its wildcards. Snakemake has no name for a run, and runs a job again whenever its
inputs, code or parameters change: without ``TASKCKPT_RUN`` that would find the state of the execution before, so it is
ambiguous. One line at the top of the Snakefile gives each run a name, which all its jobs inherit. In ``run:`` and
``shell:`` nothing tells the job: name it there (``TASKCKPT_TASK={rule}-{wildcards.x} python ...``, or a key).

What lies: the number of attempts is known to callables of resources only; a resource called ``attempt`` is read. What
Snakemake makes goes: the outputs of a job that failed are deleted before the next attempt, also a ``directory()``, and
a shadow folder is another one each time. No state may lie there. A script cannot say that it must not be retried.

Checked with Snakemake 9.27.1.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from taskckpt.engines._task import PROCESS, EngineTask, name_of


def find() -> EngineTask | None:
    """The job whose script is this process's main module."""
    job: Any = getattr(sys.modules.get("__main__"), "snakemake", None)
    if type(job).__name__ != "Snakemake" or not type(job).__module__.startswith("snakemake."):
        return None
    wildcards = [f"{name}={value}" for name, value in sorted(job.wildcards.items())]
    repeat = [] if job.bench_iteration is None else [f"repeat {job.bench_iteration}"]
    attempt = job.resources.get("attempt")
    is_named = bool(os.environ.get("TASKCKPT_RUN", "").strip())
    return EngineTask(
        "snakemake",
        run="snakemake",
        task=name_of(job.rule, *wildcards, *repeat),
        attempt=attempt - 1 if isinstance(attempt, int) and attempt > 0 else None,
        ambiguous=None if is_named else "Snakemake does not name its runs: a later one would find what this one saves.",
        hint=None
        if is_named
        else "Begin the Snakefile with: import os, uuid; os.environ.setdefault('TASKCKPT_RUN', str(uuid.uuid4()))",
        in_all_threads=True,
        execution=PROCESS,
        sources={
            "task": "snakemake.rule, snakemake.wildcards",
            "attempt": "snakemake.resources.attempt - 1",
        },
    )
