from __future__ import annotations

import base64
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from taskckpt._log.records import (
    Catalogued,
    Claim,
    ClaimId,
    Clear,
    Commit,
    Content,
    Digest,
    Join,
    Lineage,
    Notes,
    Origin,
    Stamp,
    Stored,
    decode,
    encode,
)
from taskckpt.errors import CorruptCheckpointError, UnsupportedFormatError

URI = "s3://bucket/run/task/log/record"

# --- what records may say ----------------------------------------------------------------------

numbers = st.integers(0, 10**12 - 1)
nonces = st.text(alphabet="0123456789abcdef", min_size=16, max_size=16)
# What a file may be called on a disk: any bytes but NUL and the slash.
file_names = st.binary(min_size=1, max_size=40).map(
    lambda name: name.replace(b"\0", b"_").replace(b"/", b"_").decode("utf-8", "surrogateescape")
)
texts = st.text(alphabet=st.characters(codec="utf-8"), max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner)
)
digests = st.builds(Digest, numbers, st.binary(min_size=32, max_size=32).map(bytes.hex))
fenced = st.lists(nonces, max_size=3).map(tuple)
abouts = st.dictionaries(texts, plain, max_size=3)
inline = st.binary(max_size=200) | texts.map(str.encode)
stored = inline.map(lambda data: Stored(Digest.of(data), inline=data)) | st.builds(
    lambda digest, name: Stored(digest, key=f"data/{name}"), digests, nonces
)
contents = st.builds(
    Content,
    st.sampled_from(["bytes", "file", "folder"]),
    digests,
    st.none() | file_names,
    st.none() | st.integers(0, 0o777),
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.none() | numbers,
)
notes = st.builds(
    Notes,
    st.none() | numbers,
    st.dictionaries(texts, plain, max_size=3),
    st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
)
urls = st.lists(texts, max_size=3).map(tuple)
slots = st.integers(2, 10**12 - 1)


def some_of(highest: int):
    """Slots up to one."""
    return st.lists(st.integers(1, highest), max_size=4).map(tuple) if highest else st.just(())


def one_of(highest: int):
    return st.none() | st.integers(1, highest) if highest else st.none()


def stamps(slot: int, claim: st.SearchStrategy[int]):
    return st.builds(Stamp, st.just(slot), st.builds(ClaimId, claim, nonces, fenced), nonces, nonces, texts, abouts)


def joined(slot: int):
    return stamps(slot, st.integers(1, slot - 1))


@st.composite
def commits_in(draw, slot: int):
    floor, repeated = draw(st.integers(0, slot)), draw(st.integers(1, slot - 1))
    ends = sorted(draw(st.sets(st.integers(1, slot - 1), max_size=6)))
    return draw(
        st.builds(
            Commit,
            *(joined(slot), contents, stored, one_of(slot - 1), one_of(slot - 1) | texts, numbers),
            *(st.just(floor), some_of(max(floor - 1, 0)), notes),
            lineage=st.builds(Lineage, st.just(tuple(zip(ends[::2], ends[1::2], strict=False))), st.none() | numbers),
            pinned=some_of(slot),
            repeats=st.none() | st.builds(Origin, st.just(repeated), texts, abouts, one_of(repeated - 1) | texts),
            positions=st.none() | stored,
            catalogued=st.builds(Catalogued, st.integers(0, slot - 1), numbers),
            continues_from=urls,
        )
    )


records = slots.flatmap(
    lambda slot: st.one_of(
        st.builds(Claim, stamps(slot, st.just(slot)), one_of(slot - 1), some_of(slot - 1), urls),
        st.builds(Join, joined(slot), one_of(slot - 1), some_of(slot - 1)),
        commits_in(slot),
        st.builds(Clear, joined(slot)),
    )
)


STAMP = Stamp(
    7,
    ClaimId(3, "00112233445566aa", ("ff" * 8, "ee" * 8)),
    "w" * 16,
    "n" * 16,
    "2026-11-21T06:00:00Z",
    {"host": "höst", "pid": 7},
)
BYTES = Content("bytes", Digest.of(b"17"))
EXAMPLES: dict[str, Any] = {
    "claim": Claim(replace(STAMP, claim=replace(STAMP.claim, slot=7)), 5, (6, 4), ("s3://bucket/old",)),
    "join": Join(STAMP, 5, (6,)),
    "commit": Commit(STAMP, BYTES, Stored(Digest.of(b"17"), inline=b"17"), 5, 4, 2, 4, (2,)),
    "commit-file": Commit(
        STAMP,
        Content("file", Digest(100_000, "ab" * 32), "model\udcff.pt", 0o640, 1_700_000_000_000_000_001),
        Stored(Digest(100_000, "ab" * 32), key="data/000000000003-00112233445566aa/00000001-" + "cd" * 8),
        previous=None,
        resumed_from=None,
        count=1,
        floor=7,
    ),
    "commit-history": Commit(
        STAMP,
        BYTES,
        Stored(Digest.of(b"17"), inline=b"17"),
        *(5, "s3://bucket/other/log/x.jsonl", 2, 7, (2,)),
        notes=Notes(100, {"epoch": 3, "note": "ä"}, {"loss": 0.5, "norm": float("inf")}),
        lineage=Lineage(((5, 6),), 200),
        pinned=(2,),
        repeats=Origin(4, "2026-11-20T06:00:00Z", {"attempt": 1}, 3),
        positions=Stored(Digest.of(b"there"), inline=b"there"),
        catalogued=Catalogued(2, 1),
        continues_from=("s3://bucket/old",),
    ),
    "clear": Clear(STAMP),
}


def sealed(body: object) -> bytes:
    """Two lines with a digest that fits, whatever the body is: written independently of ``encode``."""
    return sealed_line(json.dumps(body).encode())


def sealed_line(line: bytes) -> bytes:
    first = line + b"\n"
    return first + b'{"blake3": "' + blake3(first).hexdigest().encode() + b'"}\n'


def body_of(name: str) -> dict[str, Any]:
    return json.loads(encode(EXAMPLES[name]).partition(b"\n")[0])


def read(data: bytes, slot: int = 7):
    return decode(data, slot=slot, uri=URI)


# --- round trips -------------------------------------------------------------------------------


@settings(max_examples=500)
@given(records)
def test_every_record_comes_back(record):
    data = encode(record)
    assert decode(data, slot=record.stamp.slot, uri=URI) == record
    assert data.count(b"\n") == 2
    assert data.endswith(b"\n")


@given(records, slots)
def test_a_record_of_another_slot_is_refused(record, slot):
    if slot == record.stamp.slot:
        return
    with pytest.raises(CorruptCheckpointError, match=f"Record {slot} holds the content of record"):
        decode(encode(record), slot=slot, uri=URI)


def test_two_lines_of_json_that_others_can_read():
    data = encode(EXAMPLES["commit"])
    first, second, rest = data.split(b"\n")
    assert rest == b""
    assert json.loads(second) == {"blake3": blake3(first + b"\n").hexdigest()}
    body = json.loads(first)
    assert list(body)[:2] == ["format", "kind"], "what must be told apart first comes first"
    assert body["format"] == 1
    assert body["checkpoint"]["stored"]["inline"] == {"text": "17"}
    assert "höst".encode() in first, "readable, not escaped"


def test_known_bytes():
    """Version 1 as it lies in stores: this may never change."""
    data = encode(
        Clear(Stamp(2, ClaimId(1, "aa" * 8), "bb" * 8, "cc" * 8, "2026-11-21T06:00:00.000000Z", {"attempt": 0}))
    )
    assert data == (
        b'{"format": 1, "kind": "clear", "slot": 2, "claim": {"slot": 1, "nonce": "aaaaaaaaaaaaaaaa", "fenced": []}, '
        b'"writer": "bbbbbbbbbbbbbbbb", "nonce": "cccccccccccccccc", "time": "2026-11-21T06:00:00.000000Z", '
        b'"about": {"attempt": 0}}\n'
        b'{"blake3": "' + blake3(data.partition(b"\n")[0] + b"\n").hexdigest().encode() + b'"}\n'
    )


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_change_of_a_byte_is_refused(name):
    data = encode(EXAMPLES[name])
    refused = 0
    for position in range(len(data)):
        for value in {0, 10, 32, 34, 125, 255, *(data[position] ^ (1 << bit) for bit in range(8))} - {data[position]}:
            changed = data[:position] + bytes([value]) + data[position + 1 :]
            with pytest.raises(CorruptCheckpointError) as info:
                read(changed)
            assert info.value.uri == URI
            refused += 1
    assert refused > 10 * len(data)


def test_all_values_of_every_byte_are_refused():
    data = encode(EXAMPLES["clear"])
    for position in range(len(data)):
        for value in range(256):
            if value != data[position]:
                with pytest.raises(CorruptCheckpointError):
                    read(data[:position] + bytes([value]) + data[position + 1 :])


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_cut_is_refused(name):
    data = encode(EXAMPLES[name])
    for length in range(len(data)):
        with pytest.raises(CorruptCheckpointError, match="cut short" if length < len(data) else ""):
            read(data[:length])
        if length:
            with pytest.raises(CorruptCheckpointError):
                read(data[length:])


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_was_added_is_refused(name):
    data = encode(EXAMPLES[name])
    for changed in (
        data + b"\n",
        data + b" ",
        b" " + data,
        b"\n" + data,
        data + data,
        data.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + data,
    ):
        with pytest.raises(CorruptCheckpointError):
            read(changed)


@given(st.binary(max_size=300))
def test_noise_is_refused(data):
    with pytest.raises(CorruptCheckpointError):
        read(data)
    with pytest.raises(CorruptCheckpointError):
        read(sealed_line(data.replace(b"\n", b"")))


# --- versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 0, -1, 10**30, None, "1", 1.5, [1], {}, False])
def test_a_newer_format_says_upgrade(version):
    with pytest.raises(UnsupportedFormatError, match="format version") as info:
        read(sealed(body_of("commit") | {"format": version}))
    assert info.value.hint
    assert "upgrade" in info.value.hint
    assert info.value.uri == URI


def test_a_newer_format_may_say_anything_else():
    with pytest.raises(UnsupportedFormatError):
        read(sealed({"format": 2, "slots": "seven"}))
    with pytest.raises(UnsupportedFormatError):
        read(sealed({}))


def test_true_is_no_version():
    with pytest.raises(UnsupportedFormatError):
        read(sealed(body_of("commit") | {"format": True}))


def test_an_unknown_kind_says_upgrade():
    with pytest.raises(UnsupportedFormatError, match="unknown kind 'rollback'") as info:
        read(sealed(body_of("clear") | {"kind": "rollback", "to": 3}))
    assert info.value.hint
    assert "upgrade" in info.value.hint


def test_a_checkpoint_of_an_unknown_kind_is_newer_and_not_damaged():
    body = body_of("commit")
    body["checkpoint"]["kind"] = "database"
    with pytest.raises(UnsupportedFormatError, match="unknown kind 'database'"):
        read(sealed(body))


@pytest.mark.parametrize("name", EXAMPLES)
def test_unknown_fields_are_passed_over(name):
    def with_more(value):
        if isinstance(value, dict):
            return {key: with_more(inner) for key, inner in value.items()} | {"later": [1, {"x": None}]}
        return value

    body = with_more(body_of(name))
    given = body_of(name)  # what users say is given back as it is
    body["about"] = given["about"]
    if "step" in given.get("checkpoint", {}):
        body["checkpoint"] |= {word: given["checkpoint"][word] for word in ("metadata", "metrics")}
        body["repeats"]["about"] = given["repeats"]["about"]
    assert read(sealed(body)) == EXAMPLES[name]


# --- malformed ---------------------------------------------------------------------------------

WRONG: dict[str, list[Any]] = {
    "integer": [None, True, "7", 7.0, -1, [7], {}],
    "string": [None, True, 7, ["a"], {}],
    "object": [None, True, 7, "a", [{}]],
    "integers": [None, True, 7, "7", {}, ["7"], [True], [None], [7.5]],
    "strings": [None, True, 7, "a", {}, [7], [None]],
}
OPTIONAL = {kind: [value for value in values if value is not None] for kind, values in WRONG.items()}
DIGEST = {"size": WRONG["integer"], "blake3": WRONG["string"]}
COMMON: dict[str, list[Any]] = {
    "slot": WRONG["integer"],
    "claim": WRONG["object"],
    "claim.slot": WRONG["integer"],
    "claim.nonce": WRONG["string"],
    "claim.fenced": WRONG["strings"],
    "writer": WRONG["string"],
    "nonce": WRONG["string"],
    "time": WRONG["string"],
    "about": WRONG["object"],
    "kind": WRONG["string"],
}
HEAD = {"head": OPTIONAL["integer"], "unreadable": WRONG["integers"]}
COMMIT: dict[str, list[Any]] = {
    "previous": OPTIONAL["integer"],
    "resumed_from": [True, -1, 7.0, [7], {}],
    "left_behind": [True, 7, "7", {}, [7], [[7]], [[7, 8, 9]], [["7", 8]], [None]],
    "highest_step": OPTIONAL["integer"],
    "pinned": OPTIONAL["integers"],
    "repeats": OPTIONAL["object"],
    "catalogued": OPTIONAL["object"],
    "continues_from": OPTIONAL["strings"],
    "checkpoint.step": OPTIONAL["integer"],
    "checkpoint.metadata": OPTIONAL["object"],
    "checkpoint.metrics": [*OPTIONAL["object"], {"loss": None}, {"loss": "high"}, {"loss": True}, {"loss": [1]}],
    "checkpoint.positions": OPTIONAL["object"],
    "count": WRONG["integer"],
    "floor": WRONG["integer"],
    "kept": WRONG["integers"],
    "checkpoint": WRONG["object"],
    "checkpoint.kind": WRONG["string"],
    "checkpoint.content": WRONG["object"],
    "checkpoint.content.size": WRONG["integer"],
    "checkpoint.content.blake3": WRONG["string"],
    "checkpoint.stored": WRONG["object"],
    "checkpoint.stored.size": WRONG["integer"],
    "checkpoint.stored.blake3": WRONG["string"],
}
FIELDS: dict[str, dict[str, list[Any]]] = {
    "claim": COMMON
    | HEAD
    | {
        "continues_from": WRONG["strings"],
    },
    "join": COMMON | HEAD,
    "commit": COMMON
    | COMMIT
    | {
        "checkpoint.stored.inline": [
            None,
            7,
            "17",
            [],
            {},
            {"text": 7},
            {"base64": "?"},
            {"base64": "MTc"},
            {"text": "18"},
        ]
    },
    "commit-history": {
        "repeats.slot": WRONG["integer"],
        "repeats.time": WRONG["string"],
        "repeats.about": WRONG["object"],
        "repeats.resumed_from": [True, -1, 7.0, [7], {}],
        "catalogued.through": WRONG["integer"],
        "catalogued.more": WRONG["integer"],
        "checkpoint.positions.size": WRONG["integer"],
        "checkpoint.positions.blake3": WRONG["string"],
        "checkpoint.positions.inline": [None, 7, {"text": "elsewhere"}],
    },
    "commit-file": COMMON
    | COMMIT
    | {
        "checkpoint.name": [True, 7, "model.pt", {}, {"text": None}, {"base64": "a"}, {"text": "\ud800"}],
        "checkpoint.mode": [7, True, "8", "rwx", "", "-7", "0o7", " 7", "7_7", "1" * 99],
        "checkpoint.mtime_ns": [7, True, "x", "", "1.5", "1e3", " 1", "1_0", "9" * 40],
        "checkpoint.entries": OPTIONAL["integer"],
        "checkpoint.stored.key": [
            None,
            7,
            [],
            "",
            "log/x",
            "/etc/passwd",
            "data/../../x",
            "data/x/..",
            "../data/x",
            "data/",
        ],
    },
    "clear": COMMON,
}
CASES = [(name, path, wrong) for name, fields in FIELDS.items() for path, values in fields.items() for wrong in values]
MISSING = [(name, path) for name, fields in FIELDS.items() for path, values in fields.items() if None in values]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_a_wrong_type_is_refused(name):
    for one, path, wrong in CASES:
        if one != name:
            continue
        body = body_of(name)
        *parents, last = path.split(".")
        place = body
        for parent in parents:
            place = place[parent]
        place[last] = wrong
        with pytest.raises(CorruptCheckpointError, match="malformed") as info:
            pytest.fail(f"{path}={wrong!r} gave {read(sealed(body))}")
        assert info.value.uri == URI


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_refused(name):
    for one, path in MISSING:
        if one != name:
            continue
        body = body_of(name)
        *parents, last = path.split(".")
        place = body
        for parent in parents:
            place = place[parent]
        del place[last]
        with pytest.raises(CorruptCheckpointError, match="malformed"):
            pytest.fail(f"without {path}: {read(sealed(body))}")


NOT_BELOW = [0, 7, 8, 2**53, 10**30]  # of a record in slot 7
NONSENSE: dict[str, dict[str, list[Any]]] = {
    "claim": {"head": NOT_BELOW, "unreadable": [[7], [6, 0], [-1], [10**30]], "claim.slot": [0, 3, 8]},
    "join": {"head": NOT_BELOW, "unreadable": [[7], [6, 0], [-1]], "claim.slot": NOT_BELOW},
    "clear": {"claim.slot": NOT_BELOW},
    "commit-history": {
        "claim.slot": NOT_BELOW,
        "previous": NOT_BELOW,
        "resumed_from": NOT_BELOW,
        "count": [2**53],
        "floor": [8, 2, 2**53 - 1, 10**30],  # 2 is kept, and so below the floor
        "kept": [[7], [2, 0], [-1], [8], [10**30]],
        "left_behind": [[[5, 7]], [[6, 5]], [[0, 5]], [[1, 2**53 - 1]], [[3, 4], [4, 5]], [[5, 6], [2, 3]], [[-2, -1]]],
        "highest_step": [2**53],
        "pinned": [[8], [0], [-1], [10**30]],
        "repeats.slot": [*NOT_BELOW, 3],  # it resumed from 3
        "repeats.resumed_from": [0, 4, 10**20],
        "catalogued.through": [7, 8, 2**53],
        "catalogued.more": [2**53],
        "checkpoint.step": [2**53, 10**3000],
        "checkpoint.content.size": [2**53],
        "checkpoint.metrics": [{"loss": 10**400}, {"loss": -(10**400)}],
        "checkpoint.metadata": [{"a": "\ud800"}, {"\udfff": 1}],
        "checkpoint.stored.size": [2**53],
    },
}


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, fields in NONSENSE.items() for path in fields])
def test_what_cannot_be_is_refused_whatever_the_digest_says(name, path):
    for wrong in NONSENSE[name][path]:
        body = body_of(name)
        *parents, last = path.split(".")
        place = body
        for parent in parents:
            place = place[parent]
        place[last] = wrong
        with pytest.raises(CorruptCheckpointError, match="malformed"):
            pytest.fail(f"{path}={wrong!r} gave {read(sealed(body))}")


def test_what_can_just_be_is_taken():
    body = body_of("commit-history")
    body |= {"previous": 6, "resumed_from": 1, "floor": 7, "kept": [6, 1], "pinned": [7, 1], "count": 2**53 - 1}
    body |= {"left_behind": [[1, 1], [2, 4], [6, 6]], "catalogued": {"through": 6, "more": 0}}
    body["repeats"] |= {"slot": 6, "resumed_from": 5}
    commit = read(sealed(body))
    assert isinstance(commit, Commit)
    assert [slot for slot in range(1, 8) if commit.lineage.has(slot)] == [5, 7]
    assert [slot for slot in range(1, 8) if commit.retains(slot)] == [1, 6, 7]


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("where", ["metrics", "metadata"])
def test_numbers_that_json_does_not_know(constant, where):
    body = body_of("commit-history")
    body["checkpoint"][where] = {"a": 4321.5}
    assert read(sealed(body)).stamp.slot == 7
    with pytest.raises(CorruptCheckpointError, match="no JSON object"):
        read(sealed_line(json.dumps(body).replace("4321.5", constant).encode()))


@pytest.mark.parametrize("depth", [100, 126, 127, 600])
@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: {"a": inner}])
def test_what_is_nested_deeply_is_refused_before_python_fails_at_it(depth, wrap):
    body = body_of("commit-history")
    value: Any = {}
    for _ in range(depth - 1):
        value = wrap(value)
    body["about"] = {"a": value}
    if depth < 127:  # the record itself and "about" are two levels
        assert encode(read(sealed(body)))
    else:
        with pytest.raises(CorruptCheckpointError, match="nested"):
            read(sealed(body))


def test_many_ranges_are_refused_and_many_kept_slots_are_found_at_once():
    slot = 10**6
    body = body_of("commit-history") | {"slot": slot, "floor": slot, "kept": list(range(slot - 1, 0, -1))}
    body["left_behind"] = [[one, one] for one in range(1, 200_001, 2)]
    commit = read(sealed(body), slot=slot)
    begin = time.process_time()
    assert sum(commit.retains(one) and commit.lineage.has(one) for one in range(1, 100_001)) == 50_000
    assert time.process_time() - begin < 5, "each would be looked for among a hundred thousand"
    body["left_behind"] = [[one, one] for one in range(1, 200_003, 2)]
    with pytest.raises(CorruptCheckpointError, match="malformed"):
        read(sealed(body), slot=slot)


def test_enough_malformed_ones_were_tried():
    assert len(CASES) + len(MISSING) > 400


def test_key_and_inline_content_exclude_each_other():
    body = body_of("commit")
    body["checkpoint"]["stored"]["key"] = "data/000000000003-00112233445566aa/x"
    with pytest.raises(CorruptCheckpointError, match="either"):
        read(sealed(body))


def test_inline_content_has_a_digest_of_its_own():
    body = body_of("commit")
    body["checkpoint"]["stored"]["blake3"] = "00" * 32
    with pytest.raises(CorruptCheckpointError, match="does not fit its digest"):
        read(sealed(body))


@pytest.mark.parametrize(
    "line",
    [b"", b"null", b"[]", b"7", b'"text"', b"{", b"{}{}", b"{'a': 1}", b'{"a": \xff}', b"\xff\xfe{\0}\0", b"NaN"],
)
def test_no_json_object(line):
    with pytest.raises(CorruptCheckpointError, match="no JSON object"):
        read(sealed_line(line))


@pytest.mark.parametrize("opening", [b"[", b'{"a": '])
@pytest.mark.parametrize("depth", [10_000, 1_000_000])
def test_json_nested_without_end(opening, depth):
    with pytest.raises(CorruptCheckpointError, match="no JSON object"):
        read(sealed_line(opening * depth))
    with pytest.raises(CorruptCheckpointError):
        read(sealed_line(b'{"format": 1, "about": ' + opening * depth + b"}"))


def test_a_number_of_a_million_digits():
    line = json.dumps(body_of("clear")).replace('"slot": 7', '"slot": ' + "7" * 1_000_000, 1).encode()
    with pytest.raises(CorruptCheckpointError):
        read(sealed_line(line))


# --- text or base64 ----------------------------------------------------------------------------


def stored_as(data: bytes) -> dict[str, Any]:
    record = replace(EXAMPLES["commit"], stored=Stored(Digest.of(data), inline=data))
    encoded = encode(record)
    assert read(encoded).stored.inline == data
    return json.loads(encoded.partition(b"\n")[0])["checkpoint"]["stored"]["inline"]


@pytest.mark.parametrize("data", [b"", b"17", b'{"step": 7}', "größer ☃ 😀".encode(), b"a\nb\tc", b"x" * 60_000])
def test_text_is_kept_readable(data):
    assert stored_as(data) == {"text": data.decode()}


@pytest.mark.parametrize(
    "data", [b"\xff", b"\x80abc", b"\0" * 1000, b"\x01\x02" * 500, bytes(range(256)), b"\xed\xa0\x80"]
)
def test_what_text_cannot_hold_or_blows_up_becomes_base64(data):
    assert stored_as(data) == {"base64": base64.b64encode(data).decode()}


@given(st.binary(max_size=2000) | st.text(max_size=500).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_inline_content_stays_small(data):
    record = replace(EXAMPLES["commit"], stored=Stored(Digest.of(data), inline=data))
    empty = replace(EXAMPLES["commit"], stored=Stored(Digest.of(b""), inline=b""))
    encoded = encode(record)
    assert read(encoded) == record
    # base64 is 4/3; a text may have as many characters as that, and no more bytes on top than it had before.
    assert len(encoded) <= len(encode(empty)) + 7 / 3 * len(data) + 64


@pytest.mark.parametrize("name", [b"model.pt", b"\xff\xfe", b"caf\xe9", "é☃".encode(), b"new\nline", b'quo"te', b" "])
def test_file_names_need_not_be_unicode(name):
    text = name.decode("utf-8", "surrogateescape")
    record = replace(EXAMPLES["commit-file"], content=replace(EXAMPLES["commit-file"].content, name=text))
    data = encode(record)
    data.decode("utf-8")  # the record is valid UTF-8 all the same
    content = read(data).content
    assert content.name == text
    assert content.name.encode("utf-8", "surrogateescape") == name
