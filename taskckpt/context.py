"""Who am I: which run, which task, which attempt, and where its state lies.

Each value comes from the first that tells it: arguments and ``key=``, then ``@task``, then the
``TASKCKPT_*`` variables, then the engine. It is decided once, in the task's own thread; threads that the
task starts see the same context, and child processes find it in their environment.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, get_args

from taskckpt import _process, engines
from taskckpt._keep import KeepPolicy, LatestN, parse_policy
from taskckpt._layout import LOCAL_RUN
from taskckpt._process import AMBIGUOUS, ATTEMPT, BASE, CLAIMS, KEEP, KEY, PLACE, RANK, RUN, TASK, given, own_environ
from taskckpt._stores import is_unset, parse
from taskckpt._task_context import MADE_UP, TaskContext
from taskckpt.engines import PROCESS, EngineTask, Here, environment
from taskckpt.errors import (
    AmbiguousIdentityError,
    NoTaskContextError,
    UsageError,
    UsageTypeError,
)

if TYPE_CHECKING:
    from typing import Unpack

    from taskckpt._arguments import Target
    from taskckpt._checkpoint import Checkpoint
    from taskckpt._selection import CheckpointInfo
    from taskckpt._when import SavePolicy

logger = logging.getLogger("taskckpt")

DEFAULT_BASE = ".taskckpt"

# Which of an engine's identities counts, where nobody says it in the code.
SCOPE, ON_CLEAR = "TASKCKPT_SCOPE", "TASKCKPT_ON_CLEAR"

Scope: TypeAlias = Literal["run", "lineage"]
OnClear: TypeAlias = Literal["keep", "fresh"]


class Settings(TypedDict, total=False):
    """What the checkpoint of a task with a key can be told; see ``Checkpoint``."""

    keep: int | KeepPolicy | None
    save_policy: SavePolicy | int | str | None
    fork_from: Target | CheckpointInfo | None
    storage_options: Mapping[str, Any]
    timeout_s: float


class Options(Settings, total=False):
    """What ``checkpoint`` takes beside a key."""

    per_rank: bool


def ctx(*, scope: Scope | None = None, on_clear: OnClear | None = None) -> TaskContext | None:
    """The task that this code runs in, or None outside of any.

    Args:
        scope: ``"run"``: the task of this run of the engine; ``"lineage"``: that of the run which this one
            executes again, or of its origin. Default: ``TASKCKPT_SCOPE``, else ``"run"``.
        on_clear: What it means that an operator cleared the task: ``"keep"``: it goes on; ``"fresh"``: it starts
            over. Default: ``TASKCKPT_ON_CLEAR``, else ``"keep"``.

    Raises:
        AmbiguousIdentityError: This thread, or the parent of this process, ran several tasks at once; or the
            engine cannot tell two tasks apart. The hint says what to pass.
        UsageError: A variable or the engine gives what cannot be.
    """
    return _unambiguous(_here(_Choice.of(scope, on_clear)))


def around(*, has_key: bool, scope: Scope | None = None, on_clear: OnClear | None = None) -> TaskContext | None:
    """The task that a call of another task is part of, which ``has_key`` of its own or not.

    Only what the calling code itself says, or this process's environment: who else happens to run in other
    threads right now would make the identity of a task depend on timing.
    """
    found = _here(_Choice.of(scope, on_clear), of_threads=False)
    if has_key and found is not None and found._is_ambiguous:  # noqa: SLF001 - its own key tells it apart
        return None
    return _unambiguous(found)


def _unambiguous(found: TaskContext | None) -> TaskContext | None:
    if found is not None and found._is_ambiguous:  # noqa: SLF001
        assert found.engine is not None
        raise AmbiguousIdentityError(f"{found.engine.engine}: {found.engine.ambiguous}", hint=found.engine.hint)
    return found


@dataclass(frozen=True)
class _Choice:
    """Which of an engine's identities the user wants."""

    scope: Scope = "run"
    on_clear: OnClear = "keep"

    @classmethod
    def of(cls, scope: str | None, on_clear: str | None) -> _Choice:
        return cls(_one_of(scope, SCOPE, Scope), _one_of(on_clear, ON_CLEAR, OnClear))


def _one_of(value: str | None, variable: str, words: Any) -> Any:
    known = get_args(words)
    said = value if value is not None else given(variable) or known[0]
    if said not in known:
        what = variable if value is None else variable.removeprefix("TASKCKPT_").lower()
        raise UsageError(f"{what}={said!r} is unknown.", hint=f"There are: {', '.join(known)}.")
    return said


def _here(choice: _Choice, *, of_threads: bool = True) -> TaskContext | None:
    """The innermost of what the code, the engine, this thread and this process say."""
    seen = engines.look()
    return _ranked(_innermost(seen.task, choice, of_threads=of_threads), seen)


def _ranked(found: TaskContext | None, seen: Here) -> TaskContext | None:
    """A process learns its rank late perhaps: its parent was told who it is before there were any."""
    if found is None or seen.rank is None or found.rank is not None:
        return found
    nonce = found._nonce  # noqa: SLF001
    return _once(replace(found, rank=seen.rank, world_size=seen.world_size, _handed_nonce=nonce, _within=nonce))


def _innermost(said: EngineTask | None, choice: _Choice, *, of_threads: bool) -> TaskContext | None:
    current = _process.current.get()
    if said is not None and not said.in_environment and not (current is not None and _is_around(current, said)):
        return _of_engine(said, current, choice)
    return current or (_process.of_thread() if of_threads else None) or _of_process(said, choice, of_threads=of_threads)


def _is_around(current: TaskContext, said: EngineTask) -> bool:
    """Whether the engine ran this when the task began: else the engine's task is the inner one."""
    known = current.engine
    return known is not None and (known.engine, known.run, known.task) == (said.engine, said.run, said.task)


def _outside(current: TaskContext | None, said: EngineTask) -> TaskContext | None:
    """The task around that is not of the same engine, which tells its own apart.

    A task that makes room for the next (Dask's ``secede``) starts it in a copy of its own context, once: a retry
    begins elsewhere, and must not be called otherwise.
    """
    while current is not None and current.engine is not None and current.engine.engine == said.engine:
        current = current.parent
    return current


def _of_engine(said: EngineTask, current: TaskContext | None, choice: _Choice) -> TaskContext:
    """The task that an engine runs in this thread, inside of another one perhaps."""
    made, outer = _made_of(said, choice), _outside(current, said) or _of_environment(said)
    if said.execution is not PROCESS:
        _process.process.runs_tasks = True
        if not _process.tells_its_end(said.execution) and engines.has_system():
            _process.runs_parts()  # a child, too, would take itself for the job around
    if outer is not None and outer._is_override:  # noqa: SLF001
        _expect_one_task(outer, said)
        made, outer = replace(outer, _stands_for=said.task), None
    if outer is not None:
        if (outer.run, outer.task, outer.key) == (made.run, made.task, None):
            return outer  # a process above this one was the same task, and said so
        origins = {**made.origins, **{name: outer.origins.get(name, MADE_UP) for name in ("run", "base")}}
        if current is None:
            _process.runs_parts()
        # The engine's own run, too: its tasks may be called alike in each.
        task = f"{engines.name_of(_run_of(said, choice), said.task).replace('<', '%3C')}{inside(outer)}"
        made = replace(made, run=outer.run, task=task, base=outer.base, origins=origins, parent=outer)
    if said.execution is None:
        return _once(made)
    identity = (_which(made), None if outer is None else outer._nonce)  # noqa: SLF001
    made = replace(made, _handed_nonce=_process.handed_nonce(made))
    return _process.of_execution(identity, said.execution, made, alone=said.alone or said.execution is PROCESS)


def _expect_one_task(named: TaskContext, said: EngineTask) -> None:
    """A name in the environment is for one task, and a worker of an engine runs many."""
    known = _process.process.named.setdefault(str(named.place), (said.run, said.task))
    if known != (said.run, said.task):
        variable = named.origins["task"]
        raise AmbiguousIdentityError(
            f"{variable} names one task, and {said.engine} runs several in this process: {known[1]}, {said.task}.",
            hint=f"Unset {variable}: the engine tells them apart; or name each in the code: taskckpt.checkpoint(key).",
        )


def _made_of(said: EngineTask, choice: _Choice) -> TaskContext:
    # What is put into a name stands in angle brackets, which no engine's own part of it may have.
    task = said.task.replace("<", "%3C")
    if choice.on_clear == "fresh" and said.generation is not None:
        task = f"{task} <cleared {said.generation}>"
    origins = {"task": said.engine, "attempt": said.engine}
    made = _made(said, task=task, key=None, attempt=said.attempt, origins=origins)
    run = _run_of(said, choice) if made.origins["run"] == said.engine else made.run
    is_settled = choice.scope == "lineage" and said.lineage_settles and said.origin_run is not None
    return replace(made, run=run, _is_ambiguous=said.ambiguous is not None and not is_settled)


def _run_of(said: EngineTask, choice: _Choice) -> str:
    return said.origin_run or said.run if choice.scope == "lineage" else said.run


def inside(outer: TaskContext) -> str:
    """What tells a task in one task from the same one in another."""
    return f" <in key> {outer.key}" if outer.key is not None else f" <in> {outer.task}"


def checkpoint(key: str | None = None, **options: Unpack[Options]) -> Checkpoint:
    """The checkpoint of the task that this code runs in, or of the task that you call ``key``.

    A key names a task over all runs: the same key gives the same state tomorrow.

    Args:
        key: The task's name.
        options: ``keep``, ``save_policy``, ``fork_from``, ``storage_options`` and ``timeout_s``, as for
            ``Checkpoint``; with a key only. The first call in a process decides. ``per_rank=True`` gives each of the
            processes that do a task together (``torchrun``, ``srun``) a checkpoint of its own.

    Raises:
        NoTaskContextError: There is no task here, and no key.
        UsageError: Options that are unknown, without a key, or other ones than those of the first call.
    """
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        known = ", ".join(Options.__annotations__)
        raise UsageTypeError(f"checkpoint() has no option {', '.join(unknown)}.", hint=f"There are: {known}.")
    if key is not None:
        per_rank = options.pop("per_rank", False)
        return _keyed(key, options, per_rank=per_rank).checkpoint
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
    return _base(base, None if base is not None else engines.detect())


def _base(base: Target | None, said: EngineTask | None) -> tuple[str, str]:
    if base is not None:
        return parse(base, what="base").uri, "argument"
    told = given(BASE)
    if told:
        # A relative one is made absolute once: the code may go elsewhere.
        return _process.process.bases.setdefault(told, parse(told, what=BASE).uri), BASE
    if said is not None and said.base:
        return parse(said.base, what="the engine's base").uri, said.engine
    with _process.exclusively():
        if _process.process.implicit_base is None:
            _process.process.implicit_base = os.path.abspath(DEFAULT_BASE)
        if said is not None and said.engine not in _process.process.warned:
            _process.process.warned.add(said.engine)
            logger.warning(
                "State of this %s task goes to %s on host %s only: a retry on another host will not find it. "
                "Set TASKCKPT_BASE to a place that all hosts share.",
                said.engine,
                _process.process.implicit_base,
                platform.node(),
            )
        return _process.process.implicit_base, MADE_UP


def run_and_origin(run: str | None = None) -> tuple[str, str]:
    """The run: as given, else ``TASKCKPT_RUN``, else the engine's, else ``local``. And where it came from."""
    return _run(run, None if run else engines.detect())


def _run(run: str | None, said: EngineTask | None) -> tuple[str, str]:
    if run:
        return run, "argument"
    told = given(RUN)
    if told:
        return told, RUN
    return (said.run, said.engine) if said is not None else (LOCAL_RUN, MADE_UP)


def _keyed(key: str, settings: Settings | None = None, *, per_rank: bool = False) -> TaskContext:
    settings = settings or {}
    expect_key(key)
    if "://" in key:
        raise UsageError(
            f"key={key!r} is a URL, and a key is a name.",
            hint="Use Checkpoint(url); or set TASKCKPT_BASE to the URL and name the task.",
        )
    seen = engines.look()
    current = _here(_Choice.of(None, None))  # ambiguous perhaps, which the key mends
    if current is None:
        made = _made(seen.task, task=key, key=key, attempt=None, origins={"task": "key=", "attempt": "unknown"})
        made = replace(made, rank=seen.rank, world_size=seen.world_size)
        return _once(_of_rank(replace(made, **settings), per_rank=per_rank), settings)
    if current.key == key:
        return _expect_same(current, settings)
    expect_lasting(key, current.origins.get("base"), current.engine)
    # Inside a task, where its children would look too: its environment tells them the same base.
    origins = {**current.origins, "task": "key=", "attempt": "unknown"}
    named = replace(current, task=key, attempt=None, key=key, origins=origins, parent=None, _handed_nonce=None)
    # The key has a place of its own, and whoever uses it means the same task.
    keyed = _of_rank(replace(named, _prefix=None, _stands_for=None, _is_ambiguous=False), per_rank=per_rank)
    # Used outside of any task before, it is this process's attempt; else each attempt of the task makes one.
    outside = _process.process.contexts.get(_which(keyed))
    if outside is not None:
        return _expect_same(outside, settings)
    return _once(replace(keyed, **settings, _within=current._nonce), settings)  # noqa: SLF001


def expect_key(key: object) -> None:
    """A key is a name that a child process, too, takes for one."""
    if not isinstance(key, str) or not key.strip():
        raise UsageError(f"key={key!r} must be a str that is not blank.")
    if is_unset(key):
        raise UsageError(f"key={key!r} reads like a variable that nobody has set.")


def _of_rank(keyed: TaskContext, *, per_rank: bool) -> TaskContext:
    """One task for each rank, if that was asked for: then each saves its own. A process that is alone is rank 0."""
    if not per_rank:
        return keyed
    shards, is_one_of_several = _process.process.unranked, own_environ().get("WORLD_SIZE", "1") != "1"
    if keyed.rank is None:
        shards.add(str(keyed.key))
    too_early = keyed.rank is None and (is_one_of_several or own_environ().get(CLAIMS))
    if too_early or (keyed.rank and keyed.key in shards):
        raise AmbiguousIdentityError(
            f"The checkpoint {keyed.key!r} of each rank's own was asked for before anybody said which rank this is.",
            hint="Ask for it after init_process_group, or start the processes by torchrun, srun or mpirun.",
        )
    key = f"{keyed.key} <rank {keyed.rank or 0}>"
    return replace(keyed, task=key, key=key, rank=None)


def expect_lasting(key: str | None, base_origin: str | None, said: EngineTask | None) -> None:
    """A key names a task over all runs, and must not lie where only one run looks."""
    if key is not None and said is not None and said.base_is_of_run and base_origin == said.engine:
        raise UsageError(
            f"key={key!r} spans runs, and the base that {said.engine} offers is this run's only: {said.base}.",
            hint=f"Set {BASE} to a place that lasts.",
        )


def _expect_same(known: TaskContext, settings: Settings) -> TaskContext:
    """A context that exists has its settings already."""
    others = [name for name, value in settings.items() if getattr(known, name) != value]
    if others:
        raise UsageError(
            f"This task's checkpoint exists already, with another {' and '.join(others)}.",
            hint="Give the options in the first call of checkpoint(), or in @task.",
        )
    return known


def _made(
    said: EngineTask | None,
    *,
    task: str,
    key: str | None,
    attempt: int | None,
    origins: dict[str, str],
    keep: int | KeepPolicy | None = 3,
) -> TaskContext:
    """A context outside of any ``@task``: run and base are those of the process."""
    (run, run_origin), (base, base_origin) = _run(None, said), _base(None, said)
    expect_lasting(key, base_origin, said)
    return TaskContext(
        run,
        task,
        attempt,
        base,
        key=key,
        origins={"run": run_origin, "base": base_origin, **origins},
        keep=keep,
        rank=said.rank if said is not None else None,
        world_size=said.world_size if said is not None else None,
        # Who holds on to what the engine has of this execution would make it last.
        engine=replace(said, execution=None) if said is not None else None,
    )


def _of_process(said: EngineTask | None, choice: _Choice, *, of_threads: bool) -> TaskContext | None:
    """The task of this whole process: from its environment, or from a system that runs it."""
    if _process.process.runs_parts:
        raise AmbiguousIdentityError(
            "An engine runs parts of a task in this process, and this thread could belong to any of them.",
            hint="Hand the thread its checkpoint.",
        )
    found = _of_environment(said)
    if of_threads and (found or said) and threading.current_thread() is not threading.main_thread():
        _expect_no_tasks(found)
    if found is not None or said is None:
        return found
    made = replace(_made_of(said, choice), _stands_for=environment.whole_program())
    environ = own_environ()
    if environ.get(ATTEMPT):
        made = replace(made, attempt=_number_from(environ, ATTEMPT), origins={**made.origins, "attempt": ATTEMPT})
    return _once(replace(made, keep=_keep_from(environ)))


def _expect_no_tasks(found: TaskContext | None) -> None:
    """A thread that nobody knows, in a process that runs tasks, is part of one of these rather than of what is around.

    What a person named stays the name of the threads that are older than a task of ours.
    """
    running = _process.process
    if running.runs_tasks or (running.running and found is None):
        raise AmbiguousIdentityError(
            "Tasks run in this process, and this thread could belong to any of them.",
            hint="Hand the thread its checkpoint, or start it with contextvars.copy_context().run.",
        )


def _of_environment(said: EngineTask | None) -> TaskContext | None:
    """The task that this process is called in its environment."""
    environ = own_environ()
    if environ.get(AMBIGUOUS):
        raise AmbiguousIdentityError(
            f"The parent of this process ran {environ[AMBIGUOUS]} tasks at once; this one could belong to any of them.",
            hint="Start it with env={**os.environ, **taskckpt.ctx().environ()}.",
        )
    key, task = given(KEY), given(TASK)
    if key and task:
        raise UsageError(
            f"{KEY}={key!r} and {TASK}={task!r} contradict each other: a task has a key or a name.",
            hint="Unset one of them.",
        )
    place = None if key or task else given(PLACE)
    if not (key or task or place):
        return None
    told_rank = _number_from(environ, RANK) if environ.get(RANK) else None
    attempt_origin = ATTEMPT if environ.get(ATTEMPT) else said.engine if said is not None else "unknown"
    made = _made(
        said,
        task=key or task or str(place).rpartition("/")[2],
        key=key,
        attempt=_number_from(environ, ATTEMPT) if environ.get(ATTEMPT) else said.attempt if said is not None else None,
        origins={"task": KEY if key else TASK if task else PLACE, "attempt": attempt_origin},
        keep=_keep_from(environ),
    )
    made = replace(made, rank=told_rank if made.rank is None else made.rank, _prefix=place)
    index = environment.index(own_environ())
    if place is None and _process.handed_nonce(made) is None:  # a person named it, and not a task for its children
        if said is not None and said.in_environment:  # all items of an array were given this name
            made = replace(made, _stands_for=said.task.partition("/")[2] or None)
        if index is not None:
            name = f"{made.task} <item {index}>"
            made = replace(made, task=name, key=name if key else None)
    return _once(made)


def _once(context: TaskContext, settings: Settings | None = None) -> TaskContext:
    """The same context for the same task all through this process; its children join its claim."""
    with _process.exclusively():
        identity = _which(context)
        known = _process.process.contexts.get(identity)
        if known is None:
            handed = context._handed_nonce or _process.handed_nonce(context)  # noqa: SLF001
            known = replace(context, _handed_nonce=handed, _of_process=True)
            _process.process.contexts[identity] = known
        return _expect_same(known, settings or {})


def _which(context: TaskContext) -> tuple[str, ...]:
    return str(context.place), str(context.attempt), context._within  # noqa: SLF001


def _number_from(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not text.strip().isdecimal() or len(text) > 9:
        raise UsageError(f"{name}={text!r} must be a whole number from 0 on.")
    return int(text)


def _keep_from(environ: Mapping[str, str]) -> int | KeepPolicy | None:
    text = environ.get(KEEP, "3")
    try:
        policy = parse_policy(text)
        return policy.n if isinstance(policy, LatestN) else policy
    except UsageError as error:
        raise UsageError(f"{KEEP}={text!r}: {error.message}", hint=error.hint) from error
