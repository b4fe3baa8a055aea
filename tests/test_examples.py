"""Every example runs to its end, and does what its first lines say."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from taskckpt import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from taskckpt.testing.servers import S3Server

EXAMPLES = Path(__file__).parent.parent / "examples"
KILLS = 10


def run(name: str, environment: Mapping[str, str] | None = None, *, timeout_s: float = 18) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], env={**os.environ, **(environment or {})},
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_every_example_is_tested() -> None:
    source = Path(__file__).read_text()
    missing = [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in source]
    assert missing == ["demo.py"] or not missing  # make demo runs it; it installs nothing and needs the server's wheel


# --- persistent_counter.py


def what_each_attempt_resumed_from(lines: list[str]) -> list[int]:
    return [int(line.split()[-1]) for line in lines if "resumes from" in line]


def test_persistent_counter_goes_on_after_each_failure() -> None:
    for _ in range(2):  # it ended well, so it starts afresh
        lines = run("persistent_counter.py")
        assert what_each_attempt_resumed_from(lines) == [0, 3, 4, 7]
        assert [line for line in lines if "saved" in line].count("attempt 1 saved 4") == 1
        assert len([line for line in lines if "saved" in line]) == 10  # no step was done twice
        assert lines[-1] == "result: 10"
    assert Path(".taskckpt").is_dir()


def test_persistent_counter_does_the_same_on_s3(s3_server: S3Server, s3_bucket: str) -> None:
    lines = run("persistent_counter.py", {"TASKCKPT_BASE": f"s3://{s3_bucket}/base", **s3_server.environment})
    assert what_each_attempt_resumed_from(lines) == [0, 3, 4, 7]
    assert lines[-1] == "result: 10"
    assert not Path(".taskckpt").exists()


# --- async_counter.py


def test_async_counter_keeps_three_counters_apart() -> None:
    lines = run("async_counter.py")
    assert lines[-1] == "results: [5, 5, 5]"
    starts = {name: [line for line in lines if line.startswith(f"{name}: ")] for name in "abc"}
    assert starts == {
        name: [f"{name}: attempt 0 resumes from 0", f"{name}: attempt 1 resumes from {fails_at}"]
        for name, fails_at in (("a", 2), ("b", 3), ("c", 4))
    }


SIDE_BY_SIDE = """
import asyncio, sys, threading
from concurrent.futures import ThreadPoolExecutor
import taskckpt

def step():
    saved = taskckpt.checkpoint().load_bytes_sync()
    taskckpt.checkpoint().save_sync(b"state")
    return saved is not None

@taskckpt.task(retries=0, clear_on_success=False)
async def coroutine(name):
    await asyncio.sleep(0.01)
    return await asyncio.to_thread(step)

@taskckpt.task(retries=0, clear_on_success=False)
def function(name):
    met.wait(5)
    return step()

names = sys.argv[1].split(",")
met = threading.Barrier(len(names))

async def main():
    return await asyncio.gather(*(coroutine(name) for name in names))

print(asyncio.run(main()))
with ThreadPoolExecutor(len(names)) as pool:
    print(list(pool.map(function, names)))
"""


def test_tasks_side_by_side_find_their_state_again_whatever_their_order() -> None:
    """Who else runs at the moment is no part of a task's identity."""
    Path("side_by_side.py").write_text(SIDE_BY_SIDE)

    def start(names: str) -> list[str]:
        command = [sys.executable, "side_by_side.py", names]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=18).stdout.splitlines()

    assert start("a,b,c") == ["[False, False, False]"] * 2
    assert start("c,a,b") == ["[True, True, True]"] * 2
    assert start("b") == ["[True]"] * 2


# --- resume_folder.py


def test_resume_folder_finds_the_newest_artifact() -> None:
    lines = run("resume_folder.py")
    resumed = [line.split()[-1] for line in lines if "resumes from" in line]
    assert resumed == ["nothing", "epoch-2.json", "epoch-4.json"]
    assert lines[-2] == "artifacts: " + " ".join(f"epoch-{epoch}.json" for epoch in range(1, 7))
    assert lines[-1] == f"losses: {[1 / epoch for epoch in range(1, 7)]}"


# --- plain_script.py


def kill_after(lines: int) -> tuple[int, int]:
    """Starts the script and kills it hard after some of its lines; gives where it began, and its last word."""
    command = [sys.executable, str(EXAMPLES / "plain_script.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        began = process.stdout.readline()
        for _ in range(lines):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        rest = re.findall(r"saved (\d+)\n", process.stdout.read())
    assert process.returncode == -signal.SIGKILL
    start = int(began.removeprefix("starting after "))
    return start, int(rest[-1]) if rest else start + lines


def test_plain_script_killed_ten_times_gives_the_right_result() -> None:
    chance, told = random.Random(7), 0
    for number in range(KILLS):
        start, last = kill_after(chance.randrange(1, 30) if number % 3 else 0)
        # All that it said was saved is there; at most the one save under way is there besides.
        assert told <= start <= told + 1
        told = max(last, start)
    assert told > 50
    lines = run("plain_script.py")
    assert told <= int(lines[0].removeprefix("starting after ")) <= told + 1
    assert lines[-1] == f"result: {sum(number * number for number in range(1, 401))}"
    assert Checkpoint.of(key="sum-of-squares").load_sync() is None  # done: the next start begins anew


def test_plain_script_in_the_loop_of_its_docstring() -> None:
    docstring = (EXAMPLES / "plain_script.py").read_text().partition('"""')[2].partition('"""')[0]
    loop = next(line.strip() for line in docstring.splitlines() if line.strip().startswith("until "))
    assert "until python plain_script.py; do" in loop
    # Dies of itself here: the third process is let go.
    Path("plain_script.py").write_text(
        "import os, sys, threading\n"
        "started = open('started', 'a+'); started.write('x'); started.flush(); started.seek(0)\n"
        "if len(started.read()) < 3: threading.Timer(0.6, os.kill, (os.getpid(), 9)).start()\n"
        + (EXAMPLES / "plain_script.py")
        .read_text()
        .replace("from __future__ import annotations", "")
        .replace("0.005", "0.002")
    )
    program = loop.replace("python ", f"{sys.executable} ").replace("sleep 1", "sleep 0")
    done = subprocess.run(["sh", "-c", program], capture_output=True, text=True, timeout=18, check=True)
    lines = done.stdout.splitlines()
    assert lines.count("it died, starting it again") == 2
    assert lines[-1] == "result: 21413400"
    starts = [int(line.split()[-1]) for line in lines if line.startswith("starting after")]
    assert starts == sorted(starts)
    assert starts[0] == 0 < starts[1]


# --- pipeline_stages.py


def test_pipeline_stages_goes_on_in_the_stage_that_was_killed() -> None:
    lines = run("pipeline_stages.py")
    assert lines[:7] == [
        "a process that dies:",
        *("ingest runs", "clean runs"),
        "a process that lives:",
        *("clean runs", "train runs"),
        "model: 2.5",
    ]
    assert [line.split()[:2] for line in lines[8:]] == [[name, "done"] for name in ("ingest", "clean", "train")]


# --- resumable_iterator.py


def test_resumable_iterator_gives_each_batch_once_although_it_is_killed() -> None:
    lines = run("resumable_iterator.py")
    assert [line for line in lines if ": " not in line] == [
        "a process that is killed after 3 batches",
        "a process that is killed after 5 batches",
        "a process that lives",
        "The same 12 batches as without the kills.",
    ]
    assert [line.split(": ")[0] for line in lines if ": " in line] == [f"batch {number}" for number in range(1, 13)]


# --- pytorch_task.py


@pytest.mark.timeout(90)  # it imports torch twice: 3 seconds, or 30 on a disk that has never read it
def test_pytorch_task_that_is_killed_gives_the_same_losses() -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("NOT TESTED: needs torch (pip install -r tests/requirements-torch.txt)")
    lines = run("pytorch_task.py", timeout_s=80)
    assert [line for line in lines if ": " in line and not line.startswith("losses")] == [
        "pytorch-killed: killed after epoch 5",
        "pytorch-killed: resumes after epoch 5",
    ]
    assert lines[-1] == "The same 12 losses, to the last bit, as without the kill."


# --- dataloader_mid_epoch.py


@pytest.mark.timeout(90)
def test_dataloader_that_is_killed_in_the_middle_of_an_epoch_gives_the_same_losses() -> None:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchdata") is None:
        pytest.skip("NOT TESTED: needs torchdata (pip install -r tests/requirements-torch.txt)")
    lines = run("dataloader_mid_epoch.py", timeout_s=80)
    assert lines == [
        "loader-killed: killed after batch 23",
        "loader-killed: resumes after batch 18",
        "The same 32 losses, to the last bit, as without the kill.",
    ]
