"""How far a save or a load has come: told to a function of the user's, or shown as a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from taskckpt.errors import MissingDependencyError, UsageTypeError

if TYPE_CHECKING:
    from tqdm.std import tqdm

# True for a bar, or a function of (bytes done, bytes in all).
Progress: TypeAlias = bool | Callable[[int, int], object]

Report: TypeAlias = Callable[[int, int], object]


def checked_progress(progress: Progress | None) -> Progress | None:
    """Refused before anything is done: neither yes, no nor a function, or a bar without the package that draws it."""
    if progress is None or callable(progress):
        return progress
    if not isinstance(progress, bool):
        raise UsageTypeError(
            f"progress= takes True or a function of (done_bytes, total_bytes), not {type(progress).__name__}."
        )
    if progress:
        _bar_class()
    return progress


@contextmanager
def reporting(progress: Progress | None, title: str) -> Generator[Report | None]:
    """What is to be called as bytes get done; None where nobody wants to know, so that silence costs nothing.

    A bar shows up in a notebook, and on a terminal; it is silent where the output goes to a file.
    """
    if progress is None or progress is False:
        yield None
        return
    if progress is not True:
        yield progress
        return
    bar: tqdm[Any] | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = _bar_class()(
                total=total, desc=title, unit="B", unit_scale=True, unit_divisor=1024, disable=not _is_watched()
            )
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def _is_watched() -> bool:
    # Not tqdm's own disable=None: in a notebook, where stdout is no terminal, that hides the bar too.
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _bar_class() -> type[tqdm[Any]]:
    try:
        from tqdm.auto import tqdm as bar
    except ImportError as error:
        raise MissingDependencyError(
            "progress=True shows a bar of the package tqdm, which is not installed.",
            hint="pip install 'taskckpt[progress]', or pass a function of (done_bytes, total_bytes).",
        ) from error
    return bar
