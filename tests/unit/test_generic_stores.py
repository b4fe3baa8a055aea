"""Stores that taskckpt knows nothing of but that fsspec speaks to them: no condition, errors of any kind."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from taskckpt import Checkpoint, TaskckptWarning
from taskckpt._stores import Listing
from taskckpt._stores.local import LocalStore
from taskckpt._testing import switches
from taskckpt.errors import (
    DeniedError,
    NotFoundError,
    StaleAttemptError,
    TaskckptError,
    UnavailableError,
    UsageError,
    UsageTypeError,
)
from taskckpt.testing import instant_retries

FAULTS: list[tuple[Exception, type[Exception]]] = [
    (ConnectionResetError("peer"), UnavailableError),
    (PermissionError("no"), DeniedError),
]
FAULTS += [(TimeoutError("slow"), UnavailableError), (RuntimeError("odd"), UnavailableError)]


class Remote(LocalFileSystem):
    """A folder behind what fsspec gives to a file system that has only the basic verbs (sftp, smb, webhdfs, ...)."""

    protocol = "remote"
    fault: Exception | None = None
    faults_once: list[Exception]
    written: list[str]

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("remote://"))

    def ls(self, path, detail=False, **_):
        if Remote.fault is not None:
            raise Remote.fault
        return super().ls(path, detail=detail)

    def info(self, path, **_):
        if Remote.faults_once:
            raise Remote.faults_once.pop()
        return super().info(path)

    def exists(self, path, **options):
        return fsspec.AbstractFileSystem.exists(self, path, **options)

    def find(self, path, *args, **options):
        return fsspec.AbstractFileSystem.find(self, path, *args, **options)

    def pipe_file(self, path, value, mode="overwrite", **options):
        Remote.written.append(path)
        fsspec.AbstractFileSystem.pipe_file(self, path, value, mode=mode, **options)


@pytest.fixture
def remote(tmp_path, monkeypatch):
    monkeypatch.setattr(Remote, "fault", None)
    monkeypatch.setattr(Remote, "faults_once", [], raising=False)
    monkeypatch.setattr(Remote, "written", [], raising=False)
    fsspec.register_implementation("remote", Remote, clobber=True)
    with warnings.catch_warnings(), instant_retries():
        warnings.filterwarnings("ignore", "remote.*overwrites", TaskckptWarning)
        yield f"remote://{tmp_path}/deep/down"


# --- errors are never "nothing saved" ----------------------------------------------------------


@pytest.mark.parametrize(("fault", "error"), FAULTS, ids=lambda value: getattr(value, "__name__", repr(value)))
@pytest.mark.parametrize("saved", [True, False])
def test_what_cannot_be_listed_is_not_empty(remote, tmp_path, monkeypatch, fault, error, saved):
    if saved:
        Checkpoint(remote).save_sync(b"step 1000000")
    monkeypatch.setattr(Remote, "fault", fault)
    for ask in (
        Checkpoint(remote, read_only=True).load_bytes_sync,
        Checkpoint(remote, read_only=True).load_sync,
        Checkpoint(remote).load_bytes_sync,
        Checkpoint(remote).prev_exists,
        Checkpoint(tmp_path / "next", src=remote).load_bytes_sync,
        Checkpoint(tmp_path / "next", src=remote).prev_exists,
    ):
        with pytest.raises(error):
            ask()
    monkeypatch.setattr(Remote, "fault", None)
    assert Checkpoint(remote).load_bytes_sync() == (b"step 1000000" if saved else None)


def test_a_part_that_cannot_be_listed_is_not_left_out(remote, monkeypatch):
    Checkpoint(remote).save_sync(b"1" * 200_000)
    real = Remote.ls

    def ls(self, path, detail=False, **options):
        if "/data/" in str(path):
            raise PermissionError(path)
        return real(self, path, detail=detail, **options)

    monkeypatch.setattr(Remote, "ls", ls)
    with pytest.raises(DeniedError):
        Checkpoint(remote)._attempt.open_store().list_below("data")


# --- the log without a conditional create ------------------------------------------------------


def test_everything_works_and_is_warned_about(remote, tmp_path):
    assert not (tmp_path / "deep").exists()
    with pytest.warns(TaskckptWarning, match="overwrites where it was told to create only"):
        assert Checkpoint(remote).load_bytes_sync() is None
    for number in range(5):
        retry = Checkpoint(remote, keep=2)
        assert retry.load_bytes_sync() == (b"%d" % (number - 1) * 70_000 if number else None)
        retry.save_sync(b"between")
        retry.save_sync(b"%d" % number * 70_000)
    names = os.listdir(tmp_path / "deep" / "down" / "log")
    assert len(names) == 16
    assert all(len(name.removesuffix(".jsonl").split("-")) == 3 for name in names), "each has a nonce"
    assert len(Remote.written) == len(set(Remote.written)), "nothing is written twice"
    retry.clear_sync()
    assert retry.load_bytes_sync() is None
    assert Checkpoint(remote).load_bytes_sync() is None


@pytest.mark.parametrize("fault", [ConnectionResetError("once"), TimeoutError("once"), PermissionError("once")])
@pytest.mark.parametrize("faults", [1, 2, 3])
def test_a_fault_does_not_let_a_stale_attempt_overwrite(remote, tmp_path, fault, faults):
    stale, newest = Checkpoint(remote), Checkpoint(remote)
    stale.save_sync(b"A 1")
    newest.load_sync()
    newest.save_sync(b"B 50")
    log = tmp_path / "deep" / "down" / "log"
    before = {path.name: path.read_bytes() for path in log.iterdir()}
    Remote.faults_once[:] = [fault] * faults
    for _ in range(2):
        with pytest.raises(TaskckptError):
            stale.save_sync(b"A 2")
    Remote.faults_once.clear()
    with pytest.raises(StaleAttemptError):
        stale.save_sync(b"A 3")
    assert {name: (log / name).read_bytes() for name in before} == before
    assert Checkpoint(remote).load_bytes_sync() == b"B 50"
    newest = Checkpoint(remote)
    newest.save_sync(b"C")
    assert Checkpoint(remote, read_only=True).load_bytes_sync() == b"C"


class Overwriting(LocalStore):
    """An S3 gateway that ignores If-None-Match: nobody knows before it was probed."""

    exclusive: bool | None = None
    created: list[str]
    before_join: Callable[[], object] | None = None

    def create(self, key, data, stop):
        if Overwriting.before_join is not None and b'"join"' in data:
            act, Overwriting.before_join = Overwriting.before_join, None
            act()
        path = Path(self._path(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        Overwriting.created.append(key)
        path.write_bytes(data)


@pytest.fixture
def gateway(tmp_path, monkeypatch):
    monkeypatch.setattr(switches, "wrap_store", lambda store: Overwriting(store.uri))
    monkeypatch.setattr(Overwriting, "created", [], raising=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*overwrites", TaskckptWarning)
        yield tmp_path / "task"


@pytest.mark.parametrize("loads_first", [True, False])
def test_who_joins_overwrites_nothing_either(gateway, monkeypatch, loads_first):
    main = Checkpoint(gateway)
    main.load_sync()
    one, two = copy.deepcopy(main), copy.deepcopy(main)
    if loads_first:
        one.load_sync()
    monkeypatch.setattr(Overwriting, "before_join", None)
    Overwriting.before_join = lambda: one.save_sync(b"step 100")  # the other has listed, and not joined yet
    assert two.load_bytes_sync() == b"step 100"
    assert Checkpoint(gateway).load_bytes_sync() == b"step 100"
    with_nonce = [key for key in Overwriting.created if key.count("-") == 2]
    assert len(with_nonce) == len(set(with_nonce))
    assert {key for key in Overwriting.created if key.count("-") == 1} == {Overwriting.created[0]}, "the probe only"


def test_stale_workers_are_told_where_the_condition_is_ignored(gateway):
    old = Checkpoint(gateway)
    old.load_sync()
    worker = copy.deepcopy(old)
    worker.load_sync()
    new = Checkpoint(gateway)
    new.load_sync()
    new.save_sync(b"attempt 1: step 50")
    for stale in (worker, worker, old):
        with pytest.raises(StaleAttemptError):
            stale.save_sync(b"stale")
    assert Checkpoint(gateway).load_bytes_sync() == b"attempt 1: step 50"


# --- what people mistype -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"endpoint": "http://127.0.0.1:1"},  # it is endpoint_url
        {"secrt": "s"},
        {"endpoint_url": "127.0.0.1:9"},
        {"client_kwargs": {"no_such_option": 1}},
        {"client_kwargs": {"endpoint_url": "no url"}},
    ],
    ids=repr,
)
def test_mistyped_options_of_s3(options):
    pytest.importorskip("s3fs", reason="NOT TESTED: s3fs is not installed")
    given = {"key": "k", "secret": "s"} | options
    cp = Checkpoint("s3://bucket/x", storage_options=given, timeout_s=2)
    with pytest.raises(UsageError):
        cp.load_sync()


@pytest.mark.parametrize("options", ["key=1", [("key", "1")], 7])
def test_options_are_a_dict(options):
    with pytest.raises(UsageTypeError, match="storage_options must be a dict"):
        Checkpoint("s3://bucket/x", storage_options=options)


@pytest.mark.parametrize("src", ["s3//b/x", "s3:b", "$HOME/x", Path("s3://b/x"), "s3://b/a//c"])
def test_a_mistyped_src_is_no_empty_one(tmp_path, src):
    with pytest.raises(UsageError):
        Checkpoint(tmp_path / "task", src=src)


def test_a_bucket_that_is_not_there_is_no_empty_one(moto):
    cp = Checkpoint("s3://no-such-bucket-at-all/x", read_only=True, storage_options=dict(moto.storage_options))
    with pytest.raises(NotFoundError):
        cp.load_sync()


def test_old_ones_are_found_where_a_first_page_does_not_hold_their_names(gateway, monkeypatch):
    def first_page_only(store, folder, *, first_page=False):
        listing = LocalStore.list_below(store, folder)
        return Listing(sorted(listing.names)[:16], complete=False) if first_page else listing

    monkeypatch.setattr(Overwriting, "list_below", first_page_only)
    cp = Checkpoint(gateway, keep=None)
    for number in range(30):
        cp.save_sync(bytes([number]) * 70_000)
    payloads = sorted(path for path in (gateway / "data").rglob("*") if path.is_file())
    for path in payloads[8:]:
        path.write_bytes(b"damaged")
    assert Checkpoint(gateway, read_only=True).load_bytes_sync() == bytes([7]) * 70_000


@pytest.mark.parametrize("page", ["empty", "of others"])
def test_a_first_page_without_records_is_no_empty_log(gateway, monkeypatch, page):
    Checkpoint(gateway).save_sync(b"precious")

    def without_records(store, folder, *, first_page=False):
        names = ["#backup"] if page == "of others" else []
        return Listing(names, complete=False) if first_page else LocalStore.list_below(store, folder)

    monkeypatch.setattr(Overwriting, "list_below", without_records)
    look = Checkpoint(gateway, read_only=True)
    assert look.prev_exists()
    assert look.load_bytes_sync() == b"precious"
    assert Checkpoint(gateway.parent / "next", src=gateway).load_bytes_sync() == b"precious"
    assert Checkpoint(gateway).load_bytes_sync() == b"precious"
