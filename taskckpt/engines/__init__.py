"""Workflow engines: each tells which task it is running right now. The core knows none of them.

An engine is a function without arguments that gives an ``EngineTask``, or None if it runs nothing in
this thread. It only asks modules that are imported already, and never the network.

>>> from taskckpt import engines
>>> engines.register("nightly", lambda: engines.EngineTask("nightly", run="2026-11-21", task="etl"))
>>> engines.detect().task
'etl'
>>> engines.unregister("nightly")

Others can publish theirs: a package names such a function in its entry points of the group ``taskckpt.engines``.

Several may answer at once, a Prefect task on a Dask worker in a Slurm job. The innermost one that plans
tasks gives run, task and attempt; a launcher (torchrun) and the systems around give the rank and, where the
innermost offers none, the base. From the inside out:

1. what was registered, the last first; 2. engines of entry points; 3. workflow engines; 4. queues and
clusters (``ORDER``); 5. launchers, batch systems and clouds, which say what they know in the environment.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from taskckpt.engines._task import PROCESS, EngineTask, ending, name_of
from taskckpt.errors import TaskckptError, UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "ENGINE",
    "PROCESS",
    "EngineTask",
    "detect",
    "ending",
    "explain",
    "name_of",
    "names",
    "register",
    "unregister",
]

# The group of entry points with which packages offer engines.
GROUP = "taskckpt.engines"
# Names the one engine that counts, or "none".
ENGINE = "TASKCKPT_ENGINE"
NONE = "none"

Resolver: TypeAlias = Callable[[], EngineTask | None]

# The engines of Python, from the inside out: what plans tasks before what only runs them. For each the module
# that is imported wherever it runs a task, and ours, which has a function find().
ORDER = {
    "flyte": "flyte",
    "flytekit": "flytekit",
    "metaflow": "metaflow",
    "prefect": "prefect",
    "airflow": "airflow",
    "dagster": "dagster",
    "dagster-pipes": "dagster_pipes",
    "temporal": "temporalio",
    "snakemake": "snakemake",
    "celery": "celery",
    "dramatiq": "dramatiq",
    "huey": "huey",
    "rq": "rq",
    "ray": "ray",
    "dask": "distributed",
}

_registered: dict[str, Resolver] = {}


def register(name: str, resolver: Resolver) -> None:
    """Adds an engine; those registered later are asked first (they are the inner ones)."""
    if not isinstance(name, str) or not name.strip() or name == NONE:
        raise UsageError(f"{name!r} cannot be the name of an engine.")
    if not callable(resolver):
        raise UsageError(f"The resolver of engine {name!r} is not callable.")
    _registered.pop(name, None)
    _registered[name] = resolver


def unregister(name: str) -> None:
    """Removes an engine that was registered. An unknown name is an error."""
    if _registered.pop(name, None) is None:
        raise UsageError(f"There is no engine {name!r}.", hint=f"There are: {', '.join(_registered) or 'none'}.")


def names() -> list[str]:
    """Every engine that could answer here, from the inside out."""
    return [one.name for one in _all()]


def detect() -> EngineTask | None:
    """What the engines say together of the task running in this thread; None outside of any.

    Raises:
        UsageError: ``TASKCKPT_ENGINE`` names no engine, or one that does not run here; or an engine gave nonsense.
    """
    return look().task


class Here(NamedTuple):
    """What the engines say together.

    Attributes:
        task: The task running in this thread; None outside of any.
        rank, world_size: Which of several processes this is, that a launcher started to do one thing together, and
            how many these are. A launcher may know that, and no task.
    """

    task: EngineTask | None = None
    rank: int | None = None
    world_size: int | None = None


def look() -> Here:
    """``detect``, and which of several processes this is. Raises: as ``detect``."""
    chosen = os.environ.get(ENGINE, "").strip()
    if chosen == NONE:
        return Here()
    if chosen:
        return _joined(_chosen(chosen))
    return _joined([(one.layer, task) for one in _all() if (task := one.ask()) is not None])


@dataclass(frozen=True, slots=True)
class Finding:
    """What one engine says here and now.

    Attributes:
        name: The engine.
        layer: ``"task"``, ``"launcher"`` or ``"system"``.
        task: What it runs in this thread; None if nothing.
        error: Why it could not say, if it could not.
    """

    name: str
    layer: str
    task: EngineTask | None = None
    error: Exception | None = None


def has_system() -> bool:
    """Whether a batch system or the like says which task this process is, or a program that this one starts."""
    from taskckpt.engines import environment

    said = [one.ask() for one in _ours() if one.layer == "system"]
    has_name = environment.program() is not None  # else that alone makes it ambiguous, and a child may have one
    return any(one is not None and (one.ambiguous is None or not has_name) for one in said)


def survey() -> list[Finding]:
    """What each engine says, by itself: for people who wonder why a task does not resume."""
    found = []
    for one in _all():
        try:
            found.append(Finding(one.name, one.layer, one.ask()))
        except Exception as error:  # noqa: BLE001 - one that fails must not hide the others
            found.append(Finding(one.name, one.layer, error=error))
    return found


def explain() -> str:
    """What ``taskckpt engines`` tells, from within: which task this is, who says so, and what is missing to resume."""
    from taskckpt.cli import _explain

    return _explain.text(_explain.explain())


@dataclass(frozen=True, slots=True)
class _Engine:
    name: str
    layer: str
    ask: Resolver


def _all() -> Iterator[_Engine]:
    # A copy: a resolver may register others, and so may another thread.
    yield from (_other(name, resolver) for name, resolver in reversed(list(_registered.items())))
    yield from _ours()


def _other(name: str, resolver: Resolver) -> _Engine:
    return _Engine(name, "task", functools.partial(_checked, name, resolver))


@functools.cache
def _ours() -> tuple[_Engine, ...]:
    """Those of installed packages, and of this one. Looked for once."""
    from taskckpt.engines import environment, systems

    return (
        *_published(),
        *(_Engine(name, "task", functools.partial(_ask, name, module)) for name, module in ORDER.items()),
        *(_Engine(one.name, one.layer, functools.partial(environment.find, one)) for one in systems.SYSTEMS),
    )


def _published() -> Iterator[_Engine]:
    """Those that other packages offer. Nearly always there are none, and to import what reads them takes 25 ms."""
    if not any(GROUP.encode() in text for text in _entry_points_files()):
        return
    from importlib.metadata import entry_points

    for point in entry_points(group=GROUP):
        yield _other(point.name, functools.partial(_published_by, point))


def _entry_points_files() -> Iterator[bytes]:
    for folder in dict.fromkeys(path or "." for path in sys.path):
        if os.path.isfile(folder):
            yield GROUP.encode()  # an archive, which only importlib.metadata can look into
            continue
        with suppress(OSError):  # an entry of sys.path need not be there
            for name in os.listdir(folder):
                if name.endswith((".dist-info", ".egg-info")):
                    with suppress(OSError), open(f"{folder}/{name}/entry_points.txt", "rb") as file:
                        yield file.read()


def _published_by(point: EntryPoint) -> EngineTask | None:
    try:
        resolver = _loaded(point)
    except Exception as error:
        package = point.dist.name if point.dist is not None else "?"
        raise UsageError(
            f"The engine {point.name!r} of the package {package} cannot be loaded: {type(error).__name__}: {error}.",
            hint=f"Repair or remove the package; {ENGINE}={NONE} goes without any engine.",
        ) from error
    found: EngineTask | None = resolver()
    return found


@functools.cache
def _loaded(point: EntryPoint) -> Resolver:
    resolver: Resolver = point.load()
    return resolver


def _ask(name: str, module: str) -> EngineTask | None:
    """Asks one of our own, if its engine is imported here: else it cannot run anything in this process."""
    if module not in sys.modules:
        return None
    ours = importlib.import_module(f"taskckpt.engines.{name.replace('-', '_')}")
    found: EngineTask | None = ours.find()
    return found


def _checked(name: str, resolver: Resolver) -> EngineTask | None:
    try:
        found = resolver()
    except TaskckptError:
        raise
    except Exception as error:
        raise UsageError(
            f"The engine {name!r} failed when it was asked which task this is: {type(error).__name__}: {error}.",
            hint=f"Repair it; {ENGINE}={NONE} goes without any engine.",
        ) from error
    if found is not None and not isinstance(found, EngineTask):
        raise UsageError(f"The engine {name!r} gave a {type(found).__name__}; it must give an EngineTask, or None.")
    return found


def _chosen(name: str) -> list[tuple[str, EngineTask]]:
    engines = list(_all())
    chosen = next((one for one in engines if one.name == name), None)
    if chosen is None:
        known = ", ".join(one.name for one in engines)
        raise UsageError(f"{ENGINE}={name!r} is no engine.", hint=f"There are: {known}; or {NONE}.")
    said = chosen.ask()
    if said is None:
        raise UsageError(
            f"{ENGINE}={name!r}, and {name} does not run this code.",
            hint=f"`taskckpt engines` shows what does; {ENGINE}={NONE} goes without any.",
        )
    launchers = [(one.layer, one.ask()) for one in engines if one.layer == "launcher"]
    return [("task", said), *((layer, found) for layer, found in launchers if found is not None)]


def _joined(said: list[tuple[str, EngineTask]]) -> Here:
    """One answer of several, which are in order from the inside out."""
    layers = ("task", "launcher", "system")
    planners, launchers, systems = ([task for at, task in said if at == layer] for layer in layers)
    # A launcher that does not know its run knows ranks only: the program is a task of its own, or part of another one.
    tasks = [*systems, *(one for one in launchers if one.ambiguous is None)]
    inner = _innermost(planners) or next(iter(tasks), None)
    # A worker of a cluster engine may be a rank of its batch job; the tasks that it runs are not.
    ranked = next((one for one in [*launchers, inner] if one is not None and one.rank is not None), None)
    rank, world_size = (None, None) if ranked is None else (ranked.rank, ranked.world_size)
    if inner is None:
        return Here(None, rank, world_size)
    based = next((one for one in [inner, *systems] if one.base is not None), inner)
    sources = {**inner.sources, **_told(ranked or inner, "rank", "world_size"), **_told(based, "base")}
    joined = replace(inner, rank=rank, world_size=world_size, base=based.base, sources=sources)
    return Here(replace(joined, base_is_of_run=based.base_is_of_run), rank, world_size)


def _told(task: EngineTask, *values: str) -> dict[str, str]:
    return {value: task.sources[value] for value in values if value in task.sources}


def _innermost(planners: list[EngineTask]) -> EngineTask | None:
    """The first; but what an engine says in all threads is no news in one that another engine runs a task in."""
    if threading.current_thread() is not threading.main_thread():
        own = next((one for one in planners if not one.in_all_threads), None)
        around = next((one for one in planners if one.in_all_threads), None)
        if own is not None and around is not None and planners.index(around) < planners.index(own):
            # Both: the same call of a cluster in two tasks of a workflow is two tasks.
            return replace(own, run=name_of(around.run, own.run), task=name_of(around.task, own.task), origin_run=None)
        return own or around
    return next(iter(planners), None)
