"""Stages of a pipeline: what is done stays done, what is not runs, and nobody else's files are touched."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import platform
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_type, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskckpt
from taskckpt import Checkpoint, StaleAttemptError
from taskckpt._attempt import Attempt, Owner
from taskckpt._operation import Stop
from taskckpt._stores import parse
from taskckpt.errors import (
    AlreadyExistsError,
    AmbiguousIdentityError,
    CorruptCheckpointError,
    DeniedError,
    NotFoundError,
    StepNotFoundError,
    StorageFullError,
    UsageError,
    UsageTypeError,
)
from taskckpt.stages import CheckpointManager, StageStatus, fingerprint_of
from taskckpt.testing import intercepted
from tests.contract.places import Place

if TYPE_CHECKING:
    from taskckpt.testing.servers import S3Server

WAIT_S = 10


def never() -> Any:
    raise AssertionError("a stage that is done ran again")


def only(manager: CheckpointManager) -> StageStatus:
    (status,) = manager.status()
    return status


def states(manager: CheckpointManager) -> dict[str, str]:
    return {status.name: status.state for status in manager.status()}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "taskckpt"]


def files(folder: str | Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


class Counter:
    """A function that counts its calls."""

    def __init__(self, give: Callable[..., Any] = lambda *args: args) -> None:
        self.calls = 0
        self._give = give

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self._give(*args)


# --- done or not -------------------------------------------------------------------------------


def test_a_stage_is_done_once_it_is_saved_and_until_it_is_cleared(caplog):
    caplog.set_level(logging.INFO, "taskckpt")
    manager = CheckpointManager()
    assert not manager.has_checkpoint("data_ingestion")
    manager.save_checkpoint("data_ingestion")
    assert manager.has_checkpoint("data_ingestion")
    assert CheckpointManager("checkpoints").has_checkpoint("data_ingestion")
    assert not manager.has_checkpoint("model_training")
    assert "Checkpoint saved: data_ingestion" in said(caplog)
    manager.clear_checkpoints()
    assert said(caplog)[-1] == "All checkpoints cleared."
    assert not manager.has_checkpoint("data_ingestion")
    assert not CheckpointManager().has_checkpoint("data_ingestion")


def test_one_stage_is_cleared_and_the_others_stay(caplog):
    caplog.set_level(logging.INFO, "taskckpt")
    manager = CheckpointManager()
    for name in "abc":
        manager.save_checkpoint(name)
    manager.clear_checkpoints("b")
    assert said(caplog)[-1] == "Checkpoint cleared: b"
    assert [name for name in "abc" if manager.has_checkpoint(name)] == ["a", "c"]
    manager.clear_checkpoints("never begun")
    assert states(manager) == {"a": "done", "c": "done"}


def test_a_cleared_stage_is_listed_only_where_it_is_declared():
    manager = CheckpointManager()
    manager.run("a (lr=0.1)", lambda: 1)
    CheckpointManager().clear_checkpoints()
    assert manager.status() == []
    manager.stage(name="a (lr=0.1)")(never)
    assert states(manager) == {"a (lr=0.1)": "not done"}
    assert CheckpointManager().run("a (lr=0.1)", lambda: 2) == 2
    assert states(CheckpointManager()) == {"a (lr=0.1)": "done"}


def test_a_stage_that_was_begun_says_by_whom_and_since_when():
    manager, before = CheckpointManager(), datetime.now(UTC)

    def work() -> None:
        begun = only(CheckpointManager())  # whoever looks from elsewhere
        assert (begun.name, begun.state, begun.time, begun.reason) == ("train (lr=0.1)", "begun", None, None)
        assert (begun.host, begun.pid) == (platform.node(), os.getpid())
        assert begun.begun is not None
        assert before <= begun.begun <= datetime.now(UTC)
        _, line = str(manager).splitlines()
        assert f"begun: {begun.begun:%Y-%m-%d %H:%M:%S}, pid {os.getpid()}" in line
        assert platform.node() in line
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        manager.run("train (lr=0.1)", work)
    assert only(manager).state == "begun"  # nobody can tell whether it still runs
    assert manager.run("train (lr=0.1)", lambda: 1) == 1  # and looking has taken nothing over
    assert (only(manager).state, only(manager).begun) == ("done", None)


@pytest.mark.parametrize("about", [{}, {"stage": 7}, {"stage": {"name": "b"}, "host": 1, "pid": "x"}])
def test_what_began_a_stage_and_does_not_say_who_it_is_has_the_name_of_the_folder(about):
    location = parse("checkpoints/a.stage")
    owner = Owner(about={"host": None, "pid": None, **about})
    attempt = Attempt(location, storage_options={}, timeout_s=10, owner=owner)
    with attempt.holding(Stop()):
        pass
    status = only(CheckpointManager())
    assert (status.name, status.state, status.host, status.pid) == ("a", "begun", None, None)


def test_it_makes_its_folder_and_looking_makes_nothing_else():
    manager = CheckpointManager("deep/checkpoints")
    assert os.listdir("deep/checkpoints") == []
    assert not manager.has_checkpoint("a")
    assert manager.status() == []
    assert manager.versions("a") == []
    manager.clear_checkpoints()
    manager.clear_checkpoints("a")
    assert os.listdir("deep/checkpoints") == []
    assert manager.checkpoint_dir == "deep/checkpoints"


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a place where not even root may write")
def test_where_nothing_can_be_written_stages_can_be_looked_at(caplog):
    caplog.set_level(logging.INFO, "taskckpt")
    manager = CheckpointManager("/sys/kernel/taskckpt/checkpoints")
    assert not manager.has_checkpoint("a")
    assert manager.status() == []
    assert str(manager) == "No stages in /sys/kernel/taskckpt/checkpoints."
    with pytest.raises(NotFoundError, match="No stage has one"):
        manager.result("a")
    with pytest.raises(DeniedError):
        manager.save_checkpoint("a")
    assert "they can only be looked at" in said(caplog)[0]


def test_what_cannot_be_saved_is_an_error_and_not_done():
    manager = CheckpointManager()

    def full(when: str, verb: str, keys: Sequence[str]) -> None:
        if verb == "create":
            raise StorageFullError("No room.")

    with intercepted(full), pytest.raises(StorageFullError):
        manager.save_checkpoint("a")
    assert not manager.has_checkpoint("a")
    Path("file").write_text("")
    with pytest.raises(AlreadyExistsError):
        CheckpointManager("file")
    with pytest.raises(UsageError):
        CheckpointManager("file/deeper")
    with pytest.raises(UsageError):
        CheckpointManager("")


# --- pipelines beside and inside of each other -------------------------------------------------


def test_pipelines_know_only_their_own_stages_even_inside_of_each_other(caplog):
    caplog.set_level(logging.INFO, "taskckpt")
    outer = CheckpointManager("checkpoints")
    inner = [CheckpointManager(f"checkpoints/{name}") for name in ("pipeline_1", "stage_a.stage", "log", "data")]
    everybody = [outer, *inner]
    for number, manager in enumerate(everybody):
        for name in ("stage_a", "log", "pipeline_1"):
            assert manager.run(name, lambda number=number: number) == number
    for number, manager in enumerate(everybody):
        assert states(manager) == {"stage_a": "done", "log": "done", "pipeline_1": "done"}
        assert manager.run("stage_a", never) == number
    outer.clear_checkpoints()
    assert states(outer) == {}
    assert any(line.startswith("Left alone") and "pipeline_1" in line for line in said(caplog))
    for number, manager in enumerate(inner, 1):
        assert manager.run("stage_a", never) == number
    inner[0].clear_checkpoints()
    assert not inner[0].has_checkpoint("stage_a")
    assert all(manager.has_checkpoint("stage_a") for manager in inner[1:])


def test_a_pipeline_in_a_folder_that_looks_like_a_stage_is_none():
    CheckpointManager("checkpoints/nested.stage").save_checkpoint("a")
    assert CheckpointManager("checkpoints").status() == []


def test_a_copied_stage_is_another_one():
    manager = CheckpointManager()
    manager.run("a", lambda: 1)
    shutil.copytree("checkpoints/a.stage", "checkpoints/b.stage")
    assert states(manager) == {"a": "done", "b": "done"}
    assert manager.run("b", never) == 1


def test_files_of_others_stay():
    manager = CheckpointManager("checkpoints")
    manager.save_checkpoint("a")
    others = {
        "notes.txt": b"mine",
        "model.checkpoint": b"weights",
        "b.stage": b"a file",
        "deep/x.checkpoint": b"COMPLETED",
    }
    for name, data in others.items():
        Path("checkpoints", name).parent.mkdir(exist_ok=True)
        Path("checkpoints", name).write_bytes(data)
    manager.clear_checkpoints()
    manager.clear_checkpoints("model")
    assert {name: Path("checkpoints", name).read_bytes() for name in others} == others


# --- markers of the old manager ----------------------------------------------------------------


def mark(stage: str, text: str) -> None:
    Path("checkpoints").mkdir(exist_ok=True)
    Path(f"checkpoints/{stage}.checkpoint").write_text(text)


def test_markers_of_the_old_manager_count_as_done(caplog):
    now = datetime.now()  # noqa: DTZ005 - as the old one wrote it
    mark("plain", "COMPLETED")
    mark("Stamped stage", f"COMPLETED\nTimestamp: {now}")
    manager = CheckpointManager()
    assert manager.has_checkpoint("plain")
    assert manager.has_checkpoint("Stamped stage")
    assert not manager.has_checkpoint("other")
    assert not said(caplog)
    stamped, plain = sorted(manager.status(), key=lambda status: status.name)
    assert (plain.name, plain.state, plain.time, plain.versions) == ("plain", "done", None, ())
    assert (stamped.name, stamped.state, stamped.time) == ("Stamped stage", "done", now.astimezone(UTC))
    assert "Stamped stage" in str(manager)
    manager.clear_checkpoints()
    assert not manager.has_checkpoint("plain")
    assert not manager.has_checkpoint("Stamped stage")
    assert os.listdir("checkpoints") == []


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("", True),
        ("COMPL", True),
        ("COMPLETED\nTimest", True),
        ("COMPLETED\nTimestamp: 2025-05-", True),
        ("COMPLETED\n2025-05-30", True),
        ("COMPLETED\n" + "x" * 1000, True),
        ("FAILED", False),
        ("completed", False),
        ("COMPLETED?", False),
        ("x" * 1000, False),
        ("\udcff\0", False),
    ],
)
def test_a_damaged_marker_is_not_done_and_told(text, ours, caplog):
    mark("a", "")
    Path("checkpoints/a.checkpoint").write_bytes(text.encode("utf-8", "surrogateescape"))
    manager = CheckpointManager()
    assert not manager.has_checkpoint("a")
    assert [line for line in said(caplog) if "'a' counts as not done" in line and "a.checkpoint" in line]
    status = only(manager)
    assert (status.name, status.state) == ("a", "damaged")
    assert status.reason
    assert manager.run("a", lambda: 7) == 7
    assert only(manager).state == "done"
    manager.clear_checkpoints()
    assert Path("checkpoints/a.checkpoint").exists() is not ours
    assert not manager.has_checkpoint("a")


def test_a_marked_stage_has_no_result_and_runs_when_one_is_wanted(caplog):
    mark("a", "COMPLETED")
    manager = CheckpointManager()
    assert manager.result("a") is None
    assert manager.run("a", lambda: 7) == 7
    assert [line for line in said(caplog) if "without a result" in line]
    assert manager.run("a", never) == 7
    manager.clear_checkpoints("a")
    assert not manager.has_checkpoint("a")
    assert not Path("checkpoints/a.checkpoint").exists()


# --- names -------------------------------------------------------------------------------------

HOSTILE = [
    *("../etc", "/etc/passwd", "a/b", "a\\b", "..", ".", ".hidden", "a\nb", "\ra", "a\0b", "con", "nul.txt"),
    *("Train", "train", "TRAIN", "é", "e\u0301", "\N{GRINNING FACE}", "\ud800", "x" * 10_000, "x" * 79 + "/"),
    *("log", "data", "a.stage", "a.checkpoint", " a", "a ", "-rf", "~", "$HOME", "%41", "{{x}}", "s3://b", "\u202e"),
]


@pytest.mark.parametrize("name", ["", " ", "\t\n", None, 7, b"a", ["a"], "x" * 10_001])
def test_blank_or_no_text_is_no_name(name):
    manager = CheckpointManager()
    for call in (
        partial(manager.save_checkpoint, name),
        partial(manager.has_checkpoint, name),
        partial(manager.run, name, never),
        partial(manager.result, name),
        partial(manager.run, "a", never, after=[name]),
    ):
        with pytest.raises(UsageError, match="name"):
            call()
    assert os.listdir("checkpoints") == []


def test_names_cannot_leave_the_folder_and_come_back_as_they_were(tmp_path):
    Path("around").mkdir()
    manager = CheckpointManager("around/checkpoints")
    for number, name in enumerate(HOSTILE):
        assert not manager.has_checkpoint(name)
        manager.run(name, lambda number=number: number)
    assert {status.name for status in manager.status()} == set(HOSTILE)
    assert [manager.run(name, never) for name in HOSTILE] == list(range(len(HOSTILE)))
    assert os.listdir("around") == ["checkpoints"]
    assert {path.name for path in tmp_path.iterdir()} == {"around"}
    assert all(line.isprintable() for line in str(manager).splitlines())
    manager.clear_checkpoints()
    assert not any(manager.has_checkpoint(name) for name in HOSTILE)


@settings(max_examples=25)
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4, unique=True))
def test_any_texts_are_names_of_different_stages(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    manager = CheckpointManager(folder)
    for number, name in enumerate(names):
        assert not manager.has_checkpoint(name)
        manager.save_checkpoint(name, metadata={"number": number})
    assert {status.name: status.metadata["number"] for status in manager.status()} == {
        name: number for number, name in enumerate(names)
    }
    assert all(path.parts[0].endswith(".stage") for path in map(Path, files(folder)))


def test_line_breaks_in_a_name_forge_no_log_line(caplog):
    caplog.set_level(logging.INFO, "taskckpt")
    CheckpointManager().save_checkpoint("a\nAll checkpoints cleared.")
    assert "Checkpoint saved: a\\nAll checkpoints cleared." in said(caplog)


# --- metadata ----------------------------------------------------------------------------------


def test_time_host_and_user_are_noted_by_themselves_and_more_by_metadata(monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "worker-7\udcff")
    monkeypatch.setenv("LOGNAME", "ada")
    manager = CheckpointManager()
    before = datetime.now(UTC)
    manager.save_checkpoint("a", metadata={"rows": 3, "columns": ["x", None]})
    status = only(manager)
    assert status.time is not None
    assert before <= status.time <= datetime.now(UTC)
    assert (status.host, status.user, status.attempt) == ("worker-7?", "ada", None)
    assert status.metadata == {"rows": 3, "columns": ["x", None]}
    assert status.versions == (1,)
    manager.run("b", lambda: 1, metadata={"rows": 4})
    assert [status.metadata.get("rows") for status in manager.status()] == [3, 4]


def test_a_user_without_a_name_is_a_number(monkeypatch):
    def nobody() -> str:
        raise OSError("No username set in the environment")

    monkeypatch.setattr("getpass.getuser", nobody)
    manager = CheckpointManager()
    manager.save_checkpoint("a")
    assert only(manager).user == str(os.getuid())


@pytest.mark.parametrize(
    "metadata", [{"stage": 1}, {"a": object()}, {"a": float("nan")}, {"a": "\udcff"}, {1: 2}, [1], "a"]
)
def test_wrong_metadata_is_refused_before_anything_runs(metadata):
    manager = CheckpointManager()
    with pytest.raises(UsageError):
        manager.save_checkpoint("a", metadata=metadata)
    with pytest.raises(UsageError):
        manager.run("a", never, metadata=metadata)
    assert not manager.has_checkpoint("a")


# --- results -----------------------------------------------------------------------------------


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return type(other) is np.ndarray and one.dtype == other.dtype and bool((one == other).all())
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, 2**80, 1.5, "", "text", b"", b"bytes", b"x" * 100_000, bytearray(b"b"), (1, [2, {"a": (3,)}])),
        *({1: {2, 3}}, [], {}, np.arange(6.0).reshape(2, 3), np.float32(1.5), datetime(2026, 11, 21, tzinfo=UTC)),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_result_comes_back_equal_and_of_the_same_type(value):
    function = Counter(lambda: value)
    assert equal(CheckpointManager().run("a", function), value)
    assert equal(CheckpointManager().run("a", function), value)
    assert equal(CheckpointManager().result("a"), value)
    assert function.calls == 1


def test_arguments_are_passed_on():
    manager = CheckpointManager()
    given = manager.run("a", lambda *args, **kwargs: [args, kwargs], 1, 2, stage_name=3, function=4)
    assert given == [(1, 2), {"stage_name": 3, "function": 4}]
    assert manager.run("b", partial(dict, after=1, metadata=2)) == {"after": 1, "metadata": 2}


def test_a_path_is_a_file_or_folder_with_its_name():
    def report() -> Path:
        Path("report.csv").write_text("a,b\n1,2\n")
        Path("report.csv").chmod(0o640)
        return Path("report.csv")

    def model() -> Path:
        Path("model/deep").mkdir(parents=True)
        Path("model/deep/weights").write_bytes(b"\0" * 100_000)
        return Path("model")

    manager = CheckpointManager()
    assert manager.run("report", report) == Path("report.csv")
    assert manager.run("model", model) == Path("model")
    Path("report.csv").unlink()
    restored = manager.run("report", never)
    assert restored.name == "report.csv"
    assert restored.read_text() == "a,b\n1,2\n"
    assert restored.stat().st_mode & 0o777 == 0o640
    folder = manager.result("model")
    assert folder.name == "model"
    assert files(folder) == {"deep/weights"}
    assert manager.result("report") != restored  # whoever writes to one changes no other


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"rng": {"gen": np.random.default_rng()}}, r"result of stage 'a'\[\"rng\"\]\[\"gen\"\] is a Generator"),
        ([1, lambda: 1], r"result of stage 'a'\[1\] is a function"),
        (object(), "result of stage 'a' is an object"),
    ],
)
def test_a_result_that_cannot_be_stored_is_named_by_its_path_and_the_stage_is_not_done(value, told):
    manager = CheckpointManager()
    with pytest.raises(UsageTypeError, match=told):
        manager.run("a", lambda: value)
    assert not manager.has_checkpoint("a")
    assert manager.run("a", lambda: 1) == 1


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"model": Path("big.bin")}, r"\['model'\] is a path"),
        ([1, (2, [Path("big.bin")])], r"\[1\]\[1\]\[0\] is a path"),
        ({"all": {"a", Path("big.bin")}}, r"\['all'\]: the element PosixPath\('big.bin'\) is a path"),
        ({("a", Path("big.bin")): 1}, r": the key \('a', PosixPath\('big.bin'\)\)\[1\] is a path"),
        (OrderedDict(a=[{1: Path("big.bin")}]), r"\['a'\]\[0\]\[1\] is a path"),
    ],
)
def test_a_path_inside_of_a_result_is_refused_since_its_content_would_be_lost(value, told):
    manager = CheckpointManager()
    Path("big.bin").write_bytes(b"weights")
    with pytest.raises(UsageTypeError, match=rf"result of stage 'a'{told}.*Return the Path itself.*str\(path\)"):
        manager.run("a", lambda: value)
    assert not manager.has_checkpoint("a")
    shared = ["big.bin"]
    assert manager.run("a", lambda: {"model": "big.bin", "shared": [shared, shared]}) == manager.result("a")
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UsageError, match="contains itself"):
        manager.run("b", lambda: loop)


def test_a_path_to_nothing_is_an_error():
    manager = CheckpointManager()
    with pytest.raises(NotFoundError):
        manager.run("a", lambda: Path("nothing"))
    assert not manager.has_checkpoint("a")


def test_a_stage_that_raises_is_not_done():
    manager = CheckpointManager()
    with pytest.raises(ZeroDivisionError):
        manager.run("a", lambda: 1 / 0)
    assert not manager.has_checkpoint("a")
    assert manager.run("a", lambda: 1) == 1


def test_what_runs_later_cannot_be_a_stage():
    async def coroutine() -> int:
        return 1

    def generator() -> Any:
        yield 1

    manager = CheckpointManager()
    with pytest.raises(UsageTypeError, match="has not run yet"):
        manager.run("a", partial(lambda function: function(), coroutine))
    with pytest.raises(UsageTypeError, match="generator"):
        manager.run("a", generator)
    with pytest.raises(UsageTypeError, match="function"):
        manager.run("a", 7)  # type: ignore[arg-type]
    assert not manager.has_checkpoint("a")


def test_a_result_that_is_not_there_is_an_error_that_lists_what_is():
    manager = CheckpointManager()
    with pytest.raises(NotFoundError, match="No stage has one"):
        manager.result("train")
    manager.run("train", lambda: 1)
    with pytest.raises(NotFoundError, match="There are: train"):
        manager.result("trian")
    with pytest.raises(NotFoundError, match=r"no version 7.*There are: 1"):
        manager.result("train", 7)


def test_earlier_results_stay_loadable_as_many_as_keep_says():
    manager = CheckpointManager(keep=2)
    for number in range(1, 5):
        manager.run("a", lambda number=number: number * 10, fingerprint=number)
    assert manager.versions("a") == [3, 4]
    assert only(manager).versions == (3, 4)
    assert [manager.result("a", version) for version in (3, 4, None)] == [30, 40, 40]
    with pytest.raises(NotFoundError, match="There are: 3, 4"):
        manager.result("a", 1)
    everything = CheckpointManager("all", keep=None)
    for number in range(1, 6):
        everything.run("a", lambda number=number: number, fingerprint=number)
    assert everything.versions("a") == [1, 2, 3, 4, 5]


def test_a_damaged_result_is_told_and_runs_again(caplog):
    manager = CheckpointManager()
    manager.run("a", lambda: b"x" * 100_000)
    (payload,) = Path("checkpoints/a.stage/data").rglob("*-*/*")
    payload.write_bytes(b"y" * 100_000)
    with pytest.raises(CorruptCheckpointError):
        manager.result("a")
    assert manager.run("a", lambda: b"again") == b"again"
    assert [line for line in said(caplog) if "'a' runs again" in line]
    assert manager.run("a", never) == b"again"


def test_a_result_that_is_cleared_before_it_is_read_is_none_of_the_results():
    manager = CheckpointManager()
    results: list[Any] = [1, b"bytes", Path("file")]
    Path("file").write_text("")
    for result in results:
        manager.run("a", lambda result=result: result)
        stage = manager._place.stage("a")
        done = stage.read().done
        assert done is not None
        manager.clear_checkpoints()
        with pytest.raises(StepNotFoundError):
            stage.load(done)


def test_what_is_no_stage_in_its_folder_is_damage(caplog):
    Checkpoint("checkpoints/a.stage").save_sync(b"mine")
    manager = CheckpointManager()
    assert not manager.has_checkpoint("a")
    assert only(manager).state == "damaged"
    with pytest.raises(CorruptCheckpointError):
        manager.result("a")
    assert manager.run("a", lambda: 1) == 1
    assert only(manager).state == "done"


# --- fingerprints ------------------------------------------------------------------------------


def test_a_changed_fingerprint_runs_again_and_an_equal_one_does_not():
    function = Counter(lambda: 1)
    fingerprint: Any
    for fingerprint in (
        {"version": 1, "inputs": ["a", "b"]},
        {"inputs": ["a", "b"], "version": 1},  # in another order
    ):
        CheckpointManager().run("a", function, fingerprint=fingerprint)
        assert function.calls == 1
    for calls, fingerprint in enumerate(
        ({"version": 2}, [1], (1,), 1, True, 1.0, "1", b"1", np.arange(3), {1: {2}}), 2
    ):
        CheckpointManager().run("a", function, fingerprint=fingerprint)
        CheckpointManager().run("a", function, fingerprint=fingerprint)
        assert function.calls == calls


def test_a_fingerprint_that_comes_or_goes_is_a_change():
    manager = CheckpointManager()
    manager.run("a", lambda: 1)
    assert manager.run("a", lambda: 2, fingerprint="v1") == 2
    assert manager.has_checkpoint("a")  # who only looks has said nothing of it
    assert manager.run("a", lambda: 3) == 3
    assert manager.run("a", never) == 3


def test_a_fingerprint_is_known_to_status_unless_it_is_made_from_the_call():
    CheckpointManager().run("a", lambda: 1, fingerprint="v1")
    for fingerprint, state in (("v1", "done"), ("v2", "out of date"), (None, "out of date"), (fingerprint_of, "done")):
        manager = CheckpointManager()
        manager.stage(name="a", fingerprint=fingerprint)(never)
        assert states(manager) == {"a": state}
        assert manager.has_checkpoint("a") is (state == "done")


def test_a_mark_by_hand_has_the_fingerprint_that_is_declared():
    for fingerprint in ("v1", None, fingerprint_of):
        manager = CheckpointManager()
        manager.stage(name="a", fingerprint=fingerprint)(never)
        manager.save_checkpoint("a")
        assert manager.has_checkpoint("a")
        assert states(CheckpointManager()) == {"a": "done"}


def test_a_fingerprint_may_be_made_from_the_call():
    manager, function = CheckpointManager(), Counter()
    for day in ("monday", "monday", "tuesday"):
        manager.run("a", function, day, fingerprint=lambda _function, day: day)
    assert function.calls == 2


def test_what_is_no_fingerprint_is_named_before_anything_runs():
    with pytest.raises(UsageTypeError, match=r'fingerprint\["x"\] is a function'):
        CheckpointManager().run("a", never, fingerprint={"x": never})
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UsageError, match="contains itself"):
        CheckpointManager().run("a", never, fingerprint=loop)


def module(name: str, text: str) -> Any:
    """What a module of that source defines as f."""
    import importlib.util

    path = Path(f"{name}.py")
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path.absolute())
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.f


def test_fingerprint_of_sees_the_source_and_the_arguments():
    one = module("one", "def f(x, y=2):\n    return x + y\n")
    same = module("same", "# elsewhere\n\ndef f(x, y=2):\n    return x + y\n")
    other = module("other", "def f(x, y=2):\n    return x - y\n")
    made = fingerprint_of(one, 1)
    assert made == fingerprint_of(one, x=1) == fingerprint_of(one, 1, 2) == fingerprint_of(partial(one, 1), y=2)
    assert made == fingerprint_of(same, 1)
    assert len({made, fingerprint_of(other, 1), fingerprint_of(one, 2), fingerprint_of(one, 1.0)}) == 4
    manager = CheckpointManager()
    assert manager.run("a", one, 1, fingerprint=fingerprint_of) == 3
    assert manager.run("a", other, 1, fingerprint=fingerprint_of) == -1
    assert manager.run("a", other, 2, fingerprint=fingerprint_of) == 0
    assert manager.versions("a") == [1, 2, 3]


@pytest.mark.parametrize(
    ("function", "args", "kind"),
    [
        (eval("lambda: 1"), (), UsageError),
        (len, ([1],), UsageError),
        (never, (1,), UsageTypeError),
        (lambda x: x, (object(),), UsageTypeError),
    ],
)
def test_fingerprint_of_refuses_what_it_cannot_see(function, args, kind):
    with pytest.raises(kind):
        fingerprint_of(function, *args)


# --- stages that come after others -------------------------------------------------------------


def test_what_depends_on_a_changed_stage_runs_again():
    ran: list[str] = []

    def step(name: str) -> str:
        ran.append(name)
        return name

    def pipeline(version: int = 1) -> list[str]:
        ran.clear()
        manager = CheckpointManager()
        manager.run("raw", step, "raw", fingerprint=version)
        manager.run("clean", step, "clean", after="raw")
        manager.run("other", step, "other")
        manager.run("train", step, "train", after=["clean", "other"])
        return list(ran)

    assert pipeline() == ["raw", "clean", "other", "train"]
    assert pipeline() == []
    assert pipeline(2) == ["raw", "clean", "train"]
    assert pipeline(2) == []
    CheckpointManager().clear_checkpoints("other")
    assert pipeline(2) == ["other", "train"]


def test_a_dependent_is_out_of_date_before_it_runs_again():
    manager = CheckpointManager()
    manager.run("raw", lambda: 1, fingerprint=1)
    manager.run("clean", lambda: 1, after=["raw"])
    manager.run("train", lambda: 1, after=["clean"])
    assert set(states(manager).values()) == {"done"}
    manager.run("raw", lambda: 2, fingerprint=2)
    assert states(manager) == {"raw": "done", "clean": "out of date", "train": "out of date"}
    reasons = {status.name: status.reason for status in manager.status()}
    assert reasons == {"raw": None, "clean": "raw has changed", "train": "clean is out of date"}
    assert not manager.has_checkpoint("train")
    assert manager.result("train") == 1
    with pytest.raises(UsageError, match="'train' comes after 'clean', which is out of date"):
        manager.run("train", never, after=["clean"])
    manager.clear_checkpoints("raw")
    assert states(manager) == {"clean": "out of date", "train": "out of date"}
    assert manager.status()[0].reason == "raw is not done"


def test_a_cleared_stage_that_was_made_again_is_another_one():
    manager = CheckpointManager()
    manager.run("raw", lambda: 1)
    manager.run("train", lambda: 1, after=["raw"])
    manager.clear_checkpoints("raw")
    manager.run("raw", lambda: 1)
    assert manager.versions("raw")[-1:] == only_versions(manager, "raw")
    assert not manager.has_checkpoint("train")


def only_versions(manager: CheckpointManager, name: str) -> list[int]:
    return list(next(status.versions for status in manager.status() if status.name == name))


def test_other_stages_before_it_run_it_again():
    manager = CheckpointManager()
    for name in "ab":
        manager.run(name, lambda: 1)
    assert manager.run("c", lambda: 1, after=["a"]) == 1
    assert manager.run("c", lambda: 2, after=["a", "b"]) == 2
    assert manager.run("c", never, after=["b", "a"]) == 2
    assert manager.run("c", lambda: 3) == 3


def test_many_ways_to_one_stage_are_looked_at_once():
    manager = CheckpointManager()
    manager.run("first", lambda: 1)
    before = ["first"]
    for layer in range(12):
        for side in ("left", "right"):
            manager.run(f"{layer} {side}", lambda: 1, after=before)
        before = [f"{layer} left", f"{layer} right"]
    requests: list[str] = []
    with intercepted(lambda when, verb, keys: requests.append(verb)):
        assert CheckpointManager().has_checkpoint("11 left")
    assert len(requests) < 25 * 10
    manager.clear_checkpoints("first")
    assert not manager.has_checkpoint("11 left")


def test_stages_that_come_after_each_other_are_out_of_date():
    manager = CheckpointManager()
    manager.run("a", lambda: 1)
    manager.run("b", lambda: 1, after="a")
    other = CheckpointManager()
    other.run("a", lambda: 2, after="b")
    assert set(states(manager).values()) == {"out of date"}
    with pytest.raises(UsageError, match="Run 'b' first"):
        other.run("a", never, after="b")
    with pytest.raises(UsageError, match="'b' comes after 'a', which comes after 'b': none can be the first"):
        other.run("b", never, after="a")


def test_stages_in_a_circle_are_told_so():
    manager = CheckpointManager()
    manager.stage(name="a", after="b")(never)
    manager.run("d", lambda: 1)
    with pytest.raises(UsageError, match="Run 'c' first"):
        manager.run("b", never, after=["d", "c"])
    circle = "'c' comes after 'a', which comes after 'b', which comes after 'c'"
    with pytest.raises(UsageError, match=circle):
        manager.run("c", never, after=["a"])
    with pytest.raises(UsageError, match=circle):
        manager.stage(name="c", after="a")(never)
    assert os.listdir("checkpoints") == ["d.stage"]
    manager.run("c", lambda: 1)
    manager.run("b", lambda: 1, after=["c", "d"])
    manager.run("c", never)


def test_forged_stages_that_come_after_each_other_end_nowhere():
    for name, other in ("ab", "ba"):
        metadata: Any = {"stage": {"name": name, "id": name, "after": {other: other}}}
        Checkpoint(f"checkpoints/{name}.stage").save_sync(b"", metadata=metadata)
    assert set(states(CheckpointManager()).values()) == {"out of date"}


def test_a_stage_after_one_that_is_not_done_is_an_error_and_fences_nobody():
    manager = CheckpointManager()
    with pytest.raises(UsageError, match=r"'b' comes after 'a', which is not done.*Run 'a' first"):
        manager.run("b", never, after=["a"])
    with pytest.raises(UsageError, match="cannot come after itself"):
        manager.run("b", never, after=["b"])
    assert os.listdir("checkpoints") == []


def test_a_marker_counts_as_a_stage_before():
    mark("raw", "COMPLETED")
    manager = CheckpointManager()
    manager.run("train", lambda: 1, after="raw")
    assert manager.run("train", never, after="raw") == 1
    mark("raw", f"COMPLETED\nTimestamp: {datetime(2025, 5, 30)}")  # noqa: DTZ001
    assert not manager.has_checkpoint("train")


def test_a_rollback_is_respected():
    manager = CheckpointManager()
    for number in (1, 2):
        manager.run("raw", lambda number=number: number, fingerprint=number)
    manager.run("train", lambda: 1, after="raw")
    Checkpoint("checkpoints/raw.stage").rollback_sync(1)
    assert manager.result("raw") == 1
    assert manager.run("raw", never, fingerprint=1) == 1
    assert not manager.has_checkpoint("train")
    assert manager.run("raw", lambda: 3, fingerprint=3) == 3
    assert manager.result("raw", 3) == 3


# --- @manager.stage ----------------------------------------------------------------------------


def test_a_decorated_function_is_a_stage():
    manager = CheckpointManager()
    calls: list[str] = []

    @manager.stage
    def prepare(rows: int) -> list[int]:
        """Make rows."""
        calls.append("prepare")
        return list(range(rows))

    @manager.stage(name="training", after=["prepare"], fingerprint="v1", metadata={"kind": "model"})
    def train(data: list[int]) -> int:
        calls.append("train")
        return sum(data)

    assert prepare.__name__ == "prepare"
    assert prepare.__doc__ == "Make rows."
    assert states(manager) == {"prepare": "not done", "training": "not done"}
    assert assert_type(train(prepare(4)), int) == 6
    assert train(prepare(4)) == 6
    assert calls == ["prepare", "train"]
    assert [status.name for status in manager.status()] == ["prepare", "training"]
    assert manager.status()[1].metadata == {"kind": "model"}


def test_what_the_code_declares_is_known_to_status_and_has_checkpoint():
    def declare(version: str) -> CheckpointManager:
        manager = CheckpointManager()

        @manager.stage(fingerprint=version)
        def prepare() -> int:
            return 1

        @manager.stage(after="prepare")
        def train() -> int:
            return prepare()

        if version == "v1":
            train_after = (prepare(), train())
            assert train_after == (1, 1)
        return manager

    assert set(states(declare("v1")).values()) == {"done"}
    changed = declare("v2")
    assert {status.name: status.reason for status in changed.status()} == {
        "prepare": "its fingerprint changed",
        "train": "prepare is out of date",
    }
    assert not changed.has_checkpoint("train")
    changed.save_checkpoint("prepare")  # by hand
    assert changed.has_checkpoint("prepare")
    assert not changed.has_checkpoint("train")
    changed.save_checkpoint("train")
    assert changed.has_checkpoint("train")


def test_a_stage_comes_after_functions_that_are_stages():
    manager = CheckpointManager()

    @manager.stage(name="raw rows")
    def ingest() -> int:
        return 1

    @manager.stage
    async def clean() -> int:
        return 2

    @manager.stage(after=[ingest, clean])
    def train() -> int:
        return 3

    assert (ingest(), asyncio.run(cast("Any", clean())), train()) == (1, 2, 3)
    assert manager.run("count", lambda: 4, after=ingest) == 4
    manager.clear_checkpoints("raw rows")
    assert states(manager) == {
        "raw rows": "not done",
        "clean": "done",
        "train": "out of date",
        "count": "out of date",
    }
    for other in (never, len, CheckpointManager("other").stage(name="other")(never), Counter()):
        with pytest.raises(UsageTypeError, match=r"no stage of this manager.*Decorate it"):
            manager.run("a", never, after=[other])


def test_two_functions_cannot_be_one_stage():
    manager = CheckpointManager()

    def make() -> Callable[[], int]:
        @manager.stage(name="a")
        def function() -> int:
            return 1

        return function

    make()
    assert make()() == 1  # the same one, made again
    with pytest.raises(AmbiguousIdentityError, match="function already"):
        manager.stage(name="a")(never)
    with pytest.raises(UsageTypeError, match="its options have names"):
        manager.stage("a")  # type: ignore[call-overload]


# --- async -------------------------------------------------------------------------------------


def test_async_functions_are_stages():
    manager = CheckpointManager()
    calls: list[int] = []

    async def work(number: int) -> int:
        calls.append(number)
        await asyncio.sleep(0.01)
        return number

    @manager.stage
    async def decorated() -> int:
        return await work(2)

    async def main() -> list[int]:
        same = [assert_type(manager.run("a", work, 1), Coroutine[Any, Any, int]) for _ in range(5)]
        return [*await asyncio.gather(*same, decorated()), await manager.run("a", work, 3)]

    assert asyncio.run(main()) == [1, 1, 1, 1, 1, 2, 1]
    assert sorted(calls) == [1, 2]
    assert manager.versions("a") == [1]


def test_a_cancelled_stage_is_not_done_and_blocks_nobody():
    manager = CheckpointManager()

    async def forever() -> None:
        await asyncio.sleep(WAIT_S * 10)

    async def main() -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(manager.run("a", forever), 0.2)

    asyncio.run(main())
    assert not manager.has_checkpoint("a")
    assert manager.run("a", lambda: 1) == 1


def test_a_coroutine_that_is_given_up_blocks_nobody():
    manager = CheckpointManager()
    loop = asyncio.new_event_loop()
    began = asyncio.Event()

    async def forever() -> None:
        began.set()
        await asyncio.sleep(WAIT_S * 10)

    running = manager.run("a", forever)
    task = loop.create_task(running)
    loop.run_until_complete(asyncio.wait_for(began.wait(), WAIT_S))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    running.close()
    loop.close()
    assert manager.run("a", lambda: 1) == 1


def test_a_stage_cannot_run_itself():
    manager = CheckpointManager()

    def outer() -> Any:
        return manager.run("a", never)

    async def async_outer() -> Any:
        return await manager.run("b", async_outer)

    async def waits_in_the_loop() -> Any:
        waiting = asyncio.create_task(manager.run("c", asyncio.sleep, 0.5))
        await asyncio.sleep(0.2)
        try:
            return manager.run("c", never)
        finally:
            await waiting

    with pytest.raises(UsageError, match="runs itself"):
        manager.run("a", outer)
    with pytest.raises(UsageError, match="runs itself"):
        asyncio.run(manager.run("b", async_outer))
    with pytest.raises(UsageError, match="in this very thread"):
        asyncio.run(waits_in_the_loop())
    assert manager.run("a", lambda: manager.run("inner", lambda: 1)) == 1


# --- side by side ------------------------------------------------------------------------------


def test_threads_of_one_manager_run_a_stage_once():
    manager, together = CheckpointManager(), threading.Barrier(8)
    calls, given = [], []

    def work() -> int:
        calls.append(1)
        time.sleep(0.05)
        return 7

    def go() -> None:
        together.wait(WAIT_S)
        given.append(manager.run("a", work))
        manager.save_checkpoint(threading.current_thread().name)

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert given == [7] * 8
    assert len(calls) == 1
    assert len(manager.status()) == 9


def test_after_one_that_failed_the_next_thread_runs_it():
    manager, inside, go_on = CheckpointManager(), threading.Event(), threading.Event()

    def fails() -> None:
        inside.set()
        go_on.wait(WAIT_S)
        raise ZeroDivisionError

    def first() -> None:
        with suppress(ZeroDivisionError):
            manager.run("a", fails)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(WAIT_S)
    threading.Timer(0.1, go_on.set).start()
    assert manager.run("a", lambda: 2) == 2
    thread.join(WAIT_S)


def test_of_two_managers_at_one_stage_the_later_wins_and_the_other_is_told():
    one, other = CheckpointManager(), CheckpointManager()

    def while_the_other_runs_it() -> str:
        assert other.run("a", lambda: "other") == "other"
        return "one"

    with pytest.raises(StaleAttemptError) as raised:
        one.run("a", while_the_other_runs_it)
    assert "stage 'a'" in raised.value.__notes__[0]
    assert one.result("a") == "other"
    assert one.versions("a") == [1]
    assert one.run("a", never) == "other"
    one.clear_checkpoints()
    assert one.run("a", while_the_other_runs_it, wait_s=WAIT_S) == "other"
    assert len(one.versions("a")) == 1


def test_the_one_that_waits_gets_the_result_of_the_one_that_is_slow():
    one, other = CheckpointManager(), CheckpointManager()
    began, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        began.set()
        assert go_on.wait(WAIT_S)
        return "other"

    thread = threading.Thread(target=other.run, args=("a", slow))

    def while_the_other_begins() -> str:
        thread.start()
        assert began.wait(WAIT_S)
        threading.Timer(0.3, go_on.set).start()
        return "one"

    assert one.run("a", while_the_other_begins, wait_s=WAIT_S) == "other"
    thread.join(WAIT_S)
    assert one.versions("a") == [1]


def test_the_one_that_waits_in_vain_is_told_so():
    one, other = CheckpointManager(), CheckpointManager()

    def while_the_other_fails() -> int:
        with suppress(ZeroDivisionError):
            other.run("a", lambda: 1 / 0)
        return 1

    with pytest.raises(StaleAttemptError) as raised:
        one.run("a", while_the_other_fails, wait_s=0.2)
    assert "in 0.2 s no other result came" in raised.value.__notes__[0]
    assert one.run("a", lambda: 2) == 2  # and nothing is blocked
    for wait_s in (-1, "1", True):
        with pytest.raises(UsageError, match="wait_s"):
            one.run("b", never, wait_s=wait_s)  # type: ignore[arg-type]


def test_the_result_of_another_fingerprint_is_not_waited_for():
    one, other = CheckpointManager(), CheckpointManager()

    def while_the_other_runs_it() -> int:
        other.run("a", lambda: 2, fingerprint="v2")
        return 1

    with pytest.raises(StaleAttemptError):
        one.run("a", while_the_other_runs_it, fingerprint="v1", wait_s=0.2)
    assert one.result("a") == 2


def test_whoever_saved_before_the_claim_was_first():
    """Between the first look of one and its claim, the other one runs the stage from its beginning to its end."""
    one, other = CheckpointManager(), CheckpointManager()
    requests: list[str] = []

    def meanwhile(when: str, verb: str, keys: Sequence[str]) -> None:
        requests.append(verb)
        if verb == "create" and requests.count("create") == 1:
            other.run("a", lambda: "other")

    with intercepted(meanwhile):
        assert one.run("a", never) == "other"
    assert one.versions("a") == [1]


def test_two_that_mark_a_stage_at_once_make_two_versions():
    one, other = CheckpointManager(), CheckpointManager()
    requests: list[str] = []

    def meanwhile(when: str, verb: str, keys: Sequence[str]) -> None:
        requests.append(verb)
        if verb == "create" and requests.count("create") == 1:
            other.save_checkpoint("a")

    with intercepted(meanwhile):
        one.save_checkpoint("a")
    assert one.versions("a") == [1, 2]


def test_clearing_takes_a_running_stage_over():
    manager = CheckpointManager()

    def while_it_is_cleared() -> int:
        CheckpointManager().clear_checkpoints("a")
        return 1

    with pytest.raises(StaleAttemptError):
        manager.run("a", while_it_is_cleared)
    assert not manager.has_checkpoint("a")


def test_a_manager_goes_to_other_processes():
    manager = CheckpointManager("checkpoints", keep=5)
    manager.stage(never)
    manager.run("a", lambda: 1)
    twin = pickle.loads(pickle.dumps(manager))
    assert twin.run("a", never) == 1
    assert twin.run("b", lambda: 2) == 2
    assert states(twin) == {"a": "done", "b": "done"}


# --- with the rest of the house ----------------------------------------------------------------


def test_inside_a_retried_task_done_stages_are_not_repeated():
    ran: list[str] = []

    def work(name: str, result: int) -> int:
        ran.append(name)
        return result

    @taskckpt.task(retries=2, wait_initial_s=0)
    def pipeline(source: str) -> int:
        manager = CheckpointManager(taskckpt.checkpoint())
        rows = manager.run("rows", work, "rows", 3)
        context = taskckpt.ctx()
        assert context is not None
        if context.attempt == 0:
            raise RuntimeError("the worker went away")
        total = manager.run("total", work, "total", rows * 2)
        assert {status.name: status.attempt for status in manager.status()} == {"rows": 0, "total": 1}
        return total

    assert pipeline("a") == 6
    assert ran == ["rows", "total"]
    assert pipeline("b") == 6  # another task, other stages
    assert ran == ["rows", "total"] * 2


def test_below_a_checkpoint_the_two_keep_out_of_each_others_way():
    checkpoint = Checkpoint("task")
    checkpoint.save_sync(b"own")
    manager = CheckpointManager(checkpoint)
    manager.run("a", lambda: 1)
    assert checkpoint.load_bytes_sync() == b"own"
    checkpoint.save_sync(b"still ours")
    manager.clear_checkpoints()
    assert checkpoint.load_bytes_sync() == b"still ours"
    manager.run("a", lambda: 2)
    checkpoint.clear_sync()
    assert manager.run("a", never) == 2
    with pytest.raises(UsageError, match="has its own"):
        CheckpointManager(checkpoint, storage_options={})


def test_of_a_read_only_checkpoint_stages_can_only_be_read():
    CheckpointManager("task").run("a", lambda: 1)
    before = files("task")
    manager = CheckpointManager(Checkpoint("task", read_only=True))
    assert manager.run("a", never) == 1
    assert manager.has_checkpoint("a")
    assert only(manager).name == "a"
    for call in (
        partial(manager.save_checkpoint, "b"),
        partial(manager.run, "b", never),
        manager.clear_checkpoints,
        partial(manager.clear_checkpoints, "a"),
    ):
        with pytest.raises(UsageError, match="read-only"):
            call()
    assert files("task") == before


@pytest.fixture(params=["memory", "moto"])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "memory":
        return Place("memory", f"memory://stages-{time.monotonic_ns()}")
    server: S3Server = request.getfixturevalue("moto")
    return Place("moto", f"s3://{request.getfixturevalue('new_bucket')(server)}/base", server, server.storage_options)


@pytest.mark.filterwarnings("ignore:memory:taskckpt.TaskckptWarning")
def test_a_round_in_other_stores(place: Place):

    def manager() -> CheckpointManager:
        return CheckpointManager(f"{place.url}/pipeline", storage_options=place.options)

    inner = CheckpointManager(f"{place.url}/pipeline/inner", storage_options=place.options)
    inner.save_checkpoint("a")
    Path("table.csv").write_text("a,b")
    assert manager().run("../rows", lambda: [1, 2], fingerprint=1) == [1, 2]
    assert manager().run("table", lambda: Path("table.csv"), after="../rows").name == "table.csv"
    assert manager().run("../rows", never, fingerprint=1) == [1, 2]
    restored = manager().run("table", never, after="../rows")
    assert (restored.name, restored.read_text()) == ("table.csv", "a,b")
    assert manager().run("../rows", lambda: [3], fingerprint=2) == [3]
    assert states(manager()) == {"../rows": "done", "table": "out of date"}
    used = manager()
    assert "../rows" in str(used)
    if place.server is not None:  # memory:// is one process only
        assert pickle.loads(pickle.dumps(used)).has_checkpoint("../rows")
    assert all(key.startswith("pipeline/") for key in sorted(place.open().list_below("").names))
    manager().clear_checkpoints()
    assert not manager().has_checkpoint("../rows")
    assert inner.has_checkpoint("a")


# --- what people see ---------------------------------------------------------------------------


def test_the_table_and_the_short_form():
    manager = CheckpointManager()
    assert str(manager) == f"No stages in {Path('checkpoints').absolute()}."
    assert repr(manager) == f"CheckpointManager({str(Path('checkpoints').absolute())!r})"
    manager.run("prepare", lambda: b"x" * 2048, metadata={"rows": 3})
    manager.save_checkpoint("a stage with a very long name that goes on and on and on and on and on and ends")
    mark("old", "COMPLETED")
    titles, *lines = str(manager).splitlines()
    assert titles.split()[:3] == ["stage", "state", "version"]
    assert "attempt" not in titles  # nobody ran in a @task
    assert len(lines) == 3
    by_name = {line.split()[0]: line for line in lines}
    assert "2.0 KiB" in by_name["prepare"]
    assert "rows=3" in by_name["prepare"]
    assert by_name["a"].split("  ")[0].endswith("and ends")
    column = titles.index("state")
    assert [line[column : column + 4] for line in lines] == ["done"] * 3
    with pytest.raises(AttributeError):
        manager.status()[0].name = "other"  # type: ignore[misc]


def test_a_stage_whose_versions_cannot_be_read_runs_once_more_and_is_done(tmp_path):
    CheckpointManager(tmp_path).run("a", lambda: 1)
    record = min((tmp_path / "a.stage" / "log").iterdir())
    content = bytearray(record.read_bytes())
    content[20] ^= 1
    record.write_bytes(content)
    assert CheckpointManager(tmp_path).run("a", lambda: 2) == 2
    assert CheckpointManager(tmp_path).run("a", lambda: 3) == 2
