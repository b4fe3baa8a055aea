"""The verb pull: a checkpoint into a folder. It never writes to the store, claims or fences."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import click

from taskckpt._keep import Mode
from taskckpt._layout import slot_key
from taskckpt.cli import _output as out
from taskckpt.cli._dest import agree_to_replace, checked_dest
from taskckpt.cli._history import history
from taskckpt.cli._options import pointing, split, whole_number, yes_option
from taskckpt.cli._targets import Pointer, Task, task_at
from taskckpt.errors import NotFoundError, UsageError


@click.command()
@click.argument("words", nargs=-1, metavar="[TARGET] DEST")
@click.option("--step", metavar="N", help="The checkpoint of this step.")
@click.option("--best", metavar="METRIC[:max]", help="The one with the lowest METRIC, or with :max the highest.")
@click.option("--latest", is_flag=True, help="The newest good one [default].")
@click.option("--replace", is_flag=True, help="DEST may be full: its content is replaced. Asks before.")
@yes_option
@pointing
def pull(
    pointer: Pointer,
    words: tuple[str, ...],
    step: str | None,
    best: str | None,
    latest: bool,
    replace: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Restore a checkpoint into the folder DEST.

    TARGET is a path or URL of a task, or a checkpoint's own URI. DEST must be absent or empty, unless --replace; it
    must neither be, contain nor lie in the place of any task.
    """
    pointer, dest = split(pointer, words, "DEST")
    folder = checked_dest(dest, alone=len(words) == 1, replace=replace)
    task, slot = task_at(pointer)
    if sum((step is not None, best is not None, latest, slot is not None)) > 1:
        raise UsageError("Name one checkpoint: by its URI, --step, --best or --latest.")
    named = None if slot is None else history(task).of_slot(slot)
    metric, mode = _metric(best, task)
    if replace:
        agree_to_replace(folder, task.uri, yes=yes)
    with out.bar("pull", quiet=as_json) as progress, _loads() as loads:
        path = task.view.load_sync(
            step=None if step is None else whole_number(step, "--step"),
            best=metric,
            mode=mode,
            where=None if named is None else lambda info: info.slot == named.slot,
            to=dest,
            replace=replace,
            progress=progress,
        )
    if path is None:
        raise NotFoundError("Nothing was saved here yet, or it was cleared.", uri=task.uri)
    loaded = loads[-1]
    if as_json:
        about = {"kind": loaded["kind"], "size_bytes": loaded["size_bytes"], "time": loaded["saved"]}
        out.document({"task": task.uri, "checkpoint": _uri(loaded), "path": str(path), **about})
    else:
        click.echo(out.plain(f"{path}  ({out.size(loaded['size_bytes'])}, from {_uri(loaded)})"))


def _metric(text: str | None, task: Task) -> tuple[str | None, Mode]:
    """``METRIC``, ``METRIC:min`` or ``METRIC:max``. A metric's name may have colons too."""
    if text is None:
        return None, "min"
    name, colon, mode = text.rpartition(":")
    if colon and mode in ("min", "max"):
        return name, "max" if mode == "max" else "min"
    if colon and not any(text in info.metrics for info in history(task).infos):
        hint = f"--best {name}:min is the lowest, --best {name}:max the highest."
        raise UsageError(f"--best {text}: {mode!r} is neither min nor max, and no metric has that name.", hint=hint)
    return text, "min"


@contextmanager
def _loads() -> Generator[list[dict[str, Any]]]:
    """What is loaded inside, as the log tells programs: the newest may have been damaged, and passed over."""
    told: list[dict[str, Any]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            about = getattr(record, "taskckpt", {})
            if about.get("event") == "loaded":
                told.append(about)

    logger, listener = logging.getLogger("taskckpt"), Listener()
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    try:
        yield told
    finally:
        logger.setLevel(level)
        logger.removeHandler(listener)


def _uri(loaded: dict[str, Any]) -> str:
    """The checkpoint that was loaded; a place or object that it had been forked from may be elsewhere."""
    return str(loaded["uri"]) if loaded["slot"] is None else f"{loaded['uri']}/{slot_key(loaded['slot'])}"
