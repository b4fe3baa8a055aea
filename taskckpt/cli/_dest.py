"""DEST of pull: a folder on this machine, which costs nobody a checkpoint."""

from __future__ import annotations

import contextlib
import os
import shlex
from typing import NoReturn

from taskckpt._layout import LOG, parse_slot_name, slot_of_record
from taskckpt._stores.local import translating
from taskckpt.cli._options import agree
from taskckpt.cli._targets import MOST_DEEP, parsed
from taskckpt.errors import AlreadyExistsError, UsageError


def checked_dest(dest: str, *, alone: bool, replace: bool) -> str:
    """The real path of DEST. ``alone``: it was the only word, and may have been meant as TARGET.

    Raises:
        AlreadyExistsError: It is full, and ``replace`` is not set.
        UsageError: It is no folder, or is, contains or lies in the place of a task, whichever is pulled.
    """
    where = parsed(dest, "DEST")
    is_checkpoint = slot_of_record(where.path) is not None
    if alone and (is_checkpoint or not where.is_local):
        raise _missing(dest, f"{dest} is {'a checkpoint' if is_checkpoint else 'no folder on this machine'}.")
    if not where.is_local:
        raise UsageError("DEST must be a folder on this machine.", uri=where.uri)
    target = os.path.realpath(where.path)
    with translating(target):
        _expect_no_task(dest, target, alone=alone, replace=replace)
        if os.path.lexists(target) and not os.path.isdir(target):
            raise UsageError("DEST is a file.", uri=target, hint="Name a folder.")
        if not replace and _entries(target):
            hint = "Choose another folder, or add --replace."
            raise AlreadyExistsError("DEST is not empty.", uri=target, hint=hint)
    return target


def agree_to_replace(target: str, by: str, *, yes: bool) -> None:
    """Asks, if anything is there that would go."""
    with translating(target):
        count = _entries(target)
    if count:
        entries = "1 entry" if count == 1 else f"{count} entries"
        agree(f"All that is in {target} ({entries}) will be replaced by a checkpoint of {by}.", yes=yes)


def _entries(target: str) -> int:
    return len(os.listdir(target)) if os.path.isdir(target) else 0


def _expect_no_task(dest: str, target: str, *, alone: bool, replace: bool) -> None:
    above = _place_above(target)
    if above is not None:
        _refuse("lies in the place of a task", target, above)
    # What would be deleted is searched to its end; else it only matters whether a TARGET was meant.
    below = _place_below(target, None if replace else MOST_DEEP) if replace or alone else None
    if below is None:
        return
    what = "is a task" if below == target else f"holds the task {below}"
    if alone:
        raise _missing(dest, f"{dest} {what}.")
    _refuse("is the place of a task" if below == target else "contains the place of a task", target, below)


def _refuse(what: str, target: str, place: str) -> NoReturn:
    raise UsageError(f"DEST {what}: checkpoints would be lost.", uri=target, hint=f"Choose a folder outside {place}")


def _missing(dest: str, why: str) -> UsageError:
    return UsageError(f"DEST is missing: {why}", hint=f"taskckpt pull {shlex.quote(dest)} FOLDER")


def _place_above(target: str) -> str | None:
    folder = target
    while folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
        # /var/log may be closed to us, and is no reason to refuse /var/tmp/out.
        with contextlib.suppress(PermissionError):
            if _is_place(folder):
                return folder
    return None


def _place_below(target: str, depth: int | None) -> str | None:
    """A task's place that is the folder or lies in it; what cannot be looked into is an error if all is looked at."""

    def fail(error: OSError) -> None:
        if depth is None and not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error

    for folder, names, _ in os.walk(target, onerror=fail):
        if LOG in names and _is_place(folder):
            return folder
        if depth is not None and folder[len(target) :].count("/") >= depth:
            names.clear()
    return None


def _is_place(folder: str) -> bool:
    try:
        with os.scandir(os.path.join(folder, LOG)) as entries:
            return any(parse_slot_name(entry.name) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return False
