"""Who am I: which run, which task, which attempt, and where its state lies.

Each value comes from the first that tells it: arguments and ``key=``, then ``@task``, then the
``TASKCKPT_*`` variables, then the engine. It is decided once, in the task's own thread; threads that the
task starts see the same context, and child processes find it in their environment.
"""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, get_args

from taskckpt import _process, engines
from taskckpt._keep import KeepPolicy, LatestN, parse_policy
from taskckpt._layout import LOCAL_RUN, keyed_prefix, task_prefix
from taskckpt._log.slots import new_nonce
from taskckpt._process import AMBIGUOUS, ATTEMPT, BASE, CLAIMS, KEEP, KEY, RANK, RUN, TASK, given, own_environ
from taskckpt._stores import Location, parse
from taskckpt.engines import PROCESS, EngineTask, Here
from taskckpt.errors import (
    AmbiguousIdentityError,
    NoTaskContextError,
    StaleAttemptError,
    TaskckptWarning,
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
# The origin of a value that nobody gave.
MADE_UP = "made up"

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
        rank: Which of several processes that do the task together this one is, from 0: only rank 0 saves.
            None if it is alone, or nobody knows.
        world_size: How many these are, or None.
        engine: What the engine said, if one runs the task.
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
    rank: int | None = None
    world_size: int | None = None
    engine: EngineTask | None = field(default=None, repr=False)
    parent: TaskContext | None = field(default=None, repr=False)
    _handed_nonce: str | None = field(default=None, repr=False)
    _of_process: bool = field(default=False, repr=False)
    _is_ambiguous: bool = field(default=False, repr=False)
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

    @property
    def _is_override(self) -> bool:
        """Whether a person named the task in the environment: what a task hands down brings its claim along."""
        return self.origins.get("task") in (TASK, KEY) and self._handed_nonce is None

    @cached_property
    def _nonce(self) -> str:
        return self._handed_nonce or new_nonce()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """This attempt's checkpoint; the same object every time."""
        from taskckpt._attempt import Owner
        from taskckpt._checkpoint import Checkpoint

        return Checkpoint._for_context(  # noqa: SLF001 - the two rooms share one door
            self.place,
            keep=self.keep,
            save_policy=self.save_policy,
            fork_from=self.fork_from,
            storage_options=dict(self.storage_options),
            timeout_s=self.timeout_s,
            owner=Owner(
                self._nonce,
                inherited=self._handed_nonce is not None or self._made_in != os.getpid(),
                about={"run": self.run, "task": self.task, "attempt": self.attempt},
                rank=self.rank or 0,
                stale=self.engine.stale if self.engine is not None else StaleAttemptError,
                on_hold=partial(_process.hand_down_claim, self) if self._of_process else None,
                on_nothing=self._tell_nothing,
            ),
            src=self._src,
        )

    @property
    def _src(self) -> tuple[str, ...]:
        """Where else to look, if the task is the very one that the engine named."""
        said = self.engine
        is_named_by_it = said is not None and self.key is None and self.origins.get("task") == said.engine
        return said.src if said is not None and is_named_by_it and self.fork_from is None else ()

    def _tell_nothing(self) -> None:
        """Nothing was found by what is a retry, in a place that perhaps only an earlier host had."""
        if self.engine is None or not self.attempt or self.origins.get("base") != MADE_UP:
            return
        message = (
            f"Attempt {self.attempt} (from 0) of this {self.engine.engine} task found nothing in {self.base} on host "
            f"{platform.node()}, and begins anew: what an earlier attempt saved on another host, or in a container "
            f"that is gone, is not there. Set {BASE} to a place that all hosts share."
        )
        logger.error(message)
        warnings.warn(message, TaskckptWarning, stacklevel=2)

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
            RANK: "" if self.rank is None else str(self.rank),
            KEEP: "all" if self.keep is None else str(self.keep),
            CLAIMS: _process.claims(self),
            AMBIGUOUS: "",
        }


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
    return current or (_process.of_thread() if of_threads else None) or _of_process(said, choice)


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
    if outer is not None and outer._is_override:  # noqa: SLF001
        _expect_one_task(outer, said)
        made, outer = outer, None
    if outer is not None:
        if (outer.run, outer.task, outer.key) == (made.run, made.task, None):
            return outer  # a process above this one was the same task, and said so
        origins = {**made.origins, **{name: outer.origins.get(name, MADE_UP) for name in ("run", "base")}}
        if current is None:
            _process.runs_parts()
        # The engine's own run, too: its tasks may be called alike in each.
        task = f"{engines.name_of(said.run, said.task)}{inside(outer)}"
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
    task = said.task
    if choice.on_clear == "fresh" and said.generation is not None:
        task = f"{task} (cleared: {said.generation})"
    origins = {"task": said.engine, "attempt": said.engine}
    made = _made(said, task=task, key=None, attempt=said.attempt, origins=origins)
    run = made.run
    if choice.scope == "lineage" and made.origins["run"] == said.engine:
        run = said.origin_run or run
    is_settled = choice.scope == "lineage" and said.lineage_settles and said.origin_run is not None
    return replace(made, run=run, _is_ambiguous=said.ambiguous is not None and not is_settled)


def inside(outer: TaskContext) -> str:
    """What tells a task in one task from the same one in another."""
    return f" in key {outer.key!r}" if outer.key is not None else f" in {outer.task}"


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
        return parse(told, what=BASE).uri, BASE
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
    if not isinstance(key, str) or not key.strip():
        raise UsageError(f"key={key!r} must be a str that is not blank.")
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
    keyed = _of_rank(
        replace(current, task=key, attempt=None, key=key, origins=origins, parent=None, _handed_nonce=None),
        per_rank=per_rank,
    )
    # Used outside of any task before, it is this process's attempt; else each attempt of the task makes one.
    outside = _process.process.contexts.get(_which(keyed))
    if outside is not None:
        return _expect_same(outside, settings)
    made = replace(keyed, **settings, _within=current._nonce, _is_ambiguous=False)  # noqa: SLF001
    return _once(made, settings)


def _of_rank(keyed: TaskContext, *, per_rank: bool) -> TaskContext:
    """One task for each rank, if that was asked for: then each saves its own. A process that is alone is rank 0."""
    if not per_rank:
        return keyed
    key = engines.name_of(keyed.key, f"rank-{keyed.rank or 0}")
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


def _of_process(said: EngineTask | None, choice: _Choice) -> TaskContext | None:
    """The task of this whole process: from its environment, or from a system that runs it."""
    if _process.process.runs_parts:
        raise AmbiguousIdentityError(
            "An engine runs parts of a task in this process, and this thread could belong to any of them.",
            hint="Hand the thread its checkpoint.",
        )
    found = _of_environment(said)
    if found is not None or said is None:
        return found
    made = _made_of(said, choice)
    environ = own_environ()
    if environ.get(ATTEMPT):
        made = replace(made, attempt=_number_from(environ, ATTEMPT), origins={**made.origins, "attempt": ATTEMPT})
    return _once(replace(made, keep=_keep_from(environ)))


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
    if not (key or task):
        return None
    told_rank = _number_from(environ, RANK) if environ.get(RANK) else None
    attempt_origin = ATTEMPT if environ.get(ATTEMPT) else said.engine if said is not None else "unknown"
    made = _made(
        said,
        task=key or task or "",
        key=key,
        attempt=_number_from(environ, ATTEMPT) if environ.get(ATTEMPT) else said.attempt if said is not None else None,
        origins={"task": KEY if key else TASK, "attempt": attempt_origin},
        keep=_keep_from(environ),
    )
    return _once(made if made.rank is not None else replace(made, rank=told_rank))


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
