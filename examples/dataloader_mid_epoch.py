"""A training run that is killed in the middle of an epoch, and sees each batch exactly once all the same.

    pip install torch torchdata
    python dataloader_mid_epoch.py

Every few batches the network, the optimizer and the losses so far are saved. Each of these saves carries where the
loader is: its epoch, its batch, and the state of its shuffle. So whatever is loaded, the next batch is the right one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import torch  # pyright: ignore[reportMissingImports]
from torch.utils.data import TensorDataset  # pyright: ignore[reportMissingImports]
from torchdata.stateful_dataloader import StatefulDataLoader  # pyright: ignore[reportMissingImports]

import taskckpt

EPOCHS = 2
SAVED_EVERY = 6
KILLED_AFTER = 23  # batches: the second epoch has begun, and the last save was some batches ago


def batches() -> StatefulDataLoader[tuple[torch.Tensor, ...]]:
    """Points and their sums, shuffled anew in each epoch: 16 batches."""
    points = torch.linspace(0, 1, 256 * 4).reshape(256, 4)
    return StatefulDataLoader(TensorDataset(points, points.sum(dim=1)), batch_size=16, shuffle=True)


def train(key: str, *, dies_after: int | None = None) -> list[float]:
    """Train a small network; ``dies_after`` so many batches the process kills itself."""
    torch.manual_seed(7)
    network = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses: list[float] = []

    checkpoint = taskckpt.checkpoint(key)
    state = checkpoint.load_state_sync()
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
        print(f"{key}: resumes after batch {len(losses)}", flush=True)

    for inputs, targets in checkpoint.iterate(batches(), epochs=EPOCHS):
        loss = torch.nn.functional.mse_loss(network(inputs)[:, 0], targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % SAVED_EVERY == 0:
            checkpoint.save_state_sync(
                {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            )
        if len(losses) == dies_after:
            print(f"{key}: killed after batch {len(losses)}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.clear_sync()
    return losses


def main() -> None:
    """Train once in peace and once with a kill; compare."""
    calm = train("loader-calm")
    status = subprocess.run([sys.executable, __file__, "dies"], check=False).returncode
    assert status == -signal.SIGKILL, status
    killed = train("loader-killed")
    if killed != calm:
        sys.exit("The two curves differ.")
    print(f"The same {len(calm)} losses, to the last bit, as without the kill.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train("loader-killed", dies_after=KILLED_AFTER)
    else:
        main()
