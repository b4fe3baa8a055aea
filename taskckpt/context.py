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
import sys
import threading
import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from taskckpt import engines
from taskckpt._keep import KeepPolicy, LatestN, parse_policy
from taskckpt._layout import LOCAL_RUN, keyed_prefix, task_prefix
from taskckpt._log.slots import new_nonce
from taskckpt._stores import Location, is_unset, parse
from taskckpt.errors import AmbiguousIdentityError, NoTaskContextError, UsageError, UsageTypeError

if TYPE_CHECKING:
    from typing import Unpack

    from taskckpt._arguments import Target
    from taskckpt._checkpoint import Checkpoint
    from taskckpt._selection import CheckpointInfo
    from taskckpt._when import SavePolicy

logger = logging.getLogger("taskckpt")

DEFAULT_BASE = ".taskckpt"
# The origin of a value that nobody gave.
MADE_UP = "made up"

# What a task hands down to its child processes.
BASE, RUN, TASK, ATTEMPT, KEY, KEEP = (f"TASKCKPT_{n}" for n in ("BASE", "RUN", "TASK", "ATTEMPT", "KEY", "KEEP"))
# Claims of this process, as "<digest of task and attempt>:<nonce>": a child of the same attempt joins.
CLAIMS = "TASKCKPT_CLAIMS"
# An environment has room for so many, and a process rarely more than one.
MOST_CLAIMS = 256
# Set instead of a task where several ran at once, and a child could belong to any of them.
AMBIGUOUS = "TASKCKPT_AMBIGUOUS"
_HANDED_DOWN = (BASE, RUN, TASK, ATTEMPT, KEY, KEEP, CLAIMS, AMBIGUOUS)


class Options(TypedDict, total=False):
    """What ``checkpoint`` takes beside a key; see ``Checkpoint``."""

    keep: int | KeepPolicy | None
    save_policy: SavePolicy | int | str | None
    fork_from: Target | CheckpointInfo | None
    storage_options: Mapping[str, Any]
    timeout_s: float


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
    keep: int | KeepPolicy | None = 3
    save_policy: SavePolicy | int | str | None = None
    fork_from: Target | CheckpointInfo | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    timeout_s: float = 300
    parent: TaskContext | None = field(default=None, repr=False)
    _handed_nonce: str | None = field(default=None, repr=False)
    _of_process: bool = field(default=False, repr=False)
    _within: str = field(default="", repr=False)
    _made_in: int = field(default_factory=os.getpid, repr=False)

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
        from taskckpt._checkpoint import Checkpoint

        return Checkpoint._for_context(  # noqa: SLF001 - the two rooms share one door
            self.place,
            keep=self.keep,
            save_policy=self.save_policy,
            fork_from=self.fork_from,
            storage_options=dict(self.storage_options),
            timeout_s=self.timeout_s,
            claim_nonce=self._nonce,
            inherited=self._handed_nonce is not None or self._made_in != os.getpid(),
            about={"run": self.run, "task": self.task, "attempt": self.attempt},
            on_hold=partial(_hand_down_claim, self) if self._of_process else None,
        )

    def environ(self) -> dict[str, str]:
        """What a child process needs in its environment to be part of this attempt.

        All of it, so that ``{**os.environ, **ctx().environ()}`` says one thing: what does not apply is blank.
        """
        return {
            BASE: self.base,
            RUN: self.run,
            TASK: self.task if self.key is None else "",
            KEY: self.key or "",
            ATTEMPT: "" if self.attempt is None else str(self.attempt),
            KEEP: "all" if self.keep is None else str(self.keep),
            CLAIMS: _claims(self),
            AMBIGUOUS: "",
        }


_current: ContextVar[TaskContext | None] = ContextVar("taskckpt_task", default=None)


class _Running(NamedTuple):
    """A task that runs here. ``older`` are the threads that it did not start, ``strand`` is what runs it."""

    context: TaskContext
    older: weakref.WeakSet[threading.Thread]
    strand: object


class _Process:
    """What this process runs: its tasks, and what they put into the environment for children."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.running: dict[int, _Running] = {}
        self.environ_before: dict[str, str] | None = None
        self.implicit_base: str | None = None
        self.contexts: dict[tuple[str, ...], TaskContext] = {}
        self.claims: dict[str, TaskContext] = {}
        self.own_nonces: set[str] = set()
        self.heard_parent_in = 0


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


def around() -> TaskContext | None:
    """The task that a call of another task is part of.

    Only what the calling code itself says, or this process's environment: who else happens to run in other
    threads right now would make the identity of a task depend on timing.
    """
    return _current.get() or _of_process()


def checkpoint(key: str | None = None, **options: Unpack[Options]) -> Checkpoint:
    """The checkpoint of the task that this code runs in, or of the task that you call ``key``.

    A key names a task over all runs: the same key gives the same state tomorrow.

    Args:
        key: The task's name.
        options: ``keep``, ``save_policy``, ``fork_from``, ``storage_options`` and ``timeout_s``, as for
            ``Checkpoint``; with a key only. The first call in a process decides.

    Raises:
        NoTaskContextError: There is no task here, and no key.
        UsageError: Options that are unknown, without a key, or other ones than those of the first call.
    """
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        known = ", ".join(Options.__annotations__)
        raise UsageTypeError(f"checkpoint() has no option {', '.join(unknown)}.", hint=f"There are: {known}.")
    if key is not None:
        return _keyed(key, options).checkpoint
    if options:
        raise UsageError(
            f"{', '.join(options)}: options belong to a task with a key, or to @task.",
            hint='checkpoint("my-task", keep=5); @task(keep=5).',
        )
    current = ctx()
    if current is None:
        raise NoTaskContextError(
            "Which task is this? Nobody said.",
            hint="Name it: taskckpt.checkpoint('my-task'); or put @taskckpt.task on the function; or set "
            "TASKCKPT_TASK (and TASKCKPT_RUN, TASKCKPT_BASE); or use Checkpoint(dest). Threads of a pool that is "
            "older than the task do not see it: hand them the checkpoint.",
        )
    return current.checkpoint


def base_and_origin(base: Target | None = None) -> tuple[str, str]:
    """The base: as given, else ``TASKCKPT_BASE``, else the engine's, else ``./.taskckpt`` as of its first use.

    And where it came from.
    """
    if base is not None:
        return parse(base, what="base").uri, "argument"
    given = _given(BASE)
    if given:
        return parse(given, what=BASE).uri, BASE
    engine = engines.detect()
    if engine is not None and engine.base:
        return parse(engine.base, what="the engine's base").uri, engine.engine
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
        return _process.implicit_base, MADE_UP


def run_and_origin(run: str | None = None) -> tuple[str, str]:
    """The run: as given, else ``TASKCKPT_RUN``, else the engine's, else ``local``. And where it came from."""
    if run:
        return run, "argument"
    given = _given(RUN)
    if given:
        return given, RUN
    engine = engines.detect()
    return (engine.run or LOCAL_RUN, engine.engine) if engine else (LOCAL_RUN, MADE_UP)


def _keyed(key: str, options: Options | None = None) -> TaskContext:
    options = options or {}
    if not isinstance(key, str) or not key.strip():
        raise UsageError(f"key={key!r} must be a str that is not blank.")
    if "://" in key:
        raise UsageError(
            f"key={key!r} is a URL, and a key is a name.",
            hint="Use Checkpoint(url); or set TASKCKPT_BASE to the URL and name the task.",
        )
    current = ctx()
    if current is None:
        made = _made(task=key, key=key, attempt=None, origins={"task": "key=", "attempt": "unknown"})
        return _once(replace(made, **options), options)
    if current.key == key:
        return _expect_same(current, options)
    # Inside a task, where its children would look too: its environment tells them the same base.
    origins = {**current.origins, "task": "key=", "attempt": "unknown"}
    keyed = replace(current, task=key, attempt=None, key=key, origins=origins, parent=None, _handed_nonce=None)
    # Used outside of any task before, it is this process's attempt; else each attempt of the task makes one.
    outside = _process.contexts.get(_which(keyed))
    if outside is not None:
        return _expect_same(outside, options)
    return _once(replace(keyed, **options, _within=current._nonce), options)  # noqa: SLF001


def _expect_same(known: TaskContext, options: Options) -> TaskContext:
    """A context that exists has its options already."""
    others = [name for name, value in options.items() if getattr(known, name) != value]
    if others:
        raise UsageError(
            f"This task's checkpoint exists already, with another {' and '.join(others)}.",
            hint="Give the options in the first call of checkpoint(), or in @task.",
        )
    return known


def _made(
    *, task: str, key: str | None, attempt: int | None, origins: dict[str, str], keep: int | KeepPolicy | None = 3
) -> TaskContext:
    """A context outside of any ``@task``: run and base are those of the process."""
    (run, run_origin), (base, base_origin) = run_and_origin(), base_and_origin()
    origins = {"run": run_origin, "base": base_origin, **origins}
    return TaskContext(run, task, attempt, base, key=key, origins=origins, keep=keep)


def _of_thread() -> TaskContext | None:
    """The task that started this thread: contexts do not follow into plain threads by themselves."""
    thread = threading.current_thread()
    with _process.lock:
        mine = _innermost([running for running in _process.running.values() if thread not in running.older])
    if len(mine) > 1:
        raise AmbiguousIdentityError(
            f"{len(mine)} tasks run in this process, and this thread could belong to any of them.",
            hint="Hand the thread its checkpoint, or start it with contextvars.copy_context().run.",
        )
    return mine[0] if mine else None


def _innermost(running: list[_Running]) -> list[TaskContext]:
    """Those that can start threads and processes now: not those that wait for a task that they called."""
    strands = {id(one.context): one.strand for one in running}
    waiting = {id(one.context.parent) for one in running if strands.get(id(one.context.parent)) is one.strand}
    return [one.context for one in running if id(one.context) not in waiting]


def _strand() -> object:
    """What does one thing at a time: the current asyncio task, else the thread."""
    asyncio = sys.modules.get("asyncio")  # not imported here: a plain task does without
    with suppress(RuntimeError):  # no loop runs in this thread
        return (asyncio and asyncio.current_task()) or threading.current_thread()
    return threading.current_thread()


def _own_environ() -> Mapping[str, str]:
    """The environment as this process got it, without what its own tasks put there for children."""
    if _process.environ_before is not None:
        return _process.environ_before
    _hear_parent()
    return os.environ


def _given(name: str) -> str | None:
    """A variable that says something. An unreplaced template would be one name for everybody."""
    text = _own_environ().get(name)
    if text is not None and is_unset(text) and text.strip().startswith("{{"):
        raise UsageError(f"{name}={text!r} is a template that nobody replaced.")
    return None if is_unset(text) else text


def _of_process() -> TaskContext | None:
    """The task of this whole process: from its environment, or from the engine."""
    environ = _own_environ()
    if environ.get(AMBIGUOUS):
        raise AmbiguousIdentityError(
            f"The parent of this process ran {environ[AMBIGUOUS]} tasks at once; this one could belong to any of them.",
            hint="Start it with env={**os.environ, **taskckpt.ctx().environ()}.",
        )
    key, task = _given(KEY), _given(TASK)
    engine = None if key or task else engines.detect()
    if not (key or task or engine):
        return None
    by_engine = engine.engine if engine else "unknown"
    return _once(
        _made(
            task=key or task or (engine.task if engine else ""),
            key=key,
            attempt=_attempt_from(environ) if environ.get(ATTEMPT) else engine.attempt if engine else None,
            origins={
                "task": KEY if key else TASK if task else by_engine,
                "attempt": ATTEMPT if environ.get(ATTEMPT) else by_engine,
            },
            keep=_keep_from(environ),
        )
    )


def _once(context: TaskContext, options: Options | None = None) -> TaskContext:
    """The same context for the same task all through this process; its children join its claim."""
    with _process.lock:
        identity = _which(context)
        known = _process.contexts.get(identity)
        if known is None:
            known = replace(context, _handed_nonce=_handed_nonce(context), _of_process=True)
            _process.contexts[identity] = known
        return _expect_same(known, options or {})


def _which(context: TaskContext) -> tuple[str, ...]:
    return str(context.place), str(context.attempt), context._within  # noqa: SLF001


def _digest(context: TaskContext) -> str:
    """Names one attempt of one task, without telling what it is called."""
    return hashlib.sha256(f"{context.place.record_uri} {context.attempt}".encode()).hexdigest()[:16]


def _handed_nonce(context: TaskContext) -> str | None:
    return _parsed_claims().get(_digest(context))


def _hand_down_claim(context: TaskContext) -> None:
    """Once this process has the task, its children join it. Whoever only looks hands nothing down: a launcher
    that looked would make one attempt of all those that it starts.
    """
    with _process.lock:
        if context._handed_nonce is None:  # noqa: SLF001
            _process.own_nonces.add(context._nonce)  # noqa: SLF001
        _process.claims.pop(_digest(context), None)
        _process.claims[_digest(context)] = context
        while len(_process.claims) > MOST_CLAIMS:
            del _process.claims[next(iter(_process.claims))]
        os.environ[CLAIMS] = _claims()


def _parsed_claims() -> dict[str, str]:
    """What the parents of this process handed down, without what it put there itself."""
    parts = [part.partition(":") for part in _own_environ().get(CLAIMS, "").split()]
    return {digest: nonce for digest, _, nonce in parts if nonce not in _process.own_nonces}


def _claims(*more: TaskContext) -> str:
    """The newest claims of this process and of its parents, for children: they join what they find here."""
    with _process.lock:
        running = [one.context for one in _process.running.values()]
        held = [*_process.claims.items(), *((_digest(one), one) for one in (*running, *more))]
        own = {digest: one._nonce for digest, one in held}  # noqa: SLF001
        handed = {digest: nonce for digest, nonce in _parsed_claims().items() if digest not in own}
    return " ".join([f"{digest}:{nonce}" for digest, nonce in (handed | own).items()][-MOST_CLAIMS:])


def _attempt_from(environ: Mapping[str, str]) -> int:
    text = environ[ATTEMPT]
    if not text.strip().isdecimal() or len(text) > 9:
        raise UsageError(f"{ATTEMPT}={text!r} must be a whole number from 0 on.")
    return int(text)


def _keep_from(environ: Mapping[str, str]) -> int | KeepPolicy | None:
    text = environ.get(KEEP, "3")
    try:
        policy = parse_policy(text)
        return policy.n if isinstance(policy, LatestN) else policy
    except UsageError as error:
        raise UsageError(f"{KEEP}={text!r}: {error.message}", hint=error.hint) from error


@contextmanager
def running(context: TaskContext) -> Generator[TaskContext]:
    """Makes ``context`` the current task: for this code, the threads and the processes that it starts."""
    # This thread too: here the context variable tells, and other coroutines of its event loop are not in the task.
    older = weakref.WeakSet(threading.enumerate())
    with _process.lock:
        _process.running[id(context)] = _Running(context, older, _strand())
        _export()
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
        if "checkpoint" in vars(context):  # made when it was first asked for
            context.checkpoint._end()  # noqa: SLF001
        with _process.lock:
            del _process.running[id(context)]
            # A key that was used in this attempt: the children of the next one must not join it.
            within = context._nonce  # noqa: SLF001
            _process.claims = {d: one for d, one in _process.claims.items() if one._within != within}  # noqa: SLF001
            _export()


def _export() -> None:
    """Puts the one running task into the environment, or takes everything out again."""
    if _process.environ_before is None:
        _process.environ_before = dict(os.environ)
    values = {name: _process.environ_before.get(name) for name in _HANDED_DOWN}
    innermost = _innermost(list(_process.running.values()))
    if innermost:
        unclear = dict.fromkeys((TASK, KEY, ATTEMPT)) | {AMBIGUOUS: str(len(innermost))}
        values |= innermost[0].environ() if len(innermost) == 1 else unclear
    values[CLAIMS] = _claims() or None
    _set_environ(values)
    _tell_children(values)
    if not innermost:
        _process.environ_before = None


def _set_environ(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)


# A fork server gives its children the environment of the moment when it was started, perhaps by another
# task. So the values also go the way that multiprocessing hands its own settings (as the authkey) down.
_SETTING = "taskckpt"


def _tell_children(values: Mapping[str, str | None]) -> None:
    multiprocessing = sys.modules.get("multiprocessing.process")
    if multiprocessing is not None:
        vars(multiprocessing.current_process())["_config"][_SETTING] = dict(values)


def _hear_parent() -> None:
    """Once, in a child of a fork server: takes over what the parent told it."""
    if _process.heard_parent_in == os.getpid():
        return
    _process.heard_parent_in = os.getpid()
    multiprocessing = sys.modules.get("multiprocessing.process")
    parent = multiprocessing.parent_process() if multiprocessing is not None else None
    if multiprocessing is not None and parent is not None and parent.pid != os.getppid():
        _set_environ(vars(multiprocessing.current_process())["_config"].get(_SETTING, {}))
