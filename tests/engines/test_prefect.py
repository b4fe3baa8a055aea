"""Prefect 3: task runs and flow runs that fail, are retried, and whose process is killed."""

from __future__ import annotations

import re
import socket
import time
import urllib.request
from collections.abc import Callable
from urllib.error import URLError

import pytest

from tests.engines.conftest import EXAMPLES, TASKS, Engine, numbers

EngineOf = Callable[[str], Engine]

pytestmark = pytest.mark.timeout(120)

FLOWS = TASKS / "prefect_flows.py"
NOT_NEEDED = (
    "CANCELLATION_CLEANUP", "CLEANUP_RECONCILER", "EVENT_PERSISTER", "FOREMAN", "LATE_RUNS", "PAUSE_EXPIRATIONS",
    "REPOSSESSOR", "SCHEDULER", "TRIGGERS",
)  # fmt: skip
CRASHED = """
import sys
from prefect import get_client
from prefect.states import Crashed
with get_client(sync_client=True) as client:
    client.set_flow_run_state(sys.argv[1], Crashed(message="its process was killed"), force=True)
"""


def settings(engine: Engine, **more: str) -> dict[str, str]:
    """Nothing outside of this machine is asked, and nothing of the user's own Prefect is touched."""
    return {
        "PREFECT_HOME": str(engine.folder / "prefect"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "ERROR",
        "DO_NOT_TRACK": "1",
        **{f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in NOT_NEEDED},
        **more,
    }


def serve(engine: Engine) -> dict[str, str]:
    """Starts a server, for scripts of several processes; the settings that lead to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = engine.folder / "server.txt"
    server = engine.start("prefect", "server", "start", "--port", str(port), env=settings(engine), log=log)
    url = f"http://127.0.0.1:{port}/api"
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except (URLError, OSError):
            time.sleep(0.1)
            assert server.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, log.read_text()[-5000:]
        else:
            return settings(engine, PREFECT_API_URL=url)


def test_failed_and_killed_flows_go_on(engine_of: EngineOf) -> None:
    engine = engine_of("prefect")
    env = serve(engine)
    expect_all(engine.run("python", FLOWS, env=env))

    # A kill takes the flow with it. Who watches over it says so, and somebody retries the run.
    output = engine.run("python", FLOWS, "killed", env=env, code=-9)
    assert numbers(output, "killed resumes from") == [0]
    found = re.search(r"flow run (\S+)", output)
    assert found is not None
    engine.run("python", "-c", CRASHED, found[1], env=env)
    output = engine.run("prefect", "flow-run", "retry", found[1], "--entrypoint", f"{FLOWS}:killed", env=env)
    assert numbers(output, "killed resumes from") == [3]
    assert f"flow run {found[1]}" in output

    output = engine.run("python", EXAMPLES / "with_prefect.py", env=env)
    assert numbers(output, "resumes from") == [0, 3, 7]
    assert "counted to 10" in output


def expect_all(output: str) -> None:
    output = f"\n{output}"

    def resumed(item: str) -> list[int]:
        return numbers(output, f"\n{item} resumes from")

    def attempts(item: str) -> list[int]:
        return numbers(output, f"\n{item} attempt")

    def ambiguous(item: str) -> int:
        return len(re.findall(rf"^{item} is ambiguous: .*taskckpt\.checkpoint\(", output, re.MULTILINE))

    # Two of a map never mix, and another run starts afresh.
    for item in ("one-a", "one-b", "two-a", "two-b", "alone"):
        assert (resumed(item), attempts(item)) == ([0, 3], [0, 1]), item

    # A retry of the flow is another task run each time, whose count begins anew.
    assert (resumed("first"), attempts("first")) == ([0, 3, 6, 6], [0, 0, 0, 0])
    assert (resumed("sub-task"), resumed("sub")) == ([0, 3, 6], [0, 6])
    assert resumed("outer-nested") == [0, 3, 6]
    assert (resumed("async-1"), resumed("async-2")) == ([0, 3], [0, 3])
    assert (resumed("flow"), attempts("flow")) == ([0, 6, 6, 6], [0, 1, 2, 3])
    assert (resumed("own"), attempts("own")) == ([0, 3], [0, 1])
    runs = set(re.findall(r"(\S+) identity (\S+)", output))
    assert all(run.startswith("prefect/") for _, run in runs)
    assert len(dict(runs)) == len(runs)

    # Of equal calls the second is told apart by nothing; a key of one's own does.
    assert (resumed("equal"), resumed("equal-3"), resumed("equal-sub"), resumed("equal-async")) == ([0],) * 4
    assert [ambiguous(f"equal-{what}") for what in ("2", "submitted", "subflow")] == [1, 1, 1]
    assert "equal-with-key went well" in output
    assert "equal-async: AmbiguousIdentityError int" in output

    # Told by its id: it holds until the flow is retried, and then says so.
    assert (resumed("by-id"), attempts("by-id"), ambiguous("by-id")) == ([0, 3], [0, 1], 1)
    assert "in the process of its flow: True" not in output
    assert (resumed("other"), attempts("other"), ambiguous("other")) == ([0, 3], [0, 1], 1)

    assert (output.count("stale begins"), output.count("stale is stale: ")) == (1, 1)
    told = dict(re.findall(r"^(task|thread|child|stranger) (\S+)", output, re.MULTILINE))
    assert told["task"] == told["thread"] == told["child"] != told["stranger"] == "None"
    assert "after the task None" in output
