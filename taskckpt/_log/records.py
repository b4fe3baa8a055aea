"""The records of a task's log: what they say, and how they are written. Pure; ``docs/format.md`` is the contract.

A record is two lines: a JSON object, and the BLAKE3 digest of the first line with its newline, as JSON
again. The envelope stays the same in every format version, so an old reader can always tell a record
that is damaged from one that is newer than itself.
"""

from __future__ import annotations

import base64
import bisect
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast, get_args

from blake3 import blake3

from taskckpt._log.fields import Fields, Malformed, expect_writable, parse_object
from taskckpt.errors import CorruptCheckpointError, UnsupportedFormatError

FORMAT = 1

# Bytes and states up to this size lie in the commit record: one request saves them, and a person can read them.
INLINE_LIMIT_BYTES = 64 * 1024

# A commit of "nothing" has no payload: only positions were saved so far.
Kind = Literal["bytes", "file", "folder", "state", "nothing"]
# What metadata may hold: whatever JSON can say.
Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

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
    """Stored bytes: in the record itself (``inline``; pages of the index leave that out), or in the object ``key``."""

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
class Notes:
    """What the user said about a checkpoint."""

    step: int | None = None
    metadata: Mapping[str, Json] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


NO_NOTES = Notes()

# Ranges of slots, first and last.
Spans: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Lineage:
    """Which commits a commit goes on from: all those before it, but for the ``left_behind``.

    Attributes:
        left_behind: Ranges of slots, first and last, ascending without overlaps: what was rolled back, or fallen
            back from.
        highest_step: The highest step in the lineage, this commit's included; None without steps.
    """

    left_behind: Spans = ()
    highest_step: int | None = None

    def has(self, slot: int) -> bool:
        """Whether a commit in an earlier slot is an ancestor."""
        index = bisect.bisect_right(self.left_behind, slot, key=lambda span: span[0])
        return not (index and slot <= self.left_behind[index - 1][1])


@dataclass(frozen=True, slots=True)
class Origin:
    """The commit that another one repeats, and what that said of its making."""

    slot: int
    time: str
    about: Mapping[str, Any] = field(default_factory=dict)
    resumed_from: int | str | None = None


@dataclass(frozen=True, slots=True)
class Catalogued:
    """How much of the retained history lies in pages: all ``through`` a slot; ``more`` commits after it do not."""

    through: int = 0
    more: int = 0


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
    """A checkpoint exists. Retained after it: commits from slot ``floor`` on, and those in ``kept``.

    Attributes:
        previous: The commit that it goes on from.
        resumed_from: What its attempt resumed from: a slot of this log, or the URI of a checkpoint elsewhere.
        count: How many commits its claim has made since it resumed.
        pinned: Slots of commits that stay until they are unpinned.
        repeats: The commit whose payload this is, if it is not one of its own.
        positions: A state: where the iterations of the task were.
        continues_from: Of a commit of nothing: where the payload comes from, as in a claim.
    """

    stamp: Stamp
    content: Content
    stored: Stored
    previous: int | None
    resumed_from: int | str | None
    count: int
    floor: int
    kept: tuple[int, ...] = ()
    notes: Notes = NO_NOTES
    lineage: Lineage = Lineage()
    pinned: tuple[int, ...] = ()
    repeats: Origin | None = None
    positions: Stored | None = None
    catalogued: Catalogued = Catalogued()
    continues_from: tuple[str, ...] = ()
    # Of the newest commit, ``kept`` is searched for each one that is known. Made when it is asked for.
    _kept: frozenset[int] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def original(self) -> int:
        """The slot of the commit that first had this payload."""
        return self.stamp.slot if self.repeats is None else self.repeats.slot

    @property
    def objects(self) -> tuple[Stored, ...]:
        """The payload, and the positions if there are any."""
        return (self.stored,) if self.positions is None else (self.stored, self.positions)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of what lies in objects of its own."""
        return tuple(one.key for one in self.objects if one.key is not None)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out of it, as a page of the index does."""
        return all(one.key is not None or one.inline is not None for one in self.objects)

    @property
    def has_payload(self) -> bool:
        """Whether something was saved, and not only positions."""
        return self.content.kind != "nothing"

    def retains(self, slot: int) -> bool:
        """Whether an earlier commit is still there after this one."""
        kept = self._kept
        if kept is None:
            kept = frozenset(self.kept)
            object.__setattr__(self, "_kept", kept)
        return slot >= self.floor or slot in kept


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
            body |= _commit_to_json(record)
        case Clear():
            pass
    first = _to_json(body).encode() + b"\n"
    second = json.dumps({"blake3": blake3(first).hexdigest()}).encode() + b"\n"
    return first + second


def _claim_to_json(claim: ClaimId) -> dict[str, Any]:
    return {"slot": claim.slot, "nonce": claim.nonce, "fenced": list(claim.fenced)}


def _commit_to_json(commit: Commit) -> dict[str, Any]:
    """The fields of a commit. What says nothing is left out, but for those that were there from the beginning."""
    result: dict[str, Any] = {
        "checkpoint": _checkpoint_to_json(commit),
        "previous": commit.previous,
        "resumed_from": commit.resumed_from,
        "count": commit.count,
        "floor": commit.floor,
        "kept": list(commit.kept),
    }
    if commit.lineage.left_behind:
        result["left_behind"] = [list(span) for span in commit.lineage.left_behind]
    if commit.lineage.highest_step is not None:
        result["highest_step"] = commit.lineage.highest_step
    if commit.pinned:
        result["pinned"] = list(commit.pinned)
    if commit.repeats is not None:
        result["repeats"] = _origin_to_json(commit.repeats)
    if commit.catalogued.through or commit.catalogued.more:
        result["catalogued"] = {"through": commit.catalogued.through, "more": commit.catalogued.more}
    if commit.continues_from:
        result["continues_from"] = list(commit.continues_from)
    return result


def _origin_to_json(origin: Origin) -> dict[str, Any]:
    return {
        "slot": origin.slot,
        "time": origin.time,
        "about": dict(origin.about),
        "resumed_from": origin.resumed_from,
    }


def _checkpoint_to_json(commit: Commit) -> dict[str, Any]:
    content, notes = commit.content, commit.notes
    result: dict[str, Any] = {
        "kind": content.kind,
        "content": _digest_to_json(content.digest),
        "stored": _stored_to_json(commit.stored),
    }
    if notes.step is not None:
        result["step"] = notes.step
    if notes.metadata:
        result["metadata"] = dict(notes.metadata)
    if notes.metrics:
        result["metrics"] = {name: _metric_to_json(value) for name, value in notes.metrics.items()}
    if commit.positions is not None:
        result["positions"] = _stored_to_json(commit.positions)
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


def _stored_to_json(stored: Stored) -> dict[str, Any]:
    where: dict[str, Any] = {}
    if stored.inline is not None:
        where["inline"] = _bytes_to_json(stored.inline)
    elif stored.key is not None:
        where["key"] = stored.key
    else:
        where["left_out"] = True
    return where | _digest_to_json(stored.digest)


def _metric_to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON knows neither nan nor inf


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


def decode(data: bytes, *, slot: int | None, uri: str) -> Record:
    """The record that lies in ``slot``, or in any if that is None.

    Raises:
        CorruptCheckpointError: The bytes are not the record of that slot, whole and undamaged.
        UnsupportedFormatError: It is undamaged, but of a newer format version or an unknown kind.
    """
    line = _checked_line(data, uri)
    try:
        body = parse_object(line)
    except Malformed as error:
        raise CorruptCheckpointError("A record is no JSON object.", uri=uri) from error
    slot = body.get("slot") if slot is None else slot
    version = body.get("format")
    if type(version) is not int or version != FORMAT:  # True == 1
        raise UnsupportedFormatError(
            f"Record {slot} has format version {version!r}; this taskckpt reads version {FORMAT}.",
            uri=uri,
            hint="A newer taskckpt wrote it: upgrade this one (pip install -U taskckpt).",
        )
    try:
        record = _from_body(Fields(body))
        _expect_sense(record)
        expect_writable(body, line)
    except Malformed as error:
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


def _checked_line(data: bytes, uri: str) -> bytes:
    first, newline, second = data.partition(b"\n")
    expected = json.dumps({"blake3": blake3(first + newline).hexdigest()}).encode() + b"\n"
    if second != expected:
        what = "cut short" if not second.endswith(b"\n") else "damaged: its digest does not fit"
        raise CorruptCheckpointError(f"A record is {what} ({len(data)} bytes).", uri=uri)
    return first


def _from_body(body: Fields) -> Record:
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
                head=body.optional("head", Fields.integer),
                unreadable=body.integers("unreadable"),
                continues_from=body.strings("continues_from"),
            )
        case "join":
            head = body.optional("head", Fields.integer)
            return Join(stamp, head=head, unreadable=body.integers("unreadable"))
        case "commit":
            return _commit_from(stamp, body)
        case "clear":
            return Clear(stamp)
        case kind:
            raise _Newer(f"of the unknown kind {kind!r}")


def _commit_from(stamp: Stamp, body: Fields) -> Commit:
    checkpoint = body.object("checkpoint")
    positions = checkpoint.optional("positions", Fields.object)
    repeats = body.optional("repeats", Fields.object)
    return Commit(
        stamp,
        content=_content_from(checkpoint),
        stored=_stored_from(checkpoint.object("stored")),
        previous=body.optional("previous", Fields.integer),
        resumed_from=body.optional("resumed_from", Fields.slot_or_uri),
        count=body.integer("count"),
        floor=body.integer("floor"),
        kept=body.integers("kept"),
        notes=_notes_from(checkpoint),
        lineage=Lineage(body.spans("left_behind"), body.optional("highest_step", Fields.integer)),
        pinned=body.optional("pinned", Fields.integers) or (),
        repeats=None if repeats is None else _origin_from(repeats),
        positions=None if positions is None else _stored_from(positions),
        catalogued=_catalogued_from(body.optional("catalogued", Fields.object)),
        continues_from=body.optional("continues_from", Fields.strings) or (),
    )


def _expect_sense(record: Record) -> None:
    """A record speaks of slots before its own; its digest only says that its writer meant it."""
    slot, claim = record.stamp.slot, record.stamp.claim.slot
    if claim != slot if isinstance(record, Claim) else not 1 <= claim < slot:
        raise Malformed(f"its claim cannot lie in slot {claim}")
    match record:
        case Claim() | Join():
            _expect_slot("head", record.head, slot - 1)
            _expect_slots("unreadable", record.unreadable, slot - 1)
        case Commit():
            _expect_sense_of_commit(record)
        case Clear():
            pass


def _expect_sense_of_commit(commit: Commit) -> None:
    slot, origin = commit.stamp.slot, commit.repeats
    if commit.floor > slot or commit.catalogued.through >= slot:
        raise Malformed("its floor, or the end of the index, lies above it")
    _expect_slot("previous", commit.previous, slot - 1)
    _expect_slot("resumed_from", commit.resumed_from, slot - 1)
    _expect_slots("kept", commit.kept, commit.floor - 1)
    _expect_slots("left_behind", [last for _, last in commit.lineage.left_behind[-1:]], slot - 1)
    _expect_slots("pinned", commit.pinned, slot)
    if origin is not None:
        _expect_slot("repeats.slot", origin.slot, slot - 1)
        _expect_slot("repeats.resumed_from", origin.resumed_from, origin.slot - 1)


def _expect_slot(name: str, value: int | str | None, highest: int) -> None:
    if isinstance(value, int):
        _expect_slots(name, [value], highest)


def _expect_slots(name: str, slots: Collection[int], highest: int) -> None:
    if slots and not 1 <= min(slots) <= max(slots) <= highest:
        raise Malformed(f"field {name!r} names a slot that is not from 1 to {highest}")


def _notes_from(checkpoint: Fields) -> Notes:
    metadata = checkpoint.optional("metadata", Fields.object)
    metrics = checkpoint.optional("metrics", Fields.object)
    return Notes(
        checkpoint.optional("step", Fields.integer),
        {} if metadata is None else metadata.values,
        {} if metrics is None else {name: metrics.metric(name) for name in metrics.values},
    )


def _origin_from(body: Fields) -> Origin:
    return Origin(
        body.integer("slot"),
        body.string("time"),
        body.object("about").values,
        body.optional("resumed_from", Fields.slot_or_uri),
    )


def _catalogued_from(body: Fields | None) -> Catalogued:
    return Catalogued() if body is None else Catalogued(body.integer("through"), body.integer("more"))


def _claim_from(body: Fields) -> ClaimId:
    return ClaimId(body.integer("slot"), body.string("nonce"), body.strings("fenced"))


def _content_from(body: Fields) -> Content:
    kind = body.string("kind")
    if kind not in get_args(Kind):
        raise _Newer(f"a commit of a checkpoint of the unknown kind {kind!r}")
    name = body.optional("name", Fields.data)
    mode = body.optional("mode", Fields.string)
    mtime_ns = body.optional("mtime_ns", Fields.string)
    return Content(
        kind=cast("Kind", kind),
        digest=_digest_from(body.object("content")),
        name=None if name is None else name.decode("utf-8", "surrogateescape"),
        mode=None if mode is None else _number(mode, _MODE, 8),
        mtime_ns=None if mtime_ns is None else _number(mtime_ns, _MTIME, 10),
        entries=body.optional("entries", Fields.integer),
    )


def _stored_from(body: Fields) -> Stored:
    inline = body.optional("inline", Fields.data)
    key = body.optional("key", Fields.string)
    digest = _digest_from(body)
    left_out = body.values.get("left_out") is True
    if (inline is not None) + (key is not None) + left_out != 1:
        raise Malformed("a checkpoint has either a key or inline content")
    if key is not None and (not _KEY.fullmatch(key) or ".." in key.split("/")):
        raise Malformed(f"{key!r} is no key of a payload")
    if inline is not None and Digest.of(inline) != digest:
        raise Malformed("the inline content does not fit its digest")
    return Stored(digest, key=key, inline=inline)


def _digest_from(body: Fields) -> Digest:
    return Digest(body.integer("size"), body.string("blake3"))


def _number(text: str, pattern: re.Pattern[str], base: int) -> int:
    # int() alone would take signs, spaces and underscores, and more than the system call does.
    if pattern.fullmatch(text) is None:
        raise Malformed(f"{text[:40]!r} is no number as expected here")
    return int(text, base)


class _Newer(Exception):  # noqa: N818 - becomes UnsupportedFormatError at the door
    """Something that this version does not know, and that must not be taken for damage."""
