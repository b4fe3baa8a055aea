"""Races inside one request to a disk, where a file may go between two system calls."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from taskckpt import Checkpoint
from taskckpt._operation import Stop
from taskckpt._stores.local import LocalStore
from taskckpt.errors import NotFoundError, StaleAttemptError

LARGE = 100_000


def test_an_upload_that_a_newer_attempt_sweeps_ends_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newer = Checkpoint(tmp_path / "task"), Checkpoint(tmp_path / "task")
    Checkpoint(tmp_path / "task").load_sync()
    rename, calls = os.rename, list[str]()

    def overtaken(source: str, target: str) -> None:
        calls.append(source)
        if len(calls) == 1:
            newer.save_sync(b"newer")
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    with pytest.raises(StaleAttemptError):
        older.save_sync(b"older".ljust(LARGE))
    assert calls
    assert newer.load_bytes_sync() == b"newer"


def test_a_file_that_vanishes_while_it_is_saved_is_no_stale_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path / "task")
    checkpoint.save_sync(b"first")
    monkeypatch.setattr(os, "rename", lambda source, target: os.stat(f"{source}-is-gone"))
    with pytest.raises(NotFoundError):
        checkpoint.save_sync(b"second".ljust(LARGE))
    assert checkpoint.load_bytes_sync() == b"first"


def test_a_folder_that_goes_before_its_first_file_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder, made = LocalStore._make_folder, list[str]()

    def dropped_at_once(self: LocalStore, folder: str) -> str:
        made.append(make_folder(self, folder))
        if len(made) == 1:
            os.rmdir(folder)
        return folder

    monkeypatch.setattr(LocalStore, "_make_folder", dropped_at_once)
    store = LocalStore(str(tmp_path))
    store.write("data/000000000001-0123456789abcdef/payload", [b"content"], 7, Stop())
    assert store.read("data/000000000001-0123456789abcdef/payload") == b"content"
    assert len(made) == 2
