"""What this process runs: its tasks, and what their threads and child processes are told of them.

Children are told in the environment, in the ``TASKCKPT_*`` variables. Threads are told by what runs here: the
context variable of a task does not follow into plain threads by itself.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from taskckpt._stores import is_unset
from taskckpt.engines import PROCESS
from taskckpt.errors import AmbiguousIdentityError, UsageError

if TYPE_CHECKING:
    from taskckpt._task_context import TaskContext

# What a task hands down to its child processes.
BASE, RUN, TASK, ATTEMPT, KEY, KEEP = (f"TASKCKPT_{n}" for n in ("BASE", "RUN", "TASK", "ATTEMPT", "KEY", "KEEP"))
# Claims of this process, as "<digest of task and attempt>:<nonce>": a child of the same attempt joins.
CLAIMS = "TASKCKPT_CLAIMS"
# An environment has room for so many, and a process rarely more than one.
MOST_CLAIMS = 256
# Which of several processes this is that do the task together, where nothing else tells its children.
RANK = "TASKCKPT_RANK"
# Set instead of a task's name that no environment can hold: where the task lies, below the base.
PLACE = "TASKCKPT_PLACE"
# Longer ones would leave no room for what a child process is started with (128 KiB in all, for one variable).
LONGEST_NAME_BYTES = 8192
# Set instead of a task where several ran at once, and a child could belong to any of them.
AMBIGUOUS = "TASKCKPT_AMBIGUOUS"
_HANDED_DOWN = (BASE, RUN, TASK, ATTEMPT, KEY, KEEP, RANK, PLACE, CLAIMS, AMBIGUOUS)

# Of more tasks at a time no child is told the claims, but by one of them: it would take a while at each beginning.
MOST_TOLD = 16
# More executions of an engine's tasks are not remembered, where nothing tells when one has ended.
MOST_EXECUTIONS = 4096

current: ContextVar[TaskContext | None] = ContextVar("taskckpt_task", default=None)


class Running(NamedTuple):
    """A task that runs here.

    Attributes:
        context: The task.
        older: The threads that it did not start.
        strand: What runs it, one thing at a time. Weakly: what an engine runs may be its own end's only witness.
        alone: No other task can run in this process that is not among those that run here.
        execution: Of which execution of an engine's task it is: one in several scopes is one.
    """

    context: TaskContext
    older: weakref.WeakSet[threading.Thread]
    strand: weakref.ref[Any]
    alone: bool = True
    execution: int = 0


class Process:
    """What this process runs, and what it put into the environment for children."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        self.running: dict[int, Running] = {}
        self.environ_before: dict[str, str] | None = None
        self.implicit_base: str | None = None
        self.contexts: dict[tuple[str, ...], TaskContext] = {}
        self.executions: OrderedDict[tuple[object, ...], TaskContext] = OrderedDict()
        self.ended: deque[tuple[object, ...]] = deque()
        self.claims: dict[str, TaskContext] = {}
        self.own_nonces: OrderedDict[str, None] = OrderedDict()
        self.heard_parent_in = 0
        self.runs_parts = False
        self.runs_tasks = False
        self.warned: set[str] = set()
        self.named: dict[str, tuple[str, str]] = {}
        self.bases: dict[str, str] = {}
        self.unranked: set[str] = set()


process = Process()


@contextmanager
def exclusively() -> Generator[None]:
    """No other thread looks or changes meanwhile; what ended meanwhile is forgotten afterwards."""
    with process.lock:
        process.depth += 1
        try:
            yield
        finally:
            process.depth -= 1
            if process.depth == 0:
                _forget_ended()


def _after_fork() -> None:
    process.lock, process.depth = threading.RLock(), 0


os.register_at_fork(after_in_child=_after_fork)


# --- what runs here ------------------------------------------------------------------------------


@contextmanager
def running(context: TaskContext) -> Generator[TaskContext]:
    """Makes ``context`` the current task: for this code, the threads and the processes that it starts."""
    # This thread too: here the context variable tells, and other coroutines of its event loop are not in the task.
    older = weakref.WeakSet(threading.enumerate())
    with exclusively():
        process.running[id(context)] = Running(context, older, weakref.ref(_strand()))
    try:
        with exclusively():
            _export()
        token = current.set(context)
        try:
            yield context
        finally:
            current.reset(token)
    finally:
        _end(context)


def _end(context: TaskContext) -> None:
    if "checkpoint" in vars(context):  # made when it was first asked for
        context.checkpoint._end()  # noqa: SLF001
    with exclusively():
        process.running.pop(id(context), None)
        # A key that was used in this attempt: the children of the next one must not join it.
        within = context._nonce  # noqa: SLF001
        for known in (process.claims, process.contexts):
            for name in [name for name, one in known.items() if one._within == within]:  # noqa: SLF001
                del known[name]  # type: ignore[arg-type] # each by its own names
        _export()


def of_execution(identity: tuple[object, ...], execution: object, made: TaskContext, *, alone: bool) -> TaskContext:
    """The context of one execution of an engine's task: the same one each time that it is asked for.

    Where the engine lets go of ``execution`` once the task has ended, its threads and children are told meanwhile.
    """
    if not tells_its_end(execution):
        return _remembered((*identity, execution), made)
    return _remembered((*identity, id(execution)), made, execution, alone=alone)


def tells_its_end(execution: object) -> bool:
    """Whether it can be referred to weakly, so that one hears when the engine has let go of it."""
    try:
        weakref.ref(execution)
    except TypeError:
        return False
    return True


def _remembered(
    identity: tuple[object, ...], made: TaskContext, execution: object = None, *, alone: bool = False
) -> TaskContext:
    with exclusively():
        _forget_ended()
        known = process.executions.get(identity)
        if known is not None:
            process.executions.move_to_end(identity)
            return known
        process.executions[identity] = made
        if execution is PROCESS:
            _end_others_of_process(made)
        if execution is not None:
            older = weakref.WeakSet(threading.enumerate())
            strand = weakref.ref(_strand())
            process.running[id(made)] = Running(made, older, strand, alone, id(execution))
            if execution is not PROCESS:
                weakref.finalize(execution, _execution_ended, identity).atexit = False
            _export()
        else:
            _end_oldest()
        return made


def _end_oldest() -> None:
    """Of those whose end nobody tells, so many are remembered."""
    if len(process.executions) <= MOST_EXECUTIONS:
        return
    silent = [identity for identity, one in process.executions.items() if id(one) not in process.running]
    for identity in silent[:-MOST_EXECUTIONS]:
        _end(process.executions.pop(identity))


def _end_others_of_process(made: TaskContext) -> None:
    """A process that runs one task runs another one now, or the next attempt; not the same in another scope."""
    for identity, one in process.executions.items():
        if identity[-1] == id(PROCESS) and one is not made and (one.engine, one.attempt) != (made.engine, made.attempt):
            process.ended.append(identity)
    _forget_ended()


def _execution_ended(identity: tuple[object, ...]) -> None:
    """The engine has let go of the task. Perhaps in the garbage collector, in the middle of anything."""
    process.ended.append(identity)
    if process.lock.acquire(blocking=False):
        try:
            if process.depth == 0:
                _forget_ended()
        finally:
            process.lock.release()


def _forget_ended() -> None:
    while process.ended:
        context = process.executions.pop(process.ended.popleft(), None)
        if context is not None:
            _end(context)


def of_thread() -> TaskContext | None:
    """The task that started this thread: contexts do not follow into plain threads by themselves."""
    thread = threading.current_thread()
    with exclusively():
        _forget_ended()
        candidates = [one for one in process.running.values() if thread not in one.older]
        mine = _innermost(candidates)
    if len(mine) > 1 or not all(one.alone for one in candidates):
        raise AmbiguousIdentityError(
            f"{len(mine)} tasks run in this process, and this thread could belong to any of them."
            if len(mine) > 1
            else "Other tasks may run in this process, and this thread could belong to any of them.",
            hint="Hand the thread its checkpoint, or start it with contextvars.copy_context().run.",
        )
    return mine[0] if mine else None


def _innermost(running: list[Running]) -> list[TaskContext]:
    """Those that can start threads and processes now: not those that wait for a task that they called."""
    strands = {id(one.context): one.strand() for one in running}
    waiting = {
        id(one.context.parent)
        for one in running
        if one.context.parent is not None and (strand := one.strand()) is not None
        if strands.get(id(one.context.parent)) is strand
    }
    innermost = [one for one in running if id(one.context) not in waiting]
    # One execution that was asked for in several scopes is one task: the one that was asked for last.
    latest = {one.execution or id(one.context): one.context for one in innermost}
    return list(latest.values())


def _strand() -> object:
    """What does one thing at a time: the current asyncio task, else the thread."""
    asyncio = sys.modules.get("asyncio")  # not imported here: a plain task does without
    with suppress(RuntimeError):  # no loop runs in this thread
        return (asyncio and asyncio.current_task()) or threading.current_thread()
    return threading.current_thread()


# --- what this process was told ------------------------------------------------------------------


def own_environ() -> Mapping[str, str]:
    """The environment as this process got it, without what its own tasks put there for children."""
    if process.environ_before is not None:
        return process.environ_before
    _hear_parent()
    return os.environ


def given(name: str) -> str | None:
    """A variable that says something. An unreplaced template would be one name for everybody."""
    text = own_environ().get(name)
    if text is not None and is_unset(text) and text.strip().startswith("{{"):
        raise UsageError(f"{name}={text!r} is a template that nobody replaced.")
    return None if is_unset(text) else text


def digest_of(context: TaskContext) -> str:
    """Names one attempt of one task, without telling what it is called."""
    return hashlib.sha256(f"{context.place.record_uri} {context.attempt}".encode()).hexdigest()[:16]


def handed_nonce(context: TaskContext) -> str | None:
    """The claim that a process above this one handed down."""
    return _parsed_claims().get(digest_of(context))


def hand_down_claim(context: TaskContext) -> None:
    """Once this process has the task, its children join it. Whoever only looks hands nothing down: a launcher
    that looked would make one attempt of all those that it starts.
    """
    with exclusively():
        if context._handed_nonce is None:  # noqa: SLF001
            process.own_nonces[context._nonce] = None  # noqa: SLF001
            while len(process.own_nonces) > 4 * MOST_CLAIMS:
                process.own_nonces.popitem(last=False)
        digest = digest_of(context)
        process.claims.pop(digest, None)
        process.claims[digest] = context
        while len(process.claims) > MOST_CLAIMS:
            del process.claims[next(iter(process.claims))]
        os.environ[CLAIMS] = claims()


def _parsed_claims() -> dict[str, str]:
    """What the parents of this process handed down, without what it put there itself."""
    parts = [part.partition(":") for part in own_environ().get(CLAIMS, "").split()]
    return {digest: nonce for digest, _, nonce in parts if nonce not in process.own_nonces}


def claims(*more: TaskContext) -> str:
    """The newest claims of this process and of its parents, for children: they join what they find here."""
    with exclusively():
        # Where several run, children are told by each of them, if at all.
        here = [one.context for one in process.running.values()] if len(process.running) <= MOST_TOLD else []
        held = [*process.claims.items(), *((digest_of(one), one) for one in (*here, *more))]
        own = {digest: one._nonce for digest, one in held}  # noqa: SLF001
        handed = {digest: nonce for digest, nonce in _parsed_claims().items() if digest not in own}
    return " ".join([f"{digest}:{nonce}" for digest, nonce in (handed | own).items()][-MOST_CLAIMS:])


# --- what its children are told ------------------------------------------------------------------


def _export() -> None:
    """Puts the one running task into the environment, or takes everything out again."""
    if process.environ_before is None:
        process.environ_before = dict(os.environ)
    values = {name: process.environ_before.get(name) for name in _HANDED_DOWN}
    candidates = list(process.running.values())
    innermost = _innermost(candidates) if all(one.alone for one in candidates) else []
    if len(innermost) == 1:
        values |= innermost[0].environ()
    elif candidates or process.runs_parts:
        number = str(len(innermost)) if len(innermost) > 1 else "several"
        values |= dict.fromkeys((TASK, KEY, PLACE, ATTEMPT)) | {AMBIGUOUS: number}
    values[CLAIMS] = claims() or None
    _set_environ(values)
    _tell_children(values)
    if not candidates and not process.runs_parts:
        process.environ_before = None


def runs_parts() -> None:
    """This process was told a task, and an engine runs parts of it here: children are of one of these, not of it."""
    with exclusively():
        if not process.runs_parts:
            process.runs_parts = True
            _export()


def can_be_handed_down(name: str) -> bool:
    """Whether an environment can hold the name, and has room for it."""
    try:
        return "\0" not in name and len(os.fsencode(name)) <= LONGEST_NAME_BYTES and not is_unset(name)
    except UnicodeEncodeError:
        return False


def _set_environ(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if not value:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:  # other threads may be copying it
            os.environ[name] = value


# A fork server gives its children the environment of the moment when it was started, perhaps by another
# task. So the values also go the way that multiprocessing hands its own settings (as the authkey) down.
_SETTING = "taskckpt"


def _tell_children(values: Mapping[str, str | None]) -> None:
    multiprocessing = sys.modules.get("multiprocessing.process")
    if multiprocessing is not None:
        vars(multiprocessing.current_process())["_config"][_SETTING] = dict(values)


def _hear_parent() -> None:
    """Once, in a child of a fork server: takes over what the parent told it."""
    if process.heard_parent_in == os.getpid():
        return
    process.heard_parent_in = os.getpid()
    multiprocessing = sys.modules.get("multiprocessing.process")
    parent = multiprocessing.parent_process() if multiprocessing is not None else None
    if multiprocessing is not None and parent is not None and parent.pid != os.getppid():
        _set_environ(vars(multiprocessing.current_process())["_config"].get(_SETTING, {}))
