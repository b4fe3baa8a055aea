"""Which task a call is: the function and its arguments as one text, the same in every process."""

from __future__ import annotations

import dis
import inspect
import json
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from taskckpt.errors import AmbiguousIdentityError, UsageError


def identity_of(function: Callable[..., Any], args: Any, kwargs: Any) -> str:
    """The function and its arguments as one text: the same in every process that makes the same call."""
    name = getattr(function, "__qualname__", None)
    if name is None or name.endswith("<lambda>"):
        raise UsageError(
            "A lambda, a partial or an object has no stable name.", hint="Name the task: @task(key='my-task')."
        )
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    try:
        arguments = ", ".join(f"{one}={canonical(value, one)}" for one, value in bound.arguments.items())
    except (RecursionError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"An argument cannot be named: {error}.", hint="Name the task: @task(key=...).") from error
    captured = "".join(f" with {one}={value}" for one, value in constants_around(function))
    return f"{name}({arguments}){captured} @ {_module_of(function)}"


def constants_around(function: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """Captured variables that tell apart functions of one name: constants, and other functions by their names.

    Not those that the function itself assigns: they change from call to call.
    """
    code = getattr(function, "__code__", None)
    assigned = {one.argval for one in dis.get_instructions(code) if one.opname == "STORE_DEREF"} if code else set()
    for name, value in sorted(_cells(function), key=lambda cell: cell[0]):
        if name in assigned:
            continue
        if _is_constant(value):
            yield name, canonical(value, name)
        elif inspect.isfunction(value):
            yield name, f"{value.__module__}.{value.__qualname__}"


def _module_of(function: Callable[..., Any]) -> str:
    if function.__module__ not in ("__main__", "__mp_main__") and not function.__module__.startswith("<"):
        return str(function.__module__)
    # The function's own globals: under a profiler or runpy, __main__ is somebody else.
    main: Mapping[str, Any] = getattr(function, "__globals__", {})
    spec = main.get("__spec__")
    if spec is not None and spec.name not in ("__main__", "__mp_main__"):  # python -m package.module
        return str(spec.name).removesuffix(".__main__")
    path: str | None = main.get("__file__")
    if path is None or path.startswith("<"):  # <stdin>
        raise UsageError(
            f"{function.__qualname__} is defined in a notebook or at a prompt, which has no stable name.",
            hint="Name the task: @task(key='my-task'); or, where arguments tell calls apart, "
            "@task(key=lambda day: f'my-task {day}').",
        )
    # Its folder may be reached by several ways; its own name may be one of several links to one file.
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def canonical(value: object, name: str) -> str:
    """A plain value as text, the same for equal values of the same type, and for no others."""
    match value:
        case None | bool() | int() | float() if type(value) in (type(None), bool, int, float):
            return repr(value)
        case str() if type(value) is str:
            return _quoted(value)
        case bytes() if type(value) is bytes:
            return repr(value)
        case os.PathLike():
            return f"Path({_quoted(os.fsdecode(os.fspath(value)))})"
        case list() | tuple() if type(value) in (list, tuple):
            inner = ", ".join(canonical(item, f"{name}[{index}]") for index, item in enumerate(value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
        case dict() if type(value) is dict:
            items = sorted((canonical(k, name), canonical(v, f"{name}[{k!r}]")) for k, v in value.items())
            return "{" + ", ".join(f"{k}: {v}" for k, v in items) + "}"
        case set() | frozenset() if type(value) in (set, frozenset):
            return f"{type(value).__name__}({sorted(canonical(item, name) for item in value)})"
        case _:
            pass
    raise UsageError(
        f"The argument {name} is a {type(value).__name__}: the task's identity cannot be told from it.",
        hint="Name the task: @task(key=lambda ...: ...), from the arguments that tell calls apart.",
    )


def _quoted(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return repr(text)  # lone surrogates, written out
    return json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class _Known:
    """The function that was called for a place, as it was then."""

    function: Callable[[], Callable[..., Any] | None]
    code: object
    captured: Mapping[str, object]


_known: OrderedDict[str, _Known] = OrderedDict()
_MOST_KNOWN = 10_000
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def expect_one_function(function: Callable[..., Any], place: str) -> None:
    """Functions made in a loop share their name; they must not differ in the variables that they capture."""
    now = _Known(weakref.ref(function), getattr(function, "__code__", None), _captured(function))
    with _lock:
        known = _known.pop(place, now)
        other = known.function()
        if other is None and known.code != now.code:
            known = now  # it was changed and loaded again
        _known[place] = known if other is not None else now
        while len(_known) > _MOST_KNOWN:
            _known.popitem(last=False)
    if other is function:
        return
    same = known.code == now.code and known.captured == now.captured
    if not same or (other is not None and not _capture_the_same(other, function)):
        raise AmbiguousIdentityError(
            f"Two functions called {function.__qualname__} were made here, with different variables around them.",
            hint="Pass these as arguments, or name each task: @task(key=...).",
        )


def _cells(function: Callable[..., Any]) -> Iterator[tuple[str, object]]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents


def _captured(function: Callable[..., Any]) -> dict[str, object]:
    """The captured variables that are plain and cannot change by themselves, so that they can be compared later."""
    return {name: (type(value), value) for name, value in _cells(function) if _is_constant(value)}


def _is_constant(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_constant, value))
    return type(value) in (type(None), bool, int, float, str, bytes) or isinstance(value, PurePath)


def _capture_the_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """For all else: the same object, or a function or class of the same name."""
    ones, others = ({name: value for name, value in _cells(f) if not _is_constant(value)} for f in (one, other))
    return ones.keys() == others.keys() and all(_is_same(ones[name], others[name]) for name in ones)


def _is_same(one: object, other: object) -> bool:
    name = getattr(one, "__qualname__", None)
    return one is other or (name is not None and name == getattr(other, "__qualname__", None))
