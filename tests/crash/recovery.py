"""What must hold after a process was killed: old or new, never a third thing, and saving just works again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tests.crash.contents import NOTHING
from tests.crash.forker import Forker, Job, Outcome

# In a clean process: somebody looks, the next attempt loads, saves, and loads what it saved.
RECOVERY = ("look", "new", "load", "save bytes 90", "load")


def moments(calls: Sequence[str]) -> list[tuple[int, str]]:
    """Before, in the middle of and after each call; only a ``write`` has a middle."""
    return [
        (at, when)
        for at, name in enumerate(calls, start=1)
        for when in ("before", "middle", "after")
        if when != "middle" or name == "write"
    ]


@contextlib.contextmanager
def noted(*what: object) -> Iterator[None]:
    """Says when it happened, if an assertion inside fails."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"This happened at {what}.")
        raise


def states(before: str, steps: Sequence[str]) -> list[str]:
    """What is saved before the first step, after it, after the second, ..."""
    found = [before]
    for step in steps:
        verb, _, name = step.partition(" ")
        found.append(name if verb in ("save", "later", "async") else NOTHING if verb == "clear" else found[-1])
    return found


def expect_old_or_new(outcome: Outcome, job: Job, before: str) -> set[str]:
    """Gives what may be loaded now, after checking what the child itself was told while it lived."""
    known = states(before, job.steps)
    for number, (step, answer) in enumerate(zip(job.steps, outcome.answers, strict=False)):
        assert answer == (known[number] if step.startswith(("load", "look")) else "done"), (step, answer)
    acknowledged = len(outcome.answers)
    return {known[acknowledged], known[min(acknowledged + 1, len(known) - 1)]}


def recover(forks: Forker, job: Job) -> tuple[str, Outcome]:
    """Runs the recovery in a clean process; gives what was there."""
    clean = replace(job, steps=RECOVERY, at=0, then=(), skip=0, without=(), limits={})
    outcome = forks.run(clean)
    seen, *rest = outcome.answers
    assert rest == ["done", seen, "done", "bytes 90"], outcome.answers
    return seen, outcome
