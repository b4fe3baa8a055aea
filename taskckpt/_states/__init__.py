"""States: nested plain values and arrays, to a stream of bytes and back. No pickle; ``docs/format.md`` is the contract.

The stream is a safetensors file. Its arrays are the file's tensors, named by their path; everything else is JSON in
the file's metadata.
"""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, cast

from taskckpt._states import arrays as _arrays
from taskckpt._states import safetensors
from taskckpt._states.reader import StateReader
from taskckpt._states.safetensors import Malformed, StreamReader, Tensor
from taskckpt._states.snapshot import EncodedState, HostBuffers
from taskckpt._states.writer import StateWriter
from taskckpt.errors import (
    CorruptCheckpointError,
    MissingDependencyError,
    StorageFullError,
    TaskckptError,
    UnsupportedFormatError,
    UsageError,
)

__all__ = ["EncodedState", "HostBuffers", "decode", "encode"]

VERSION = 1
METADATA_KEY = "taskckpt.state"


def encode(state: Mapping[str, object]) -> EncodedState:
    """Walks a state, and copies no array: those are read when the chunks are.

    Args:
        state: A dict of plain values, containers and arrays. What is kept of them is said in ``docs/guide.md``.

    Raises:
        UsageTypeError: There is something in it that would not come back; the message names its path.
        UsageError: It contains itself, is nested too deeply, or its plain values take more than 100 MB.
    """
    writer = StateWriter()
    try:
        tree = writer.root(state)
        text = json.dumps(
            {"version": VERSION, "arrays": writer.makings, "state": tree},
            ensure_ascii=False, allow_nan=False, separators=(",", ":"),
        )  # fmt: skip
        # Large items first, so that each array is aligned without gaps, which the format does not allow.
        stored = sorted(writer.stored.items(), key=lambda item: -(item[1].item_bytes & -item[1].item_bytes))
        tensors = [Tensor(name, one.dtype, one.shape, one.size_bytes) for name, one in stored]
        header = safetensors.header_of(tensors, {METADATA_KEY: text})
    except RecursionError as error:
        raise UsageError("The state is nested too deeply for the stack that is left.") from error
    except UnicodeEncodeError as error:
        raise UsageError("A field of a dtype has a name that is not valid Unicode.") from error
    return EncodedState(header, [one.source for _, one in stored], sum(one.size_bytes for one in tensors))


def decode(chunks: Iterable[bytes | memoryview], uri: str, *, size_bytes: int | None = None) -> dict[str, object]:
    """Reads a state's stream straight into its arrays.

    Args:
        chunks: The stream, which is read to its end. The state must not be used if that raises: what the
            arrays hold is checked there, by the digest of the whole.
        uri: What errors are about.
        size_bytes: The length of the stream, if that is known: a header that lies about it is refused at once.

    Raises:
        CorruptCheckpointError: It is not what ``encode`` writes, or cut short.
        UnsupportedFormatError: A newer taskckpt wrote it, or its dtypes do not exist here.
        MissingDependencyError: It holds arrays of a library that is not installed.
        StorageFullError: There is not so much memory.
    """
    reader = StreamReader(chunks, uri)
    try:
        state = _state_from(reader, size_bytes)
    except Malformed as error:
        raise CorruptCheckpointError(f"A state is malformed: {error}.", uri=uri) from error
    except (MissingDependencyError, StorageFullError, UnsupportedFormatError) as error:
        reader.skip_to_end()  # what was damaged on the way may say anything: then that is the error to raise
        error.uri = uri
        raise
    if reader.skip_to_end():
        raise CorruptCheckpointError("A state has bytes after its end.", uri=uri)
    return state


def _state_from(reader: StreamReader, size_bytes: int | None) -> dict[str, object]:
    metadata, tensors = safetensors.read_header(reader, size_bytes)
    makings, tree = _parsed(metadata)
    if makings.keys() != {tensor.name for tensor in tensors}:
        raise Malformed("its arrays are not those of the file")
    _arrays.import_libraries(makings.values())
    arrays = {tensor.name: _read_array(reader, tensor, makings[tensor.name]) for tensor in tensors}
    with _nonsense_is_malformed():
        state = StateReader(arrays).value(tree)
    if type(state) not in (dict, OrderedDict):
        raise Malformed("it is no dict")
    return cast("dict[str, object]", state)


@contextmanager
def _nonsense_is_malformed() -> Generator[None]:
    """Around the constructors of Python and the libraries, which raise all kinds of things."""
    try:
        yield
    except TaskckptError:
        raise  # some are ValueErrors as well
    except (ArithmeticError, LookupError, RecursionError, RuntimeError, TypeError, ValueError, struct.error) as error:
        raise Malformed(f"a value that cannot be ({type(error).__name__})") from error


def _parsed(metadata: dict[str, Any]) -> tuple[dict[str, object], object]:
    text = metadata.get(METADATA_KEY)
    if not isinstance(text, str):
        raise Malformed("a safetensors file without a state")
    match safetensors.parse_json(text):
        case {"version": int(version)} if version > VERSION:
            raise UnsupportedFormatError(
                f"The state has format version {version}; this taskckpt reads version {VERSION}.",
                hint="A newer taskckpt wrote it: upgrade this one (pip install -U taskckpt).",
            )
        case {"version": int(version), "arrays": dict(makings), "state": tree} if version == VERSION:
            return cast("dict[str, object]", makings), tree
        case _:
            raise Malformed("no version, arrays and state")


def _read_array(reader: StreamReader, tensor: Tensor, making: object) -> Any:
    with _nonsense_is_malformed():
        target = _arrays.target_for(tensor, making)
    if target.view is not None:
        reader.read_into(target.view)
    with _nonsense_is_malformed():
        return target.finish()
