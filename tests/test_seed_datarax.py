"""The programs of Datarax's page "Pipeline Checkpointing Quick Reference", and the signatures of its page
"Checkpoint Iterators", on taskckpt.

They are changed in their imports (``datarax.typing`` and ``datarax.checkpoint`` are ``taskckpt``), and where a note
beside them says so. They run on JAX, and on a stand-in for the little of it that they use.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from taskckpt import CheckpointableIterator, IteratorCheckpoint, PipelineCheckpoint

STEP_1 = """
import jax
from taskckpt import CheckpointableIterator

class SimplePipeline(CheckpointableIterator[dict[str, jax.Array]]):
    def __init__(self, data, batch_size=10, seed=42):
        self.data = data
        self.batch_size = batch_size
        self.rng = jax.random.key(seed)
        self.epoch = 0
        self.position = 0

    def get_state(self) -> dict:
        return {
            "rng": jax.random.key_data(self.rng),
            "epoch": self.epoch,
            "position": self.position,
        }

    def set_state(self, state: dict) -> None:
        self.rng = jax.random.wrap_key_data(state["rng"])
        self.epoch = state["epoch"]
        self.position = state["position"]

    # NOTE: this method is ours. The page does not show how the batches come about; here they depend on all three
    # of rng, epoch and position. An epoch has as many batches as there are in the data, and the position goes on
    # over epochs: with two of 160 batches the page's output comes out as it stands there.
    def __next__(self):
        if self.position == (self.epoch + 1) * (len(self.data) // self.batch_size):
            self.epoch += 1
            raise StopIteration
        self.position += 1
        self.rng, key = jax.random.split(self.rng)
        return {"x": self.data[jax.random.randint(key, (self.batch_size,), 0, len(self.data))]}
"""

STEP_2 = """
from taskckpt import PipelineCheckpoint

# NOTE: the page has "/path/to/checkpoints", which is nobody's to write to.
checkpoint_dir = "checkpoints"
checkpointer = PipelineCheckpoint(checkpoint_dir)
print(f"Checkpoint directory: {checkpoint_dir}")
"""

STEP_3 = """
step = 0
for epoch in range(2):
    for batch in pipeline:
        step += 1
        # Process batch...
        seen.append(batch)  # NOTE: ours

        if step % 100 == 0:  # Save every 100 steps
            checkpointer.save(
                pipeline,
                step=step,
                metadata={"epoch": epoch},
                keep=3,  # Keep last 3 checkpoints
            )
            print(f"Saved checkpoint at step {step}")
"""

STEP_4 = """
# Create new pipeline (simulating restart)
new_pipeline = SimplePipeline(data)
print(f"Before restore: position={new_pipeline.position}")

# Restore from latest checkpoint
checkpointer.restore_latest(new_pipeline)
print(f"After restore: position={new_pipeline.position}")

# Continue processing from checkpoint
for batch in new_pipeline:
    # Processing continues from saved position
    seen.append(batch)  # NOTE: ours; the page passes
"""

SETUP = """
import sys
{stand_in}
import numpy
data, seen = numpy.arange(1600), []
{step_1}
pipeline = SimplePipeline(data)
"""

# The few names of JAX that the programs use, for where it is not installed.
STAND_IN = """
import numpy
from types import ModuleType

class random(ModuleType):
    def key(seed): return numpy.array([0, seed], "uint32")
    def key_data(key): return key.copy()
    def wrap_key_data(data): return data.copy()
    def split(key): return numpy.random.default_rng(key).integers(2**32, size=(2, 2), dtype="uint32")
    def randint(key, shape, low, high): return numpy.random.default_rng(key).integers(low, high, shape)

sys.modules["jax"] = ModuleType("jax")
sys.modules["jax"].Array, sys.modules["jax"].random = numpy.ndarray, random
"""

DOCUMENTED = [
    (IteratorCheckpoint, "__init__", "base_dir, handler = None, async_checkpointing = False"),
    (PipelineCheckpoint, "__init__", "base_dir, handler = None, async_checkpointing = False"),
    *(
        (kind, name, parameters)
        for kind in (IteratorCheckpoint, PipelineCheckpoint)
        for name, parameters in (
            ("save_to_directory", "iterator, step = None, keep = 1, overwrite = False, metadata = None"),
            ("restore", "iterator, step = None"),
            ("restore_latest", "iterator"),
            ("get_latest_step", ""),
            ("list_checkpoints", ""),
        )
    ),
    (
        PipelineCheckpoint,
        "save_to_step",
        "data_stream, step, interval = 1000, keep = 5, overwrite = False, metadata = None",
    ),
]


def printed(program: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(params=["jax", "its stand-in"])
def setup(request: pytest.FixtureRequest) -> str:
    if request.param == "jax" and importlib.util.find_spec("jax") is None:
        pytest.skip("NOT TESTED with JAX: pip install -r tests/requirements-torch.txt, or make test-datarax")
    return SETUP.format(stand_in="" if request.param == "jax" else STAND_IN, step_1=STEP_1)


@pytest.mark.timeout(90)  # the first import of JAX on a slow disk
def test_quick_reference(setup: str) -> None:
    compare = (
        "rest, whole = seen[320:], seen[300:320]\n"
        "print(len(rest), all((a['x'] == b['x']).all() for a, b in zip(rest, whole, strict=True)))"
    )
    assert printed(setup + STEP_2 + STEP_3 + STEP_4 + compare) == [
        "Checkpoint directory: checkpoints",
        "Saved checkpoint at step 100",
        "Saved checkpoint at step 200",
        "Saved checkpoint at step 300",
        "Before restore: position=0",
        "After restore: position=300",
        "20 True",
    ]
    checkpointer = PipelineCheckpoint("checkpoints")
    assert list(checkpointer.list_checkpoints()) == [100, 200, 300]
    epochs = [one.metadata for one in checkpointer.checkpoint.checkpoints_sync()]
    assert epochs == [{"epoch": 1}, {"epoch": 1}, {"epoch": 0}]


@pytest.mark.timeout(90)
def test_quick_reference_in_another_process(setup: str) -> None:
    told = printed(setup + STEP_2 + STEP_3 + "print([batch['x'].tolist() for batch in seen[300:]])")
    after = setup + STEP_2 + STEP_4 + "print([batch['x'].tolist() for batch in seen])"
    assert printed(after)[-1] == told[-1]


@pytest.mark.parametrize(("kind", "name", "parameters"), DOCUMENTED)
def test_documented_parameters_and_defaults(kind: type, name: str, parameters: str) -> None:
    found = list(inspect.signature(getattr(kind, name)).parameters.values())[1:]
    documented = [part.strip() for part in parameters.split(",") if part.strip()]
    for parameter, text in zip(found, documented, strict=False):
        assert re.sub(r":.*?(?==|$)", " ", str(parameter)).replace("  ", " ").strip() == text
    further = found[len(documented) :]
    assert len(found) >= len(documented)
    assert all(one.kind is one.KEYWORD_ONLY and one.default is not one.empty for one in further)


def test_documented_members() -> None:
    checkpointer = PipelineCheckpoint("checkpoints")
    assert isinstance(checkpointer, IteratorCheckpoint)
    assert checkpointer.handler is not None
    assert checkpointer.get_latest_step() is None
    assert checkpointer.list_checkpoints() == {}
    assert not Path("checkpoints").exists()
    assert {"get_state", "set_state"} <= set(CheckpointableIterator.__abstractmethods__)
