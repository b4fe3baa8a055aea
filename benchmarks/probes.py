"""What runs in processes of their own for the special rows.

python -m benchmarks.probes '{"probe": "little", ...}' result.json
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.operations import Job

GIB = 2**30
TENSORS = 8
HEARTBEAT_S = 0.005
WARM_UPS = 10


def _timed(operation: Callable[[], object]) -> float:
    began = time.perf_counter()
    operation()
    return time.perf_counter() - began


def little(job: Job, *, count: int) -> dict[str, list[float]]:
    """Saves and loads of a few bytes, one after the other, in a process that goes on for long."""
    content = Path(job.source).read_bytes()
    save, load = _little_flyte(job) if job.who == "flyte" else _little_ours(job)
    times: dict[str, list[float]] = {"save": [], "load": []}
    for _ in range(count + WARM_UPS):
        times["save"].append(_timed(partial(save, content)))
        times["load"].append(_timed(load))
    return {verb: figures[WARM_UPS:] for verb, figures in times.items()}


def _little_ours(job: Job) -> tuple[Callable[[bytes], object], Callable[[], object]]:
    from taskckpt import Checkpoint

    writer = Checkpoint(job.url, storage_options=job.storage_options)
    reader = Checkpoint(job.url, storage_options=job.storage_options, read_only=True)
    return writer.save_sync, reader.load_sync


def _little_flyte(job: Job) -> tuple[Callable[[bytes], object], Callable[[], object]]:
    import flyte

    writer = flyte.Checkpoint(job.url)
    # A Checkpoint of Flyte's loads once, and gives the same answer ever after.
    return writer.save_sync, lambda: flyte.Checkpoint(job.url + "-next", job.url).load_sync()


def many(job: Job, *, count: int, keep: int | None, budget_s: float) -> list[float]:
    """Each of many saves by one task; fewer when the time is up."""
    from taskckpt import Checkpoint

    content = Path(job.source).read_bytes()
    checkpoint = Checkpoint(job.url, storage_options=job.storage_options, keep=keep)
    deadline = time.perf_counter() + budget_s
    times: list[float] = []
    while len(times) < count and time.perf_counter() < deadline:
        times.append(_timed(partial(checkpoint.save_sync, content)))
    return times


def stall(job: Job) -> dict[str, float]:
    """How long the event loop stood still while something was saved or loaded asynchronously.

    Beside it, a loop in another process that does nothing: where that one stands still, it is the machine.
    """
    command = [sys.executable, "-c", "from benchmarks import probes; probes.beat_until_told()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        found = asyncio.run(_stall(_async_operation(job)))
        return {**found, "elsewhere": float(other.communicate()[0])}


def beat_until_told() -> None:
    """In the other process: prints the longest stall when standard input ends."""
    found = asyncio.run(_stall(lambda: asyncio.to_thread(sys.stdin.read)))
    print(found["stall"])


async def _stall(operation: Callable[[], Awaitable[object]]) -> dict[str, float]:
    longest = 0.0
    ended = asyncio.Event()

    async def beat() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not ended.is_set():
            await asyncio.sleep(HEARTBEAT_S)
            now = time.perf_counter()
            longest = max(longest, now - last - HEARTBEAT_S)
            last = now

    beating = asyncio.create_task(beat())
    await asyncio.sleep(10 * HEARTBEAT_S)
    began = time.perf_counter()
    await operation()
    wall_s = time.perf_counter() - began
    await asyncio.sleep(2 * HEARTBEAT_S)
    ended.set()
    await beating
    return {"stall": longest, "wall": wall_s}


def _async_operation(job: Job) -> Callable[[], Awaitable[object]]:
    checkpoint: Any
    if job.who == "flyte":
        import flyte

        checkpoint = flyte.Checkpoint(job.url, job.url)
    else:
        from taskckpt import Checkpoint

        checkpoint = Checkpoint(job.url, storage_options=job.storage_options, keep=1)
    source = Path(job.source)
    return lambda: checkpoint.load() if job.verb == "load" else checkpoint.save(source)


def held_up(job: Job, *, rounds: int, fraction: float) -> dict[str, list[float]] | str:
    """How long ``save_later`` of a state dict keeps the task from going on, beside a plain copy of it."""
    import numpy as np

    from taskckpt import Checkpoint

    if not hasattr(Checkpoint, "save_later"):
        return "NOT THERE YET: Checkpoint.save_later"
    rng = np.random.default_rng(1)
    count = int(GIB * fraction) // TENSORS // 4
    arrays = {f"layer-{index}": rng.standard_normal(count, dtype=np.float32) for index in range(TENSORS)}
    copies = {name: array.copy() for name, array in arrays.items()}

    def copy() -> None:
        for name, array in arrays.items():
            np.copyto(copies[name], array)

    state: dict[str, Any] = {"model": _as_tensors(arrays), "step": 7}
    checkpoint = Checkpoint(job.url, storage_options=job.storage_options)
    later: Callable[[dict[str, Any]], Any] = getattr(checkpoint, "save_later")  # noqa: B009 - not in every version
    times: dict[str, list[float]] = {"copy": [], "held up": []}
    for _ in range(rounds + 1):
        times["copy"].append(_timed(copy))
        began = time.perf_counter()
        pending = later(state)
        times["held up"].append(time.perf_counter() - began)
        pending.result()
    return times


def _as_tensors(arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        return arrays
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


PROBES: Mapping[str, Callable[..., object]] = {"little": little, "many": many, "stall": stall, "held up": held_up}


def _main() -> None:
    order, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    answer = PROBES[order["probe"]](Job(**order["job"]), **order["options"])
    result.write_text(json.dumps(answer))


if __name__ == "__main__":
    _main()
