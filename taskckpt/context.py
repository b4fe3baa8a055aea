"""Who am I: which run, which task, which attempt, and where its state lies.

Each value comes from the first that tells it: arguments and ``key=``, then ``@task``, then the
``TASKCKPT_*`` variables, then the engine. It is decided once, in the task's own thread; threads that the
task starts see the same context, and child processes find it in their environment.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import threading
import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from taskckpt import engines
from taskckpt._layout import LOCAL_RUN, keyed_prefix, task_prefix
from taskckpt._log import new_nonce
from taskckpt._store import Location, parse
from taskckpt.errors import AmbiguousIdentityError, NoTaskContextError, UsageError

if TYPE_CHECKING:
    from taskckpt.checkpoint import Checkpoint, Target

logger = logging.getLogger("taskckpt")

DEFAULT_BASE = ".taskckpt"

# What a task hands down to its child processes.
BASE, RUN, TASK, ATTEMPT, KEY, KEEP = (f"TASKCKPT_{n}" for n in ("BASE", "RUN", "TASK", "ATTEMPT", "KEY", "KEEP"))
# Claims of this process, as "<digest of the task's place>:<nonce>": a child with the same task joins.
CLAIMS = "TASKCKPT_CLAIMS"
# Set instead of a task where several ran at once, and a child could belong to any of them.
AMBIGUOUS = "TASKCKPT_AMBIGUOUS"
_HANDED_DOWN = (BASE, RUN, TASK, ATTEMPT, KEY, KEEP, CLAIMS, AMBIGUOUS)


@dataclass(frozen=True)
class CheckpointPaths:
    """Flyte's pair of paths. Both are the task's one place: it holds the state of all its attempts."""

    checkpoint_path: str
    prev_checkpoint_path: str


@dataclass(frozen=True, eq=False)
class TaskContext:
    """One attempt of one task.

    Attributes:
        run: The run; ``local`` in a plain script. A task with a ``key`` spans runs.
        task: The task's identity, the same over all its attempts.
        attempt: Counted from 0; None if nobody knows. Information: nothing is decided from it.
        base: Where all tasks lie: a URL, or an absolute local path.
        key: The name that the user gave the task, if any.
        origins: For each value, where it came from.
    """

    run: str
    task: str
    attempt: int | None
    base: str
    key: str | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    keep: int | None = 3
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    timeout_s: float = 300
    parent: TaskContext | None = field(default=None, repr=False)
    _handed_nonce: str | None = field(default=None, repr=False)

    @property
    def place(self) -> Location:
        """Where the task's state lies."""
        prefix = keyed_prefix(self.key) if self.key is not None else task_prefix(self.run, self.task)
        return parse(self.base, what="base").child(prefix)

    @property
    def checkpoint_paths(self) -> CheckpointPaths:
        """The task's place, twice, for code that expects Flyte's two paths."""
        return CheckpointPaths(self.place.uri, self.place.uri)

    @cached_property
    def _nonce(self) -> str:
        return self._handed_nonce or new_nonce()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """This attempt's checkpoint; the same object every time."""
        from taskckpt.checkpoint import Checkpoint

        return Checkpoint._for_context(  # noqa: SLF001 - the two rooms share one door
            self.place,
            keep=self.keep,
            storage_options=dict(self.storage_options),
            timeout_s=self.timeout_s,
            claim_nonce=self._nonce,
            inherited=self._handed_nonce is not None,
            about={"run": self.run, "task": self.task, "attempt": self.attempt},
        )

    def environ(self) -> dict[str, str]:
        """What a child process needs in its environment to be part of this attempt."""
        values = {BASE: self.base, RUN: self.run, CLAIMS: f"{_digest(self.place)}:{self._nonce}"}
        values[KEEP] = "all" if self.keep is None else str(self.keep)
        values |= {TASK: self.task} if self.key is None else {KEY: self.key}
        return values | ({} if self.attempt is None else {ATTEMPT: str(self.attempt)})


_current: ContextVar[TaskContext | None] = ContextVar("taskckpt_task", default=None)


class _Process:
    """What this process runs: its tasks, and what they put into the environment for children."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.running: dict[int, tuple[TaskContext, weakref.WeakSet[threading.Thread]]] = {}
        self.environ_before: dict[str, str] | None = None
        self.implicit_base: str | None = None
        self.contexts: dict[tuple[str, ...], TaskContext] = {}


_process = _Process()


def _after_fork() -> None:
    _process.lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def ctx() -> TaskContext | None:
    """The task that this code runs in, or None outside of any.

    Raises:
        AmbiguousIdentityError: This thread, or the parent of this process, ran several tasks at once.
    """
    return _current.get() or _of_thread() or _of_process()


def checkpoint(key: str | None = None) -> Checkpoint:
    """The checkpoint of the task that this code runs in, or of the task that you call ``key``.

    A key names a task over all runs: the same key gives the same state tomorrow.

    Raises:
        NoTaskContextError: There is no task here, and no key.
    """
    if key is not None:
        return _keyed(key).checkpoint
    current = ctx()
    if current is None:
        raise NoTaskContextError(
            "Which task is this? Nobody said.",
            hint="Name it: taskckpt.checkpoint('my-task'); or put @taskckpt.task on the function; or set "
            "TASKCKPT_TASK (and TASKCKPT_RUN, TASKCKPT_BASE); or use Checkpoint(dest). Threads of a pool that is "
            "older than the task do not see it: hand them the checkpoint.",
        )
    return current.checkpoint


def default_base(base: Target | None = None) -> str:
    """The base: as given, else ``TASKCKPT_BASE``, else the engine's, else ``./.taskckpt`` as of its first use."""
    if base is not None:
        return parse(base, what="base").uri
    given = _own_environ().get(BASE)
    if given:
        return parse(given, what=BASE).uri
    engine = engines.detect()
    if engine is not None and engine.base:
        return parse(engine.base, what="the engine's base").uri
    with _process.lock:
        if _process.implicit_base is None:
            _process.implicit_base = os.path.abspath(DEFAULT_BASE)
            if engine is not None:
                logger.warning(
                    "State of this %s task goes to %s on host %s only: a retry on another host will not find it. "
                    "Set TASKCKPT_BASE to a place that all hosts share.",
                    engine.engine,
                    _process.implicit_base,
                    platform.node(),
                )
        return _process.implicit_base


def default_run(run: str | None = None) -> str:
    """The run: as given, else ``TASKCKPT_RUN``, else the engine's, else ``local``."""
    engine = engines.detect()
    return run or _own_environ().get(RUN) or (engine.run if engine else None) or LOCAL_RUN


def origin_of_run(run: str | None = None) -> str:
    """Where ``default_run`` found it."""
    if run:
        return "argument"
    if _own_environ().get(RUN):
        return RUN
    engine = engines.detect()
    return engine.engine if engine else "made up"


def _keyed(key: str) -> TaskContext:
    if not isinstance(key, str) or not key.strip():
        raise UsageError(f"key={key!r} must be a str that is not blank.")
    base = default_base()
    current = ctx()
    if current is not None and current.key == key and current.base == base:
        return current
    context = TaskContext(default_run(), key, None, base, key=key, origins={"task": "key="})
    return _once(context)


def _of_thread() -> TaskContext | None:
    """The task that started this thread: contexts do not follow into plain threads by themselves."""
    with _process.lock:
        leaves = _leaves()
        thread = threading.current_thread()
        mine = [context for context, older in leaves if thread not in older]
    if len(mine) > 1:
        raise AmbiguousIdentityError(
            f"{len(mine)} tasks run in this process, and this thread could belong to any of them.",
            hint="Hand the thread its checkpoint, or start it with contextvars.copy_context().run.",
        )
    return mine[0] if mine else None


def _leaves() -> list[tuple[TaskContext, weakref.WeakSet[threading.Thread]]]:
    parents = {id(context.parent) for context, _ in _process.running.values()}
    return [(context, older) for context, older in _process.running.values() if id(context) not in parents]


def _own_environ() -> Mapping[str, str]:
    """The environment as this process got it, without what its own tasks put there for children."""
    before = _process.environ_before
    return os.environ if before is None else before


def _of_process() -> TaskContext | None:
    """The task of this whole process: from its environment, or from the engine."""
    environ = _own_environ()
    if environ.get(AMBIGUOUS):
        raise AmbiguousIdentityError(
            f"The parent of this process ran {environ[AMBIGUOUS]} tasks at once; this one could belong to any of them.",
            hint="Start it with env={**os.environ, **taskckpt.ctx().environ()}.",
        )
    key, task = environ.get(KEY), environ.get(TASK)
    engine = None if key or task else engines.detect()
    if not (key or task or engine):
        return None
    origins = {
        "task": KEY if key else TASK if task else engine.engine if engine else "",
        "run": origin_of_run(),
    }
    origins["attempt"] = ATTEMPT if environ.get(ATTEMPT) else engine.engine if engine else "unknown"
    context = TaskContext(
        run=default_run(),
        task=key or task or (engine.task if engine else ""),
        attempt=_attempt_from(environ) if environ.get(ATTEMPT) else engine.attempt if engine else None,
        base=default_base(),
        key=key or None,
        origins=origins,
        keep=_keep_from(environ),
    )
    return _once(context)


def _once(context: TaskContext) -> TaskContext:
    """The same context for the same task all through this process; its children join its claim."""
    with _process.lock:
        identity = (str(context.place), str(context.attempt))
        known = _process.contexts.get(identity)
        if known is None:
            known = replace(context, _handed_nonce=_handed_nonce(context))
            _process.contexts[identity] = known
            _hand_down_claim(known)
        return known


def _digest(place: Location) -> str:
    return hashlib.sha256(place.record_uri.encode()).hexdigest()[:16]


def _handed_nonce(context: TaskContext) -> str | None:
    claims = dict(part.split(":", 1) for part in _own_environ().get(CLAIMS, "").split() if ":" in part)
    return claims.get(_digest(context.place))


def _hand_down_claim(context: TaskContext) -> None:
    claims = [part for part in os.environ.get(CLAIMS, "").split() if not part.startswith(_digest(context.place))]
    os.environ[CLAIMS] = " ".join([*claims, context.environ()[CLAIMS]])


def _attempt_from(environ: Mapping[str, str]) -> int:
    text = environ[ATTEMPT]
    if not text.strip().isdecimal() or len(text) > 9:
        raise UsageError(f"{ATTEMPT}={text!r} must be a whole number from 0 on.")
    return int(text)


def _keep_from(environ: Mapping[str, str]) -> int | None:
    text = environ.get(KEEP, "3")
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{KEEP}={text!r} must be a whole number from 1 on, or 'all'.")
    return int(text)


@contextmanager
def running(context: TaskContext) -> Generator[TaskContext]:
    """Makes ``context`` the current task: for this code, the threads and the processes that it starts."""
    older = weakref.WeakSet(thread for thread in threading.enumerate() if thread is not threading.current_thread())
    with _process.lock:
        _process.running[id(context)] = (context, older)
        _export()
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
        with _process.lock:
            del _process.running[id(context)]
            _export()


def _export() -> None:
    """Puts the one running task into the environment, or takes everything out again."""
    if _process.environ_before is None:
        _process.environ_before = dict(os.environ)
    values = {name: _process.environ_before.get(name) for name in _HANDED_DOWN}
    leaves = _leaves()
    if leaves:
        values |= dict.fromkeys((TASK, KEY, ATTEMPT))
        values |= leaves[0][0].environ() if len(leaves) == 1 else {AMBIGUOUS: str(len(leaves))}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if not leaves:
        _process.environ_before = None
