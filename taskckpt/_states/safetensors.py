"""The safetensors format as a stream: its header written and read, its buffers one after the other.

A length of 8 bytes (little-endian), a JSON header of that length, then the tensors' bytes without gaps:
https://github.com/huggingface/safetensors#format. The library of that name holds a whole file in memory;
this module never does. Pure but for the iterator that it reads from.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from taskckpt.errors import CorruptCheckpointError, UsageError

# The library reads no longer ones.
HEADER_LIMIT_BYTES = 100_000_000

# The dtypes that every reader knows. The library has newer ones (C64 since 0.7), but refuses a file with any that it
# does not know.
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}

_LENGTH_BYTES = 8
# The tensors begin at a multiple of this, so that a file mapped into memory has them aligned.
_ALIGNMENT_BYTES = 64
_MAX_DIMENSIONS = 64
# From here on a copy lets other threads run meanwhile, if NumPy is there to do it.
_LARGE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Tensor:
    """An entry of the header. Its place follows from the order of all of them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


# --- writing -----------------------------------------------------------------------------------


def header_of(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> bytes:
    """The length and the header of a file whose tensors follow in this order.

    Raises:
        UsageError: It would be longer than readers take.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT_BYTES)
    if len(text) > HEADER_LIMIT_BYTES:
        raise UsageError(
            f"The plain values of the state take {len(text)} bytes; {HEADER_LIMIT_BYTES} is the most.",
            hint="Hold long lists of numbers as arrays: numpy.array(values).",
        )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


# --- reading -----------------------------------------------------------------------------------


class Malformed(Exception):  # noqa: N818 - becomes CorruptCheckpointError at the door
    """What is not as the format says; turned into CorruptCheckpointError at the door."""


class StreamReader:
    """Takes a stream of chunks apart. Each chunk is used up before the next one is asked for."""

    def __init__(self, chunks: Iterable[bytes | memoryview], uri: str) -> None:
        self._chunks: Iterator[bytes | memoryview] = iter(chunks)
        self._rest = memoryview(b"")
        self._uri = uri

    def read(self, size_bytes: int) -> bytes:
        """Some bytes; memory grows with what arrives, not with what was promised."""
        parts: list[bytes] = []
        while size_bytes:
            part = self._next(size_bytes)
            parts.append(bytes(part))
            size_bytes -= len(part)
        return b"".join(parts)

    def read_into(self, target: memoryview) -> None:
        """Fills ``target``, in as few copies as there are chunks."""
        while target:
            part = self._next(len(target))
            copy(target[: len(part)], part)
            target = target[len(part) :]

    def skip_to_end(self) -> bool:
        """Reads the rest of the stream, so that its digest is checked by whoever feeds it; was there any?"""
        any_left = False
        while self._fetch():
            any_left = True
            self._rest = memoryview(b"")
        return any_left

    def _next(self, at_most: int) -> memoryview:
        if not self._fetch():
            raise CorruptCheckpointError("A state is cut short.", uri=self._uri)
        part = self._rest[:at_most]
        self._rest = self._rest[at_most:]
        return part

    def _fetch(self) -> bool:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._rest = memoryview(chunk).cast("B")
        return True


def copy(target: memoryview, source: memoryview) -> None:
    """Copies bytes; large ones without holding up other threads (assigning to a memoryview does)."""
    numpy = sys.modules.get("numpy")
    if numpy is None or len(source) < _LARGE_BYTES:
        target[:] = source
    else:
        numpy.copyto(numpy.frombuffer(target, numpy.uint8), numpy.frombuffer(source, numpy.uint8))


def read_header(reader: StreamReader, size_bytes: int | None) -> tuple[dict[str, Any], list[Tensor]]:
    """The metadata, and the tensors in the order of their bytes: without gaps from the header's end on.

    Args:
        reader: At the beginning of the stream; afterwards at the first tensor.
        size_bytes: The length of the whole stream, if that is known.

    Raises:
        Malformed: It is not as the format says. Nothing has been allocated by what it says.
        CorruptCheckpointError: The stream is cut short.
    """
    length = int.from_bytes(reader.read(_LENGTH_BYTES), "little")
    limit = HEADER_LIMIT_BYTES if size_bytes is None else min(HEADER_LIMIT_BYTES, size_bytes - _LENGTH_BYTES)
    if not 2 <= length <= limit:
        raise Malformed(f"a header of {length} bytes")
    entries = parse_json(reader.read(length))
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict):
        raise Malformed("no metadata")
    tensors = _in_order(entries)
    data_bytes = sum(tensor.size_bytes for tensor in tensors)
    if size_bytes is not None and _LENGTH_BYTES + length + data_bytes != size_bytes:
        raise Malformed(f"its header speaks of {data_bytes} bytes of arrays, the whole has {size_bytes}")
    return cast("dict[str, Any]", metadata), tensors


def parse_json(text: bytes | str) -> dict[str, Any]:
    """A JSON object in which no name is repeated."""
    try:
        value = json.loads(
            text.decode() if isinstance(text, bytes) else text,  # given bytes, json would guess UTF-16 too
            object_pairs_hook=_distinct,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise Malformed("no JSON, or nested too deeply") from error
    if not isinstance(value, dict):
        raise Malformed("no JSON object")
    return cast("dict[str, Any]", value)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("a name that is repeated")
    return found


def _no_constant(name: str) -> Any:
    raise Malformed(f"{name} is no JSON")


def _in_order(entries: dict[str, Any]) -> list[Tensor]:
    placed = sorted((_tensor_from(name, entry) for name, entry in entries.items()), key=lambda one: one[:2])
    end = 0
    for begin, stop, tensor in placed:
        if begin != end:
            raise Malformed(f"the bytes of tensor {tensor.name[:80]!r} overlap others, or leave a gap")
        end = stop
    return [tensor for _, _, tensor in placed]


def _tensor_from(name: str, entry: Any) -> tuple[int, int, Tensor]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(stop)]} if (
            dtype in ITEM_BYTES and len(entry) == 3
        ):
            dimensions = dimensions_from(shape, ITEM_BYTES[dtype])
            if 0 <= begin <= stop == begin + math.prod(dimensions) * ITEM_BYTES[dtype]:
                return begin, stop, Tensor(name, dtype, dimensions, stop - begin)
        case _:
            pass
    raise Malformed(f"the entry of tensor {name[:80]!r} is malformed")


def dimensions_from(shape: object, item_bytes: int) -> tuple[int, ...]:
    """A shape that arrays can have: no negative sizes, and no overflow in any of them."""
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise Malformed("no shape")
    sizes = cast("list[object]", shape)
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise Malformed("no shape")
    dimensions = cast("tuple[int, ...]", tuple(sizes))
    if math.prod(max(size, 1) for size in dimensions) * max(item_bytes, 1) >= 1 << 62:
        raise Malformed("an absurd shape")
    return dimensions
