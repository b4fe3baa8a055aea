"""Ray Train: two ranks that fail for good, and the experiment of that name once more."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress

import ray
from cluster_work import end_badly, me, seen_by_child, seen_by_thread, tell
from ray.train import RunConfig, ScalingConfig, WorkerGroupError
from ray.train.collective import barrier
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

import taskckpt


def train(config):
    context = me()
    checkpoint = context.checkpoint
    began = int(checkpoint.load_bytes_sync() or 0)
    barrier()  # nobody saves before all have loaded
    tell(
        config["what"], began=began, rank=context.rank, world_size=context.world_size, run=context.run,
        task=context.task, attempt=context.attempt, base=context.base, thread=seen_by_thread(), child=seen_by_child(),
    )  # fmt: skip
    with suppress(taskckpt.errors.UsageError):
        if context.rank == 1:
            checkpoint.save_sync(b"of rank 1")
            tell("rank 1 saved")
    try:
        taskckpt.checkpoint("my-key")
    except taskckpt.errors.UsageError as error:
        tell("key", error=str(error))
    for step in range(began + 1, 5):
        if context.rank == 0:
            checkpoint.save_sync(str(step).encode())
        barrier()
        if step == 2 and began == 0:
            end_badly("exception")


def fit(what, name):
    return DataParallelTrainer(
        train,
        train_loop_config={"what": what},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name=name, storage_path=sys.argv[1]),
    ).fit()


ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 * 2**20, logging_level=logging.ERROR)
with suppress(WorkerGroupError):
    fit("first", "counting")
fit("again", "counting")
ray.shutdown()
