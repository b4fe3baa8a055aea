"""What a stage was made from, as a short text that can be compared later. Nothing of it can be read back."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from taskckpt import _states
from taskckpt.errors import UsageError, UsageTypeError


def fingerprint_of(function: Callable[..., object], /, *args: object, **kwargs: object) -> str:
    """A fingerprint of a function's source and its arguments, for ``run(..., fingerprint=fingerprint_of)``.

    It sees the function's own lines, comments included. It does not see what that calls or captures, nor what is in
    the files that its arguments name: give a fingerprint of your own where these matter.

    Args:
        function: A function with a source file, or a ``functools.partial`` of one.
        *args: What it is called with: plain values, containers and arrays, as in ``save_state``.
        **kwargs: The same, by name.

    Raises:
        UsageError: There is no source: it was typed at a prompt, or is not written in Python.
        UsageTypeError: An argument is nothing that a state can hold, or the function does not take it.
    """
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain, args, kwargs = plain.func, (*plain.args, *args), {**plain.keywords, **kwargs}
    try:
        bound = inspect.signature(plain).bind(*args, **kwargs)
        source = inspect.getsource(inspect.unwrap(plain))
    except (OSError, TypeError, ValueError) as error:
        name = getattr(plain, "__qualname__", repr(plain))
        kind = UsageTypeError if isinstance(error, TypeError) else UsageError
        raise kind(
            f"{name} has no fingerprint: {error}.", hint="Pass a version of your own: fingerprint='v1'."
        ) from error
    bound.apply_defaults()
    return digest_of({"source": source, "arguments": bound.arguments})


def digest_of(value: object) -> str:
    """The SHA-256 of a value as a state stores it: equal for equal values of the same types, and for no others.

    Raises:
        UsageTypeError: There is something in it that a state cannot hold; the message names its path.
    """
    with naming("fingerprint"):
        _states.encode({"fingerprint": value})  # refuses what cannot be walked: containers that hold themselves
        encoded = _states.encode({"fingerprint": _in_order(value)})
    digest = hashlib.sha256()
    for chunk in encoded.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def _in_order(value: object) -> object:
    """Equal dicts, whatever the order in which they were filled, become the same one."""
    if type(value) is dict:
        return {key: _in_order(value[key]) for key in sorted(value, key=_rank)}
    if type(value) is list:
        return [_in_order(one) for one in value]
    if type(value) is tuple:
        return tuple(_in_order(one) for one in value)
    return value


def _rank(key: object) -> bytes:
    return b"".join(map(bytes, _states.encode({"key": key}).chunks()))


@contextmanager
def naming(key: str, what: str | None = None) -> Generator[None]:
    """Errors about ``state[key]`` speak of ``what`` instead: the caller gave no state."""
    try:
        yield
    except UsageError as error:
        message = error.message.replace(f'state["{key}"]', what or key)
        raise type(error)(message, uri=error.uri, hint=error.hint) from error
