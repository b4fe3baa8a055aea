"""A training run that is killed with SIGKILL, and gives the same losses as one that was not.

    pip install torch
    python pytorch_task.py

The network, the optimizer with its momentum and the random number generator are saved together with the
losses so far. Leave one of them out, and the two curves part at the kill.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]

import taskckpt

EPOCHS = 12
KILLED_AFTER = 5


def train(key: str, *, dies_after: int | None = None) -> list[float]:
    """Train a small network on noisy data; ``dies_after`` an epoch the process kills itself."""
    torch.manual_seed(7)
    network = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses: list[float] = []

    checkpoint = taskckpt.checkpoint(key)
    restored = checkpoint.load_sync()
    if restored is not None:
        state = torch.load(restored / "last.ckpt", weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        losses = state["losses"]
        print(f"{key}: resumes after epoch {len(losses)}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        for epoch in range(len(losses) + 1, EPOCHS + 1):
            losses.append(train_epoch(network, optimizer))
            state = {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "losses": losses,
            }
            torch.save(state, Path(scratch, "last.ckpt"))
            checkpoint.save_sync(scratch)
            if epoch == dies_after:
                print(f"{key}: killed after epoch {epoch}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.clear_sync()
    return losses


def train_epoch(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Make ten steps on fresh random data; give the mean loss."""
    total = 0.0
    for _ in range(10):
        inputs = torch.randn(32, 4)
        targets = inputs.sum(dim=1, keepdim=True) + 0.1 * torch.randn(32, 1)
        loss = torch.nn.functional.mse_loss(network(inputs), targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        total += loss.item()
    return total / 10


def main() -> None:
    """Train once in peace and once with a kill; compare."""
    calm = train("pytorch-calm")
    status = subprocess.run([sys.executable, __file__, "dies"], check=False).returncode
    assert status == -signal.SIGKILL, status
    killed = train("pytorch-killed")
    print("losses:", " ".join(f"{loss:.4f}" for loss in killed))
    if killed != calm:
        sys.exit("The two curves differ.")
    print(f"The same {len(calm)} losses, to the last bit, as without the kill.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train("pytorch-killed", dies_after=KILLED_AFTER)
    else:
        main()
