"""The arguments of ``Checkpoint`` and its verbs, checked: what is wrong is said before anything is done."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, cast

from taskckpt._log.records import Json, Notes
from taskckpt.errors import UsageError, UsageTypeError

Target: TypeAlias = str | os.PathLike[str]
SourceKind = Literal["auto", "bytes", "folder"]

# What any reader of JSON takes for the number that it is.
HIGHEST_STEP = 2**53 - 1
# Far below where readers of JSON give up: of a record, metadata are three levels of 128.
METADATA_DEPTH = 100
# No Python can be told to read fewer digits.
METADATA_DIGITS = 640
# All metadata and metrics of a checkpoint lie in its record, which whoever lists checkpoints reads.
NOTES_LIMIT_BYTES = 64 * 1024


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


def checked_timeout(timeout_s: float) -> float:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise UsageError(f"timeout_s={timeout_s!r} must be a number of seconds above 0.")
    return float(timeout_s)


def checked_kind(kind: str) -> SourceKind:
    if kind in ("auto", "bytes", "folder"):
        return kind  # type: ignore[return-value]
    raise UsageError(f"src_kind={kind!r} must be 'auto', 'bytes' or 'folder'.")


def checked_step(step: int, *, what: str = "step") -> int:
    if isinstance(step, bool) or not isinstance(step, Integral):
        raise UsageTypeError(f"{what}={step!r} must be a whole number, not {type(step).__name__}.")
    if not 0 <= step <= HIGHEST_STEP:
        raise UsageError(f"{what}={step!r} must be from 0 to {HIGHEST_STEP}.")
    return int(step)


def checked_notes(step: int | None, metadata: Mapping[str, Json] | None, metrics: Mapping[str, float] | None) -> Notes:
    """What the user says about a checkpoint, as it comes back: numbers of NumPy as Python's, tuples as lists.

    Raises:
        UsageTypeError: Something in it has a type that JSON does not know; the message names its path.
        UsageError: It is too large or nested too deep, or a number is not finite where it must be.
    """
    notes = Notes(
        None if step is None else checked_step(step),
        {} if metadata is None else checked_metadata(metadata, "metadata"),
        {} if metrics is None else {name: _metric(name, value) for name, value in _mapping(metrics, "metrics").items()},
    )
    size = _size_of(notes) if notes.metadata or notes.metrics else 0
    if size > NOTES_LIMIT_BYTES:
        raise UsageError(
            f"The metadata and metrics take {size} bytes; {NOTES_LIMIT_BYTES} are the most.",
            hint="Put what is large into the checkpoint itself.",
        )
    return notes


def _size_of(notes: Notes) -> int:
    try:
        return len(json.dumps([notes.metadata, notes.metrics], ensure_ascii=False).encode())
    except UnicodeEncodeError as error:
        raise UsageError("The metadata or metrics hold text that is not valid Unicode.") from error


def checked_metadata(metadata: Mapping[str, Json], what: str) -> dict[str, Json]:
    """Metadata as it comes back. Raises: as ``checked_notes``."""
    return cast("dict[str, Json]", _plain(_mapping(metadata, what), what))


def _mapping(values: object, what: str) -> Mapping[Any, Any]:
    if not isinstance(values, Mapping):
        raise UsageTypeError(f"{what} must be a dict, not {type(values).__name__}.")
    wrong = [key for key in values if not isinstance(key, str)]
    if wrong:
        raise UsageTypeError(f"{what}: the key {wrong[0]!r} must be a str.")
    return values


def _plain(value: object, path: str, depth: int = METADATA_DEPTH) -> Json:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (Mapping, list, tuple)) and not depth:
        raise UsageError(f"{path[:80]}... is nested more than {METADATA_DEPTH} deep.")
    if isinstance(value, Mapping):
        items = _mapping(value, path).items()
        return {str(key): _plain(item, f"{path}[{key!r}]", depth - 1) for key, item in items}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{index}]", depth - 1) for index, item in enumerate(value)]
    if isinstance(value, Integral):
        number = int(value)
        if abs(number) >= 10**METADATA_DIGITS:
            raise UsageError(f"{path} has more than {METADATA_DIGITS} digits.", hint="Say it as text.")
        return number
    if isinstance(value, Real):
        finite = _float(value, path)
        if not math.isfinite(finite):
            raise UsageError(f"{path} is {finite}, which JSON cannot say.", hint="metrics= takes it.")
        return finite
    raise UsageTypeError(
        f"{path} is of the type {type(value).__name__}; metadata holds what JSON does.",
        hint="Put it into the checkpoint itself, or make text or a number of it.",
    )


def _metric(name: str, value: object) -> float:
    what = f"metrics[{name!r}]"
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise UsageTypeError(f"{what} is of the type {type(value).__name__}, and no number.")
    return _float(value, what)


def _float(value: object, what: str) -> float:
    try:
        return float(cast("float", value))
    except OverflowError as error:
        raise UsageError(f"{what} is larger than any float.") from error
    except (TypeError, ValueError) as error:
        raise UsageTypeError(f"{what} is of the type {type(value).__name__}, and no number.") from error
