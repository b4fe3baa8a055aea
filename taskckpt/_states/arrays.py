"""Arrays of NumPy, PyTorch and JAX as tensors of a safetensors file, and back.

Nothing is imported to save: what a value belongs to has been imported by whoever made it. To load, the
library that made an array is imported again.

Each array has a *making*: what the header of the file does not tell. ``{"library": "torch"}`` is all where
safetensors has the dtype; others are stored as bytes (U8), and the making says the true ``dtype`` and ``shape``.
"""

from __future__ import annotations

import importlib
import math
import mmap
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

from taskckpt._states.dtypes import (
    FROM_ML_DTYPES,
    FROM_NUMPY,
    FROM_TORCH,
    ML_DTYPES,
    NUMPY,
    TORCH,
    Refused,
    describe,
    dtype_from,
    library,
    torch_dtype,
)
from taskckpt._states.safetensors import ITEM_BYTES, Malformed, Tensor, dimensions_from
from taskckpt.errors import StorageFullError

Making: TypeAlias = dict[str, Any]


class Source(Protocol):
    """Where an array's bytes come from, in C order."""

    def pieces(self, limit_bytes: int) -> Iterator[memoryview]:
        """The bytes, as views of the array itself where it is contiguous."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """An array on its way into a file; ``alias`` is equal for arrays that are one and the same memory."""

    dtype: str
    shape: tuple[int, ...]
    item_bytes: int
    making: Making
    source: Source
    alias: Hashable = None

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Target:
    """Memory for an array on its way out of a file: fill ``view`` (None: no bytes), then call ``finish``."""

    view: memoryview | None
    finish: Callable[[], Any]


def _cut(view: memoryview, limit_bytes: int) -> Iterator[memoryview]:
    for start in range(0, len(view), limit_bytes):
        yield view[start : start + limit_bytes]


def _blocks(array: Any, size_bytes: int, limit_bytes: int) -> Iterator[Any]:
    """Parts along the first axes, in C order, each below the limit unless it is a single item."""
    if size_bytes <= limit_bytes or not array.ndim:
        yield array
        return
    row_bytes = size_bytes // len(array)
    rows = max(1, limit_bytes // row_bytes)
    for start in range(0, len(array), rows):
        if row_bytes > limit_bytes and array.ndim > 1:
            yield from _blocks(array[start], row_bytes, limit_bytes)
        else:
            yield array[start : start + rows]


# --- bytes -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BytesSource:
    """Bytes or text, too long for the header."""

    data: bytes

    def pieces(self, limit_bytes: int) -> Iterator[memoryview]:
        return _cut(memoryview(self.data), limit_bytes)


def bytes_stored(data: bytes, making: str) -> Stored:
    """Long bytes, a long bytearray or a long str."""
    return Stored("U8", (len(data),), 1, {"library": making}, BytesSource(data))


_FINISH_BYTES: Mapping[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "str": lambda data: data.decode("utf-8", "surrogatepass"),
}


def _bytes_target(tensor: Tensor, making: Making) -> Target:
    memory = mmap.mmap(-1, max(tensor.size_bytes, 1))  # takes memory only as it is filled
    view = memoryview(memory)[: tensor.size_bytes]
    return Target(view, lambda: _FINISH_BYTES[making["library"]](memory[: tensor.size_bytes]))


# --- NumPy -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NumpySource:
    """A NumPy array; from JAX, it is fetched when it is read."""

    fetch: Callable[[], Any]

    def pieces(self, limit_bytes: int) -> Iterator[memoryview]:
        numpy = sys.modules["numpy"]
        array = self.fetch()
        if not array.nbytes:
            return
        parts = [array] if array.flags.c_contiguous else _blocks(array, array.nbytes, limit_bytes)
        for part in parts:
            flat = numpy.ascontiguousarray(part).reshape(-1).view(numpy.uint8)
            yield from _cut(memoryview(flat), limit_bytes)


def numpy_stored(array: Any) -> Stored:
    """A NumPy array of any dtype but object and its like."""
    memory = array.__array_interface__["data"][0] if array.size else None
    alias = None if memory is None else ("numpy", memory, array.dtype, array.shape, array.strides)
    return _stored_as(array.dtype, array.shape, {"library": "numpy"}, NumpySource(lambda: array), alias)


def _stored_as(dtype: Any, shape: tuple[int, ...], making: Making, source: Source, alias: Hashable) -> Stored:
    if dtype.str in FROM_NUMPY:
        return Stored(FROM_NUMPY[dtype.str], shape, dtype.itemsize, making, source, alias)
    described = describe(dtype)
    if isinstance(described, str) and described in FROM_ML_DTYPES:
        return Stored(FROM_ML_DTYPES[described], shape, dtype.itemsize, making, source, alias)
    making = {**making, "dtype": described, "shape": list(shape)}
    return Stored("U8", (math.prod(shape) * dtype.itemsize,), dtype.itemsize, making, source, alias)


def _numpy_target(tensor: Tensor, making: Making) -> Target:
    array = _numpy_empty(tensor, making)
    return Target(_flat(array), lambda: array)


def _numpy_empty(tensor: Tensor, making: Making) -> Any:
    if "dtype" in making:
        dtype, shape = dtype_from(making["dtype"]), dimensions_from(making.get("shape"), 1)
        _expect_size(tensor, shape, dtype.itemsize)
    else:
        dtype, shape = dtype_from(NUMPY.get(tensor.dtype) or ML_DTYPES.get(tensor.dtype)), tensor.shape
    # Unlike numpy.empty, this leaves a dtype of no bytes as it is. Never objects: dtype_from makes none.
    return library("numpy").ndarray(shape, dtype)


def _flat(array: Any) -> memoryview | None:
    return memoryview(array.reshape(-1).view(library("numpy").uint8)) if array.nbytes else None


def _expect_size(tensor: Tensor, shape: tuple[int, ...], item_bytes: int) -> None:
    if tensor.dtype != "U8" or tensor.size_bytes != math.prod(shape) * item_bytes:
        raise Malformed(f"tensor {tensor.name[:80]!r} has another size than its dtype and shape")


# --- PyTorch -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TorchSource:
    """A PyTorch tensor, on any device."""

    tensor: Any

    @property
    def size_bytes(self) -> int:
        return int(self.tensor.numel() * self.tensor.element_size())

    def pieces(self, limit_bytes: int) -> Iterator[memoryview]:
        if not self.size_bytes:
            return
        whole = self.tensor.is_contiguous() and self.tensor.device.type == "cpu"
        for part in [self.tensor] if whole else _blocks(self.tensor, self.size_bytes, limit_bytes):
            host = _plain(part).cpu()
            size_bytes = host.numel() * host.element_size()
            yield from _cut(memory_at(host.data_ptr(), size_bytes, host), limit_bytes)

    def device_parts(self, sizes: Iterable[int]) -> Iterator[Any]:
        """The tensor's bytes as tensors of bytes with these sizes, on its own device."""
        torch = sys.modules["torch"]
        plain = _plain(self.tensor)
        offset = plain.storage_offset() * plain.element_size()
        for size_bytes in sizes:
            part = torch.empty(0, dtype=torch.uint8, device=plain.device)
            yield part.set_(plain.untyped_storage(), offset, (size_bytes,))
            offset += size_bytes

    @property
    def cuda_device(self) -> Any:
        """The GPU that it is on, or None."""
        return self.tensor.device if self.tensor.is_cuda else None


def _plain(tensor: Any) -> Any:
    """The tensor in C order, its items as they read: itself, if it is so."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def memory_at(address: int, size_bytes: int, owner: object) -> memoryview:
    """Memory that belongs to ``owner``, which lives as long as the view.

    Not ``tensor.numpy()``: that forbids the tensor's storage for good to be resized, and knows fewer dtypes.
    """
    import ctypes  # only where there are tensors

    array: Any = (ctypes.c_ubyte * size_bytes).from_address(address)
    array.owner = owner
    return memoryview(array).cast("B")


def torch_stored(tensor: Any) -> Stored:
    """A plain dense PyTorch tensor of any dtype, on any device that has data.

    Raises:
        Refused: It is sparse, quantized, nested or without data.
    """
    tensor = tensor.detach()
    _refuse_odd_tensors(tensor)
    shape = tuple(tensor.shape)
    item_bytes = tensor.element_size()
    name = str(tensor.dtype).removeprefix("torch.")
    alias = None
    if tensor.numel():
        address = tensor.data_ptr()
        if not address:
            raise Refused("a tensor whose memory has been freed", "Gather it first (FSDP: a full state dict).")
        views = (tensor.is_conj(), tensor.is_neg())
        alias = ("torch", str(tensor.device), address, name, shape, tensor.stride(), views)
    if name in FROM_TORCH:
        return Stored(FROM_TORCH[name], shape, item_bytes, {"library": "torch"}, TorchSource(tensor), alias)
    making = {"library": "torch", "dtype": name, "shape": list(shape)}
    return Stored("U8", (tensor.numel() * item_bytes,), item_bytes, making, TorchSource(tensor), alias)


def _refuse_odd_tensors(tensor: Any) -> None:
    if tensor.is_quantized:
        raise Refused("a quantized tensor", "Call .dequantize(), or save .int_repr() and its scale.")
    if tensor.layout is not sys.modules["torch"].strided or tensor.is_nested:
        raise Refused("a sparse or nested tensor", "Call .to_dense(), or save what it is made of.")
    if tensor.is_meta:
        raise Refused("a tensor on the device meta, which has no data", "Materialise it first.")


def _torch_target(tensor: Tensor, making: Making) -> Target:
    torch = library("torch")
    if "dtype" in making:
        dtype, shape = torch_dtype(making["dtype"]), dimensions_from(making.get("shape"), 1)
        _expect_size(tensor, shape, dtype.itemsize)
    else:
        dtype, shape = torch_dtype(TORCH[tensor.dtype]), tensor.shape
    array = torch.empty(shape, dtype=dtype, device="cpu")
    view = memory_at(array.data_ptr(), tensor.size_bytes, array) if tensor.size_bytes else None
    return Target(view, lambda: array)


# --- JAX ---------------------------------------------------------------------------------------


def jax_stored(array: Any) -> Stored:
    """A JAX array or an array of random keys. What is on a device is fetched when it is read.

    Raises:
        Refused: It is a tracer, was donated, or lies on several hosts.
    """
    jax = sys.modules["jax"]
    numpy = sys.modules["numpy"]
    if isinstance(array, jax.core.Tracer):
        raise Refused("a value inside of a traced function", "Save outside of jit, grad and vmap.")
    if array.is_deleted():
        raise Refused("an array that was deleted or donated", "Save what the function returned instead.")
    if not array.is_fully_addressable:
        raise Refused("an array that lies on several hosts", "Gather it first, or save one part per process.")
    making: Making = {"library": "jax"}
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        making["key"] = str(jax.random.key_impl(array))
        array = jax.random.key_data(array)
    source = NumpySource(lambda: numpy.asarray(array))
    return _stored_as(array.dtype, tuple(array.shape), making, source, ("jax", id(array)))


def _jax_target(tensor: Tensor, making: Making) -> Target:
    jax = library("jax")
    array = _numpy_empty(tensor, making)
    key = making.get("key")

    def finish() -> Any:
        with _with_64_bits(jax):  # else an int64 would come back as an int32
            value = jax.numpy.asarray(array)
        return value if key is None else jax.random.wrap_key_data(value, impl=key)

    return Target(_flat(array), finish)


def _with_64_bits(jax: Any) -> AbstractContextManager[Any]:
    # Older ones have it elsewhere.
    place = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")
    return cast("AbstractContextManager[Any]", place.enable_x64(True))


# --- all ---------------------------------------------------------------------------------------

_TARGETS: Mapping[str, Callable[[Tensor, Making], Target]] = {
    **dict.fromkeys(_FINISH_BYTES, _bytes_target),
    "numpy": _numpy_target,
    "torch": _torch_target,
    "jax": _jax_target,
}


def import_libraries(makings: Iterable[object]) -> None:
    """Imports what the arrays of a state need, so that what is missing is known before any is read.

    Raises:
        MissingDependencyError: One of them is not installed.
    """
    for name in {_library_of(making) for making in makings} & {"numpy", "torch", "jax"}:
        library(name)


def _library_of(making: object) -> str:
    match making:
        case str(name) | {"library": str(name)} if name in _TARGETS:
            return name
        case _:
            raise Malformed("an array that is made of nothing that is known")


def target_for(tensor: Tensor, making: object) -> Target:
    """Memory for an array, allocated but not touched.

    Raises:
        Malformed: The header speaks of an array that cannot be.
        MissingDependencyError: Its library is not installed.
        StorageFullError: There is not so much memory.
    """
    name = _library_of(making)
    try:
        return _TARGETS[name](tensor, cast("Making", making) if isinstance(making, dict) else {"library": name})
    except (MemoryError, OSError, RuntimeError) as error:  # NumPy's, the system's and PyTorch's
        raise StorageFullError(
            f"There is no memory for an array of {tensor.size_bytes} bytes.", hint="Load where there is more of it."
        ) from error
