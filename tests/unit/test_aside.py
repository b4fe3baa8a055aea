"""Files and folders are set aside: the copy is what was there, and is gone when nobody needs it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from taskckpt import Checkpoint, _aside, _workspace
from taskckpt._workspace import process_root
from taskckpt.errors import (
    SourceChangedError,
    StorageFullError,
    UnavailableError,
    UsageError,
)
from taskckpt.testing import Hook, intercepted
from tests.crash.contents import make_sources, recognised, tree_of

OLD = 1_500_000_000_123_456_789


def copies() -> list[str]:
    """What lies in this process's private folder, but what was restored."""
    return [name for name in os.listdir(process_root()) if name.startswith(".") and name != ".lock"]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = set(copies())
    yield
    assert set(copies()) == before


@pytest.fixture
def folder(tmp_path) -> Path:
    """All that a folder can hold, in one."""
    root = tmp_path / "folder"
    deep = root / "sub" / "empty"
    deep.mkdir(parents=True)
    (root / "empty").write_bytes(b"")
    (root / "small").write_bytes(b"small")
    (root / "large").write_bytes(os.urandom(3_000_000))
    (root / "sub" / "long-name".ljust(200, "x")).write_bytes(b"1")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9")).write_bytes(b"2")
    os.link(root / "large", root / "sub" / "large too")
    (root / "sub" / "link").symlink_to("../large")
    (root / "dangling").symlink_to("nowhere")
    (root / "large").chmod(0o640)
    (root / "small").chmod(0o400)
    os.utime(root / "dangling", ns=(OLD, OLD + 1), follow_symlinks=False)
    os.utime(root / "large", ns=(OLD, OLD - 1))
    os.utime(root / "small", ns=(-5, -5))
    deep.chmod(0o700)
    (root / "sub").chmod(0o555)
    for at in (deep, root / "sub", root):
        os.utime(at, ns=(OLD, OLD + len(str(at))))
    return root


def waiting_for(held: threading.Event) -> Hook:
    def hook(when: str, verb: str, _keys: object) -> None:
        if (when, verb) == ("before", "write"):
            held.wait(10)

    return hook


def digest(place: Path) -> str:
    """Of the content that was saved last: all there is to know of a folder is in it."""
    import json

    newest = min(Path(place, "log").iterdir())
    checkpoint = json.loads(newest.read_bytes().partition(b"\n")[0])["checkpoint"]
    del checkpoint["stored"]
    return repr(checkpoint)


def expect_same(data: Path, tmp_path: Path) -> None:
    now, later = Checkpoint(tmp_path / "now"), Checkpoint(tmp_path / "later")
    now.save_sync(data)
    assert later.save_later(data).result()
    assert digest(tmp_path / "now") == digest(tmp_path / "later")


def test_a_folder_is_saved_as_it_was(folder, tmp_path):
    before = tree_of(folder)
    expect_same(folder, tmp_path)
    found = Checkpoint(tmp_path / "later").load_sync()
    assert found is not None
    assert tree_of(found) == before
    assert tree_of(folder) == before, "and nothing was done to it"


def test_a_file_is_saved_as_it_was(folder, tmp_path):
    for name in ("large", "small", "empty", "sub/link"):
        expect_same(folder / name, tmp_path)


def test_a_symlink_to_a_folder_has_the_name_of_that(folder, tmp_path):
    (tmp_path / "other name").symlink_to(folder)
    expect_same(tmp_path / "other name", tmp_path)
    assert "folder" in digest(tmp_path / "later")


def test_all_kinds_of_sources(tmp_path):
    (tmp_path / "sources").mkdir()
    make_sources(tmp_path / "sources")
    for name in ("file-1", "folder-2"):
        cp = Checkpoint(tmp_path / name)
        cp.save_later(tmp_path / "sources" / name).result()
        assert recognised(cp.load_sync(to=tmp_path / f"{name} restored"), tmp_path / "sources") == name.replace(
            "-", " "
        )


def test_paths_that_are_too_long_for_the_kernel(tmp_path):
    root = at = tmp_path / "deep"
    at.mkdir()
    descriptor = os.open(at, os.O_RDONLY)
    for _ in range(16):
        os.mkdir("d" * 240, dir_fd=descriptor)
        inner = os.open("d" * 240, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    file = os.open("last", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor)
    os.write(file, b"found")
    os.close(file)
    os.close(descriptor)
    expect_same(root, tmp_path)


def test_changes_after_the_call_are_not_seen(folder, tmp_path):
    held = threading.Event()
    with intercepted(waiting_for(held)):
        cp = Checkpoint(tmp_path / "place")
        pending = cp.save_later(folder)
        (folder / "small").unlink()
        (folder / "new").write_bytes(b"new")
        (folder / "large").write_bytes(b"other")
        assert len(copies()) == 1
        held.set()
        assert pending.result()
    found = cp.load_sync()
    assert found is not None
    assert (found / "small").read_bytes() == b"small"
    assert (found / "large").stat().st_size == 3_000_000
    assert not (found / "new").exists()


def test_what_is_superseded_or_fails_is_gone_at_once(folder, tmp_path):
    held = threading.Event()

    def hook(when: str, verb: str, _keys: object) -> None:
        if (when, verb) == ("before", "write"):
            held.wait(10)
            raise UnavailableError("As wished.")

    with intercepted(hook):
        cp = Checkpoint(tmp_path / "place")
        pending = [cp.save_later(folder)]
        while len(copies()) < 1 or "in flight" not in repr(pending[0]):
            pass
        pending += [cp.save_later(folder), cp.save_later(folder)]
        assert len(copies()) == 2
        held.set()
        assert pending[1].result() is False
        for one in (pending[0], pending[2]):
            with pytest.raises(UnavailableError):
                one.result()
        assert copies() == []


def test_a_folder_that_changes_all_the_time_is_refused(folder, tmp_path):
    busy = True

    def write() -> None:
        number = 0
        while busy:
            number += 1
            (folder / "counter").write_bytes(b"%d" % number)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with pytest.raises(SourceChangedError):
            Checkpoint(tmp_path / "place").save_later(folder)
    finally:
        busy = False
        thread.join()
    expect_same(folder, tmp_path)


def test_a_file_that_changes_while_it_is_copied_is_copied_again(folder, tmp_path, monkeypatch):
    copy, changes = _aside._copy_content, [b"first", b"second"]

    def copy_and_change(source: int, target: int, size_bytes: int) -> None:
        copy(source, target, size_bytes)
        if changes:
            (folder / "large").write_bytes(changes.pop(0))

    monkeypatch.setattr(_aside, "_copy_content", copy_and_change)
    cp = Checkpoint(tmp_path / "place")
    assert cp.save_later(folder / "large").result()
    assert cp.load_bytes_sync() == b"second"
    changes += [b"a", b"b", b"c"]
    with pytest.raises(SourceChangedError):
        cp.save_later(folder / "large")


KERNELS = {
    "without": None,
    "other file systems": OSError(errno.EXDEV, "no"),
    "not here": OSError(errno.EOPNOTSUPP, "no"),
    "never a byte": 0,
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_that_do_not_copy(kernel, folder, tmp_path, monkeypatch):
    what, calls = KERNELS[kernel], []

    def refuse(*arguments: int) -> int:
        calls.append(arguments)
        if len(calls) == 1 and hasattr(os, "copy_file_range"):
            return os.copy_file_range(arguments[0], arguments[1], 1000)  # and then no more
        if isinstance(what, OSError):
            raise what
        return 0

    monkeypatch.setattr(_aside, "_COPY_IN_KERNEL", None if what is None else refuse)
    expect_same(folder / "large", tmp_path)
    expect_same(folder, tmp_path)
    assert bool(calls) == (what is not None)


def test_a_disk_that_breaks_is_an_error(folder, tmp_path, monkeypatch):
    def fail(*_: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(_aside, "_COPY_IN_KERNEL", fail)
    for data in (folder, folder / "large"):
        with pytest.raises(UnavailableError, match="Input/output"):
            Checkpoint(tmp_path / "place").save_later(data)


def test_a_disk_that_keeps_no_times_is_an_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(_aside, "_describe", lambda *_: None)
    with pytest.raises(UnavailableError, match="does not keep"):
        Checkpoint(tmp_path / "place").save_later(folder)


@contextmanager
def private_folder_in(at: Path) -> Iterator[None]:
    """As in a process with that TASKCKPT_TMP."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_workspace, "_root", None)
        patched.setattr(_workspace, "_descriptor", -1)
        patched.setenv("TASKCKPT_TMP", str(at))
        try:
            yield
        finally:
            if _workspace._descriptor >= 0:
                os.close(_workspace._descriptor)


def test_the_copy_must_not_lie_in_the_folder(folder, tmp_path):
    (folder / "sub").chmod(0o755)
    with private_folder_in(folder / "sub" / "tmp"), pytest.raises(UsageError, match="TASKCKPT_TMP"):
        Checkpoint(tmp_path / "place").save_later(folder)


@contextmanager
def mounted(at: Path, *options: str) -> Iterator[Path]:
    at.mkdir()
    done = subprocess.run(["mount", *options, str(at)], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"NOT TESTED on a file system of its own: this needs permission to mount one: {done.stderr!r}")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def test_no_room_for_the_copy(folder, tmp_path):
    cp = Checkpoint(tmp_path / "place")
    cp.save_sync(b"1")
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=2m", "none") as disk, private_folder_in(disk):
        for data in (folder, folder / "large"):
            with pytest.raises(StorageFullError):
                cp.save_later(data)
            assert copies() == []
        assert cp.save_later(folder / "small").result()


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_where_blocks_can_be_shared_the_copy_takes_no_room(kind, tmp_path):
    make = shutil.which(f"mkfs.{kind}")
    if make is None:
        pytest.skip(f"NOT TESTED that copies share blocks on {kind}: this needs mkfs.{kind}")
    image, size = tmp_path / "image", 100 << 20
    with image.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run([make, "-q", str(image)], check=True)
    with mounted(tmp_path / "disk", "-o", "loop", str(image)) as disk, private_folder_in(disk / "tmp"):
        (disk / "folder").mkdir()
        (disk / "folder" / "large").write_bytes(os.urandom(size))
        os.sync()
        free = shutil.disk_usage(disk).free
        held = threading.Event()
        with intercepted(waiting_for(held)):
            pending = Checkpoint(tmp_path / "place").save_later(disk / "folder")
            os.sync()
            assert free - shutil.disk_usage(disk).free < size // 10
            held.set()
            assert pending.result()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="NOT TESTED: needs Linux's /proc")
def test_a_file_that_is_longer_than_it_says_is_not_cut(tmp_path):
    cp = Checkpoint(tmp_path / "task")
    with pytest.raises(SourceChangedError):
        cp.save_later("/proc/self/status")
    assert cp.load_sync() is None
