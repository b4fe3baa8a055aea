"""``@task``: a function that is retried, and that its checkpoint belongs to."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar, overload

from taskckpt import _process, context, engines
from taskckpt._identity import expect_one_function, identity_of
from taskckpt._operation import Stop
from taskckpt._task_context import MADE_UP, TaskContext
from taskckpt._testing import switches
from taskckpt.context import OnClear, Scope
from taskckpt.errors import (
    SourceChangedError,
    StaleAttemptError,
    StillPendingError,
    TaskckptError,
    UnavailableError,
    UsageError,
    UsageTypeError,
)

if TYPE_CHECKING:
    from tenacity import RetryCallState

    from taskckpt._arguments import Target
    from taskckpt._keep import KeepPolicy
    from taskckpt._later import Later
    from taskckpt._when import SavePolicy

logger = logging.getLogger("taskckpt")

P = ParamSpec("P")
R = TypeVar("R")

On: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]
Key: TypeAlias = str | Callable[..., str]

# Of our own errors only these pass by themselves; a stale, corrupt, denied or wrong call does not.
_PASSING = (UnavailableError, SourceChangedError, StillPendingError)


@overload
def task(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def task(
    *,
    retries: int = 3,
    on: On = Exception,
    key: Key | None = None,
    run: str | None = None,
    base: Target | None = None,
    keep: int | KeepPolicy | None = 3,
    save_policy: SavePolicy | int | str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float = 300,
    wait_initial_s: float = 0.5,
    wait_max_s: float = 30,
    clear_on_success: bool | None = None,
    scope: Scope | None = None,
    on_clear: OnClear | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def task(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:  # noqa: D417 - see the overload
    """Retries a plain or ``async`` function, with a checkpoint that spans its attempts.

    Inside, ``taskckpt.ctx().checkpoint`` is the call's own. Its identity is the function (module or
    script, and name) and its arguments, so that two calls with different arguments never meet; a script
    that was killed and is started again goes on.

    Args:
        retries: How often to try again, so that there are ``retries + 1`` attempts.
        on: Which exceptions are retried: a class, a tuple of them, or a function that tells. Errors of
            taskckpt that do not pass by themselves (stale, corrupt, denied, usage) never are.
        key: Names the task instead: a str, or a function of the call's arguments. It spans runs.
        run: The run (default: ``TASKCKPT_RUN``, the engine's, or ``local``).
        base: Where tasks lie (default: ``TASKCKPT_BASE``, the engine's, or ``./.taskckpt``).
        keep, save_policy, storage_options, timeout_s: As for ``Checkpoint``.
        wait_initial_s, wait_max_s: Back-off between attempts: exponential with jitter.
        clear_on_success: Clear the checkpoints when the function returns. By default only where nobody
            named run or key: an engine may deliver a finished task once more.
        scope, on_clear: Which of an engine's identities the call is part of: as for ``ctx``.

    Raises:
        UsageError: At the call: an argument is no plain value, or the function has no stable name; pass ``key=``.
        The function's own exception, once retries are exhausted: the state stays.
    """
    if function is not None and not callable(function) and not isinstance(function, classmethod):
        raise UsageTypeError("task decorates a function; its options have names: @task(retries=3).")
    try:
        spec = _Spec(**options)
    except TypeError as error:
        if isinstance(error, TaskckptError):
            raise
        unknown = ", ".join(sorted(set(options) - {option.name for option in fields(_Spec)}))
        known = ", ".join(option.name for option in fields(_Spec))
        raise UsageTypeError(f"@task has no option {unknown}.", hint=f"There are: {known}.") from error
    return spec.decorate if function is None else spec.decorate(function)


@dataclass(frozen=True)
class _Spec:
    retries: int = 3
    on: On = Exception
    key: Key | None = None
    run: str | None = None
    base: Target | None = None
    keep: int | KeepPolicy | None = 3
    save_policy: SavePolicy | int | str | None = None
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    timeout_s: float = 300
    wait_initial_s: float = 0.5
    wait_max_s: float = 30
    clear_on_success: bool | None = None
    scope: Scope | None = None
    on_clear: OnClear | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.retries, int) or isinstance(self.retries, bool) or self.retries < 0:
            raise UsageError(f"retries={self.retries!r} must be a whole number from 0 on.")
        if not _tells_what_to_retry(self.on):
            raise UsageTypeError("on= takes an exception class, a tuple of them (no list), or a function that tells.")
        if min(self.wait_initial_s, self.wait_max_s) < 0:
            raise UsageError("Waiting times must not be negative.")

    def decorate(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(function, (staticmethod, classmethod)):
            raise UsageTypeError("@task goes below @staticmethod and @classmethod, next to the function.")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise UsageTypeError("A generator cannot be a task: it would be retried item by item.")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def async_wrapper(*args: Any, **kwargs: Any) -> Any:
                return await _AsyncCall(self, function, args, kwargs).run()

            return async_wrapper

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return _Call(self, function, args, kwargs).run()

        return wrapper

    def is_retried(self, error: BaseException) -> bool:
        if not isinstance(error, Exception):
            return False
        if isinstance(error, TaskckptError) and not isinstance(error, _PASSING):
            return False
        return isinstance(error, self.on) if isinstance(self.on, (type, tuple)) else bool(self.on(error))

    def policy(self, name: str) -> dict[str, Any]:
        """For tenacity, which does the retrying."""
        import tenacity

        def tell(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            logger.warning(
                "Attempt %d of %d of %s failed: %s: %s", state.attempt_number, self.retries + 1, name,
                type(error).__name__, error,
            )  # fmt: skip

        backoff = tenacity.wait_exponential(self.wait_initial_s, self.wait_max_s) + tenacity.wait_random(
            0, self.wait_initial_s
        )
        return {
            "stop": tenacity.stop_after_attempt(self.retries + 1),
            "wait": tenacity.wait_none() if switches.instant_retries else backoff,
            "retry": tenacity.retry_if_exception(self.is_retried),
            "before_sleep": tell,
            "reraise": True,
        }


class _Call:
    """One call of a task: its identity, decided once, and its attempts."""

    def __init__(self, spec: _Spec, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self._spec = spec
        self._function = functools.partial(function, *args, **kwargs)
        self._key = _key_of(spec, args, kwargs)
        self._parent = context.around(has_key=self._key is not None, scope=spec.scope, on_clear=spec.on_clear)
        seen = engines.look()
        said = seen.task if self._parent is None else self._parent.engine
        self._engine = None if said is None else replace(said, execution=None)
        self._rank, self._world_size = seen.rank, seen.world_size
        if self._parent is not None:
            self._rank, self._world_size = self._parent.rank, self._parent.world_size
        self._task = self._key or identity_of(function, args, kwargs)
        if self._key is None and self._parent is not None:
            self._task += context.inside(self._parent)
        self._attempts = 0

    def run(self) -> Any:
        from tenacity import Retrying

        return Retrying(**self._spec.policy(self._task))(self._attempt)

    def _attempt(self) -> Any:
        with _process.running(self._next()) as current:
            with _flushing(current):
                result = self._function()
                _expect_finished(result)
            if self._clears(current):
                with _telling_only(current):
                    current.checkpoint.clear_sync()
            return result

    def _next(self) -> TaskContext:
        """A new attempt: it claims the task anew, so that what an earlier one left running is fenced."""
        spec, attempt = self._spec, self._attempts
        self._attempts += 1
        base_of = self._parent if spec.base is None else None
        (run, run_origin), (base, base_origin) = self._run(), self._base()
        context.expect_lasting(self._key, base_origin, self._engine)
        made = TaskContext(
            run=run,
            task=self._task,
            attempt=attempt,
            base=base,
            key=self._key,
            origins={
                "task": "key=" if self._key else "@task",
                "attempt": "@task",
                "run": run_origin,
                "base": base_origin,
            },
            keep=spec.keep,
            save_policy=spec.save_policy,
            storage_options=dict(spec.storage_options or (base_of.storage_options if base_of else {})),
            timeout_s=spec.timeout_s,
            rank=self._rank,
            world_size=self._world_size,
            engine=self._engine,
            parent=self._parent,
        )
        if self._key is None and attempt == 0:
            expect_one_function(self._function.func, str(made.place))
        return made

    def _run(self) -> tuple[str, str]:
        """The run and where it came from: said here, else that of the task around."""
        if self._parent is None or self._spec.run is not None:
            return context.run_and_origin(self._spec.run)
        return self._parent.run, self._parent.origins.get("run", "parent")

    def _base(self) -> tuple[str, str]:
        if self._parent is None or self._spec.base is not None:
            return context.base_and_origin(self._spec.base)
        return self._parent.base, self._parent.origins.get("base", "parent")

    def _clears(self, current: TaskContext) -> bool:
        if current.rank:
            return False  # rank 0 does
        if self._spec.clear_on_success is not None:
            return self._spec.clear_on_success
        return self._key is None and self._run()[1] == MADE_UP


class _AsyncCall(_Call):
    async def run(self) -> Any:
        from tenacity import AsyncRetrying

        return await AsyncRetrying(**self._spec.policy(self._task))(self._async_attempt)

    async def _async_attempt(self) -> Any:
        with _process.running(self._next()) as current:
            async with _flushing(current):
                result = await self._function()
            if self._clears(current):
                with _telling_only(current):
                    await current.checkpoint.clear()
            return result


class _flushing:  # noqa: N801 - as below
    """What the task began to save in the background has ended before the task has, and well."""

    def __init__(self, current: TaskContext) -> None:
        self._current = current

    def __enter__(self) -> None:
        from taskckpt import _later  # only now: to import what saves takes a while

        self._flush = _later.flush
        self._begun, self._reset = _later.collect()

    async def __aenter__(self) -> None:
        self.__enter__()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if pending := self._pending():
            with _telling_besides(error):
                self._flush(pending, Stop())

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if pending := self._pending():
            from taskckpt._bridge import in_thread

            with _telling_besides(error):
                await in_thread(functools.partial(self._flush, pending))

    def _pending(self) -> list[Later]:
        self._reset()
        if "checkpoint" in vars(self._current):  # threads that the task started use it, and note nothing here
            self._begun.add(self._current.checkpoint._later)  # noqa: SLF001
        return [later for later in self._begun if not later.is_idle]


@contextmanager
def _telling_besides(error: BaseException | None) -> Generator[None]:
    """Two things went wrong: the task's own exception leaves, and the other one is told in a note and in the log."""
    try:
        yield
    except Exception as failure:
        if error is None:
            raise
        error.add_note(f"And a save in the background failed: {type(failure).__name__}: {failure}")
        logger.exception("A save in the background failed, besides the task itself:")


class _telling_only:  # noqa: N801 - reads as a verb, like contextlib.suppress
    """The task has ended well; that its state could not be cleared must not undo that, but be told."""

    def __init__(self, current: TaskContext) -> None:
        self._current = current

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, TaskckptError) or isinstance(error, StaleAttemptError):
            return False
        logger.warning(
            "%s ended well, but its state could not be cleared: the next call resumes from it: %s",
            self._current.task,
            error,
        )
        return True


def _expect_finished(result: object) -> None:
    """Behind a plain wrapper, an async function or a generator has not even begun when it returns."""
    if not inspect.isawaitable(result) and not inspect.isgenerator(result) and not inspect.isasyncgen(result):
        return
    close = getattr(result, "close", None)
    if close is not None:
        close()
    raise UsageTypeError(
        f"The task gave a {type(result).__name__}: it has not run yet.",
        hint="Put @task next to the async function, below other decorators; generators cannot be tasks.",
    )


def _key_of(spec: _Spec, args: Any, kwargs: Any) -> str | None:
    if spec.key is None:
        return None
    key = spec.key if isinstance(spec.key, str) else spec.key(*args, **kwargs)
    context.expect_key(key)
    return key


def _tells_what_to_retry(on: object) -> bool:
    """KeyboardInterrupt and its like always end the task."""
    if not isinstance(on, (type, tuple)):
        return callable(on)
    return all(isinstance(one, type) and issubclass(one, Exception) for one in (on if isinstance(on, tuple) else (on,)))
