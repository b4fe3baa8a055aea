"""A script of Snakemake that dies, is retried and goes on.

    pip install snakemake
    python examples/engines/with_snakemake.py

This file is both: run by hand it writes a Snakefile and starts Snakemake; in a job it is the script.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import taskckpt

SNAKEFILE = f"""
import os, uuid
os.environ.setdefault("TASKCKPT_RUN", str(uuid.uuid4()))  # each run of Snakemake starts afresh

rule count:
    output: "counted.txt"
    params: to=10
    retries: 3
    script: "{Path(__file__).resolve()}"
"""


def count(to: int) -> int:
    cp = taskckpt.checkpoint()
    saved = cp.load_sync()
    start = int(saved.read_text()) if saved else 0
    print("resumes from", start, flush=True)
    for done in range(start, to):
        if done in (3, 7) and done != start:
            raise RuntimeError(f"dies at {done}")
        cp.save_sync(str(done + 1).encode())
    return to


job = globals().get("snakemake")
if job is not None:
    Path(job.output[0]).write_text(f"counted to {count(job.params.to)}\n")
elif __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "Snakefile").write_text(SNAKEFILE)
        subprocess.run([sys.executable, "-m", "snakemake", "--cores", "1", "--quiet"], cwd=folder, check=True)
        print(Path(folder, "counted.txt").read_text())
