"""The tar format, both ways and nothing else: bytes in, bytes out, no files.

What is written is ustar (POSIX.1-1988) with pax extended headers (POSIX.1-2001, type ``x``) for all that does not
fit: times with a fraction, before 1970 or after 2242, names and link targets over 100 bytes, files over 8 GiB.
Names are bytes; one of 100 bytes or less stands in the header as it is, a longer one in a pax ``path``, with
``hdrcharset=BINARY`` before it if it is not UTF-8. Owner is 0/0 and unnamed, only the permission bits are kept.

What is read is that, and what GNU tar and Python's tarfile write: GNU magic, ``L`` and ``K`` long names, global pax
headers, base-256 numbers. The reader is strict where others guess: every header needs a right checksum, a second
extended header for the same entry, data behind a link, sparse files, devices and unknown types are refused, and
an archive ends with two zero blocks or it is damaged. Its memory is bounded: one chunk and 1 MiB of header data.

Format: https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html#tag_20_92_13_06 and
https://www.gnu.org/software/tar/manual/html_node/Standard.html
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from zlib import adler32

from taskckpt.errors import CorruptCheckpointError, UnsafeArchiveError

BLOCK = 512
FILE, LINK, SYMLINK, FOLDER = b"0", b"1", b"2", b"5"
END = bytes(2 * BLOCK)

# One set of limits for both sides: what save accepts is what load restores.
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4096
# Deep enough for any real tree, and shutil.rmtree (which recurses) can still remove it.
MAX_DEPTH = 256
MAX_HEADER_BYTES = 1 << 20
MAX_PADDING_BYTES = 1 << 20
# Our own extended header takes at most 2 paths and a little: 10 KiB. The sum of all is bounded by this times entries.
MAX_HEADER_BYTES_PER_ENTRY = 16 << 10

_ZEROS = bytes(BLOCK)
_NS = 1_000_000_000
_MAX_OCTAL = 8**11 - 1
_TEN_DIGITS = 10**9  # seconds since 1970, from 2001 on
# What utime takes: seconds of 64 bits.
_MIN_TIME_NS, _MAX_TIME_NS = -(2**63) * _NS, (2**63 - 1) * _NS
_OWNER = b"0000000\0" * 2
_MAGIC = b"ustar\x0000"
_GNU_MAGIC = b"ustar  \0"
_KINDS = frozenset((FILE, LINK, SYMLINK, FOLDER))
_UNSUPPORTED = {b"3": "a character device", b"4": "a block device", b"6": "a FIFO", b"S": "a sparse file"}


class Member(NamedTuple):
    """What a header says about one entry, with the extended headers before it applied.

    A tuple, not a frozen dataclass: one is made per file, and a frozen dataclass takes 1.5 us more of the 15.
    """

    name: bytes
    kind: bytes
    mode: int
    size: int
    mtime_ns: int
    target: bytes


def show(name: bytes) -> str:
    """A name as it can stand in a message: quoted, control characters escaped, not longer than 200 characters."""
    text = repr(os.fsdecode(name))
    return text if len(text) <= 200 else f"{text[:150]}...{text[-40:]}"


def link_stays_inside(target: bytes, depth: int) -> bool:
    """Whether a symlink with this target, in a folder ``depth`` levels below the root, can never lead out of the tree.

    Allowed are as many leading ``..`` as the folder is deep, then components without any ``..``. If that holds for
    all links of a tree, and no link is ever used as a folder for another entry, it holds for every chain of them:
    climbing starts from a real folder, and from where it ends the path only descends, through links like this one.
    """
    if not target or target[0] == 0x2F or len(target) >= MAX_PATH_BYTES or b"\0" in target:
        return False
    if b".." not in target:
        return True
    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
    climbs = 0
    while climbs < len(parts) and parts[climbs] == b"..":
        climbs += 1
    return climbs <= depth and b".." not in parts[climbs:]


# Writing


def _byte_sum(data: bytes) -> int:
    # adler32's low half is 1 + the sum modulo 65521, exact for 256 bytes; sum() takes 2.5 us a block, this 0.4.
    total = 0
    for start in range(0, len(data), 256):
        total += (adler32(data[start : start + 256]) & 0xFFFF) - 1
    return total


def _tail(kind: bytes, target: bytes) -> bytes:
    return kind + target[:100].ljust(100, b"\0") + _MAGIC + bytes(64) + _OWNER + bytes(167)


# A tail and its byte sum, with the 8 spaces that stand for the checksum field while it is summed up.
_PLAIN_TAILS = {kind: (_tail(kind, b""), _byte_sum(_tail(kind, b"")) + 256) for kind in (*_KINDS, b"x")}
_MODES = {mode: b"%07o\0" % mode + _OWNER for mode in range(0o1000)}


def _block(name: bytes, kind: bytes, mode: int, size: int, seconds: int, target: bytes) -> bytes:
    head = b"%b%b%011o\0%011o\0" % (name[:100].ljust(100, b"\0"), _MODES[mode], size, seconds)
    if target:
        tail = _tail(kind, target)
        tail_sum = _byte_sum(tail) + 256
    else:
        tail, tail_sum = _PLAIN_TAILS[kind]
    return b"%b%06o\0 %b" % (head, (adler32(head) & 0xFFFF) - 1 + tail_sum, tail)


def _record(key: bytes, value: bytes) -> bytes:
    # A pax record starts with its own length, the digits of the length included.
    rest = len(key) + len(value) + 3
    total = rest + len(str(rest))
    if len(str(total)) > len(str(rest)):
        total += 1
    return b"%d %b=%b\n" % (total, key, value)


def _decimal_time(mtime_ns: int) -> bytes:
    seconds, fraction = divmod(abs(mtime_ns), _NS)
    return b"%b%d.%09d" % (b"-" if mtime_ns < 0 else b"", seconds, fraction)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _records(name: bytes, size: int, mtime_ns: int, target: bytes) -> bytes:
    records = b""
    paths = [(key, path) for key, path in ((b"path", name), (b"linkpath", target)) if len(path) > 100]
    if not all(_is_utf8(path) for _, path in paths):
        records += _record(b"hdrcharset", b"BINARY")
    for key, path in paths:
        records += _record(key, path)
    if size > _MAX_OCTAL:
        records += _record(b"size", b"%d" % size)
    if mtime_ns % _NS or not 0 <= mtime_ns // _NS <= _MAX_OCTAL:
        records += _record(b"mtime", _decimal_time(mtime_ns))
    return records


def _needs_records(name: bytes, size: int, mtime_ns: int, target: bytes) -> bool:
    return (
        mtime_ns % _NS != 0
        or not 0 <= mtime_ns // _NS <= _MAX_OCTAL
        or len(name) > 100
        or len(target) > 100
        or size > _MAX_OCTAL
    )


def header(name: bytes, kind: bytes, mode: int, size: int, mtime_ns: int, target: bytes = b"") -> bytes:
    """The header blocks of one entry: a multiple of 512 bytes; the content and its padding follow.

    Args:
        name: Path below the root; that of a folder ends in ``/``.
        kind: ``FILE``, ``LINK``, ``SYMLINK`` or ``FOLDER``.
        mode: The nine permission bits.
        size: Bytes of content, 0 for all but files.
        mtime_ns: Nanoseconds since 1970, may be negative.
        target: What a link points to; for a hard link the name of an earlier file.
    """
    seconds, fraction = divmod(mtime_ns, _NS)
    if fraction and _TEN_DIGITS <= seconds <= _MAX_OCTAL and len(name) <= 100 and not target and size <= _MAX_OCTAL:
        # Nearly all files are like this, and this takes half the time.
        record = b"30 mtime=%d.%09d\n" % (seconds, fraction)
        return b"%b%b%b" % (
            _extended_block(30),
            record.ljust(BLOCK, b"\0"),
            _block(name, kind, mode, size, seconds, b""),
        )
    extended = b""
    if _needs_records(name, size, mtime_ns, target):
        records = _records(name, size, mtime_ns, target)
        extended = _extended_block(len(records)) + records + bytes(-len(records) % BLOCK)
    seconds = min(max(seconds, 0), _MAX_OCTAL)
    return extended + _block(name, kind, mode, size if size <= _MAX_OCTAL else 0, seconds, target)


_EXTENDED_BLOCKS: dict[int, bytes] = {}


def _extended_block(size: int) -> bytes:
    # It holds nothing but the size, and nearly all files share one: 30 bytes for the time.
    block = _EXTENDED_BLOCKS.get(size)
    if block is None:
        block = _block(b"././@PaxHeader", b"x", 0o644, size, 0, b"")
        _EXTENDED_BLOCKS[size] = block
    return block


def header_size(name: bytes, size: int, mtime_ns: int, target: bytes = b"") -> int:
    """How many bytes ``header`` gives for the same arguments."""
    if not _needs_records(name, size, mtime_ns, target):
        return BLOCK
    if len(name) <= 100 and len(target) <= 100 and size <= _MAX_OCTAL:
        return 3 * BLOCK
    records = len(_records(name, size, mtime_ns, target))
    return 2 * BLOCK + records + -records % BLOCK


# Reading


def _number(field: bytes, what: str) -> int:
    """A number of a header: octal digits, or base-256 when the first bit is set (GNU; two's complement)."""
    digits = field.strip(b"\0 ")
    if not digits:
        return 0
    # int() alone would also take signs and underscores.
    if digits.isdigit() and b"8" not in digits and b"9" not in digits:
        return int(digits, 8)
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    raise CorruptCheckpointError(f"The archive is damaged: a header's {what} is not a number.")


def is_header(block: bytes) -> bool:
    """Whether this is a ustar or GNU header with a right checksum; a block of zeros is not."""
    if len(block) != BLOCK or block[257:265] not in (_MAGIC, _GNU_MAGIC):
        return False
    field = block[148:156]
    digits = field.strip(b"\0 ")
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        return False
    expected = int(digits, 8)
    # The field itself counts as 8 spaces; both halves are short enough for _byte_sum's trick.
    halves = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2
    total = halves - (adler32(field) & 0xFFFF) + 1 + 256
    if total == expected:
        return True
    # Some old writers summed signed bytes.
    rest = block[:148] + block[156:]
    return total - 256 * sum(byte > 127 for byte in rest) == expected


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _pax(data: bytes) -> dict[bytes, bytes]:
    """The records of a pax header; of two with the same key the later counts, as POSIX says."""
    if len(data) == 30 and data.startswith(b"30 mtime=") and data[29] == 0x0A:  # all that most of our files have
        return {b"mtime": data[9:29]}
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 8)
        digits = data[position : max(space, position)]
        end = position + int(digits) if digits.isdigit() else 0
        equals = data.find(b"=", space, end)
        if not space + 1 < equals < end <= len(data) or data[end - 1] != 0x0A:
            raise CorruptCheckpointError("The archive is damaged: a pax header has a malformed record.")
        records[data[space + 1 : equals]] = data[equals + 1 : end - 1]
        position = end
    return records


def _pax_time(value: bytes) -> int:
    if len(value) == 20 and value[10] == 0x2E and (digits := value[:10] + value[11:]).isdigit():
        return int(digits)
    whole, _, fraction = value.removeprefix(b"-").partition(b".")
    if not whole.isdigit() or len(whole) > 19 or (fraction and not fraction.isdigit()):
        raise CorruptCheckpointError("The archive is damaged: a pax mtime is not a decimal number.")
    total = int(whole) * _NS + int(fraction[:9].ljust(9, b"0"))
    return -total if value[0] == 0x2D else total


def _pax_size(value: bytes) -> int:
    if not value.isdigit() or len(value) > 20:
        raise UnsafeArchiveError("The archive is refused: a pax size is not a plain number.")
    return int(value)


class Reader(Iterator[Member]):
    """The entries of a tar stream, one after the other; the content of the latest through ``read``.

    Args:
        chunks: The stream in pieces of any size; what they raise passes through.
        entries: How many entries the caller will take; bounds the sum of all extended headers.

    Raises ``UnsafeArchiveError`` for what is never accepted, ``CorruptCheckpointError`` for what is damaged or cut.
    """

    __slots__ = ("_chunks", "_data", "_globals", "_header_budget", "_padding", "_position", "_seen", "remaining")

    def __init__(self, chunks: Iterable[bytes | memoryview], entries: int) -> None:
        self._chunks = iter(chunks)
        self._data: bytes | memoryview = b""
        self._position = 0
        self._padding = 0
        self._globals: dict[bytes, bytes] = {}
        self._header_budget = MAX_HEADER_BYTES + entries * MAX_HEADER_BYTES_PER_ENTRY
        # The latest extended header and its size: the next is nearly always the same 512 bytes.
        self._seen = (b"", 0)
        self.remaining = 0

    def __next__(self) -> Member:
        self._finish_content()
        records: dict[bytes, bytes] | None = None
        long_names: dict[bytes, bytes] = {}
        while True:
            block = self._take(BLOCK)
            kind = block[156:157]
            if kind in _KINDS:
                break
            if kind == b"x" and records is None and not long_names:
                records = _pax(self._extended(block))
            elif kind == b"g" and records is None and not long_names:
                self._globals |= _pax(self._extended(block))
            elif kind in (b"L", b"K") and records is None and kind not in long_names:
                long_names[kind] = self._extended(block).rstrip(b"\0")
            elif kind in (b"x", b"g", b"L", b"K"):
                raise UnsafeArchiveError("The archive is refused: an extended header describes another header.")
            elif block == _ZEROS:
                self._expect_end(records is not None or bool(long_names))
                raise StopIteration
            else:
                break
        if self._globals:
            records = self._globals | (records or {})
        return self._member(block, records or {}, long_names)

    def read(self) -> memoryview:
        """The next piece of the latest entry's content: as much as is at hand, never empty while ``remaining``."""
        if self._position == len(self._data):
            self._fill()
        start = self._position
        end = min(start + self.remaining, len(self._data))
        self._position = end
        self.remaining -= end - start
        return memoryview(self._data)[start:end]

    def _fill(self) -> None:
        for chunk in self._chunks:
            if len(chunk):
                self._data = chunk
                self._position = 0
                return
        raise CorruptCheckpointError("The archive is damaged: it ends before its end marks.")

    def _take(self, size: int) -> bytes:
        start = self._position
        end = start + size
        if end <= len(self._data):
            self._position = end
            return bytes(self._data[start:end])
        parts = [bytes(self._data[start:])]
        self._position = len(self._data)
        missing = size - len(parts[0])
        while missing:
            self._fill()
            parts.append(bytes(self._data[:missing]))
            self._position = len(parts[-1])
            missing -= len(parts[-1])
        return b"".join(parts)

    def _finish_content(self) -> None:
        while self.remaining:
            self.read()
        if self._padding:
            end = self._position + self._padding
            if end <= len(self._data):
                self._position = end
            else:
                self._take(self._padding)
            self._padding = 0

    def _extended(self, block: bytes) -> bytes:
        if block == self._seen[0]:
            size = self._seen[1]
        else:
            _check_header(block)
            size = _number(block[124:136], "size")
            if not 0 <= size <= MAX_HEADER_BYTES:
                raise UnsafeArchiveError(f"The archive is refused: an extended header claims {size} bytes.")
            self._seen = (block, size)
        padded = size + -size % BLOCK
        self._header_budget -= BLOCK + padded
        if self._header_budget < 0:
            raise UnsafeArchiveError("The archive is refused: its extended headers are larger than its entries allow.")
        return self._take(padded)[:size]

    def _member(self, block: bytes, records: dict[bytes, bytes], long_names: dict[bytes, bytes]) -> Member:
        _check_header(block)
        name = _text(block[:100])
        if block[345] and block[257:265] == _MAGIC:
            name = _text(block[345:500]) + b"/" + name
        target = _text(block[157:257])
        size = _number(block[124:136], "size")
        mtime_ns = _number(block[136:148], "mtime") * _NS
        if long_names:
            name = long_names.get(b"L", name)
            target = long_names.get(b"K", target)
        for key, value in records.items():
            if key == b"mtime":
                mtime_ns = _pax_time(value)
            elif key == b"path":
                name = value
            elif key == b"linkpath":
                target = value
            elif key == b"size":
                size = _pax_size(value)
            elif key.startswith((b"GNU.sparse", b"SCHILY.realsize")):
                raise UnsafeArchiveError(f"The archive is refused: {show(name)} is a sparse file.")
        member = Member(name, _kind(block, name), _number(block[100:108], "mode"), size, mtime_ns, target)
        _check_member(member)
        self.remaining = size
        self._padding = -size % BLOCK
        return member

    def _expect_end(self, dangling: bool) -> None:
        if dangling:
            raise CorruptCheckpointError("The archive is damaged: an extended header has no entry behind it.")
        if self._take(BLOCK) != _ZEROS:
            raise CorruptCheckpointError("The archive is damaged: entries follow a single zero block.")
        padding = len(self._data) - self._position
        rest = bytes(self._data[self._position :])
        while not rest.strip(b"\0"):
            chunk = next(self._chunks, None)
            if chunk is None:
                return
            rest = bytes(chunk)
            padding += len(rest)
            if padding > MAX_PADDING_BYTES:
                raise UnsafeArchiveError("The archive is refused: more than 1 MiB of padding follows its end.")
        raise CorruptCheckpointError("The archive is damaged: data follows its end marks.")


def _check_header(block: bytes) -> None:
    if not is_header(block):
        raise CorruptCheckpointError("The archive is damaged: a header's checksum or magic is wrong.")


def _kind(block: bytes, name: bytes) -> bytes:
    kind = block[156:157]
    if kind in _KINDS:
        return kind
    if kind == b"\0":  # a file, before POSIX
        return FILE
    what = _UNSUPPORTED.get(kind, f"of the unknown type {kind!r}")
    raise UnsafeArchiveError(f"The archive is refused: {show(name)} is {what}.")


def _check_member(member: Member) -> None:
    why = None
    if b"\0" in member.name or b"\0" in member.target:
        why = "has a NUL in its name or target"
    elif member.size < 0:
        why = f"has the negative size {member.size}"
    elif member.size and member.kind != FILE:
        why = f"is no file but claims {member.size} bytes"
    elif member.mode < 0 or not _MIN_TIME_NS <= member.mtime_ns <= _MAX_TIME_NS:
        why = "has an absurd mode or time"
    if why:
        raise UnsafeArchiveError(f"The archive is refused: {show(member.name)} {why}.")
