"""The public API as type checkers see it. Not run: checked, by ``test_api.py`` and by ``make check``.

A line that must be an error carries a ``type: ignore`` with its code: if it were no error, mypy would say
that the comment is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, assert_type

import taskckpt
from taskckpt import (
    AmbiguousIdentityError,
    BestN,
    Budget,
    Checkpoint,
    CheckpointableIterator,
    CheckpointInfo,
    CheckpointManager,
    EveryNSteps,
    EverySeconds,
    EverySteps,
    IteratorCheckpoint,
    LatestN,
    PendingSave,
    PipelineCheckpoint,
    PruneDecision,
    StaleAttemptError,
    TaskckptError,
    TaskckptWarning,
    TaskContext,
    checkpoint,
    ctx,
    engines,
    errors,
    latest_checkpoint,
    task,
)
from taskckpt.stages import StageStatus, fingerprint_of
from taskckpt.testing import InterceptedStore, instant_retries, intercepted

# --- Checkpoint --------------------------------------------------------------------------------

cp = Checkpoint("s3://bucket/task")
Checkpoint(Path("a"), Path("b"))
Checkpoint("a", ["b", Path("c")])
Checkpoint("a", None, keep=None, storage_options={"key": "k", "client_kwargs": {}}, timeout_s=1.5, read_only=True)
Checkpoint("a", src=("b", "c"), keep=1, src_kind="folder")
Checkpoint()  # type: ignore[call-arg]
Checkpoint(b"a")  # type: ignore[arg-type]
Checkpoint("a", 7)  # type: ignore[arg-type]
Checkpoint("a", "b", 3)  # type: ignore[call-arg]
Checkpoint("a", keep="3")  # type: ignore[arg-type]
Checkpoint("a", src_kind="tar")  # type: ignore[arg-type]
Checkpoint("a", overwrite=True)  # type: ignore[call-arg]

assert_type(cp.load_sync(), Path | None)
assert_type(cp.load_sync(to="folder", replace=True), Path | None)
assert_type(cp.load_sync(to=Path("folder")), Path | None)
assert_type(cp.load_bytes_sync(), bytes | None)
assert_type(cp.save_sync(b"1"), CheckpointInfo)
assert_type(cp.save_sync(b"1", step=1, metadata={"a": [1, None]}, metrics={"loss": 1}, pin=True), CheckpointInfo)
cp.save_sync(b"1", step="1")  # type: ignore[arg-type]
cp.save_sync(b"1", metadata={"a": object()})  # type: ignore[dict-item]
cp.save_state_sync({}, steps=1)  # type: ignore[call-arg]
assert_type(cp.clear_sync(), None)
cp.save_sync(bytearray(b"1"))
cp.save_sync(memoryview(b"1"))
cp.save_sync("folder")
cp.save_sync(Path("folder"))
cp.save_sync(7)  # type: ignore[arg-type]
cp.save_sync({"step": 1})  # type: ignore[arg-type]
cp.save_sync()  # type: ignore[call-arg]
cp.load_sync("folder")  # type: ignore[call-arg, arg-type]
cp.load_sync().read_bytes()  # type: ignore[union-attr]  # it may be None: that is the point

assert_type(cp.load_sync(step=1), Path | None)
assert_type(cp.load_bytes_sync(where={"epoch": 1}), bytes | None)
assert_type(cp.load_state_sync(best="loss", mode="max"), dict[str, Any] | None)
cp.load_sync(mode="highest")  # type: ignore[arg-type]
cp.load_bytes_sync(stp=1)  # type: ignore[call-arg]
assert_type(cp.loaded, CheckpointInfo | None)
assert_type(cp.checkpoints_sync(), list[CheckpointInfo])
assert_type(cp.steps_sync(), list[int])
assert_type(cp.latest_step_sync(), int | None)
assert_type(cp.pin_sync(1), CheckpointInfo)
assert_type(cp.rollback_sync(cp.unpin_sync(1)), CheckpointInfo)
assert_type(cp.prune_sync(dry_run=True), list[PruneDecision])
assert_type(cp.should_save(1), bool)
Checkpoint("a", keep=LatestN(3) | BestN(1, "loss", mode="max") | EveryNSteps(100))
Checkpoint("a", save_policy=EverySteps(10) | EverySeconds(60) | Budget("2%", mtbf_s=3600))
Checkpoint("a", fork_from=cp.checkpoints_sync()[0])
for number in cp.iterate([1, 2], every="60s", shuffle=7, epochs=2):
    assert_type(number, int)

assert_type(cp.save_state_sync({"step": 1}), CheckpointInfo)
assert_type(cp.load_state_sync(), dict[str, Any] | None)
cp.save_state_sync([1])  # type: ignore[arg-type]
cp.save_state_sync({1: 2})  # type: ignore[dict-item]
saving = cp.save_later(b"1")
assert_type(saving, PendingSave)
assert_type(cp.save_later({"step": 1}, policy="queue", progress=True), PendingSave)
assert_type(saving.result(), bool)
assert_type(saving.result(timeout_s=1.5), bool)
assert_type(saving.done(), bool)
assert_type(cp.wait(), None)
cp.wait(timeout_s=3)
cp.save_later(7)  # type: ignore[arg-type]
cp.save_later(b"1", policy="newest")  # type: ignore[arg-type]
cp.save_later(b"1", "queue")  # type: ignore[call-arg]

assert_type(cp.path, Path | None)
assert_type(cp.prev_exists(), bool)
assert_type(cp.remote_source, str | None)
assert_type(cp.remote_destination, str)
cp.path = Path("x")  # type: ignore[misc]

assert_type(Checkpoint.of(key="k"), Checkpoint)
assert_type(Checkpoint.of(run="r", task="t", base=Path("b"), storage_options={}, timeout_s=3), Checkpoint)
Checkpoint.of("k")  # type: ignore[call-arg]


class Mine(Checkpoint):
    """May be subclassed."""


assert_type(Mine.of(key="k"), Mine)


async def asynchronous() -> None:
    assert_type(await cp.load(), Path | None)
    assert_type(await cp.load(to="folder", replace=True), Path | None)
    assert_type(await cp.load_bytes(), bytes | None)
    await cp.save(b"1")
    await cp.save_state({"step": 1})
    assert_type(await cp.load_state(), dict[str, Any] | None)
    assert_type(await cp.save_later(b"1"), bool)
    await cp.clear()
    await cp.save(7)  # type: ignore[arg-type]


# --- context -----------------------------------------------------------------------------------

current = ctx()
assert_type(current, TaskContext | None)
current.run  # type: ignore[union-attr]  # noqa: B018
assert current is not None
assert_type(current.run, str)
assert_type(current.task, str)
assert_type(current.attempt, int | None)
assert_type(current.base, str)
assert_type(current.key, str | None)
assert_type(current.rank, int | None)
assert_type(current.world_size, int | None)
assert_type(ctx(scope="lineage", on_clear="fresh"), TaskContext | None)
ctx(scope="all")  # type: ignore[arg-type]
assert_type(checkpoint("shard", per_rank=True, keep=5), Checkpoint)
assert_type(current.checkpoint, Checkpoint)
assert_type(current.checkpoint_paths.checkpoint_path, str)
assert_type(current.checkpoint_paths.prev_checkpoint_path, str)
assert_type(current.origins["run"], str)
assert_type(current.environ(), dict[str, str])
assert_type({**os.environ, **current.environ()}, dict[str, str])
current.attempt = 3  # type: ignore[misc]

assert_type(checkpoint(), Checkpoint)
assert_type(checkpoint("nightly"), Checkpoint)
assert_type(checkpoint(key="nightly"), Checkpoint)
checkpoint(7)  # type: ignore[arg-type]

# --- task --------------------------------------------------------------------------------------


@task
def bare(x: int, *, y: str = "") -> float:
    return x + len(y)


@task()
def called(x: int) -> float:
    return x


@task(
    retries=5,
    on=(OSError, ValueError),
    key="nightly",
    run="r",
    base=Path("b"),
    keep=None,
    storage_options={"anon": True},
    timeout_s=10,
    wait_initial_s=0.1,
    wait_max_s=1,
    clear_on_success=False,
)
def with_options(x: int) -> list[int]:
    return [x]


@task(key=lambda x: f"nightly-{x}", on=lambda error: "again" in str(error))
async def coroutine(x: int) -> str:
    return str(x)


assert_type(bare(1, y="a"), float)
assert_type(called(1), float)
assert_type(with_options(x=1), list[int])
pending: Coroutine[Any, Any, str] = coroutine(1)
bare("1")  # type: ignore[arg-type]
bare(1, z=2)  # type: ignore[call-arg]
with_options()  # type: ignore[call-arg]
pending = coroutine("1")  # type: ignore[arg-type]
task(retries="3")  # type: ignore[call-overload]
task(retry=3)  # type: ignore[call-overload]
task(on=KeyboardInterrupt)  # type: ignore[arg-type]
task(7)  # type: ignore[call-overload]

plain: Callable[[int], float] = called


async def awaited() -> None:
    assert_type(await coroutine(1), str)


class Trainer:
    """Methods keep their types as well."""

    @task(key=lambda self, steps: f"train-{steps}")
    def train(self, steps: int) -> str:
        return str(steps)


assert_type(Trainer().train(3), str)

# --- the rest ----------------------------------------------------------------------------------

assert_type(latest_checkpoint(None), Path | None)
assert_type(latest_checkpoint("root", "**/*.ckpt", key=lambda path: path.stat().st_size), Path | None)
assert_type(latest_checkpoint(cp.load_sync(), glob="*.ckpt"), Path | None)
latest_checkpoint(7)  # type: ignore[arg-type]

try:
    cp.save_sync(b"1")
except StaleAttemptError as error:
    assert_type(error.code, str)
    assert_type(error.uri, str | None)
    assert_type(error.hint, str | None)
except AmbiguousIdentityError as error:
    as_usage: ValueError = error
except errors.NotFoundError as error:
    as_builtin: FileNotFoundError = error
except TaskckptError as error:
    assert_type(error.message, str)

issubclass(TaskckptWarning, UserWarning)

# --- stages ------------------------------------------------------------------------------------

manager = CheckpointManager()
CheckpointManager("s3://bucket/pipeline", keep=None, storage_options={"key": "k"}, timeout_s=1.5)
CheckpointManager(Path("a"), keep=LatestN(3) | BestN(1, "loss"))
CheckpointManager(cp)
CheckpointManager(7)  # type: ignore[arg-type]
assert_type(manager.save_checkpoint("a", metadata={"rows": [1, None]}), None)
assert_type(manager.has_checkpoint("a"), bool)
assert_type(manager.clear_checkpoints(), None)
assert_type(manager.clear_checkpoints("a"), None)
assert_type(manager.run("a", len, [1], fingerprint=fingerprint_of, after="b", wait_s=3), int)
assert_type(manager.versions("a"), list[int])
assert_type(manager.status(), list[StageStatus])
manager.result("a", version=2)
manager.run("a", 7)  # type: ignore[arg-type]
manager.save_checkpoint(7)  # type: ignore[arg-type]


@manager.stage
def first(rows: int) -> list[int]:
    return [rows]


@manager.stage(name="second", after=["first"], fingerprint="v1", metadata={"a": 1}, wait_s=1.5)
async def second(rows: list[int]) -> int:
    return len(rows)


@manager.stage(after=first)
def third() -> None: ...


manager.run("fourth", len, [1], after=["first", second, third])
manager.run("fourth", len, [1], after=[7])  # type: ignore[list-item]
assert_type(first(3), list[int])
stage_running: Coroutine[Any, Any, int] = second([3])
first("3")  # type: ignore[arg-type]

# --- iterators ---------------------------------------------------------------------------------


class Numbers(CheckpointableIterator[int]):
    def __next__(self) -> int:
        return 1

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass


class Loader:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class JsonHandler:
    def to_content(self, state: dict[str, Any]) -> bytes:
        return b""

    def from_content(self, content: bytes) -> dict[str, Any]:
        return {}


assert_type(next(Numbers()), int)
with PipelineCheckpoint("s3://bucket/place", JsonHandler(), async_checkpointing=True, fingerprint="a") as pipelines:
    assert_type(pipelines.save(Numbers(), step=1, metadata={"epoch": 1}, keep=3), str)
    assert_type(pipelines.save_to_step(Loader(), 1, interval=10), str | None)
assert_type(IteratorCheckpoint(cp).restore(Numbers(), step=1), Numbers)
assert_type(IteratorCheckpoint(Path("a")).restore_latest(Loader()), Loader)
assert_type(IteratorCheckpoint("a").list_checkpoints(), dict[int, str])
assert_type(IteratorCheckpoint("a").get_latest_step(), int | None)
IteratorCheckpoint(7)  # type: ignore[arg-type]
IteratorCheckpoint("a").save_to_directory(iter([1]))  # type: ignore[arg-type]
PipelineCheckpoint("a", fingerprint=7)  # type: ignore[arg-type]


def resolver() -> engines.EngineTask | None:
    return engines.EngineTask("mine", run="r", task="t", attempt=0, base=None)


engines.register("mine", resolver)
engines.EngineTask("mine", run="r", task="t", execution=engines.PROCESS, stale=engines.ending(KeyError, code=7))
engines.register("mine", lambda: 7)  # type: ignore[arg-type, return-value]
assert_type(engines.detect(), engines.EngineTask | None)

with instant_retries(), intercepted(lambda when, verb, keys: None):
    pass
intercepted(lambda when: None)  # type: ignore[arg-type, misc]
assert_type(InterceptedStore, type[InterceptedStore])
assert_type(taskckpt.__version__, str)
