"""The verbs that only look: ls, show, du. None of them writes, claims or fences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import click

from taskckpt._layout import DATA
from taskckpt._selection import CheckpointInfo
from taskckpt.cli import _output as out
from taskckpt.cli._exits import code_of, described
from taskckpt.cli._history import History, Owner, history, owner
from taskckpt.cli._options import pointing, whole_number
from taskckpt.cli._output import JSON
from taskckpt.cli._targets import Pointer, Task, in_parallel, task_at, tasks_at
from taskckpt.errors import CorruptCheckpointError, TaskckptError, UnsupportedFormatError


@click.command()
@click.argument("target", required=False)
@pointing
def ls(pointer: Pointer, target: str | None, as_json: bool) -> None:
    """List the tasks at TARGET; of one task, its checkpoints.

    TARGET is a path or URL of a base, a run or a task.
    """
    tasks = tasks_at(replace(pointer, target=target))
    looked = in_parallel(_looked, tasks)
    if as_json:
        out.document({"tasks": [_task_fields(task, found, checkpoints=task.is_target) for task, found in looked]})
    else:
        _print(looked)
    _end(looked)


def _looked(task: Task) -> tuple[Task, History | TaskckptError]:
    """A task that cannot be read hides none of the others."""
    try:
        return task, history(task)
    except (CorruptCheckpointError, UnsupportedFormatError) as error:
        return task, error


def _print(looked: list[tuple[Task, History | TaskckptError]]) -> None:
    task, found = looked[0]
    if task.is_target and isinstance(found, History):
        _print_checkpoints(found)
    else:
        _print_tasks(looked)


def _end(looked: list[tuple[Task, History | TaskckptError]]) -> None:
    """Damage was shown, and is the exit code too."""
    errors = [found for _, found in looked if isinstance(found, TaskckptError)]
    errors += [error for _, found in looked if isinstance(found, History) for error in found.damaged]
    if errors:
        raise click.exceptions.Exit(code_of(errors[0]))


def _task_fields(task: Task, found: History | TaskckptError, *, checkpoints: bool) -> dict[str, JSON]:
    about: dict[str, JSON] = {"uri": task.uri, "run": task.run, "task": task.name}
    if isinstance(found, TaskckptError):
        return about | {
            "name": None,
            "count": None,
            "stored_bytes": None,
            "newest": None,
            "damaged": [described(found)],
        }
    about |= {
        "name": found.name,
        "count": len(found.infos),
        "stored_bytes": found.stored_bytes,
        "newest": out.checkpoint_fields(found.infos[0]) if found.infos else None,
        "damaged": [described(error) for error in found.damaged],
    }
    return about | ({"checkpoints": [out.checkpoint_fields(info) for info in found.infos]} if checkpoints else {})


def _print_tasks(looked: list[tuple[Task, History | TaskckptError]]) -> None:
    rows: list[tuple[object, ...]] = []
    for task, found in looked:
        if isinstance(found, TaskckptError):
            rows.append((task.path, None, None, None, None, None, found.message))
            continue
        newest = found.infos[0] if found.infos else None
        rows.append(
            (
                found.title,
                len(found.infos),
                found.step,
                newest and newest.attempt,
                newest and out.age(newest.time),
                out.size(found.stored_bytes),
                f"{len(found.damaged)} damaged records" if found.damaged else "",
            )
        )
    out.table(("task", "checkpoints", "step", "attempt", "saved", "size", ""), rows)


def _print_checkpoints(found: History) -> None:
    click.echo(out.plain(found.task.uri))
    if not found.infos:
        click.echo("No checkpoint: nothing was saved, or it was cleared.")
    else:
        # One without a step is named by its URI.
        uris = any(info.step is None for info in found.infos)
        rows = [
            (
                info.step,
                info.attempt,
                out.age(info.time),
                out.size(info.size_bytes),
                _kind(info),
                out.metrics_text(info.metrics),
                _marks(info.pinned, info.in_lineage),
                *((info.uri,) if uris else ()),
            )
            for info in found.infos
        ]
        out.table(("step", "attempt", "saved", "size", "kind", "metrics", "", *(("uri",) if uris else ())), rows)
    for error in found.damaged:
        click.echo(out.plain(f"damaged: {error}"), err=True)


def _kind(info: CheckpointInfo) -> str:
    return info.kind if info.name is None else f"{info.kind} {info.name}"


def _marks(pinned: bool, in_lineage: bool) -> str:
    return ", ".join(mark for mark, holds in (("pinned", pinned), ("left behind", not in_lineage)) if holds)


# --- show --------------------------------------------------------------------------------------


@click.command()
@click.argument("target", required=False)
@click.option("--step", metavar="N", help="The checkpoint of this step.")
@pointing
def show(pointer: Pointer, target: str | None, step: str | None, as_json: bool) -> None:
    """Show all about a task or a checkpoint.

    TARGET is a path or URL of a task, or a checkpoint's own URI as ls --json and show print it.
    """
    task, slot = task_at(replace(pointer, target=target))
    found = history(task)
    if step is not None or slot is not None:
        info = found.of_slot(slot or 0) if step is None else found.of_step(whole_number(step, "--step"))
        content = _about_checkpoint(found, info)
        lines = _flat(content) | {"time": out.when(info.time)}
    else:
        holder = owner(task)
        content = _about_task(task, found, holder)
        lines = _task_lines(content, found, holder)
    if as_json:
        out.document(content)
    else:
        out.facts(lines)
    if found.damaged and step is None and slot is None:
        raise click.exceptions.Exit(code_of(found.damaged[0]))


def _about_task(task: Task, found: History, holder: Owner | None) -> dict[str, JSON]:
    steps = sorted({info.step for info in found.infos if info.step is not None})
    return _task_fields(task, found, checkpoints=False) | {
        "steps": steps,
        "pinned_steps": sorted({info.step for info in found.infos if info.pinned and info.step is not None}),
        "owner": None if holder is None else holder.fields(),
    }


def _task_lines(content: Mapping[str, JSON], found: History, holder: Owner | None) -> dict[str, object]:
    """The same for people; of the newest checkpoint, what tells how far the task is."""
    newest = found.infos[0] if found.infos else None
    lines: dict[str, object] = {
        "task": found.title,
        "place": found.task.uri,
        "checkpoints": f"{len(found.infos)} ({out.size(found.stored_bytes)})",
        "steps": content["steps"],
        "pinned steps": content["pinned_steps"],
    }
    if newest is not None:
        attempt = "" if newest.attempt is None else f" by attempt {newest.attempt}"
        lines |= {
            "newest": ("no step" if newest.step is None else f"step {newest.step}") + f", {_kind(newest)}",
            "newest size": out.size(newest.size_bytes),
            "newest saved": f"{out.when(newest.time)}{attempt}",
            "newest metrics": out.metrics_text(newest.metrics) or None,
            "newest metadata": dict(newest.metadata),
            "newest URI": newest.uri,
        }
    if holder is not None:
        attempt = "an attempt" if holder.attempt is None else f"attempt {holder.attempt}"
        lines |= {
            "held by": f"{attempt} (pid {holder.pid} on {holder.host})",
            "since": out.when(holder.claimed),
            "last wrote": out.when(holder.wrote),
            "keeps": holder.keep,
        }
    else:
        lines["held by"] = None
    return _flat(lines) | {"damaged records": len(found.damaged) or "none"}


def _about_checkpoint(found: History, info: CheckpointInfo) -> dict[str, JSON]:
    commit, task = found.commit_of(info), found.task
    about = commit.stamp.about if commit.repeats is None else commit.repeats.about
    return out.checkpoint_fields(info) | {
        "task": task.uri,
        "saved_by": out.finite(about),
        "content_blake3": commit.content.digest.blake3,
        "stored_blake3": commit.stored.digest.blake3,
        "payload": None if commit.stored.key is None else f"{task.uri}/{commit.stored.key}",
    }


def _flat(content: Mapping[str, Any], above: str = "") -> dict[str, object]:
    """One line for each value, for people."""
    lines: dict[str, object] = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            lines |= _flat(value, f"{above}{name}.")
        elif isinstance(value, (list, tuple, Mapping)):
            lines[above + name] = ", ".join(map(str, value)) or None
        else:
            lines[above + name] = out.size(value) if name.endswith("_bytes") and isinstance(value, int) else value
    return lines


# --- du ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """The bytes of a task in its store."""

    payload_bytes: int
    log_bytes: int
    unreferenced_bytes: int
    objects: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(one + two for one, two in zip(self.parts, other.parts, strict=True)))

    @property
    def parts(self) -> tuple[int, int, int, int]:
        return self.payload_bytes, self.log_bytes, self.unreferenced_bytes, self.objects


@click.command()
@click.argument("target", required=False)
@pointing
def du(pointer: Pointer, target: str | None, as_json: bool) -> None:
    """Show how much room tasks take.

    TARGET is a path or URL of a base, a run or a task. Unreferenced are payloads that no checkpoint has: of saves that
    are under way or were killed, and what could not be deleted yet. Later attempts remove them.
    """
    tasks = tasks_at(replace(pointer, target=target))
    used = in_parallel(_usage, tasks)
    total = sum((one for _, one in used), Usage(0, 0, 0, 0))
    if as_json:
        rows = [
            {"uri": found.task.uri, "run": found.task.run, "task": found.task.name, "name": found.name, **vars(one)}
            for found, one in used
        ]
        out.document({"tasks": rows, "total": vars(total)})
        return
    lines = [(found.title, *_sizes(one)) for found, one in used]
    lines += [("total", *_sizes(total))] if len(tasks) > 1 else []
    out.table(("task", "payloads", "unreferenced", "log", "size"), lines)


def _sizes(one: Usage) -> tuple[Any, ...]:
    total = one.payload_bytes + one.unreferenced_bytes + one.log_bytes
    return tuple(map(out.size, (one.payload_bytes, one.unreferenced_bytes, one.log_bytes, total)))


def _usage(task: Task) -> tuple[History, Usage]:
    # Listed first: what is committed meanwhile is referred to.
    sizes = task.store.sizes_below("")
    found = history(task)
    referenced = {key for commit in found.commits.values() for key in commit.keys}
    payloads = {key: size for key, size in sizes.items() if key.startswith(f"{DATA}/")}
    used = sum(size for key, size in payloads.items() if key in referenced)
    return found, Usage(
        payload_bytes=used,
        log_bytes=sum(sizes.values()) - sum(payloads.values()),
        unreferenced_bytes=sum(payloads.values()) - used,
        objects=len(sizes),
    )
