"""Airflow's own scheduler and workers, for as long as it takes to run the DAGs: what they did is in the journal."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

VERSION = int(version("apache-airflow").split(".")[0])
DAGS = Path(__file__).parent / "airflow_dags"


def main() -> None:
    home = Path(os.environ["HOME"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "AIRFLOW_HOME": str(home / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "3",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
        "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",
        "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "15",
        # What Airflow 2 calls the last two, and its word for "SQLite will do, nothing else runs here".
        "AIRFLOW__SCHEDULER__LOCAL_TASK_JOB_HEARTBEAT_SEC": "1",
        "AIRFLOW__SCHEDULER__SCHEDULER_ZOMBIE_TASK_THRESHOLD": "15",
        "AIRFLOW__SCHEDULER__ZOMBIE_DETECTION_INTERVAL": "3",
        "_AIRFLOW__SKIP_DATABASE_EXECUTOR_COMPATIBILITY_CHECK": "1",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }
    from airflow.__main__ import main as airflow

    def cli(*arguments: str) -> None:
        sys.argv = ["airflow", *arguments]
        airflow()

    began = time.monotonic()

    def say(*what: object) -> None:
        print(f"[{time.monotonic() - began:.1f}]", *what, flush=True)

    cli("db", "migrate")
    cli("dags", "reserialize")
    say("made")
    servers = [subprocess.Popen(["airflow", "scheduler", "--skip-serve-logs"])]
    if VERSION >= 3:
        # Its tasks ask a server for their work; those of Airflow 2 ask the database.
        serve = ["airflow", "api-server", "--apps", "execution", "--host", "127.0.0.1", "--port", str(port)]
        servers.append(subprocess.Popen(serve))
    try:
        wait_for(lambda: VERSION < 3 or answers(port))
        say("serves")
        for dag_id in ("cleared", "resuming", "children", "shell"):
            cli("dags", "trigger", dag_id, "--run-id", "one")
        before = {"cleared_after": "failed", "cleared_anew": "failed", "other": "success", "cleared_within": "running"}
        wait_for(lambda: states("cleared", "one") == before and begun("cleared_within") == 1)
        say("clears")
        cli("tasks", "clear", "cleared", "--yes", "--task-regex", "cleared_")
        wait_for(lambda: begun("cleared_within") == 2)
        (home / "cleared").touch()
        wait_for(lambda: set(states("cleared", "one").values()) == {"success"})
        say("cleared")
        wait_for(lambda: states("shell", "one") == {"unclear": "failed", "clear": "success"})
        wait_for(lambda: states("children", "one") == {"parent": "success"})
        wait_for(lambda: states("resuming", "one") == {"mapped": "success", "stale": "failed"})
        say("resumed")
        cli("dags", "trigger", "resuming", "--run-id", "two")
        wait_for(lambda: states("resuming", "two") == {"mapped": "success", "stale": "failed"})
        say("again")
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(20)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def begun(what: str) -> int:
    """How often the task began, as the journal says."""
    return Path(os.environ["JOURNAL"]).read_text().count(f'"what": "{what}"')


def states(dag_id: str, run_id: str) -> dict[str, str | None]:
    """The state of each task; of mapped ones, that of all instances if they agree."""
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        query = select(TaskInstance.task_id, TaskInstance.state)
        rows = session.execute(query.where(TaskInstance.dag_id == dag_id, TaskInstance.run_id == run_id)).all()
    found: dict[str, set[str | None]] = {}
    for task_id, state in rows:
        found.setdefault(task_id, set()).add(state)
    return {task_id: all_.pop() if len(all_) == 1 else None for task_id, all_ in found.items()}


def wait_for(happened, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > end:
            print(
                {
                    (dag, run): states(dag, run)
                    for dag in ("resuming", "cleared", "children", "shell")
                    for run in ("one", "two")
                }
            )
            raise TimeoutError
        time.sleep(0.2)


if __name__ == "__main__":
    main()
