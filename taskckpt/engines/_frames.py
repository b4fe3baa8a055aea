"""For engines that tell nobody what they run: it stands in their own call that runs it."""

from __future__ import annotations

import sys
from typing import Any


def local_of(module: str, function: str, name: str) -> Any:
    """A local variable of the innermost call of a function that this code runs in, or None.

    It is found by its name: tools that watch tasks put wrappers in the place of functions.
    """
    names = getattr(sys.modules.get(module), "__dict__", None)
    frame = sys._getframe(1)  # noqa: SLF001 - inspect.currentframe() is the same, and slow to import
    while frame is not None:
        if frame.f_globals is names and frame.f_code.co_name == function:
            return frame.f_locals.get(name)
        frame = frame.f_back  # type: ignore[assignment]
    return None
