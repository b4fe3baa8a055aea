"""Random orders, lost replies and late creates on the real code: whatever comes, nothing is violated.

`TASKCKPT_REPLAY=500 pytest tests/replay` plays that many orders of each cast.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from taskckpt import _payload
from taskckpt._log import retention as _retention
from taskckpt._log import writer as _log
from tests.replay.judge import violations
from tests.replay.stage import Stage, Verdict

ORDERS = int(os.environ.get("TASKCKPT_REPLAY", "25"))
CREATES_MAY: tuple[Verdict, ...] = ("fail", "lose reply", "give up", "give up, deliver later", "deliver later")
# name, script, parent's name, "" or "view"
CASTS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "three attempts": (("A", "load save save", ""), ("B", "load save save", ""), ("C", "save load save", "")),
    "children": (("A", "save save load", ""), ("Q", "load save load", "A"), ("P", "load load save", "A")),
    "child, attempt, reader": (
        ("A", "save save save", ""),
        ("Q", "save load", "A"),
        ("B", "load save save", ""),
        ("R", "load load load", "view"),
    ),
    "clear": (("A", "save clear save", ""), ("B", "load save clear", ""), ("R", "load load load", "view")),
    "pins": (("A", "save pin save unpin save", ""), ("J", "pin prune", "A"), ("B", "load save pin save", "")),
    "rollback": (("A", "save pin save rollback save", ""), ("B", "save save rollback save", ""), ("J", "pin", "B")),
    "rollback, clear, reader": (
        ("A", "save pin save clear save", ""),
        ("J", "unpin pin rollback", "A"),
        ("R", "load load load", "view"),
    ),
    "long": (("A", "save save save save save save save", ""), ("B", "load save save", ""), ("R", "load load", "view")),
}


@pytest.fixture(autouse=True)
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retention, "GUARDED_SLOTS", 1)
    monkeypatch.setattr(_log, "RECORD_BATCH", 1)
    monkeypatch.setattr(_payload, "INLINE_LIMIT_BYTES", -1)


def play(dest: str, cast: tuple[tuple[str, str, str], ...], seed: int, *, keep: int | None) -> Stage:
    """One order out of very many."""
    choose = random.Random(seed)
    faults = choose.choice((0, 0, 1, 4))
    with Stage(dest, keep=keep) as stage:
        for name, script, role in cast:
            view = role == "view"
            stage.enter(name, tuple(script.split()), parent="" if view else role, view=view)
        for name in stage.actors:
            stage.begin(name)
        while waiting := [actor for actor in stage.actors.values() if not actor.done]:
            if stage.late and choose.random() < 0.1:
                stage.deliver(choose.randrange(len(stage.late)))
            actor = choose.choice(waiting)
            # Some run for a while on their own, so that others fall behind.
            for _ in range(choose.choice((1, 1, 2, 5, 20))):
                if actor.done or actor.pending is None:
                    break
                verdict: Verdict = "go"
                if faults and choose.random() < 0.15:
                    faults -= 1
                    verdict = choose.choice(CREATES_MAY) if actor.pending.verb == "create" else "fail"
                stage.let_go(actor.name, verdict)
        while stage.late:
            stage.deliver()
        stage.final()
    return stage


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("name", CASTS)
@pytest.mark.timeout(20 + ORDERS)
def test_no_order_violates_anything(tmp_path: Path, name: str, keep: int) -> None:
    for seed in range(ORDERS):
        stage = play(str(tmp_path / str(seed)), CASTS[name], seed, keep=keep)
        found = violations(stage)
        assert not found, f"seed {seed}: {found}\n{stage.results()}\n{stage.story()}"
