"""What a save and a load tell on their way: progress to a function or a bar, and structured lines to the log."""

from __future__ import annotations

import asyncio
import logging
import os
import pty
import subprocess
import sys
import termios
import textwrap

import pytest

from taskckpt import Checkpoint
from taskckpt.errors import MissingDependencyError, UsageTypeError

MIB = 1 << 20


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.bin").write_bytes(os.urandom(3 * MIB))
    return folder


@pytest.fixture
def sources(tmp_path, tree):
    """A folder, a file and bytes, each larger than one read."""
    file = tmp_path / "file"
    file.write_bytes(os.urandom(20 * MIB))
    return {"folder": tree, "file": file, "bytes": os.urandom(20 * MIB)}


def check_told(told, size):
    """What was told rises to the end, which everybody knows from the beginning."""
    done = [one for one, _ in told]
    assert {total for _, total in told} == {told[0][1]}
    assert done == sorted(done)
    assert len(told) >= 3
    assert done[-1] == told[-1][1] >= size


@pytest.mark.parametrize("kind", ["folder", "file", "bytes"])
def test_a_function_is_told_how_far_it_is(tmp_path, sources, kind):
    told, told_back = [], []
    cp = Checkpoint(tmp_path / "task")
    cp.save_sync(sources[kind], progress=lambda done, total: told.append((done, total)))
    check_told(told, 15 * MIB)
    cp.load_sync(progress=lambda done, total: told_back.append((done, total)))
    check_told(told_back, 15 * MIB)
    assert told_back[-1] == told[-1]


def test_so_it_is_in_async_code_and_for_bytes(tmp_path, sources):
    async def both():
        told, told_back = [], []
        cp = Checkpoint(tmp_path / "task")
        await cp.save(sources["file"], progress=lambda *one: told.append(one))
        await cp.load(progress=lambda *one: told_back.append(one))
        assert await cp.load_bytes(progress=lambda *one: told_back.append(one)) == sources["file"].read_bytes()
        return told, told_back

    told, told_back = asyncio.run(both())
    check_told(told, 20 * MIB)
    assert len(told_back) == 2 * len(told)


def test_what_the_function_raises_ends_the_save(tmp_path, tree):
    cp = Checkpoint(tmp_path / "task")
    cp.save_sync(b"before")

    def stop(done, total):
        if done > 5 * MIB:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        cp.save_sync(tree, progress=stop)
    assert Checkpoint(tmp_path / "task").load_bytes_sync() == b"before"
    assert not [path for path in (tmp_path / "task" / "data").rglob("*") if path.is_file()]


@pytest.mark.parametrize("wrong", ["yes", 1, object()])
def test_anything_else_is_refused_before_anything_is_done(tmp_path, wrong):
    with pytest.raises(UsageTypeError, match="progress= takes True or a function"):
        Checkpoint(tmp_path / "task").save_sync(b"x", progress=wrong)
    assert not (tmp_path / "task").exists()


def test_a_bar_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(MissingDependencyError, match=r"taskckpt\[progress\]"):
        Checkpoint(tmp_path / "task").save_sync(b"x", progress=True)
    assert not (tmp_path / "task").exists()


SCRIPT = """
import sys, taskckpt
cp = taskckpt.Checkpoint(sys.argv[1])
cp.save_sync(sys.argv[2], progress=True)
cp.load_sync(progress=True)
"""


def on_a_terminal(*command):
    """What a program writes to its terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:
        pass  # the other side is closed
    finally:
        os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_the_bar_shows_up_on_a_terminal_and_nowhere_else(tmp_path, tree):
    shown = on_a_terminal(sys.executable, "-c", SCRIPT, str(tmp_path / "one"), str(tree))
    assert "save: 100%" in shown
    assert "load: 100%" in shown
    assert "15.0M" in shown
    silent = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "two"), str(tree)], capture_output=True, text=True, check=True
    )
    assert silent.stdout + silent.stderr == ""


def test_the_log_tells_phases_and_rates(tmp_path, tree, caplog):
    caplog.set_level(logging.INFO, "taskckpt")
    cp = Checkpoint(tmp_path / "task")
    cp.save_sync(tree)
    cp.load_sync()
    saved, loaded = (one.taskckpt for one in caplog.records if hasattr(one, "taskckpt"))
    assert (saved["event"], saved["kind"], loaded["event"]) == ("saved", "folder", "loaded")
    assert saved["uri"] == loaded["uri"] == str(tmp_path / "task")
    assert saved["size_bytes"] == loaded["size_bytes"] > 15 * MIB
    assert saved["stored_bytes"] == sum(one.stat().st_size for one in (tmp_path / "task/data").rglob("*.tar.gz"))
    assert saved["slot"] == loaded["slot"] == 2
    assert saved["total_s"] == pytest.approx(saved["prepare_s"] + saved["upload_s"] + saved["commit_s"])
    assert loaded["total_s"] == pytest.approx(loaded["find_s"] + loaded["restore_s"])
    assert 0 < saved["upload_s"] < saved["total_s"] < 20
    assert saved["mib_per_s"] == pytest.approx(saved["size_bytes"] / MIB / saved["total_s"])
    text = caplog.text
    assert f"Saved folder to slot 2 of {tmp_path}/task: {saved['size_bytes']} bytes" in text
    assert f"Resumed from {tmp_path}/task (slot 2, folder, {saved['size_bytes']} bytes" in text


def test_silence_imports_no_bar(tmp_path):
    script = f"""
        import sys, taskckpt
        taskckpt.Checkpoint({str(tmp_path / "task")!r}).save_sync(b"x", progress=print)
        taskckpt.Checkpoint({str(tmp_path / "task")!r}).save_sync(b"x", progress=False)
        assert "tqdm" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize("data", [b"", b"tiny"])
def test_little_is_told_once(tmp_path, data):
    told = []
    cp = Checkpoint(tmp_path / "task")
    cp.save_sync(data, progress=lambda *one: told.append(one))
    cp.load_sync(progress=lambda *one: told.append(one))
    assert cp.load_bytes_sync(progress=lambda *one: told.append(one)) == data
    assert told == [(len(data), len(data))] * 3


@pytest.mark.parametrize("kind", ["folder", "file", "bytes"])
def test_the_function_may_save_too(tmp_path, sources, kind):
    """In the middle of a save of the same thread, which is then the newer one."""
    cp = Checkpoint(tmp_path / "task")
    begun: list[bool] = []

    def save(done, total):
        if not begun:
            begun.append(True)
            cp.save_sync(b"from inside")

    cp.save_sync(sources[kind], progress=save)
    newest = Checkpoint(tmp_path / "task", read_only=True).load_sync()
    assert newest is not None
    assert newest.is_dir() == (kind == "folder")
