"""States with arrays and keys of JAX; run by ``test_state.py`` in a process of its own."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from taskckpt._states import decode, encode
from taskckpt.errors import CorruptCheckpointError, UsageTypeError
from tests.hostile.test_hostile_states import assert_refused, file_of, text_of
from tests.unit.test_state import GOLDEN, stored, there_and_back


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32", "float16", "bfloat16", "float32", "complex64", "int4",
                                   "float8_e4m3fn", "float8_e8m0fnu"])  # fmt: skip
def test_jax_arrays_come_back(dtype):
    array = jax.numpy.ones((2, 3), dtype)
    found = there_and_back({"array": array, "scalar": array[0, 0], "empty": array[:0]})
    for name, expected in (("array", array), ("scalar", array[0, 0]), ("empty", array[:0])):
        assert type(found[name]) is type(expected)
        assert found[name].dtype == expected.dtype
        assert found[name].shape == expected.shape
        assert np.asarray(found[name]).tobytes() == np.asarray(expected).tobytes()


def test_jax_keys_and_wide_numbers_come_back():
    with jax.enable_x64(True):
        wide = jax.numpy.arange(3) + 2**40
    keys = {
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(7, impl="rbg"), 3),
        "old": jax.random.PRNGKey(7),
        "wide": wide,
    }
    found = there_and_back(keys)
    assert found["wide"].dtype == np.int64
    assert (np.asarray(found["wide"]) == np.asarray(wide)).all()
    assert jax.random.key_impl(found["keys"]) == jax.random.key_impl(keys["keys"])
    assert found["keys"].shape == (3,)
    for name in ("key", "old"):
        assert jax.random.normal(found[name]) == jax.random.normal(keys[name])
    assert jax.random.normal(found["keys"][2]) == jax.random.normal(keys["keys"][2])


def test_jax_values_that_are_no_arrays_are_refused():
    def traced(value):
        with pytest.raises(UsageTypeError, match=r'state\["v"\] is a value inside of a traced function') as caught:
            encode({"v": value})
        assert "jit" in str(caught.value.hint)
        return value

    jax.jit(traced)(1.0)
    gone = jax.numpy.ones(3)
    gone.delete()
    with pytest.raises(UsageTypeError, match="deleted or donated"):
        encode({"v": gone})


def test_golden_jax():
    data = (GOLDEN / "jax.safetensors").read_bytes()
    found: Any = decode([data], "golden")
    assert jax.random.key_impl(found["key"]) == jax.random.key_impl(jax.random.key(7))
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(jax.random.key(7))).all()
    assert found["bf16"].dtype == "bfloat16"
    assert np.asarray(found["bf16"]).tolist() == [[0, 1, 2]]
    assert stored(found) == data


def test_hostile_keys_of_jax_are_refused():
    entries = {"a": {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]}}
    for key in ("nonsense", 7, ["a"]):
        text = text_of({"dict": {"x": {"array": "a"}}}, {"a": {"library": "jax", "key": key}})
        data = file_of(entries, text, bytes(8))
        assert_refused(data, len(data), CorruptCheckpointError)
