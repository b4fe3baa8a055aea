"""gzip, written in independent members by several threads, read as a stream.

Every 4 MiB of input become one gzip member (RFC 1952), so threads can compress side by side and any gzip reads the
result. Each member says in its header how long it is, so a reader can split the file without inflating it:

    offset  bytes
    0       1f 8b 08 04     magic, deflate, FEXTRA is the only flag
    4       00 00 00 00     no time
    8       00 ff           no extra flags, unknown system
    10      08 00           length of the extra field: 8
    12      54 43 04 00     subfield "TC" of 4 bytes:
    16      uint32 LE       size of the whole member, this header and the trailer included
    20      ...             raw deflate data
    -8      uint32 LE       CRC-32 of the content
    -4      uint32 LE       size of the content, 4 MiB at most

A block that does not shrink by 15 % is kept in stored deflate blocks: that costs 0.01 %. Float32 weights gain 8 % and
take 20 times as long to inflate as to copy, which pays only where a link carries less than 100 MiB/s. isal does the
work (650 to 850 MiB/s per core, 50 times zlib at level 6); without it the standard library's zlib.

Chunks go in and come out as everywhere in a stream of taskckpt: each is valid until the next is asked for, so that
buffers can be used again. Fresh memory is dear: 0.5 to 1.6 s per GiB in a virtual machine.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, cast

from taskckpt._operation import made_ahead, ordered_map
from taskckpt.errors import CorruptCheckpointError

BLOCK_BYTES = 4 << 20
PIECE_BYTES = 1 << 20

_HEADER = struct.Struct("<10sH2sHI")
_START = bytes.fromhex("1f8b08040000000000ff")
_EXTRA = (8, b"TC", 4)
_TRAILER = struct.Struct("<II")
_STORED = struct.Struct("<BHH")
_MAX_STORED = 0xFFFF
_MAX_MEMBER_BYTES = _HEADER.size + BLOCK_BYTES + -(-BLOCK_BYTES // _MAX_STORED) * _STORED.size + _TRAILER.size
# A block is kept as it is if less than this would be gained.
_WORTH = 0.85
_MAX_THREADS = 4
_SAMPLE_BYTES = 16 << 10
_SAMPLES = 4
# What a decompressor cannot take at once it hands back as a copy: feed it little.
_FEED_BYTES = 64 << 10
# An empty deflate stream: one final block with fixed codes.
_EMPTY_BODY = b"\x03\x00"


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def unconsumed_tail(self) -> bytes: ...
    def decompress(self, data: bytes | memoryview, max_length: int = 0, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Codec:
    """The part of zlib's interface that is needed, which isal has too."""

    deflate: Callable[[memoryview, int], bytes]
    crc32: Callable[[memoryview], int]
    new_decompressor: Callable[[], _Decompressor]
    error: type[Exception]


@functools.cache
def _codec() -> _Codec:
    try:
        from isal import isal_zlib
    except ImportError:
        logging.getLogger("taskckpt").warning(
            "The package isal is not installed: folders are compressed with zlib, about 8 times slower."
        )
        return _Codec(
            lambda data, level: zlib.compress(data, level, -15),
            zlib.crc32,
            lambda: zlib.decompressobj(wbits=31),
            zlib.error,
        )
    return _Codec(
        lambda data, level: bytes(isal_zlib.compress(data, level, -15)),
        isal_zlib.crc32,
        lambda: isal_zlib.decompressobj(wbits=31),
        cast("type[Exception]", isal_zlib.error),  # its stubs say that it is an instance
    )


def _threads() -> int:
    """As many as there are cores for this process, but few: each takes 8 MiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(_MAX_THREADS, cores))


# --- writing -----------------------------------------------------------------------------------


def compress(chunks: Iterable[bytes | memoryview], *, level: int = 1) -> Generator[memoryview]:
    """Gzip a stream: whole members, in order, compressed on 2 to 4 cores.

    Memory: a block of 4 MiB per core and two more, with what they were compressed to. What ``chunks`` raises passes
    through; closing the generator ends the threads.

    Args:
        chunks: The content in pieces of any size; without any, the result is one empty member.
        level: 1 to 3 (isal) or 9 (zlib).
    """
    codec = _codec()
    spare: list[memoryview] = []

    def work(filled: tuple[memoryview, int]) -> tuple[memoryview, int]:
        block, size = filled
        return block, _to_member(codec, block, size, level)

    blocks = made_ahead(_blocks(chunks, spare))
    with closing(blocks), closing(ordered_map(work, blocks, threads=_threads(), ahead=1)) as members:
        for block, size in members:
            yield block[:size]
            spare.append(block)


def _new_block(spare: list[memoryview]) -> memoryview:
    return spare.pop() if spare else memoryview(bytearray(_MAX_MEMBER_BYTES))


def _blocks(chunks: Iterable[bytes | memoryview], spare: list[memoryview]) -> Iterator[tuple[memoryview, int]]:
    """The content regrouped: a buffer and how much of it is filled; at least one, which may be empty."""
    block, filled, count = _new_block(spare), 0, 0
    for chunk in chunks:
        rest = memoryview(chunk).cast("B")
        while len(rest):
            taken = min(len(rest), BLOCK_BYTES - filled)
            block[filled : filled + taken] = rest[:taken]
            filled += taken
            rest = rest[taken:]
            if filled == BLOCK_BYTES:
                yield block, filled
                count += 1
                block, filled = _new_block(spare), 0
    if filled or not count:
        yield block, filled


def _to_member(codec: _Codec, block: memoryview, size: int, level: int) -> int:
    """Turn the content at the start of a buffer into a member there; gives the member's size."""
    content = block[:size]
    trailer = _TRAILER.pack(codec.crc32(content), size)
    body = _deflated(codec, content, level)
    if body is None:
        end = _store(block, size)
    else:
        end = _HEADER.size + len(body)
        block[_HEADER.size : end] = body
    member_size = end + _TRAILER.size
    block[: _HEADER.size] = _HEADER.pack(_START, *_EXTRA, member_size)
    block[end:member_size] = trailer
    return member_size


def _deflated(codec: _Codec, data: memoryview, level: int) -> bytes | None:
    """None if it is not worth it."""
    if not data:
        return _EMPTY_BODY
    if _looks_worth_it(codec, data, level):
        body = codec.deflate(data, level)
        if len(body) <= len(data) * _WORTH:
            return body
    return None


def _store(block: memoryview, size: int) -> int:
    """Spread the content out into stored deflate blocks behind room for the header; gives where they end."""
    count = -(-size // _MAX_STORED)
    for number in reversed(range(count)):  # from the end, so that nothing is overwritten before it was moved
        start = number * _MAX_STORED
        length = min(size - start, _MAX_STORED)
        to = _HEADER.size + start + (number + 1) * _STORED.size
        block[to : to + length] = block[start : start + length]
        _STORED.pack_into(block, to - _STORED.size, number == count - 1, length, length ^ _MAX_STORED)
    return _HEADER.size + size + count * _STORED.size


def _looks_worth_it(codec: _Codec, data: memoryview, level: int) -> bool:
    """Try a few samples: a block of random data then costs a sixtieth of what deflating it all would."""
    if len(data) <= 4 * _SAMPLES * _SAMPLE_BYTES:
        return True
    step = (len(data) - _SAMPLE_BYTES) // (_SAMPLES - 1)
    samples = [data[start : start + _SAMPLE_BYTES] for start in range(0, len(data), step)][:_SAMPLES]
    return sum(len(codec.deflate(sample, level)) for sample in samples) <= _SAMPLES * _SAMPLE_BYTES * _WORTH


# --- reading -----------------------------------------------------------------------------------


def decompress(chunks: Iterable[bytes | memoryview]) -> Generator[bytes | memoryview]:
    """Inflate a gzip stream of any number of members, ours or not, in pieces of at most 4 MiB.

    Our own members are inflated on 2 to 4 cores. From the first other one on, one thread goes through the stream: it
    knows what is wrong with it, if anything is. Memory stays bounded whatever the stream claims.
    What came out before an error was found has been given already: it counts only when the iterator ended normally.

    Raises:
        CorruptCheckpointError: Damaged, cut, empty, or with something else behind the last member.
    """
    codec = _codec()
    members = _Members(chunks)
    split = made_ahead(members)
    with (
        closing(split),
        closing(ordered_map(lambda member: _content(codec, member), split, threads=_threads(), ahead=1)) as contents,
    ):
        for block, content in contents:
            yield content
            members.spare.append(block)
    if members.rest is not None:
        yield from _one_by_one(codec, members.rest)


class _Members(Iterator[tuple[memoryview, int]]):
    """Splits a stream into members that say how long they are: a buffer and the size of the member in it.

    Ends before the first thing that is no whole member of ours; ``rest`` is the stream from there on, None at the end.
    """

    def __init__(self, chunks: Iterable[bytes | memoryview]) -> None:
        self._chunks = iter(chunks)
        self._left = memoryview(b"")
        self._found = False
        self.spare: list[memoryview] = []
        self.rest: Iterable[bytes | memoryview] | None = None

    def __next__(self) -> tuple[memoryview, int]:
        block = _new_block(self.spare)
        filled = self._fill(block, 0, _HEADER.size)
        size = _claimed_size(block) if filled == _HEADER.size else 0
        filled = self._fill(block, filled, size)
        if filled and filled == size:
            self._found = True
            return block, size
        if filled or not self._found:
            self.rest = chain((block[:filled], self._left), self._chunks)
        raise StopIteration

    def _fill(self, block: memoryview, filled: int, end: int) -> int:
        while filled < end:
            if not self._left:
                chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._left = memoryview(chunk).cast("B")
            taken = min(end - filled, len(self._left))
            block[filled : filled + taken] = self._left[:taken]
            filled += taken
            self._left = self._left[taken:]
        return filled


def _claimed_size(block: memoryview) -> int:
    """What the member at the start of a buffer says of its size; 0 if it is none of ours."""
    start, *extra, size = _HEADER.unpack_from(block)
    ours = start == _START and tuple(extra) == _EXTRA and _HEADER.size + _TRAILER.size < size <= _MAX_MEMBER_BYTES
    return size if ours else 0


def _content(codec: _Codec, filled: tuple[memoryview, int]) -> tuple[memoryview, bytes | memoryview]:
    """The buffer with a member, and the content, which may lie in that buffer."""
    block, size = filled
    stored = _stored_pieces(block, size)
    return block, _inflated(codec, block[:size]) if stored is None else _gathered(codec, block, size, stored)


def _inflated(codec: _Codec, member: memoryview) -> bytes:
    decompressor = codec.new_decompressor()
    try:
        content = decompressor.decompress(member, BLOCK_BYTES + 1)
    except codec.error as error:
        raise CorruptCheckpointError(f"The gzip stream is damaged: {error}.") from error
    if not decompressor.eof or decompressor.unused_data or len(content) > BLOCK_BYTES:
        raise CorruptCheckpointError("The gzip stream is damaged: a member is not as long as it says.")
    return content


def _stored_pieces(block: memoryview, size: int) -> list[tuple[int, int]] | None:
    """Where the content of a member lies that only has stored blocks, as we write them; None if it is not like that."""
    pieces: list[tuple[int, int]] = []
    at, end, last = _HEADER.size, size - _TRAILER.size, 0
    while not last:
        if at + _STORED.size > end:
            return None
        last, length, complement = _STORED.unpack_from(block, at)
        at += _STORED.size
        if last > 1 or length ^ complement != _MAX_STORED:
            return None
        pieces.append((at, length))
        at += length
    return pieces if at == end else None


def _gathered(codec: _Codec, block: memoryview, size: int, pieces: list[tuple[int, int]]) -> memoryview:
    """The content of a stored member, moved together in its own buffer and checked."""
    crc32, length = _TRAILER.unpack_from(block, size - _TRAILER.size)
    filled = 0
    for start, count in pieces:
        block[filled : filled + count] = block[start : start + count]
        filled += count
    content = block[:filled]
    if filled != length or codec.crc32(content) != crc32:
        raise CorruptCheckpointError("The gzip stream is damaged: a checksum does not fit.")
    return content


def _one_by_one(codec: _Codec, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    decompressor: _Decompressor | None = codec.new_decompressor()
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for start in range(0, len(view), _FEED_BYTES):
            rest: bytes | memoryview = view[start : start + _FEED_BYTES]
            while len(rest):
                decompressor = decompressor or codec.new_decompressor()
                yield from _inflate(decompressor, rest, codec.error)
                rest = b""
                if decompressor.eof:
                    rest, decompressor = decompressor.unused_data, None
    if decompressor is not None:
        raise CorruptCheckpointError("The gzip stream is damaged: it ends too early.")


def _inflate(decompressor: _Decompressor, data: bytes | memoryview, failure: type[Exception]) -> Iterator[bytes]:
    """Everything that one piece of input gives, in bounded pieces."""
    while not decompressor.eof:
        try:
            piece = decompressor.decompress(data, PIECE_BYTES)
        except failure as error:
            raise CorruptCheckpointError(f"The gzip stream is damaged: {error}.") from error
        if piece:
            yield piece
        data = decompressor.unconsumed_tail
        if not data and len(piece) < PIECE_BYTES:
            return
