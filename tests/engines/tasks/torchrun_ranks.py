"""Ranks that do one task together: rank 0 saves, all load, and one dies at each number given as ``rank:step:how``."""

import os
import signal
import sys
import tempfile
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import taskckpt
from taskckpt.errors import UsageError

me: Any = taskckpt.ctx()
restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
# A file of this start: in torchrun's own store a rank sometimes still finds the address of one that was killed.
store = f"file://{tempfile.gettempdir()}/group-{os.environ['TORCHELASTIC_RUN_ID']}-{restarts}"
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=store, timeout=timedelta(seconds=20), rank=rank, world_size=size)
saved = me.checkpoint.load_sync()
start = int(saved.read_text()) if saved else 0
print(f"{me.engine.engine} rank {me.rank} of {me.world_size}, attempt {me.attempt}, resumes from {start}", flush=True)
print(f"place {me.place.uri}", flush=True)
dist.barrier()
if me.rank != 0:
    try:
        me.checkpoint.save_sync(b"of another rank")
    except UsageError:
        print("rank may not save", flush=True)
for step in range(start + 1, 7):
    total = torch.ones(1)
    dist.all_reduce(total)
    assert int(total) == me.world_size
    if me.rank == 0:
        me.checkpoint.save_sync(str(step).encode())
    dist.barrier()
    for restart, death in enumerate(sys.argv[1:] or os.environ.get("DEATHS", "").split()):
        number, at, how = death.split(":")
        if (restart, int(number), int(at)) == (restarts, me.rank, step):
            print(f"rank {rank} dies after {at}", flush=True)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(f"rank {rank} dies after {at}")
print(f"rank {me.rank} has done it", flush=True)
dist.destroy_process_group()
