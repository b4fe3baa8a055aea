"""The plain part of a state on its way back: JSON becomes values again, around the arrays that were read before."""

from __future__ import annotations

import base64
import datetime as dt
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from taskckpt._states import dtypes
from taskckpt._states.safetensors import Malformed
from taskckpt._states.writer import BY_TEXT

_HEX = re.compile("-?0x[0-9a-f]+")


class StateReader:
    """Turns JSON into values; ``arrays`` are there already."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = arrays
        self._makers: dict[str, Callable[[Any], Any]] = {
            "dict": self._dict,
            "OrderedDict": lambda body: OrderedDict(self._dict(body)),
            "state_dict": self._state_dict,
            "tuple": lambda body: tuple(self._list(body)),
            "set": lambda body: _distinct(set, self._list(body)),
            "frozenset": lambda body: _distinct(frozenset, self._list(body)),
            "str": lambda body: _from_base64(body).decode("utf-8", "surrogatepass"),
            "bytes": _from_base64,
            "bytearray": lambda body: bytearray(_from_base64(body)),
            "int": _int,
            "float": lambda body: struct.unpack(">d", bytes.fromhex(body))[0],
            "complex": self._complex,
            "datetime": lambda body: dt.datetime.fromisoformat(body[0]).replace(fold=body[1]),
            "timedelta": lambda body: dt.timedelta(*body),
            **{tag: self._from_text(make) for tag, _, make in BY_TEXT.values()},
            "array": lambda body: self._arrays[body],
            "torch.Parameter": self._parameter,
            "torch.requires_grad": lambda body: self._tensor(body).detach().requires_grad_(),
            "torch.Size": lambda body: dtypes.library("torch").Size(body),
            "torch.dtype": dtypes.torch_dtype,
            "torch.device": lambda body: dtypes.library("torch").device(body),
            "numpy.scalar": _scalar,
            "numpy.str_": lambda body: dtypes.library("numpy").str_(self._of(str, body)),
            "numpy.bytes_": lambda body: dtypes.library("numpy").bytes_(self._of(bytes, body)),
            "numpy.dtype": dtypes.dtype_from,
        }

    def value(self, node: Any) -> Any:
        """The value of a node."""
        if type(node) is dict:
            if len(node) != 1:
                raise Malformed("an object with other than one member")
            ((tag, body),) = node.items()
            if tag not in self._makers:
                raise Malformed(f"a value of the unknown type {tag[:40]!r}")
            return self._makers[tag](body)
        return [self.value(one) for one in node] if type(node) is list else node

    def _list(self, body: Any) -> list[Any]:
        if type(body) is not list:
            raise Malformed("no list")
        return [self.value(one) for one in body]

    def _dict(self, body: Any) -> dict[Any, Any]:
        if type(body) is dict:
            return {key: self.value(node) for key, node in body.items()}
        pairs = [(self.value(key), self.value(node)) for key, node in body]
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Malformed("a key that is repeated")
        return found

    def _state_dict(self, body: Any) -> Any:
        items, metadata = body
        found: Any = OrderedDict(self._dict(items))
        found._metadata = self.value(metadata)  # noqa: SLF001 - it is PyTorch's place for it
        return found

    def _of(self, kind: type, node: Any) -> Any:
        value = self.value(node)
        if type(value) is not kind:
            raise Malformed(f"no {kind.__name__}")
        return value

    def _complex(self, body: Any) -> complex:
        real, imaginary = body
        return complex(self._of(float, real), self._of(float, imaginary))

    def _from_text(self, make: Callable[[str], object]) -> Callable[[Any], object]:
        return lambda body: make(self._of(str, body))

    def _tensor(self, node: Any) -> Any:
        value = self.value(node)
        if not isinstance(value, dtypes.library("torch").Tensor):
            raise Malformed("no tensor")
        return value

    def _parameter(self, body: Any) -> Any:
        node, requires_grad = body
        return dtypes.library("torch").nn.Parameter(self._tensor(node), requires_grad=requires_grad is True)


def _distinct(kind: type, values: list[Any]) -> Any:
    found = kind(values)
    if len(found) != len(values):
        raise Malformed("an element that is repeated")
    return found


def _int(body: Any) -> int:
    if not _HEX.fullmatch(body):
        raise Malformed("no whole number")
    return int(body, 16)


def _from_base64(body: Any) -> bytes:
    return base64.b64decode(body, validate=True)


def _scalar(body: Any) -> Any:
    described, text = body
    dtype = dtypes.dtype_from(described)
    data = _from_base64(text)
    if len(data) != dtype.itemsize:
        raise Malformed("a scalar of another size than its dtype")
    array = dtypes.library("numpy").ndarray((), dtype, bytearray(data))
    return array[()]
