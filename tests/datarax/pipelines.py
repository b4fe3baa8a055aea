"""Datarax's own pipelines, as the tests make them: each call gives a new one, as a new process would make it."""

from __future__ import annotations

from typing import Any, TypeAlias

import grain
import jax
import jax.numpy as jnp
import numpy as np
from datarax import Pipeline
from datarax.sources import MemorySource, MemorySourceConfig
from flax import nnx

from taskckpt import CheckpointableIterator

RECORDS = 16
BATCH = 4

Batch: TypeAlias = dict[str, Any]


class Noise(nnx.Module):
    """Adds random numbers, of a stream of its own."""

    def __init__(self, seed: int) -> None:
        self.rngs = nnx.Rngs(noise=seed)

    def __call__(self, batch: Batch) -> Batch:
        return {**batch, "x": batch["x"] + jax.random.normal(self.rngs.noise(), batch["x"].shape)}


class Scale(nnx.Module):
    """No state at all."""

    def __call__(self, batch: Batch) -> Batch:
        return {**batch, "x": batch["x"] * 3}


class Add(nnx.Module):
    """Two branches become one."""

    def __call__(self, left: Batch, right: Batch) -> Batch:
        return {**left, "x": left["x"] + right["x"]}


class RunningMean(nnx.Module):
    """Carries what it has seen in a variable."""

    def __init__(self) -> None:
        self.total = nnx.Variable(jnp.zeros((), jnp.float32))
        self.batches = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, batch: Batch) -> Batch:
        self.total[...] = self.total[...] + batch["x"].mean()
        self.batches[...] = self.batches[...] + 1
        return {**batch, "mean": jnp.full((BATCH,), self.total[...] / self.batches[...])}


def source(*, shuffle: bool, seed: int = 0) -> MemorySource:
    data = {"x": np.arange(2 * RECORDS, dtype=np.float32).reshape(RECORDS, 2), "i": np.arange(RECORDS)}
    return MemorySource(MemorySourceConfig(shuffle=shuffle), data, rngs=nnx.Rngs(seed))


def plain() -> Pipeline:
    return Pipeline(source=source(shuffle=False), stages=[], batch_size=BATCH, rngs=nnx.Rngs(0))


def shuffled() -> Pipeline:
    return Pipeline(source=source(shuffle=True), stages=[Scale()], batch_size=BATCH, rngs=nnx.Rngs(0))


def noisy() -> Pipeline:
    return Pipeline(source=source(shuffle=True), stages=[Noise(7), Scale()], batch_size=BATCH, rngs=nnx.Rngs(1))


def branching() -> Pipeline:
    return Pipeline.from_dag(
        source=source(shuffle=True),
        nodes={"noise": Noise(7), "more": Noise(8), "add": Add()},
        edges={"noise": [], "more": [], "add": ["noise", "more"]},
        sink="add",
        batch_size=BATCH,
        rngs=nnx.Rngs(2),
    )


def averaging() -> Pipeline:
    return Pipeline(source=source(shuffle=True), stages=[Noise(7), RunningMean()], batch_size=BATCH, rngs=nnx.Rngs(3))


class Epochs(CheckpointableIterator[Batch]):
    """Several epochs of a pipeline: a session of Datarax ends with its epoch, and knows nothing of others."""

    def __init__(self, pipeline: Pipeline, epochs: int) -> None:
        self.pipeline = pipeline
        self.epochs = epochs
        self.epoch = 0
        self.session: Any = iter(pipeline)

    def __next__(self) -> Batch:
        while self.epoch < self.epochs:
            for batch in self.session:
                return batch
            self.epoch += 1
            self.session = iter(self.pipeline)
            self.session.set_state({**self.session.get_state(), "position": 0})
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "session": self.session.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.session = iter(self.pipeline)
        self.session.set_state(state["session"])


class Whole(CheckpointableIterator[Batch]):
    """A pipeline with all that it holds: what its session leaves out (variables of stages, random keys) as well."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.session: Any = iter(pipeline)

    def __next__(self) -> Batch:
        return next(self.session)

    def get_state(self) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(self.pipeline))

    def set_state(self, state: dict[str, Any]) -> None:
        held = nnx.state(self.pipeline)
        nnx.replace_by_pure_dict(held, state)
        nnx.update(self.pipeline, held)
        self.session = iter(self.pipeline)


def grain_iterator() -> Any:
    dataset = grain.MapDataset.range(RECORDS).shuffle(seed=5).map(lambda number: {"i": np.asarray(number)})
    return iter(dataset.repeat(2).batch(BATCH).to_iter_dataset())


def values(batch: Batch) -> dict[str, Any]:
    """A batch as it can be compared: what was computed, to the last bit."""
    return {name: (str(array.dtype), np.asarray(array).tolist()) for name, array in sorted(batch.items())}
