"""A task of ours that starts processes which do it together: each way on its own, given by name."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import taskckpt
from taskckpt.errors import UsageError

RANKS = Path(__file__).with_name("torchrun_ranks.py")


def one_rank(rank: int, size: int, store: str) -> None:
    """Like torchrun_ranks.py, started by another way."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    me: Any = taskckpt.ctx()
    saved = me.checkpoint.load_sync()
    start = int(saved.read_text()) if saved else 0
    print(f"rank {me.rank} of {me.world_size}, attempt {me.attempt}, resumes from {start}", flush=True)
    print(f"place {me.place.uri}", flush=True)
    dist.barrier()
    if me.rank == 0:
        me.checkpoint.save_sync(str(start + 2).encode())
    else:
        try:
            me.checkpoint.save_sync(b"of another rank")
        except UsageError:
            print("rank may not save", flush=True)
    dist.barrier()
    if store:  # accelerate removes its own, and fails if that is gone already
        dist.destroy_process_group()
    if start < 2 and rank == 1:
        raise RuntimeError("rank 1 dies")


def of_accelerate() -> None:
    from accelerate import Accelerator

    at = Accelerator(cpu=True)
    one_rank(at.process_index, at.num_processes, "")


def start_torchrun(deaths: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, "--monitor-interval", "0.1", str(RANKS), *deaths], check=True)


def start_spawn() -> None:
    with tempfile.TemporaryDirectory() as folder:
        spawn(one_rank, (2, f"{folder}/store"), nprocs=2)


def start_accelerate() -> None:
    from accelerate import debug_launcher

    debug_launcher(of_accelerate, num_processes=2)


@taskckpt.task(retries=1, on=Exception, wait_initial_s=0)
def train(way: str) -> None:
    me: Any = taskckpt.ctx()
    print(f"task attempt {me.attempt}", flush=True)
    print(f"place {me.place.uri}", flush=True)
    if os.environ.get("LOADS_FIRST"):
        me.checkpoint.load_sync()
    if way == "torchrun":
        start_torchrun(["1:3:raise"] if me.attempt == 0 else [])
    else:
        {"spawn": start_spawn, "accelerate": start_accelerate}[way]()
    # None of its ranks fenced the task that started them.
    me.checkpoint.load_sync()
    me.checkpoint.save_sync(b"100")
    print("task has done it", flush=True)


@taskckpt.task(retries=0)
def together() -> None:
    """In each of torchrun's workers."""
    start = f"{os.environ['TORCHELASTIC_RUN_ID']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    one_rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), f"{tempfile.gettempdir()}/group-{start}")


if __name__ == "__main__":
    if sys.argv[1] == "together":
        together()
    else:
        train(sys.argv[1])
