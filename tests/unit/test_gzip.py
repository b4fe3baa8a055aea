from __future__ import annotations

import builtins
import gzip
import io
import logging
import os
import shutil
import struct
import subprocess
import threading
import time
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskckpt._archive import gzip as _gzip
from taskckpt.errors import CorruptCheckpointError

MIB = 1 << 20
TEXT = b"".join(b"step=%d loss=%.6f\n" % (step, 1 / (step + 1)) for step in range(400_000))
RANDOM = os.urandom(9 * MIB)


@pytest.fixture(params=["isal", "zlib"])
def codec(request, monkeypatch):
    """Both libraries; what this yields is the codec that writes and reads in the test."""
    _gzip._codec.cache_clear()
    if request.param == "isal":
        pytest.importorskip("isal")
    else:
        hide_isal(monkeypatch)
    yield request.param
    _gzip._codec.cache_clear()


def hide_isal(monkeypatch) -> None:
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name == "isal":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


def pieces(data: bytes, size: int = MIB):
    return [data[start : start + size] for start in range(0, len(data), size)]


def joined(chunks) -> bytes:
    """Copied one by one: a chunk is valid until the next is asked for."""
    return b"".join(map(bytes, chunks))


def inflate(stored: bytes, size: int = MIB) -> bytes:
    return joined(_gzip.decompress(pieces(stored, size)))


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 9 * MIB])
@pytest.mark.parametrize("source", [TEXT, RANDOM], ids=["text", "random"])
def test_round_trip_and_what_others_think_of_it(codec, source, size, tmp_path) -> None:
    data = source[:size]
    members = list(map(bytes, _gzip.compress(pieces(data, 700_001))))
    stored = b"".join(members)
    assert len(members) == max(-(-len(data) // (4 * MIB)), 1)
    assert inflate(stored) == data
    assert gzip.decompress(stored) == data
    (tmp_path / "x.gz").write_bytes(stored)
    subprocess.run(["gzip", "-t", str(tmp_path / "x.gz")], check=True)
    if shutil.which("pigz"):
        subprocess.run(["pigz", "-t", str(tmp_path / "x.gz")], check=True)


@given(data=st.binary(max_size=3000), size=st.integers(1, 700), feed=st.integers(1, 700))
@settings(max_examples=50)
def test_any_cutting_into_chunks_gives_the_same(data, size, feed) -> None:
    stored = joined(_gzip.compress(pieces(data, size)))
    assert stored == joined(_gzip.compress([data]))
    assert inflate(stored, feed) == data


def test_layout_of_a_member_as_the_docstring_says(codec) -> None:
    (member,) = _gzip.compress([b"hello " * 100])
    assert member[:10] == bytes.fromhex("1f8b08040000000000ff")
    extra_size, name, field_size, member_size = struct.unpack("<H2sHI", member[10:20])
    assert (extra_size, name, field_size, member_size) == (8, b"TC", 4, len(member))
    assert zlib.decompress(member[20:-8], -15) == b"hello " * 100
    assert struct.unpack("<II", member[-8:]) == (zlib.crc32(b"hello " * 100), 600)


def test_members_can_be_split_without_inflating() -> None:
    data = TEXT[: 5 * MIB] + RANDOM[: 5 * MIB]
    stored = joined(_gzip.compress(pieces(data)))
    found = b""
    while stored:
        (size,) = struct.unpack_from("<I", stored, 16)
        found += gzip.decompress(stored[:size])
        stored = stored[size:]
    assert found == data


def test_what_does_not_shrink_is_stored_and_what_does_is_not(codec) -> None:
    random = joined(_gzip.compress([RANDOM[: 4 * MIB]]))
    assert len(random) < 4 * MIB * 1.0002
    assert RANDOM[1000:30000] in random
    assert len(joined(_gzip.compress([TEXT[: 4 * MIB]]))) < 2 * MIB
    # Too little to sample, and compressible only after the samples are looked at.
    small = joined(_gzip.compress([RANDOM[:50_000]]))
    assert len(small) < 50_100


def test_a_chunk_may_be_reused_after_the_next_was_asked_for() -> None:
    buffer = bytearray(MIB)

    def chunks():
        for number in range(20):
            buffer[:] = bytes([number]) * MIB
            yield memoryview(buffer)

    assert inflate(joined(_gzip.compress(chunks()))) == b"".join(bytes([n]) * MIB for n in range(20))


def test_chunks_of_other_item_sizes_count_by_their_bytes() -> None:
    stored = joined(_gzip.compress([memoryview(b"12345678" * 3).cast("Q")]))
    assert inflate(stored) == b"12345678" * 3


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("taskckpt_")]


def test_an_early_end_leaves_no_thread() -> None:
    def chunks():
        while True:
            yield TEXT[:MIB]

    members = _gzip.compress(chunks())
    next(members)
    assert workers()
    members.close()
    assert not workers()


def test_an_error_of_the_source_passes_through_and_leaves_no_thread() -> None:
    def chunks():
        yield from pieces(RANDOM)
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(_gzip.compress(chunks()))
    assert not workers()


@pytest.mark.parametrize("source", [TEXT, RANDOM], ids=["text", "random"])
def test_memory_does_not_grow_with_the_stream(source) -> None:
    chunk = source[:MIB]

    def measure(chunks: int) -> int:
        tracemalloc.start()
        total = sum(len(piece) for piece in _gzip.decompress(_gzip.compress(chunk for _ in range(chunks))))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert total == chunks * MIB
        return peak

    assert measure(100) < 64 * MIB


def test_one_foreign_member_of_any_size_is_read_in_bounded_pieces(codec) -> None:
    found = list(_gzip.decompress(pieces(gzip.compress(TEXT, 1))))
    assert b"".join(found) == TEXT
    assert max(map(len, found)) <= MIB


def test_a_bomb_comes_out_in_small_pieces(codec) -> None:
    bomb = gzip.compress(bytes(64 * MIB))
    tracemalloc.start()
    total = sum(len(piece) for piece in _gzip.decompress([bomb]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 64 * MIB
    assert peak < 8 * MIB


def test_every_header_field_that_gzip_knows_is_skipped(codec) -> None:
    buffer = io.BytesIO()
    with gzip.GzipFile("a name", "wb", fileobj=buffer, mtime=12345) as file:
        file.write(b"content")
    assert inflate(buffer.getvalue() * 3, 5) == b"content" * 3


STORED = joined(_gzip.compress([TEXT[:100_000]])) + joined(_gzip.compress([RANDOM[:10_000]]))


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        (b"", "too early"),
        (b"\x1f", "too early"),
        (STORED[:15], "too early"),
        (STORED[:-1], "too early"),
        (STORED[:-9], "too early"),
        (STORED + b"\x1f", "too early"),
        (STORED + b"\0", "damaged"),
        (STORED + b"garbage", "damaged"),
        (STORED + bytes(512), "damaged"),
        (b"not gzip at all", "damaged"),
        (STORED[:-5] + bytes([STORED[-5] ^ 1]) + STORED[-4:], "damaged"),  # CRC
        (STORED[:-1] + bytes([STORED[-1] ^ 1]), "damaged"),  # size
        (STORED[:-100] + bytes([STORED[-100] ^ 1]) + STORED[-99:], "damaged"),  # content
    ],
)
@pytest.mark.parametrize("feed", [1 << 20, 7])
def test_damage_is_noticed(codec, stored, why, feed) -> None:
    with pytest.raises(CorruptCheckpointError, match=why):
        inflate(stored, feed)


def test_every_flipped_bit_is_noticed_or_harmless(codec) -> None:
    data = TEXT[:300]
    stored = joined(_gzip.compress([data]))
    harmless = []
    for position in range(len(stored)):
        for bit in range(8):
            damaged = bytearray(stored)
            damaged[position] ^= 1 << bit
            try:
                found = inflate(bytes(damaged))
            except CorruptCheckpointError:
                continue
            assert found == data
            harmless.append(position)
    # Time, system and our own field say nothing about the content. Of the deflate data it is the unused bits at its
    # end, and now and then a bit that gives another way to say the same.
    assert sum(position >= 20 for position in harmless) < 16


def test_a_missing_isal_is_said_once(monkeypatch, caplog) -> None:
    hide_isal(monkeypatch)
    _gzip._codec.cache_clear()
    with caplog.at_level(logging.WARNING, logger="taskckpt"):
        for _ in range(3):
            assert inflate(joined(_gzip.compress([b"x"]))) == b"x"
    _gzip._codec.cache_clear()
    assert [record.message for record in caplog.records if "isal" in record.message] == [
        "The package isal is not installed: folders are compressed with zlib, about 8 times slower."
    ]


# Members that say how long they are


def member(body: bytes, content: bytes, *, says: int | None = None, crc: int | None = None) -> bytes:
    """A member as we write them, of any deflate data, which may lie about its own size."""
    size = 20 + len(body) + 8 if says is None else says
    header = bytes.fromhex("1f8b08040000000000ff") + struct.pack("<H2sHI", 8, b"TC", 4, size)
    return header + body + struct.pack("<II", zlib.crc32(content) if crc is None else crc, len(content) & 0xFFFFFFFF)


def deflated(data: bytes, level: int = 6) -> bytes:
    return zlib.compress(data, level, -15)


def stored_block(data: bytes, *, last: bool = True, first_byte: int = 0, off: int = 0) -> bytes:
    return struct.pack("<BHH", first_byte | last, len(data), len(data) ^ 0xFFFF ^ off) + data


SMALL = TEXT[:5000]
PLAIN = member(deflated(SMALL), SMALL)
KEPT = member(stored_block(SMALL), SMALL)
TWO_KINDS = stored_block(SMALL[:2000], last=False) + deflated(SMALL[2000:])
HARMLESS = {
    "deflated": PLAIN,
    "stored": KEPT,
    "stored in pieces": member(stored_block(SMALL[:9], last=False) + stored_block(SMALL[9:]), SMALL),
    "an empty stored block": member(stored_block(SMALL, last=False) + stored_block(b""), SMALL),
    "stored, then deflated": member(TWO_KINDS, SMALL),
    "bits that mean nothing": member(stored_block(SMALL, first_byte=0xF8), SMALL),
    "too large to be ours": member(deflated(SMALL), SMALL, says=1 << 31),
    "too small to be one": member(deflated(SMALL), SMALL, says=28),
    "more than there is": member(deflated(SMALL), SMALL, says=4 << 20),
    "nothing": member(deflated(SMALL), SMALL, says=0),
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("around", [b"", PLAIN, KEPT, gzip.compress(SMALL)], ids=["alone", "plain", "kept", "foreign"])
def test_whatever_a_member_is_made_of_its_content_comes_out(codec, name, around) -> None:
    stored = around + HARMLESS[name] + around
    expected = gzip.decompress(stored)
    for feed in (1 << 20, 4001, 7):
        assert inflate(stored, feed) == expected
    assert not workers()


LIES = {
    "one byte less": member(deflated(SMALL), SMALL, says=len(PLAIN) - 1),
    "one byte more": member(deflated(SMALL), SMALL, says=len(PLAIN) + 1),
    "stored, one byte less": member(stored_block(SMALL), SMALL, says=len(KEPT) - 1),
    "stored, one byte more": member(stored_block(SMALL), SMALL, says=len(KEPT) + 1),
    "the next one too": member(deflated(SMALL), SMALL, says=len(PLAIN) + len(KEPT)),
    "wrong CRC": member(deflated(SMALL), SMALL, crc=1),
    "stored, wrong CRC": member(stored_block(SMALL), SMALL, crc=1),
    "stored, wrong size": member(stored_block(SMALL), SMALL + b"x", crc=zlib.crc32(SMALL)),
    "stored, wrong length": member(stored_block(SMALL, off=1), SMALL),
    "stored, no last block": member(stored_block(SMALL, last=False), SMALL),
    "stored, something behind": member(stored_block(SMALL) + b"x", SMALL),
    "stored, beyond its end": member(stored_block(SMALL)[:-9], SMALL),
    "an unknown kind of block": member(b"\x07" + SMALL, SMALL),
    "larger than a member may be": member(deflated(bytes(4 * MIB + 1)), bytes(4 * MIB + 1)),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("before", [b"", KEPT * 20], ids=["first", "later"])
def test_a_member_that_lies_is_damage(codec, name, before) -> None:
    for feed in (1 << 20, 4001):
        with pytest.raises(CorruptCheckpointError, match="gzip stream is damaged"):
            inflate(before + LIES[name] + KEPT, feed)
    assert not workers()


@pytest.mark.parametrize("stored", [member(body(SMALL[:80]), SMALL[:80]) for body in (deflated, stored_block)])
def test_every_flipped_bit_of_a_short_member_is_noticed_or_harmless(codec, stored) -> None:
    for position in range(len(stored)):
        for bit in range(8):
            damaged = bytearray(stored)
            damaged[position] ^= 1 << bit
            try:
                found = inflate(bytes(damaged))
            except CorruptCheckpointError:
                continue
            assert found == SMALL[:80]


def test_a_member_that_is_a_bomb_takes_no_memory(codec) -> None:
    bomb = bytes(512 * MIB)
    stored = KEPT + member(deflated(bomb, 1), b"", crc=0)
    del bomb
    tracemalloc.start()
    with pytest.raises(CorruptCheckpointError):
        inflate(stored)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * MIB


@pytest.mark.parametrize("source", [TEXT, RANDOM, TEXT[: 5 * MIB] + RANDOM], ids=["text", "random", "both"])
def test_what_was_given_stays_as_it_is_until_the_next_is_asked_for(source) -> None:
    """Buffers are used again: a slow consumer would see the next content in one that is used too soon."""

    def slowly(chunks):
        for chunk in chunks:
            at_first = bytes(chunk)
            time.sleep(0.02)  # long enough to fill, deflate and inflate several blocks
            assert bytes(chunk) == at_first
            yield at_first

    data = source * (40 * MIB // len(source))
    stored = list(slowly(_gzip.compress(pieces(data))))
    assert gzip.decompress(b"".join(stored)) == data
    assert b"".join(slowly(_gzip.decompress(stored))) == data


def test_an_early_end_of_reading_leaves_no_thread() -> None:
    stored = joined(_gzip.compress(pieces(RANDOM * 3)))
    content = _gzip.decompress(pieces(stored))
    next(content)
    assert workers()
    content.close()
    assert not workers()


def test_an_error_of_what_is_read_passes_through_and_leaves_no_thread() -> None:
    stored = joined(_gzip.compress(pieces(RANDOM)))

    def chunks():
        yield stored[: 5 * MIB]
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(_gzip.decompress(chunks()))
    assert not workers()
