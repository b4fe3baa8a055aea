"""A local disk that fails: the right result or the right error, and never "no checkpoint"."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import subprocess
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tenacity  # noqa: F401 - loaded before this process becomes nobody, who may not read the interpreter's files

from taskckpt import Checkpoint
from taskckpt._layout import slot_key
from taskckpt.errors import (
    CorruptCheckpointError,
    DeniedError,
    StaleAttemptError,
    StorageFullError,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="NOT TESTED: needs root (run the tests in a container)")
NOBODY = 65534
BIG = bytes(range(256)) * 1000


@pytest.fixture
def open_folder(monkeypatch):
    """A folder that everybody may enter, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="taskckpt-test-"))
    folder.chmod(0o755)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o777)
    monkeypatch.setenv("TASKCKPT_TMP", str(folder / "tmp"))
    yield folder
    subprocess.run(["chmod", "-R", "u+rwx", folder], check=False)
    shutil.rmtree(folder)


def as_nobody(work):
    """``in_child``, and not as root."""

    def as_somebody_else():
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return work()

    return in_child(as_somebody_else)


def in_child(work):
    """What ``work`` gives in a child process: a JSON value, or the name of its error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                answer = work()
            except Exception as error:
                answer = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            os.write(writing, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(answer)


def every_call(dest):
    yield lambda: Checkpoint(dest).load_sync()
    yield lambda: Checkpoint(dest).load_bytes_sync()
    yield lambda: Checkpoint(dest).prev_exists()
    yield lambda: Checkpoint(dest, read_only=True).load_sync()
    yield lambda: Checkpoint(dest).save_sync(b"x")
    yield lambda: Checkpoint(dest).save_sync(BIG)
    yield lambda: Checkpoint(dest).clear_sync()


def mounted(folder, *options):
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("NOT TESTED: this container may not mount (needs CAP_SYS_ADMIN)")


@pytest.fixture
def disk(tmp_path):
    """A small disk of the test's own."""
    mounted(tmp_path / "disk", "size=1m")
    yield tmp_path / "disk"
    subprocess.run(["umount", tmp_path / "disk"], check=True)


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- permissions -------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("closed", ["base", "base/task", "base/task/log"])
def test_a_folder_that_may_not_be_read_is_denied(open_folder, closed):
    Checkpoint(open_folder / "base/task").save_sync(b"one")
    (open_folder / closed).chmod(0o700)
    for call in every_call(open_folder / "base/task"):
        assert as_nobody(lambda call=call: repr(call())).startswith("DeniedError: Not permitted")
    (open_folder / closed).chmod(0o755)
    assert as_nobody(lambda: Checkpoint(open_folder / "base/task").load_bytes_sync() == b"one") is True


@needs_root
def test_a_record_or_payload_that_may_not_be_read_is_denied(open_folder):
    task = open_folder / "task"
    Checkpoint(task).save_sync(BIG)
    for file in (task / slot_key(2), *task.glob("data/*/*")):
        file.chmod(0o600)
        assert as_nobody(lambda: repr(Checkpoint(task, read_only=True).load_sync())).startswith("DeniedError"), file
        file.chmod(0o644)


@needs_root
def test_a_folder_that_may_not_be_written_gives_its_state(open_folder):
    task = open_folder / "task"
    owner = Checkpoint(task)
    owner.save_sync(BIG)

    def work():
        messages: list[str] = []

        def listen(record):
            messages.append(record.getMessage())
            return True

        logging.getLogger("taskckpt").addFilter(listen)
        attempt = Checkpoint(task)
        loaded = attempt.load_bytes_sync() == BIG
        errors = []
        for data in (b"x", BIG):
            try:
                attempt.save_sync(data)
            except DeniedError as error:
                errors.append(error.code)
        return [loaded, errors, any("saving will fail" in message for message in messages)]

    assert as_nobody(work) == [True, ["denied", "denied"], True]
    owner.save_sync(b"nobody was fenced")
    # Where nothing is yet, there is nothing to resume from; but the first save says why it fails.
    assert as_nobody(lambda: Checkpoint(open_folder / "new").load_sync()) is None
    assert as_nobody(lambda: Checkpoint(open_folder / "new").save_sync(b"x")).startswith("DeniedError")


@needs_root
def test_a_temporary_folder_that_may_not_be_written_is_denied(open_folder):
    Checkpoint(open_folder / "task").save_sync(b"one")
    (open_folder / "tmp").chmod(0o700)
    answer = as_nobody(lambda: repr(Checkpoint(open_folder / "task", read_only=True).load_sync()))
    assert answer.startswith("DeniedError")
    assert str(open_folder / "tmp") in answer


# --- what is no folder -------------------------------------------------------------------------


@pytest.mark.parametrize("dest", ["file", "file/task", "file/deeper/task"])
def test_a_base_that_is_a_file_is_an_error(tmp_path, dest):
    (tmp_path / "file").write_text("precious")
    for call in every_call(tmp_path / dest):
        with pytest.raises(UsageError, match="file, not a folder"):
            call()
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("part", ["log", "data"])
def test_a_file_where_a_folder_should_be_is_an_error(tmp_path, part):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / part).write_text("precious")
    with pytest.raises(UsageError):
        Checkpoint(tmp_path / "task").save_sync(BIG)
    if part == "log":
        for call in every_call(tmp_path / "task"):
            with pytest.raises(UsageError):
                call()
    assert (tmp_path / "task" / part).read_text() == "precious"


def test_names_that_are_too_long_are_an_error(tmp_path):
    for dest in (tmp_path / ("x" * 300), tmp_path.joinpath(*["y" * 200] * 25)):
        for call in every_call(dest):
            with pytest.raises(UsageError, match="too long"):
                call()
    assert everything(tmp_path) == []


def test_a_circle_of_links_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for call in every_call(tmp_path / "a" / "task"):
        with pytest.raises((UsageError, UnavailableError)):
            call()


# --- disks -------------------------------------------------------------------------------------


@needs_root
def test_a_disk_that_is_mounted_read_only(disk):
    Checkpoint(disk / "task").save_sync(BIG)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    attempt = Checkpoint(disk / "task")
    assert attempt.load_bytes_sync() == BIG
    for data in (b"x", BIG):
        with pytest.raises(DeniedError, match="Read-only"):
            attempt.save_sync(data)
    with pytest.raises(DeniedError):
        attempt.clear_sync()
    assert Checkpoint(disk / "new").load_sync() is None
    with pytest.raises(DeniedError):
        Checkpoint(disk / "new").save_sync(b"x")


@needs_root
def test_a_disk_that_is_full(disk, tmp_path):
    attempt = Checkpoint(disk / "task")
    attempt.save_sync(BIG)
    before = everything(disk)
    large = tmp_path / "large"
    large.mkdir()
    (large / "random").write_bytes(os.urandom(2_000_000))
    for data in (os.urandom(2_000_000), large, large / "random"):
        with pytest.raises(StorageFullError, match="No room") as caught:
            attempt.save_sync(data)
        assert str(disk) in str(caught.value)
        assert everything(disk) == before, "nothing half-written is left"
        assert Checkpoint(disk / "task", read_only=True).load_bytes_sync() == BIG
    attempt.save_sync(b"small")
    assert Checkpoint(disk / "task", read_only=True).load_bytes_sync() == b"small"


@needs_root
def test_a_disk_without_room_for_even_a_record(disk):
    attempt = Checkpoint(disk / "task")
    attempt.save_sync(b"before")
    before = everything(disk)
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(disk).free == 0
    with pytest.raises(StorageFullError):
        attempt.save_sync(os.urandom(60_000))
    # The state is there for all that; only claiming it fails, and says so.
    assert Checkpoint(disk / "task", read_only=True).load_bytes_sync() == b"before"
    with pytest.raises(StorageFullError):
        Checkpoint(disk / "task").load_sync()
    filler.unlink()
    assert everything(disk) == before
    attempt.save_sync(b"after")
    assert Checkpoint(disk / "task").load_bytes_sync() == b"after"


@needs_root
def test_no_room_to_restore(disk, tmp_path, monkeypatch):
    content = os.urandom(2_000_000)
    Checkpoint(tmp_path / "task").save_sync(content)
    monkeypatch.setenv("TASKCKPT_TMP", str(disk))

    def work():
        checkpoint = Checkpoint(tmp_path / "task")
        for options in ({}, {"to": disk / "to"}):
            with pytest.raises(StorageFullError):
                checkpoint.load_sync(**options)
        assert checkpoint.load_bytes_sync() == content
        return str(checkpoint.load_sync(to=tmp_path / "to"))

    assert in_child(work) == str(tmp_path / "to" / "payload")
    assert (tmp_path / "to" / "payload").read_bytes() == content
    assert [name for name in everything(disk) if "lock" not in name] == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_unavailable(tmp_path, monkeypatch, number):
    attempt = Checkpoint(tmp_path / "task")
    attempt.save_sync(b"before")

    def broken(*_, **__):
        raise OSError(number, os.strerror(number))

    cases: dict[str, list[Callable[[], object]]] = {
        "fsync": [lambda: attempt.save_sync(b"x"), lambda: attempt.save_sync(BIG)],
        "link": [lambda: attempt.save_sync(b"x")],
        "rename": [lambda: attempt.save_sync(BIG)],
        "scandir": [attempt.load_sync, attempt.prev_exists],
    }
    for verb, calls in cases.items():
        with monkeypatch.context() as patch:
            patch.setattr(os, verb, broken)
            for call in calls:
                with pytest.raises(UnavailableError, match="disk failed"):
                    call()
        assert Checkpoint(tmp_path / "task", read_only=True).load_bytes_sync() in (b"before", b"x")
    attempt.save_sync(b"after")
    assert Checkpoint(tmp_path / "task").load_bytes_sync() == b"after"


# --- a disk without hard links -----------------------------------------------------------------


@pytest.fixture
def _no_links(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("_no_links")
def test_without_hard_links_attempts_fence_each_other_all_the_same(tmp_path):
    first = Checkpoint(tmp_path / "task")
    first.save_sync(b"one")
    second = Checkpoint(tmp_path / "task")
    assert second.load_bytes_sync() == b"one"
    with pytest.raises(StaleAttemptError):
        first.save_sync(BIG)
    second.save_sync(BIG)
    assert Checkpoint(tmp_path / "task").load_bytes_sync() == BIG
    assert not [name for name in everything(tmp_path) if ".partial-" in name]


@pytest.mark.parametrize("length", [0, 1, 100, 300])
def test_a_torn_record_is_stepped_over(tmp_path, length):
    """What the fallback leaves when it is killed in between: the slot is taken, and says nothing."""
    attempt = Checkpoint(tmp_path / "task")
    attempt.save_sync(b"one")
    attempt.save_sync(b"two")
    whole = (tmp_path / "task" / slot_key(3)).read_bytes()
    torn = tmp_path / "task" / slot_key(4)
    torn.write_bytes(whole[: min(length, len(whole) - 1)])
    for later in (Checkpoint(tmp_path / "task", read_only=True), Checkpoint(tmp_path / "task")):
        assert later.load_bytes_sync() == b"two"
    later.save_sync(b"three")
    assert torn.read_bytes() == whole[: min(length, len(whole) - 1)], "it is never overwritten"
    assert Checkpoint(tmp_path / "task").load_bytes_sync() == b"three"


def test_a_torn_record_alone_is_no_checkpoint_and_one_after_a_lost_commit_is_corrupt(tmp_path):
    attempt = Checkpoint(tmp_path / "task")
    attempt.load_sync()
    (tmp_path / "task" / slot_key(2)).write_bytes(b'{"torn')
    with pytest.raises(CorruptCheckpointError):
        Checkpoint(tmp_path / "task").load_sync()
