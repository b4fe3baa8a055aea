"""What is pending when a process ends: it is saved, whatever way that end is reached but by a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from taskckpt import Checkpoint

ROOT = Path(__file__).parent.parent.parent

BEGIN = """
import atexit, multiprocessing, os, sys, threading, time
from pathlib import Path
import taskckpt
from taskckpt import Checkpoint
from taskckpt.testing import intercepted

def slow(when, verb, keys):
    if (when, verb) == ("before", "create"):
        time.sleep(0.3)

slowly = intercepted(slow)  # in a variable: it ends when it is forgotten
slowly.__enter__()
"""


def run(code: str, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BEGIN + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=18,
        check=False,
    )


def saved(place: Path) -> bytes | None:
    return Checkpoint(place, read_only=True).load_bytes_sync()


ENDS = {
    "end of the script": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "exception": ("raise ValueError('of its own')", 1),
    "in a thread": ("threading.Thread(target=lambda: (time.sleep(0.1), cp.save_later(b'2'))).start()", 0),
    "at exit": ("atexit.register(cp.save_later, b'2')", 0),
    "by garbage": ("del cp", 0),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_script_that_ends_has_saved(end, tmp_path):
    code, status = ENDS[end]
    done = run(f"cp = Checkpoint(sys.argv[1]); cp.save_later(b'1')\n{code}", tmp_path / "place")
    assert done.returncode == status, done.stderr
    assert saved(tmp_path / "place") == (b"2" if "2" in code else b"1")
    assert ("of its own" in done.stderr) == ("of its own" in code)
    assert done.stderr == "" or "of its own" in code


def test_what_waits_is_saved_too(tmp_path):
    code = "cp = Checkpoint(sys.argv[1]); [cp.save_later(b'%d' % n, policy='queue') for n in range(3)]"
    assert run(code, tmp_path / "place").returncode == 0
    assert saved(tmp_path / "place") == b"2"


def test_a_folder_is_saved_and_its_copy_is_gone(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}").write_bytes(os.urandom(400_000))
    (tmp_path / "tmp").mkdir()
    code = "Checkpoint(sys.argv[1]).save_later(Path(sys.argv[2])); Path(sys.argv[2], '0').write_bytes(b'')"
    done = run(code, tmp_path / "place", folder, TASKCKPT_TMP=str(tmp_path / "tmp"))
    assert (done.returncode, done.stderr) == (0, "")
    found = Checkpoint(tmp_path / "place", read_only=True).load_sync()
    assert found is not None
    assert (found / "0").stat().st_size == 400_000
    assert (found / "29").read_bytes() == (folder / "29").read_bytes()
    assert os.listdir(tmp_path / "tmp") == []


def test_an_error_that_nobody_got_is_told_at_the_end(tmp_path):
    code = """
place = sys.argv[1]
cp = Checkpoint(place)
cp.save_sync(b"1")
Checkpoint(place).save_sync(b"newer")
pending = cp.save_later(b"2")
"""
    for get in ("", "try: pending.result()\nexcept taskckpt.StaleAttemptError: pass"):
        done = run(code + get, tmp_path / "place")
        assert done.returncode == 0, "no exit status tells it: the documentation says so"
        assert ("nobody asked for it" in done.stderr) == (not get)
        assert ("StaleAttemptError" in done.stderr) == (not get or "in the background failed" in done.stderr)
        assert ("Traceback" in done.stderr) == (not get)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_have_saved(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        BEGIN
        + """
def work(cp):
    cp.save_later(b"from the child")

if __name__ == "__main__":
    cp = Checkpoint(sys.argv[1])
    cp.save_sync(b"1")
    child = multiprocessing.get_context(sys.argv[2]).Process(target=work, args=(cp,))
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(tmp_path / "place"), method]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=18, check=False)
    assert done.returncode == 0, done.stderr
    assert saved(tmp_path / "place") == b"from the child"


@pytest.mark.parametrize("name", ["TASKCKPT_TASK", "TASKCKPT_KEY"])
def test_a_task_that_is_the_whole_process(name, tmp_path):
    done = run("taskckpt.checkpoint().save_later(b'1')", **{name: "t", "TASKCKPT_BASE": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    (place,) = [path.parent for path in tmp_path.rglob("log")]
    assert saved(place) == b"1"


def test_ctrl_c_at_the_end_gives_up_what_is_not_saved(tmp_path):
    code = BEGIN + (
        "cp = Checkpoint(sys.argv[1]); cp.save_sync(b'1')\n"
        "slowly = intercepted(lambda *_: time.sleep(30)); slowly.__enter__(); cp = Checkpoint(sys.argv[1])\n"
        "cp.save_later(b'2'); print('ends', flush=True)"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "place")]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ends\n"
        time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=15)
        assert time.monotonic() - began < 10
    assert saved(tmp_path / "place") == b"1"


@pytest.mark.parametrize("transfer", ["fsspec", "obstore"])
def test_a_bucket_whose_host_must_be_looked_up(transfer, seaweedfs, new_bucket):
    """By then asyncio's default pool must still be there: it resolves host names."""
    if transfer == "obstore":
        pytest.importorskip("obstore")
    bucket = new_bucket(seaweedfs)
    options = seaweedfs.storage_options
    endpoint = options["endpoint_url"].replace("127.0.0.1", "localhost")
    assert "localhost" in endpoint
    own = {**options, "endpoint_url": endpoint}
    code = f"Checkpoint('s3://{bucket}/task', storage_options={own!r}).save_later(bytes(20_000_000))"
    done = run(code, TASKCKPT_TRANSFER=transfer)
    assert (done.returncode, done.stderr) == (0, "")
    found = Checkpoint(f"s3://{bucket}/task", storage_options=options, read_only=True).load_bytes_sync()
    assert found == bytes(20_000_000)
