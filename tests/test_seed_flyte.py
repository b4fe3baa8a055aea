"""The programs of Flyte's page "Data Persistence and Checkpointing", run on taskckpt.

They are changed in their imports (``flyte.ctx`` is ``taskckpt.ctx``, ``env.task`` is ``taskckpt.task``), and
where a note beside them says so.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

RESILIENT_TASK = """
import taskckpt

failures = [RuntimeError("at 3"), RuntimeError("at 7")]

@taskckpt.task(retries=3, wait_initial_s=0)
def resilient_task(n_iterations: int) -> int:
    # Access the checkpoint helper
    checkpoint = taskckpt.ctx().checkpoint

    if checkpoint is None:
        # Checkpointing is not configured for this execution
        return 0

    # Load the path to the previous checkpoint data
    prev_path = checkpoint.load_sync()
    start_iteration = 0

    if prev_path:
        # If prev_path is not None, it points to a local file or directory
        # containing the data from the last successful save_sync()
        state_bytes = prev_path.read_bytes()
        start_iteration = int(state_bytes.decode())
        print(f"Resuming from iteration {start_iteration}")

    for i in range(start_iteration, n_iterations):
        # Perform work...
        # NOTE: these two lines are ours. The page has no work here, and so nothing that fails.
        if failures and i == int(str(failures[0])[3:]):
            raise failures.pop(0)
        current_result = i + 1

        # Save state after each successful iteration
        checkpoint.save_sync(f"{current_result}".encode())

    return n_iterations

print(resilient_task(10))
"""

TRAIN_MODEL = """
import asyncio
import taskckpt
import pathlib
import torch

# NOTE: the page has no model, and its epochs cannot be told apart after a restart: it begins with epoch 0 again.
# So here the third epoch of all fails once, and what the retry restored is printed.
class Model(torch.nn.Linear):
    saved = 0
    def state_dict(self, *args, **kwargs):
        Model.saved += 1
        if Model.saved == 3:
            raise RuntimeError("out of memory")
        return super().state_dict(*args, **kwargs)

model = Model(2, 1)

@taskckpt.task(retries=2, wait_initial_s=0)
async def train_model(epochs: int):
    cp = taskckpt.ctx().checkpoint

    # Restore directory
    prev_cp_path = await cp.load()
    if prev_cp_path:
        # Find the newest checkpoint file matching a pattern
        last_ckpt = taskckpt.latest_checkpoint(prev_cp_path, "*.pt")
        if last_ckpt:
            model_state = torch.load(last_ckpt)
            # Load state into model...
            print(last_ckpt.name, sorted(model_state))  # NOTE: ours

    # Training loop...
    for epoch in range(epochs):
        # Save a directory of artifacts
        checkpoint_dir = pathlib.Path("checkpoints")
        checkpoint_dir.mkdir(exist_ok=True)
        torch.save(model.state_dict(), checkpoint_dir / f"epoch_{epoch}.pt")

        # This uploads the entire 'checkpoints' directory as a tarball
        await cp.save(checkpoint_dir)

asyncio.run(train_model(4))
"""

PERSISTENT_COUNTER = """
import taskckpt
import pathlib

@taskckpt.task(retries=5, wait_initial_s=0)
def persistent_counter(target: int) -> int:
    checkpoint = taskckpt.ctx().checkpoint
    if not checkpoint:
        return 0

    # 1. Restore
    prev_path = checkpoint.load_sync()
    count = 0
    if prev_path:
        count = int(prev_path.read_text())
    print("from", count)  # NOTE: ours

    # 2. Execute and Persist
    while count < target:
        count += 1
        # Simulate work or potential failure
        # NOTE: as on the page, this fails at 5 in every attempt, so no number of retries gets past it. That it
        # fails in the first attempt only is ours.
        if count == 5 and taskckpt.ctx().attempt in FAILING:
            raise RuntimeWarning("Simulated failure at step 5")

        # Save current progress
        checkpoint.save_sync(str(count).encode())

    return count

print(persistent_counter(8))
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    Path("program.py").write_text(program)
    command = [sys.executable, "program.py"]
    return subprocess.run(command, capture_output=True, text=True, timeout=18, check=False)


def printed(program: str) -> list[str]:
    done = run(program)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_resilient_task() -> None:
    assert printed(RESILIENT_TASK) == ["Resuming from iteration 3", "Resuming from iteration 7", "10"]


def test_train_model() -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("NOT TESTED: needs torch (pip install -r tests/requirements-torch.txt)")
    assert printed(TRAIN_MODEL) == ["epoch_1.pt ['bias', 'weight']"]


def test_persistent_counter() -> None:
    assert printed("FAILING = [0]\n" + PERSISTENT_COUNTER) == ["from 0", "from 4", "8"]


def test_persistent_counter_as_on_the_page_fails_for_ever_but_never_from_zero_again() -> None:
    done = run("FAILING = range(100)\n" + PERSISTENT_COUNTER)
    assert done.stdout.splitlines() == ["from 0", *["from 4"] * 5]
    assert done.stderr.splitlines()[-1] == "RuntimeWarning: Simulated failure at step 5"
