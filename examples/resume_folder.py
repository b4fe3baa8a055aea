"""A task whose state is a folder of artifacts, as training frameworks write it.

    python resume_folder.py

A folder is stored as one .tar.gz. What is loaded is the folder as it was, and ``latest_checkpoint``
finds the framework's newest file in it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import taskckpt

crashes_after = [2, 4]


@taskckpt.task(retries=3, wait_initial_s=0.1)
def train(epochs: int) -> list[float]:
    """Train for some epochs, saving the whole folder after each."""
    context = taskckpt.ctx()
    assert context is not None  # inside a task there always is one
    checkpoint = context.checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        artifacts = Path(scratch, "artifacts")
        restored = checkpoint.load_sync(to=artifacts)
        last = taskckpt.latest_checkpoint(restored, "**/epoch-*.json")
        losses: list[float] = json.loads(last.read_text()) if last else []
        print(f"attempt {context.attempt} resumes from {last.name if last else 'nothing'}")

        (artifacts / "models").mkdir(parents=True, exist_ok=True)
        for epoch in range(len(losses) + 1, epochs + 1):
            losses.append(1 / epoch)  # the training
            (artifacts / "models" / f"epoch-{epoch}.json").write_text(json.dumps(losses))
            checkpoint.save_sync(artifacts)
            if crashes_after and crashes_after[0] == epoch:
                crashes_after.pop(0)
                raise RuntimeError(f"the worker went away after epoch {epoch}")
        print("artifacts:", *sorted(path.name for path in artifacts.rglob("*.json")))
        return losses


if __name__ == "__main__":
    print("losses:", train(6))
