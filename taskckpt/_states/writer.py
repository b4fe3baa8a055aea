"""The plain part of a state on its way out: values become JSON, and the arrays among them are collected.

An object of the JSON has one member: a value of the type that the member's name tells. ``docs/format.md`` lists them.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
import struct
import sys
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias, cast

from taskckpt._states import arrays as _arrays
from taskckpt._states import dtypes
from taskckpt._states.arrays import Stored
from taskckpt._states.dtypes import Refused
from taskckpt.errors import UsageError, UsageTypeError

# Deeper ones would need more of the interpreter's stack than a caller may have left.
DEPTH_LIMIT = 100
# Longer bytes and texts are stored beside the arrays.
_LONG_BYTES = 16 * 1024
# JSON numbers beyond are not exact in many readers.
_EXACT_INTEGERS = 1 << 53
_NAME_LENGTH = 200

# A place in the state: the place of what holds it, and the key in there.
_Path: TypeAlias = "tuple[_Path, object] | None"


class _Inside(str):
    """In a path: something in a container that no index leads to."""

    __slots__ = ()


# Types that come back exactly through their text.
BY_TEXT: Mapping[type, tuple[str, Callable[[Any], str], Callable[[str], object]]] = {
    dt.date: ("date", dt.date.isoformat, dt.date.fromisoformat),
    Decimal: ("decimal", str, Decimal),
    Fraction: ("fraction", str, Fraction),
    uuid.UUID: ("uuid", str, uuid.UUID),
    type(Path()): ("path", str, Path),
}

_PLAIN_KEYS = frozenset({str, int, float, bool, type(None), bytes, complex, dt.datetime, dt.timedelta, *BY_TEXT})


class StateWriter:
    """Turns values into JSON, and collects the arrays among them."""

    def __init__(self) -> None:
        self.stored: dict[str, Stored] = {}
        self.makings: dict[str, object] = {}
        self._aliases: dict[object, str] = {}
        self._names: dict[str, int] = {"": 1, "__metadata__": 1}
        self._open: set[int] = set()
        self._handlers: dict[type, Callable[[Any, _Path], object]] = {
            dict: self._dict,
            OrderedDict: self._ordered_dict,
            list: self._list,
            tuple: lambda value, path: {"tuple": self._list(value, path)},
            set: lambda value, path: {"set": self._set(value, path)},
            frozenset: lambda value, path: {"frozenset": self._set(value, path)},
            bytes: lambda value, path: self._bytes("bytes", value, path),
            bytearray: lambda value, path: self._bytes("bytearray", value, path),
            complex: lambda value, _: {"complex": [_float(value.real), _float(value.imag)]},
            dt.datetime: self._datetime,
            dt.timedelta: lambda value, _: {"timedelta": [value.days, value.seconds, value.microseconds]},
            **dict.fromkeys(BY_TEXT, self._by_text),
        }
        self._torch = sys.modules.get("torch")
        self._numpy = sys.modules.get("numpy")
        self._jax = sys.modules.get("jax")
        if self._numpy is not None:
            self._handlers[self._numpy.ndarray] = lambda value, path: self._array(_arrays.numpy_stored, value, path)
        if self._torch is not None:
            self._handlers |= {
                self._torch.Tensor: self._tensor,
                self._torch.nn.Parameter: self._tensor,
                self._torch.Size: lambda value, _: {"torch.Size": list(value)},
                self._torch.dtype: lambda value, _: {"torch.dtype": str(value).removeprefix("torch.")},
                self._torch.device: lambda value, _: {"torch.device": str(value)},
            }

    def root(self, state: Any) -> object:
        """The JSON for the whole state."""
        if type(state) not in (dict, OrderedDict):
            raise UsageTypeError(f"A state is a dict, not {_a(type(state).__name__)}.", hint=_hint(state))
        return self._handlers[type(state)](state, None)

    def _node(self, value: Any, path: _Path, key: object) -> object:
        """The JSON for a value that lies under ``key`` in what lies at ``path``."""
        kind = type(value)
        if kind is str:
            return value if value.isascii() and len(value) <= _LONG_BYTES else self._text(value, (path, key))
        if kind is int:
            return value if -_EXACT_INTEGERS < value < _EXACT_INTEGERS else {"int": hex(value)}
        if kind is float:
            return _float(value)
        if value is None or kind is bool:
            return value
        return self._handlers.get(kind, self._rare)(value, (path, key))

    def _rare(self, value: Any, path: _Path) -> object:
        if self._numpy is not None and isinstance(value, self._numpy.generic):
            return self._scalar(value, path)
        if self._numpy is not None and isinstance(value, self._numpy.dtype):
            return {"numpy.dtype": self._described(value, path)}
        if self._jax is not None and isinstance(value, self._jax.Array):
            return self._array(_arrays.jax_stored, value, path)
        raise _refusal(path, _a(type(value).__name__), _hint(value))

    # --- containers

    def _enter(self, container: object, path: _Path) -> None:
        if id(container) in self._open:
            raise UsageError(f"{_shown(path)} contains itself: it is a container that is around it as well.")
        if len(self._open) >= DEPTH_LIMIT:
            raise UsageError(f"{_shown(path)} is nested deeper than {DEPTH_LIMIT} levels.")
        self._open.add(id(container))

    def _list(self, values: Any, path: _Path) -> list[object]:
        self._enter(values, path)
        nodes = [self._node(value, path, index) for index, value in enumerate(values)]
        self._open.discard(id(values))
        return nodes

    def _dict(self, values: dict[Any, Any], path: _Path) -> object:
        return {"dict": self._items(values, path)}

    def _ordered_dict(self, values: OrderedDict[Any, Any], path: _Path) -> object:
        attributes = vars(values)
        if not attributes:
            return {"OrderedDict": self._items(values, path)}
        if set(attributes) != {"_metadata"}:
            raise _refusal(path, "an OrderedDict with attributes of its own", "Convert it: dict(...).")
        # PyTorch's state dicts carry the versions of their modules.
        metadata = self._node(attributes["_metadata"], path, _Inside("_metadata"))
        return {"state_dict": [self._items(values, path), metadata]}

    def _items(self, values: dict[Any, Any], path: _Path) -> object:
        """An object where all keys are text that JSON can hold, else a list of pairs."""
        self._enter(values, path)
        nodes: object
        if all(type(key) is str and (key.isascii() or _is_unicode(key)) for key in values):
            nodes = {key: self._node(value, path, key) for key, value in values.items()}
        else:
            nodes = [[self._hashable(key, path, "a key"), self._node(values[key], path, key)] for key in values]
        self._open.discard(id(values))
        return nodes

    def _set(self, values: Any, path: _Path) -> list[object]:
        # Sorted, so that equal states give equal bytes.
        return sorted((self._hashable(value, path, "an element") for value in values), key=json.dumps)

    def _hashable(self, value: Any, path: _Path, what: str) -> object:
        if not _is_plain(value):
            raise _refusal(
                (path, _Inside(what)), _a(type(value).__name__), "Use str, numbers, bytes, or tuples of them."
            )
        return self._node(value, path, _Inside(what))

    # --- leaves

    def _text(self, text: str, path: _Path) -> object:
        data = text.encode("utf-8", "surrogatepass")
        if len(data) > _LONG_BYTES:
            return {"array": self._store(_arrays.bytes_stored(data, "str"), path)}
        return text if _is_unicode(text) else {"str": base64.b64encode(data).decode()}

    def _bytes(self, tag: str, data: bytes | bytearray, path: _Path) -> object:
        if len(data) > _LONG_BYTES:
            return {"array": self._store(_arrays.bytes_stored(bytes(data), tag), path)}
        return {tag: base64.b64encode(data).decode()}

    def _by_text(self, value: Any, path: _Path) -> object:
        tag, to_text, _ = BY_TEXT[type(value)]
        return {tag: self._node(to_text(value), path, _Inside("text"))}

    def _datetime(self, value: dt.datetime, path: _Path) -> object:
        if value.tzinfo is not None and type(value.tzinfo) is not dt.timezone:
            kind = type(value.tzinfo).__name__
            raise _refusal(path, f"a datetime with {_a(kind)}", "Call .astimezone(datetime.timezone.utc).")
        return {"datetime": [value.isoformat(), value.fold]}

    # --- arrays

    def _array(self, stored_of: Callable[[Any], Stored], array: Any, path: _Path) -> object:
        try:
            return {"array": self._store(stored_of(array), path)}
        except Refused as refused:
            raise _refusal(path, refused.why, refused.hint) from None

    def _tensor(self, tensor: Any, path: _Path) -> object:
        node = self._array(_arrays.torch_stored, tensor, path)
        if type(tensor) is not cast("Any", self._torch).Tensor:
            return {"torch.Parameter": [node, tensor.requires_grad]}
        return {"torch.requires_grad": node} if tensor.requires_grad else node

    def _scalar(self, value: Any, path: _Path) -> object:
        numpy = cast("Any", self._numpy)
        if type(value) in (numpy.str_, numpy.bytes_):  # an array of one would lose zeros at its end
            return {f"numpy.{type(value).__name__}": self._node(_exactly(value), path, _Inside("text"))}
        array = numpy.asarray(value)
        data = base64.b64encode(array.tobytes()).decode()
        return {"numpy.scalar": [self._described(array.dtype, path), data]}

    def _described(self, dtype: Any, path: _Path) -> object:
        try:
            return dtypes.describe(dtype)
        except Refused as refused:
            raise _refusal(path, refused.why, refused.hint) from None

    def _store(self, stored: Stored, path: _Path) -> str:
        name = self._aliases.get(stored.alias) if stored.alias is not None else None
        if name is None:
            name = self._unique_name(path)
            self.stored[name] = stored
            self.makings[name] = stored.making if len(stored.making) > 1 else stored.making["library"]
            if stored.alias is not None:
                self._aliases[stored.alias] = name
        return name

    def _unique_name(self, path: _Path) -> str:
        parts = [key if type(key) is str else str(key) if type(key) is int else repr(key)[:80] for key in _keys(path)]
        base = ".".join(parts)[:_NAME_LENGTH]
        if not base.isprintable():
            base = "".join(one if one.isprintable() else "?" for one in base)
        count = self._names.get(base, 0) + 1
        while (name := base if count == 1 else f"{base}~{count}") in self._names:
            count += 1
        self._names[base] = count
        self._names.setdefault(name, 1)
        return name


def _exactly(text: Any) -> object:
    """A text or bytes of NumPy as one of Python: their own conversions lose zeros at the end."""
    return str.__str__(text) if isinstance(text, str) else bytes.__getitem__(text, slice(None))


def _float(value: float) -> object:
    return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_plain(value: Any) -> bool:
    """Can it be in a set, or the key of a dict, and be equal to itself when it comes back?"""
    kind = type(value)
    if kind in (tuple, frozenset):
        return all(_is_plain(one) for one in value)
    numpy = sys.modules.get("numpy")
    return kind in _PLAIN_KEYS or (numpy is not None and isinstance(value, numpy.generic))


# --- what is said of what cannot be stored -----------------------------------------------------


def _keys(path: _Path) -> list[object]:
    keys: list[object] = []
    while path is not None:
        path, key = path
        keys.append(key)
    return keys[::-1]


def _shown(path: _Path) -> str:
    text = "state"
    for key in _keys(path):
        if isinstance(key, _Inside):
            text += f" ({key})"
        else:
            text += f"[{json.dumps(key, ensure_ascii=False) if type(key) is str else repr(key)}]"
    return text if len(text) <= 500 else f"{text[:300]}...{text[-200:]}"


def _refusal(path: _Path, what: str, hint: str) -> UsageTypeError:
    return UsageTypeError(f"{_shown(path)} is {what}, which a state cannot hold.", hint=hint)


def _a(noun: str) -> str:
    return f"{'an' if noun[:1] in 'AEIOUaeiou' else 'a'} {noun}"


# What has such a method, or is of such a type by name, is told how to become plain.
_HINTS_BY_ATTRIBUTE = {
    "state_dict": "Call .state_dict().",
    "bit_generator": "Save its .bit_generator.state.",
    "get_state": "Call .get_state().",
    "getstate": "Call .getstate().",
    "_asdict": "Convert it: tuple(...), or ._asdict().",
    "__dataclass_fields__": "Convert it: dataclasses.asdict(...).",
    "filled": "Save its .data and its .mask.",
    "to_numpy": "Call .to_numpy().",
}
_HINTS_BY_BASE: tuple[tuple[type, str], ...] = (
    (dict, "Convert it: dict(...)."),
    (list, "Convert it: list(...)."),
    (tuple, "Convert it: tuple(...)."),
    (set, "Convert it: set(...)."),
    (frozenset, "Convert it: frozenset(...)."),
    (str, "Convert it: str.__str__(...), or .value of an enum."),
    (int, "Convert it: int(...)."),
    (float, "Convert it: float(...)."),
    (bytes, "Convert it: bytes(...)."),
)


def _hint(value: Any) -> str:
    for attribute, hint in _HINTS_BY_ATTRIBUTE.items():
        if hasattr(type(value), attribute):
            return hint
    for base, hint in _HINTS_BY_BASE:
        if isinstance(value, base):
            return hint
    if any(base.__name__ in ("ndarray", "Tensor") for base in type(value).__mro__):
        return "Convert it to a plain array: numpy.asarray(...), or for a tensor .as_subclass(torch.Tensor)."
    if callable(value) or isinstance(value, Iterable):
        return "Save what it takes to make it again, such as a name and a position."
    return "Turn it into plain values and arrays, or save a file."
