"""States: what goes in comes back, equal and of the same type; what would not is refused by its path."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import hashlib
import importlib.util
import math
import os
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
import types
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from taskckpt._states import METADATA_KEY, HostBuffers, decode, encode
from taskckpt.errors import UsageError, UsageTypeError


def optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


torch = optional("torch")
needs_torch = pytest.mark.skipif(torch is None, reason="NOT TESTED with PyTorch: pip install torch")

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "data" / "state-1"
MIB = 1 << 20


def stored(state: Any) -> bytes:
    encoded = encode(state)
    data = b"".join(map(bytes, encoded.chunks()))
    assert len(data) == encoded.size_bytes
    return data


def there_and_back(state: Any, chunk_bytes: int = 1000) -> Any:
    data = stored(state)
    chunks = [data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes)]
    return decode(chunks, "memory", size_bytes=len(data))


def assert_same(found: Any, expected: Any) -> None:
    """Equal all the way down, of the same types, in the same order, to the last bit."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert len(found) == len(expected)
        for one, other in zip(found.items(), expected.items(), strict=True):
            assert_same(one, other)
        if isinstance(expected, OrderedDict):
            assert_same(vars(found), vars(expected))
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, (set, frozenset)):
        assert len(found) == len(expected)
        assert_same(sorted(found, key=repr), sorted(expected, key=repr))
    elif isinstance(expected, float) and not isinstance(expected, np.generic):
        assert struct.pack("d", found) == struct.pack("d", expected)
    elif isinstance(expected, complex) and not isinstance(expected, np.generic):
        assert_same((found.real, found.imag), (expected.real, expected.imag))
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert found.dtype.isalignedstruct == expected.dtype.isalignedstruct
        assert found.shape == expected.shape
        assert found.flags.writeable
        assert array_content(found) == array_content(expected)
    elif isinstance(expected, np.generic) and not isinstance(expected, (str, bytes)):
        assert found.dtype == expected.dtype
        assert array_content(found) == array_content(expected)
    elif isinstance(expected, decimal.Decimal):
        assert str(found) == str(expected)
    elif torch is not None and isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.requires_grad == expected.requires_grad
        assert found.device.type == "cpu"
        assert tensor_bytes(found) == tensor_bytes(expected)
    else:
        assert found == expected


def array_content(array: Any) -> object:
    """All bytes; of structures only the fields, since what lies between them is anything."""
    return repr(array.tolist()) if array.dtype.names else array.tobytes()


def tensor_bytes(tensor: Any) -> bytes:
    if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():  # some dtypes can do nothing else
        start = tensor.storage_offset() * tensor.element_size()
        return bytes(tensor.untyped_storage())[start : start + tensor.numel() * tensor.element_size()]
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return bytes(plain.untyped_storage())


# --- plain values

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters()),
    st.text(st.characters(categories=["Cs", "Lu"])),
    st.binary(),
    st.binary().map(bytearray),
    st.datetimes(timezones=st.none() | st.just(dt.UTC) | st.just(dt.timezone(dt.timedelta(hours=-3, seconds=7)))),
    st.dates(),
    st.timedeltas(),
    st.decimals(),
    st.fractions(),
    st.uuids(),
)
SIMPLE_KEYS = st.none() | st.booleans() | st.integers() | st.floats() | st.binary() | st.text(st.characters())
SIMPLE_KEYS |= st.text(st.characters(categories=["Cs", "Lu"]))
KEYS = SIMPLE_KEYS | st.tuples(SIMPLE_KEYS, SIMPLE_KEYS) | st.frozensets(SIMPLE_KEYS, max_size=3)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(st.text(), inner, max_size=3).map(OrderedDict),
        st.sets(KEYS, max_size=3),
        st.frozensets(KEYS, max_size=3),
    ),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, TREES, max_size=3))
def test_plain_trees_come_back(state):
    assert_same(there_and_back(state), state)


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        struct.unpack("d", struct.pack("Q", 0xFFF4_0000_0000_1234))[0],  # a NaN with a message
        5e-324,
        2**53,
        -(2**53) - 1,
        10**5000,  # int(text) refuses that many digits
        "\ud83d\ude00",  # two halves that JSON would join
        "",
        "\0",
        "\u2028",
        {"": {"": {}}},
        {1: 0, 1.5: 1, "1": 2, None: 3, b"1": 4, (1, ("1",)): 5},
        {"dict": 1, "array": {"array": "x"}, "tuple": [1]},
        {"__metadata__": 1},
        decimal.Decimal("sNaN123"),
        decimal.Decimal("-0E+7"),
        dt.datetime(2026, 10, 25, 2, 30, fold=1),  # noqa: DTZ001
        dt.datetime.max,  # noqa: DTZ901
        Path("/tmp/x"),
        Path("\udcff"),
        uuid.UUID(int=7),
        fractions.Fraction(1, 3),
        b"x" * 100_000,
        bytearray(b"x" * 100_000),
        "x\ud800" * 100_000,
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_odd_values_come_back(value):
    assert_same(there_and_back({"value": value}), {"value": value})


def test_a_copy_comes_back_and_not_the_same_object():
    state = {"list": [1], "bytes": bytearray(b"1")}
    found = there_and_back(state)
    found["list"].append(2)
    found["bytes"].append(2)
    assert state == {"list": [1], "bytes": bytearray(b"1")}


def test_an_ordered_dict_is_one_again():
    assert_same(there_and_back(OrderedDict(b=1, a=2)), OrderedDict(b=1, a=2))


def test_equal_states_give_equal_bytes():
    """Also in another process, where sets have another order."""
    code = "from taskckpt._states import encode; import sys; state = {'s': {'one', 'two', 'three'},"
    code += " 'f': frozenset((('x', 1), ('y', 2)))};"
    code += "sys.stdout.buffer.write(b''.join(map(bytes, encode(state).chunks())))"
    outputs = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT,
                       env={**os.environ, "PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(outputs) == 1
    assert len(outputs.pop()) > 64


def test_random_numbers_go_on_where_they_were():
    ours, numpys = random.Random(1), np.random.default_rng(1)
    ours.random(), numpys.random()
    state = there_and_back({"ours": ours.getstate(), "numpy": numpys.bit_generator.state})
    again, numpy_again = random.Random(), np.random.default_rng()
    again.setstate(state["ours"])
    numpy_again.bit_generator.state = state["numpy"]
    assert again.random() == ours.random()
    assert numpy_again.random() == numpys.random()


# --- NumPy


@given(
    hnp.arrays(
        hnp.array_dtypes(allow_subarrays=True)
        | hnp.nested_dtypes(max_itemsize=200)
        | hnp.scalar_dtypes()
        | hnp.datetime64_dtypes()
        | st.sampled_from([np.longdouble, np.clongdouble]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    )
)
def test_arrays_of_every_dtype_come_back(array):
    assert_same(there_and_back({"array": array}), {"array": array})


@given(hnp.scalar_dtypes().flatmap(hnp.from_dtype))
def test_scalars_of_every_dtype_come_back(scalar):
    assert_same(there_and_back({"scalar": scalar, "key": {scalar: 1}}), {"scalar": scalar, "key": {scalar: 1}})


ALIGNED = np.dtype([("a", "i1"), ("b", ">f8", (2, 3)), (("title", "c"), [("d", "U3")])], align=True)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(2, 3, 4).T,
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(20)[::-3],
        np.broadcast_to(np.float32(3), (3, 4)),
        np.frombuffer(b"abcd", "<i2"),
        np.array(5),
        np.zeros((0, 3)),
        np.zeros((2, 0, 1 << 40), "U9"),
        np.arange(3, dtype=">i4"),
        np.zeros(3, ALIGNED),
        np.ndarray((2,), "S0"),
        np.frombuffer(b"12345678", "V4"),
        np.array(["", "a\0", "\ud800"]),
        np.array(["2026-11-21", "NaT"], "M8[25s]"),
        np.zeros(3, np.dtype(np.int8).newbyteorder(">")),
        np.zeros(3, {"names": ["a"], "formats": ["i4"], "offsets": [5], "itemsize": 11}),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_odd_arrays_come_back(array):
    assert_same(there_and_back({"array": array}), {"array": array})


@pytest.mark.parametrize(
    "scalar",
    [np.str_("a\0"), np.bytes_(b"a\0"), np.str_(""), np.float64("nan"), np.longdouble(1) / 3, np.zeros(1, ALIGNED)[0],
     np.datetime64("NaT"), np.bool_(True), np.timedelta64(3, "ns"), np.dtype("f4"), ALIGNED],
    ids=repr,
)  # fmt: skip
def test_odd_scalars_come_back(scalar):
    found = there_and_back({"scalar": scalar})["scalar"]
    assert_same(found, scalar)
    if isinstance(scalar, (str, bytes)):
        assert len(found) == len(scalar)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "int4", "uint2"])
def test_dtypes_of_ml_dtypes_come_back(name):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="NOT TESTED with ml_dtypes: pip install ml_dtypes")
    array = np.array([0, 1, 2, 1], getattr(ml_dtypes, name))
    assert_same(there_and_back({"array": array, "scalar": array[1]}), {"array": array, "scalar": array[1]})


def test_one_array_in_two_places_is_stored_once_and_shared_again():
    array = np.zeros(100_000)
    state = {"a": array, "b": [array, array[:]], "half": array[::2], "equal": array.copy()}
    assert encode(state).size_bytes < array.nbytes * 2.5 + 2000
    found = there_and_back(state, chunk_bytes=MIB)
    found["a"][0] = 7
    assert found["b"][0][0] == found["b"][1][0] == 7
    assert found["equal"][0] == 0


def test_the_same_memory_read_in_another_order_is_another_array():
    square = np.arange(9.0).reshape(3, 3)
    state = {"a": square, "b": square.T, "c": square.view(np.int64), "d": square.reshape(9)}
    assert_same(there_and_back(state), state)


def test_names_are_readable_and_never_shared():
    array = np.zeros(1)
    state = {
        "a.b": array + 1, "a": {"b": array + 2}, "a.b~2": array + 3, "": array + 4, "__metadata__": array + 5,
        "x\n\ud800": array + 6, "l" * 300: array + 7, "l" * 301: array + 8, "t": ({1: array + 9},),
    }  # fmt: skip
    assert_same(there_and_back(state), state)
    names = set(safetensors.numpy.load(stored(state)))
    assert {"a.b", "a.b~2", "a.b~2~2", "__metadata__~2", "x??", "t.0.1", "l" * 200, "l" * 200 + "~2"} < names


# --- the safetensors library as the judge


@given(st.lists(hnp.arrays(hnp.integer_dtypes(endianness="<") | hnp.floating_dtypes(endianness="<", sizes=(16, 32, 64))
                           | hnp.boolean_dtypes(), hnp.array_shapes(min_dims=0, min_side=0, max_side=4))))  # fmt: skip
def test_the_library_reads_the_same(arrays):
    found = safetensors.numpy.load(stored({"arrays": arrays}))
    assert_same([found[f"arrays.{index}"] for index in range(len(arrays))], [array.copy() for array in arrays])


def test_what_the_library_wrote_is_read(tmp_path):
    """Its order, its padding and its idea of a header, with our metadata in it."""
    arrays = {"w": np.arange(3.0), "b": np.arange(5, dtype=np.int8), "s": np.array(1, np.uint16)}
    makings = ", ".join(f'"{name}": "numpy"' for name in arrays)
    text = '{"version": 1, "arrays": {%s}, "state": {"dict": {"x": [{"array": "w"}, {"array": "b"}, {"array": "s"}]}}}'
    data = safetensors.numpy.save(arrays, {METADATA_KEY: text % makings, "format": "np"})
    assert_same(decode([data], "file", size_bytes=len(data)), {"x": list(arrays.values())})


def test_arrays_are_aligned_in_the_file(tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(
        stored({"a": np.zeros(3, np.int8), "b": np.zeros(3), "c": np.zeros(1, "f2"), "d": np.zeros(1, "c16")})
    )
    mapped = np.memmap(path, np.uint8, "r")
    header = int.from_bytes(mapped[:8].tobytes(), "little")
    assert (header + 8) % 64 == 0
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {"a", "b", "c", "d"}
        assert METADATA_KEY in file.metadata()
    order = [name for name, _ in sorted(_offsets(path.read_bytes()).items(), key=lambda item: item[1])]
    assert order == ["d", "b", "c", "a"]


def _offsets(data: bytes) -> dict[str, int]:
    import json

    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


# --- PyTorch


def torch_dtypes() -> list[Any]:
    if torch is None:
        return []
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return sorted((one for one in found if not str(one).startswith("torch.q")), key=str)


@needs_torch
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", torch_dtypes(), ids=str)
def test_tensors_of_every_dtype_come_back(dtype):
    noise = torch.frombuffer(bytearray(random.Random(1).randbytes(24 * dtype.itemsize)), dtype=torch.uint8)
    if dtype == torch.bool:
        noise = noise % 2
    tensor = torch.empty(0, dtype=dtype).set_(noise.untyped_storage(), 0, (2, 3, 4))
    state = {"tensor": tensor, "empty": tensor[:0], "scalar": tensor[1, 2, 3], "part": tensor[1], "dtype": dtype}
    assert_same(there_and_back(state), state)


@needs_torch
def test_odd_tensors_come_back():
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        "transposed": base.permute(2, 0, 1),
        "step": base[:, ::2],
        "expanded": torch.ones(1).expand(3, 4),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "square": base[0, :3, :3],
        "square transposed": base[0, :3, :3].T,
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "parameter": torch.nn.Parameter(base),
        "frozen": torch.nn.Parameter(base, requires_grad=False),
        "grad": torch.ones(2, requires_grad=True),
        "of a graph": torch.ones(2, requires_grad=True) * 2,
        "channels last": torch.zeros(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda:1"),
        "rng": torch.get_rng_state(),
        "huge": torch.zeros(0, 1 << 40),
    }
    found = there_and_back(state)
    assert_same(found, state)
    assert found["of a graph"].is_leaf


@needs_torch
def test_tied_weights_are_stored_once_and_tied_again():
    weight = torch.nn.Parameter(torch.zeros(100, 100))
    state = {"a": weight, "b": weight.detach(), "row": weight.detach()[0]}
    assert encode(state).size_bytes < 40_000 + 400 + 2000
    found = there_and_back(state)
    with torch.no_grad():
        found["a"][0, 0] = 7
    assert found["b"][0, 0] == 7
    assert found["row"][0] == 0


@needs_torch
def test_a_training_goes_on_as_if_nothing_had_happened():
    def made() -> Any:
        network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        optimizer = torch.optim.Adam(network.parameters(), amsgrad=True)
        return network, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def train(parts: Any, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = parts[0](torch.randn(8, 3)).square().mean()
            parts[1].zero_grad()
            loss.backward()
            parts[1].step()
            parts[2].step()
            losses.append(loss.item())
        return losses

    torch.manual_seed(1)
    parts = made()
    train(parts, 3)
    state = {"parts": [part.state_dict() for part in parts], "random": torch.get_rng_state()}
    found = there_and_back(state)
    assert_same(found, state)
    expected = train(parts, 5)
    again = made()
    for part, one in zip(again, found["parts"], strict=True):
        part.load_state_dict(one)
    torch.set_rng_state(found["random"])
    assert train(again, 5) == expected


@needs_torch
def test_the_library_reads_tensors_by_the_name_of_their_path():
    import safetensors.torch

    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).bfloat16()
    found = safetensors.torch.load(stored({"model": network.state_dict(), "step": 7}))
    assert {one.dtype for one in found.values()} == {torch.bfloat16}
    assert {name: tensor_bytes(one) for name, one in found.items()} == {
        f"model.{name}": tensor_bytes(one) for name, one in network.state_dict().items()
    }


@needs_torch
def test_saving_leaves_no_trace_on_a_tensor():
    tensor = torch.zeros(3)
    stored({"tensor": tensor})
    tensor.resize_(100_000)  # which tensor.numpy() would forbid for good
    assert not tensor.is_conj()


@needs_torch
@pytest.mark.skipif(torch is not None and not torch.cuda.is_available(), reason="NOT TESTED on a GPU: there is none")
def test_tensors_come_from_a_gpu():
    state = {"a": torch.arange(1 << 22, device="cuda"), "b": torch.rand(300, 500, device="cuda").T, "c": torch.ones(3)}
    state["d"] = torch.rand(7, dtype=torch.complex64, device="cuda").conj()
    expected = {name: one.detach().cpu().clone() for name, one in state.items()}
    buffers = HostBuffers()
    for _ in range(3):
        snapshot = encode(state).snapshot(buffers)
        for one in state.values():
            one.zero_()
        assert_same(decode(snapshot.chunks(), "memory"), expected)
        snapshot.release()
        for name, one in state.items():
            one.copy_(expected[name])
    assert_same(there_and_back(state), expected)


# --- JAX


def test_jax_in_a_process_of_its_own():
    """Its threads are not made for the forks of other tests."""
    if importlib.util.find_spec("jax") is None:
        pytest.skip("NOT TESTED with JAX: pip install jax")
    alone = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "tests/unit/jax_states.py",
    ]
    done = subprocess.run(alone, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- what is refused


class Color(enum.IntEnum):
    RED = 1


class Plain(enum.Enum):
    RED = 1


class Text(str):
    __slots__ = ()


@dataclasses.dataclass
class Config:
    a: int = 1


Point = collections.namedtuple("Point", "x y")  # noqa: PYI024


def tagged() -> Any:
    values: Any = OrderedDict(a=1)
    values.tag = 1
    return values


REFUSED = [
    ({"rng": {"gen": np.random.default_rng(1)}}, 'state["rng"]["gen"] is a Generator', ".bit_generator.state"),
    ({"r": random.Random(1)}, 'state["r"] is a Random', ".getstate()"),
    ({"r": np.random.RandomState(1)}, 'state["r"] is a RandomState', ".get_state()"),
    ({"a": [1, (2, {3: Color.RED})]}, 'state["a"][1][1][3] is a Color', "int(...)"),
    ({"a": Plain.RED}, 'state["a"] is a Plain', "plain values"),
    ({"a": Text("x")}, 'state["a"] is a Text', "str.__str__"),
    ({"a": Point(1, 2)}, 'state["a"] is a Point', "tuple(...)"),
    ({"a": collections.defaultdict(list)}, 'state["a"] is a defaultdict', "dict(...)"),
    ({"a": collections.Counter("a")}, 'state["a"] is a Counter', "dict(...)"),
    ({"a": collections.deque()}, 'state["a"] is a deque', "make it again"),
    ({"a": Config()}, 'state["a"] is a Config', "asdict"),
    ({"a": (x for x in "a")}, 'state["a"] is a generator', "make it again"),
    ({"a": len}, 'state["a"] is a builtin_function_or_method', "make it again"),
    ({"a": lambda: 1}, 'state["a"] is a function', "make it again"),
    ({"a": int}, 'state["a"] is a type', "make it again"),
    ({"a": object()}, 'state["a"] is an object', "plain values"),
    ({"a": types.SimpleNamespace()}, 'state["a"] is a SimpleNamespace', "plain values"),
    ({"a": np.array([None])}, 'state["a"] is an array of dtype object', "tolist"),
    ({"a": np.zeros(1, [("x", "O")])}, 'state["a"] is an array of dtype', "tolist"),
    ({"a": np.array(["x"], np.dtypes.StringDType())}, 'state["a"] is an array of dtype StringDType()', "tolist"),
    ({"a": np.ma.masked_array([1], [True])}, 'state["a"] is a MaskedArray', ".mask"),
    ({"a": np.ones((1, 1)).view(np.matrix)}, 'state["a"] is a matrix', "numpy.asarray"),
    ({"a": np.zeros(1, [("x", "i4")]).view(np.recarray)}, 'state["a"] is a recarray', "numpy.asarray"),
    ({"a": np.zeros(1, np.dtype((np.record, [("x", "i4")])))}, 'state["a"] is an array of records', "astype"),
    ({"a": tagged()}, 'state["a"] is an OrderedDict with attributes', "dict(...)"),
    ({"a": dt.datetime(2026, 1, 1, tzinfo=__import__("zoneinfo").ZoneInfo("UTC"))},
     'state["a"] is a datetime with a ZoneInfo', "astimezone"),
    ({"a": {Color.RED: 1}}, 'state["a"] (a key) is a Color', "Use str"),
    ({"a": {(1, Color.RED): 1}}, 'state["a"] (a key) is a tuple', "Use str"),
    ({"s": [{1, Point(1, 2)}]}, 'state["s"][0] (an element) is a Point', "Use str"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "message", "hint"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_would_not_come_back_is_refused_by_its_path(state, message, hint):
    with pytest.raises(UsageTypeError) as caught:
        encode(state)
    assert caught.value.message.startswith(message)
    assert caught.value.hint is not None
    assert hint in caught.value.hint


@needs_torch
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*sparse csr.*", "ignore:.*quantized tensor")
def test_tensors_that_would_not_come_back_are_refused():
    sub = type("Sub", (torch.Tensor,), {})
    network = torch.nn.Linear(1, 1)
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    cases = {
        "a Linear": (network, ".state_dict()"),
        "an Adam": (torch.optim.Adam(network.parameters()), ".state_dict()"),
        "a Generator": (torch.Generator(), ".get_state()"),
        "a quantized tensor": (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "dequantize"),
        "a sparse or nested tensor": (torch.eye(2).to_sparse(), "to_dense"),
        "a tensor on the device meta": (torch.ones(2, device="meta"), "Materialise"),
        "a tensor whose memory has been freed": (freed, "Gather"),
        "a Sub": (torch.ones(2).as_subclass(sub), "as_subclass"),
    }
    for what, (value, hint) in cases.items():
        with pytest.raises(UsageTypeError) as caught:
            encode({"a": [value]})
        assert caught.value.message.startswith(f'state["a"][0] is {what}')
        assert hint in str(caught.value.hint)


@pytest.mark.parametrize("state", [[1], None, "text", collections.Counter(), 1])
def test_a_state_is_a_dict(state):
    with pytest.raises(UsageTypeError, match=r"A state is a dict, not an? "):
        encode(state)


def test_cycles_are_refused():
    state: dict[str, Any] = {"a": {"b": []}}
    state["a"]["b"].append(state["a"])
    with pytest.raises(UsageError, match=r'state\["a"\]\["b"\]\[0\] contains itself'):
        encode(state)


def test_the_same_container_twice_is_no_cycle():
    shared = [1]
    assert there_and_back({"a": shared, "b": [shared, shared]}) == {"a": [1], "b": [[1], [1]]}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {(1,): (value,)}
    return {"x": value}


def test_deep_ones_come_back_and_deeper_ones_are_refused():
    assert_same(there_and_back(nested(49)), nested(49))
    with pytest.raises(UsageError, match="nested deeper than 100 levels") as caught:
        encode(nested(50))
    assert len(caught.value.message) < 600
    with pytest.raises(UsageError, match="nested deeper"):
        encode(nested(100_000))


def test_a_header_that_nobody_would_read_is_refused():
    with pytest.raises(UsageError, match=r"plain values of the state take \d+ bytes") as caught:
        encode({"x": ["y" * 10_000] * 10_001})
    assert "numpy.array" in str(caught.value.hint)


# --- the stream


def test_pieces_are_small_and_few_and_go_through_one_buffer():
    large = np.arange(3 * MIB, dtype=np.int64)
    state = {"large": large, "small": [np.full(10, index) for index in range(10_000)], "long": "x" * 20_000_000}
    encoded = encode({"large": large})
    tracemalloc.start()
    try:
        for _ in encoded.chunks():
            pass
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()
    sizes = [len(chunk) for chunk in encode(state).chunks()]
    assert max(sizes) == MIB
    assert len(sizes) < 60


def test_a_chunk_stays_as_it_is_while_the_array_changes():
    array = np.zeros(3 * MIB, np.uint8)
    digest, stored = hashlib.sha256(), b""
    for chunk in encode({"array": array}).chunks():
        digest.update(chunk)
        array += 1  # by another thread, or another coroutine
        stored += bytes(chunk)
    assert hashlib.sha256(stored).digest() == digest.digest()
    found: Any = decode([stored], "memory")["array"]
    assert set(found) == {1, 2, 3}


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_does_not_grow_with_an_array(order):
    array = np.zeros((3000, 2000), order=order)
    tracemalloc.start()
    try:
        data = encode({"array": array})
        for _ in data.chunks():
            assert tracemalloc.get_traced_memory()[0] < 18 * MIB
        tracemalloc.reset_peak()
        found = decode(data.chunks(), "memory")
        assert tracemalloc.get_traced_memory()[1] < array.nbytes + 26 * MIB
    finally:
        tracemalloc.stop()
    assert_same(found, {"array": array})


def test_a_stream_begins_anew_each_time():
    encoded = encode({"a": np.arange(100_000), "b": 1})
    assert b"".join(map(bytes, encoded.chunks())) == b"".join(map(bytes, encoded.chunks()))


def large_state() -> dict[str, Any]:
    """Beyond one slab, with borders of slabs within arrays, and arrays that are not contiguous."""
    noise = np.random.default_rng(1)
    state = {str(index): noise.integers(0, 255, 30_000_001 + index, np.uint8) for index in range(4)}
    transposed = noise.random((1500, 1000)).T
    return {**state, "f": transposed, "small": [np.full(3, index) for index in range(100)], "text": "x" * 100_000}


def change(state: dict[str, Any]) -> None:
    for value in state.values():
        if isinstance(value, np.ndarray):
            np.add(value, 1, out=value)
    state["small"].clear()


def test_after_a_snapshot_everything_may_change():
    state = large_state()
    expected = stored(state)
    buffers = HostBuffers()
    snapshot = encode(state).snapshot(buffers)
    change(state)
    assert snapshot.size_bytes == len(expected)
    assert b"".join(map(bytes, snapshot.chunks())) == expected
    assert max(len(chunk) for chunk in snapshot.chunks()) <= MIB
    assert snapshot.snapshot(buffers) is snapshot
    snapshot.release()


@pytest.mark.parametrize("copy_of", [lambda value: value, lambda value: torch and torch.from_numpy(value)])
def test_memory_of_snapshots_is_used_again_and_freed_in_the_end(copy_of):
    array = copy_of(np.arange(5 * MIB))
    if array is None:
        pytest.skip("NOT TESTED with PyTorch: pip install torch")
    buffers = HostBuffers()
    for _ in range(2):
        first = encode({"a": array}).snapshot(buffers)
        second = encode({"a": array}).snapshot(buffers)
        assert buffers.free_bytes == 0
        first.release()
        first.release()
        held = buffers.free_bytes
        assert 40 * MIB <= held <= 64 * MIB
        second.release()
        assert buffers.free_bytes == 2 * held
    for _ in range(3):  # now one at a time, and small ones: the rest is freed
        encode({"a": array[:10]}).snapshot(buffers).release()
    assert buffers.free_bytes == 64 * 1024
    buffers.clear()
    assert buffers.free_bytes == 0


def test_a_released_snapshot_is_not_read():
    snapshot = encode({"a": np.zeros(3)}).snapshot(HostBuffers())
    snapshot.release()
    with pytest.raises(AssertionError):
        list(snapshot.chunks())


def test_buffers_may_be_used_from_several_threads():
    buffers = HostBuffers()
    wrong: list[int] = []

    def use(number: int) -> None:
        for round_ in range(20):
            array = np.full(200_000, number * 100 + round_)
            snapshot = encode({"a": array}).snapshot(buffers)
            if not (decode(snapshot.chunks(), "memory")["a"] == array).all():
                wrong.append(number)
            snapshot.release()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert buffers.free_bytes <= 4 * 2 * MIB


# --- without the libraries

BLOCKED = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
from pathlib import Path
from taskckpt._states import decode, encode
from taskckpt.errors import MissingDependencyError
data = Path({path!r}).read_bytes()
try:
    print(decode([data], "the-uri"))
except MissingDependencyError as error:
    print(error.message, error.hint, error.uri)
print(decode([b"".join(encode({{"plain": (1, b"2")}}).chunks())], "u"))
print(sorted({{"numpy", "torch", "jax"}} & {{name for name, one in sys.modules.items() if one}}))
"""


def run_without(blocked: list[str], data: bytes, tmp_path: Path) -> list[str]:
    path = tmp_path / "state"
    path.write_bytes(data)
    code = BLOCKED.format(blocked=blocked, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.splitlines()


def test_without_numpy_its_arrays_are_not_loaded(tmp_path):
    missing = "The state holds values of numpy, which is not installed here. pip install numpy the-uri"
    for value in (np.zeros(3), np.float32(1), np.dtype("i4")):
        assert run_without(["numpy"], stored({"a": value}), tmp_path) == [missing, "{'plain': (1, b'2')}", "[]"]


def test_plain_states_need_no_library(tmp_path):
    plain = "{'plain': (1, b'2')}"
    assert run_without([], stored({"a": (None, 1)}), tmp_path) == ["{'a': (None, 1)}", plain, "[]"]


@needs_torch
def test_without_pytorch_its_tensors_are_not_loaded(tmp_path):
    for value in (torch.zeros(3), torch.Size([1]), torch.float32):
        found = run_without(["torch"], stored({"a": value}), tmp_path)
        assert found[0].startswith("The state holds values of torch, which is not installed here. pip install torch")


@needs_torch
def test_tensors_need_no_numpy(tmp_path):
    code = """
import sys, warnings
sys.modules["numpy"] = None
warnings.simplefilter("ignore")
import torch
from taskckpt._states import HostBuffers, decode, encode
tensor = torch.arange(1 << 20)
snapshot = encode({"a": tensor, "b": tensor.reshape(1024, 1024).T}).snapshot(HostBuffers())
found = decode(snapshot.chunks(), "u")
print(torch.equal(found["a"], tensor), torch.equal(found["b"], tensor.reshape(1024, 1024).T))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True True\n"


# --- stored once, loaded for ever

GOLDEN_PLAIN: dict[str, Any] = {
    "none": None, "true": True, "ints": [0, -1, 2**53, 3**100], "floats": [0.1, -0.0, math.inf, math.nan],
    "complex": 1 - 2j, "text": "é\u2028", "surrogate": "\ud800", "bytes": b"\0\xff", "bytearray": bytearray(b"x"),
    "tuple": (1, (2,), []), "set": {1, "a"}, "frozenset": frozenset({(1, 2)}), "ordered": OrderedDict(b=1, a=2),
    "keys": {1: "int", None: "none", (1, "x"): "tuple"}, "long": "ab" * 10_000, "long bytes": bytearray(20_000),
    "datetime": dt.datetime(2026, 11, 21, 8, 46, 32, 5, dt.timezone(dt.timedelta(hours=5))),
    "fold": dt.datetime(2026, 10, 25, 2, fold=1),  # noqa: DTZ001
    "date": dt.date(2026, 11, 21), "timedelta": dt.timedelta(-1, 2, 3), "decimal": decimal.Decimal("1.10"),
    "fraction": fractions.Fraction(1, 3), "uuid": uuid.UUID(int=7), "path": Path("a/b"),
}  # fmt: skip
GOLDEN_NUMPY: dict[str, Any] = {
    **{kind: np.arange(3).astype(kind) for kind in "?bBhHiIqQefdF"},
    "big-endian": np.arange(3, dtype=">i4"), "complex128": np.array([1 + 2j]), "text": np.array(["a", "é"]),
    "bytes": np.array([b"a", b"bc"]), "time": np.array(["2026-11-21"], "M8[D]"), "span": np.array([7], "m8[25s]"),
    "struct": np.array([(1, (2.5, 3.5), ("x",))], [("a", "i1"), ("b", ">f8", (2,)), ("c", [("d", "U3")])]),
    "matrix": np.arange(6).reshape(2, 3), "0-d": np.array(1.5), "empty": np.zeros((0, 3)), "void": np.zeros(2, "V3"),
    "scalars": [np.float32(1.5), np.bool_(True), np.datetime64("2026", "Y"), np.str_("a"), np.bytes_(b"a")],
    "dtype": np.dtype("f4"),
}  # fmt: skip


def golden_torch() -> dict[str, Any]:
    shared = torch.arange(3.0)
    network = torch.nn.Linear(1, 2).bfloat16()
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    return {
        "model": network.state_dict(), "tied": [shared, shared], "parameter": torch.nn.Parameter(torch.ones(2)),
        "grad": torch.ones(1, requires_grad=True), "complex128": torch.tensor([1 + 2j], dtype=torch.complex128),
        "fp8": torch.ones(2).to(torch.float8_e4m3fn), "fnuz": torch.ones(2).to(torch.float8_e5m2fnuz),
        "size": torch.Size([2]), "dtype": torch.int8, "device": torch.device("cpu"),
    }  # fmt: skip


def golden(name: str, state: dict[str, Any]) -> None:
    """A state of each kind, as it was stored when its format was made. STATE_GOLDEN=write adds what is not there."""
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists() and os.environ.get("STATE_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(stored(state))
    data = path.read_bytes()
    assert_same(decode([data], str(path), size_bytes=len(data)), state)
    assert stored(state) == data  # the writer is still the one of this version


def test_golden_plain_values():
    golden("plain", GOLDEN_PLAIN)


def test_golden_numpy():
    golden("numpy", GOLDEN_NUMPY)


@needs_torch
def test_golden_torch():
    golden("torch", golden_torch())
