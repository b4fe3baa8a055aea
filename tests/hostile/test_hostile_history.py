"""Records and pages of the index with a digest that fits, and with content that nobody could have meant.

Each gets a typed error or is passed over, quickly, and never hides what else is there.
"""

from __future__ import annotations

import json
import logging
import time
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from taskckpt import BestN, Checkpoint, EveryNSteps, LatestN
from taskckpt._log import catalogue
from taskckpt._log.records import Commit, decode, encode
from taskckpt._log.retention import Kept, Retention
from taskckpt.errors import CorruptCheckpointError, UsageError


@pytest.fixture
def dest(tmp_path: Path) -> str:
    return str(tmp_path / "task")


def sealed(body: dict[str, Any]) -> bytes:
    first = json.dumps(body).encode() + b"\n"
    return first + b'{"blake3": "' + blake3(first).hexdigest().encode() + b'"}\n'


def forge(dest: str, **change: Any) -> None:
    """Changes the newest record, as whoever may write to the store can."""
    path = min(Path(dest, "log").iterdir())
    body = json.loads(path.read_bytes().partition(b"\n")[0])
    metrics = change.pop("metrics", None)
    body |= change
    if metrics is not None:
        body["checkpoint"]["metrics"] = metrics
    path.write_bytes(sealed(body))


# --- records -----------------------------------------------------------------------------------

NONSENSE: list[dict[str, Any]] = [
    {"left_behind": [[1, 2**53 - 1]]},
    {"floor": 10**30},
    {"kept": [-1, -5]},
    {"kept": [10**40]},
    {"resumed_from": 10**20},
    {"repeats": {"slot": 10**18, "time": "", "about": {}, "resumed_from": None}},
    {"metrics": {"loss": 10**400}},
    {"metrics": {"loss": float("nan")}},
    {"left_behind": [[slot, slot] for slot in range(10**6, 10**6 + 200_000)]},
]


@pytest.mark.parametrize("change", NONSENSE, ids=lambda change: next(iter(change)))
def test_nonsense_is_damage_and_hides_nothing(dest, change, caplog):
    checkpoint = Checkpoint(dest)
    for step in range(3):
        checkpoint.save_sync(b"%d" % step, step=step)
    forge(dest, **change)
    begin = time.process_time()
    reader = Checkpoint(dest, read_only=True)
    assert reader.load_bytes_sync() == b"1"
    assert "Passed over a damaged checkpoint" in caplog.text
    assert reader.steps_sync() == [0, 1]
    assert reader.load_bytes_sync(step=0) == b"0"
    writer = Checkpoint(dest)
    assert writer.load_bytes_sync() == b"1"
    writer.save_sync(b"3", step=3, pin=True)
    assert Checkpoint(dest).load_bytes_sync() == b"3"
    assert time.process_time() - begin < 15


def test_nothing_but_nonsense_is_an_error_and_not_none(dest):
    Checkpoint(dest).save_sync(b"x")
    forge(dest, left_behind=[[1, 2**53 - 1]])
    with pytest.raises(CorruptCheckpointError):
        Checkpoint(dest).load_bytes_sync()


# --- pages of the index ------------------------------------------------------------------------

COUNT = 60


@pytest.fixture
def page(dest: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first of several pages, of a task that keeps all."""
    monkeypatch.setattr(catalogue, "PAGE_COMMITS", 8)
    monkeypatch.setattr("taskckpt._log.writer.PAGE_COMMITS", 8)
    monkeypatch.setattr(catalogue, "FEW_RECORDS", 4)
    checkpoint = Checkpoint(dest, keep=None)
    for step in range(COUNT):
        checkpoint.save_sync(b"%d" % step, step=step)
    return min(Path(dest, "index").iterdir())


def lines_of(page: Path) -> list[bytes]:
    return page.read_bytes().splitlines(keepends=True)[:-1]


def swapped(lines: list[bytes]) -> list[bytes]:
    return lines[2:4] + lines[:2] + lines[4:]


def of_a_newer_format(lines: list[bytes]) -> list[bytes]:
    body = json.loads(lines[0]) | {"format": 2}
    return [*sealed(body).splitlines(keepends=True), *lines[2:]]


def with_a_claim(lines: list[bytes]) -> list[bytes]:
    body = json.loads(lines[0]) | {"kind": "clear"}
    return [*sealed(body).splitlines(keepends=True), *lines[2:]]


LIES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], dict[str, Any]]] = {
    "an odd number of lines": (lambda lines: lines[:-1], {}),
    "one line": (lambda lines: [b"{}\n"], {}),
    "no commits": (lambda lines: [], {}),
    "not all commits": (lambda lines: lines[:-2], {}),
    "not in order": (swapped, {}),
    "one twice": (lambda lines: [*lines[:2], *lines], {}),
    "no text": (lambda lines: [b"\xff\n", b"\xff\n"], {}),
    "a newer format": (of_a_newer_format, {}),
    "no commit": (with_a_claim, {}),
    "text for numbers": (lambda lines: lines, {"first": "a", "last": "b"}),
    "null": (lambda lines: lines, {"first": None}),
    "wider than its name": (lambda lines: lines, {"last": 50}),
    "narrower than its name": (lambda lines: lines, {"last": 3}),
    "without end": (lambda lines: lines, {"last": 3 * 10**7}),
    "negative": (lambda lines: [], {"first": -5, "last": -1}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_page_that_lies_is_passed_over(dest, page, lie, caplog):
    change, claimed = LIES[lie]
    first, last = (int(number) for number in page.name.split("-")[:2])
    body = b"".join(change(lines_of(page)))
    end = {"first": first, "last": last} | claimed | {"blake3": blake3(body).hexdigest()}
    page.write_bytes(body + json.dumps(end).encode() + b"\n")
    caplog.set_level(logging.INFO, "taskckpt")
    tracemalloc.start()
    try:
        assert Checkpoint(dest, read_only=True).steps_sync() == list(range(COUNT))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert "A page of the index is no use" in caplog.text
    writer = Checkpoint(dest, keep=LatestN(500))
    writer.save_sync(b"x", step=COUNT)
    assert writer.steps_sync() == list(range(COUNT + 1)), "what a page hides would have been dropped"


@pytest.mark.parametrize("end", [b"[1]\n", b"7\n", b"\n", b"[" * 100_000 + b"\n", b'{"first": 1}\n'])
def test_a_page_with_an_end_that_is_none(dest, page, end):
    page.write_bytes(b"".join(lines_of(page)) + end)
    assert Checkpoint(dest, read_only=True).steps_sync() == list(range(COUNT))


# --- many --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [LatestN(20_000), EveryNSteps(1), BestN(20_000, "loss")], ids=str)
def test_a_save_beside_ten_thousand_others_takes_milliseconds(dest, policy):
    count = 10_000
    Checkpoint(dest, keep=None).save_sync(b"x", step=0)
    data = min(Path(dest, "log").iterdir()).read_bytes()
    body = json.loads(data.partition(b"\n")[0]) | {"slot": count, "floor": count, "kept": list(range(count - 1, 1, -1))}
    body["checkpoint"]["metrics"] = {"loss": 1.0}
    head = decode(sealed(body), slot=count, uri="")
    assert isinstance(head, Commit)
    retention = Retention(policy, head, [Kept(slot, (), slot, slot, {"loss": 1.0 * slot}) for slot in head.kept])
    new = Kept(count + 1, (), count + 1, count + 1, {"loss": 0.0})
    plan = retention.plan(new, ())
    body |= {"slot": count + 1, "floor": plan.floor, "kept": plan.kept}
    commit = decode(sealed(body), slot=count + 1, uri="")
    assert isinstance(commit, Commit)
    begin = time.process_time()
    assert retention.committed(commit) == []
    assert time.process_time() - begin < 0.1
    assert len(retention) == count
    assert decode(encode(commit), slot=count + 1, uri="") == commit


# --- what users say ----------------------------------------------------------------------------


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"metrics": {"loss": 10**400}}, r"metrics\['loss'\] is larger than any float"),
        ({"metrics": {"loss": Fraction(10**400)}}, "larger than any float"),
        ({"metrics": {"loss": np.zeros(2)}}, r"metrics\['loss'\] is of the type ndarray"),
        ({"metadata": {"a": nested(500)}}, r"metadata\['a'\]\[0\].* is nested more than 100 deep"),
        ({"metadata": {"a": nested(100)}}, "nested more than 100 deep"),
        ({"metadata": {"a": 10**5000}}, r"metadata\['a'\] has more than 640 digits"),
        ({"metadata": {"a": -(10**640)}}, "more than 640 digits"),
        ({"metadata": {"a": Fraction(10**400)}}, "larger than any float"),
    ],
)
def test_what_a_record_cannot_hold_is_refused(dest, notes, message):
    with pytest.raises(UsageError, match=message):
        Checkpoint(dest).save_sync(b"x", **notes)
    assert not Path(dest).exists()


def test_metadata_that_contains_itself_is_refused(dest):
    metadata: dict[str, Any] = {}
    metadata["again"] = metadata
    with pytest.raises(UsageError, match="nested more than 100 deep"):
        Checkpoint(dest).save_sync(b"x", metadata=metadata)


def test_what_it_can_just_hold_comes_back_and_can_be_repeated(dest):
    metadata = {"deep": nested(99), "long": 10**640 - 1}
    checkpoint = Checkpoint(dest)
    checkpoint.save_sync(b"x", step=1, metadata=metadata)
    checkpoint.pin_sync(1)
    (found,) = Checkpoint(dest).checkpoints_sync()
    assert found.metadata == metadata
    assert found.pinned
