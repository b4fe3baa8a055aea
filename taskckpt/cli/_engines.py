"""The verb engines: who is this, who says so, and what is missing. It never claims or fences."""

from __future__ import annotations

import sys

import click

from taskckpt.cli import _explain
from taskckpt.cli import _output as out
from taskckpt.cli._exits import MISSING
from taskckpt.cli._options import seconds


@click.command()
@click.option("--all", "every", is_flag=True, help="A line for each engine that does not run this, too.")
@click.option("--program", metavar="NAME", help="As if it were asked by this script (train.py) or module.")
@click.option("--check-base", is_flag=True, help="Write something to the base, and delete it again.")
@click.option(
    "--timeout", "timeout_s", metavar="SECONDS", callback=seconds, default=f"{_explain.TIMEOUT_S:g}",
    show_default=True, help="How long the base may take to answer.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--debug", is_flag=True, help="Tell where an error comes from.")
def engines(every: bool, program: str | None, check_base: bool, timeout_s: float, as_json: bool, debug: bool) -> None:
    """Tell which task this is here and now, who says so, and what is missing to resume.

    The first thing to run where a task does not resume: in its pod, its job script, its container.
    """
    del debug  # looked at where errors end
    found = _explain.explain(program=program, check_base=check_base, timeout_s=timeout_s)
    if found.is_by_program and not program:
        found.notes.append(_explain.BY_PROGRAM)
    if not found.detected and sys.stdin.isatty():
        found.notes.append(_explain.AT_A_TERMINAL)
    if as_json:
        out.document(_explain.fields(found))
    else:
        click.echo(_explain.text(found, every=every, within=False))
    if found.problems:
        raise click.exceptions.Exit(MISSING)
