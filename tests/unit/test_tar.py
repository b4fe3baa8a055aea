from __future__ import annotations

import io
import os
import tarfile
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from taskckpt._archive import tar as _tar
from taskckpt._archive.tar import FILE, FOLDER, LINK, SYMLINK, Member, Reader
from taskckpt.errors import CorruptCheckpointError, UnsafeArchiveError

NS = 10**9
paths = st.binary(min_size=1, max_size=400).filter(lambda path: b"\0" not in path and path.strip(b"/"))
# What utime takes, and what a float in tarfile holds to the nanosecond only near 0.
times = st.integers(-(2**62), 2**62) | st.sampled_from(
    [0, 1, -1, NS, -NS, 8**11 * NS, 8**11 * NS - NS, (2**63 - 1) * NS]
)


def members_of(stream: bytes, piece: int = 1 << 20) -> list[tuple[Member, bytes]]:
    reader = Reader((stream[start : start + piece] for start in range(0, len(stream), piece)), entries=1000)
    found = []
    for member in reader:
        content = b""
        while reader.remaining:
            content += reader.read()
        found.append((member, content))
    return found


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


@given(
    name=paths,
    kind=st.sampled_from([FILE, LINK, SYMLINK, FOLDER]),
    mode=st.integers(0, 0o777),
    mtime_ns=times,
    target=paths,
    content=st.binary(max_size=2000),
    piece=st.sampled_from([1, 7, 512, 1 << 20]),
)
def test_what_is_written_is_read_back(name, kind, mode, mtime_ns, target, content, piece) -> None:
    target = target if kind in (LINK, SYMLINK) else b""
    content = content if kind == FILE else b""
    head = _tar.header(name, kind, mode, len(content), mtime_ns, target)
    assert len(head) == _tar.header_size(name, len(content), mtime_ns, target)
    stream = head + padded(content) + _tar.END
    assert members_of(stream, piece) == [(Member(name, kind, mode, len(content), mtime_ns, target), content)]


@given(name=paths, mtime_ns=st.integers(-(2**62), 2**62), target=paths)
@example(name=b"n\xff" * 60, mtime_ns=0, target=b"t")  # long and not UTF-8: hdrcharset=BINARY
@example(name=b"n", mtime_ns=0, target=b"t" * 101)
@example(name=b"n" * 100, mtime_ns=-1, target=b"t" * 100)
def test_tarfile_reads_what_is_written(name, mtime_ns, target) -> None:
    stream = _tar.header(name, SYMLINK, 0o640, 0, mtime_ns, target) + _tar.END
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        (found,) = archive.getmembers()
    assert os.fsencode(found.name) == name.rstrip(b"/")
    assert os.fsencode(found.linkname) == target
    assert found.mtime == pytest.approx(mtime_ns / NS)
    assert (found.mode, found.issym(), found.uid, found.gid, found.uname) == (0o640, True, 0, 0, "")


def test_a_file_of_more_than_8_gib_has_its_size_in_a_pax_record() -> None:
    size = 8**11 + 5
    head = _tar.header(b"big", FILE, 0o600, size, 0)
    assert len(head) == _tar.header_size(b"big", size, 0)
    with tarfile.open(fileobj=io.BytesIO(head), mode="r|") as archive:
        assert archive.next().size == size  # type: ignore[union-attr]
    assert next(Reader([head], 1)).size == size


def test_the_whole_size_comes_first_where_its_digits_change() -> None:
    # "99 path=..." and "100 path=...": the length of a record counts its own digits.
    for length in range(80, 1200):
        name = b"p" * length
        ((member, _),) = members_of(_tar.header(name, FILE, 0o600, 0, 1) + _tar.END)
        assert member.name == name


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("length", [5, 100, 101, 150, 240])
def test_headers_of_tarfile_are_read(tar_format, length) -> None:
    name = "folder/" * (length // 7) + "x" * (length % 7 or 7)
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = 5, 1_700_000_000, 0o751
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        archive.addfile(info, io.BytesIO(b"hello"))
    wanted = Member(name.encode(), FILE, 0o751, 5, 1_700_000_000 * NS, b"")
    assert members_of(buffer.getvalue()) == [(wanted, b"hello")]


def test_a_global_pax_header_counts_for_all_that_follow() -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"mtime": "12.5", "comment": "x"}
    ) as archive:
        for name in ("a", "b"):
            archive.addfile(tarfile.TarInfo(name))
    assert [member.mtime_ns for member, _ in members_of(buffer.getvalue())] == [12_500_000_000] * 2


def test_numbers_may_be_base_256() -> None:
    block = bytearray(_tar.header(b"n", FILE, 0o600, 0, 0))
    block[136:148] = b"\xff" * 11 + b"\xfe"  # two's complement of -2
    ((member, _),) = members_of(with_checksum(block) + _tar.END)
    assert member.mtime_ns == -2 * NS
    block[136:148] = b"\x80" + (2**40).to_bytes(11, "big")
    ((member, _),) = members_of(with_checksum(block) + _tar.END)
    assert member.mtime_ns == 2**40 * NS


def with_checksum(block: bytearray, *, signed: bool = False) -> bytes:
    rest = block[:148] + b" " * 8 + block[156:]
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in rest)
    return bytes(block[:148] + b"%06o\0 " % total + block[156:])


@pytest.mark.parametrize("signed", [False, True])
def test_checksums_of_signed_and_unsigned_bytes_are_accepted(signed) -> None:
    block = bytearray(_tar.header(b"na\xefve", FILE, 0o600, 0, 0))
    assert _tar.is_header(with_checksum(block, signed=signed))


@given(position=st.integers(0, 511), flip=st.integers(1, 255))
def test_every_damaged_byte_of_a_header_is_noticed(position, flip) -> None:
    block = bytearray(_tar.header(b"name", FILE, 0o644, 0, 10**9))
    block[position] ^= flip
    if block[148:156].strip(b"\0 ") == _tar.header(b"name", FILE, 0o644, 0, 10**9)[148:156].strip(b"\0 "):
        # All bytes but those around the checksum's digits; one flip changes the sum by less than any wrap.
        assert _tar.is_header(bytes(block)) == (148 <= position < 156)
    else:
        assert not _tar.is_header(bytes(block))


@pytest.mark.parametrize(
    ("target", "depth", "inside"),
    [
        (b"a", 0, True),
        (b"a/b/c", 0, True),
        (b"./a//b/.", 0, True),
        (b".", 0, True),
        (b"..", 0, False),
        (b"..", 1, True),
        (b"../..", 1, False),
        (b"../../x", 2, True),
        (b"./.././x", 1, True),
        (b"..//../x", 1, False),
        (b"a/..", 1, False),
        (b"a/../b", 5, False),
        (b"../a/..", 5, False),
        (b"...", 0, True),
        (b"a..b/..c", 0, True),
        (b"/", 5, False),
        (b"/etc", 5, False),
        (b"//etc", 5, False),
        (b"", 5, False),
        (b"a\0b", 5, False),
        (b"a" * 4095, 0, True),
        (b"a" * 4096, 0, False),
    ],
)
def test_link_rule(target, depth, inside) -> None:
    assert _tar.link_stays_inside(target, depth) is inside


def test_an_archive_of_nothing_but_the_end_is_empty() -> None:
    assert members_of(_tar.END) == []
    assert members_of(bytes(10240)) == []
    assert members_of(bytes(10240), piece=1) == []


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 700, 1024, 1535])
def test_a_cut_archive_is_damaged(cut) -> None:
    stream = _tar.header(b"n", FILE, 0o600, 3, 0) + padded(b"abc") + _tar.END
    with pytest.raises(CorruptCheckpointError, match="ends before"):
        members_of(stream[:cut])


def test_content_that_nobody_reads_is_skipped() -> None:
    stream = _tar.header(b"a", FILE, 0o600, 600, 0) + padded(b"a" * 600)
    stream += _tar.header(b"b", FILE, 0o600, 1, 0) + padded(b"b") + _tar.END
    assert [member.name for member in Reader([stream], 2)] == [b"a", b"b"]


def test_reading_takes_no_more_memory_than_a_few_chunks() -> None:
    head = _tar.header(b"big", FILE, 0o600, 512 << 20, 0)
    chunk = bytes(1 << 20)

    def stream():
        yield head
        for _ in range(512):
            yield chunk
        yield _tar.END

    tracemalloc.start()
    reader = Reader(stream(), 1)
    assert sum(1 for _ in reader) == 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_sum_of_extended_headers_is_bounded_by_the_entries() -> None:
    records = b"comment=" + b"x" * 900_000
    record = b"%d %b\n" % (len(records) + 8, records)
    one = tarfile.TarInfo("././@PaxHeader")
    one.type, one.size = tarfile.XGLTYPE, len(record)
    header = one.tobuf(tarfile.USTAR_FORMAT) + padded(record)
    with pytest.raises(UnsafeArchiveError, match="larger than its entries allow"):
        list(Reader([header] * 3, entries=5))


def test_names_in_messages_are_short_and_printable() -> None:
    assert _tar.show(b"a\n\xff") == r"'a\n\udcff'"
    assert len(_tar.show(b"x" * 5000)) < 210
