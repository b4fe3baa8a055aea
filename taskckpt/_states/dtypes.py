"""Dtypes of NumPy, ml_dtypes and PyTorch, in JSON and back, and which of them safetensors has."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from taskckpt._states.safetensors import Malformed, dimensions_from
from taskckpt.errors import MissingDependencyError, UnsupportedFormatError

NUMPY = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
ML_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
TORCH = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    **ML_DTYPES,
}
FROM_NUMPY = {name: stored for stored, name in NUMPY.items()}
FROM_ML_DTYPES = {name: stored for stored, name in ML_DTYPES.items()}
FROM_TORCH = {name: stored for stored, name in TORCH.items()}

_BASE_DTYPE = re.compile(
    r"([<>|](?:b1|[iufc][0-9]{1,2}|[SUV][0-9]{1,10}|[mM]8(?:\[[0-9]{0,9}[A-Za-z]{1,2}\])?))(/[0-9]+)?"
)
_DTYPE_NAME = re.compile(r"[a-z][a-z0-9_]*")

_UPGRADE = "It was saved on another platform, or with newer packages: load it with those."


class Refused(Exception):  # noqa: N818 - becomes UsageTypeError at the door
    """An array that cannot be stored: why, and what to do; turned into UsageTypeError at the door."""

    def __init__(self, why: str, hint: str) -> None:
        super().__init__(why)
        self.why = why
        self.hint = hint


def library(name: str) -> Any:
    """An optional package that a state needs.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return sys.modules.get(name) or importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"The state holds values of {name}, which is not installed here.", hint=f"pip install {name}"
        ) from error


# --- NumPy -------------------------------------------------------------------------------------


def describe(dtype: Any) -> Any:
    """A NumPy dtype in JSON: ``dtype.str``, the name of one of ml_dtypes, or an object of fields.

    Raises:
        Refused: Its values are Python objects, or of a package that is not known here.
    """
    if dtype.hasobject:
        raise Refused(f"an array of dtype {dtype}, whose items are Python objects", "Convert it: array.tolist().")
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": describe(base), "shape": list(shape)}
    if dtype.names is not None:
        if dtype.type is not sys.modules["numpy"].void:
            raise Refused("an array of records", "Convert it: array.astype(array.dtype.descr).")
        # With the title, if it has one: (dtype, offset[, title]).
        fields = [[name, describe(dtype.fields[name][0]), *dtype.fields[name][1:]] for name in dtype.names]
        return {"fields": fields, "itemsize": dtype.itemsize, "aligned": dtype.isalignedstruct}
    if dtype.type.__module__ == "ml_dtypes":
        return str(dtype.name)
    if dtype.type.__module__ != "numpy" or _BASE_DTYPE.fullmatch(dtype.str) is None:
        raise Refused(f"an array of dtype {dtype}", "Convert it: array.astype(...), or array.tolist().")
    return dtype.str + _precision(dtype)


def _precision(dtype: Any) -> str:
    """What tells the long doubles of different processors apart: the bits of their mantissa."""
    return f"/{sys.modules['numpy'].finfo(dtype).nmant}" if dtype.char in "gG" else ""


def dtype_from(described: Any) -> Any:
    """The NumPy dtype that ``describe`` described.

    Raises:
        Malformed: It is none.
        UnsupportedFormatError: It is one that NumPy does not have here.
    """
    numpy = library("numpy")
    match described:
        case {"base": base, "shape": list(shape)}:
            inner = dtype_from(base)
            return numpy.dtype((inner, dimensions_from(shape, inner.itemsize)))
        case {"fields": list(fields), "itemsize": int(itemsize), "aligned": bool(aligned)}:
            return _structured(fields, itemsize, aligned)
        case str(text) if match := _BASE_DTYPE.fullmatch(text):
            try:
                dtype = numpy.dtype(match[1])
            except (TypeError, ValueError) as error:
                raise UnsupportedFormatError(f"NumPy has no dtype {text!r} here.", hint=_UPGRADE) from error
            if _precision(dtype) != (match[2] or ""):
                raise UnsupportedFormatError(f"The long doubles of this processor are not {text!r}.", hint=_UPGRADE)
            return dtype
        case str(text) if _DTYPE_NAME.fullmatch(text):
            kind = getattr(library("ml_dtypes"), text, None)
            if not isinstance(kind, type) or not issubclass(kind, numpy.generic):
                raise UnsupportedFormatError(f"ml_dtypes has no dtype {text!r} here.", hint=_UPGRADE)
            return numpy.dtype(kind)
        case _:
            raise Malformed("no dtype")


def _structured(fields: list[Any], itemsize: int, aligned: bool) -> Any:
    numpy = library("numpy")
    parts: dict[str, list[Any]] = {"names": [], "formats": [], "offsets": [], "titles": []}
    for field in fields:
        match field:
            case [str(name), inner, int(offset), *title] if offset >= 0 and all(isinstance(one, str) for one in title):
                values = (name, dtype_from(inner), offset, title[0] if title else None)
                for column, value in zip(parts.values(), values, strict=True):
                    column.append(value)
            case _:
                raise Malformed("no field")
    return numpy.dtype({**parts, "itemsize": itemsize, "aligned": aligned})


# --- PyTorch -----------------------------------------------------------------------------------


def torch_dtype(name: object) -> Any:
    """The dtype of PyTorch with that name.

    Raises:
        Malformed: It is no name of one.
        UnsupportedFormatError: PyTorch has no such dtype here.
    """
    torch = library("torch")
    if not isinstance(name, str) or not _DTYPE_NAME.fullmatch(name) or name.startswith("q"):
        raise Malformed("no dtype")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedFormatError(f"PyTorch has no dtype {name!r} here.", hint=_UPGRADE)
    return dtype
