"""Runs one operation in a process of its own and says what it took; and, around it, the process that watches it.

    python -m benchmarks.measure '{"who": ..., "verb": ..., ...}' result.json

Before the clock starts, the same contestant saves (and loads) one byte at the same place: imports and what else a
task pays once are outside of the figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.operations import Job, prepare

ROOT = Path(__file__).parent.parent


@dataclass(slots=True)
class Sample:
    """What one operation took.

    Attributes:
        wall_s: By the clock.
        cpu_s: Of the process and of the programs that it started.
        memory_bytes: The most that the process held, over what it held before; for programs, the largest one.
        temp_bytes: The most there was in TMPDIR, without what was left there: the restored tree.
        moved_bytes: What went to the server or came from it; or what lies in the folder after a save.
        requests: Answered by the server, where it counts them.
    """

    wall_s: float
    cpu_s: float
    memory_bytes: int
    temp_bytes: int = 0
    moved_bytes: int | None = None
    requests: int | None = None


class Failure(Exception):  # noqa: N818
    """An operation that did not work; the message is what its process said last."""


# --- in the process that is measured -----------------------------------------------------------


def measure(job: Job) -> tuple[Sample, int]:
    """The sample, and how many bytes were left in TMPDIR."""
    _warm_up(job)
    operation = prepare(job)
    gc.collect()
    counters = read_counters(job) if job.counted else {}
    memory_before = _forget_peak()
    cpu_before, began = _cpu_s(), time.perf_counter()
    restored = operation()
    wall_s, cpu_s = time.perf_counter() - began, _cpu_s() - cpu_before
    memory_bytes = _peak() - memory_before
    sample = Sample(wall_s, cpu_s, memory_bytes)
    if job.counted:
        counted = {name: count - counters.get(name, 0) for name, count in read_counters(job).items()}
        sample.moved_bytes = counted.get("bytes_received" if job.verb == "save" else "bytes_sent", 0)
        sample.requests = counted.get("requests", 0)
        content_bytes = sum(size for _, size in _files(Path(job.source)))
        assert sample.moved_bytes > content_bytes / 50, f"of {content_bytes} bytes, {sample.moved_bytes} were moved"
    if restored is not None:
        expect_same_tree(Path(job.source), restored)
    return sample, disk_bytes(tempfile.gettempdir())


def read_counters(job: Job) -> dict[str, int]:
    with urllib.request.urlopen(f"{job.storage_options['endpoint_url']}/-/counters") as answer:
        counters: dict[str, int] = json.load(answer)
    return counters


def _warm_up(job: Job) -> None:
    # Beside TMPDIR, not in it: that is watched.
    with tempfile.TemporaryDirectory(dir=Path(tempfile.gettempdir()).parent) as folder:
        source = Path(folder) / "little"
        if os.path.isdir(job.source):
            source.mkdir()
            (source / "byte").write_bytes(b"1")
        else:
            source.write_bytes(b"1")
        little = dataclasses.replace(job, source=str(source), url=f"{job.url}-little-{os.getpid()}", verb="save")
        prepare(little)()
        if job.verb == "load":
            prepare(dataclasses.replace(little, verb="load"))()


def _cpu_s() -> float:
    return sum(os.times()[:4])


def _forget_peak() -> int:
    """The memory held now; the kernel forgets what was the most so far."""
    with contextlib.suppress(OSError):  # Linux only; elsewhere what the imports took at most is not counted
        Path("/proc/self/clear_refs").write_text("5")
    status = _status()
    return status["VmRSS"] if status else _peak()


def _peak() -> int:
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    own = _status().get("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(own, children * unit)


def _status() -> dict[str, int]:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def expect_same_tree(source: Path, restored: Path) -> None:
    """Raises AssertionError unless there are as many files and bytes, and the first file is the same."""
    wanted, got = _files(source), _files(restored)
    assert [size for _, size in wanted] == [size for _, size in got], f"{restored} is not what was saved"
    with wanted[0][0].open("rb") as one, got[0][0].open("rb") as other:
        assert one.read(2**20) == other.read(2**20), f"{got[0][0]} is not what was saved"


def _files(root: Path) -> list[tuple[Path, int]]:
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    return [(path, path.stat().st_size) for path in paths]


# --- in the process that watches ---------------------------------------------------------------


def run(job: Job, temp_root: Path, environment: Mapping[str, str]) -> Sample:
    """Measure a job in a fresh process whose TMPDIR is a fresh folder in ``temp_root``. Raises Failure."""
    with tempfile.TemporaryDirectory(prefix="tmpdir-", dir=temp_root) as folder:
        answer, peak = run_module("benchmarks.measure", dataclasses.asdict(job), Path(folder), environment)
        sample = Sample(**answer["sample"])
        sample.temp_bytes = max(0, peak - answer["left_bytes"])
        return sample


def run_module(module: str, job: Mapping[str, Any], temp: Path, environment: Mapping[str, str]) -> tuple[Any, int]:
    """Run ``python -m module job``; give its result, and the most that lay in its TMPDIR."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(job), str(result)],
                cwd=ROOT,
                env={**os.environ, **environment, "TMPDIR": str(temp)},
                stdout=output,
                stderr=output,
            )
            try:
                peak = max(_watched(process, temp), default=0)
            finally:
                process.kill()
                process.wait()
        if process.returncode or not result.exists():
            lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise Failure(f"exit status {process.returncode}: {lines[-1][:300]}")
        return json.loads(result.read_text()), peak


def _watched(process: subprocess.Popen[bytes], folder: Path) -> Iterator[int]:
    """What lies in a folder, now and then, until the process ends."""
    pause_s = 0.02
    while process.poll() is None:
        began = time.perf_counter()
        yield disk_bytes(str(folder)) + _unlinked_bytes(process.pid, folder)
        # Looking at 20,000 files takes time that the process would like to have.
        pause_s = max(0.02, 20 * (time.perf_counter() - began))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause_s)


def disk_bytes(path: str) -> int:
    """The room taken by a file or by everything below a folder; what vanishes meanwhile counts nothing."""
    try:
        if not os.path.isdir(path):
            return os.lstat(path).st_blocks * 512
        with os.scandir(path) as entries:
            return sum(_entry_bytes(entry) for entry in entries)
    except FileNotFoundError:
        return 0


def _entry_bytes(entry: os.DirEntry[str]) -> int:
    try:
        own = entry.stat(follow_symlinks=False).st_blocks * 512
    except FileNotFoundError:
        return 0
    return own + (disk_bytes(entry.path) if entry.is_dir(follow_symlinks=False) else 0)


def _unlinked_bytes(pid: int, folder: Path) -> int:
    """Files without a name take room too."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                target = os.readlink(descriptor.path)
                if target.startswith(str(folder)) and target.endswith(" (deleted)"):
                    total += os.stat(descriptor.path).st_blocks * 512
    return total


def _main() -> None:
    job, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    sample, left_bytes = measure(Job(**job))
    result.write_text(json.dumps({"sample": dataclasses.asdict(sample), "left_bytes": left_bytes}))


if __name__ == "__main__":
    _main()
