"""Which task a command is itself: for run, save and load, which do not look at a task but are one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

from taskckpt import context, engines
from taskckpt._keep import KeepPolicy, LatestN, parse_policy
from taskckpt._process import KEEP, KEY, TASK
from taskckpt._stores import is_unset
from taskckpt._task_context import TaskContext
from taskckpt.cli._output import plain
from taskckpt.cli._targets import Pointer, parsed
from taskckpt.engines.environment import INDEX, acting_for, lasting
from taskckpt.errors import AmbiguousIdentityError, NoTaskContextError, UsageError


def task_of(pointer: Pointer, keep: str | None, *, command: Sequence[str] = ()) -> TaskContext:
    """The task that was named, else that of the environment or the engine, as it is: part of an attempt, maybe.

    ``command`` is what this process is about to start for it.

    Raises:
        NoTaskContextError: Nobody said which.
        AmbiguousIdentityError: What runs this does not tell, or not which of its commands this is.
    """
    key, task, run = pointer.key, pointer.task, pointer.run
    for name, value in (("--key", key), ("--task", task), ("--run", run)):
        if value is not None and is_unset(value):
            raise UsageError(f"{name} is {'blank' if not value.strip() else value + ', which nobody filled in'}.")
    if key is not None and (task is not None or run is not None):
        raise UsageError("A task with a key spans runs: --key goes with neither --task nor --run.")
    if key is None and task is None:
        return _changed(_known(command), pointer, keep)
    if pointer.base is not None:
        base = parsed(pointer.base, "--base").uri
    else:
        base, origin = context.base_and_origin()
        context.expect_lasting(key, origin, engines.detect())
    named = TaskContext(context.run_and_origin(run)[0], key or task or "", None, base, key=key, keep=_policy(keep))
    named = replace(named, rank=engines.look().rank)
    return _in_attempt(named)


def _known(command: Sequence[str]) -> TaskContext:
    with acting_for(_name_of(command)) if command else nullcontext():
        known = context.ctx()
    if known is None:
        hint = "Name it: --key NAME; or set TASKCKPT_KEY, or TASKCKPT_RUN and TASKCKPT_TASK."
        raise NoTaskContextError("Which task is this? Nobody said.", hint=hint)
    system = known.engine
    of_system = system is not None and system.in_environment and known.origins.get("task") == system.engine
    if of_system and not command and not os.environ.get(INDEX, "").strip():
        raise AmbiguousIdentityError(
            f"{known.origins['task']} does not tell which of the scripts of its job this belongs to.",
            hint="Start the script by `taskckpt run`, which tells; or name the task: --key, or TASKCKPT_TASK.",
        )
    return known


def _name_of(command: Sequence[str]) -> str:
    """Another command is another task. Its words may be secret, and as long as they like."""
    words = "\0".join([lasting(os.getcwd()), *command])
    digest = hashlib.sha256(words.encode(errors="surrogateescape")).hexdigest()[:12]
    return f"{os.path.basename(command[0]) or 'command'}-{digest}"


def _changed(known: TaskContext, pointer: Pointer, keep: str | None) -> TaskContext:
    """The same task in another run or base is another task, which nobody has handed a claim down for."""
    if pointer.run is not None and known.key is not None:
        raise UsageError(f"The task has a key, {plain(known.key)}, which spans runs: leave out --run.")
    kept = known if keep is None else replace(known, keep=_policy(keep))
    if pointer.run is None and pointer.base is None:
        return kept
    base = known.base if pointer.base is None else parsed(pointer.base, "--base").uri
    return _in_attempt(replace(kept, run=pointer.run or known.run, base=base, _handed_nonce=None))


def _in_attempt(named: TaskContext) -> TaskContext:
    """If it is the task that this process is part of already, its attempt goes on."""
    about = named.environ()
    if about[KEY] != os.environ.get(KEY, "") or about[TASK] != os.environ.get(TASK, ""):
        return named
    known = context.ctx()
    return named if known is None or known.place != named.place else replace(known, keep=named.keep)


def _policy(text: str | None) -> int | KeepPolicy | None:
    policy = parse_policy(text or os.environ.get(KEEP) or "3")
    return policy.n if isinstance(policy, LatestN) else policy
