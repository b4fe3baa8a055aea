"""The command line: what it finds, what it says, how it ends, and that it leaves a running task alone."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import pytest
from click.testing import CliRunner

import taskckpt
from taskckpt import Checkpoint, StaleAttemptError, _stores, errors
from taskckpt.cli import _exits, main
from taskckpt.testing import intercepted

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "evil\x1b[31m[red]\n\x9b2J\u202e\ud800"


def run(*words, code=0, **options):
    """A command in this process; it must end with that code."""
    result = CliRunner().invoke(main, [str(word) for word in words], **options)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def run_json(*words, code=0):
    return json.loads(run(*words, "--json", code=code).stdout)


def process(*words, **options):
    """The same in a process of its own."""
    options = {"capture_output": True, "text": True, "timeout": 15, "stdin": subprocess.DEVNULL, **options}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run([sys.executable, "-m", "taskckpt", *map(str, words)], env=environment, check=False, **options)


def saved(place, steps=(1, 2, 3), keep=10, **options):
    checkpoint = Checkpoint(str(place), keep=keep, **options)
    for step in steps:
        checkpoint.save_sync(b"%d" % step, step=step, metrics={"loss": 1 / step}, metadata={"at": step})
    return checkpoint


def steps_of(place):
    return Checkpoint(str(place), read_only=True).steps_sync()


@pytest.fixture
def base(tmp_path):
    """Two tasks of a run, and one with a key."""
    saved(tmp_path / "base" / "nightly" / "train")
    saved(tmp_path / "base" / "nightly" / "etl", steps=(7,))
    saved(tmp_path / "base" / "by-key" / "report", steps=(9,))
    return tmp_path / "base"


@pytest.fixture
def train(base):
    return base / "nightly" / "train"


def damage(place, step):
    """Flips a byte of a payload that lies in an object of its own."""
    info = next(one for one in Checkpoint(str(place), read_only=True).checkpoints_sync() if one.step == step)
    path = Path(json.loads(run("show", info.uri, "--json").stdout)["payload"])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return info.uri


# --- where to look -----------------------------------------------------------------------------


def names(*words, **options):
    return [one["task"] for one in run_json("ls", *words, **options)["tasks"]]


def test_a_base_a_run_and_a_task_are_found_by_looking(base, train, tmp_path):
    assert names(base) == ["report", "etl", "train"]
    assert [one["run"] for one in run_json("ls", base)["tasks"]] == ["by-key", "nightly", "nightly"]
    assert names(tmp_path) == ["report", "etl", "train"]
    assert names(base / "nightly") == ["etl", "train"]
    assert names(train) == ["train"]
    assert names("--base", base, "--run", "nightly") == ["etl", "train"]
    assert names("--base", base, "--run", "nightly", "--task", "etl") == ["etl"]
    assert names("--base", base, "--key", "report") == ["report"]
    assert names(train.as_uri()) == ["train"]


def test_all_tasks_of_a_base_share_one_connection(base, monkeypatch):
    opened = []

    def open_store(where, **said):
        opened.append(where)
        return _stores.open_store(where, **said)

    monkeypatch.setattr("taskckpt.cli._targets.open_store", open_store)
    for verb in ("ls", "du", "verify"):
        run(verb, base)
        assert [one.path for one in opened] == [str(base)]
        opened.clear()


def test_the_base_of_the_environment_or_the_folder_is_the_default(base, tmp_path, monkeypatch):
    monkeypatch.setenv("TASKCKPT_BASE", str(base))
    assert names() == ["report", "etl", "train"]
    monkeypatch.setenv("TASKCKPT_RUN", "nightly")
    assert names("--task", "etl") == ["etl"]
    monkeypatch.delenv("TASKCKPT_BASE")
    saved(".taskckpt/local/here")
    done = process("ls", "--json", cwd=tmp_path)
    assert [one["task"] for one in json.loads(done.stdout)["tasks"]] == ["here"]


def test_in_a_task_its_own_checkpoints_are_the_default(base, monkeypatch):
    for name, value in (("BASE", base), ("RUN", "nightly"), ("TASK", "train")):
        monkeypatch.setenv(f"TASKCKPT_{name}", str(value))
    assert run_json("show")["task"] == "train"
    assert run_json("pin", "2")["checkpoint"]["step"] == 2
    assert names() == ["report", "etl", "train"]


def test_a_checkpoint_is_named_by_its_own_uri(train):
    for info in Checkpoint(str(train), read_only=True).checkpoints_sync():
        assert run_json("show", info.uri)["step"] == info.step
        assert run_json("show", Path(info.uri).as_uri())["uri"] == info.uri
    oldest = Checkpoint(str(train), read_only=True).checkpoints_sync()[-1]
    newest = Checkpoint(str(train), read_only=True).checkpoints_sync()[0]
    names_of_it: set[str] = set()
    for verb in ("pin", "unpin", "pin"):
        run(verb, train, "1")  # which repeats the newest one in a slot above
        assert run_json("show", Checkpoint(str(train), read_only=True).checkpoints_sync()[0].uri)["step"] == 3
        names_of_it.add(run_json("ls", train)["tasks"][0]["newest"]["uri"])
    assert {run_json("show", uri)["step"] for uri in names_of_it} == {3}
    assert run_json("show", newest.uri)["step"] == 3
    assert run_json("show", oldest.uri)["step"] == 1


def test_folders_that_are_no_tasks_are_passed_over(base, tmp_path):
    for name in ("base/project/log", "base/project/data", "base/.hidden/x/log"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "notes.jsonl").write_text("{}")
    assert names(base) == ["report", "etl", "train"]
    saved(base / "project" / "deeper" / "task")
    assert "task" in names(base)


def test_what_is_not_there_is_said_with_near_names(base, train):
    said = json.loads(run("ls", base / "nightly" / "trian", "--json", code=3).stderr)
    assert said["error"] == "not-found"
    assert said["uri"] == str(base / "nightly" / "trian")
    assert "train" in said["hint"]
    assert "--task train" in run("ls", "train", code=3).stderr
    for verb, *words in (["show"], ["verify"], ["du"], ["prune"], ["clear", "-y"], ["rollback", "-y", "1"]):
        run(verb, base / "nowhere", *words, code=3) if verb != "rollback" else run(
            verb, base / "nowhere", "1", "-y", code=3
        )
    assert not (base / "nowhere").exists()


def test_one_task_is_needed_and_several_are_named(base):
    for words in (["show", base], ["pull", base, "out"], ["pin", base, "1"], ["clear", base, "--yes"]):
        said = run(*words, code=2).stderr
        assert "3 tasks" in said
        assert "by-key/report, nightly/etl, nightly/train" in said
    assert steps_of(base / "nightly" / "train") == [1, 2, 3]


@pytest.mark.parametrize(
    "words",
    [
        ["ls", "somewhere", "--run", "x"],
        ["ls", "--key", "x", "--task", "y"],
        ["ls", "--option", "no-value"],
        ["ls", "s3:/bucket/x"],
        ["ls", "--timeout", "0"],
        ["ls", "--timeout", "abc"],
        ["ls", "--timeout", "nan"],
        ["ls", ""],
        ["ls", "--base", ""],
        ["ls", "foo://x"],
        ["ls", "a", "b"],
        ["nonsense"],
        ["pin"],
        ["pin", "a", "b", "c"],
        ["pin", "x/y", "-1"],
        ["verify", "--subset", "5"],
        ["verify", "--subset", "0%"],
        ["verify", "--subset", "101%"],
        ["pull", "a", "b", "--step", "1", "--latest"],
    ],
)
def test_a_wrong_call_is_told_from_everything_else(words, train):
    words = [str(train) if word in ("a", "x/y") and words[0] in ("pin", "pull") else word for word in words]
    assert run(*words, code=2).stderr.startswith("error: ")
    assert json.loads(run(*words, "--json", code=2).stderr)["error"] == "usage"


# --- ls, show ----------------------------------------------------------------------------------

CHECKPOINT_FIELDS = {
    "uri": str, "slot": int, "step": (int, type(None)), "attempt": (int, type(None)), "time": str, "kind": str,
    "name": (str, type(None)), "size_bytes": int, "stored_bytes": int, "metadata": dict, "metrics": dict,
    "pinned": bool, "resumed_from": (str, type(None)), "in_lineage": bool,
}  # fmt: skip


def assert_fields(found, expected):
    assert list(found) == list(expected)
    for name, kind in expected.items():
        assert isinstance(found[name], kind), name
    if "time" in found:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", found["time"])


def test_the_document_of_ls(base, train):
    expected = {
        "uri": str, "run": str, "task": str, "name": str, "count": int, "stored_bytes": int, "newest": dict,
        "damaged": list,
    }  # fmt: skip
    found = run_json("ls", base)
    assert list(found) == ["tasks"]
    for one in found["tasks"]:
        assert_fields(one, expected)
        assert_fields(one["newest"], CHECKPOINT_FIELDS)
    task = run_json("ls", train)["tasks"][0]
    assert_fields(task, {**expected, "run": type(None), "checkpoints": list})
    assert [one["step"] for one in task["checkpoints"]] == [3, 2, 1]
    assert task["count"] == 3
    assert task["newest"] == task["checkpoints"][0]
    newest = Checkpoint(str(train), read_only=True).checkpoints_sync()[0]
    assert datetime.fromisoformat(task["newest"]["time"]) == newest.time
    assert task["newest"]["metrics"] == {"loss": 1 / 3}
    assert task["newest"]["metadata"] == {"at": 3}
    assert task["stored_bytes"] == 3


def test_the_tables_of_ls(base, train):
    lines = run("ls", base).stdout.splitlines()
    assert lines[0].split() == ["TASK", "CHECKPOINTS", "STEP", "ATTEMPT", "SAVED", "SIZE"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["by-key/report", "1", "9"],
        ["nightly/etl", "1", "7"],
        ["nightly/train", "3", "3"],
    ]
    run("pin", train, "1")
    run("rollback", train, "2", "--yes")
    lines = run("ls", train).stdout.splitlines()
    assert lines[0] == str(train)
    assert [line.split()[0] for line in lines[2:]] == ["2", "3", "1"]
    assert "left behind" in lines[3]
    assert "pinned" in lines[4]
    assert "loss=0.5" in lines[2]


def test_runs_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("run-10/t", "run-2/t", "run-2/t2", "run-2/t10", "x/t", "9/t", "10/t"):
        saved(tmp_path / "base" / name, steps=(1,))
    found = [line.split()[0] for line in run("ls", tmp_path / "base").stdout.splitlines()[1:]]
    assert found == ["9/t", "10/t", "run-2/t", "run-2/t2", "run-2/t10", "run-10/t", "x/t"]


def test_ls_shows_the_newest_step_that_there_is(tmp_path):
    place = tmp_path / "base" / "run" / "task"
    task = Checkpoint(str(place), keep=10)

    def step_shown():
        return run("ls", tmp_path / "base").stdout.splitlines()[1].split()[2]

    first = task.save_sync(b"0")
    assert step_shown() == "-"
    task.save_sync(b"1", step=1)
    task.save_sync(b"2")
    assert step_shown() == "1"
    run("rollback", first.uri, "--yes")
    assert step_shown() == "-"  # step 1 was left behind


def test_tasks_are_shown_by_the_names_that_they_were_given(tmp_path):
    base = tmp_path / "base"
    code = (
        "import taskckpt; taskckpt.checkpoint(key='Report (EU)').save_sync(b'1'); taskckpt.checkpoint().save_sync(b'1')"
    )
    environment = {**os.environ, "TASKCKPT_BASE": str(base), "TASKCKPT_TASK": "Train(lr=0.1)", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=15)
    saved(base / "local" / "plain", steps=(1,))
    for verb in ("ls", "du", "verify"):
        text = run(verb, base).stdout
        assert [name in text for name in ("by-key/Report (EU) ", "local/Train(lr=0.1) ", "local/plain ")] == [True] * 3
        found = run_json(verb, base)["tasks"]
        assert [one["name"] for one in found] == ["Report (EU)", "Train(lr=0.1)", "plain"]
        assert [one["task"] for one in found] == [Path(one["uri"]).name for one in found]
    assert re.search(r"^task +Report \(EU\)$", run("show", found[0]["uri"]).stdout, re.MULTILINE)
    os.rename(found[1]["uri"], base / "local" / "another")
    assert run_json("show", base / "local" / "another")["name"] == "another"


def test_show_tells_people_about_a_task_in_words(train):
    saved(train, steps=(4,))
    text = run("show", train).stdout
    assert "newest.slot" not in text
    newest = Checkpoint(str(train), read_only=True).checkpoints_sync()[0]
    for line in (
        r"task +train", rf"place +{train}", r"checkpoints +4 \(4 B\)", r"steps +1, 2, 3, 4", r"newest +step 4, bytes",
        r"newest saved +\S.* \(20\d\d-\d\d-\d\dT.*Z\)", r"newest metrics +loss=0\.25", r"newest metadata\.at +4",
        rf"newest URI +{newest.uri}", rf"held by +an attempt \(pid {os.getpid()} on .*\)", r"last wrote +.*Z\)",
        r"keeps +latest:10", r"damaged records +none",
    ):  # fmt: skip
        assert re.search(rf"^{line}$", text, re.MULTILINE), line
    assert re.search(r"^time +(just now|\d+ s ago) \(20.*Z\)$", run("show", train, "--step", 4).stdout, re.MULTILINE)


def test_the_document_of_show(train):
    expected = {
        "uri": str, "run": type(None), "task": str, "name": str, "count": int, "stored_bytes": int, "newest": dict,
        "damaged": list, "steps": list, "pinned_steps": list, "owner": dict,
    }  # fmt: skip
    found = run_json("show", train)
    assert_fields(found, expected)
    assert found["steps"] == [1, 2, 3]
    assert_fields(
        found["owner"],
        {"attempt": type(None), "host": str, "pid": int, "keep": str, "claimed": str, "wrote": str},
    )
    assert found["owner"]["pid"] == os.getpid()
    assert found["owner"]["keep"] == "latest:10"
    one = run_json("show", train, "--step", 2)
    more = {"task": str, "saved_by": dict, "content_blake3": str, "stored_blake3": str, "payload": type(None)}
    assert_fields(one, CHECKPOINT_FIELDS | more)
    assert one["step"] == 2
    assert one["saved_by"]["pid"] == os.getpid()
    text = run("show", train, "--step", 2).stdout
    assert re.search(r"^metadata\.at +2$", text, re.MULTILINE)
    assert (
        run_json("show", train, "--step", 9, code=3)
        if False
        else "1, 2, 3" in run("show", train, "--step", 9, code=3).stderr
    )


def test_attempts_are_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKCKPT_BASE", str(tmp_path / "base"))
    for attempt in (0, 1):
        code = "import taskckpt; cp = taskckpt.checkpoint(); cp.load_sync(); cp.save_sync(b'1')"
        environment = {**os.environ, "TASKCKPT_TASK": "t", "TASKCKPT_ATTEMPT": str(attempt), "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=15)
    found = run_json("ls", tmp_path / "base" / "local" / "t")["tasks"][0]["checkpoints"]
    assert [one["attempt"] for one in found] == [1, 0]
    assert found[0]["resumed_from"] == found[1]["uri"]
    assert run_json("show", "--task", "t")["owner"]["attempt"] == 1


def test_what_cannot_be_read_hides_nothing_else(base, train):
    for path in (base / "nightly" / "etl" / "log").iterdir():
        path.write_bytes(b"nonsense")
    found = run_json("ls", base, code=4)["tasks"]
    assert [one["task"] for one in found] == ["report", "etl", "train"]
    assert [bool(one["damaged"]) for one in found] == [False, True, False]
    assert list(found[1]["damaged"][0]) == ["error", "message", "uri", "hint"]
    assert found[1]["damaged"][0]["error"] == "corrupt"
    assert "nightly/train" in run("ls", base, code=4).stdout
    run("show", base / "nightly" / "etl", code=4)
    newer = next((train / "log").iterdir())
    newer.write_bytes(newer.read_bytes().replace(b'"format": 1', b'"format": 2'))


# --- hostile names -----------------------------------------------------------------------------


def assert_harmless(text):
    assert not [one for one in text if not one.isprintable() and one != "\n"], text


@pytest.fixture
def hostile(tmp_path):
    folder = tmp_path / "src" / "[red]\x1b[2Jx"
    folder.mkdir(parents=True)
    (folder / "f").write_text("1")
    place = tmp_path / "base" / "run" / "\x1b[31m[red]evil"
    metadata: dict[str, Any] = {
        HOSTILE.encode("utf-8", "replace").decode(): [HOSTILE.encode("utf-8", "replace").decode()]
    }
    checkpoint = Checkpoint(str(place))
    checkpoint.save_sync(str(folder), step=1, metadata=metadata, metrics={"lo\x1b[1mss": float("nan")})
    return place


def test_names_of_others_never_reach_the_terminal_raw(hostile, tmp_path):
    base = tmp_path / "base"
    for words in (["ls", base], ["ls", hostile], ["show", hostile], ["show", hostile, "--step", 1], ["du", base],
                  ["verify", base], ["prune", hostile, "--dry-run"], ["pin", hostile, 1], ["unpin", hostile, 1],
                  ["pull", hostile, "out"], ["rollback", hostile, 1, "-y"]):  # fmt: skip
        result = run(*words)
        assert_harmless(result.stdout + result.stderr)
        assert "[red]" in result.stdout, words
        if words[0] not in ("pull", "pin", "unpin", "rollback"):
            result = run(*words, "--json")
            assert_harmless(result.stdout + result.stderr)
            assert result.stdout.isascii()
    for words in (["show", hostile, "--step", 7], ["ls", f"{base}/\x1b[31m"], ["show", base, "--step", "\x1b["]):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code in (2, 3)
        assert_harmless(result.stderr)


@pytest.mark.parametrize("name", ["\u3164", "\U0001f3f3\ufe0f", "\U0001f44d\U0001f3fd", "\x1b[31m", "a\nb", "日本"])
def test_a_hostile_name_shifts_no_row(tmp_path, name):
    for task in (name, "other"):
        saved(tmp_path / "base" / "run" / task, steps=(1,))
    lines = run("ls", tmp_path / "base").stdout.splitlines()
    # By character, as terminals do that join none.
    ends = [sum(1 + (east_asian_width(one) == "W") for one in line[: line.rindex(" B")]) for line in lines[1:]]
    assert ends[0] == ends[1]


def test_numbers_that_json_has_no_word_for(hostile):
    assert run_json("show", hostile, "--step", 1)["metrics"] == {"lo\x1b[1mss": "nan"}


# --- pull --------------------------------------------------------------------------------------


def test_pull_restores_the_one_that_is_named(train, tmp_path):
    def content(*words):
        found = run_json("pull", *words, "--replace", "--yes", "out")
        assert list(found) == ["task", "checkpoint", "path", "kind", "size_bytes", "time"]
        assert found["path"] == str(tmp_path / "out" / "payload")
        return Path(found["path"]).read_bytes()

    assert content(train) == b"3"
    assert content(train, "--latest") == b"3"
    assert content(train, "--step", 2) == b"2"
    assert content(train, "--best", "loss") == b"3"
    assert content(train, "--best", "loss:max") == b"1"
    second = run_json("show", train, "--step", 2)["uri"]
    assert content(second) == b"2"
    assert run_json("pull", second, "--replace", "--yes", "out")["checkpoint"] == second
    run("pin", train, 1)
    assert content(second) == b"2"
    assert "1, 2, 3" in run("pull", train, "--step", 8, "out2", code=3).stderr
    run("pull", train, "--best", "accuracy", "out2", code=3)
    assert not Path("out2").exists()


def test_pull_refuses_a_full_folder(train):
    Path("out").mkdir()
    Path("out/mine").write_text("precious")
    assert json.loads(run("pull", train, "out", "--json", code=9).stderr)["error"] == "already-exists"
    assert Path("out/mine").read_text() == "precious"
    run("pull", train, "out", "--replace", "--yes")
    assert sorted(os.listdir("out")) == ["payload"]


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("more", [[], ["--replace", "--yes"]])
def test_a_forgotten_dest_costs_no_checkpoint(base, train, monkeypatch, more):
    monkeypatch.setenv("TASKCKPT_BASE", str(base))
    monkeypatch.setenv("TASKCKPT_KEY", "report")
    before = files_below(base)
    newest = run_json("show", train)["newest"]["uri"]
    for word in (train, base, base.parent, newest, Path(newest).as_uri(), "s3://bucket/runs/1/train"):
        said = run("pull", word, *more, code=2).stderr
        assert "DEST is missing" in said
        assert f"taskckpt pull {word} FOLDER" in said
    assert files_below(base) == before
    run("pull", "out", *more)
    assert os.listdir("out") == ["payload"]


@pytest.mark.parametrize("dest", ["", "nightly", "nightly/etl", "nightly/etl/log", "nightly/etl/data/a/b", "link"])
def test_pull_writes_into_no_place_of_any_task(base, train, dest):
    (base / "link").symlink_to(base / "nightly" / "etl")
    before = files_below(base)
    said = run("pull", train, base / dest, "--replace", "--yes", code=2).stderr
    assert "the place of a task" in said
    assert files_below(base) == before
    if dest == "nightly/etl/data/a/b":
        run("pull", train, base / dest, code=2)


def test_what_would_be_replaced_is_searched_to_its_end(train):
    saved(Path("deep/1/2/3/4/5/6/task"))
    before = files_below(Path("deep"))
    assert "contains the place" in run("pull", train, "deep", "--replace", "--yes", code=2).stderr
    assert files_below(Path("deep")) == before


def test_a_log_of_others_keeps_no_folder_from_being_restored_to(train):
    for folder in ("out/log", "above/log"):
        Path(folder).mkdir(parents=True)
        Path(folder, "notes.jsonl").write_text("{}")
    run("pull", train, "out", "--replace", "--yes")
    run("pull", train, "above/out")
    assert os.listdir("out") == os.listdir("above/out") == ["payload"]


def test_pull_says_what_is_wrong_with_dest(train):
    Path("file").write_text("mine")
    for dest, words in (("s3://bucket/x", "folder on this machine"), ("file", "DEST is a file"), ("", "DEST is empty")):
        assert words in run("pull", train, dest, code=2).stderr
    Path("full").mkdir()
    Path("full/mine").write_text("precious")
    assert "--replace" in run("pull", train, "full", code=9).stderr


def test_best_is_min_or_max(tmp_path):
    Checkpoint(str(tmp_path / "task")).save_sync(b"1", step=1, metrics={"loss": 1, "eval:loss": 1})
    said = run("pull", tmp_path / "task", "--best", "loss:highest", "out", code=2).stderr
    assert "--best loss:min" in said
    assert "--best loss:max" in said
    run("pull", tmp_path / "task", "--best", "eval:loss", "out")


def test_pull_of_nothing_is_an_error(train):
    run("clear", train, "--yes")
    assert "cleared" in run("pull", train, "out", code=3).stderr
    assert not Path("out").exists()


def test_pull_says_what_it_took_where_the_newest_is_damaged(tmp_path):
    place = tmp_path / "base" / "run" / "task"
    checkpoint = Checkpoint(str(place))
    for step in (1, 2):
        checkpoint.save_sync(os.urandom(100_000), step=step)
    damage(place, 2)
    result = run("pull", place, "out", "--json")
    assert json.loads(result.stdout)["checkpoint"] == run_json("show", place, "--step", 1)["uri"]
    assert "damaged" in json.loads(result.stderr)["warning"]
    assert run("pull", place, "out", "--replace", "--yes").stderr.startswith("warning: ")
    run("pull", place, "--step", 2, "out", "--replace", "--yes", code=4)


# --- verify ------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path):
    """Checkpoints whose payloads are objects of their own, beside a small one."""
    place = tmp_path / "base" / "run" / "large"
    checkpoint = Checkpoint(str(place), keep=None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(os.urandom(1000))
    for step in range(1, 10):
        checkpoint.save_sync(os.urandom(70_000), step=step)
    checkpoint.save_sync(str(tmp_path / "folder"), step=10)
    return place


def test_the_document_of_verify(large):
    found = run_json("verify", large)
    assert list(found) == ["tasks", "damaged"]
    fields = {"uri": str, "run": type(None), "task": str, "name": str, "count": int, "checked": int}
    assert_fields(found["tasks"][0], fields | {"checked_bytes": int, "damaged": list})
    assert found["damaged"] == 0
    assert found["tasks"][0]["checked"] == found["tasks"][0]["count"] == 10
    assert found["tasks"][0]["checked_bytes"] > 9 * 70_000
    assert run("verify", large).stdout.splitlines()[1].split()[-1] == "none"


def test_verify_reports_each_damaged_one(large):
    uris = {damage(large, step) for step in (3, 5, 10)}
    Path(run_json("show", large, "--step", 6)["payload"]).unlink()
    found = run_json("verify", large.parent.parent, code=4)
    assert found["damaged"] == 4
    damaged = {one["checkpoint"]: one for one in found["tasks"][0]["damaged"]}
    assert set(damaged) > uris
    assert all(list(one) == ["checkpoint", "step", "error", "message", "uri", "hint"] for one in damaged.values())
    assert sorted(one["error"] for one in damaged.values()) == ["corrupt", "corrupt", "corrupt", "not-found"]
    said = run("verify", large, code=4)
    assert said.stderr.count("damaged: /") == 4
    assert "(step 5)" in said.stderr
    assert steps_of(large) == list(range(1, 11))


def test_verify_reports_records_that_cannot_be_read(large):
    uri = run_json("show", large, "--step", 4)["uri"]
    Path(uri).write_bytes(b"nonsense")
    found = run_json("verify", large, code=4)["tasks"][0]
    assert [one["checkpoint"] for one in found["damaged"]] == [uri]
    assert found["checked"] == 9
    newest = run_json("show", large, "--step", 10)["uri"]
    Path(newest).write_bytes(b"nonsense")
    assert {one["checkpoint"] for one in run_json("verify", large, code=4)["tasks"][0]["damaged"]} == {uri, newest}


def test_a_subset_has_the_newest_and_a_share_of_the_others(large):
    reads = set()

    def hook(when, verb, keys):
        if when == "before" and verb == "stream":
            reads.update(keys)

    def read_by(*words):
        reads.clear()
        with intercepted(hook):
            run("verify", large, *words)
        return set(reads)

    newest = run_json("show", large)["newest"]["uri"]
    key = run_json("show", newest)["payload"].removeprefix(f"{large}/")
    assert len(read_by()) == 10
    assert read_by("--subset", "1%") == {key}
    drawn = [frozenset(read_by("--subset", "25%")) for _ in range(12)]
    assert all(len(one) == 3 and key in one for one in drawn)
    assert len(set(drawn)) > 1
    damage(large, 10)
    run("verify", large, "--subset", "0.5%", code=4)


def test_what_is_pruned_while_it_is_verified_is_not_damaged(tmp_path):
    place = tmp_path / "base" / "run" / "busy"
    task = Checkpoint(str(place), keep=2)
    for step in range(1, 3):
        task.save_sync(os.urandom(70_000), step=step)
    inside: list[bool] = []

    def hook(when, verb, keys):
        if when == "before" and verb == "stream" and not inside:
            inside.append(True)
            for step in range(3, 8):
                task.save_sync(os.urandom(70_000), step=step)

    with intercepted(hook):
        found = run_json("verify", place)
    assert inside
    assert found["damaged"] == 0


def test_what_is_damaged_is_reported_though_it_is_pinned_meanwhile(large):
    damage(large, 10)
    inside: list[bool] = []

    def hook(when, verb, keys):
        if when == "before" and verb == "stream" and not inside:
            inside.append(True)
            Checkpoint(str(large), keep=None).pin_sync(1)  # which repeats the newest in another slot

    with intercepted(hook):
        found = run_json("verify", large, "--subset", "1%", code=4)
    assert inside
    assert found["damaged"] == 1


# --- du ----------------------------------------------------------------------------------------


def test_du_counts_every_byte_once(base, large):
    key = "data/000000000001-0123456789abcdef/00000099-0123456789abcdef"
    (large / key).parent.mkdir()
    (large / key).write_bytes(b"x" * 1234)
    fields: dict[str, type] = {"uri": str, "run": str, "task": str, "name": str}
    fields |= {"payload_bytes": int, "log_bytes": int, "unreferenced_bytes": int}
    found = run_json("du", base)
    assert list(found) == ["tasks", "total"]
    for one in found["tasks"]:
        assert_fields(one, fields | {"objects": int})
        files = [path for path in Path(one["uri"]).rglob("*") if path.is_file()]
        parts = [one["payload_bytes"], one["log_bytes"], one["unreferenced_bytes"]]
        assert sum(parts) == sum(path.stat().st_size for path in files)
        assert one["objects"] == len(files)
        assert one["unreferenced_bytes"] == (1234 if one["task"] == "large" else 0)
    assert list(found["total"]) == [*list(fields)[4:], "objects"]
    assert found["total"]["objects"] == sum(one["objects"] for one in found["tasks"])
    in_objects = sum(one.stored_bytes for one in Checkpoint(str(large), read_only=True).checkpoints_sync())
    assert next(one for one in found["tasks"] if one["task"] == "large")["payload_bytes"] == in_objects
    assert run("du", base).stdout.splitlines()[-1].startswith("total")


# --- prune, pin, rollback, clear ---------------------------------------------------------------


def test_prune_says_why_and_deletes_only_when_told_to(train):
    def kept(*words):
        found = run_json("prune", train, "--keep", "latest:1|best:1:loss:max", *words)
        assert list(found) == ["task", "dry_run", "checkpoints"]
        for one in found["checkpoints"]:
            assert_fields(one, {"keeps": bool, "reason": str, "checkpoint": dict})
            assert_fields(one["checkpoint"], CHECKPOINT_FIELDS)
        assert found["dry_run"] == ("--dry-run" in words)
        return {one["checkpoint"]["step"]: one["keeps"] for one in found["checkpoints"]}

    assert kept("--dry-run") == {3: True, 2: False, 1: True}
    text = run("prune", train, "--keep", "latest:1", "--dry-run").stdout
    assert re.search(r"^ +2 .* delete +\S", text, re.MULTILINE)
    assert steps_of(train) == [1, 2, 3]
    run("prune", train, "--keep", "latest:1", code=2)
    assert steps_of(train) == [1, 2, 3]
    assert kept("--yes") == {3: True, 2: False, 1: True}
    assert steps_of(train) == [1, 3]
    assert kept("--yes") == {3: True, 1: True}
    run("prune", train, "--keep", "latest:0", code=2)


def test_prune_keeps_what_the_task_keeps_by_default(tmp_path):
    place = tmp_path / "task"
    saved(place, steps=range(1, 5), keep=4)
    assert all(one["keeps"] for one in run_json("prune", place, "--dry-run")["checkpoints"])
    saved(place, steps=(5,), keep=None)
    assert all(one["keeps"] for one in run_json("prune", place, "--dry-run")["checkpoints"])


def test_pins_hold_against_prune_until_they_are_unpinned(train):
    assert list(run_json("pin", train, 1)) == ["task", "checkpoint"]
    assert run_json("show", train)["pinned_steps"] == [1]
    run("prune", train, "--keep", "latest:1", "--yes")
    assert steps_of(train) == [1, 3]
    assert run_json("unpin", train, 1)["checkpoint"]["pinned"] is False
    run("prune", train, "--keep", "latest:1", "--yes")
    assert steps_of(train) == [3]
    assert "There is the step 3" in run("pin", train, 1, code=3).stderr


def test_pin_keeps_everything_else_as_it_is(train):
    saved(train, steps=range(4, 9), keep=None)
    for step in (2, 7):
        run("pin", train, step)
    run("unpin", train, 2)
    run("rollback", train, 5, "-y")
    assert steps_of(train) == list(range(1, 9))


def test_rollback_and_clear(train):
    found = run_json("rollback", train, 2, "--yes")
    assert list(found) == ["task", "checkpoint"]
    assert_fields(found["checkpoint"], CHECKPOINT_FIELDS)
    assert Checkpoint(str(train)).load_bytes_sync() == b"2"
    assert run_json("clear", train, "--yes") == {"task": str(train), "cleared": 3}
    assert Checkpoint(str(train)).load_bytes_sync() is None
    assert run_json("ls", train)["tasks"][0]["newest"] is None
    assert "No checkpoint" in run("ls", train).stdout


def test_checkpoints_without_a_step_are_named_by_their_uri(tmp_path):
    place = tmp_path / "task"
    task = Checkpoint(str(place), keep=10)
    uris = [task.save_sync(b"%d" % number).uri for number in range(4)]
    lines = run("ls", place).stdout.splitlines()
    assert [line.split()[-1] for line in lines[2:]] == uris[::-1]
    assert run_json("pin", uris[1])["checkpoint"]["pinned"] is True
    run("prune", place, "--keep", "latest:2", "--yes")
    found = run_json("ls", place)["tasks"][0]["checkpoints"]
    assert [one["pinned"] for one in found] == [False, False, True]
    assert run_json("unpin", Path(uris[1]).as_uri())["checkpoint"]["pinned"] is False
    run("rollback", uris[2], "--yes")
    assert Checkpoint(str(place)).load_bytes_sync() == b"2"
    run("rollback", uris[0], "--yes", code=3)
    assert "whole number" in run("pin", place, uris[1], code=2).stderr


def test_a_running_task_is_left_alone(tmp_path):
    place = tmp_path / "base" / "run" / "task"
    task = saved(place, steps=range(1, 6), keep=10)
    for words in (["ls", place], ["show", place], ["verify", place], ["du", place], ["pull", place, "out"],
                  ["prune", place, "--dry-run", "--keep", "latest:1"]):  # fmt: skip
        before = sorted(path.name for path in (place / "log").iterdir())
        run(*words)
        assert sorted(path.name for path in (place / "log").iterdir()) == before
    task.save_sync(b"6", step=6)
    for words in (["pin", place, 2], ["prune", place, "--keep", "latest:2", "-y"], ["unpin", place, 2]):
        run(*words)
        step = task.latest_step_sync() + 1
        task.save_sync(b"%d" % step, step=step)
    assert steps_of(place) == [2, 6, 7, 8, 9]
    task.save_sync(b"10", step=10)


def test_a_pin_outlasts_the_saves_of_a_task_that_runs(tmp_path):
    task = saved(tmp_path / "task", steps=(1, 2), keep=2)
    assert process("pin", tmp_path / "task", 1).returncode == 0
    for step in range(3, 8):
        task.save_sync(b"%d" % step, step=step)
    assert steps_of(tmp_path / "task") == [1, 6, 7]
    assert process("unpin", tmp_path / "task", 1).returncode == 0
    for step in range(8, 11):
        task.save_sync(b"%d" % step, step=step)
    assert steps_of(tmp_path / "task") == [9, 10]


@pytest.mark.parametrize("words", [["rollback", "1"], ["clear"]])
def test_a_running_task_that_is_rolled_back_or_cleared_ends(tmp_path, words):
    place = tmp_path / "task"
    task = saved(place)
    verb, *rest = words
    run(verb, place, *rest, "--yes")
    with pytest.raises(StaleAttemptError):
        task.save_sync(b"4", step=4)
    assert steps_of(place) == ([1, 2, 3] if verb == "rollback" else [])


# --- asking ------------------------------------------------------------------------------------

DESTRUCTIVE = (["pull", "full", "--replace"], ["prune", "--keep", "latest:1"], ["rollback", "1"], ["clear"])


@pytest.mark.parametrize("words", DESTRUCTIVE, ids=lambda words: words[0])
def test_without_a_terminal_nobody_is_asked_and_nothing_done(train, words):
    verb, *rest = words
    Path("full").mkdir()
    Path("full/mine").write_text("precious")
    before = sorted((train / "log").iterdir())
    done = process(verb, train, *rest)
    assert done.returncode == 2
    assert "--yes" in done.stderr
    assert json.loads(process(verb, train, *rest, "--json").stderr)["error"] == "usage"
    assert sorted((train / "log").iterdir()) == before
    assert os.listdir("full") == ["mine"]


def at_terminal(*words, answer):
    """The command at a terminal, and what was typed there; its code, and all that it showed."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-m", "taskckpt", *map(str, words)],
                  {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "60"})  # fmt: skip
    shown = b""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            data = os.read(terminal, 1024)
        except OSError:  # it has ended
            break
        if not data:
            break
        shown += data
        if answer and b"[y/N]" in shown:
            time.sleep(0.3)  # until it reads: Python may sleep through a Ctrl-C that comes just before
            os.write(terminal, answer)
            answer = b""
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode()


def test_at_a_terminal_it_asks_and_says_who_loses_the_task(train):
    code, shown = at_terminal("rollback", train, "1", answer=b"n\n")
    assert code == _exits.DECLINED
    text = " ".join(shown.split())
    assert "goes back to step 1" in text
    assert f"pid {os.getpid()}" in text
    assert "last wrote" in text
    assert "Nothing was done" in text
    code, shown = at_terminal("clear", train, answer=b"\n")  # No is the default
    assert code == _exits.DECLINED
    assert "3 checkpoints" in shown
    code, _ = at_terminal("clear", train, answer=b"\x03")
    assert code == _exits.INTERRUPTED
    assert steps_of(train) == [1, 2, 3]
    Path("full").mkdir()
    Path("full/mine").write_text("precious")
    code, shown = at_terminal("pull", train, "full", "--replace", answer=b"n\n")
    assert code == _exits.DECLINED
    assert "1 entry" in shown
    assert os.listdir("full") == ["mine"]
    code, shown = at_terminal("pull", train, "full", "--replace", answer=b"y\n")
    assert code == 0
    assert os.listdir("full") == ["payload"]
    code, shown = at_terminal("prune", train, "--keep", "latest:1", answer=b"y\n")
    assert code == 0
    assert steps_of(train) == [3]


def test_a_narrow_terminal_cuts_nothing(hostile, tmp_path):
    code, shown = at_terminal("ls", tmp_path / "base", answer=b"")
    assert code == 0
    assert "\x1b[31m" not in shown
    place = tmp_path / ("a-long-name-" * 8)
    saved(place)
    code, shown = at_terminal("ls", tmp_path, answer=b"")
    assert place.name in re.sub(r"\x1b\[[0-9;]*m|\s", "", shown).replace("TASK", "") or "a-long-name" in shown
    assert "…" not in shown


# --- how it ends -------------------------------------------------------------------------------


def test_every_exit_code_is_reached(base, train, tmp_path, moto, new_bucket, monkeypatch):
    """Once each, in this process; 141 and 130 need one of their own."""
    reached = {}

    def reach(*words, **more):
        code = CliRunner().invoke(main, [str(word) for word in words], **more).exit_code
        reached[code] = words

    reach("ls", base)
    reach("ls", base, "--timeout", "x")
    reach("ls", base / "nowhere")
    with monkeypatch.context() as patch:
        patch.setattr("taskckpt.cli._look._looked", lambda task: 1 / 0)
        reach("ls", base)
    with intercepted(lambda when, verb, keys: _stale(verb, train)):
        reach("pin", train, 1)
    with intercepted(_unavailable):
        reach("ls", base)
    with intercepted(_denied):
        reach("ls", base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    reach("pull", train, tmp_path / "full")
    etl = base / "nightly" / "etl"
    for path in (etl / "log").iterdir():
        path.write_bytes(b"nonsense")
    reach("verify", etl)
    from blake3 import blake3

    for path in (base / "by-key" / "report" / "log").iterdir():
        first = path.read_bytes().partition(b"\n")[0].replace(b'"format": 1', b'"format": 99') + b"\n"
        path.write_bytes(first + json.dumps({"blake3": blake3(first).hexdigest()}).encode() + b"\n")
    reach("show", base / "by-key" / "report")
    reach("engines")
    reach("run", "--key", "a", "--", "no-such-command")
    reach("run", "--key", "a", "--", tmp_path)
    assert set(reached) == set(_exits.MEANINGS) - {_exits.DECLINED, _exits.INTERRUPTED, _exits.BROKEN_PIPE}, reached


_taken: list[bool] = []


def _stale(verb, place):
    if verb == "create" and not _taken:
        _taken.append(True)
        saved(place, steps=(50,))


def _unavailable(when, verb, keys):
    raise errors.UnavailableError("no answer")


def _denied(when, verb, keys):
    raise errors.DeniedError("not you")


def test_each_error_has_the_code_of_its_group():
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TaskckptError)
    ]
    codes = {kind.code: _exits.code_of(kind("x")) for kind in kinds}
    assert codes["usage"] == codes["missing-dependency"] == codes["identity-mismatch"] == 2
    assert codes["not-found"] == 3
    assert codes["corrupt"] == codes["unsafe-archive"] == 4
    assert codes["stale-attempt"] == 5
    assert codes["unavailable"] == codes["storage-full"] == codes["commit-unknown"] == 6
    assert codes["denied"] == 7
    assert codes["unsupported-format"] == 8
    assert codes["already-exists"] == 9
    assert set(codes.values()) <= set(_exits.MEANINGS)


def test_the_help_and_the_page_tell_all_codes():
    page = (ROOT / "docs" / "cli.md").read_text()
    assert {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.*?) \|", page, re.MULTILINE)} == (
        _exits.MEANINGS
    )
    text = " ".join(run("--help").stdout.split())
    assert all(f"{code} {meaning}" in text for code, meaning in _exits.MEANINGS.items())


def test_the_page_tells_all_verbs_options_and_fields(base, train):
    page = (ROOT / "docs" / "cli.md").read_text()
    for name, command in main.commands.items():
        assert f"`{name}" in page
        for parameter in command.params:
            assert all(f"`{option}" in page for option in parameter.opts if option.startswith("--")), parameter
    documents = [run_json(*words) for words in (
        ["ls", train], ["show", train], ["show", train, "--step", 1], ["verify", base], ["du", base],
        ["prune", train, "--dry-run"], ["pull", train, "out"],
    )]  # fmt: skip

    def fields(value):
        for name, one in value.items():
            yield name
            if name in ("metadata", "metrics", "saved_by"):
                continue
            for inner in one if isinstance(one, list) else [one]:
                if isinstance(inner, dict):
                    yield from fields(inner)

    missing = {name for document in documents for name in fields(document) if f"`{name}`" not in page}
    assert not missing


def test_an_error_is_one_line_and_a_traceback_only_if_wanted(base):
    said = process("ls", base / "nowhere")
    assert said.returncode == 3
    assert said.stdout == ""
    assert len(said.stderr.splitlines()) == 1
    assert said.stderr.startswith("error: There is no task")
    assert "Hint: " in said.stderr
    said = process("ls", base / "nowhere", "--debug")
    assert "Traceback" in said.stderr
    assert said.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls", ""], "TARGET is empty"),
        (["ls", "{{workflow.name}}"], "which nobody filled in"),
        (["ls", "--base", " "], "--base is empty"),
        (["ls", "file"], "TARGET is a file"),
        (["ls", "foo://x"], "There are s3://"),
        (["ls", "s4://x"], "Did you mean s3://"),
        (["ls", "--timeout", "abc"], "a number of seconds above 0"),
        (["ls", "$HOME/x"], "Let the shell expand it"),
    ],
)
def test_hints_are_in_words_of_the_command_line(words, said):
    Path("file").write_text("mine")
    text = run(*words, code=2).stderr
    assert said in text
    for python in ("os.path", "mean root", "float range", "no place to save to", "fsspec.available", "another base"):
        assert python not in text


def test_all_that_is_damaged_is_told_with_a_command(tmp_path):
    task = Checkpoint(str(tmp_path / "task"))
    task.save_sync(os.urandom(70_000), step=1)
    damage(tmp_path / "task", 1)
    said = run("pull", tmp_path / "task", "out", code=4).stderr
    assert "or start over: taskckpt clear" in said
    assert "clear()" not in said


def test_what_is_said_in_other_words_is_said_by_the_package():
    sources = [path.read_text() for path in (ROOT / "taskckpt").rglob("*.py") if "cli" not in path.parts]
    assert [python for python, _ in _exits.WORDS if not any(python in source for source in sources)] == []


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_no_error(base, train, closed):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in (f"ls '{base}'", f"pull '{train}' out --replace --yes"):
        command = f"'{sys.executable}' -m taskckpt {words} {closed}"
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=15)  # noqa: PLW1510
        assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir("out") == ["payload"]
    command = f"'{sys.executable}' -m taskckpt clear '{train}' {closed}"
    assert subprocess.run(["bash", "-c", command], env=environment, capture_output=True, timeout=15).returncode == 2  # noqa: PLW1510


def test_a_reader_that_leaves_is_no_error(base):
    for number in range(40):
        saved(base / "many" / f"task-{number:04d}-{'x' * 60}", steps=(1,))
    command = f"'{sys.executable}' -m taskckpt ls '{base}' --json | head -c 10; echo \"${{PIPESTATUS[0]}}\" >&2"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=15, check=True
    )
    assert done.stderr.split() in (["0"], ["141"])  # 0: all of it fitted into the pipe before head left


def test_a_pipe_that_is_closed_is_no_error(base):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = process("ls", base, capture_output=False, stdout=closed, stderr=subprocess.PIPE)
    assert done.returncode == _exits.BROKEN_PIPE
    assert done.stderr == ""


def test_control_c_ends_it_cleanly(tmp_path):
    place = tmp_path / "base" / "run" / "task"
    saved(place)
    code = (
        "import sys, time, os, signal\n"
        "from taskckpt.testing import intercepted\n"
        "from taskckpt.cli import main\n"
        "def hook(when, verb, keys):\n"
        "    if verb == 'folders': os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
        f"with intercepted(hook): main(['ls', {str(place)!r}])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=15, check=False
    )
    assert done.returncode == _exits.INTERRUPTED
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_output_for_a_pipe_is_plain_and_never_cut(tmp_path):
    place = tmp_path / "base" / "run" / ("x" * 80)
    metrics = {f"a-metric-of-a-long-name-{number}": number / 7 for number in range(20)}
    Checkpoint(str(place)).save_sync(b"1", step=1, metrics=metrics)
    done = process("ls", place, env={"COLUMNS": "40", "TERM": "xterm-256color", "FORCE_COLOR": ""})
    assert "\x1b" not in done.stdout
    assert all(name in done.stdout for name in metrics)
    assert len(done.stdout.splitlines()) == 3


def test_the_command_is_installed_and_knows_its_version():
    from importlib.metadata import version

    assert process("--version").stdout.split()[-1] == version("taskckpt")
    command = Path(sys.executable).parent / "taskckpt"
    done = subprocess.run([str(command), "--help"], capture_output=True, text=True, timeout=15, check=True)
    assert done.stdout.startswith("Usage: taskckpt ")


def test_warnings_are_said_on_stderr(train, monkeypatch):
    import warnings

    monkeypatch.setattr(
        "taskckpt.cli._look.history",
        lambda task: warnings.warn("look\x1bout", taskckpt.TaskckptWarning, stacklevel=1),
    )
    result = CliRunner().invoke(main, ["ls", str(train)])
    assert "warning: look\\x1bout" in result.stderr


# --- a store elsewhere -------------------------------------------------------------------------


def as_words(options):
    return [word for name, value in options.items() for word in ("--option", f"{name}={json.dumps(value)}")]


def test_tasks_of_a_whole_bucket_are_found_through_fsspec_too(moto, new_bucket, monkeypatch):
    monkeypatch.setenv("TASKCKPT_TRANSFER", "fsspec")
    bucket = new_bucket(moto)
    for name in ("base/run/one", "base/run/two"):
        Checkpoint(f"s3://{bucket}/{name}", storage_options=moto.storage_options).save_sync(b"1", step=1)
    assert names(f"s3://{bucket}", *as_words(moto.storage_options)) == ["one", "two"]
    assert run_json("du", f"s3://{bucket}", *as_words(moto.storage_options))["total"]["objects"] == 4


def test_a_round_on_s3(s3_server, s3_bucket, tmp_path):
    url = f"s3://{s3_bucket}/base"
    options = s3_server.storage_options
    said = as_words(options)
    task = Checkpoint(f"{url}/run/task", keep=10, storage_options=options)
    for step in range(1, 5):
        task.save_sync(os.urandom(70_000), step=step)
    Checkpoint(f"{url}/by-key/other", storage_options=options).save_sync(b"1")
    assert names(f"s3://{s3_bucket}", *said) == ["other", "task"]
    assert names(url, *said) == ["other", "task"]
    assert names("--base", url, "--run", "run", *said) == ["task"]
    found = run_json("ls", f"{url}/run/task", *said)["tasks"][0]["checkpoints"]
    assert [one["step"] for one in found] == [4, 3, 2, 1]
    assert run_json("show", found[2]["uri"], *said)["step"] == 2
    assert run_json("verify", url, *said)["damaged"] == 0
    used = run_json("du", url, *said)["total"]
    assert used["payload_bytes"] == 4 * 70_000
    assert used["unreferenced_bytes"] == 0
    run("pin", f"{url}/run/task", 1, *said)
    run("prune", f"{url}/run/task", "--keep", "latest:2", "--yes", *said)
    task.save_sync(b"5", step=5)
    assert run_json("show", f"{url}/run/task", *said)["steps"] == [1, 3, 4, 5]
    run("rollback", f"{url}/run/task", 3, "--yes", *said)
    with pytest.raises(StaleAttemptError):
        task.save_sync(b"6", step=6)
    pulled = run_json("pull", f"{url}/run/task", tmp_path / "out", *said)
    assert pulled["size_bytes"] == 70_000
    run("clear", f"{url}/run/task", "--yes", *said)
    run("pull", f"{url}/run/task", tmp_path / "out2", *said, code=3)
    assert "task" in run("ls", f"{url}/run/tsk", *said, code=3).stderr
    run("ls", f"s3://{s3_bucket}-that-is-not-there/base", *said, code=3)
