"""Random walks of several attempts of one task, judged by an oracle of lists and sets.

`TASKCKPT_STATEFUL=2000 pytest tests/stateful` walks that often, along other ways each time.
"""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
from hypothesis.stateful import run_state_machine_as_test

from taskckpt import _payload
from taskckpt._log import retention as _retention
from taskckpt._log import writer as _log
from tests.stateful import machine

WALKS = os.environ.get("TASKCKPT_STATEFUL")


@pytest.mark.timeout(150 if WALKS is None else 150 + 2 * int(WALKS))
@pytest.mark.filterwarnings("ignore:memory... lives in this process only")
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_attempts_faults_crashes_and_rot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(_retention, "GUARDED_SLOTS", machine.GUARDED)
    monkeypatch.setattr(_log, "RECORD_BATCH", machine.BATCH)
    monkeypatch.setattr(_payload, "INLINE_LIMIT_BYTES", machine.INLINE)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power cuts here, and disks differ in speed
    run_state_machine_as_test(
        lambda: machine.Attempts(kind, tmp_path / "walk"),  # type: ignore[arg-type] # it is called, and no more
        settings=hypothesis.settings(
            max_examples=int(WALKS or {"local": 15, "memory": 25}[kind]),
            stateful_step_count=40,
            derandomize=WALKS is None,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
