"""The verb verify: are the stored bytes those that were saved? It never writes, claims or fences."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from math import ceil

import click

from taskckpt import _payload
from taskckpt._log.records import Stored
from taskckpt._operation import Stop
from taskckpt._progress import Report
from taskckpt._selection import CheckpointInfo
from taskckpt.cli import _output as out
from taskckpt.cli._exits import CORRUPT, described
from taskckpt.cli._history import History, history
from taskckpt.cli._options import pointing
from taskckpt.cli._output import JSON
from taskckpt.cli._targets import Pointer, Task, tasks_at
from taskckpt.errors import CorruptCheckpointError, NotFoundError, TaskckptError, UsageError

_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%")


@dataclass
class Verified:
    """What came of reading the payloads of one task."""

    task: Task
    title: str
    name: str | None = None
    checkpoints: int = 0
    checked: int = 0
    checked_bytes: int = 0
    damaged: list[dict[str, JSON]] = field(default_factory=list)

    def fields(self) -> dict[str, JSON]:
        """As ``--json`` says it."""
        return {
            "uri": self.task.uri,
            "run": self.task.run,
            "task": self.task.name,
            "name": self.name,
            "count": self.checkpoints,
            "checked": self.checked,
            "checked_bytes": self.checked_bytes,
            "damaged": self.damaged,
        }


@click.command()
@click.argument("target", required=False)
@click.option("--subset", metavar="N%", help="Only a random share of each task's checkpoints, the newest among them.")
@pointing
def verify(pointer: Pointer, target: str | None, subset: str | None, as_json: bool) -> None:
    """Read payloads, and check their digests.

    TARGET is a path or URL of a base, a run or a task. Each damaged checkpoint is reported; the exit code says whether
    there was one.
    """
    share = _share(subset)
    done = [_verified(task, share, quiet=as_json) for task in tasks_at(replace(pointer, target=target))]
    if as_json:
        out.document({"tasks": [one.fields() for one in done], "damaged": sum(len(one.damaged) for one in done)})
    else:
        _print(done)
    if any(one.damaged for one in done):
        raise click.exceptions.Exit(CORRUPT)


def _share(text: str | None) -> float:
    if text is None:
        return 1.0
    found = _SHARE.fullmatch(text)
    if found is None or not 0 < float(found[1]) <= 100:
        raise UsageError(f"--subset {out.plain(text)} must be a share such as 5%, more than 0% and at most 100%.")
    return float(found[1]) / 100


def _print(done: Sequence[Verified]) -> None:
    for one in done:
        for damage in one.damaged:
            step = f" (step {damage['step']})" if damage["step"] is not None else ""
            click.echo(out.plain(f"damaged: {damage['checkpoint']}{step}: {damage['message']}"), err=True)
    rows = [
        (one.title, one.checkpoints, one.checked, out.size(one.checked_bytes), len(one.damaged) or "none")
        for one in done
    ]
    out.table(("task", "checkpoints", "checked", "size", "damaged"), rows)


def _verified(task: Task, share: float, *, quiet: bool) -> Verified:
    result = Verified(task, task.path)
    try:
        found = history(task)
    except CorruptCheckpointError as error:
        result.damaged.append(_damage(None, error))
        return result
    result.title, result.name = found.title, found.name
    result.damaged += [_damage(None, error) for error in found.damaged]
    result.checkpoints = len(found.infos)
    for info in _chosen(found.infos, share):
        problem = _problem(found, info, quiet=quiet)
        if problem is not None and _is_there(found, info):
            result.damaged.append(_damage(info, problem))
        result.checked += 1
        result.checked_bytes += info.stored_bytes
    return result


def _chosen(infos: Sequence[CheckpointInfo], share: float) -> list[CheckpointInfo]:
    """The newest in any case, and so many others, drawn at random: another share each time."""
    if not infos:
        return []
    newest, *others = infos
    count = ceil(len(infos) * share) - 1
    return [newest, *random.SystemRandom().sample(others, count)]


def _problem(found: History, info: CheckpointInfo, *, quiet: bool) -> TaskckptError | None:
    """What is wrong with a checkpoint: its payload and the positions that were saved with it are read."""
    try:
        for stored in found.commit_of(info).objects:
            title = found.title if info.step is None else f"{found.title} step {info.step}"
            with out.bar(title, quiet=quiet) as report:
                _read_through(found.task, stored, report)
    except (CorruptCheckpointError, NotFoundError) as error:
        return error
    return None


def _read_through(task: Task, stored: Stored, report: Report | None) -> None:
    """To the end, where the digest is checked."""
    with closing(_payload.chunks_of(task.store, stored, Stop(), report)) as chunks:
        for _ in chunks:
            pass


def _is_there(found: History, info: CheckpointInfo) -> bool:
    """Whether a checkpoint still is, perhaps in another record: a task that runs prunes what was listed before."""
    original = found.commits[info.slot].original
    return any(commit.original == original for commit in history(found.task).commits.values())


def _damage(info: CheckpointInfo | None, error: TaskckptError) -> dict[str, JSON]:
    about = {"checkpoint": error.uri, "step": None} if info is None else {"checkpoint": info.uri, "step": info.step}
    return {**about, **described(error)}
