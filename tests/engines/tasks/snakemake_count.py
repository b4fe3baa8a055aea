"""A script of Snakemake that dies once, and counts."""

import os
import signal
from typing import Any

import taskckpt

job: Any = globals()["snakemake"]
me: Any = taskckpt.ctx()
saved = me.checkpoint.load_sync()
start = int(saved.read_text()) if saved else 0
print(f"{job.output[0]} attempt {me.attempt} resumes from {start}", flush=True)
for done in range(start + 1, 7):
    me.checkpoint.save_sync(str(done).encode())
    if done == 3 and job.params.dies == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if done == 3 and job.params.dies == "raise":
        raise RuntimeError("dies after 3")
    if done == 5 and job.params.dies == "stale":
        other = taskckpt.Checkpoint(me.place.uri)
        other.load_sync()
        other.save_sync(b"5")
with open(job.output[0], "w") as file:
    file.write(f"{me.run} {me.task}")
