"""States built by hand from bytes, each with one thing that must never be believed.

Each gets a typed error, quickly, and without the memory that it asks for.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
import tracemalloc
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskckpt._states import METADATA_KEY, decode, encode
from taskckpt.errors import (
    CorruptCheckpointError,
    StorageFullError,
    TaskckptError,
    UnavailableError,
    UnsupportedFormatError,
)

MIB = 1 << 20

# Of 8 bytes each, in the order of the file.
ENTRIES = {
    "a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
    "b": {"dtype": "U8", "shape": [2, 4], "data_offsets": [8, 16]},
}
MAKINGS: dict[str, Any] = {"a": "numpy", "b": "numpy"}
TREE = {"dict": {"x": {"array": "a"}, "y": [{"array": "b"}]}}
DATA = bytes(range(16))


def text_of(tree: Any = TREE, makings: Any = MAKINGS, version: Any = 1) -> str:
    return json.dumps({"version": version, "arrays": makings, "state": tree})


def file_of(entries: Any = ENTRIES, text: Any = None, data: bytes = DATA) -> bytes:
    header = json.dumps({"__metadata__": {METADATA_KEY: text_of() if text is None else text}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(name: str, **fields: Any) -> bytes:
    return file_of({**ENTRIES, name: {**ENTRIES[name], **fields}})


def making(value: Any, size: int = 8) -> bytes:
    """One tensor of bytes that claims to be something."""
    entries = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    return file_of(entries, text_of({"dict": {"x": {"array": "a"}}}, {"a": value}), bytes(size))


def value(node: Any) -> bytes:
    return file_of({}, text_of({"dict": {"x": node}}, {}), b"")


def numpy_dtype(described: Any, shape: Any = (1,), size: int = 8) -> bytes:
    return making({"library": "numpy", "dtype": described, "shape": shape}, size)


def raw_header(text: str | bytes, data: bytes = b"") -> bytes:
    header = text if isinstance(text, bytes) else text.encode()
    return len(header).to_bytes(8, "little") + header + data


def test_what_the_hostile_ones_are_made_from_is_good():
    found: Any = decode([file_of()], "file", size_bytes=len(file_of()))
    assert found["x"].tobytes() == DATA[:8]
    assert found["y"][0].tobytes() == DATA[8:]
    assert decode([value({"tuple": []})], "file") == {"x": ()}
    found = decode([numpy_dtype("<M8[s]")], "file")
    assert found["x"].dtype == "M8[s]"


GOOD = file_of()
BIG = 1 << 45

CORRUPT = {
    "empty": b"",
    "cut in the length": GOOD[:5],
    "cut in the header": GOOD[:50],
    "cut in the data": GOOD[:-1],
    "bytes after the end": GOOD + b"\0",
    "a header of no length": raw_header(""),
    "a header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + GOOD[8:],
    "a header of 90 MB that is not there": (90_000_000).to_bytes(8, "little") + GOOD[8:],
    "no UTF-8": raw_header(b'{"\xff": 1}'),
    "UTF-16": raw_header("{}".encode("utf-16")),
    "no JSON": raw_header("{"),
    "a list": raw_header("[]"),
    "NaN": raw_header('{"__metadata__": NaN}'),
    "deep": raw_header("[" * 100_000),
    "a huge number": raw_header('{"__metadata__": {}, "a": ' + "9" * 5000 + "}"),
    "a name twice": raw_header('{"__metadata__": {}, "__metadata__": {}}'),
    "a tensor twice": raw_header(GOOD[8:-17] + b', "b": ' + json.dumps(ENTRIES["b"]).encode() + b"}", DATA),
    "a key of the state twice": file_of({}, '{"version": 1, "arrays": {}, "state": {"dict": {"x": 1, "x": 2}}}', b""),
    "no metadata": raw_header(json.dumps(ENTRIES), DATA),
    "metadata that is none": raw_header('{"__metadata__": 1}'),
    "somebody else's file": raw_header('{"__metadata__": {"format": "pt"}}'),
    "state that is no text": file_of(text={}),
    "state that is no JSON": file_of(text="{"),
    "state that is deep": file_of({}, '{"version": 1, "arrays": {}, "state": ' + '{"tuple": [' * 90_000, b""),
    "state of no version": file_of(text="{}"),
    "state of version true": file_of({}, text_of({"dict": {}}, {}, version="1"), b""),
    "state of version 0": file_of({}, text_of({"dict": {}}, {}, version=0), b""),
    "state that is a list": file_of({}, text_of([], {}), b""),
    "unknown dtype": entry("a", dtype="F65"),
    "dtype that is no text": entry("a", dtype=["F64"]),
    "negative size": entry("b", shape=[-2, -4]),
    "a fraction of a size": entry("b", shape=[2.0, 4]),
    "true for a size": entry("b", shape=[True, 8]),
    "other size than its bytes": entry("b", shape=[2, 5]),
    "shape that overflows": entry("b", shape=[1 << 40, 1 << 40]),
    "shape that overflows behind a zero": entry("b", shape=[0, 1 << 62, 1 << 62], data_offsets=[8, 8]),
    "65 dimensions": entry("b", shape=[8, *[1] * 64]),
    "shape that is none": entry("b", shape=8),
    "three offsets": entry("b", data_offsets=[8, 16, 17]),
    "offsets that overlap": entry("b", data_offsets=[7, 15]),
    "offsets with a gap": file_of({**ENTRIES, "b": {**ENTRIES["b"], "data_offsets": [9, 17]}}, None, DATA + b"\0"),
    "offsets of the same bytes": entry("b", data_offsets=[0, 8]),
    "offsets backwards": entry("b", data_offsets=[16, 8]),
    "negative offsets": entry("a", data_offsets=[-8, 0]),
    "more fields": entry("a", more=1),
    "an entry that is none": file_of({**ENTRIES, "b": None}),
    "bytes that are not there": entry("b", shape=[BIG], data_offsets=[8, 8 + BIG]),
    "array that the state does not know": file_of(text=text_of(makings={"a": "numpy"})),
    "array that the file does not have": file_of(text=text_of(makings={**MAKINGS, "c": "numpy"})),
    "array that nobody named": value({"array": "c"}),
    "array of no library": making("os"),
    "array of a list": making(["numpy"]),
    "array of a library to be imported": making({"library": "antigravity"}),
    "long text that is none": file_of(
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}},
        text_of({"dict": {"x": {"array": "a"}}}, {"a": "str"}), b"\xff",
    ),
    "objects": numpy_dtype("|O"),
    "objects by their number": numpy_dtype("|O8"),
    "objects in a structure": numpy_dtype({"fields": [["x", "|O", 0]], "itemsize": 8, "aligned": False}),
    "several dtypes in a text": numpy_dtype("f4,O"),
    "a dtype of a class": numpy_dtype("object"),
    "a dtype by its module": numpy_dtype("os"),
    "a dtype that is a list": numpy_dtype([["x", "|O"]]),
    "a field beyond its structure": numpy_dtype({"fields": [["x", "<i8", 4]], "itemsize": 8, "aligned": False}),
    "a field before its structure": numpy_dtype({"fields": [["x", "<i4", -4]], "itemsize": 8, "aligned": False}),
    "a field twice": numpy_dtype(
        {"fields": [["x", "<i4", 0], ["x", "<i4", 4]], "itemsize": 8, "aligned": False}),
    "a field without a dtype": numpy_dtype({"fields": [["x"]], "itemsize": 8, "aligned": False}),
    "a negative itemsize": numpy_dtype({"fields": [], "itemsize": -8, "aligned": False}),
    "a huge itemsize": numpy_dtype("|V2147483647"),
    "a structure of huge parts": numpy_dtype({"base": "|V2147483647", "shape": [1 << 30]}),
    "a deep dtype": numpy_dtype(json.loads('{"shape": [1], "base": ' * 400 + '"<i8"' + "}" * 400)),
    "a dtype of another size": numpy_dtype("<i4"),
    "a shape of another size": numpy_dtype("<i4", [3]),
    "a shape that is missing": making({"library": "numpy", "dtype": "<i8"}),
    "an absurd shape of no bytes": numpy_dtype("<i8", [0, 1 << 61, 1 << 61], 0),
    "unknown type": value({"os.system": "true"}),
    "object of two types": value({"tuple": [], "set": []}),
    "object of no type": value({}),
    "no list": value({"tuple": "ab"}),
    "a list in a set": value({"set": [[]]}),
    "an element twice": value({"set": [1, True]}),
    "a key twice": value({"dict": [[1, 0], [{"float": "3ff0000000000000"}, 1]]}),
    "a dict as a key": value({"dict": [[{"dict": {}}, 1]]}),
    "pairs of three": value({"dict": [[1, 2, 3]]}),
    "a dict of numbers": value({"dict": 7}),
    "no base64": value({"bytes": "!"}),
    "base64 of a list": value({"bytes": [1]}),
    "no hexadecimal": value({"float": "xx"}),
    "a float of 9 bytes": value({"float": "00" * 9}),
    "a number in other digits": value({"int": "0b11"}),
    "a number with spaces": value({"int": " 0x1"}),
    "a complex of text": value({"complex": ["1", 2.0]}),
    "no time": value({"datetime": ["yesterday", 0]}),
    "a time in a number": value({"datetime": 7}),
    "no decimal": value({"decimal": "1.x"}),
    "a fraction by zero": value({"fraction": "1/0"}),
    "no uuid": value({"uuid": "1"}),
    "a path of a list": value({"path": ["a"]}),
    "a scalar of another size": value({"numpy.scalar": ["<i4", "AA=="]}),
    "a scalar of objects": value({"numpy.scalar": ["|O", "AAAAAAAAAAA="]}),
    "a huge scalar": value({"numpy.scalar": ["|V2147483647", "AA=="]}),
    "too large a timedelta": value({"timedelta": [10**10, 0, 0]}),
}  # fmt: skip

NEEDS_TORCH = {
    "a dtype that is a function": making({"library": "torch", "dtype": "load", "shape": [8]}),
    "a dtype of a module": making({"library": "torch", "dtype": "nn", "shape": [8]}),
    "a quantized dtype": making({"library": "torch", "dtype": "qint8", "shape": [8]}),
    "a dtype with dots": making({"library": "torch", "dtype": "os.path", "shape": [8]}),
    "another size": making({"library": "torch", "dtype": "complex128", "shape": [1]}),
    "an absurd shape": making({"library": "torch", "dtype": "complex128", "shape": [0, 1 << 61, 1 << 61]}, 0),
    "no device": value({"torch.device": "nonsense"}),
    "no size": value({"torch.Size": ["a"]}),
    "a parameter of text": value({"torch.Parameter": ["a", True]}),
    "a gradient of a number": value({"torch.requires_grad": 7}),
    "a parameter of whole numbers": file_of(
        {"a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}},
        text_of({"dict": {"x": {"torch.Parameter": [{"array": "a"}, True]}}}, {"a": "torch"}), b"1",
    ),
}  # fmt: skip


def assert_refused(data: bytes, size_bytes: int | None, kinds: type | tuple[type, ...]) -> None:
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(kinds) as caught:
            decode([data[:7], data[7:]], "the-uri", size_bytes=size_bytes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    error = caught.value
    assert isinstance(error, TaskckptError)
    assert error.uri == "the-uri"
    if size_bytes is not None:
        assert peak < 16 * MIB + 20 * len(data)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", CORRUPT)
@pytest.mark.parametrize("size_known", [True, False])
def test_hostile_states_are_refused(name, size_known):
    data = CORRUPT[name]
    kinds: tuple[type, ...]
    # Without the size, addresses are asked for by what the header says, though no memory is: there may not be as many.
    kinds = (CorruptCheckpointError,) if size_known else (CorruptCheckpointError, StorageFullError)
    unknown = {"objects by their number", "a dtype of a class", "a dtype by its module"}
    if name in unknown:
        kinds = (CorruptCheckpointError, UnsupportedFormatError)
    assert_refused(data, len(data) if size_known else None, kinds)


@pytest.mark.parametrize("name", NEEDS_TORCH)
def test_hostile_tensors_are_refused(name):
    pytest.importorskip("torch", reason="NOT TESTED with PyTorch: pip install torch")
    kinds = (CorruptCheckpointError, UnsupportedFormatError)
    assert_refused(NEEDS_TORCH[name], len(NEEDS_TORCH[name]), kinds)


@pytest.mark.parametrize(
    "data",
    [
        file_of({}, text_of({"dict": {}}, {}, version=2), b""),
        file_of({}, text_of({"something": "new"}, {"new": 1}, version=3), b""),
        numpy_dtype("<f8/112"),
        numpy_dtype("<f16/7", [1], 16),
        numpy_dtype("<i7", [1], 7),
        numpy_dtype("<M8[xx]"),
    ],
)
def test_what_is_newer_or_from_elsewhere_is_no_damage(data):
    assert_refused(data, len(data), UnsupportedFormatError)


def test_damage_that_looks_like_a_newer_version_is_damage():
    """The digest at the end of the stream has the last word, so that an older checkpoint is loaded instead."""

    def chunks():
        yield file_of({}, text_of({"dict": {}}, {}, version=2), b"")
        raise CorruptCheckpointError("its digest does not fit")

    with pytest.raises(CorruptCheckpointError, match="digest"):
        decode(chunks(), "uri")


@pytest.mark.parametrize("error", [UnavailableError("gone"), RuntimeError("a bug"), ValueError("a bug")])
def test_what_the_stream_raises_is_no_damage(error):
    def chunks():
        yield GOOD[:-3]
        raise error

    with pytest.raises(type(error)) as caught:
        decode(chunks(), "uri")
    assert caught.value is error


def test_an_error_of_the_stream_after_the_last_byte_is_raised():
    def chunks():
        yield GOOD
        raise CorruptCheckpointError("its digest does not fit")

    with pytest.raises(CorruptCheckpointError, match="digest"):
        decode(chunks(), "uri")


# --- damage at random


def valid_file() -> bytes:
    state = {
        "a": np.arange(3), "b": [np.float32(1), (1, {2}, b"x")], "c": OrderedDict(d=1.5), "e": "x" * 20_000,
        "f": np.zeros(2, [("x", "<i4"), ("y", ">f8")]), "g": {(1, 2): None, 3: float("nan")}, "h": 2**70,
        "i": np.array(["2026"], "M8[Y]"), "j": dt.date(2026, 11, 21),
    }  # fmt: skip
    if "torch" in sys.modules:
        state["t"] = sys.modules["torch"].ones(2)
    return b"".join(map(bytes, encode(state).chunks()))


VALID = valid_file()
HEADER = 8 + int.from_bytes(VALID[:8], "little")


def survives(data: bytes) -> None:
    try:
        found = decode([data], "uri", size_bytes=len(data))
    except TaskckptError:
        return
    assert type(found) in (dict, OrderedDict)


@given(st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_do_no_harm(flips):
    data = bytearray(VALID)
    for position, byte in flips:
        data[position] = byte
    survives(bytes(data))


@given(st.integers(0, HEADER - 1), st.sampled_from(list(b'{}[]",:\\0189-.eNtfbodxUVM')))
def test_flipped_syntax_does_no_harm(position, byte):
    data = bytearray(VALID)
    data[position] = byte
    survives(bytes(data))


@given(st.integers(0, len(VALID)), st.integers(0, len(VALID)))
def test_cut_states_are_refused(start, stop):
    data = VALID[:start] + VALID[stop:]
    if data == VALID:
        return
    with pytest.raises(CorruptCheckpointError):
        decode([data], "uri", size_bytes=len(data))


TAGS = [
    "dict", "OrderedDict", "state_dict", "tuple", "set", "frozenset", "str", "bytes", "bytearray", "int", "float",
    "complex", "datetime", "date", "timedelta", "decimal", "fraction", "uuid", "path", "array", "numpy.scalar",
    "numpy.str_", "numpy.dtype", "fields", "itemsize", "base", "shape", "library", "dtype", "torch.Parameter",
    "torch.requires_grad", "torch.Size", "torch.dtype", "torch.device",
]  # fmt: skip
NODES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
    | st.sampled_from(["a", "b", "0x1", "<i4", "|O", "AAAA", "2026-11-21", "numpy", "torch"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TAGS), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from("xyz"), NODES, min_size=1), st.one_of(st.just("numpy"), NODES))
def test_nonsense_of_the_right_syntax_does_no_harm(nodes, making_of_a):
    survives(file_of(ENTRIES, text_of({"dict": nodes}, {"a": making_of_a, "b": "numpy"})))
