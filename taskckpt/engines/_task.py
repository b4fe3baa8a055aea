"""What an engine tells of the task that it is running, and in which words."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from taskckpt.errors import StaleAttemptError, UsageError

# More is no count of attempts, but a time stamp, or a hash.
HIGHEST_ATTEMPT = 10**9


@dataclass(frozen=True, slots=True)
class EngineTask:
    """What an engine knows of the task that it is running.

    Attributes:
        engine: The engine's name.
        run: The run that the task belongs to: another one's on every other installation of the engine, too.
        task: The task's identity within the run: the same on every retry, and no other task's.
        attempt: Counted from 0, or None if the engine does not tell.
        base: A durable place that the engine offers, or None.
        rank: Which of several processes that do the task together this one is, from 0; None if it is alone.
        world_size: How many these are.
        origin_run: The run that this one executes again, or that one's origin: the run of ``scope="lineage"``.
        generation: Another one once an operator told the engine to start the task over: for ``on_clear="fresh"``.
        ambiguous: Why another task may have the same identity, as a sentence; None if none can.
        hint: What to do about that.
        lineage_settles: Only the run is not known for sure, and ``scope="lineage"`` goes by its origin, which is.
        base_is_of_run: The base lasts as long as the run only, or is another one in the next.
        alone: No other task of the engine can run in this process meanwhile.
        in_environment: It was read from the environment, which child processes have as well.
        in_all_threads: The engine says the same in every thread of this process.
        src: Where else this task's state may lie, the newest first, if its own place has nothing: what the engine's
            own helper saved.
        execution: What this execution of the task has for itself, another one each time that the engine begins
            the task. Where it can be referred to weakly, the engine lets go of it when the task ends, and until
            then threads and child processes of the task are told who they are; ``PROCESS`` if the whole process
            runs this one task.
        stale: The error that ends a task without a retry: see ``ending``.
        sources: For each value by its name above, what it was read from.
    """

    engine: str
    run: str
    task: str
    attempt: int | None = None
    base: str | None = None
    rank: int | None = None
    world_size: int | None = None
    origin_run: str | None = None
    generation: str | None = None
    ambiguous: str | None = None
    hint: str | None = None
    lineage_settles: bool = False
    base_is_of_run: bool = False
    alone: bool = False
    in_environment: bool = False
    in_all_threads: bool = False
    src: tuple[str, ...] = ()
    execution: object = field(default=None, repr=False, compare=False)
    stale: type[StaleAttemptError] = field(default=StaleAttemptError, repr=False)
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        for name in ("run", "task"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise UsageError(f"The engine {self.engine} gave {name}={value!r}; it must be a str that is not blank.")
        for name in ("attempt", "rank", "world_size"):
            checked_count(getattr(self, name), f"The engine {self.engine} gave {name}")


class _Process:
    """The whole process runs one task of an engine, and ends with it."""

    def __repr__(self) -> str:
        return "PROCESS"


PROCESS = _Process()


def checked_count(value: object, what: str) -> int | None:
    """A number from 0 on, or None."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < HIGHEST_ATTEMPT:
        raise UsageError(f"{what}={value!r}; it must be a whole number from 0 on.")
    return value


def name_of(*parts: object) -> str:
    """Several parts as one name, that no other parts give: joined by ``/``, which is escaped within them.

    >>> name_of("flow/1", "train")
    'flow%2F1/train'
    """
    return "/".join(str(part).replace("%", "%25").replace("/", "%2F") for part in parts)


# More of one base are not remembered: they would be another one each time.
MOST_ENDINGS = 8


def ending(base: type[Exception], **attributes: Any) -> type[StaleAttemptError]:
    """A ``StaleAttemptError`` that is an engine's own exception, too: the one that ends a task without a retry.

    Args:
        base: The engine's exception. Its ``__init__`` is not called.
        attributes: What the engine reads from such an exception.

    Raises:
        UsageError: The two cannot be combined.
    """
    made_before = _endings.setdefault(base, [])
    known = next((one for one in made_before if one.made_of[1] == attributes), None)
    if known is not None:
        return known  # type: ignore[return-value] # it is one

    def reduce(self: StaleAttemptError) -> tuple[Any, ...]:
        return _again, (base, attributes, self.message, self.uri, self.hint)

    def begin(self: StaleAttemptError, message: str, *, uri: str | None = None, hint: str | None = None) -> None:
        Exception.__init__(self, message)
        self.message, self.uri, self.hint = message, uri, hint

    namespace = {
        **attributes,
        "__init__": begin,
        "__str__": StaleAttemptError.__str__,
        "__reduce__": reduce,
        "__module__": StaleAttemptError.__module__,
    }
    try:
        made: Any = _Ending("StaleAttemptError", (StaleAttemptError, base), namespace)
        made("tried")
    except Exception as error:
        raise UsageError(f"{base.__name__} cannot be combined with StaleAttemptError: {error}.") from error
    made.made_of = base, attributes
    if len(made_before) < MOST_ENDINGS:
        made_before.append(made)
    return made  # type: ignore[no-any-return]


class _Ending(type):
    """The type of such errors. Celery pickles an error's type by itself, too, and finds it by no name."""

    made_of: tuple[type[Exception], Mapping[str, Any]]


_endings: dict[type[Exception], list[_Ending]] = {}


copyreg.pickle(_Ending, lambda made: (_ending_again, made.made_of))  # type: ignore[arg-type, return-value]


def _ending_again(base: type[Exception], attributes: Mapping[str, Any]) -> type[StaleAttemptError]:
    return ending(base, **attributes)


def _again(
    base: type[Exception], attributes: Mapping[str, Any], message: str, uri: str | None, hint: str | None
) -> StaleAttemptError:
    return ending(base, **attributes)(message, uri=uri, hint=hint)
