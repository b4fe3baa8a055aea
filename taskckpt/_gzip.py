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

A block that does not shrink by 3 % is kept in stored deflate blocks: that costs 0.01 % and makes reading it 3 times as
fast. isal does the work (650 to 850 MiB/s per core, 50 times zlib at level 6); without it the standard library's zlib.
"""

from __future__ import annotations

import functools
import logging
import struct
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

from taskckpt._operation import ordered_map
from taskckpt.errors import CorruptCheckpointError

BLOCK_BYTES = 4 << 20
PIECE_BYTES = 1 << 20

_HEADER = struct.Struct("<10sH2sHI")
_START = bytes.fromhex("1f8b08040000000000ff")
_TRAILER = struct.Struct("<II")
_STORED = struct.Struct("<BHH")
_MAX_STORED = 0xFFFF
# A block is kept as it is if less than 3 % would be gained.
_WORTH = 0.97
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


def compress(chunks: Iterable[bytes | memoryview], *, level: int = 1, threads: int = 2) -> Generator[bytes]:
    """Gzip a stream: whole members, in order, compressed by ``threads`` threads.

    At most ``threads + 2`` blocks of 4 MiB and their members are in memory. A chunk is copied before the next is asked
    for. What ``chunks`` raises passes through; closing the generator ends the threads.

    Args:
        chunks: The content in pieces of any size; without any, the result is one empty member.
        level: 1 to 3 (isal) or 9 (zlib).
        threads: How many blocks are compressed at a time.
    """
    codec = _codec()
    spare: list[bytearray] = []

    def work(filled: tuple[bytearray, int]) -> tuple[bytes, bytearray]:
        block, size = filled
        return _member(codec, memoryview(block)[:size], level), block

    for member, block in ordered_map(work, _blocks(chunks, spare), threads=threads, ahead=1):
        # Fresh memory is dear (0.5 to 1.6 s per GiB in a VM), so blocks are used again.
        spare.append(block)
        yield member


def _blocks(chunks: Iterable[bytes | memoryview], spare: list[bytearray]) -> Iterator[tuple[bytearray, int]]:
    """The content regrouped: a buffer and how much of it is filled; at least one, which may be empty."""
    block, filled, count = bytearray(BLOCK_BYTES), 0, 0
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
                block, filled = spare.pop() if spare else bytearray(BLOCK_BYTES), 0
    if filled or not count:
        yield block, filled


def _member(codec: _Codec, data: memoryview, level: int) -> bytes:
    body = [_EMPTY_BODY] if not data else _deflated(codec, data, level)
    size = _HEADER.size + sum(map(len, body)) + _TRAILER.size
    header = _HEADER.pack(_START, 8, b"TC", 4, size)
    return b"".join([header, *body, _TRAILER.pack(codec.crc32(data), len(data))])


def _deflated(codec: _Codec, data: memoryview, level: int) -> list[bytes | memoryview]:
    if _looks_worth_it(codec, data, level):
        body = codec.deflate(data, level)
        if len(body) <= len(data) * _WORTH:
            return [body]
    stored: list[bytes | memoryview] = []
    for start in range(0, len(data), _MAX_STORED):
        piece = data[start : start + _MAX_STORED]
        last = start + len(piece) == len(data)
        stored += (_STORED.pack(last, len(piece), len(piece) ^ 0xFFFF), piece)
    return stored


def _looks_worth_it(codec: _Codec, data: memoryview, level: int) -> bool:
    """Try a few samples: a block of random data then costs a sixtieth of what deflating it all would."""
    if len(data) <= 4 * _SAMPLES * _SAMPLE_BYTES:
        return True
    step = (len(data) - _SAMPLE_BYTES) // (_SAMPLES - 1)
    samples = [data[start : start + _SAMPLE_BYTES] for start in range(0, len(data), step)][:_SAMPLES]
    return sum(len(codec.deflate(sample, level)) for sample in samples) <= _SAMPLES * _SAMPLE_BYTES * _WORTH


def decompress(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """Inflate a gzip stream of any number of members, ours or not, in pieces of at most 1 MiB.

    What came out before an error was found has been given already: it counts only when the iterator ended normally.

    Raises:
        CorruptCheckpointError: Damaged, cut, empty, or with something else behind the last member.
    """
    codec = _codec()
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
