"""A save that ends early in a politer way than SIGKILL: the earlier checkpoint loads, and nothing partial does."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from taskckpt import Checkpoint
from taskckpt.errors import StorageFullError, TaskckptError, UnavailableError
from tests.crash.contents import data_of, source
from tests.crash.forker import Forker, Job, Outcome
from tests.crash.inspection import local_place, s3_place
from tests.crash.recovery import moments, noted, recover

# What the process that lives on does with the same Checkpoint.
GOES_ON = ("load", "save folder 3", "load")
ENDS = {
    "SIGTERM": ("SystemExit",),
    "SIGINT": ("KeyboardInterrupt",),
    "EIO": ("UnavailableError", "CommitUnknownError"),
    "ENOSPC": ("StorageFullError",),
    "cancel": ("cancelled",),
}


class Attempt:
    """An attempt after one that saved ``bytes 1``."""

    def __init__(self, forks: Forker, sources: Path, folder: Path) -> None:
        self._forks = forks
        self.dest = folder / "dest"
        self._tmp = folder / "tmp"
        self.job = Job(str(self.dest), [], sources, self._tmp)

    def run(self, job: Job) -> Outcome:
        for folder in (self.dest, self._tmp):
            shutil.rmtree(folder, ignore_errors=True)
        self._tmp.mkdir()
        self._forks.run(replace(self.job, steps=["save bytes 1"]))
        return self._forks.run(job)

    def interrupt(self, job: Job, calls: list[str]) -> str:
        """Gives what is loaded after that, by a clean process."""
        outcome = self.run(job)
        assert not outcome.killed
        *_, save = outcome.answers
        assert save == "done" or save.startswith(ENDS[job.how]), save
        left = {key for key in local_place(self.dest).garbage if "/.partial-" in key}
        assert not left or calls[job.at - 1] == "unlink", left
        seen, _ = recover(self._forks, job)
        new = name_of(job)
        assert seen in ({new} if save == "done" else {"bytes 1", new})
        assert not local_place(self.dest).garbage
        return seen

    def interrupt_and_go_on(self, job: Job) -> None:
        outcome = self.run(replace(job, then=GOES_ON))
        save, loaded, *later = outcome.answers[-len(GOES_ON) - 1 :]
        new = name_of(job)
        assert loaded in ({new} if save == "done" else {"bytes 1", new})
        assert later == ["done", "folder 3"]
        assert recover(self._forks, job)[0] == "folder 3"
        assert not local_place(self.dest).garbage


def name_of(job: Job) -> str:
    """What the last step saves."""
    return job.steps[-1].partition(" ")[2]


@pytest.fixture
def attempt(forks, sources, quick_path) -> Attempt:
    return Attempt(forks, sources, quick_path)


@pytest.mark.parametrize(
    ("how", "verb", "kind"),
    [
        ("SIGTERM", "save", "bytes"),
        ("SIGINT", "save", "folder"),
        ("EIO", "save", "bytes"),
        ("EIO", "save", "folder"),
        ("ENOSPC", "save", "file"),
        ("EIO", "later", "file"),
        ("ENOSPC", "later", "folder"),
    ],
)
@pytest.mark.parametrize("part", range(2))
def test_at_every_call(how, verb, kind, part, attempt):
    job = replace(attempt.job, steps=["load", f"{verb} {kind} 2"], how=how, skip=1)
    calls = attempt.run(job).calls
    seen = set()
    for at, when in moments(calls)[part::2]:
        now = replace(job, at=at, when=when)
        with noted(how, when, at, calls):
            seen.add(attempt.interrupt(now, calls))
            attempt.interrupt_and_go_on(now)
    assert seen == {"bytes 1", f"{kind} 2"}


@pytest.mark.parametrize("how", ["SIGINT", "EIO"])
def test_at_every_call_of_a_load(how, attempt):
    job = replace(attempt.job, steps=["load"], how=how)
    calls = attempt.run(job).calls
    for at, when in moments(calls):
        with noted(how, when, at, calls):
            outcome = attempt.run(replace(job, at=at, when=when, then=GOES_ON))
            assert outcome.answers[0].startswith((*ENDS[how], "bytes 1"))
            assert outcome.answers[1:] == ["bytes 1", "done", "folder 3"]


@pytest.mark.parametrize("part", range(2))
def test_a_cancelled_save_never_commits_afterwards(part, attempt):
    job = replace(attempt.job, steps=["load", "async bytes 2"], how="cancel", skip=1)
    calls = attempt.run(job).calls
    begins_to_commit = len(calls) - calls[::-1].index("open")
    seen = set()
    for at, when in moments(calls)[part::2]:
        now = replace(job, at=at, when=when)
        with noted(when, at, calls):
            seen.add(found := attempt.interrupt(now, calls))
            assert found == "bytes 1" or at >= begins_to_commit
            attempt.interrupt_and_go_on(now)
    assert seen == {"bytes 1", "bytes 2"}


@pytest.mark.parametrize("size_bytes", [0, 100, 500, 5_000, 50_000])
def test_a_limit_on_the_size_of_files(size_bytes, attempt, forks):
    job = replace(attempt.job, steps=["save bytes 2"], limits={"RLIMIT_FSIZE": size_bytes})
    (answer,) = attempt.run(job).answers
    assert answer.startswith("StorageFullError")
    assert recover(forks, job)[0] == "bytes 1"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("NOT TESTED on a full disk: this needs Linux, root and permission to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["inline", "bytes", "file", "folder"])
def test_a_full_disk(kind, small_disk, sources, caplog):
    attempt = Checkpoint(small_disk / "task")
    attempt.save_sync(data_of("bytes 1"))
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    before = local_place(small_disk / "task")
    for _ in range(3):
        with pytest.raises(StorageFullError):
            attempt.save_sync(source(f"{kind} 2", sources))
        assert Checkpoint(small_disk / "task", read_only=True).load_bytes_sync() == data_of("bytes 1")
    assert local_place(small_disk / "task") == before
    with pytest.raises(StorageFullError):  # not None: it cannot claim the task
        Checkpoint(small_disk / "task").load_sync()
    filler.unlink()
    attempt.save_sync(source(f"{kind} 3", sources))
    later = Checkpoint(small_disk / "task")
    assert later.load_sync() is not None
    later.save_sync(data_of("bytes 4"))
    assert later.load_bytes_sync() == data_of("bytes 4")


# --- sources that cannot be read to the end ------------------------------------------------------


class Failing:
    """A file that can be read so many times, and then its disk breaks."""

    def __init__(self, file: Any, times: int) -> None:
        self._file = file
        self._left = times

    def readinto(self, buffer: memoryview) -> int:
        if not self._left:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._left -= 1
        return self._file.readinto(buffer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def break_reads(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    def failing(path: str, mode: str, **named: Any) -> Failing:
        return Failing(open(path, mode, **named), times)

    monkeypatch.setattr("taskckpt._payload.open", failing, raising=False)


@pytest.mark.parametrize("times", range(10))
def test_a_file_that_cannot_be_read(times, sources, quick_path, monkeypatch):
    attempt = Checkpoint(quick_path / "task")
    attempt.save_sync(data_of("bytes 1"))
    monkeypatch.setattr("taskckpt._payload.READ_BYTES", 10_000)
    with monkeypatch.context() as broken:
        break_reads(broken, times)
        with pytest.raises(UnavailableError, match="Input/output error"):
            attempt.save_sync(source("file 2", sources))
    assert attempt.load_bytes_sync() == data_of("bytes 1")
    assert not local_place(quick_path / "task").garbage
    attempt.save_sync(source("file 2", sources))
    assert attempt.load_bytes_sync() == data_of("file 2")


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: a file that the kernel will not read is Linux's")
def test_a_file_and_a_folder_that_the_kernel_will_not_read(quick_path):
    attempt = Checkpoint(quick_path / "task")
    attempt.save_sync(data_of("bytes 1"))
    for unreadable in ("/proc/self/mem", "/proc/self/task"):
        with pytest.raises(TaskckptError):
            attempt.save_sync(Path(unreadable))
        assert attempt.load_bytes_sync() == data_of("bytes 1")
        assert not local_place(quick_path / "task").garbage


@pytest.mark.parametrize("times", [1, 2])
def test_an_upload_in_parts_whose_source_breaks_leaves_nothing(times, s3_server, s3_bucket, tmp_path, monkeypatch):
    attempt = Checkpoint(f"s3://{s3_bucket}/task", storage_options=s3_server.storage_options)
    attempt.save_sync(data_of("inline 1"))
    large = tmp_path / "large"
    large.write_bytes(data_of("large 2"))
    break_reads(monkeypatch, times)
    with pytest.raises(UnavailableError, match="Input/output error"):
        attempt.save_sync(large)
    place = s3_place(s3_server, s3_bucket, "task")
    assert not place.garbage
    assert attempt.load_bytes_sync() == data_of("inline 1")


@pytest.mark.parametrize("request_name", ["create_multipart_upload", "upload_part", "complete_multipart_upload"])
def test_a_cancelled_upload_leaves_nothing(request_name, s3_forks, s3_server, s3_bucket, sources, tmp_path):
    # create, four parts, complete, put the record
    at = {"create_multipart_upload": 1, "upload_part": 3, "complete_multipart_upload": 6}[request_name]
    job = Job(
        f"s3://{s3_bucket}/task",
        ["save inline 1", "async large 2"],
        sources,
        tmp_path,
        storage_options=s3_server.storage_options,
        layer="s3",
        skip=1,
        at=at,
        how="cancel",
        when="before",
    )
    outcome = s3_forks.run(job)
    assert outcome.answers == ["done", "cancelled"]
    assert outcome.calls[at - 1] == request_name
    place = s3_place(s3_server, s3_bucket, "task")
    assert place.uploads == []
    assert recover(s3_forks, job)[0] == "inline 1"
    assert not s3_place(s3_server, s3_bucket, "task").garbage
