"""Who is this, who says so, and what is missing: for a task that does not resume.

It looks at what ``taskckpt.ctx()`` decides from, and decides nothing itself. It never claims a task.
"""

from __future__ import annotations

import difflib
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from taskckpt import context, engines
from taskckpt._log.slots import new_nonce
from taskckpt._operation import Stop
from taskckpt._stores import Location, open_store, parse
from taskckpt._task_context import MADE_UP, TaskContext
from taskckpt.cli._exits import described
from taskckpt.cli._output import JSON, plain
from taskckpt.engines import EngineTask, Finding
from taskckpt.engines.environment import acting_for
from taskckpt.errors import TaskckptError

TIMEOUT_S = 10.0

VALUES = ("run", "task", "attempt", "rank", "world_size", "base", "origin_run", "generation")
VARIABLES = [
    f"TASKCKPT_{end}"
    for end in (
        *(
            "BASE",
            "RUN",
            "TASK",
            "ATTEMPT",
            "KEY",
            "KEEP",
            "CLAIMS",
            "AMBIGUOUS",
            "ENGINE",
            "INDEX",
            "SCOPE",
            "RANK",
            "PLACE",
        ),
        *("ON_CLEAR", "JOB_UID", "TMP", "TRANSFER"),
    )
]

# File systems that several hosts see, and such as end with a container or a boot.
SHARED = ("nfs", "lustre", "ceph", "gluster", "gpfs", "beegfs", "cifs", "smb", "9p", "virtiofs", "fuse", "weka", "pvfs")
PASSING = ("tmpfs", "ramfs", "rootfs", "overlay", "aufs")

FROM_WITHIN = (
    "This is a process of its own: what runs inside a Python process (Prefect, Celery, Ray and so on) can only be seen "
    "there. In the task itself: print(taskckpt.engines.explain())"
)

BY_PROGRAM = (
    "Here the task is called after the program, which is `taskckpt` itself now. For yours: taskckpt engines --program "
    "train.py, or the name of its module; `taskckpt run` calls it after the whole command."
)

AT_A_TERMINAL = (
    "At a terminal, variables of a batch system are taken for leaked ones. What a job sees: taskckpt engines </dev/null"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is missing, and what to do about it. ``code`` is for programs."""

    code: str
    message: str
    hint: str | None = None


@dataclass(slots=True)
class Base:
    """The place where all tasks lie. What was not tried is None."""

    uri: str
    origin: str
    file_system: str | None = None
    reachable: bool | None = None
    writable: bool | None = None
    took_s: float | None = None


@dataclass(slots=True)
class Explanation:
    """All that there is to say.

    Attributes:
        findings: What each engine says by itself.
        engine: What they say together.
        context: What ``taskckpt.ctx()`` is, therefore.
        problems: What would make a task not resume, or resume from another's state.
        notes: What may be as it was meant.
    """

    findings: list[Finding] = field(default_factory=list)
    engine: EngineTask | None = None
    context: TaskContext | None = None
    base: Base | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_by_program(self) -> bool:
        """Whether the task is called after the program that runs, by a batch system."""
        who = self.context
        by = None if who is None or who.engine is None or not who.engine.in_environment else who.engine.engine
        return who is not None and by is not None and who.origins.get("task") == by

    @property
    def detected(self) -> list[Finding]:
        """The engines that run this."""
        return [one for one in self.findings if one.task is not None]

    def failed(self, error: Exception) -> None:
        """Something could not be told: that is told, once."""
        about = described(error)
        message = str(about["message"])
        if not any(message in one.message for one in self.problems):
            self.problems.append(Problem(str(about["error"]), message, about["hint"]))


def explain(*, program: str | None = None, check_base: bool = False, timeout_s: float = TIMEOUT_S) -> Explanation:
    """Asks every engine, and looks at the base; with ``check_base`` something is written there, and deleted.

    A batch system's tasks are called after the program; ``program`` is the one that is meant, if it is not this one.
    """
    with acting_for(program) if program else nullcontext():
        return _explained(check_base=check_base, timeout_s=timeout_s)


def _explained(*, check_base: bool, timeout_s: float) -> Explanation:
    found = Explanation()
    try:
        found.findings = engines.survey()
    except Exception as error:  # noqa: BLE001 - an engine of somebody's package, that cannot even be loaded
        found.failed(error)
    for one in found.findings:
        if one.error is not None:
            about = described(one.error)
            hint = about["hint"] if isinstance(one.error, TaskckptError) else None
            found.problems.append(Problem("engine-failed", f"{one.name} could not be asked: {about['message']}", hint))
    _identify(found)
    _find_base(found)
    if found.base is not None:
        _judge_base(found, found.base)
        _try_base(found, found.base, check=check_base, timeout_s=timeout_s)
    found.notes += _slips()
    return found


def _identify(found: Explanation) -> None:
    for ask, name in ((engines.detect, "engine"), (context.ctx, "context")):
        try:
            setattr(found, name, ask())
        except Exception as error:  # noqa: BLE001 - whatever an engine raises
            found.failed(error)
    who, engine = found.context, found.engine
    if who is None and not found.problems:
        hint = "Name it: TASKCKPT_KEY, or TASKCKPT_RUN and TASKCKPT_TASK; in Python @task, or checkpoint('my-task')."
        found.problems.append(Problem("no-task-context", "Nobody says which task this is.", hint))
    if who is not None and engine is not None and engine.ambiguous and who.origins.get("task") == engine.engine:
        found.problems.append(Problem("ambiguous-identity", engine.ambiguous, engine.hint))


# --- the base ----------------------------------------------------------------------------------


def _find_base(found: Explanation) -> None:
    if found.context is not None:
        found.base = Base(found.context.base, found.context.origins.get("base", "unknown"))
        return
    try:
        found.base = Base(*context.base_and_origin())
    except Exception as error:  # noqa: BLE001 - as above
        found.failed(error)


def _judge_base(found: Explanation, base: Base) -> None:
    """Whether another attempt finds it, perhaps on another host."""
    where = parse(base.uri, what="base")
    shared = "Set TASKCKPT_BASE to a place that all hosts share, such as s3://bucket/runs or a network disk."
    if where.in_one_process:
        found.problems.append(Problem("base-in-memory", "The base lasts as long as one process.", shared))
        return
    if not where.is_local:
        return
    base.file_system, mount = _mounted(where.path)
    several = [one.name for one in found.detected]
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        several.append("a pod of Kubernetes")
    host = platform.node()
    if base.origin == MADE_UP:
        what = f"Nobody named a base: state goes to {base.uri}, below where this was started, on host {host} only."
        found.problems.append(Problem("base-made-up", what, shared))
        return
    offered = base.origin in [one.name for one in found.detected]
    if not several or offered or base.file_system is None or base.file_system.startswith(SHARED):
        return
    if base.file_system.startswith(PASSING) or mount == "/":
        what = f"The base is on a disk of host {host} ({base.file_system}), and {several[0]} may run a retry elsewhere."
        found.problems.append(Problem("base-local", what, shared))
    else:
        found.notes.append(f"The base is on {mount} ({base.file_system}): a retry must find the same disk there.")


def _mounted(path: str) -> tuple[str | None, str | None]:
    """The type of the file system that a path is on, and where that is mounted; None where nobody tells."""
    real = os.path.realpath(path)
    found: tuple[str | None, str | None] = (None, None)
    longest = -1
    with suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            _, at, kind, *_ = line.split(" ")
            at = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), at)
            inside = real == at or real.startswith(at.rstrip("/") + "/")
            if inside and len(at) >= longest:  # of several at one place the last is seen
                longest, found = len(at), (kind, at)
    return found


def _try_base(found: Explanation, base: Base, *, check: bool, timeout_s: float) -> None:
    """Lists it; and writes, if ``check``. A disk or a store that hangs does not hang this."""
    failed: list[Exception] = []

    def look() -> None:
        where = parse(base.uri, what="base")
        options = {} if found.context is None else dict(found.context.storage_options)
        try:
            if where.is_local:
                base.writable = _may_write(where.path)
            open_store(where, storage_options=options, timeout_s=timeout_s).folders("")
            base.reachable = True
            if check:
                _write(where, options, timeout_s)
                base.writable = True
        except Exception as error:  # noqa: BLE001 - in a thread, where nobody else would see it
            failed.append(error)

    began = time.monotonic()
    looking = threading.Thread(target=look, name="taskckpt-base", daemon=True)
    looking.start()
    looking.join(timeout_s + 1)
    base.took_s = round(time.monotonic() - began, 3)
    if looking.is_alive():
        base.reachable = False
        what = f"The base did not answer within {timeout_s:g} s: {base.uri}"
        found.problems.append(Problem("base-unreachable", what))
    elif failed:
        base.reachable, base.writable = base.reachable or False, False if base.reachable else None
        about = described(failed[0])
        verb = "written to" if base.reachable else "listed"
        what = f"The base cannot be {verb}: {about['message']}"
        found.problems.append(Problem(f"base-{about['error']}", what, about["hint"]))
    elif base.writable is False:
        found.problems.append(Problem("base-denied", f"The base is not writable: {base.uri}"))


def _may_write(path: str) -> bool:
    """As permissions say, of the folder or the one that it would be made in."""
    while not os.path.lexists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def _write(base: Location, options: Mapping[str, Any], timeout_s: float) -> None:
    place = base.child(f"taskckpt-check-{new_nonce()}")
    store = open_store(place, storage_options=options, timeout_s=timeout_s)
    store.create("probe", b"taskckpt engines --check-base", Stop())
    store.delete(["probe"])
    if place.is_local:
        os.rmdir(place.path)


def _slips() -> Iterator[str]:
    """Variables that nobody reads."""
    for name in sorted(os.environ):
        if name.startswith("TASKCKPT") and name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, n=1)
            yield f"{name} is no variable of taskckpt{f': is it {near[0]}?' if near else '.'}"


# --- in words, and for programs ----------------------------------------------------------------


def text(found: Explanation, *, every: bool = False, within: bool = True) -> str:
    """For people. ``every`` engine gets a line; ``within`` the task, whose engine can be seen."""
    lines = [f"taskckpt {_version()}, Python {platform.python_version()}, pid {os.getpid()} on {platform.node()}"]
    for one in found.detected:
        lines += ["", f"{one.name} ({one.layer}) runs this:"]
        lines += _rows(_values(one.task), one.task.sources if one.task else {})
        if one.task is not None and one.task.ambiguous:
            lines.append(f"  ambiguous  {one.task.ambiguous}")
    if not found.detected:
        lines += ["", "No engine runs this."]
    others = [one for one in found.findings if one.task is None]
    if every:
        lines += ["", "Not here:"]
        lines += _rows({one.name: str(one.error) if one.error else "not detected" for one in others}, {})
    else:
        lines += ["", f"Asked, and not here: {', '.join(one.name for one in others)}."]
    if not within:
        lines.append(FROM_WITHIN)
    lines += ["", "So taskckpt.ctx() is:" if found.context else "So taskckpt.ctx() is nobody."]
    if found.context is not None:
        lines += _rows(_seen(_of_context(found.context)), {**found.context.origins, **_key_origin(found.context)})
    lines += ["", f"Base: {_base_in_words(found.base)}", *_listed("Note", found.notes)]
    missing = [f"{one.message}{f' Hint: {one.hint}' if one.hint else ''}" for one in found.problems]
    lines += _listed("Missing", missing) if missing else ["", "Nothing is missing: a retry finds what this task saves."]
    return "\n".join(_masked(plain(line)) for line in lines)


def fields(found: Explanation) -> dict[str, JSON]:
    """The same for programs: all engines, always."""
    who, base = found.context, found.base
    document: dict[str, JSON] = {
        "taskckpt": _version(),
        "python": platform.python_version(),
        "host": platform.node(),
        "pid": os.getpid(),
        "engines": [
            {
                "name": one.name,
                "layer": one.layer,
                "detected": one.task is not None,
                "error": None if one.error is None else described(one.error)["message"],
                "task": _task_fields(one.task),
            }
            for one in found.findings
        ],
        "engine": _task_fields(found.engine),
        "context": None if who is None else {**_of_context(who), "origins": dict(who.origins)},
        "base": None
        if base is None
        else {
            name: getattr(base, name) for name in ("uri", "origin", "file_system", "reachable", "writable", "took_s")
        },
        "variables": sorted(name for name in os.environ if name.startswith("TASKCKPT")),
        "problems": [{"code": one.code, "message": one.message, "hint": one.hint} for one in found.problems],
        "notes": found.notes,
    }
    masked: dict[str, JSON] = _each(document, _masked)
    return masked


def _values(task: EngineTask | None) -> dict[str, JSON]:
    return {} if task is None else {name: value for name in VALUES if (value := getattr(task, name)) is not None}


def _task_fields(task: EngineTask | None) -> dict[str, JSON] | None:
    if task is None:
        return None
    values: dict[str, JSON] = {name: getattr(task, name) for name in VALUES}
    return {
        "engine": task.engine,
        **values,
        "ambiguous": task.ambiguous,
        "hint": task.hint,
        "sources": dict(task.sources),
    }


def _of_context(who: TaskContext) -> dict[str, JSON]:
    values = ("run", "task", "attempt", "key", "rank", "world_size", "base")
    return {**{name: getattr(who, name, None) for name in values}, "place": who.place.uri}


def _seen(values: Mapping[str, JSON]) -> dict[str, JSON]:
    """Without what hardly any task has."""
    return {name: value for name, value in values.items() if value is not None or name in ("attempt", "key")}


def _key_origin(who: TaskContext) -> dict[str, str]:
    return {} if who.key is None or "key" in who.origins else {"key": who.origins.get("task", "unknown")}


def _rows(values: Mapping[str, JSON], sources: Mapping[str, str]) -> list[str]:
    """A value a line, and what it was read from, below each other."""
    shown = {name: "-" if value is None else str(value) for name, value in values.items()}
    first = max((len(name) for name in shown), default=0)
    second = max((len(value) for value in shown.values() if len(value) <= 40), default=0)
    lines = []
    for name, value in shown.items():
        origin = sources.get(name) if value != "-" else None
        source = "" if not origin else "  (nobody said)" if origin == MADE_UP else f"  from {origin}"
        lines.append(f"  {name:<{first}}  {value:<{second}}{source}".rstrip())
    return lines


def _base_in_words(base: Base | None) -> str:
    if base is None:
        return "not known"
    kind = f" ({base.file_system})" if base.file_system else ""
    can = "can be listed" if base.reachable else "cannot be listed"
    writes = {True: ", and written to", False: ", but not written to", None: "; --check-base tries to write"}
    return f"{base.uri}{kind} {can}{writes[base.writable] if base.reachable else ''}."


def _listed(title: str, texts: list[str]) -> list[str]:
    return ["", *(f"{title}: {one}" for one in texts)] if texts else []


def _masked(told: str) -> str:
    """Without what may stand in a URL: a password, or a signed query."""
    told = re.sub(r"(://)[^/@\s:]*:[^/@\s]*@", r"\1***@", told)
    return re.sub(r"(://[^\s?]*\?)[^\s,;)]+", r"\1***", told)


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """The same with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _each(one, change) for name, one in value.items()}
    return [_each(one, change) for one in value] if isinstance(value, list) else value


def _version() -> str:
    try:
        return version("taskckpt")
    except PackageNotFoundError:  # run from its sources
        return "of unknown version"
