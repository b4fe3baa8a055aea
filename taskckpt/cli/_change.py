"""The verbs that change what there is: pin, unpin, prune, rollback, clear.

pin, unpin and prune write beside the attempt that has the task, which goes on. rollback and clear take the task over,
since that is what they mean: an attempt that runs ends.
"""

from __future__ import annotations

from dataclasses import replace

import click

from taskckpt._checkpoint import Checkpoint
from taskckpt._history import PruneDecision
from taskckpt._keep import KeepPolicy, parse_policy
from taskckpt._layout import slot_of_record
from taskckpt._selection import CheckpointInfo
from taskckpt.cli import _output as out
from taskckpt.cli._history import history, owner
from taskckpt.cli._options import agree, pointing, split, whole_number, yes_option
from taskckpt.cli._targets import Pointer, Task, task_at
from taskckpt.errors import UsageError

STEP = "STEP|URI"


@click.command()
@click.argument("words", nargs=-1, metavar=f"[TARGET] {STEP}")
@pointing
def pin(pointer: Pointer, words: tuple[str, ...], as_json: bool) -> None:
    """Keep the checkpoint of STEP until it is unpinned.

    An attempt that runs goes on. TARGET is a path or URL of a task; or give only the checkpoint's own URI.
    """
    task, info = _meant(pointer, words)
    _tell_marked(task, _beside(task, None).pin_sync(info), info, as_json=as_json)


@click.command()
@click.argument("words", nargs=-1, metavar=f"[TARGET] {STEP}")
@pointing
def unpin(pointer: Pointer, words: tuple[str, ...], as_json: bool) -> None:
    """Let the checkpoint of STEP be pruned again.

    An attempt that runs goes on. TARGET is a path or URL of a task; or give only the checkpoint's own URI.
    """
    task, info = _meant(pointer, words)
    _tell_marked(task, _beside(task, None).unpin_sync(info), info, as_json=as_json)


def _meant(pointer: Pointer, words: tuple[str, ...]) -> tuple[Task, CheckpointInfo]:
    """The task, and the checkpoint: what is not there is refused before anything is written."""
    if len(words) == 1 and slot_of_record(words[0]) is not None:
        task, slot = task_at(replace(pointer, target=words[0]))
        return task, history(task).of_slot(slot or 0)
    pointer, step = split(pointer, words, STEP)
    number = whole_number(step, "STEP")
    task = _one_task(pointer)
    return task, history(task).of_step(number)


def _tell_marked(task: Task, marked: CheckpointInfo, before: CheckpointInfo, *, as_json: bool) -> None:
    if as_json:
        out.document({"task": task.uri, "checkpoint": out.checkpoint_fields(marked)})
    else:
        what = "is pinned" if marked.pinned else "is not pinned"
        click.echo(out.plain(f"{_named(before)} of {task.uri} {what}."))


# --- prune -------------------------------------------------------------------------------------


@click.command()
@click.argument("target", required=False)
@click.option(
    "--keep",
    metavar="POLICY",
    help="What stays: latest:3, best:2:loss, best:2:accuracy:max, every:1000, all; several with | between. "
    "[default: what the task's newest attempt keeps]",
)
@click.option("--dry-run", is_flag=True, help="Only tell what would go, and why the others stay.")
@yes_option
@pointing
def prune(pointer: Pointer, target: str | None, keep: str | None, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Delete the checkpoints that no policy keeps.

    What is pinned stays, and so does the newest. An attempt that runs goes on. TARGET is a path or URL of a task.
    """
    task = _one_task(replace(pointer, target=target))
    policy = _own_policy(task) if keep is None else parse_policy(keep)
    planned = Checkpoint(task.uri, keep=policy, read_only=True, **task.access).prune_sync(dry_run=True)
    go = [one for one in planned if not one.keeps]
    if not as_json:
        _print_plan(task, planned)
    if go and not dry_run:
        agree(f"{_checkpoints(len(go))} of {task.uri} will be deleted. An attempt that runs goes on.", yes=yes)
        planned = _beside(task, policy).prune_sync()
    if as_json:
        plan: list[out.JSON] = [
            {"keeps": one.keeps, "reason": one.reason, "checkpoint": out.checkpoint_fields(one.checkpoint)}
            for one in planned
        ]
        out.document({"task": task.uri, "dry_run": dry_run, "checkpoints": plan})
    elif go and not dry_run:
        click.echo(f"Deleted {_checkpoints(sum(not one.keeps for one in planned))}.")


def _own_policy(task: Task) -> KeepPolicy | None:
    """What the task's newest attempt keeps, as its claim says."""
    holder = owner(task)
    if holder is None or not isinstance(holder.keep, str):
        raise UsageError("Nobody said what is to stay.", uri=task.uri, hint="Say it: --keep latest:3")
    return parse_policy(holder.keep)


def _checkpoints(count: int) -> str:
    return "1 checkpoint" if count == 1 else f"{count} checkpoints"


def _print_plan(task: Task, plan: list[PruneDecision]) -> None:
    click.echo(out.plain(task.uri))
    rows = [
        (
            one.checkpoint.step,
            out.age(one.checkpoint.time),
            out.size(one.checkpoint.stored_bytes),
            "keep" if one.keeps else "delete",
            one.reason,
        )
        for one in plan
    ]
    out.table(("step", "saved", "size", "what", "why"), rows)


# --- rollback, clear ---------------------------------------------------------------------------


@click.command()
@click.argument("words", nargs=-1, metavar=f"[TARGET] {STEP}")
@yes_option
@pointing
def rollback(pointer: Pointer, words: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Go back to the checkpoint of STEP.

    The next attempt goes on from it. This takes the task over: an attempt that runs can save no more. TARGET is a path
    or URL of a task; or give only the checkpoint's own URI.
    """
    task, info = _meant(pointer, words)
    agree(f"{task.uri} goes back to {_named(info)}. {_taken_over(task)}", yes=yes)
    made = Checkpoint(task.uri, keep=None, **task.access).rollback_sync(info)
    if as_json:
        out.document({"task": task.uri, "checkpoint": out.checkpoint_fields(made)})
    else:
        click.echo(out.plain(f"The next attempt of {task.uri} goes on from {_named(made)}."))


@click.command()
@click.argument("target", required=False)
@yes_option
@pointing
def clear(pointer: Pointer, target: str | None, yes: bool, as_json: bool) -> None:
    """Delete all checkpoints of a task.

    The next attempt starts over. This takes the task over: an attempt that runs can save no more. TARGET is a path or
    URL of a task.
    """
    task = _one_task(replace(pointer, target=target))
    found = history(task)
    what = f"{_checkpoints(len(found.infos))} ({out.size(found.stored_bytes)})"
    agree(f"{what} of {task.uri} will be deleted, the pinned ones too. {_taken_over(task)}", yes=yes)
    Checkpoint(task.uri, keep=None, **task.access).clear_sync()
    if as_json:
        out.document({"task": task.uri, "cleared": len(found.infos)})
    else:
        click.echo(out.plain(f"Cleared {task.uri}: the next attempt starts over."))


def _named(info: CheckpointInfo) -> str:
    return f"{'the checkpoint' if info.step is None else f'step {info.step}'} (saved {out.age(info.time)})"


def _taken_over(task: Task) -> str:
    """Who loses the task."""
    holder = owner(task)
    if holder is None:
        return "If an attempt of it runs, it can save no more."
    return f"The task is taken over from {holder}: if that still runs, it can save no more."


# --- inside ------------------------------------------------------------------------------------


def _one_task(pointer: Pointer) -> Task:
    task, slot = task_at(pointer)
    if slot is not None:
        raise UsageError("This is one checkpoint: name the task, and the checkpoint by its step.", uri=pointer.target)
    return task


def _beside(task: Task, keep: KeepPolicy | None) -> Checkpoint:
    """Writes as another process of the attempt that has the task: nobody is fenced."""
    return Checkpoint._joining(task.uri, keep=keep, **task.access)  # noqa: SLF001 - a door for this room
