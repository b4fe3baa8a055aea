"""``CheckpointManager``: which stages of a pipeline are done, and what each of them gave."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeAlias, TypeVar, overload
from weakref import WeakKeyDictionary

from taskckpt._arguments import Target, checked_notes, checked_options, checked_timeout
from taskckpt._checkpoint import Checkpoint
from taskckpt._keep import KeepPolicy, policy_of
from taskckpt._layout import DATA, INDEX, LOG
from taskckpt._log.records import Json
from taskckpt._operation import Stop, ordered_map
from taskckpt._stores import parse
from taskckpt._stores.local import translating
from taskckpt.errors import (
    AmbiguousIdentityError,
    CorruptCheckpointError,
    DeniedError,
    NotFoundError,
    UsageError,
    UsageTypeError,
)
from taskckpt.stages import _markers
from taskckpt.stages._fingerprint import digest_of
from taskckpt.stages._look import UNDECLARED, Look, Terms
from taskckpt.stages._run import Call, Turns
from taskckpt.stages._stage import NO_RESULT, SUFFIX, Place, Stage
from taskckpt.stages._status import StageStatus, State, shown, table
from taskckpt.stages._versions import OURS

logger = logging.getLogger("taskckpt")

P = ParamSpec("P")
R = TypeVar("R")

# Stages that another one comes after: names, or functions that ``@manager.stage`` gave.
After: TypeAlias = str | Callable[..., object] | Iterable[str | Callable[..., object]]

# Stages that status() reads at once.
READ_THREADS = 8
# The folders of a Checkpoint below whose place stages may lie.
_OF_A_CHECKPOINT = (LOG, DATA, INDEX)


class CheckpointManager:
    """The stages of one pipeline: which of them are done, and what each gave.

    Several pipelines lie side by side in folders of their own, also one inside of another's: each knows only its own
    stages. Threads may share a manager. Of two processes at one stage the later one gets it, as with any task: what
    the earlier one gives is refused with ``StaleAttemptError``.

    Args:
        checkpoint_dir: A folder, a URL, or a ``Checkpoint``, below whose place the stages lie then. They stay until
            they are cleared here, also when that checkpoint is cleared. A local folder is made at once; where that
            is not permitted, stages can be looked at and not saved. In it, the markers of the old manager
            (``<stage>.checkpoint``) count as done.
        keep: Which results of a stage stay: the newest so many, None for all, or a policy as for ``Checkpoint``.
        storage_options: Passed to the fsspec file system; not with a ``Checkpoint``, which has its own.
        timeout_s: How long one request to the store may take, its retries included; likewise.

    >>> import tempfile
    >>> manager = CheckpointManager(tempfile.mkdtemp())
    >>> manager.run("count", sum, [1, 2, 3])
    6
    >>> manager.run("count", sum, [1, 2, 3])  # done: nothing runs
    6
    >>> manager.has_checkpoint("count")
    True
    """

    def __init__(
        self,
        checkpoint_dir: Target | Checkpoint = "checkpoints",
        *,
        keep: int | KeepPolicy | None = 3,
        storage_options: Mapping[str, Any] | None = None,
        timeout_s: float = 300,
    ) -> None:
        policy_of(keep)  # says at once what is wrong with it
        if isinstance(checkpoint_dir, Checkpoint):
            if storage_options is not None:
                raise UsageError("storage_options= does not go with a Checkpoint, which has its own.")
            attempt = checkpoint_dir._attempt  # noqa: SLF001 - the two rooms share one door
            self.checkpoint_dir: Target = checkpoint_dir.remote_destination
            self._place = Place(attempt.dest, attempt._storage_options, attempt._timeout_s, attempt.read_only, keep)  # noqa: SLF001
        else:
            self.checkpoint_dir = checkpoint_dir
            location = parse(checkpoint_dir, what="checkpoint_dir")
            self._place = Place(
                location, checked_options(storage_options), checked_timeout(timeout_s), read_only=False, keep=keep
            )
            if location.is_local:
                _make_folder(location.path)
        self._turns = Turns()
        self._know_nothing()

    def _know_nothing(self) -> None:
        self._declared: dict[str, _Declared] = {}
        # By folder, what each stage was last said to come after in this process.
        self._after: dict[str, tuple[Stage, ...]] = {}
        self._functions: WeakKeyDictionary[Callable[..., object], str] = WeakKeyDictionary()

    # --- what is done --------------------------------------------------------------------------

    def save_checkpoint(self, stage_name: str, *, metadata: Mapping[str, Json] | None = None) -> None:
        """Marks a stage as done, without a result.

        Args:
            stage_name: Any text that is not blank.
            metadata: Plain values that ``status`` shows. Time, host, user and attempt are noted by themselves.

        Raises:
            StaleAttemptError: Another process took the stage over just now.
            UnavailableError, StorageFullError, DeniedError: It is not marked.
            UsageError: The name or the metadata is none.
        """
        stage = self._place.stage(stage_name)
        declared = self._declared.get(stage.folder)
        terms = UNDECLARED if declared is None else declared.terms
        notes, built_from = _checked_metadata(metadata), self._look().built_from(stage, terms)
        stage.save(stage.take_over(Stop()), NO_RESULT, notes, terms.fingerprint, built_from)

    def has_checkpoint(self, stage_name: str) -> bool:
        """Whether a stage is done, and not out of date. Reads no result, and never takes the stage over.

        A damaged one is not done, and the log says why.
        """
        return self._look().usable(self._place.stage(stage_name)) is not None

    def clear_checkpoints(self, stage_name: str | None = None) -> None:
        """Forgets all stages of this pipeline, or one of them. Whoever is running one can save no more.

        Pipelines in folders below are left alone, and so is every file that is no stage's.

        Args:
            stage_name: None for all.
        """
        if stage_name is not None:
            stage = self._place.stage(stage_name)
            stage.clear()
            logger.info("Checkpoint cleared: %s", shown(stage_name))
            return
        for stage in self._stages():
            stage.clear()
        others = [name for name in self._place.folders() if not name.endswith(SUFFIX) and name not in _OF_A_CHECKPOINT]
        if others:
            logger.info("Left alone, being no stages of this pipeline: %s", ", ".join(map(shown, others)))
        logger.info("All checkpoints cleared.")

    def status(self) -> list[StageStatus]:
        """All stages that are done or begun here or declared by ``@stage``: those in their order, then by time."""
        stages, look = self._stages(), self._look()
        for _ in ordered_map(look.record, stages, threads=READ_THREADS):
            pass  # they are read side by side; what they say of each other is looked up below
        order = {folder: number for number, folder in enumerate(self._declared)}
        found = [
            (order.get(stage.folder, len(order)), self._status_of(stage, look))
            for stage in stages
            if stage.folder in order or look.record(stage).is_something
        ]
        found.sort(key=lambda one: (one[0], one[1].time or datetime.max.replace(tzinfo=UTC), one[1].name))
        return [status for _, status in found]

    def __str__(self) -> str:
        """A table of ``status``, which is asked for."""
        stages = self.status()
        return table(stages) if stages else f"No stages in {self._place.location.uri}."

    def __repr__(self) -> str:
        return f"CheckpointManager({self._place.location.uri!r})"

    # --- results -------------------------------------------------------------------------------

    def run(
        self,
        stage_name: str,
        function: Callable[..., R],
        /,
        *args: object,
        fingerprint: object = None,
        after: After = (),
        metadata: Mapping[str, Json] | None = None,
        wait_s: float | None = None,
        **kwargs: object,
    ) -> R:
        """The result of a stage: it is loaded if the stage is done, else ``function`` is called and it is saved.

        Given an async function, it gives a coroutine, as calling that would: ``await manager.run("train", train)``.

        A result may be what ``save_state`` takes as a value (plain values, containers, arrays), ``bytes``, or the
        ``Path`` of a file or folder, whose content is stored and restored under its name in a private folder. A path
        inside of another value is refused: what it leads to would not be stored.
        Without ``fingerprint`` and ``after``, only the name tells stages apart: arguments do not matter.

        Args:
            stage_name: Any text that is not blank.
            function: Called with ``args`` and ``kwargs``. If it raises, or the process dies, nothing is done.
            *args: Its arguments.
            **kwargs: The same, by name; those named like one of the options go into a ``functools.partial``.
            fingerprint: What the result depends on, such as a version of the code and the inputs: a value that a
                state can hold, or a function that gives one and is called as ``fingerprint(function, *args,
                **kwargs)``, such as ``fingerprint_of``. If it is not that of the current version, the stage runs
                again. None is a fingerprint like any other: to leave it out where there was one is a change.
            after: The stages that this one builds upon: names, or functions that ``@manager.stage`` gave. If one of
                them has changed since, this one runs again.
            metadata: As for ``save_checkpoint``.
            wait_s: If another process takes the stage over meanwhile: wait so many seconds for its result, and give
                that. None: raise at once.

        Raises:
            StaleAttemptError: Another process took the stage over; nothing was saved.
            UsageError: A stage that it comes ``after`` is not done, or comes after this one.
            UsageTypeError: The result, or the fingerprint, is nothing that can be stored; the stage is not done.
            UnavailableError, StorageFullError, DeniedError: As for ``Checkpoint``.
        """
        if not callable(function):
            raise UsageTypeError(f"A stage is a function, not a {type(function).__name__}.")
        options = _Options(fingerprint, after, metadata, wait_s)
        given: R = self._run(stage_name, functools.partial(function, *args, **kwargs), options)
        return given

    def _run(self, stage_name: str, function: functools.partial[Any], options: _Options) -> Any:
        call = self._call(stage_name, function, options)
        if inspect.iscoroutinefunction(function):
            return self._run_async(call, function)
        with self._turns.turn(call.stage):
            found = call.begin(Stop())
            return call.finish(function(), Stop()) if found is None else found.value

    async def _run_async(self, call: Call, function: functools.partial[Any]) -> Any:
        from taskckpt._bridge import in_thread  # asyncio takes 30 ms to import, and plain pipelines do without

        async with self._turns.async_turn(call.stage):
            found = await in_thread(call.begin)
            if found is not None:
                return found.value
            result = await function()
            return await in_thread(functools.partial(call.finish, result))

    def _call(self, stage_name: str, function: functools.partial[Any], options: _Options) -> Call:
        """Everything that can be wrong with a call is said here, before anything is run."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise UsageTypeError("A generator cannot be a stage: it has given nothing yet when it returns.")
        stage = self._place.stage(stage_name)
        terms = Terms(options.digest(function), self._comes_after(stage, options.after))
        return Call(stage, terms, self._look, _checked_metadata(options.metadata), _checked_wait(options.wait_s))

    def _comes_after(self, stage: Stage, given: After) -> tuple[Stage, ...]:
        """The stages that a stage is said to come after, none of which comes after it."""
        before = tuple(self._stage_of(one) for one in _as_tuple(given))
        if any(one.folder == stage.folder for one in before):
            raise UsageError(f"Stage {stage!r} cannot come after itself.")
        pending: list[tuple[Stage, ...]] = [(one,) for one in before]
        seen = set[str]()
        while pending:
            way = pending.pop()
            if way[-1].folder == stage.folder:
                circle = ", which comes after ".join(map(repr, way))
                raise UsageError(
                    f"Stage {stage!r} comes after {circle}: none can be the first.",
                    hint="Leave one of them out of after=.",
                )
            if way[-1].folder not in seen:
                seen.add(way[-1].folder)
                pending.extend((*way, one) for one in self._after.get(way[-1].folder, ()))
        self._after[stage.folder] = before
        return before

    def _stage_of(self, given: str | Callable[..., object]) -> Stage:
        """The stage of a name, or of a function that ``stage`` gave."""
        if not callable(given):
            return self._place.stage(given)
        name = self._functions.get(given) if inspect.isfunction(given) else None
        if name is None:
            raise UsageTypeError(
                f"after= has {getattr(given, '__qualname__', repr(given))}, which is no stage of this manager.",
                hint="Decorate it with @manager.stage, or give the name of a stage.",
            )
        return self._place.stage(name)

    @overload
    def stage(self, function: Callable[P, R], /) -> Callable[P, R]: ...
    @overload
    def stage(
        self,
        /,
        *,
        name: str | None = None,
        fingerprint: object = None,
        after: After = (),
        metadata: Mapping[str, Json] | None = None,
        wait_s: float | None = None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
    def stage(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        fingerprint: object = None,
        after: After = (),
        metadata: Mapping[str, Json] | None = None,
        wait_s: float | None = None,
    ) -> Any:
        """A function, plain or ``async``, that is a stage: calling it is ``run`` with its name.

        Args:
            function: What is decorated, if there are no options.
            name: Default: the function's.
            fingerprint: As for ``run``; one that is no function is known to ``status`` and ``has_checkpoint``, too.
            after: As for ``run``, and known to these two as well.
            metadata: As for ``run``.
            wait_s: As for ``run``.

        Raises:
            AmbiguousIdentityError: Another function is the stage of that name.
        """
        if function is not None and not callable(function):
            raise UsageTypeError('stage decorates a function; its options have names: @manager.stage(name="train").')
        options = _Options(fingerprint, _as_tuple(after), metadata, wait_s)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            stage_name = function.__name__ if name is None else name
            self._declare(stage_name, function, options)
            if inspect.iscoroutinefunction(function):

                @functools.wraps(function)
                async def async_wrapper(*args: Any, **kwargs: Any) -> Any:
                    return await self._run(stage_name, functools.partial(function, *args, **kwargs), options)

                self._functions[async_wrapper] = stage_name
                return async_wrapper

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return self._run(stage_name, functools.partial(function, *args, **kwargs), options)

            self._functions[wrapper] = stage_name
            return wrapper

        return decorate if function is None else decorate(function)

    def _declare(self, name: str, function: Callable[..., Any], options: _Options) -> None:
        stage, home = self._place.stage(name), f"{function.__module__}.{function.__qualname__}"
        known = self._declared.get(stage.folder)
        if known is not None and known.home != home:
            raise AmbiguousIdentityError(
                f"Stage {stage!r} is {known.home} already.", hint="Name one of them: @manager.stage(name=...)."
            )
        with_call = callable(options.fingerprint)
        fingerprint = None if with_call else options.digest(functools.partial(function))
        terms = Terms(fingerprint, self._comes_after(stage, options.after), any_fingerprint=with_call)
        self._declared[stage.folder] = _Declared(stage, home, terms)

    def result(self, stage_name: str, version: int | None = None) -> Any:
        """The stored result of a stage, be it out of date; None if it was saved without one. Runs nothing.

        Args:
            stage_name: As it was saved.
            version: The number of an earlier one; None for the current one.

        Raises:
            NotFoundError: The stage is not done, or was never saved with that number; the hint lists what there is.
            CorruptCheckpointError: It is damaged.
        """
        stage = self._place.stage(stage_name)
        record = stage.read()
        done = record.done if version is None else stage.version(version)
        if done is not None:
            return stage.load(done)
        if record.damage is not None and version is None:
            raise CorruptCheckpointError(f"Stage {stage!r} is damaged: {record.damage}", uri=stage.uri)
        if record.versions:
            hint = f"There are: {', '.join(map(str, record.versions))}."
            raise NotFoundError(f"Stage {stage!r} has no version {version}.", uri=stage.uri, hint=hint)
        names = [shown(one.name) for one in self.status() if one.version is not None]
        near = difflib.get_close_matches(stage_name, names, n=5, cutoff=0.4) or names[:5]
        hint = f"There are: {', '.join(near)}." if near else "No stage has one."
        raise NotFoundError(f"Stage {stage!r} has no result.", uri=stage.uri, hint=hint)

    def versions(self, stage_name: str) -> list[int]:
        """The numbers of a stage's results that can be loaded, ascending. How many stay, ``keep=`` says."""
        return list(self._place.stage(stage_name).read().versions)

    # --- inside --------------------------------------------------------------------------------

    def _look(self) -> Look:
        return Look(self._place, {folder: one.terms for folder, one in self._declared.items()})

    def _stages(self) -> list[Stage]:
        """All that are declared, marked by the old manager or were ever begun: once each, by name if that is known."""
        markers = _markers.find_all(self._place.folder) if self._place.folder is not None else []
        known = [*(one.stage for one in self._declared.values()), *(self._place.stage(one.stage) for one in markers)]
        return list({stage.folder: stage for stage in (*self._place.stages(), *known)}.values())

    def _status_of(self, stage: Stage, look: Look) -> StageStatus:
        record = look.record(stage)
        if record.done is None:
            if record.begun is not None:
                begun = record.begun
                return StageStatus(record.name, "begun", host=begun.host, begun=begun.time, pid=begun.pid)
            state: State = "not done" if record.damage is None else "damaged"
            return StageStatus(record.name, state, reason=record.damage)
        done, reason = record.done, look.why_outdated(stage, record.done)
        return StageStatus(
            record.name,
            "done" if reason is None else "out of date",
            time=done.time,
            host=done.host,
            user=done.user,
            attempt=done.attempt,
            metadata=done.metadata,
            versions=record.versions,
            version=done.version,
            size_bytes=done.size_bytes,
            reason=reason,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_declared", "_after", "_functions")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._know_nothing()  # what functions are declared is known to the process that declared them


@dataclass(frozen=True)
class _Options:
    fingerprint: object
    after: After
    metadata: Mapping[str, Json] | None
    wait_s: float | None

    def digest(self, call: functools.partial[Any]) -> str | None:
        """Of the fingerprint for a call; None if there is none."""
        value = self.fingerprint
        if callable(value):
            value = value(call.func, *call.args, **call.keywords)
        return None if value is None else digest_of(value)


@dataclass(frozen=True)
class _Declared:
    """A stage that the code declares, and where that function is."""

    stage: Stage
    home: str
    terms: Terms


def _as_tuple(after: After) -> tuple[str | Callable[..., object], ...]:
    """One stage or several, of an iterable that may be gone through only once."""
    return (after,) if isinstance(after, str) or callable(after) else tuple(after)


def _make_folder(path: str) -> None:
    """At once, as the manager of old did; but looking needs no leave to write."""
    try:
        with translating(path):
            os.makedirs(path, exist_ok=True)
    except DeniedError as error:
        logger.info("The folder of the stages cannot be made, so that they can only be looked at: %s", error)


def _checked_metadata(metadata: Mapping[str, Json] | None) -> Mapping[str, Json]:
    """Refused before anything is run."""
    checked = checked_notes(None, metadata, None).metadata
    if OURS in checked:
        raise UsageError(f"metadata has {OURS!r}, which holds what is noted by itself.", hint="Choose another name.")
    return checked


def _checked_wait(wait_s: float | None) -> float | None:
    if wait_s is None or (isinstance(wait_s, (int, float)) and not isinstance(wait_s, bool) and wait_s >= 0):
        return wait_s
    raise UsageError(f"wait_s={wait_s!r} must be a number of seconds from 0 on, or None.")
