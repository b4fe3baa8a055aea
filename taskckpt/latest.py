"""``latest_checkpoint``: the newest of a framework's own files in a restored folder."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from taskckpt._stores.local import translating
from taskckpt.errors import NotFoundError, TaskckptWarning, UsageError, UsageTypeError

NAMED_IN_WARNING = 5


def latest_checkpoint(
    root: str | os.PathLike[str] | None,
    glob: str = "**/last.ckpt",
    key: Callable[[Path], Any] | None = None,
) -> Path | None:
    """The newest file below ``root`` that fits ``glob``; None if there is none, or if ``root`` is None.

    Only files count; empty ones and dangling links are passed over. Ties go to the natural order of the
    name, so that ``step-10`` is after ``step-9``.

    Args:
        root: A local folder, for instance what ``load`` gave.
        glob: A pattern relative to it, as for ``Path.glob``.
        key: What makes a file newer (default: its mtime).

    Raises:
        UsageError: ``root`` is a file or a remote URL, or ``glob`` is no relative pattern.
        NotFoundError: ``root`` does not exist.

    Warns:
        TaskckptWarning: Nothing fits, although the folder is not empty.
    """
    if root is None:
        return None
    folder = _checked_folder(root)
    _check_pattern(glob)
    with translating(folder):
        found = [path for path in folder.glob(glob) if _is_full_file(path)]
        if not found:
            _warn_if_not_empty(folder, glob)
            return None
        return max(found, key=lambda path: (_mtime_ns(path) if key is None else key(path), natural_order(path)))


def natural_order(path: Path) -> tuple[tuple[int, int, str], ...]:
    """A sort key in which the numbers in a name count as numbers."""
    parts = re.findall(r"\d+|\D+", str(path))
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)


def _checked_folder(root: str | os.PathLike[str]) -> Path:
    if not isinstance(root, (str, os.PathLike)):
        raise UsageTypeError(f"root must be a str or a Path, not {type(root).__name__}.")
    text = os.fspath(root)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise UsageError(f"root {text!r} is a URL.", hint="Pass the local folder that load() gave.")
    if not text.strip():
        raise UsageError("root is blank.", hint="Pass the local folder that load() gave.")
    path = Path(text)
    with translating(path):
        if not path.exists():
            raise NotFoundError("root does not exist.", uri=text)
        if path.is_dir():
            os.listdir(path)  # glob would take a folder that may not be read for an empty one
            return path
    raise UsageError(
        "root is a file, not a folder.", uri=text, hint="For bytes and files load() gives the file itself."
    )


def _check_pattern(glob: str) -> None:
    if not isinstance(glob, str):
        raise UsageTypeError(f"glob must be a str, not {type(glob).__name__}.")
    parts = glob.split("/")
    # From Python 3.13 on a**b means a*b; before, it is an error. ".." would leave the folder.
    if not glob or os.path.isabs(glob) or ".." in parts or any("**" in part and part != "**" for part in parts):
        raise UsageError(f"glob={glob!r} must be a relative pattern such as '**/last.ckpt'.")


def _is_full_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _mtime_ns(path: Path) -> int:
    return path.stat().st_mtime_ns


def _files(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield os.path.relpath(os.path.join(parent, name), folder)


def _warn_if_not_empty(folder: Path, glob: str) -> None:
    names = [name for name, _ in zip(_files(folder), range(NAMED_IN_WARNING + 1), strict=False)]
    if names:
        more = ", ..." if len(names) > NAMED_IN_WARNING else ""
        warnings.warn(
            f"Nothing in {folder} fits {glob!r}; there are: {', '.join(names[:NAMED_IN_WARNING])}{more}",
            TaskckptWarning,
            stacklevel=3,
        )
