"""Snakemake: scripts that fail, that are killed, side by side; and what it deletes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.engines.conftest import EXAMPLES, TASKS, Engine, numbers

NAMED = "import os, uuid\nos.environ.setdefault('TASKCKPT_RUN', str(uuid.uuid4()))\n"
RULES = f"""
rule all:
    input: "a.raise", "b.raise", "c.kill", "d.never"

rule count:
    output: "{{name}}.{{dies}}"
    params: dies="{{dies}}"
    resources: attempt=lambda wildcards, attempt: attempt
    retries: 1
    script: "{TASKS / "snakemake_count.py"}"
"""

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def snakemake(engine_of: Callable[[str], Engine]) -> Engine:
    return engine_of("snakemake")


def made(snakemake: Engine, snakefile: str, *options: str, code: int | None = 0, **env: str) -> str:
    (snakemake.folder / "Snakefile").write_text(snakefile)
    return snakemake.run("snakemake", "--cores", "2", *options, env=env, code=code)


def starts(output: str) -> dict[str, list[int]]:
    names = sorted({line.split()[0] for line in output.splitlines() if "resumes from" in line})
    return {
        name: numbers(
            "\n".join(line for line in output.splitlines() if line.startswith(f"{name} attempt")), "resumes from"
        )
        for name in names
    }


def test_jobs_that_die_go_on_and_a_second_run_starts_afresh(snakemake: Engine) -> None:
    expected = {"a.raise": [0, 3], "b.raise": [0, 3], "c.kill": [0, 3], "d.never": [0]}
    output = made(snakemake, NAMED + RULES)
    assert starts(output) == expected
    assert re.findall(r"a\.raise attempt (\d)", output) == ["0", "1"]
    tasks = {(snakemake.folder / name).read_text() for name in expected}
    assert len({task.split()[0] for task in tasks}) == 1  # one run
    assert {task.split()[1] for task in tasks} == {f"count/dies={n[2:]}/name={n[0]}" for n in expected}
    assert starts(made(snakemake, NAMED + RULES, "--forceall")) == expected


def test_a_run_that_a_person_named_goes_on_in_the_next_start(snakemake: Engine) -> None:
    rules = RULES.replace("retries: 1", "retries: 0")
    first = made(snakemake, NAMED + rules, "a.raise", code=1, TASKCKPT_RUN="nightly")
    second = made(snakemake, NAMED + rules, "a.raise", TASKCKPT_RUN="nightly")
    assert [starts(first), starts(second)] == [{"a.raise": [0]}, {"a.raise": [3]}]


def test_a_run_without_a_name_is_ambiguous(snakemake: Engine) -> None:
    output = made(snakemake, RULES.replace("retries: 1", "retries: 0"), "a.raise", code=1)
    assert "AmbiguousIdentityError" in output
    assert "os.environ.setdefault('TASKCKPT_RUN'" in output


def test_what_lies_in_an_output_is_deleted_before_the_next_attempt(snakemake: Engine) -> None:
    """The reason for the advice: no base in a folder that Snakemake makes."""
    rules = RULES.replace('output: "{name}.{dies}"', 'output: "{name}.{dies}", directory("{name}-{dies}-base")')
    base = str(snakemake.folder / "a-raise-base")
    output = made(snakemake, NAMED + rules, "a.raise", code=1, TASKCKPT_BASE=base)
    assert starts(output) == {"a.raise": [0, 0]}


def test_an_attempt_that_was_overtaken_is_retried_and_goes_on(snakemake: Engine) -> None:
    """A script has no way to tell Snakemake that it must not be retried; its state is safe."""
    output = made(snakemake, NAMED + RULES, "e.stale")
    assert "StaleAttemptError" in output
    assert starts(output) == {"e.stale": [0, 5]}


def test_the_example(snakemake: Engine) -> None:
    output = snakemake.run("python", EXAMPLES / "with_snakemake.py")
    assert numbers(output, "resumes from") == [0, 3, 7]
    assert "counted to 10" in output
