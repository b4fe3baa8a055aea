"""A state on its way out: a stream of bytes from the caller's arrays, or from a copy of them in reused memory.

A snapshot copies the stream's bytes into slabs of host memory. Fresh memory costs more than the copy (2 to 6 us
for each page of 4 KiB), so slabs are used again.
"""

from __future__ import annotations

import mmap
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from taskckpt._operation import ordered_map
from taskckpt._states.arrays import Source, TorchSource, memory_at
from taskckpt._states.safetensors import copy
from taskckpt.errors import SourceChangedError, StorageFullError

# What a stream is cut into at most: small enough to stay in a core's cache while it is hashed and stored. Much smaller
# pieces are joined, since each one costs something further on.
PIECE_BYTES = 1024 * 1024
_SMALL_BYTES = 64 * 1024

# PyTorch rounds pinned memory up to powers of two: these are some, so nothing is wasted.
_SLAB_BYTES = 64 * 1024 * 1024
_SMALLEST_SLAB_BYTES = 64 * 1024
# A slab that this many snapshots did without is freed.
_IDLE_SNAPSHOTS = 3

# Two threads copy as fast as the memory goes.
_COPY_THREADS = 2
_COPY_BYTES = 16 * 1024 * 1024


@dataclass(eq=False, slots=True)
class Slab:
    """A stretch of host memory; ``tensor`` is the same memory for PyTorch if it is pinned."""

    view: memoryview
    tensor: Any
    used_at: int = 0


class HostBuffers:
    """Host memory for snapshots, used again and again. Safe to use from several threads.

    It holds as much as the snapshots that were alive at the same time lately: to keep that to two (one in
    flight and one waiting), release the waiting one before the next one is taken.
    """

    def __init__(self) -> None:
        # No lock: a signal handler may interrupt any line here, and wait for a thread that gives slabs back.
        self._free: deque[Slab] = deque()
        self._snapshots = 0

    def take(self, size_bytes: int, *, pinned: bool) -> list[Slab]:
        """Slabs with room for so many bytes, all of them full but the last."""
        self._snapshots += 1
        now = self._snapshots
        slabs: list[Slab] = []
        while size_bytes > 0:
            slab = self._reused_or_new(_slab_size(size_bytes), pinned)
            slab.used_at = now
            slabs.append(slab)
            size_bytes -= len(slab.view)
        for slab in self._free.copy():
            if now - slab.used_at >= _IDLE_SNAPSHOTS:
                self._is_mine(slab)
        return slabs

    def _reused_or_new(self, size_bytes: int, pinned: bool) -> Slab:
        for slab in reversed(self._free.copy()):
            if len(slab.view) == size_bytes and (slab.tensor is not None) == pinned and self._is_mine(slab):
                return slab
        try:
            return _pinned_slab(size_bytes) if pinned else _plain_slab(size_bytes)
        except (MemoryError, OSError, RuntimeError) as error:  # the last one is PyTorch's
            raise StorageFullError("There is no memory for a snapshot of the state.") from error

    def _is_mine(self, slab: Slab) -> bool:
        """Takes a slab out, in one step, unless somebody was quicker."""
        try:
            self._free.remove(slab)
        except ValueError:
            return False
        return True

    def give_back(self, slabs: Sequence[Slab]) -> None:
        """For the next snapshot. Nobody may read them any more."""
        self._free.extend(slabs)

    def clear(self) -> None:
        """Frees all memory that no snapshot is using: for when none is to be expected soon."""
        self._free.clear()

    @property
    def free_bytes(self) -> int:
        """How much memory is held for the next snapshot."""
        return sum(len(slab.view) for slab in self._free.copy())


def _slab_size(size_bytes: int) -> int:
    if size_bytes >= _SLAB_BYTES:
        return _SLAB_BYTES
    return max(_SMALLEST_SLAB_BYTES, 1 << (size_bytes - 1).bit_length())


def _plain_slab(size_bytes: int) -> Slab:
    # Not asked for as huge pages: measured, those took three times as long to come.
    return Slab(memoryview(mmap.mmap(-1, size_bytes)), None)


def _pinned_slab(size_bytes: int) -> Slab:
    torch = sys.modules["torch"]
    tensor = torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    return Slab(memory_at(tensor.data_ptr(), size_bytes, tensor), tensor)


# --- the stream --------------------------------------------------------------------------------


class EncodedState:
    """A state that is ready to be stored.

    Attributes:
        size_bytes: The exact length of the stream.
    """

    def __init__(self, header: bytes, sources: Sequence[Source], data_bytes: int) -> None:
        self.size_bytes = len(header) + data_bytes
        self._header = header
        self._sources = sources
        self._data_bytes = data_bytes

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The stream in pieces of at most 1 MiB, each valid until the next is asked for; each call begins at the start.

        Pieces are copies: whoever changes the arrays meanwhile gets a state of before and after, but never one whose
        digest is not that of what was stored.
        """
        small: list[bytes] = []
        buffer = self._buffer()
        joined = total = 0
        for piece in self._pieces():
            total += len(piece)
            if len(piece) <= _SMALL_BYTES:
                small.append(bytes(piece))
                joined += len(piece)
                if joined < PIECE_BYTES:
                    continue
                piece = memoryview(b"")  # noqa: PLW2901 - it is among the small ones
            if small:
                yield b"".join(small)
                small, joined = [], 0
            if piece:
                yield piece if buffer is None else _copied(piece, buffer)
        if small:
            yield b"".join(small)
        if total != self.size_bytes:
            raise SourceChangedError("An array of the state was given another size while it was saved.")

    def _buffer(self) -> memoryview | None:
        """Where pieces are copied to; None where nobody else can change them."""
        return memoryview(bytearray(PIECE_BYTES))

    def _pieces(self) -> Iterator[memoryview]:
        header = memoryview(self._header)
        for start in range(0, len(header), PIECE_BYTES):
            yield header[start : start + PIECE_BYTES]
        for source in self._sources:
            yield from source.pieces(PIECE_BYTES)

    def snapshot(self, buffers: HostBuffers) -> EncodedState:
        """The same state, copied into memory of its own: afterwards the caller may change everything.

        What lies on a GPU is copied by a stream of its own. Whatever the caller's current stream is given
        from now on waits for that on the GPU; the caller itself does not.

        Raises:
            StorageFullError: There is not so much memory.
        """
        pinned = any(isinstance(source, TorchSource) and source.cuda_device is not None for source in self._sources)
        slabs = buffers.take(self._data_bytes, pinned=pinned)
        try:
            events = _copy_all(self._sources, slabs)
        except BaseException:
            if not pinned:  # else a GPU may still be writing to them
                buffers.give_back(slabs)
            raise
        return _Snapshot(self._header, slabs, self._data_bytes, buffers, events)

    def release(self) -> None:
        """The memory of a snapshot may be used again; nobody may read its chunks any more. Repeatable."""


def _copied(piece: memoryview, buffer: memoryview) -> memoryview:
    target = buffer[: len(piece)]
    copy(target, piece)
    return target


class _Snapshot(EncodedState):
    """A state in slabs of host memory; what comes from a GPU is there once the events have happened."""

    def __init__(
        self, header: bytes, slabs: list[Slab], data_bytes: int, buffers: HostBuffers, events: Sequence[Any]
    ) -> None:
        super().__init__(header, [], data_bytes)
        self._slabs = slabs
        self._buffers = buffers
        self._events = events

    def _buffer(self) -> None:
        return None

    def _pieces(self) -> Iterator[memoryview]:
        yield from super()._pieces()
        assert self._slabs or not self._data_bytes, "a snapshot is read after its release"
        self._wait_for_copies()
        rest = self._data_bytes
        for slab in self._slabs:
            for start in range(0, min(len(slab.view), rest), PIECE_BYTES):
                yield slab.view[start : min(start + PIECE_BYTES, rest)]
            rest -= len(slab.view)

    def _wait_for_copies(self) -> None:
        for event in self._events:
            event.synchronize()

    def snapshot(self, buffers: HostBuffers) -> EncodedState:  # noqa: ARG002
        return self  # nobody else writes to its memory

    def release(self) -> None:
        self._wait_for_copies()
        slabs, self._slabs = self._slabs, []
        self._buffers.give_back(slabs)


# --- copying -----------------------------------------------------------------------------------


class _Cursor:
    """The place in the slabs where the next bytes go."""

    def __init__(self, slabs: Sequence[Slab]) -> None:
        self._slabs = slabs
        self._index = 0
        self._offset = 0

    def advance(self, size_bytes: int) -> Iterator[tuple[Slab, int, int]]:
        """The stretches (slab, start, stop) for so many bytes."""
        while size_bytes:
            slab = self._slabs[self._index]
            start, self._offset = self._offset, min(self._offset + size_bytes, len(slab.view))
            yield slab, start, self._offset
            size_bytes -= self._offset - start
            if self._offset == len(slab.view):
                self._index, self._offset = self._index + 1, 0


def _copy_all(sources: Iterable[Source], slabs: Sequence[Slab]) -> list[Any]:
    """Copies all sources into the slabs, and gives the events to wait for."""
    cursor = _Cursor(slabs)
    on_device: dict[Any, list[tuple[Any, Any]]] = {}

    def large_copies() -> Iterator[tuple[memoryview, memoryview]]:
        for source in sources:
            if isinstance(source, TorchSource) and source.cuda_device is not None:
                targets = [slab.tensor[start:stop] for slab, start, stop in cursor.advance(source.size_bytes)]
                on_device.setdefault(source.cuda_device, []).append((source, targets))
                continue
            for piece in source.pieces(_COPY_BYTES):
                done = 0
                for slab, start, stop in cursor.advance(len(piece)):
                    target, part = slab.view[start:stop], piece[done : done + stop - start]
                    done += len(part)
                    if len(part) > _SMALL_BYTES:
                        yield target, part
                    else:
                        copy(target, part)

    for _ in ordered_map(lambda pair: copy(*pair), large_copies(), threads=_COPY_THREADS, ahead=2):
        pass
    return [_start_device_copies(device, copies) for device, copies in on_device.items()]


def _start_device_copies(device: Any, copies: Sequence[tuple[TorchSource, Sequence[Any]]]) -> Any:
    """Lets a GPU copy tensors to pinned host memory, and gives the event after which they are there.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams
    """
    torch = sys.modules["torch"]
    callers = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(callers)  # what the caller has asked for so far comes first
    with torch.cuda.stream(stream):
        for source, targets in copies:
            for target, part in zip(targets, source.device_parts([len(one) for one in targets]), strict=True):
                target.copy_(part, non_blocking=True)
            source.tensor.record_stream(stream)  # else its memory might be given to others too early
    event = stream.record_event()
    callers.wait_event(event)  # what the caller asks for from now on must not change it before
    return event
