"""Runs each job in a forked child of a process that has imported everything: a few ms, not 0.3 s.

Not in the process of pytest, which has threads. A job is a few steps (``save bytes 3``, ``load``, ...) and
the moment at which the child is killed or disturbed; the outcome tells which steps were acknowledged.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import taskckpt
from tests.crash import contents, interruption
from tests.crash.interruption import Interruption

ROOT = Path(__file__).parent.parent.parent
IMPORTS = ("tests.crash.forker", "taskckpt._bridge", "taskckpt._stores.local", "taskckpt._checkpoint", "resource")


@dataclass(frozen=True)
class Job:
    """What a child does.

    Attributes:
        steps: ``save NAME``, ``load``, ``load to FOLDER``, ``clear``; ``later NAME`` saves in the background and
            waits for it, ``begin NAME`` does not, ``wait`` does; ``new`` begins a new attempt, ``look`` loads
            without taking the task over; ``async NAME`` is a save that ``how="cancel"`` cancels.
        sources: Where the files and folders lie that are saved.
        layer: Which calls are counted: those that change a ``disk``, those of ``s3`` or ``obstore``, or any
            ``http`` client's.
        at, when, how: At the ``at``-th call (0: never), ``before`` it, in the ``middle`` or ``after`` it.
        skip: The calls of the first so many steps are not counted.
        then: Steps of a process that was disturbed and lives on.
        switches: Names of module attributes, and what they are set to.
        without: Calls in ``os`` that fail (``link``) or do nothing (``fsync``).
    """

    dest: str
    steps: Sequence[str]
    sources: Path
    tmp: Path
    keep: int | None = 3
    storage_options: dict[str, Any] | None = None
    layer: str = "disk"
    at: int = 0
    when: str = "before"
    how: str = "SIGKILL"
    skip: int = 0
    then: Sequence[str] = ()
    switches: dict[str, Any] = field(default_factory=dict)
    without: Sequence[str] = ()
    limits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a job: the answer of each step that ended, and whether the child was killed."""

    answers: list[str]
    killed: bool
    calls: list[str]


class Forker:
    """The process that forks. What it imports, children need not; but a lean process forks faster."""

    def __init__(self, *imports: str) -> None:
        code = f"import {', '.join([*IMPORTS, *imports])}; tests.crash.forker.main()"
        command = [sys.executable, "-W", "error", "-c", code]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, job: Job) -> Outcome:
        assert self._process.stdin
        assert self._process.stdout
        pickle.dump(job, self._process.stdin)
        self._process.stdin.flush()
        outcome: Outcome = pickle.load(self._process.stdout)
        for answer in outcome.answers:
            assert not answer.startswith("bug:"), answer
        return outcome

    def close(self) -> None:
        self._process.communicate()


@contextlib.contextmanager
def forker(*imports: str) -> Iterator[Forker]:
    made = Forker(*imports)
    try:
        yield made
    finally:
        made.close()


# --- in the process that forks -----------------------------------------------------------------


def main() -> None:
    getattr(taskckpt, "Checkpoint")  # noqa: B009 - imported now, not in each child
    gc.freeze()  # or each collection in a child would copy all of our memory
    jobs = sys.stdin.buffer
    with os.fdopen(os.dup(1), "wb") as outcomes, contextlib.suppress(EOFError):
        os.dup2(2, 1)  # whatever a child prints
        while True:
            pickle.dump(_fork(pickle.load(jobs)), outcomes)
            outcomes.flush()


def _fork(job: Job) -> Outcome:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        status = 1
        try:
            _Child(job, os.fdopen(writing, "wb", buffering=0)).run()
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        lines = pipe.read().decode().split("\0")[:-1]
    _, status = os.waitpid(child, 0)
    calls = lines.pop().split() if lines and lines[-1].startswith("calls") else []
    return Outcome(lines, os.WIFSIGNALED(status), calls[1:])


class _Child:
    def __init__(self, job: Job, pipe: IO[bytes]) -> None:
        from taskckpt import Checkpoint

        self._job = job
        self._pipe = pipe
        self._Checkpoint = Checkpoint
        self._checkpoint = self._new()
        self._task: Any = None
        self._interruption = Interruption(job.at, job.when, self._act)

    def _new(self, *, read_only: bool = False) -> Any:
        job = self._job
        return self._Checkpoint(job.dest, keep=job.keep, storage_options=job.storage_options, read_only=read_only)

    def run(self) -> None:
        job = self._job
        os.environ["TASKCKPT_TMP"] = str(job.tmp)
        os.environ["TASKCKPT_TRANSFER"] = "obstore" if job.layer == "obstore" else "fsspec"
        os.setpgid(0, 0)
        self._prepare()
        watches = {
            "disk": interruption.watch_disk,
            "s3": interruption.watch_s3,
            "obstore": interruption.watch_obstore,
            "http": interruption.watch_http,
        }
        watches[job.layer](self._interruption)
        steps = list(job.steps)
        while steps:
            self._interruption.counting = len(job.steps) - len(steps) >= job.skip
            try:
                self._answer(self._do(steps.pop(0)))
            except (KeyboardInterrupt, SystemExit) as error:
                self._answer(f"{type(error).__name__}")
                break
        self._interruption.counting = False
        for step in job.then:
            self._answer(self._do(step))
        self._answer(" ".join(["calls", *self._interruption.calls]))

    def _prepare(self) -> None:
        import importlib
        import resource

        for name, value in self._job.switches.items():
            module, _, attribute = name.rpartition(".")
            setattr(importlib.import_module(module), attribute, value)
        for name in self._job.without:
            _break(name)
        for name, value in self._job.limits.items():
            limit = getattr(resource, name)
            resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))

    def _answer(self, text: str) -> None:
        self._pipe.write(text.encode() + b"\0")

    def _act(self) -> None:
        how, _, argument = self._job.how.partition(" ")
        if how == "cut":
            interruption.cut_power(argument)
        elif how == "cancel":
            interruption.cancel(self._task, self._task.get_loop())
        else:
            interruption.ACTS[how]()

    def _do(self, step: str) -> str:
        from taskckpt.errors import TaskckptError

        try:
            return self._really_do(step)
        except TaskckptError as error:
            return f"{type(error).__name__}: {error}"
        except Exception:
            return f"bug: {step}: {traceback.format_exc()}"

    def _really_do(self, step: str) -> str:
        verb, _, argument = step.partition(" ")
        sources = self._job.sources
        if verb == "new":
            self._checkpoint = self._new()
        elif verb == "save":
            self._checkpoint.save_sync(_data(argument, sources))
        elif verb == "later":
            self._checkpoint.save_later(_data(argument, sources), policy="queue").result()
        elif verb == "begin":
            self._checkpoint.save_later(_data(argument, sources), policy="queue")
        elif verb == "wait":
            self._checkpoint.wait()
        elif verb == "async":
            return self._save_and_cancel(_data(argument, sources))
        elif verb == "clear":
            self._checkpoint.clear_sync()
        elif verb == "shut_down":
            interruption.shut_down(argument)
        elif verb == "look":
            return contents.recognised(self._new(read_only=True).load_sync(), sources)
        elif argument:
            target = argument.removeprefix("to ")
            return contents.recognised(self._checkpoint.load_sync(to=target, replace=True), sources)
        else:
            return contents.recognised(self._checkpoint.load_sync(), sources)
        return "done"

    def _save_and_cancel(self, data: Any) -> str:
        import asyncio

        async def save() -> str:
            self._task = asyncio.create_task(self._checkpoint.save(data))
            try:
                await self._task
            except asyncio.CancelledError:
                calls = len(self._interruption.calls)
                await asyncio.sleep(0.02)
                late = self._interruption.calls[calls:]
                return "cancelled" if not late else f"bug: wrote on after the cancellation: {late}"
            return "done"

        return asyncio.run(save())


def _data(name: str, sources: Path) -> bytes | Path:
    return Path(name) if name.startswith("/") else contents.source(name, sources)


def _break(name: str) -> None:
    import errno

    real_fsync = os.fsync

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def of_files(descriptor: Any) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            real_fsync(descriptor)

    def of_folders(descriptor: Any) -> None:
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            real_fsync(descriptor)

    if name == "link":
        os.link = refuse
    else:
        kinds = {"fsync": lambda _: None, "fsync of files": of_files, "fsync of folders": of_folders}
        setattr(os, "fsync", kinds[name])  # noqa: B010 - to mypy, os.fsync is of one type for ever
