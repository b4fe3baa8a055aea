"""A data pipeline, shuffled anew in each epoch, that is killed twice and goes on with the very next batch.

    python resumable_iterator.py

The pipeline says what its state is. ``PipelineCheckpoint`` stores it after each batch, and puts it back.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from typing import Any

from taskckpt import CheckpointableIterator, PipelineCheckpoint


class Batches(CheckpointableIterator[list[int]]):
    """Numbers in batches of five, for some epochs."""

    def __init__(self, length: int = 20, epochs: int = 3, seed: int = 42) -> None:
        self.epochs = epochs
        self.epoch = 0
        self.position = 0
        self.random = random.Random(seed)
        self.order = list(range(length))
        self.random.shuffle(self.order)

    def __next__(self) -> list[int]:
        if self.position == len(self.order):
            if self.epoch + 1 == self.epochs:
                raise StopIteration
            self.epoch += 1
            self.position = 0
            self.random.shuffle(self.order)
        self.position += 5
        return self.order[self.position - 5 : self.position]

    def get_state(self) -> dict[str, Any]:
        """All that the next batch depends on."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "random": self.random.getstate(),
            "order": self.order,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """As it was."""
        self.epoch = state["epoch"]
        self.position = state["position"]
        self.random.setstate(state["random"])
        self.order = state["order"]


def process(folder: str, dies_after: int) -> None:
    """Go on where the process before was, and die after some batches."""
    batches = Batches()
    checkpointer = PipelineCheckpoint(folder, fingerprint="the numbers to 20")
    if checkpointer.has_checkpoint():
        checkpointer.restore_latest(batches)
    step = checkpointer.get_latest_step() or 0
    for batch in batches:
        step += 1
        print(f"batch {step}: {batch}", flush=True)  # the work
        checkpointer.save(batches, step=step, metadata={"epoch": batches.epoch})
        dies_after -= 1
        if dies_after == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Start three processes, of which two die, and look at what they did together."""
    found: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for dies_after in (3, 5, 0):
            print(f"a process that {f'is killed after {dies_after} batches' if dies_after else 'lives'}", flush=True)
            command = [sys.executable, __file__, folder, str(dies_after)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=not dies_after)
            print(done.stdout, end="")
            found += done.stdout.splitlines()
    if found != [f"batch {number}: {batch}" for number, batch in enumerate(Batches(), 1)]:
        raise SystemExit("These are not the batches of one process that lives.")
    print(f"The same {len(found)} batches as without the kills.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        process(sys.argv[1], int(sys.argv[2]))
    else:
        main()
