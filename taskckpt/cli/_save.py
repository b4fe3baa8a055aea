"""The verbs save and load: a task that is no Python, such as a shell script, saves and resumes.

They are the task: unlike the verbs that look, they take it over, or join the attempt that they are part of.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import click

from taskckpt._checkpoint import Checkpoint
from taskckpt.cli import _output as out
from taskckpt.cli._options import pointing, whole_number
from taskckpt.cli._targets import Pointer
from taskckpt.cli._who import task_of
from taskckpt.errors import UsageError

STREAM = "-"


@click.command()
@click.argument("path", metavar="PATH|-")
@click.option("--step", metavar="N", help="How far the task is.")
@click.option("--metric", "metrics", metavar="NAME=NUMBER", multiple=True, help="For --best, and for best:N:NAME.")
@click.option("--keep", metavar="POLICY", help="What stays, as for prune [default: TASKCKPT_KEEP, or 3].")
@click.option("--overwrite", is_flag=True, help="There may be a checkpoint of that step: this one replaces it.")
@click.option("--pin", is_flag=True, help="It stays until it is unpinned.")
@pointing
def save(
    pointer: Pointer,
    path: str,
    step: str | None,
    metrics: tuple[str, ...],
    keep: str | None,
    overwrite: bool,
    pin: bool,
    as_json: bool,
) -> None:
    """Save a file or a folder, or what comes on stdin (-), as the task that this is part of.

    That is the task of `taskckpt run`, of TASKCKPT_KEY or TASKCKPT_TASK, of the engine, or the one that is named. Other
    commands of the same attempt go on; an older attempt ends.
    """
    number = None if step is None else whole_number(step, "--step")
    measured = dict(_metric(text) for text in metrics)
    checkpoint = _own(pointer, keep)
    # A str could be a URL, or a text by mistake.
    data = sys.stdin.buffer.read() if path == STREAM else Path(os.path.abspath(path))
    with out.bar("save", quiet=as_json) as progress:
        info = checkpoint.save_sync(
            data, step=number, metrics=measured or None, overwrite=overwrite, pin=pin, progress=progress
        )
    if as_json:
        out.document({"task": checkpoint.remote_destination, "checkpoint": out.checkpoint_fields(info)})


@click.command()
@click.argument("dest", metavar="DEST|-")
@click.option("--replace", "replace_it", is_flag=True, help="DEST may be full: its content is replaced.")
@pointing
def load(pointer: Pointer, dest: str, replace_it: bool, as_json: bool) -> None:
    """Restore the newest checkpoint into the folder DEST, or to stdout (-), as the task that this is part of.

    Prints the path of what was restored. If nothing was saved yet, it restores and prints nothing, and ends with 0: the
    task begins. Where that cannot be told, it is an error. An older attempt ends.
    """
    if dest == STREAM and (replace_it or as_json):
        raise UsageError("To stdout goes the content, and nothing else: leave out --replace and --json.")
    checkpoint = _own(pointer, None)
    with out.bar("load", quiet=as_json) as progress:
        if dest == STREAM:
            sys.stdout.buffer.write(checkpoint.load_bytes_sync(progress=progress) or b"")
            sys.stdout.buffer.flush()
            return
        path = checkpoint.load_sync(to=os.path.abspath(dest), replace=replace_it, progress=progress)
    if as_json:
        loaded = None if checkpoint.loaded is None else out.checkpoint_fields(checkpoint.loaded)
        restored = None if path is None else str(path)
        out.document({"task": checkpoint.remote_destination, "checkpoint": loaded, "path": restored})
    elif path is not None:
        click.echo(out.plain(path))


def _own(pointer: Pointer, keep: str | None) -> Checkpoint:
    """This process's own; its claim is that of the attempt, if it is part of one."""
    task = replace(task_of(pointer, keep), storage_options=pointer.storage_options, timeout_s=pointer.timeout_s)
    return task.checkpoint


def _metric(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        if name:
            return name, float(number)
    except ValueError:
        pass
    raise UsageError(f"--metric {out.plain(text)} is not NAME=NUMBER.")
