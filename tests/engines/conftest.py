"""Engines really run, each in an environment of its own: ``make test-engines`` builds them in ``.venv-engines``."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENTS = ROOT / ".venv-engines"
EXAMPLES = ROOT / "examples" / "engines"
TASKS = Path(__file__).parent / "tasks"

# Where the tests run may be a task of something, too.
OTHERS = ("TASKCKPT_", "PYTEST_", "TOX_", "NOX_", "GITHUB_", "SLURM_", "KUBERNETES_", "AWS_", "AIRFLOW_", "OMPI_")
# Read now: every test begins without the variables of its caller.
CHOSEN = os.environ.get("TASKCKPT_TEST_ENGINES", "").split()
IN_PARALLEL = "PYTEST_XDIST_WORKER" in os.environ


class Engine:
    """Runs scripts in the environment of one engine. What a script started is ended with the test."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.bin = ENVIRONMENTS / name / "bin"
        self._started: list[subprocess.Popen[str]] = []

    def environ(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """As a shell of that environment would have it, with a base, a home and temporary files of this test."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
        own = {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            "TASKCKPT_BASE": str(self.folder / "base"),
            "PYTHONPATH": str(TASKS),
        }
        return {**kept, **own, **(more or {})}

    def start(
        self, *command: str | Path, env: Mapping[str, str] | None = None, log: Path | None = None
    ) -> subprocess.Popen[str]:
        """A process in a group of its own; its output goes to ``log`` (default: one more file of the test)."""
        log = log or self.folder / f"output-{len(self._started)}.txt"
        with log.open("w") as output:
            process = subprocess.Popen(
                [str(own if (own := self.bin / command[0]).exists() else command[0]), *map(str, command[1:])],
                env=self.environ(env), cwd=self.folder, stdout=output, stderr=subprocess.STDOUT, text=True,
                start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def run(
        self, *command: str | Path, env: Mapping[str, str] | None = None, timeout_s: float = 100, code: int | None = 0
    ) -> str:
        """Waits for a command of the environment (``python`` among them), and gives all its output.

        ``code`` is the exit code that it must have; None: any.
        """
        log = self.folder / f"output-{len(self._started)}.txt"
        process = self.start(*command, env=env, log=log)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{command} did not end within {timeout_s} s:\n{log.read_text()[-5000:]}")
        output = log.read_text()
        assert code is None or process.returncode == code, f"exit code {process.returncode}:\n{output[-8000:]}"
        return output

    def end(self) -> None:
        """Kills what still runs, with all that it started."""
        for process in self._started:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()


@pytest.fixture
def engine_of(tmp_path: Path) -> Iterator[Callable[[str], Engine]]:
    """The environment of the engine of that name; without it the test is skipped, and says so."""
    made: list[Engine] = []

    def of(name: str) -> Engine:
        if name not in CHOSEN and IN_PARALLEL:  # make test, or other engines
            pytest.skip(f"NOT TESTED here: {name} has an environment of its own: make test-engines ENGINES={name}")
        if not (ENVIRONMENTS / name / ".installed").exists():
            missing = f"{name} is not installed: make test-engines ENGINES={name}"
            pytest.fail(missing) if name in CHOSEN else pytest.skip(f"NOT TESTED: {missing}")
        made.append(Engine(name, tmp_path))
        return made[-1]

    yield of
    for engine in made:
        engine.end()


def numbers(output: str, what: str) -> list[int]:
    """Those that follow a word, in order: "resumes from 3" and the like."""
    return [int(number) for number in re.findall(rf"{re.escape(what)} (\d+)", output)]
