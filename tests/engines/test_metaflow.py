"""Metaflow: tasks that fail and are killed, items, loops, gangs, and a run that is resumed."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.engines.conftest import EXAMPLES, TASKS, Engine, numbers

EngineOf = Callable[[str], Engine]

pytestmark = pytest.mark.timeout(120)

FLOW = TASKS / "metaflow_flow.py"


def environ(engine: Engine) -> dict[str, str]:
    # Without a base of ours: Metaflow has one.
    return {"METAFLOW_USER": "somebody", "TASKCKPT_BASE": "", "METAFLOW_HOME": str(engine.folder / "config")}


def test_failed_killed_and_resumed_tasks_go_on(engine_of: EngineOf) -> None:
    engine = engine_of("metaflow")
    events = engine.folder / "events"

    def run(command: str) -> tuple[str, str]:
        events.write_text("\n")
        output = engine.run("python", FLOW, command, env=environ(engine), code=1)
        return events.read_text(), output

    first, _ = run("run")
    assert f"base {engine.folder / '.metaflow' / 'taskckpt'}\n" in first
    for who, task in (("command line", "None"), ("stranger", "None"), ("thread", "start"), ("child", "start")):
        assert first.count(f"{who} {task}\n") == 1, who
    expect_items(first)
    # Ranks of one task.
    assert set(re.findall(r"gang-(\d) of (\d) (\S+)", first)) == {("0", "2", "gang"), ("1", "2", "gang")}
    assert numbers(first, "gang resumes from") == [0, 3]

    # Its tasks that are done are not run again; the one that failed goes on if it asks for the first run.
    assert (numbers(first, "lineage resumes from"), numbers(first, "own resumes from")) == ([0], [])
    resumed, output = run("resume")
    assert "item-" not in resumed
    assert (numbers(resumed, "lineage resumes from"), numbers(resumed, "own resumes from")) == ([3], [0])
    assert numbers(resumed, "lineage attempt") == [0]
    assert run_of(resumed, "lineage") == run_of(first, "lineage") != run_of(resumed, "own")

    # Metaflow knows no exception that ends a task, but an exit code.
    assert numbers(resumed, "end begins") == [0]
    assert "took the task over; this one is stale" in output
    assert "This failed task will not be retried." in output

    second, _ = run("run")
    expect_items(second)
    assert run_of(second, "item-00") != run_of(first, "item-00")


def run_of(events: str, item: str) -> str:
    found = re.search(rf"{item} identity (\S+)", events)
    assert found is not None
    return found[1]


def expect_items(events: str) -> None:
    for item in ("item-00", "item-01", "item-10", "item-11"):
        assert numbers(events, f"\n{item} resumes from") == [0, 3], item
        assert numbers(events, f"\n{item} attempt") == [0, 1], item
    for item in ("joins", "joins-0", "joins-1", "again-0", "again-1"):
        assert numbers(events, f"\n{item} resumes from") == [0], item
    identities = set(re.findall(r"(\S+) identity (\S+ .+)", events))
    assert len(dict(identities)) == len(identities) == len({identity for _, identity in identities})
    assert all(identity.startswith("metaflow/CountingFlow/") for _, identity in identities)


def test_example(engine_of: EngineOf) -> None:
    engine = engine_of("metaflow")
    output = engine.run("python", EXAMPLES / "with_metaflow.py", "run", env=environ(engine))
    assert numbers(output, "resumes from") == [0, 3, 7]
    assert "counted to 10" in output
