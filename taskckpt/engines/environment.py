"""Batch systems, clouds and launchers: what each says in the environment of its processes, as one table.

A job is known by its own ids and by the program that runs: a job's script often starts several programs, one
after the other, and these are several tasks. The program is the main module (``python -m a.b``) or the base name
of the script, which every rank and every child of ``multiprocessing`` shares. The same program started twice in
one job is told apart by ``TASKCKPT_INDEX``, any text, which is part of the task wherever it is set.

Items of an array are tasks of their own. Ranks are processes that do one task together. Where the environment does
not say which run or which of several tasks this is, the answer is ambiguous and says what to pass.

Everything is read from the one mapping that ``find`` takes, except the ad that HTCondor names in it, the folder
of SageMaker, and whether a person sits at a terminal. The table itself is in ``systems``.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from taskckpt.engines._task import EngineTask, name_of
from taskckpt.errors import UsageError

# Any text: which of several tasks this is, where the environment does not tell.
INDEX = "TASKCKPT_INDEX"
RUN = "TASKCKPT_RUN"

Values = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One row: what a system sets, and what that means.

    A variable may have others in its place (``A|B``: the first that is set). ``?`` at its end: it may be missing.

    Attributes:
        name: The engine's name, and the beginning of its runs.
        title: What people call it.
        source: The documentation that names the variables.
        rule: What keeps variables that leaked from misleading.
        detect: All of these are set where it runs a process.
        run: The variables that make up the run.
        items: The variables that tell apart its tasks of one program.
        attempt: The variable that counts attempts.
        counts_from: What that is on the first.
        if_missing: What it means that it is not set.
        ranks: Pairs of variables, rank and world size; the first pair that is set.
        gang: Where torchrun spans several of its items, these are nodes of one task.
        base: A variable, or a folder that counts if it is there.
        base_is_of_run: See ``EngineTask``.
        unless: Variables that mean "not here": with one of these values, or with any.
        sure: Values that only a batch job has: there, ``unless`` does not count.
        batch: No person sits at its terminal.
        not_programs: Programs that are no tasks.
        undefined: What a variable says instead of not being set.
        cut: What is not part of a variable's value.
        same_run: Why another run may have these values; ``TASKCKPT_RUN`` settles it.
        same_item: Why another task may have these values; ``TASKCKPT_INDEX`` settles it.
        hint: What to pass.
        more: Values from elsewhere, under names of their own; None: it does not run this process.
        layer: ``"system"`` or ``"launcher"``.
    """

    name: str
    title: str
    source: str
    rule: str
    detect: tuple[str, ...]
    run: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    attempt: str | None = None
    counts_from: int = 0
    if_missing: int | None = None
    ranks: tuple[tuple[str, str], ...] = ()
    gang: bool = False
    base: str | None = None
    base_is_of_run: bool = False
    unless: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sure: Mapping[str, str] = field(default_factory=dict)
    batch: bool = False
    not_programs: tuple[str, ...] = ()
    undefined: Mapping[str, str] = field(default_factory=dict)
    cut: Mapping[str, str] = field(default_factory=dict)
    same_run: str | None = None
    same_item: str | None = None
    hint: str | None = None
    more: Callable[[Values], Values | None] | None = None
    layer: str = "system"


def find(system: System, environ: Values | None = None) -> EngineTask | None:
    """What this system says of the process that this is; None if it does not run it.

    Raises:
        UsageError: A variable that counts something holds no number, or is a template that nobody replaced.
    """
    values: Values | None = os.environ if environ is None else environ
    assert values is not None
    if not all(_first(system, values, name) for name in system.detect):
        return None
    if system.more is not None:
        values = system.more(values)
        if values is None:
            return None
    here = program()
    if _leaked(system, values) or here in system.not_programs:
        return None
    return _told(system, values, here)


def _told(system: System, values: Values, here: str | None) -> EngineTask:
    run, run_from, run_known = _parts(system, values, system.run)
    spans_items = system.gang and values.get("TORCHELASTIC_RUN_ID") and values.get("GROUP_WORLD_SIZE", "1") != "1"
    items, items_from, items_known = ((), (), True) if spans_items else _parts(system, values, system.items)
    name = index(values)
    rank, world_size, ranks_from = _rank(system, values)
    base = _base(system, values)
    unknown = []
    if not values.get(RUN, "").strip() and (system.same_run or not run_known or not run):
        unknown.append(system.same_run or f"{system.title} does not say here which run this is")
    if not name and (system.same_item or not items_known):
        unknown.append(system.same_item or f"{system.title} does not say here which of its tasks this is")
    hint = (system.hint or "Name the task by TASKCKPT_TASK or key=.") if unknown else None
    if not name and here is None:
        unknown.append("this program has no name (python -c, standard input or a notebook)")
        hint = hint or f"Set {INDEX} to a name for it; or name the task by TASKCKPT_TASK or key=."
    return EngineTask(
        engine=system.name,
        run=name_of(system.name, *run),
        task=name_of(*_without_end((here or "", *items, name or ""))) or "-",
        attempt=_attempt(system, values),
        base=base,
        rank=rank,
        world_size=world_size,
        ambiguous=_sentence(unknown, system),
        hint=hint,
        base_is_of_run=base is not None and system.base_is_of_run,
        in_environment=True,
        in_all_threads=True,
        sources=_sources(
            run=(*run_from,) or (system.title,),
            task=("main program", *items_from, *((INDEX,) if name else ())),
            attempt=(system.attempt,) if system.attempt else (),
            rank=ranks_from[:1],
            world_size=ranks_from[1:],
            base=(system.base,) if base and system.base else (),
        ),
    )


def _sources(**names: tuple[str, ...]) -> dict[str, str]:
    return {value: ", ".join(of) for value, of in names.items() if of}


def _without_end(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Parts that are missing keep their place, so that no others read the same; at the end they need not."""
    while parts and not parts[-1]:
        parts = parts[:-1]
    return parts


def _sentence(reasons: list[str], system: System) -> str | None:
    text = "; ".join(reasons)
    begins = text if text.startswith(system.title) else f"{text[:1].upper()}{text[1:]}"
    return f"{begins}." if text else None


def _get(system: System, values: Values, name: str) -> str | None:
    """A variable that says something."""
    value = values.get(name)
    if not value or not value.strip() or value == system.undefined.get(name):
        return None
    return re.sub(system.cut[name], "", value) or None if name in system.cut else value


def _first(system: System, values: Values, names: str) -> tuple[str, str] | None:
    """The first of several variables that says something, and what."""
    return next(((one, text) for one in names.split("|") if (text := _get(system, values, one))), None)


def _parts(system: System, values: Values, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """What these variables say, which they are, and if all are there that must be."""
    found = [_first(system, values, name.removesuffix("?")) for name in names]
    known = all(one or name.endswith("?") for one, name in zip(found, names, strict=True))
    return tuple(one[1] if one else "" for one in found), tuple(one[0] for one in found if one), known


def _leaked(system: System, values: Values) -> bool:
    if system.batch and _at_a_terminal():
        return True
    if system.sure and all(values.get(name) == value for name, value in system.sure.items()):
        return False
    return any(
        (value := values.get(name)) is not None and (not only or value in only) for name, only in system.unless.items()
    )


def _at_a_terminal() -> bool:
    try:
        return os.isatty(0)
    except OSError:
        return False


def index(values: Values) -> str | None:
    """Which item this is, if that was said."""
    text = values.get(INDEX, "")
    if text.strip().startswith("{{"):
        raise UsageError(f"{INDEX}={text!r} is a template that nobody replaced.")
    return text if text.strip() else None


def _attempt(system: System, values: Values) -> int | None:
    found = _first(system, values, system.attempt) if system.attempt else None
    return _count(*found, counts_from=system.counts_from) if found else system.if_missing


def _rank(system: System, values: Values) -> tuple[int | None, int | None, tuple[str, ...]]:
    for names in system.ranks:
        rank, size = (_get(system, values, name) for name in names)
        if rank and size:
            number, of = _count(names[0], rank), _count(names[1], size)
            if number >= max(of, 1):
                raise UsageError(f"{names[0]}={rank!r} is no rank of {names[1]}={size!r} processes.")
            return number, of, names
    return None, None, ()


def _count(name: str, text: str, *, counts_from: int = 0) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) < counts_from:
        raise UsageError(f"{name}={text[:80]!r} must be a whole number from {counts_from} on.")
    return int(text) - counts_from


def _base(system: System, values: Values) -> str | None:
    if system.base is None or not system.base.startswith("/"):
        return _get(system, values, system.base) if system.base else None
    return system.base if os.path.isdir(system.base) else None


@contextmanager
def acting_for(command: str) -> Generator[None]:
    """Inside, this process is the program that it is asked about, or that it is about to start."""
    token = _acting_for.set(command)
    try:
        yield
    finally:
        _acting_for.reset(token)


_acting_for: ContextVar[str | None] = ContextVar("taskckpt_program", default=None)


def lasting(path: str) -> str:
    """A path without the folder that is another one on each attempt."""
    path = os.path.realpath(path)
    for folder in filter(None, map(os.environ.get, ("_CONDOR_SCRATCH_DIR", "TMPDIR", "AZ_BATCH_NODE_ROOT_DIR"))):
        path = path.removeprefix(os.path.realpath(folder))
    return path


def whole_program() -> str:
    """What is run, and with which arguments: for two that have one name in one job."""
    main = sys.modules.get("__mp_main__") or sys.modules.get("__main__")
    path = lasting(getattr(main, "__file__", None) or "")
    arguments = hashlib.sha256("\0".join(sys.argv[1:]).encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{path} {arguments}"


def program() -> str | None:
    """The program that this process runs, by name; None for ``python -c``, standard input and notebooks."""
    if (command := _acting_for.get()) is not None:
        return command
    # While a child of multiprocessing imports the main module, __main__ is still that of the child's command line.
    return next(filter(None, (_program(sys.modules.get(name)) for name in ("__main__", "__mp_main__"))), None)


def _program(main: Any) -> str | None:
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name not in ("__main__", "__mp_main__"):  # python -m package.module
        return str(spec.name).removesuffix(".__main__")
    path = getattr(main, "__file__", None)
    if not isinstance(path, str) or path.startswith("<"):
        return None
    folder, name = os.path.split(path)
    # A folder or an archive that is run is named like a script.
    return os.path.basename(os.path.abspath(folder)) if name in ("__main__.py", "__main__.pyc") else name
