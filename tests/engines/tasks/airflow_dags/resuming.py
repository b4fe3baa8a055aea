"""DAGs whose tasks count, save, die and say what they found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

try:
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.sdk import dag, get_current_context, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task
    from airflow.operators.bash import BashOperator
    from airflow.operators.python import get_current_context

import taskckpt
from taskckpt import engines

STEPS = 4
SHELL = Path(__file__).parent.parent / "airflow_shell.py"
FOLDER = Path(os.environ["JOURNAL"]).parent


def note(what, **values):
    """One line of the journal, from any process."""
    with open(os.environ["JOURNAL"], "a") as journal:
        journal.write(json.dumps({"what": what, "pid": os.getpid(), **values}) + "\n")


def current(**how):
    context = taskckpt.ctx(**how)
    assert context is not None
    return context


def found():
    said = engines.detect()
    assert said is not None
    return {
        "run": said.run, "task": said.task, "attempt": said.attempt, "generation": said.generation,
        "execution": repr(said.execution), "run_id": get_current_context()["run_id"],
    }  # fmt: skip


def count(die=None, item=0, what="count", on_clear="keep"):
    """Counts to STEPS; the first try dies half-way. What was saved says whose it is."""
    checkpoint = current(on_clear=on_clear).checkpoint
    state = checkpoint.load_state_sync() or {"item": item, "step": 0}
    note(what, item=item, of=state["item"], resumes_from=state["step"], **found())
    first = state["step"] == 0
    while state["step"] < STEPS:
        if first and state["step"] == STEPS // 2 and die:
            if die == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ConnectionError("half-way")
        state["step"] += 1
        checkpoint.save_state_sync(state)
    return state["step"]


@dag(schedule=None, default_args={"retries": 2, "retry_delay": 0.1})
def resuming():
    @task
    def mapped(item: int):
        # Both have begun before either dies.
        (FOLDER / f"{get_current_context()['run_id']}-{item}").touch()
        until(lambda: len(list(FOLDER.glob(f"{get_current_context()['run_id']}-*"))) == 2)
        count("kill" if item else "raise", item)

    @task
    def stale():
        checkpoint = taskckpt.checkpoint()
        checkpoint.save_state_sync({"step": 1})
        twin = taskckpt.Checkpoint(current().place.uri)
        twin.load_state_sync()
        note("stale", **found())
        checkpoint.save_state_sync({"step": 2})

    mapped.expand(item=[0, 1])
    stale()


@dag(schedule=None, default_args={"retries": 0, "retry_delay": 0.1})
def cleared():
    @task
    def cleared_after():
        count("raise", what="cleared_after")

    @task
    def cleared_anew():
        count(None if get_current_context()["ti"].try_number > 1 else "raise", what="cleared_anew", on_clear="fresh")

    @task
    def other():
        count(what="other")

    @task
    def cleared_within():
        """Runs until the operator clears it."""
        count(what="cleared_within")
        until((FOLDER / "cleared").exists)

    cleared_after()
    cleared_anew()
    other()
    cleared_within()


@dag(schedule=None, default_args={"retries": 1, "retry_delay": 0.1})
def in_turn():
    @task
    def first():
        count("raise", what="first")

    @task
    def after():
        handed_down = [name for name in os.environ if name.startswith("TASKCKPT_") and name != "TASKCKPT_BASE"]
        note("after", handed_down=handed_down)

    first() >> after()


@dag(schedule=None)
def children():
    @task
    def parent():
        note("parent", **found())
        taskckpt.checkpoint().save_state_sync({"step": 7})
        subprocess.run([sys.executable, "-c", CHILD], check=True)

    parent()


@dag(schedule=None, default_args={"retries": 1, "retry_delay": 0.1})
def shell():
    """Commands that see the task in their environment only, which does not tell mapped ones apart."""
    command = f"{sys.executable} {SHELL} {{}}"
    commands = [command.format(item) for item in (0, 1)]
    BashOperator.partial(task_id="unclear", retries=0).expand(bash_command=commands)
    index = {"TASKCKPT_INDEX": "{{ ti.map_index }}"}
    BashOperator.partial(task_id="clear", env=index, append_env=True).expand(bash_command=commands)


CHILD = """
import json, os, taskckpt
with open(os.environ["JOURNAL"], "a") as journal:
    state = taskckpt.checkpoint().load_state_sync()
    print(json.dumps({"what": "child", "task": taskckpt.ctx().task, "state": state}), file=journal)
"""


def until(happened, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError("the other one never came")
        time.sleep(0.05)


resuming()
cleared()
children()
shell()
in_turn()
