"""Finding another task's place, to look at it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from taskckpt import context
from taskckpt._arguments import Target
from taskckpt._attempt import Attempt
from taskckpt._layout import LOG, keyed_prefix, task_prefix
from taskckpt._stores import open_store, parse
from taskckpt.errors import NotFoundError, UsageError


def attempt_of(
    key: str | None,
    run: str | None,
    task: str | None,
    base: Target | None,
    storage_options: dict[str, Any],
    timeout_s: float,
) -> Attempt:
    """A read-only look at a task. See ``Checkpoint.of``."""
    if (key is None) == (task is None):
        raise UsageError("Checkpoint.of takes either key= or task=.")
    root = parse(context.base_and_origin(base)[0], what="base")
    prefix = keyed_prefix(key) if key is not None else task_prefix(context.run_and_origin(run)[0], str(task))
    attempt = Attempt(root.child(prefix), storage_options=storage_options, timeout_s=timeout_s, read_only=True)
    if not attempt.open_store().list_below(LOG, first_page=True).names:
        run_folder, _, name = prefix.partition("/")
        tasks = open_store(root.child(run_folder), storage_options=storage_options, timeout_s=timeout_s)
        names = sorted(tasks.folders(""))
        raise NotFoundError(
            f"There is no task {name!r}.",
            uri=attempt.dest.uri,
            hint=f"There are: {', '.join(_nearest(name, names))}." if names else "This run has no tasks at all.",
        )
    return attempt


def _nearest(name: str, names: Sequence[str]) -> Sequence[str]:
    return difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
