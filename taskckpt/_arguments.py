"""The arguments of ``Checkpoint``, checked when it is made: what is wrong is said before anything is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from taskckpt.errors import UsageError, UsageTypeError

Target: TypeAlias = str | os.PathLike[str]
SourceKind = Literal["auto", "bytes", "folder"]


def as_sources(src: Target | Sequence[Target] | None) -> Sequence[Target]:
    if src is None:
        return ()
    if isinstance(src, (str, os.PathLike)):
        return (src,)
    if isinstance(src, Sequence) and not isinstance(src, (bytes, bytearray, memoryview)):
        return src
    raise UsageTypeError(f"src must be a str, a Path or a sequence of them, not {type(src).__name__}.")


def checked_options(storage_options: Mapping[str, Any] | None) -> dict[str, Any]:
    if storage_options is not None and not isinstance(storage_options, Mapping):
        raise UsageTypeError(f"storage_options must be a dict, not {type(storage_options).__name__}.")
    return dict(storage_options or {})


def checked_keep(keep: int | None) -> int | None:
    if keep is None or (isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1):
        return keep
    raise UsageError(f"keep={keep!r} must be at least 1, or None to keep all.")


def checked_timeout(timeout_s: float) -> float:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise UsageError(f"timeout_s={timeout_s!r} must be a number of seconds above 0.")
    return float(timeout_s)


def checked_kind(kind: str) -> SourceKind:
    if kind in ("auto", "bytes", "folder"):
        return kind  # type: ignore[return-value]
    raise UsageError(f"src_kind={kind!r} must be 'auto', 'bytes' or 'folder'.")
