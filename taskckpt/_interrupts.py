"""Whether a signal handler runs here: Python does not say."""

from __future__ import annotations

import signal
import sys
from functools import partial
from types import CodeType, FrameType, MethodType

# Of the handlers that were seen. One that runs may have been replaced already, even by itself.
_handlers: set[CodeType] = set()

_CO_VARARGS = 4  # inspect.CO_VARARGS, without importing all of that

# What gives another value to a variable of a function, or none.
_REBINDS = {
    "STORE_FAST", "STORE_FAST_LOAD_FAST", "STORE_FAST_STORE_FAST", "STORE_DEREF", "DELETE_FAST", "DELETE_DEREF",
}  # fmt: skip


def note_handlers() -> None:
    """Those that are installed now will be known again."""
    for number in signal.valid_signals():
        code = _code_of(signal.getsignal(number))
        if code is not None:
            _handlers.add(code)


def is_interrupting(consumer: int | None) -> bool:
    """Whether a signal handler calls this, in the middle of that frame's body (its ``id``), or of a loop here.

    Then the item is not done, whatever the handler saves.
    """
    note_handlers()
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None and id(frame) != consumer:
        if _is_signal_handler(frame):
            return True
        frame = frame.f_back
    return False


def _is_signal_handler(frame: FrameType) -> bool:
    """Whether it was called by Python itself: with the frame that it interrupts, which is its caller.

    A handler can be called by the body, too. If it is one and has rebound its arguments, as by ``del frame``, then
    nothing tells how it was called; there is doubt, which counts as an interrupt.
    """
    code = frame.f_code
    names, values = _arguments(code), frame.f_locals
    given = [values.get(name) for name in names]
    if code.co_flags & _CO_VARARGS and isinstance(given[-1], tuple):
        given += given[-1]
    if any(value is frame.f_back for value in given):
        return True
    return code in _handlers and _rebinds(code, set(names))


def _arguments(code: CodeType) -> tuple[str, ...]:
    has_more = bool(code.co_flags & _CO_VARARGS)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + has_more]


def _rebinds(code: CodeType, names: set[str]) -> bool:
    import dis  # takes a while to import, and is hardly ever needed

    return any(
        instruction.opname in _REBINDS
        and names.intersection(instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,))
        for instruction in dis.get_instructions(code)
    )


def _code_of(handler: object) -> CodeType | None:
    """What runs first of it."""
    while isinstance(handler, (partial, MethodType)):
        handler = handler.func if isinstance(handler, partial) else handler.__func__
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = type(handler).__call__
    code = getattr(handler, "__code__", None)
    return code if isinstance(code, CodeType) else None
