"""The records of a task's log: what they say, and how they are written. Pure; ``docs/format.md`` is the contract.

A record is two lines: a JSON object, and the BLAKE3 digest of the first line with its newline, as JSON
again. The envelope stays the same in every format version, so an old reader can always tell a record
that is damaged from one that is newer than itself.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

from blake3 import blake3

from taskckpt.errors import CorruptCheckpointError, UnsupportedFormatError

FORMAT = 1

# Bytes and states up to this size lie in the commit record: one request saves them, and a person can read them.
INLINE_LIMIT_BYTES = 64 * 1024

Kind = Literal["bytes", "file", "folder", "state"]

_MODE = re.compile("[0-7]{1,4}")
_MTIME = re.compile("-?[0-9]{1,19}")
# Payloads are deleted by the keys that records give: no record may name what lies elsewhere.
_KEY = re.compile(r"data/[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*")


@dataclass(frozen=True, slots=True)
class ClaimId:
    """Which claim a record belongs to. The nonce is shared by an attempt and its child processes.

    ``fenced`` are the nonces of the claims before it, newest first: whoever finds its own among them knows
    that it is stale, from whichever record it read.
    """

    slot: int
    nonce: str
    fenced: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Digest:
    """Size and BLAKE3 digest of a run of bytes."""

    size_bytes: int
    blake3: str

    @classmethod
    def of(cls, data: bytes | memoryview) -> Digest:
        return cls(len(data), blake3(data).hexdigest())


@dataclass(frozen=True, slots=True)
class Stored:
    """The stored bytes of a checkpoint: in the record itself (``inline``) or in the object ``key``."""

    digest: Digest
    key: str | None = None
    inline: bytes | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """What a checkpoint holds once it is unpacked: bytes, those of a file or state, or the tar stream of a folder."""

    kind: Kind
    digest: Digest
    name: str | None = None
    mode: int | None = None
    mtime_ns: int | None = None
    entries: int | None = None


@dataclass(frozen=True, slots=True)
class Stamp:
    """What every record carries.

    ``about`` tells people who wrote the record (attempt, host, time, ...); nothing is decided from it.
    """

    slot: int
    claim: ClaimId
    writer: str
    nonce: str
    time: str
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Claim:
    """An attempt takes the task over: attempts with an older claim can write no more."""

    stamp: Stamp
    head: int | None
    unreadable: tuple[int, ...] = ()
    continues_from: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Join:
    """Another process of the same attempt begins to write."""

    stamp: Stamp
    head: int | None
    unreadable: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Commit:
    """A checkpoint exists. Retained after it: commits from slot ``floor`` on, and those in ``kept``."""

    stamp: Stamp
    content: Content
    stored: Stored
    previous: int | None
    resumed_from: int | None
    count: int
    floor: int
    kept: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Clear:
    """Nothing saved below this record exists any more."""

    stamp: Stamp


Record: TypeAlias = Claim | Join | Commit | Clear

_KIND_OF: Mapping[type, str] = {Claim: "claim", Join: "join", Commit: "commit", Clear: "clear"}


# --- writing -----------------------------------------------------------------------------------

_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def encode(record: Record) -> bytes:
    """The two lines of a record."""
    stamp = record.stamp
    body: dict[str, Any] = {
        "format": FORMAT,
        "kind": _KIND_OF[type(record)],
        "slot": stamp.slot,
        "claim": _claim_to_json(stamp.claim),
        "writer": stamp.writer,
        "nonce": stamp.nonce,
        "time": stamp.time,
        "about": dict(stamp.about),
    }
    match record:
        case Claim():
            body |= {
                "head": record.head,
                "unreadable": list(record.unreadable),
                "continues_from": list(record.continues_from),
            }
        case Join():
            body |= {"head": record.head, "unreadable": list(record.unreadable)}
        case Commit():
            body |= {
                "checkpoint": _checkpoint_to_json(record.content, record.stored),
                "previous": record.previous,
                "resumed_from": record.resumed_from,
                "count": record.count,
                "floor": record.floor,
                "kept": list(record.kept),
            }
        case Clear():
            pass
    first = _to_json(body).encode() + b"\n"
    second = json.dumps({"blake3": blake3(first).hexdigest()}).encode() + b"\n"
    return first + second


def _claim_to_json(claim: ClaimId) -> dict[str, Any]:
    return {"slot": claim.slot, "nonce": claim.nonce, "fenced": list(claim.fenced)}


def _checkpoint_to_json(content: Content, stored: Stored) -> dict[str, Any]:
    where = {"key": stored.key} if stored.inline is None else {"inline": _bytes_to_json(stored.inline)}
    result: dict[str, Any] = {
        "kind": content.kind,
        "content": _digest_to_json(content.digest),
        "stored": where | _digest_to_json(stored.digest),
    }
    if content.name is not None:
        # Names are whatever the disk had, so they may not be valid Unicode.
        result["name"] = _bytes_to_json(content.name.encode("utf-8", "surrogateescape"))
    if content.mode is not None:
        result["mode"] = f"{content.mode:04o}"
    if content.mtime_ns is not None:
        result["mtime_ns"] = str(content.mtime_ns)  # a string: beyond the 53 bits of many JSON readers
    if content.entries is not None:
        result["entries"] = content.entries
    return result


def _digest_to_json(digest: Digest) -> dict[str, Any]:
    return {"size": digest.size_bytes, "blake3": digest.blake3}


def _bytes_to_json(data: bytes) -> dict[str, str]:
    """``{"text": ...}`` where that is readable and short, else ``{"base64": ...}``."""
    encoded = {"base64": base64.b64encode(data).decode("ascii")}
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return encoded
    escaped = len(json.dumps(text, ensure_ascii=False))
    return {"text": text} if escaped <= len(encoded["base64"]) + 16 else encoded


# --- reading -----------------------------------------------------------------------------------


def decode(data: bytes, *, slot: int, uri: str) -> Record:
    """The record that lies in ``slot``.

    Raises:
        CorruptCheckpointError: The bytes are not the record of that slot, whole and undamaged.
        UnsupportedFormatError: It is undamaged, but of a newer format version or an unknown kind.
    """
    body = _checked_body(data, uri)
    version = body.get("format")
    if type(version) is not int or version != FORMAT:  # True == 1
        raise UnsupportedFormatError(
            f"Record {slot} has format version {version!r}; this taskckpt reads version {FORMAT}.",
            uri=uri,
            hint="A newer taskckpt wrote it: upgrade this one (pip install -U taskckpt).",
        )
    try:
        record = _from_body(_Reader(body))
    except _Malformed as error:
        raise CorruptCheckpointError(f"Record {slot} is malformed: {error}.", uri=uri) from error
    except _Newer as error:
        raise UnsupportedFormatError(
            f"Record {slot} is {error}.",
            uri=uri,
            hint="A newer taskckpt wrote it: upgrade this one (pip install -U taskckpt).",
        ) from error
    if record.stamp.slot != slot:
        raise CorruptCheckpointError(f"Record {slot} holds the content of record {record.stamp.slot}.", uri=uri)
    return record


def _checked_body(data: bytes, uri: str) -> dict[str, Any]:
    first, newline, second = data.partition(b"\n")
    expected = json.dumps({"blake3": blake3(first + newline).hexdigest()}).encode() + b"\n"
    if second != expected:
        what = "cut short" if not second.endswith(b"\n") else "damaged: its digest does not fit"
        raise CorruptCheckpointError(f"A record is {what} ({len(data)} bytes).", uri=uri)
    try:
        body = json.loads(first.decode("utf-8"))  # given bytes, json would guess UTF-16 too
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError("A record is no JSON object.", uri=uri) from error
    if not isinstance(body, dict):
        raise CorruptCheckpointError("A record is no JSON object.", uri=uri)
    return cast("dict[str, Any]", body)


def _from_body(body: _Reader) -> Record:
    stamp = Stamp(
        slot=body.integer("slot"),
        claim=_claim_from(body.object("claim")),
        writer=body.string("writer"),
        nonce=body.string("nonce"),
        time=body.string("time"),
        about=body.object("about").values,
    )
    match body.string("kind"):
        case "claim":
            return Claim(
                stamp,
                head=body.optional("head", _Reader.integer),
                unreadable=body.integers("unreadable"),
                continues_from=body.strings("continues_from"),
            )
        case "join":
            head = body.optional("head", _Reader.integer)
            return Join(stamp, head=head, unreadable=body.integers("unreadable"))
        case "commit":
            checkpoint = body.object("checkpoint")
            return Commit(
                stamp,
                content=_content_from(checkpoint),
                stored=_stored_from(checkpoint.object("stored")),
                previous=body.optional("previous", _Reader.integer),
                resumed_from=body.optional("resumed_from", _Reader.integer),
                count=body.integer("count"),
                floor=body.integer("floor"),
                kept=body.integers("kept"),
            )
        case "clear":
            return Clear(stamp)
        case kind:
            raise _Newer(f"of the unknown kind {kind!r}")


def _claim_from(body: _Reader) -> ClaimId:
    return ClaimId(body.integer("slot"), body.string("nonce"), body.strings("fenced"))


def _content_from(body: _Reader) -> Content:
    kind = body.string("kind")
    if kind not in get_args(Kind):
        raise _Newer(f"a commit of a checkpoint of the unknown kind {kind!r}")
    name = body.optional("name", _Reader.data)
    mode = body.optional("mode", _Reader.string)
    mtime_ns = body.optional("mtime_ns", _Reader.string)
    return Content(
        kind=cast("Kind", kind),
        digest=_digest_from(body.object("content")),
        name=None if name is None else name.decode("utf-8", "surrogateescape"),
        mode=None if mode is None else _number(mode, _MODE, 8),
        mtime_ns=None if mtime_ns is None else _number(mtime_ns, _MTIME, 10),
        entries=body.optional("entries", _Reader.integer),
    )


def _stored_from(body: _Reader) -> Stored:
    inline = body.optional("inline", _Reader.data)
    key = body.optional("key", _Reader.string)
    digest = _digest_from(body)
    if (inline is None) == (key is None):
        raise _Malformed("a checkpoint has either a key or inline content")
    if key is not None and (not _KEY.fullmatch(key) or ".." in key.split("/")):
        raise _Malformed(f"{key!r} is no key of a payload")
    if inline is not None and Digest.of(inline) != digest:
        raise _Malformed("the inline content does not fit its digest")
    return Stored(digest, key=key, inline=inline)


def _digest_from(body: _Reader) -> Digest:
    return Digest(body.integer("size"), body.string("blake3"))


def _number(text: str, pattern: re.Pattern[str], base: int) -> int:
    # int() alone would take signs, spaces and underscores, and more than the system call does.
    if pattern.fullmatch(text) is None:
        raise _Malformed(f"{text[:40]!r} is no number as expected here")
    return int(text, base)


class _Malformed(Exception):  # noqa: N818 - becomes CorruptCheckpointError at the door
    """A field that is missing or of the wrong type; turned into CorruptCheckpointError at the door."""


class _Newer(Exception):  # noqa: N818 - becomes UnsupportedFormatError at the door
    """Something that this version does not know, and that must not be taken for damage."""


ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed access to a JSON object; unknown fields are passed over, so later ones may be added."""

    values: dict[str, Any]

    def _typed(self, name: str, kind: type[ValueT]) -> ValueT:
        value = self.values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _Malformed(f"field {name!r} is missing or no {kind.__name__}")
        return value

    def integer(self, name: str) -> int:
        value = self._typed(name, int)
        if value < 0:
            raise _Malformed(f"field {name!r} is negative")
        return value

    def string(self, name: str) -> str:
        return self._typed(name, str)

    def object(self, name: str) -> _Reader:
        return _Reader(self._typed(name, dict))

    def integers(self, name: str) -> tuple[int, ...]:
        return self._list(name, int)

    def strings(self, name: str) -> tuple[str, ...]:
        return self._list(name, str)

    def _list(self, name: str, kind: type[ValueT]) -> tuple[ValueT, ...]:
        values = self._typed(name, list)
        if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
            raise _Malformed(f"field {name!r} is no list of {kind.__name__}")
        return tuple(values)

    def data(self, name: str) -> bytes:
        body = self.object(name)
        try:
            if "text" in body.values:
                return body.string("text").encode("utf-8")
            return base64.b64decode(body.string("base64"), validate=True)
        except ValueError as error:
            raise _Malformed(f"field {name!r} is neither text nor base64") from error

    def optional(self, name: str, get: Callable[[_Reader, str], ValueT]) -> ValueT | None:
        return None if self.values.get(name) is None else get(self, name)
