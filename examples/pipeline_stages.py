"""A pipeline of three stages that is killed in the middle of the second one, and goes on there.

    python pipeline_stages.py

Each stage runs once, and what it gave is stored with it. Whoever starts the pipeline again gets the results of the
stages that are done without running them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

from taskckpt.stages import CheckpointManager


def pipeline(folder: str) -> None:
    """Rows, then clean rows, then a model; each comes after the one before."""
    manager = CheckpointManager(folder)

    @manager.stage
    def ingest() -> list[int]:
        print("ingest runs", flush=True)
        return [3, -1, 2]

    @manager.stage(after=["ingest"])
    def clean(rows: list[int]) -> list[int]:
        print("clean runs", flush=True)
        if "dies" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
        return [row for row in rows if row > 0]

    # If the model's version is another one, this stage runs again, and no other.
    @manager.stage(after=["clean"], fingerprint="model 1")
    def train(rows: list[int]) -> float:
        print("train runs", flush=True)
        return sum(rows) / len(rows)

    print("model:", train(clean(ingest())), flush=True)
    print(manager)


def main() -> None:
    """Start the pipeline twice; the first process dies."""
    with tempfile.TemporaryDirectory() as folder:
        for how in ("dies", "lives"):
            print(f"a process that {how}:", flush=True)
            subprocess.run([sys.executable, __file__, folder, how], check=how == "lives")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        pipeline(sys.argv[1])
    else:
        main()
