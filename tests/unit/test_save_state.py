"""States: saved and loaded by a Checkpoint, at once or in the background. What a state may hold is tested elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskckpt import Checkpoint, PendingSave
from taskckpt._attempt import SaveRequest
from taskckpt._log.records import INLINE_LIMIT_BYTES
from taskckpt._operation import Stop
from taskckpt._payload import Source, encoded_source
from taskckpt._states import encode, safetensors, snapshot
from taskckpt.errors import (
    CorruptCheckpointError,
    SourceChangedError,
    UnsupportedFormatError,
    UsageError,
    UsageTypeError,
)
from taskckpt.testing import intercepted

SMALL = {"step": 7, "names": ["a", "b"], "nested": {"lr": 0.1, "none": None}}


def large(number: float = 1.0) -> dict[str, Any]:
    return {"weights": np.full(100_000, number), "step": number}


def save_as_state(checkpoint: Checkpoint, stored: bytes) -> None:
    """As a taskckpt of another time might have."""
    checkpoint._attempt.save(lambda: Source("state", len(stored), lambda: iter([stored])), SaveRequest(), Stop(), None)


@pytest.mark.parametrize("size", [100, INLINE_LIMIT_BYTES + 1], ids=["inline", "payload"])
def test_an_intact_state_that_cannot_be_rebuilt_is_no_reason_to_take_an_older_one(cp, size):
    cp.save_state_sync(SMALL)
    save_as_state(cp, bytes(size))
    with pytest.raises(UnsupportedFormatError, match="cannot be rebuilt here"):
        cp.load_state_sync()


@pytest.mark.parametrize("at", [0, 9, -1])
def test_a_damaged_state_is_one(cp, place, at):
    cp.save_state_sync(SMALL)
    cp.save_state_sync(large())
    (payload,) = [path for path in (place / "data").rglob("*") if path.is_file()]
    data = bytearray(payload.read_bytes())
    data[at] ^= 0x40
    payload.write_bytes(data)
    assert Checkpoint(place).load_state_sync() == SMALL


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "place"


@pytest.fixture
def cp(place) -> Checkpoint:
    return Checkpoint(place)


def same(found: dict[str, Any] | None, expected: dict[str, Any]) -> bool:
    assert found is not None
    assert found.keys() == expected.keys()
    return all(np.array_equal(found[name], expected[name]) for name in found)


WAYS = {
    "sync": (lambda cp, state: cp.save_state_sync(state), lambda cp: cp.load_state_sync()),
    "async": (
        lambda cp, state: asyncio.run(cp.save_state(state)),
        lambda cp: asyncio.run(cp.load_state()),
    ),
    "later": (lambda cp, state: cp.save_later(state).result(), lambda cp: cp.load_state_sync()),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_state_comes_back(way, cp, place):
    save, load = WAYS[way]
    assert load(cp) is None
    for state in (SMALL, large(), {}):
        save(cp, state)
        assert same(load(Checkpoint(place, read_only=True)), state)


def test_all_ways_store_the_same_bytes(tmp_path):
    stored = []
    for way, (save, _) in WAYS.items():
        save(Checkpoint(tmp_path / way), large())
        stored += [path.read_bytes() for path in (tmp_path / way / "data").rglob("*") if path.is_file()]
    assert len(stored) == 3
    assert len(set(stored)) == 1


def record(place: Path) -> dict[str, Any]:
    newest = min(Path(place, "log").iterdir())
    return json.loads(newest.read_bytes().partition(b"\n")[0])["checkpoint"]


def test_a_small_state_lies_in_the_record(cp, place):
    cp.save_state_sync(SMALL)
    assert record(place)["kind"] == "state"
    assert "inline" in record(place)["stored"]
    assert not (place / "data").exists()
    cp.save_state_sync({"data": os.urandom(INLINE_LIMIT_BYTES)})
    assert "key" in record(place)["stored"]


def test_it_is_a_safetensors_file_as_well(cp, place):
    cp.save_state_sync(large())
    path = cp.load_sync()
    assert path.name == "payload"
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    (name,) = set(header) - {"__metadata__"}
    begin, end = header[name]["data_offsets"]
    assert np.array_equal(np.frombuffer(data[-(end - begin) :], "<f8"), np.full(100_000, 1.0))
    assert cp.load_bytes_sync() == data


@pytest.mark.parametrize("data", [b"bytes", "file", "folder"])
def test_what_is_no_state_is_not_loaded_as_one(data, cp, tmp_path):
    if isinstance(data, str):
        path = tmp_path / data
        path.mkdir() if data == "folder" else path.write_bytes(b"x")
        data = path
    cp.save_sync(data)
    with pytest.raises(UsageError, match="no state") as caught:
        cp.load_state_sync()
    assert ("load()" if isinstance(data, Path) and data.is_dir() else "load_bytes()") in str(caught.value)


def test_what_somebody_else_wrote_is_no_state(tmp_path):
    (tmp_path / "theirs").write_bytes(b"x")
    with pytest.raises(UsageError, match="no state"):
        Checkpoint(tmp_path / "own", src=tmp_path / "theirs").load_state_sync()


def test_save_takes_no_dict_and_says_what_does(cp):
    with pytest.raises(UsageTypeError, match="save_state"):
        cp.save_sync(SMALL)
    with pytest.raises(UsageTypeError, match="save_state"):
        asyncio.run(cp.save(SMALL))


@pytest.mark.parametrize("state", [None, 7, b"bytes", [1], "text"])
def test_save_state_takes_nothing_else(state, cp, place):
    with pytest.raises(UsageTypeError, match="takes a dict"):
        cp.save_state_sync(state)
    assert not place.exists()


def test_what_would_not_come_back_is_refused_by_its_path(cp, place):
    with pytest.raises(UsageTypeError, match="nested"):
        cp.save_state_sync({"nested": {"lock": threading.Lock()}})
    assert not place.exists()


def test_a_damaged_one_is_passed_over(cp, place, caplog):
    cp.save_state_sync(large(1.0))
    cp.save_state_sync(large(2.0))
    newest = max((place / "data").rglob("0*"), key=lambda path: path.name)
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    assert same(Checkpoint(place, read_only=True).load_state_sync(), large(1.0))
    for path in (place / "data").rglob("0*"):
        if path.is_file():
            path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError):
        Checkpoint(place, read_only=True).load_state_sync()


def test_progress_of_both(cp):
    told: list[tuple[int, int]] = []
    cp.save_state_sync(large(), progress=lambda *at: told.append(at))
    assert told[-1][0] == told[-1][1] > 800_000
    told.clear()
    cp.load_state_sync(progress=lambda *at: told.append(at))
    assert told[-1][0] == told[-1][1] > 800_000


# --- in the background -------------------------------------------------------------------------


@pytest.fixture
def held():
    """Payloads are written when this is set."""
    opened = threading.Event()

    def hook(when: str, verb: str, _keys: object) -> None:
        if (when, verb) == ("before", "write"):
            opened.wait(15)

    with intercepted(hook):
        yield opened
        opened.set()


def in_flight(pending: PendingSave) -> PendingSave:
    while "in flight" not in repr(pending):
        time.sleep(0.001)
    return pending


def test_the_caller_may_change_its_arrays(place, held):
    cp, state = Checkpoint(place), large(1.0)
    pending = cp.save_later(state)
    state["weights"][:] = 2.0
    state["step"] = 2.0
    held.set()
    assert pending.result()
    assert same(cp.load_state_sync(), large(1.0))


def test_memory_is_used_again_and_bounded(place, held):
    cp = Checkpoint(place)
    begun = [in_flight(cp.save_later(large(0.0)))]
    begun += [cp.save_later(large(number)) for number in range(1, 10)]
    buffers = cp._later._buffers
    assert buffers is not None
    taken = buffers.free_bytes
    held.set()
    assert [one.result() for one in begun] == [True, *([False] * 8), True]
    size = large()["weights"].nbytes
    assert taken == 0, "one in flight and one waiting, and none beside"
    assert size <= buffers.free_bytes / 2 < 2 * size
    assert same(cp.load_state_sync(), large(9.0))
    cp._end()
    assert cp._later._buffers is None


def test_what_cannot_be_copied_leaves_nothing_behind(place, held):
    cp = Checkpoint(place)
    first = in_flight(cp.save_later(large(1.0)))
    second = cp.save_later(large(2.0))
    with pytest.raises(UsageTypeError):
        cp.save_later({"bad": object()})
    assert not second.done()
    held.set()
    assert [first.result(), second.result()] == [True, True]


def test_when_there_is_no_memory_for_it_the_waiting_one_has_given_way(place, held, monkeypatch):
    """Else three copies of a state would be in memory at once."""
    cp = Checkpoint(place)
    first = in_flight(cp.save_later(large(1.0)))
    second = cp.save_later(large(2.0))

    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("taskckpt._states.snapshot.EncodedState.snapshot", no_memory)
        with pytest.raises(MemoryError):
            cp.save_later(large(3.0))
    with pytest.raises(MemoryError):  # neither is saved
        second.result()
    held.set()
    cp.wait()
    assert first.result()
    assert same(cp.load_state_sync(), large(1.0))


def test_states_and_other_kinds_in_turn(place, tmp_path):
    cp = Checkpoint(place, keep=None)
    (tmp_path / "file").write_bytes(b"file")
    for data in (large(), b"bytes", tmp_path / "file", SMALL):
        cp.save_later(data, policy="queue")
    cp.wait()
    assert cp.load_state_sync() == SMALL


def test_an_interrupted_copy_is_over_before_its_memory_is_used_again(cp, monkeypatch):
    copy: Any = safetensors.copy  # what the snapshot copies with
    start = threading.Thread.start
    begun: list[threading.Thread] = []

    def slow_copy(*arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and len(begun) == 1:
            time.sleep(0.2)
        copy(*arguments)

    def interrupted_start(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("taskckpt"):
            begun.append(thread)
            if len(begun) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(snapshot, "copy", slow_copy)
    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    with pytest.raises(KeyboardInterrupt):
        cp.save_later({"w": np.full(3_000_000, 1.0)})
    assert cp.save_later({"w": np.full(3_000_000, 2.0)}).result()
    found = cp.load_state_sync()
    assert found is not None
    assert set(np.unique(found["w"])) == {2.0}


def test_what_was_interrupted_when_it_was_in_flight_already_keeps_its_memory(cp, held):
    class Interrupting(deque[Any]):
        def append(self, pending: Any) -> None:
            super().append(pending)
            cp._later.see_to_it()
            while pending.is_waiting:
                time.sleep(0.001)
            raise KeyboardInterrupt

    cp._later._queue = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        cp.save_later(large(1.0))
    cp._later._queue = deque()
    cp.save_later(large(2.0))
    assert cp._later._buffers is not None
    assert cp._later._buffers.free_bytes == 0, "both are still to be saved"
    held.set()
    cp.wait()
    assert same(cp.load_state_sync(), large(2.0))
    assert len(list((Path(cp.remote_destination) / "data").rglob("*-*/*"))) == 2


def test_an_array_that_shrinks_while_it_is_saved_is_no_checkpoint(cp):
    cp.save_state_sync(SMALL)
    array = np.zeros(1_000_000)
    state = {"a": np.zeros(1_000_000), "z": array}

    def shrink(done: int, _total: int) -> None:
        if done > 1_000_000:
            array.resize(10, refcheck=False)

    encoded = encode(state)
    with pytest.raises(SourceChangedError):
        cp._attempt.save(lambda: encoded_source(encoded), SaveRequest(), Stop(), shrink)
    assert cp.load_state_sync() == SMALL
