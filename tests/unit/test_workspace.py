from __future__ import annotations

import gc
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from taskckpt import Checkpoint, _workspace
from taskckpt._workspace import PREFIX, remove_tree, restore_fresh, restore_into
from taskckpt.errors import AlreadyExistsError, UsageError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _own_root(tmp_path, monkeypatch):
    """As in a process that has not restored anything yet."""
    monkeypatch.setenv("TASKCKPT_TMP", str(tmp_path / "tmp"))
    monkeypatch.setattr(_workspace, "_root", None)


@pytest.fixture
def saved(tmp_path):
    """A task with a folder in it that has a read-only part."""
    source = tmp_path / "source"
    (source / "locked").mkdir(parents=True)
    (source / "locked" / "file").write_text("inside")
    (source / "file").write_text("content")
    (source / "locked").chmod(0o555)
    Checkpoint(tmp_path / "place").save_sync(source)
    yield tmp_path / "place"
    (source / "locked").chmod(0o755)


def run(tmp_path, text: str, *args: object, status: int = 0, **env: str) -> str:
    preamble = "import os, signal, subprocess, sys, time\nfrom pathlib import Path\nfrom taskckpt import Checkpoint\n"
    code = preamble + textwrap.dedent(text)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:This process", "-c", code, *map(str, args)],
        cwd=tmp_path, capture_output=True, text=True, timeout=15, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout.strip()


def folders(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "tmp").iterdir()) if (tmp_path / "tmp").exists() else []


# --- how long a restored folder lives ----------------------------------------------------------


def test_it_outlives_the_object(saved):
    cp = Checkpoint(saved)
    path = cp.load_sync()
    assert path is not None
    assert cp.path == path
    del cp
    gc.collect()
    assert (path / "locked" / "file").read_text() == "inside"


def test_each_load_gives_a_fresh_one(saved):
    cp = Checkpoint(saved)
    one, two = cp.load_sync(), cp.load_sync()
    assert one is not None
    assert two is not None
    assert one != two
    (one / "file").write_text("changed")
    assert (two / "file").read_text() == "content"
    assert cp.path == two


def test_it_outlives_a_forked_child(tmp_path, saved):
    out = run(tmp_path, """
        path = Checkpoint(sys.argv[1]).load_sync()
        for how in ("return", "exit", "os._exit", "load"):
            pid = os.fork()
            if not pid:
                if how == "load":
                    own = Checkpoint(sys.argv[1], read_only=True).load_sync()
                    assert own.parent != path.parent, "a folder of its own"
                    assert (path / "file").read_text() == "content", "and the parent's to read"
                os._exit(0) if how == "os._exit" else sys.exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            assert (path / "file").read_text() == "content", how
        import multiprocessing
        child = multiprocessing.get_context("fork").Process(target=abs, args=[1]); child.start(); child.join()
        assert (path / "locked" / "file").read_text() == "inside"
        print("kept")
    """, saved)  # fmt: skip
    assert out == "kept"
    assert folders(tmp_path) == [], "at the end everything is gone, the children's too"


def test_it_is_removed_at_the_end(tmp_path, saved):
    for ending, status in (("", 0), ("sys.exit(3)", 3), ("raise ValueError", 1), ("raise KeyboardInterrupt", 130)):
        code = f"path = Checkpoint(sys.argv[1]).load_sync(); print(path); assert path.is_dir()\n{ending}\n"
        path = run(tmp_path, code, saved, status=status if status != 130 else -signal.SIGINT)
        assert path.startswith(str(tmp_path / "tmp"))
        assert folders(tmp_path) == []


def test_it_is_removed_at_the_end_although_parts_are_read_only(tmp_path, saved):
    """As a user who is not root, to whom a read-only folder means something."""
    if os.getuid():
        user = ""
    else:
        user = "os.setgid(65534); os.setuid(65534)"
        os.chmod(tmp_path, 0o777)
        for parent in tmp_path.parents:
            if str(parent) == tempfile.gettempdir():
                break
            os.chmod(parent, 0o755)  # pytest's own folders, which nobody else may enter
        subprocess.run(["chown", "-R", "65534:65534", saved], check=True)
    out = run(tmp_path, f"""
        import blake3, isal.igzip_threaded, taskckpt._archive.extract, encodings.idna
        {user}
        path = Checkpoint(sys.argv[1]).load_sync()
        assert not os.access(path / "locked", os.W_OK)
        (path / "locked").chmod(0o500)
        print(len(list(path.rglob("*"))))
    """, saved)  # fmt: skip
    assert out == "3"
    assert folders(tmp_path) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, saved):
    run(tmp_path, """
        path = Checkpoint(sys.argv[1]).load_sync()
        os.kill(os.getpid(), signal.SIGKILL)
    """, saved, status=-signal.SIGKILL)  # fmt: skip
    (left,) = folders(tmp_path)
    assert left.startswith(PREFIX)
    run(tmp_path, "assert Checkpoint(sys.argv[1]).prev_exists()", saved)
    assert folders(tmp_path) == [left], "looking restores nothing, and so cleans nothing"
    run(tmp_path, "Checkpoint(sys.argv[1]).load_sync()", saved)
    assert folders(tmp_path) == []


def test_what_a_living_process_uses_is_left_alone(tmp_path, saved):
    code = "import sys\nfrom taskckpt import Checkpoint\n"
    code += "print(Checkpoint(sys.argv[1], read_only=True).load_sync(), flush=True)\nsys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(saved)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    with child:
        assert child.stdout
        path = Path(child.stdout.readline().strip())
        run(tmp_path, "Checkpoint(sys.argv[1], read_only=True).load_sync()", saved)
        assert (path / "file").read_text() == "content"
        child.communicate("")
    assert folders(tmp_path) == []


def test_a_child_that_goes_on_keeps_the_folder_of_its_killed_parent(tmp_path, saved):
    """The lock lives in the open file, which the child has inherited."""
    run(tmp_path, """
        path = Checkpoint(sys.argv[1]).load_sync()
        os.close(1); os.close(2); os.open(os.devnull, os.O_RDWR); os.dup(1)  # or we would wait for the child as well
        pid = os.fork()
        if pid:
            os.kill(os.getpid(), signal.SIGKILL)
        while not os.path.exists("go"):
            time.sleep(0.01)
        Path("seen").write_text(str((path / "file").exists()))
        os._exit(0)
    """, saved, status=-signal.SIGKILL)  # fmt: skip
    run(tmp_path, "Checkpoint(sys.argv[1]).load_sync()", saved)
    (tmp_path / "go").touch()
    for _ in range(1000):
        if (tmp_path / "seen").exists() and (tmp_path / "seen").read_text():
            break
        signal.sigtimedwait([], 0.01)
    assert (tmp_path / "seen").read_text() == "True"


def test_folders_of_strangers_are_left_alone(tmp_path, saved):
    tmp = tmp_path / "tmp"
    (tmp / f"{PREFIX}no-lock").mkdir(parents=True)
    (tmp / f"{PREFIX}a-file").write_text("x")
    (tmp / f"{PREFIX}link").symlink_to(tmp_path / "source")
    (tmp / "other").mkdir()
    locked = tmp / f"{PREFIX}lock-is-a-link"
    locked.mkdir()
    (locked / ".lock").symlink_to(tmp_path / "source" / "file")
    before = folders(tmp_path)
    Checkpoint(saved).load_sync()
    assert set(before) <= set(folders(tmp_path))
    assert (tmp_path / "source" / "file").read_text() == "content"


# --- where and for whom ------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("what", ["folder", "bytes"])
def test_it_is_private(tmp_path, saved, umask, what):
    if what == "bytes":
        Checkpoint(saved).save_sync(b"x" * 100)
    before = os.umask(umask)
    try:
        path = Checkpoint(saved).load_sync()
    finally:
        os.umask(before)
    assert path is not None
    root = path if what == "folder" else path.parent
    assert stat.S_IMODE(root.parent.stat().st_mode) == 0o700
    assert root.parent.parent == tmp_path / "tmp"
    if what == "bytes":
        assert stat.S_IMODE(root.stat().st_mode) == 0o700


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_are_those_that_were_saved(tmp_path, umask):
    source = tmp_path / "source"
    source.mkdir(mode=0o750)
    for mode in (0o600, 0o644, 0o755, 0o444):
        (source / oct(mode)).write_text("x")
        (source / oct(mode)).chmod(mode)
    (source / "folder").mkdir()
    (source / "folder").chmod(0o711)
    source.chmod(0o750)
    Checkpoint(tmp_path / "place").save_sync(source)
    before = os.umask(umask)
    try:
        path = Checkpoint(tmp_path / "place").load_sync()
        into = Checkpoint(tmp_path / "place").load_sync(to=tmp_path / "into")
    finally:
        os.umask(before)
    for root in (path, into):
        assert root is not None
        modes = {one.name: oct(stat.S_IMODE(one.stat().st_mode)) for one in root.iterdir()}
        assert modes.pop("folder") == "0o711"
        assert modes == {mode: mode for mode in modes}
        assert stat.S_IMODE(root.stat().st_mode) == 0o750


def test_taskckpt_tmp_says_where(tmp_path, saved, monkeypatch):
    monkeypatch.setenv("TASKCKPT_TMP", "relative/elsewhere")
    path = Checkpoint(saved).load_sync()
    assert path is not None
    assert path.is_absolute()
    assert path.parent.parent == tmp_path / "relative/elsewhere"


def test_the_systems_folder_by_default(tmp_path, saved):
    (tmp_path / "system").mkdir()
    code = "print(Checkpoint(sys.argv[1]).load_sync())"
    out = run(tmp_path, code, saved, TASKCKPT_TMP="", TMPDIR=str(tmp_path / "system"))
    assert Path(out).parent.parent == tmp_path / "system"


def test_a_tmp_that_is_a_file(tmp_path, saved, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TASKCKPT_TMP", str(tmp_path / "file"))
    with pytest.raises((UsageError, AlreadyExistsError)) as info:
        Checkpoint(saved).load_sync()
    assert str(tmp_path / "file") in str(info.value)


# --- restore_fresh and restore_into ------------------------------------------------------------


def test_nothing_is_left_of_a_restore_that_failed():
    def fill(folder):
        Path(folder, "half").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        restore_fresh(fill)
    assert os.listdir(_workspace.process_root()) == [".lock"]


@pytest.mark.parametrize("full", [False, True])
def test_the_target_is_untouched_by_a_restore_that_failed(tmp_path, full):
    target = tmp_path / "target"
    if full:
        target.mkdir()
        (target / "mine").write_text("x")

    def fill(folder):
        Path(folder, "half").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        restore_into(str(target), fill, replace=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == (["mine", "target"] if full else [])


def write(folder):
    Path(folder, "new").write_text("new")


@pytest.mark.parametrize("state", ["absent", "absent parents", "empty", "link to empty", "dangling link"])
def test_an_absent_or_empty_target(tmp_path, state):
    target = tmp_path / "target"
    if state == "absent parents":
        target = tmp_path / "a" / "b" / "target"
    elif state == "empty":
        target.mkdir()
    elif state == "link to empty":
        (tmp_path / "real").mkdir()
        target.symlink_to("real")
    elif state == "dangling link":
        target.symlink_to("real")
    restore_into(str(target), write, replace=False)
    assert [path.name for path in target.iterdir()] == ["new"]
    if "link" in state:
        assert target.is_symlink()
        assert target.resolve() == tmp_path / "real"


def test_a_full_target_needs_replace(tmp_path):
    (tmp_path / "target" / "mine").mkdir(parents=True)
    with pytest.raises(AlreadyExistsError, match="replace=True"):
        restore_into(str(tmp_path / "target"), write, replace=False)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["mine"]
    restore_into(str(tmp_path / "target"), write, replace=True)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"], "nothing is left beside it"


def test_a_target_that_filled_up_meanwhile(tmp_path):
    def slow(folder):
        write(folder)
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "mine").write_text("x")

    with pytest.raises(AlreadyExistsError):
        restore_into(str(tmp_path / "target"), slow, replace=False)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_target_that_is_a_file(tmp_path):
    (tmp_path / "target").write_text("x")
    for replace in (False, True):
        with pytest.raises(UsageError, match="this is a file"):
            restore_into(str(tmp_path / "target"), write, replace=replace)
    assert (tmp_path / "target").read_text() == "x"


def test_a_mount_point_keeps_itself(tmp_path, monkeypatch):
    """It cannot be renamed, so its entries are exchanged; played, as mounting needs root."""
    target = tmp_path / "target"
    (target / "old" / "deep").mkdir(parents=True)
    inode = target.stat().st_ino
    real = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(target) or real(path))

    def fill(folder):
        write(folder)
        Path(folder, "locked").mkdir()
        Path(folder, "locked", "x").write_text("x")
        Path(folder, "locked").chmod(0o555)

    restore_into(str(target), fill, replace=True)
    assert target.stat().st_ino == inode
    assert sorted(path.name for path in target.iterdir()) == ["locked", "new"]
    assert stat.S_IMODE((target / "locked").stat().st_mode) == 0o555
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    restore_into(str(target), write, replace=True)
    assert [path.name for path in target.iterdir()] == ["new"]


def test_a_real_mount_point(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", target], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"NOT TESTED on a real mount point: needs the right to mount ({mounted.stderr.decode().strip()})")
    try:
        Checkpoint(tmp_path / "place").save_sync(b"1")
        restored = Checkpoint(tmp_path / "place").load_sync(to=target)
        assert restored is not None
        assert restored.read_bytes() == b"1"
        assert os.path.ismount(target)
        Checkpoint(tmp_path / "place").load_sync(to=target, replace=True)
        assert [path.name for path in target.iterdir()] == [restored.name]
    finally:
        subprocess.run(["umount", target], check=True)


# --- remove_tree -------------------------------------------------------------------------------


def test_read_only_trees_are_removed(tmp_path):
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").write_text("x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("x")
    (tree / "link").symlink_to(tmp_path / "outside")
    for path in (tree / "a" / "b", tree / "a", tree):
        path.chmod(0o500)
    remove_tree(str(tree))
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (tmp_path / "outside" / "file").exists(), "a link is removed, not what it points to"
    remove_tree(str(tree))  # gone already
