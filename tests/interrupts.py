"""Ctrl-C, or a signal handler, at a given line of the package."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import taskckpt

PACKAGE = os.path.dirname(taskckpt.__file__) + os.sep


def interrupted_at(at: int, functions: set[str], act: Callable[[], object], interrupt: Callable[[], object]) -> bool:
    """Runs ``act`` with an interrupt before line ``at`` of these functions; whether there are so many."""
    count = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or code.co_name not in functions:
            return trace if event == "call" and code.co_filename.startswith(PACKAGE) else None
        if event == "line":
            count += 1
            if count == at:
                sys.settrace(None)
                interrupt()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count >= at


def press_ctrl_c() -> None:
    raise KeyboardInterrupt
