"""``taskckpt engines``: who is this, who says so, and what is missing; whatever state that is in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import taskckpt
from taskckpt import Checkpoint, engines
from taskckpt.cli import _explain, main
from taskckpt.engines import EngineTask
from taskckpt.errors import DeniedError, UsageError
from taskckpt.testing import intercepted

ROOT = Path(__file__).parent.parent.parent
MISSING = 11


def look(*words, code=0):
    """The command in this process; it must end with that code."""
    result = CliRunner().invoke(main, ["engines", *words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def look_json(*words, code=0):
    return json.loads(look("--json", *words, code=code))


def codes(found):
    return [one["code"] for one in found["problems"]]


@pytest.fixture
def engine():
    """Registers an engine for the test, that says what the test wants."""
    names: list[str] = []

    def register(answer, name="nightly"):
        def find():
            if isinstance(answer, Exception):
                raise answer
            return answer

        engines.register(name, find)
        names.append(name)

    yield register
    for name in names:
        engines.unregister(name)


@pytest.fixture
def a_task(monkeypatch, tmp_path):
    """Who this is, and where, is said by variables."""
    monkeypatch.setenv("TASKCKPT_BASE", str(tmp_path / "base"))
    monkeypatch.setenv("TASKCKPT_RUN", "2026-11-21")
    monkeypatch.setenv("TASKCKPT_TASK", "etl")


def mounted(monkeypatch, kind, at="/"):
    monkeypatch.setattr(_explain, "_mounted", lambda path: (kind, at))


ETL = EngineTask("nightly", run="nightly/7", task="etl", attempt=2, sources={"task": "nightly.current.task"})


# --- what is there -----------------------------------------------------------------------------


def test_a_task_that_is_named_and_has_a_base_misses_nothing(a_task, tmp_path):
    found = look_json()
    assert found["problems"] == []
    assert found["context"]["place"] == str(tmp_path / "base" / "2026-11-21" / "etl")
    assert found["context"]["origins"]["task"] == "TASKCKPT_TASK"
    assert found["base"]["origin"] == "TASKCKPT_BASE"
    assert (found["base"]["reachable"], found["base"]["writable"]) == (True, True)
    assert found["engine"] is None
    assert {"flyte", "prefect", "celery"} <= {one["name"] for one in found["engines"]}
    assert not any(one["detected"] for one in found["engines"])
    assert found["variables"] == ["TASKCKPT_BASE", "TASKCKPT_RUN", "TASKCKPT_TASK"]
    assert not (tmp_path / "base").exists()  # it only looked


def test_people_read_the_same(a_task):
    text = look()
    assert "No engine runs this." in text
    assert "from TASKCKPT_RUN" in text
    assert "taskckpt.engines.explain()" in text  # what lives in another process cannot be seen from here
    assert "Nothing is missing" in text
    assert "prefect" in text
    assert "not detected" not in text
    assert "not detected" in look("--all")


def test_an_engine_is_shown_with_its_sources(engine, a_task, monkeypatch):
    engine(ETL)
    monkeypatch.delenv("TASKCKPT_RUN")
    monkeypatch.delenv("TASKCKPT_TASK")
    mounted(monkeypatch, "nfs4", "/mnt")
    found = look_json()
    one = next(one for one in found["engines"] if one["name"] == "nightly")
    assert one["detected"]
    assert (one["layer"], one["task"]["task"], one["task"]["attempt"]) == ("task", "etl", 2)
    assert one["task"]["sources"] == {"task": "nightly.current.task"}
    assert found["engine"]["run"] == "nightly/7"
    assert (found["context"]["run"], found["context"]["task"], found["context"]["attempt"]) == ("nightly/7", "etl", 2)
    text = look()
    assert "nightly (task) runs this:" in text
    assert "from nightly.current.task" in text


def test_variables_override_an_engine_and_that_is_seen(engine, a_task, monkeypatch):
    engine(ETL)
    mounted(monkeypatch, "nfs4", "/mnt")
    found = look_json()
    assert found["engine"]["run"] == "nightly/7"
    assert found["context"]["run"] == "2026-11-21"
    assert found["context"]["origins"]["run"] == "TASKCKPT_RUN"


# --- what is missing ---------------------------------------------------------------------------


def test_nobody_says_which_task_this_is_nor_where():
    found = look_json(code=MISSING)
    assert found["context"] is None
    assert codes(found) == ["no-task-context", "base-made-up"]
    text = look(code=MISSING)
    assert "Missing: Nobody says which task this is." in text
    assert "Set TASKCKPT_BASE to a place that all hosts share" in text


def test_an_ambiguous_identity_is_missing_something_until_it_is_named(engine, a_task, monkeypatch):
    mounted(monkeypatch, "nfs4", "/mnt")
    why = "Two mapped tasks have this name."
    engine(EngineTask("nightly", run="r", task="t", ambiguous=why, hint="Set TASKCKPT_TASK=t/{index}."))
    assert codes(look_json()) == []  # it is named by variables
    monkeypatch.delenv("TASKCKPT_TASK")
    found = look_json(code=MISSING)
    assert codes(found) == ["ambiguous-identity"]
    assert "Set TASKCKPT_TASK=t/{index}" in found["problems"][0]["hint"]
    assert why in look(code=MISSING)
    monkeypatch.setenv("TASKCKPT_KEY", "mine")
    assert codes(look_json()) == []


@pytest.mark.parametrize(
    "error", [RuntimeError("no context\x1b[31m"), ImportError("half imported"), UsageError("bad", hint="Do this.")]
)
def test_an_engine_that_fails_is_told_and_hides_nothing(engine, error):
    engine(error)
    engine(ETL, name="inner")
    found = look_json(code=MISSING)
    assert next(one for one in found["engines"] if one["name"] == "nightly")["error"]
    assert next(one for one in found["engines"] if one["name"] == "inner")["detected"]
    assert codes(found)[0] == "engine-failed"
    text = look(code=MISSING)
    assert "nightly could not be asked: " in text
    assert "Traceback" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("variables", "code"),
    [
        ({"TASKCKPT_ENGINE": "no-such-engine"}, "usage"),
        ({"TASKCKPT_ATTEMPT": "second", "TASKCKPT_TASK": "t"}, "usage"),
        ({"TASKCKPT_TASK": "{{name}}"}, "usage"),
        ({"TASKCKPT_AMBIGUOUS": "2"}, "ambiguous-identity"),
        ({"TASKCKPT_BASE": "s3:/bucket"}, "usage"),
    ],
)
def test_contradictions_are_told_once(monkeypatch, variables, code):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = look_json(code=MISSING)
    assert codes(found).count(code) == 1


def test_a_variable_that_nobody_reads_is_noticed(a_task, monkeypatch):
    monkeypatch.setenv("TASKCKPT_ATEMPT", "secret")
    text = look()
    assert "TASKCKPT_ATEMPT is no variable of taskckpt: is it TASKCKPT_ATTEMPT?" in text
    assert "secret" not in text
    assert "secret" not in look("--json")


# --- the base ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "at", "code", "notes"),
    [
        ("overlay", "/", ["base-local"], 0),
        ("tmpfs", "/scratch", ["base-local"], 0),
        ("ext4", "/", ["base-local"], 0),
        ("ext4", "/data", [], 1),
        ("nfs4", "/home", [], 0),
        ("fuse.gcsfuse", "/gcs", [], 0),
        (None, None, [], 0),
    ],
)
def test_a_local_base_is_missing_something_where_a_retry_may_run_elsewhere(
    engine, a_task, monkeypatch, kind, at, code, notes
):
    mounted(monkeypatch, kind, at)
    assert codes(look_json()) == []  # on a machine of one's own
    engine(ETL)
    found = look_json(code=MISSING if code else 0)
    assert (codes(found), len(found["notes"])) == (code, notes)


def test_in_any_pod_a_retry_may_run_elsewhere(a_task, monkeypatch):
    mounted(monkeypatch, "overlay")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert codes(look_json(code=MISSING)) == ["base-local"]


def test_what_the_engine_offers_is_as_it_means_it(engine, monkeypatch, tmp_path):
    mounted(monkeypatch, "overlay")
    engine(EngineTask("nightly", run="r", task="t", base=str(tmp_path / "offered")))
    assert codes(look_json()) == []


def test_the_type_of_a_file_system_is_that_of_the_innermost_mount(tmp_path):
    kind, at = _explain._mounted(str(tmp_path / "not" / "there"))
    if not Path("/proc/self/mounts").exists():
        assert (kind, at) == (None, None)
    else:
        assert kind
        assert at
        assert os.path.ismount(at)
        assert _explain._mounted("/proc/self/x")[0] == "proc"


def test_a_base_that_is_a_file(a_task, tmp_path):
    (tmp_path / "base").write_text("")
    found = look_json(code=MISSING)
    assert len(found["problems"]) == 1
    assert codes(found)[0].startswith("base-")


def test_a_base_in_memory(a_task, monkeypatch):
    monkeypatch.setenv("TASKCKPT_BASE", "memory://here")
    assert codes(look_json(code=MISSING)) == ["base-in-memory"]


def test_a_base_that_may_not_be_listed_or_written_to(a_task):
    def refuse(*_):
        raise DeniedError("No.", hint="Ask.")

    with intercepted(lambda when, verb, keys: refuse() if verb == "folders" else None):
        found = look_json(code=MISSING)
        assert codes(found) == ["base-denied"]
        assert found["base"]["reachable"] is False
    with intercepted(lambda when, verb, keys: refuse() if verb == "create" else None):
        assert codes(look_json()) == []
        found = look_json("--check-base", code=MISSING)
        assert codes(found) == ["base-denied"]
        assert (found["base"]["reachable"], found["base"]["writable"]) == (True, False)


def test_a_base_that_hangs_does_not_hang_this(a_task):
    over = threading.Event()

    def hang(*_):
        over.wait(15)

    with intercepted(hang):
        began = time.monotonic()
        found = look_json("--timeout", "0.1", code=MISSING)
        took = time.monotonic() - began
        over.set()
    assert took < 8
    assert codes(found) == ["base-unreachable"]


def test_check_base_writes_and_leaves_nothing(a_task, tmp_path):
    assert look_json("--check-base")["base"]["writable"] is True
    assert list((tmp_path / "base").iterdir()) == []


def test_nobody_is_fenced(a_task, tmp_path):
    running = taskckpt.checkpoint()
    running.save_sync(b"1")
    look("--check-base")
    running.save_sync(b"2")
    place = tmp_path / "base" / "2026-11-21" / "etl"
    assert Checkpoint(place, read_only=True).load_bytes_sync() == b"2"


def test_no_password_is_shown():
    assert _explain._masked("sftp://me:pa55@host/x and s3://bucket/x") == "sftp://***@host/x and s3://bucket/x"
    assert _explain._masked("az://c/x?sv=1&sig=abc, then") == "az://c/x?***, then"
    assert _explain._masked("abfss://container@account.dfs/x") == "abfss://container@account.dfs/x"


# --- in a process of its own, and within a task ------------------------------------------------


def test_it_runs_by_itself(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "taskckpt", "engines"], capture_output=True, text=True, timeout=15, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TASKCKPT_KEY": "k", "TASKCKPT_BASE": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path / "by-key" / "k") in done.stdout


def test_a_batch_system_calls_a_task_after_its_program(tmp_path):
    def ask(*words):
        slurm = {
            "SLURM_JOB_ID": "77",
            "SLURMD_NODENAME": "n1",
            "SLURM_CLUSTER_NAME": "main",
            "SLURM_RESTART_COUNT": "2",
        }
        done = subprocess.run(
            [sys.executable, "-m", "taskckpt", "engines", "--json", *words], capture_output=True, text=True, timeout=15,
            check=False, stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TASKCKPT_BASE": str(tmp_path), **slurm},
        )  # fmt: skip
        return json.loads(done.stdout)

    found = ask("--program", "train.py")
    assert (found["context"]["run"], found["context"]["task"]) == ("slurm/main/77", "train.py")
    assert found["context"]["attempt"] == 2
    assert not any("--program" in note for note in found["notes"])
    assert any("--program" in note for note in ask()["notes"])


def test_within_a_task_the_task_is_seen(tmp_path):
    @taskckpt.task(key="inside", base=str(tmp_path))
    def inside():
        return engines.explain()

    text = inside()
    assert "from @task" in text
    assert str(tmp_path / "by-key" / "inside") in text
    assert "This is a process of its own" not in text
