"""The fields of a record, read as the types that they must have. Nothing in them is believed unchecked. Pure."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

# What any reader of JSON takes for the number that it is.
HIGHEST_NUMBER = 2**53 - 1
# Far from where readers of JSON give up.
DEEPEST = 128
# One for each rollback since the lowest retained commit.
MOST_SPANS = 100_000

ValueT = TypeVar("ValueT")


class Malformed(Exception):  # noqa: N818 - becomes CorruptCheckpointError at the door
    """A field that is missing, of the wrong type, or says what cannot be."""


def parse_object(line: bytes) -> dict[str, Any]:
    """A JSON object. Python would also take NaN, and numbers that become infinite.

    Raises:
        Malformed: It is none.
    """
    try:
        body = _JSON.decode(line.decode("utf-8"))  # given bytes, json would guess UTF-16 too
    except (ValueError, RecursionError) as error:
        raise Malformed("it is no JSON") from error
    if not isinstance(body, dict):
        raise Malformed("it is no object")
    return cast("dict[str, Any]", body)


def _no_constant(text: str) -> NoReturn:
    raise Malformed(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Malformed(f"{text[:40]} is too large")
    return value


_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)


def expect_writable(body: dict[str, Any], line: bytes) -> None:
    """Raises Malformed for what could be read now, and not be written into another record, or read elsewhere."""
    if re.search(rb"\\u[dD]", line):
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise Malformed("it holds text that is not valid Unicode") from error
    if line.count(b"[") + line.count(b"{") <= DEEPEST:
        return
    level: list[Any] = [body]
    for _ in range(DEEPEST):
        inner = (one for value in level for one in (value.values() if isinstance(value, dict) else value))
        level = [one for one in inner if isinstance(one, (dict, list))]
        if not level:
            return
    raise Malformed(f"it is nested more than {DEEPEST} deep")


@dataclass(frozen=True, slots=True)
class Fields:
    """Typed access to a JSON object; unknown fields are passed over, so later ones may be added."""

    values: dict[str, Any]

    def _typed(self, name: str, kind: type[ValueT]) -> ValueT:
        value = self.values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Malformed(f"field {name!r} is missing or no {kind.__name__}")
        return value

    def integer(self, name: str) -> int:
        value = self._typed(name, int)
        _expect_in_range(name, value, value)
        return value

    def string(self, name: str) -> str:
        return self._typed(name, str)

    def object(self, name: str) -> Fields:
        return Fields(self._typed(name, dict))

    def integers(self, name: str) -> tuple[int, ...]:
        values = self._list(name, int)
        if values:
            _expect_in_range(name, min(values), max(values))
        return values

    def strings(self, name: str) -> tuple[str, ...]:
        return self._list(name, str)

    def _list(self, name: str, kind: type[ValueT]) -> tuple[ValueT, ...]:
        values = self._typed(name, list)
        if not {*map(type, values)} <= {kind}:
            raise Malformed(f"field {name!r} is no list of {kind.__name__}")
        return tuple(values)

    def data(self, name: str) -> bytes:
        body = self.object(name)
        try:
            if "text" in body.values:
                return body.string("text").encode("utf-8")
            return base64.b64decode(body.string("base64"), validate=True)
        except ValueError as error:
            raise Malformed(f"field {name!r} is neither text nor base64") from error

    def slot_or_uri(self, name: str) -> int | str:
        return self.string(name) if isinstance(self.values.get(name), str) else self.integer(name)

    def spans(self, name: str) -> tuple[tuple[int, int], ...]:
        """Ranges of numbers, ascending; none if the field is not there."""
        pairs = [] if self.values.get(name) is None else self._typed(name, list)
        if len(pairs) > MOST_SPANS:
            raise Malformed(f"field {name!r} has {len(pairs)} ranges")
        before = 0
        for pair in pairs:
            if type(pair) is not list or [*map(type, pair)] != [int, int]:
                raise Malformed(f"field {name!r} is no list of pairs")
            if not before < pair[0] <= pair[1] <= HIGHEST_NUMBER:
                raise Malformed(f"the ranges in field {name!r} do not ascend")
            before = pair[1]
        return tuple((first, last) for first, last in pairs)

    def metric(self, name: str) -> float:
        value = self.values[name]
        if value in ("nan", "inf", "-inf"):
            return float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Malformed(f"metric {name!r} is no number")
        try:
            return float(value)
        except OverflowError as error:
            raise Malformed(f"metric {name!r} is too large a number") from error

    def optional(self, name: str, get: Callable[[Fields, str], ValueT]) -> ValueT | None:
        return None if self.values.get(name) is None else get(self, name)


def _expect_in_range(name: str, lowest: int, highest: int) -> None:
    if lowest < 0 or highest > HIGHEST_NUMBER:
        raise Malformed(f"field {name!r} is not from 0 to 2^53 - 1")
