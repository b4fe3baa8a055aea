"""Workflow engines: each tells which task it is running right now. A small registry; the core knows no engine.

An engine is a function without arguments that gives an ``EngineTask``, or None if it runs nothing in
this thread. It only asks modules that are imported already, and never the network.

>>> from taskckpt import engines
>>> engines.register("nightly", lambda: engines.EngineTask("nightly", run="2026-11-21", task="etl"))
>>> engines.detect().task
'etl'
>>> engines.unregister("nightly")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from taskckpt.errors import UsageError


@dataclass(frozen=True, slots=True)
class EngineTask:
    """What an engine knows of the task that it is running.

    Attributes:
        engine: The engine's name.
        run: The run that the task belongs to.
        task: The task's identity within the run: the same on every retry, and no other task's.
        attempt: Counted from 0, or None if the engine does not tell.
        base: A durable place that the engine offers, or None.
    """

    engine: str
    run: str
    task: str
    attempt: int | None = None
    base: str | None = None


Resolver: TypeAlias = Callable[[], EngineTask | None]

_resolvers: dict[str, Resolver] = {}


def register(name: str, resolver: Resolver) -> None:
    """Adds an engine; those registered later are asked first (they are the inner ones)."""
    if not callable(resolver):
        raise UsageError(f"The resolver of engine {name!r} is not callable.")
    _resolvers[name] = resolver


def unregister(name: str) -> None:
    """Removes an engine. An unknown name is an error."""
    if _resolvers.pop(name, None) is None:
        raise UsageError(f"There is no engine {name!r}.", hint=f"There are: {', '.join(_resolvers) or 'none'}.")


def detect() -> EngineTask | None:
    """What the innermost engine says of the task running in this thread; None outside of any."""
    for resolver in reversed(_resolvers.values()):
        found = resolver()
        if found is not None:
            return found
    return None
