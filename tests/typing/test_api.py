from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import taskckpt

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(120)  # without a cache, mypy reads the standard library first
def test_the_public_api_has_the_types_that_it_says(tmp_path):
    pytest.importorskip("mypy", reason="NOT TESTED: needs mypy (pip install mypy)")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    # A cache of its own: somebody may be running mypy on the repository at the same time.
    cache = ROOT / ".mypy_cache" / "api"
    done = subprocess.run(
        [*command, "--cache-dir", str(cache), "tests/typing/api.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_name_is_in_it():
    text = Path(__file__).with_name("api.py").read_text()
    missing = [name for name in taskckpt.__all__ if name not in text.split("# --- Checkpoint")[1]]
    assert not missing
    methods = [name for name in vars(taskckpt.Checkpoint) if not name.startswith("_")]
    assert not [name for name in methods if f".{name}" not in text]


def test_types_are_shipped():
    assert (ROOT / "taskckpt" / "py.typed").exists()
