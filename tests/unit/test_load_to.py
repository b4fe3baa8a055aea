"""``load(to=...)`` replaces what the user named, all of it or nothing, and never what it must not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from taskckpt import Checkpoint, _workspace
from taskckpt.errors import AlreadyExistsError, TaskckptError, UsageError, UsageTypeError


@pytest.fixture(autouse=True)
def _own_root(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKCKPT_TMP", str(tmp_path / "tmp"))
    monkeypatch.setattr(_workspace, "_root", None)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A task in work/ckpts/task with a folder in it; a home and a project beside."""
    world = tmp_path / "world"
    source = world / "source"
    (source / "sub").mkdir(parents=True)
    (source / "new").write_text("new")
    (source / "sub" / "x").write_text("x")
    for name in ("home/user", "project/src", "work/ckpts", "old"):
        (world / name).mkdir(parents=True)
        (world / name / "precious").write_text("precious")
    monkeypatch.setenv("HOME", str(world / "home" / "user"))
    monkeypatch.chdir(world / "project" / "src")
    Checkpoint(world / "work" / "ckpts" / "task").save_sync(source)
    return world


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, content)
    return found


RESTORED = {"new", "sub", "sub/x"}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "to",
    [
        *("{w}/work/ckpts/task", "{w}/work/ckpts", "{w}/work", "{w}"),
        *("{w}/work/ckpts/task/restored", "{w}/work/ckpts/task/log", "{w}/work/ckpts/task/data"),
        *(".", "{w}/project/src", "..", "{w}/project", "~", "{w}/home", "{w}/link", "{w}/work/../work/ckpts/task"),
    ],
)
@pytest.mark.parametrize("replace", [True, False])
def test_what_must_not_be_replaced(world, to, replace):
    (world / "link").symlink_to(world / "work")
    cp = Checkpoint(world / "work" / "ckpts" / "task", read_only=True)
    before = state(world)
    with pytest.raises((UsageError, AlreadyExistsError)) as caught:
        cp.load_sync(to=to.format(w=world), replace=replace)
    assert isinstance(caught.value, UsageError) or not replace
    assert state(world) == before


def test_a_place_that_is_a_src_must_not_be_replaced_either(world):
    cp = Checkpoint(world / "elsewhere", src=world / "work" / "ckpts" / "task", read_only=True)
    before = state(world)
    for to in ("work/ckpts", "work/ckpts/task", "work/ckpts/task/new", "elsewhere", "elsewhere/x"):
        with pytest.raises(UsageError):
            cp.load_sync(to=world / to, replace=True)
    assert state(world) == before


@pytest.mark.parametrize("to", [123, 1.5, b"x", ["x"]])
def test_a_target_is_a_path(world, to):
    with pytest.raises(UsageTypeError, match="to must be"):
        Checkpoint(world / "work" / "ckpts" / "task").load_sync(to=to)


@pytest.mark.parametrize("to", ["s3://b/x", "memory://x", "", "  ", "{{out}}", "$HOME/out", "s3:b"])
def test_a_target_is_a_local_folder(world, to):
    before = state(world)
    with pytest.raises(UsageError):
        Checkpoint(world / "work" / "ckpts" / "task", read_only=True).load_sync(to=to)
    assert state(world) == before


def test_an_empty_current_folder_is_filled_and_stays_the_current_one(world, monkeypatch):
    (world / "empty").mkdir()
    monkeypatch.chdir(world / "empty")
    Checkpoint(world / "work" / "ckpts" / "task").load_sync(to=".")
    assert set(os.listdir(".")) == {"new", "sub"}
    assert Path.cwd() == world / "empty"


# --- interrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError], ids=lambda one: one.__name__)
def test_replacing_is_all_or_nothing(world, monkeypatch, number, when, error):
    target = world / "old"
    cp = Checkpoint(world / "work" / "ckpts" / "task")
    before = state(world / "old")
    real, count = os.rename, 0

    def rename(source, to):
        nonlocal count
        count += str(target) in (str(source), str(to))
        hit = count == number and str(target) in (str(source), str(to))
        if hit and when == "before":
            count += 10
            raise error
        real(source, to)
        if hit:
            count += 10
            raise error

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises((error, TaskckptError)):
        cp.load_sync(to=target, replace=True)
    monkeypatch.undo()
    complete = (number, when) == (2, "after")  # then both renames have happened
    assert names(target) == RESTORED if complete else state(target) == before
    if not complete:
        assert [name for name in os.listdir(world) if name.startswith(".taskckpt")] == []


# --- mount points ------------------------------------------------------------------------------


@pytest.fixture
def mounted(world):
    """A folder on a file system of its own."""
    folder = world / "mount"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if os.getuid() == 0 else None
    if done is None or done.returncode != 0:
        pytest.skip(f"NOT TESTED on a real mount point: {'not root' if done is None else done.stderr}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_mount_point_is_filled(world, mounted):
    device = mounted.stat().st_dev
    cp = Checkpoint(world / "work" / "ckpts" / "task")
    assert cp.load_sync(to=mounted) == mounted
    assert names(mounted) == RESTORED
    (mounted / "more").write_text("more")
    with pytest.raises(AlreadyExistsError):
        cp.load_sync(to=mounted)
    assert "more" in names(mounted)
    cp.load_sync(to=mounted, replace=True)
    assert names(mounted) == RESTORED
    assert mounted.stat().st_dev == device
    assert os.path.ismount(mounted)


@pytest.mark.parametrize("failing", ["m", "new", "sub"])
@pytest.mark.parametrize("error", [PermissionError(1, "immutable"), KeyboardInterrupt()], ids=repr)
def test_a_mount_point_is_put_back_when_an_entry_cannot_be_moved(world, mounted, monkeypatch, failing, error):
    for name in ("a", "m", "z"):
        (mounted / name).write_text(name)
    before = state(mounted)
    real = os.rename

    def rename(source, to):
        if os.path.basename(source) == failing and os.path.basename(to) == failing:
            raise error
        real(source, to)

    cp = Checkpoint(world / "work" / "ckpts" / "task")
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises((TaskckptError, KeyboardInterrupt)):
        cp.load_sync(to=mounted, replace=True)
    monkeypatch.undo()
    assert state(mounted) == before


@pytest.mark.parametrize("below", ["", "deep/down"])
def test_a_folder_with_a_mount_point_in_it_is_not_replaced(world, mounted, below):
    outer = world / "outer"
    inner = outer / below / "disk with space"
    inner.mkdir(parents=True)
    (outer / "mine").write_text("mine")
    subprocess.run(["mount", "--bind", str(mounted), str(inner)], check=True)
    try:
        (inner / "on the disk").write_text("precious")
        before = state(outer)
        cp = Checkpoint(world / "work" / "ckpts" / "task")
        with pytest.raises(UsageError, match="mount point"):
            cp.load_sync(to=outer, replace=True)
        assert state(outer) == before
    finally:
        subprocess.run(["umount", str(inner)], check=True)
    cp.load_sync(to=outer, replace=True)
    assert names(outer) == RESTORED
