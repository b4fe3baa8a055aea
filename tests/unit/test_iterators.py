"""``IteratorCheckpoint`` and ``PipelineCheckpoint``: exact, whatever is killed, without the faults of their model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import uuid
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from taskckpt import Checkpoint, CheckpointableIterator, IteratorCheckpoint, PipelineCheckpoint
from taskckpt.errors import (
    CorruptCheckpointError,
    DeniedError,
    IdentityMismatchError,
    StaleAttemptError,
    StepExistsError,
    StepNotFoundError,
    StorageFullError,
    TaskckptError,
    UnavailableError,
    UsageError,
    UsageTypeError,
)
from taskckpt.testing import instant_retries, intercepted
from tests.unit.test_state import KEYS, TREES, assert_same

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from taskckpt.testing.servers import S3Server


# Quick and exact enough for states; processes are tested on a disk.
pytestmark = pytest.mark.filterwarnings("ignore:memory.// lives in this process only")


class Shuffled(CheckpointableIterator[int]):
    """Numbers in an order that depends on all of its state: shuffled anew in each epoch."""

    def __init__(self, length: int = 10, seed: int = 0, epochs: int = 1) -> None:
        self.length = length
        self.epochs = epochs
        self.rng = np.random.default_rng(seed)
        self.epoch = 0
        self.order = self.rng.permutation(length)
        self.position = 0

    def __next__(self) -> int:
        if self.position == self.length:
            if self.epoch + 1 >= self.epochs:
                raise StopIteration
            self.epoch += 1
            self.order = self.rng.permutation(self.length)
            self.position = 0
        self.position += 1
        return int(self.order[self.position - 1])

    def get_state(self) -> dict[str, Any]:
        return {
            "rng": self.rng.bit_generator.state,
            "epoch": self.epoch,
            "order": self.order,
            "position": np.int64(self.position),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.epoch = state["epoch"]
        self.order = state["order"]
        self.position = int(state["position"])


class Torchlike:
    """What PyTorch's loaders offer, and neither a base class nor Datarax's names."""

    def __init__(self) -> None:
        self.done = 0

    def __iter__(self) -> Torchlike:
        return self

    def __next__(self) -> int:
        self.done += 1
        return self.done

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = state_dict["done"]


class Holder:
    """Gives and takes any state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state
        self.sets = 0

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> None:
        self.sets += 1
        self.state = state


def steps_of(checkpointer: IteratorCheckpoint) -> list[int | None]:
    """Of all that there are, newest first."""
    return [one.step for one in checkpointer.checkpoint.checkpoints_sync()]


def restored(checkpointer: IteratorCheckpoint, step: int | None = None) -> Any:
    return checkpointer.restore(Holder(), step).state


# --- exact -------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_killed_at_any_item_any_number_of_times_it_continues_exactly(data: st.DataObject) -> None:
    seed, epochs, background = data.draw(st.tuples(st.integers(0, 5), st.integers(1, 3), st.booleans()))
    place = Path(uuid.uuid4().hex)

    def start() -> tuple[Shuffled, PipelineCheckpoint]:
        # As a new process: nothing is handed on but the place.
        stream, checkpointer = Shuffled(7, seed, epochs), PipelineCheckpoint(place, async_checkpointing=background)
        if checkpointer.has_checkpoint():
            checkpointer.restore_latest(stream)
        return stream, checkpointer

    saved: list[int] = []
    for items in data.draw(st.lists(st.lists(st.booleans(), max_size=6), max_size=8)):
        stream, checkpointer = start()
        done = list(saved)
        for saves in items:
            done += islice(stream, 1)
            if saves:
                checkpointer.save(stream, step=len(done), keep=data.draw(st.integers(1, 3)), overwrite=True)
                saved = list(done)
        checkpointer.close()
    assert saved + list(start()[0]) == list(Shuffled(7, seed, epochs))


STATES = st.dictionaries(KEYS, TREES | hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(max_side=4)), max_size=4)


@settings(max_examples=40)
@given(
    STATES,
    st.dictionaries(
        st.text(st.characters(codec="utf-8")),
        st.integers() | st.text(st.characters(codec="utf-8")) | st.booleans(),
        max_size=3,
    ),
)
def test_states_of_any_nest_and_any_metadata_come_back(state: dict[Any, Any], metadata: dict[str, Any]) -> None:
    checkpointer = IteratorCheckpoint(Path(uuid.uuid4().hex))
    checkpointer.save_to_directory(Holder(state), metadata=metadata)
    assert_same(restored(checkpointer), state)
    assert checkpointer.checkpoint.checkpoints_sync()[0].metadata == metadata


def test_the_second_and_the_third_resume_are_exact_too() -> None:
    expected = list(Shuffled(20, 3, 2))
    found: list[int] = []
    while len(found) < len(expected):
        stream, checkpointer = Shuffled(20, 3, 2), IteratorCheckpoint("place")
        if checkpointer.has_checkpoint():
            checkpointer.restore(stream)
        found += islice(stream, 6)
        checkpointer.save_to_directory(stream)
    assert found == expected


def test_objects_with_a_state_dict_are_taken_as_they_are() -> None:
    loader = Torchlike()
    assert list(islice(loader, 3)) == [1, 2, 3]
    IteratorCheckpoint("place").save_to_directory(loader, step=3)
    assert next(IteratorCheckpoint("place").restore(Torchlike())) == 4


def test_what_iterators_are_is_known_by_their_methods() -> None:
    class Bare:
        def __iter__(self): ...
        def __next__(self): ...
        def get_state(self): ...
        def set_state(self, state): ...

    assert isinstance(Bare(), CheckpointableIterator)
    assert not isinstance(Torchlike(), CheckpointableIterator)
    assert not isinstance(iter([1]), CheckpointableIterator)


def test_a_subclass_must_have_a_state_and_says_what_it_lacks() -> None:
    class Half(CheckpointableIterator[int]):
        def get_state(self):
            return {}

    with pytest.raises(TypeError, match="set_state"):
        Half()  # type: ignore[abstract]

    class Silent(CheckpointableIterator[int]):
        def get_state(self):
            return {}

        def set_state(self, state):
            pass

    stream = Silent()  # type: ignore[abstract]
    assert iter(stream) is stream
    with pytest.raises(NotImplementedError, match="Silent does not define __next__"):
        next(stream)


# --- steps and what stays ----------------------------------------------------------------------


def test_a_lower_step_is_the_newest_and_stays() -> None:
    """Datarax drops the lowest steps: with keep=1 that is the one just written."""
    checkpointer = IteratorCheckpoint("place")
    for step in (100, 7):
        checkpointer.save_to_directory(Holder({"at": step}), step=step)
    assert steps_of(checkpointer) == [7]
    assert checkpointer.get_latest_step() == 7
    assert restored(checkpointer) == {"at": 7}


def test_a_missing_step_is_an_error_that_lists_the_steps() -> None:
    """Datarax falls back to what was saved without a step."""
    checkpointer = IteratorCheckpoint("place")
    for step in (10, 20, None):
        checkpointer.save_to_directory(Holder({"at": step}), step=step, keep=None)
    holder = Holder()
    with pytest.raises(StepNotFoundError, match="There are the steps 10, 20"):
        checkpointer.restore(holder, step=15)
    assert holder.sets == 0
    assert restored(checkpointer, 10) == {"at": 10}
    assert restored(checkpointer) == {"at": None}


def test_what_was_saved_without_a_step_is_seen() -> None:
    """Datarax's has_checkpoint and restore_latest do not see it."""
    checkpointer = IteratorCheckpoint("place")
    assert not checkpointer.has_checkpoint()
    checkpointer.save_to_directory(Holder({"at": 1}))
    assert checkpointer.has_checkpoint()
    assert checkpointer.restore_latest(Holder()).state == {"at": 1}
    assert checkpointer.get_latest_step() is None
    assert checkpointer.list_checkpoints() == {}
    checkpointer.save_to_directory(Holder({"at": 2}), step=2, keep=5)
    checkpointer.save_to_directory(Holder({"at": 3}), keep=5)
    assert checkpointer.get_latest_step() == 2
    assert checkpointer.restore_latest(Holder()).state == {"at": 3}


def test_the_uris_listed_are_those_that_save_gave_and_can_be_loaded() -> None:
    """Datarax lists ckpt-N, whatever the folder is called."""
    checkpointer = PipelineCheckpoint("place")
    saved = {step: checkpointer.save(Holder({"at": step}), step=step, keep=9) for step in (30, 10, 20)}
    assert checkpointer.list_checkpoints() == saved
    assert list(checkpointer.list_checkpoints()) == [10, 20, 30]
    for step, uri in saved.items():
        assert Path(uri).is_file()
        assert Checkpoint("elsewhere", src=uri, read_only=True).load_state_sync() == {"at": step}


def test_steps_that_are_there_are_not_overwritten_unasked() -> None:
    checkpointer = IteratorCheckpoint("place")
    checkpointer.save_to_directory(Holder({"at": 1}), step=1)
    with pytest.raises(StepExistsError) as caught:
        checkpointer.save_to_directory(Holder({"at": 2}), step=1)
    assert isinstance(caught.value, ValueError)
    assert restored(checkpointer) == {"at": 1}
    checkpointer.save_to_directory(Holder({"at": 2}), step=1, overwrite=True)
    assert restored(checkpointer) == {"at": 2}
    assert list(checkpointer.list_checkpoints()) == [1]


def test_after_going_back_the_steps_may_be_saved_again() -> None:
    checkpointer = PipelineCheckpoint("place")
    for step in (1, 2, 3):
        checkpointer.save(Holder({"at": step}), step=step, keep=9)
    checkpointer.restore(Holder(), step=1)
    uri = checkpointer.save(Holder({"at": "another 2"}), step=2, keep=9)
    assert checkpointer.list_checkpoints()[2] == uri
    assert restored(checkpointer) == {"at": "another 2"}
    assert restored(checkpointer, 2) == {"at": "another 2"}


def test_of_two_with_one_step_the_one_that_the_newest_goes_on_from_is_listed_and_restored() -> None:
    checkpointer = PipelineCheckpoint("place")
    for step in (1, 2, 3):
        checkpointer.save(Holder({"at": step}), step=step, keep=9)
    uri = checkpointer.list_checkpoints()[2]
    checkpointer.restore(Holder(), step=1)
    checkpointer.save(Holder({"at": "aside"}), step=2, keep=9)
    checkpointer.restore(Holder(), step=3)
    checkpointer.save(Holder({"at": 4}), step=4, keep=9)
    assert checkpointer.list_checkpoints()[2] == uri
    assert restored(checkpointer, 2) == {"at": 2}


@pytest.mark.parametrize("keep", [1, 2, 3, None])
@pytest.mark.parametrize("background", [False, True])
def test_so_many_of_the_newest_stay(keep: int | None, background: bool) -> None:
    with IteratorCheckpoint("place", async_checkpointing=background) as checkpointer:
        for step in range(6):
            checkpointer.save_to_directory(Holder({"at": step}), step=step, keep=keep)
        checkpointer.wait_until_finished()
        assert steps_of(checkpointer) == list(reversed(range(6)))[:keep]


def test_in_the_background_one_more_stays_until_somebody_waits() -> None:
    with IteratorCheckpoint("place", async_checkpointing=True) as checkpointer:
        for step in range(8):
            checkpointer.save_to_directory(Holder({"at": step}), step=step, keep=1)
            checkpointer.checkpoint.wait()
        assert steps_of(checkpointer) == [7, 6]
        checkpointer.wait_until_finished()
        assert steps_of(checkpointer) == [7]


def test_each_save_says_how_many_stay() -> None:
    checkpointer = IteratorCheckpoint("place")
    for step, keep in enumerate((5, 5, 5, 2, 9, 9)):
        checkpointer.save_to_directory(Holder({"at": step}), step=step, keep=keep)
    assert steps_of(checkpointer) == [5, 4, 3, 2]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("size", [10, 100_000])
def test_what_is_older_goes_only_after_what_is_new_was_read_back(background: bool, size: int) -> None:
    """A store that does not keep what it took: 100 kB are an object of their own, 10 bytes lie in the record."""
    is_damaging = False

    def damage_what_is_written(when: str, verb: str, keys: Sequence[str]) -> None:
        if is_damaging and when == "after" and verb == ("write" if size > 65536 else "create"):
            damage(f"place/{keys[0]}")

    with intercepted(damage_what_is_written):
        checkpointer = IteratorCheckpoint("place", async_checkpointing=background)
        for step in (1, 2):
            checkpointer.save_to_directory(Holder({"at": step, "data": bytes(size)}), step=step)
        checkpointer.wait_until_finished()
        assert steps_of(checkpointer) == [2]
        is_damaging = True
        for step in (3, 4, 5):
            with pytest.raises(CorruptCheckpointError, match="saved just now cannot be read back") as caught:  # noqa: PT012
                checkpointer.save_to_directory(Holder({"at": step, "data": bytes(size)}), step=step)
                checkpointer.wait_until_finished()
            assert isinstance(caught.value, ValueError)
        is_damaging = False
        assert restored(IteratorCheckpoint("place"))["at"] == 2  # older than all that are damaged
        checkpointer = IteratorCheckpoint("place", async_checkpointing=background)
        for step in (6, 7):
            checkpointer.save_to_directory(Holder({"at": step, "data": bytes(size)}), step=step)
        checkpointer.wait_until_finished()
        assert restored(checkpointer)["at"] == 7


def test_a_save_in_the_background_that_is_damaged_is_told_of_once_and_does_not_stop_the_next() -> None:
    damaged: list[str] = []

    def damage_one(when: str, verb: str, keys: Sequence[str]) -> None:
        if when == "after" and verb == "write" and len(damaged) < 1:
            damaged.append(f"place/{keys[0]}")
            damage(damaged[0])

    with intercepted(damage_one):
        checkpointer = IteratorCheckpoint("place", async_checkpointing=True)
        checkpointer.save_to_directory(Holder({"at": 1, "data": bytes(100_000)}))
        checkpointer.checkpoint.wait()
        with pytest.raises(CorruptCheckpointError, match="saved just now cannot be read back"):
            checkpointer.save_to_directory(Holder({"at": 2}))
        checkpointer.save_to_directory(Holder({"at": 3}))
        checkpointer.close()
    assert restored(checkpointer) == {"at": 3}


def test_pruning_before_any_save_drops_nothing() -> None:
    checkpointer = IteratorCheckpoint("place")
    for step in range(3):
        checkpointer.save_to_directory(Holder({"at": step}), step=step, keep=None)
    other = IteratorCheckpoint("place")
    assert all(one.keeps for one in other.checkpoint.prune_sync())
    assert steps_of(other) == [2, 1, 0]


def test_a_checkpoint_that_is_given_decides_itself_what_stays() -> None:
    checkpoint = Checkpoint("place", keep=3)
    checkpointer = IteratorCheckpoint(checkpoint)
    assert checkpointer.checkpoint is checkpoint
    for step in range(6):
        checkpointer.save_to_directory(Holder({"at": step}), step=step, keep=1)
    assert steps_of(checkpointer) == [5, 4, 3]
    assert restored(checkpointer, 3) == {"at": 3}


def test_what_is_pinned_stays() -> None:
    checkpointer = IteratorCheckpoint("place")
    checkpointer.save_to_directory(Holder({"at": 1}), step=1)
    checkpointer.checkpoint.pin_sync(1)
    for step in (2, 3, 4):
        checkpointer.save_to_directory(Holder({"at": step}), step=step)
    assert list(checkpointer.list_checkpoints()) == [1, 4]


# --- save_to_step ------------------------------------------------------------------------------


def test_only_multiples_of_the_interval_are_saved() -> None:
    checkpointer = PipelineCheckpoint("place")
    saved = [step for step in range(25) if checkpointer.save_to_step(Holder({}), step, interval=6) is not None]
    assert saved == [0, 6, 12, 18, 24]
    assert list(checkpointer.list_checkpoints()) == saved
    assert checkpointer.save_to_step(Holder({}), 999) is None
    assert checkpointer.save_to_step(Holder({}), np.int64(1000)) == checkpointer.list_checkpoints()[1000]  # type: ignore[arg-type]


@pytest.mark.parametrize("interval", [0, -1])
def test_an_interval_below_one_is_refused(interval: int) -> None:
    """Datarax divides by it."""
    with pytest.raises(UsageError, match=f"interval={interval} must be at least 1") as caught:
        PipelineCheckpoint("place").save_to_step(Holder({}), 0, interval=interval)
    assert isinstance(caught.value, ValueError)
    assert not Path("place").exists()


def test_the_quick_references_save_keeps_three() -> None:
    checkpointer = PipelineCheckpoint("place")
    for step in range(5):
        checkpointer.save(Holder({}), step=step)
    assert steps_of(checkpointer) == [4, 3, 2]


# --- metadata ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"epoch": 0, "done": False, "name": "", "loss": 0.0},
        {"__string__": "a", "__metadata__": {"b": [1, None]}, "step": 3, "state": "c", "fingerprint": "d"},
    ],
)
def test_metadata_come_back_as_they_are(metadata: dict[str, Any]) -> None:
    """Datarax drops an empty dict, and has keys of its own among the user's."""
    checkpointer = PipelineCheckpoint("place")
    state = {"__string__": 1, "__metadata__": {}, "taskckpt.fingerprint": 2, "": None}
    checkpointer.save(Holder(state), step=9, metadata=metadata)
    (info,) = checkpointer.checkpoint.checkpoints_sync()
    assert (info.metadata, info.step) == (metadata, 9)
    assert restored(checkpointer) == state


def test_the_one_name_of_ours_is_refused() -> None:
    with pytest.raises(UsageError, match=r"metadata may not have the name 'taskckpt\.fingerprint'"):
        PipelineCheckpoint("place").save(Holder({}), metadata={"taskckpt.fingerprint": "mine"})


def test_metadata_cost_no_payload() -> None:
    """Datarax reads everything to give the metadata."""
    checkpointer = PipelineCheckpoint("place")
    for step in range(3):
        checkpointer.save(Holder({"data": bytes(100_000)}), step=step, metadata={"epoch": step})
    read: list[str] = []
    with intercepted(lambda when, verb, keys: read.extend(keys) if verb in ("read", "stream") else None):
        other = PipelineCheckpoint("place")
        assert [one.metadata for one in other.checkpoint.checkpoints_sync()] == [
            {"epoch": 2},
            {"epoch": 1},
            {"epoch": 0},
        ]
        assert other.get_latest_step() == 2
        assert list(other.list_checkpoints()) == [0, 1, 2]
    assert read
    assert not [key for key in read if key.startswith("data/")]


# --- identity ----------------------------------------------------------------------------------

IDENTITY = {"sampler_repr": "IndexSampler(7)", "data_source_repr": "Range(10)", "shard_count": 4, "worker_count": 2}


@pytest.mark.parametrize("name", IDENTITY)
def test_a_field_of_the_identity_that_differs_is_an_error_that_shows_both(name: str) -> None:
    checkpointer = IteratorCheckpoint("place")
    checkpointer.save_to_directory(Holder({**IDENTITY, "position": 5}))
    holder = Holder({**IDENTITY, name: "another", "position": 0})
    with pytest.raises(IdentityMismatchError) as caught:
        checkpointer.restore(holder)
    assert f"{name} was {IDENTITY[name]!r} and is 'another'" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert (holder.sets, holder.state["position"]) == (0, 0)


def test_fields_of_the_identity_that_only_one_side_has_are_not_compared() -> None:
    checkpointer = IteratorCheckpoint("place")
    checkpointer.save_to_directory(Holder({"shard_count": 4, "shard_index": 0, "position": 5}))
    assert checkpointer.restore(Holder({"worker_count": 3, "shard_index": 1})).state["position"] == 5
    assert checkpointer.restore(Holder({"shard_count": np.int64(4)})).state["position"] == 5


def test_a_state_without_identity_is_put_in_without_asking_for_another() -> None:
    """Some loaders start their workers when they are asked for their state."""

    class Lazy(Torchlike):
        def state_dict(self) -> dict[str, Any]:
            raise AssertionError

    IteratorCheckpoint("place").save_to_directory(Torchlike())
    IteratorCheckpoint("place").restore(Lazy())


@pytest.mark.parametrize(("saved", "now"), [("a", "b"), ("a", None), (None, "b")])
def test_another_fingerprint_is_an_error_that_shows_both(saved: str | None, now: str | None) -> None:
    IteratorCheckpoint("place", fingerprint=saved).save_to_directory(Holder({"at": 1}), metadata={"user": 1})
    holder = Holder()
    checkpointer = IteratorCheckpoint("place", fingerprint=now)
    with pytest.raises(IdentityMismatchError, match=f"fingerprint was {saved!r} and is {now!r}"):
        checkpointer.restore(holder)
    assert holder.sets == 0
    checkpointer.fingerprint = saved
    assert restored(checkpointer) == {"at": 1}


def test_the_fingerprint_is_that_of_the_checkpoint_that_is_restored() -> None:
    first = IteratorCheckpoint("place", fingerprint="a")
    first.save_to_directory(Holder({"at": 1}), step=1, keep=None)
    first.fingerprint = "b"
    first.save_to_directory(Holder({"at": 2}), step=2, keep=None)
    assert restored(first, 2) == {"at": 2}
    with pytest.raises(IdentityMismatchError, match="fingerprint was 'a' and is 'b'"):
        restored(first, 1)
    assert restored(IteratorCheckpoint("place", fingerprint="a"), 1) == {"at": 1}


def test_long_identities_are_cut_in_the_error() -> None:
    checkpointer = IteratorCheckpoint("place")
    checkpointer.save_to_directory(Holder({"data_source_repr": "a" * 10_000}))
    with pytest.raises(IdentityMismatchError) as caught:
        checkpointer.restore(Holder({"data_source_repr": "b"}))
    assert len(str(caught.value)) < 700


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("iterator", "message"),
    [
        (object(), r"object has neither get_state\(\) nor state_dict\(\)"),
        ([1, 2], r"list has neither get_state.*Hint: Pass the iterator"),
        (iter([1]), r"list_iterator has neither get_state\(\)"),
        (Holder([1]), r"Holder.get_state\(\) gave no dict, but list"),
        (Holder(b"1"), "gave no dict, but bytes"),
        (Holder(None), "gave no dict, but NoneType"),
        (Holder({"rng": {"gen": np.random.default_rng()}}), r'state\["rng"\]\["gen"\] is a Generator'),
    ],
)
def test_what_has_no_state_that_would_come_back_is_refused_before_anything_is_written(
    background: bool, iterator: Any, message: str
) -> None:
    checkpointer = IteratorCheckpoint("place", async_checkpointing=background)
    with pytest.raises(UsageTypeError, match=message) as caught:
        checkpointer.save_to_directory(iterator)
    assert isinstance(caught.value, ValueError)
    assert not Path("place").exists()


def test_what_takes_no_state_is_refused_before_anything_is_read() -> None:
    class OneWay:
        def get_state(self):
            return {}

    with pytest.raises(UsageTypeError, match=r"OneWay has neither set_state\(\) nor load_state_dict\(\)") as caught:
        IteratorCheckpoint("place").restore(OneWay())  # type: ignore[type-var]
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "keep=0 must be at least 1"),
        ({"keep": 1.5}, "keep must be an int, not float"),
        ({"step": -1}, "step=-1 must be from 0"),
        ({"step": 1.5}, "step must be an int, not float"),
        ({"step": True}, "step must be an int, not bool"),
        ({"metadata": {"a": object()}}, r"metadata\['a'\] is of the type object"),
    ],
)
@pytest.mark.parametrize("background", [False, True])
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str, background: bool) -> None:
    with pytest.raises(UsageError, match=message):
        IteratorCheckpoint("place", async_checkpointing=background).save_to_directory(Holder({}), **arguments)
    assert not Path("place").exists()


def test_a_fingerprint_is_text() -> None:
    with pytest.raises(UsageTypeError, match="fingerprint must be a str, not int"):
        IteratorCheckpoint("place", fingerprint=7).save_to_directory(Holder({}))  # type: ignore[arg-type]


# --- the three outcomes ------------------------------------------------------------------------


def test_no_checkpoint_is_a_value_error_and_none() -> None:
    checkpointer = PipelineCheckpoint("place")
    assert checkpointer.get_latest_step() is None
    assert checkpointer.list_checkpoints() == {}
    assert not checkpointer.has_checkpoint()
    for restore in (checkpointer.restore, checkpointer.restore_latest, lambda one: checkpointer.restore(one, step=3)):
        with pytest.raises(StepNotFoundError, match="There is no checkpoint") as caught:
            restore(Holder())
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("kind", [UnavailableError, DeniedError])
def test_a_store_that_cannot_be_asked_is_neither_no_checkpoint_nor_a_value_error(kind: type[TaskckptError]) -> None:
    is_broken = False

    def broken(when: str, verb: str, keys: Sequence[str]) -> None:
        if is_broken and when == "before":
            raise kind("no answer")

    with instant_retries(), intercepted(broken):
        checkpointer = PipelineCheckpoint("place")
        checkpointer.save(Holder({"at": 1}), step=1)
        calls: list[Callable[[], object]] = [
            checkpointer.has_checkpoint,
            checkpointer.get_latest_step,
            checkpointer.list_checkpoints,
            lambda: checkpointer.restore_latest(Holder()),
            lambda: checkpointer.restore(Holder(), step=1),
            lambda: checkpointer.save(Holder({}), step=2),
        ]
        is_broken = True
        for call in calls:
            with pytest.raises(kind) as caught:
                call()
            assert not isinstance(caught.value, ValueError)
        is_broken = False
        assert restored(checkpointer) == {"at": 1}


def damage(uri: str) -> None:
    path = Path(uri)
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[: len(data) // 2])


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = PipelineCheckpoint("place")
    uris = [checkpointer.save(Holder({"at": step}), step=step) for step in (1, 2)]
    damage(uris[1])
    assert restored(PipelineCheckpoint("place")) == {"at": 1}
    assert "Passed over a damaged checkpoint" in caplog.text
    damage(uris[0])
    holder = Holder()
    with pytest.raises(CorruptCheckpointError) as caught:
        PipelineCheckpoint("place").restore_latest(holder)
    assert isinstance(caught.value, ValueError)
    assert holder.sets == 0
    assert PipelineCheckpoint("place").has_checkpoint()


def test_an_older_attempt_can_save_no_more_but_listing_takes_nothing_over() -> None:
    older = PipelineCheckpoint("place")
    older.save(Holder({"at": 1}), step=1)
    newer = PipelineCheckpoint("place")
    assert newer.get_latest_step() == 1
    assert newer.has_checkpoint()
    assert list(newer.list_checkpoints()) == [1]
    older.save(Holder({"at": 2}), step=2)
    newer.restore_latest(Holder())
    with pytest.raises(StaleAttemptError):
        older.save(Holder({"at": 3}), step=3)
    assert restored(newer) == {"at": 2}


KILLED = """
import itertools, os, sys
from taskckpt import PipelineCheckpoint
from taskckpt.testing import intercepted

class Squares:
    def __init__(self): self.done = 0
    def state_dict(self): return {"done": self.done}
    def load_state_dict(self, state): self.done = state["done"]

requests = itertools.count()
def hook(when, verb, keys):
    if str(next(requests)) == sys.argv[1]:
        os.kill(os.getpid(), 9)

with intercepted(hook):
    stream, checkpointer = Squares(), PipelineCheckpoint("place")
    if checkpointer.has_checkpoint():
        checkpointer.restore_latest(stream)
    while stream.done < 80:
        print(stream.done ** 2, flush=True)
        stream.done += 1
        checkpointer.save_to_directory(stream)
"""


def test_processes_killed_at_any_request_lose_nothing_that_was_saved() -> None:
    found: list[int] = []
    for at_request in (*range(1, 64, 9), None):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(at_request)], capture_output=True, text=True, check=False, timeout=18
        )
        assert done.returncode == (0 if at_request is None else -signal.SIGKILL), done.stderr
        printed = [int(line) for line in done.stdout.splitlines()]
        if printed[:1] == found[-1:]:
            printed = printed[1:]  # its save was under way when it was killed, and did not count yet
        found += printed
    assert found == [number**2 for number in range(80)]


# --- in the background, and places -------------------------------------------------------------


def test_a_background_save_is_of_the_state_as_it_was() -> None:
    state: dict[str, Any] = {"order": np.arange(100_000), "at": 1}
    with PipelineCheckpoint("place", async_checkpointing=True) as checkpointer:
        assert checkpointer.save(Holder(state), step=1) == checkpointer.checkpoint.remote_destination
        state["order"][:] = 0
        state["at"] = 2
    found = restored(PipelineCheckpoint("place"))
    assert found["at"] == 1
    assert (found["order"] == np.arange(100_000)).all()


def test_a_background_save_does_not_wait_for_the_store() -> None:
    gate = threading.Event()

    def slow(when: str, verb: str, keys: Sequence[str]) -> None:
        if verb in ("create", "write"):
            assert gate.wait(10)

    with intercepted(slow):
        checkpointer = PipelineCheckpoint("place", async_checkpointing=True)
        for step in (1, 2):
            checkpointer.save(Holder({"at": step}), step=step)
        assert not Path("place/log").exists() or not checkpointer.checkpoint.checkpoints_sync()
        gate.set()
        checkpointer.close()
        checkpointer.close()
    assert list(checkpointer.list_checkpoints()) == [1, 2]


def test_an_error_of_the_background_is_told_at_the_next_call() -> None:
    is_full = False

    def maybe_full(when: str, verb: str, keys: Sequence[str]) -> None:
        if is_full and when == "before" and verb == "create":
            raise StorageFullError("no")

    with intercepted(maybe_full):
        checkpointer = PipelineCheckpoint("place", async_checkpointing=True)
        checkpointer.save(Holder({"at": 1}), step=1)
        checkpointer.wait_until_finished()
        is_full = True
        checkpointer.save(Holder({"at": 2}), step=2)
        with pytest.raises(StorageFullError):
            checkpointer.wait_until_finished()
        is_full = False
        checkpointer.save(Holder({"at": 3}), step=3, keep=1)
        checkpointer.close()
    assert list(checkpointer.list_checkpoints()) == [3]


@pytest.mark.parametrize("base_dir", ["memory://iterators/a", "file:///{}/place", "{}/place", "place"])
def test_places(base_dir: str, tmp_path: Path) -> None:
    place = base_dir.format(str(tmp_path).lstrip("/") if base_dir.startswith("file") else tmp_path)
    stream = Shuffled()
    first = list(islice(stream, 4))
    PipelineCheckpoint(place).save(stream, step=4)
    assert first + list(PipelineCheckpoint(place).restore_latest(Shuffled())) == list(Shuffled())


def test_a_path_and_a_checkpoint_are_places_too() -> None:
    PipelineCheckpoint(Path("place")).save(Holder({"at": 1}))
    assert restored(PipelineCheckpoint(Checkpoint(Path("place")))) == {"at": 1}
    assert repr(PipelineCheckpoint(Path("place"))).startswith("PipelineCheckpoint('")


def test_on_s3(moto: S3Server, new_bucket: Callable[[S3Server], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Datarax makes a Path of every URL."""
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    place = f"s3://{new_bucket(moto)}/run/pipeline"
    expected = list(Shuffled(5))
    stream = Shuffled(5)
    for step in range(4):
        next(stream)
        uri = PipelineCheckpoint(place).save_to_step(stream, step, interval=3, keep=1)
    assert uri is not None
    assert uri.startswith(place)
    assert list(PipelineCheckpoint(place).restore_latest(Shuffled(5))) == expected[4:]
    assert not Path("s3:").exists()


# --- handlers ----------------------------------------------------------------------------------


class JsonHandler:
    """States as JSON, for whoever else reads the store."""

    def to_content(self, state: dict[str, Any]) -> bytes:
        return json.dumps(state).encode()

    def from_content(self, content: bytes) -> dict[str, Any]:
        return json.loads(content)


@pytest.mark.parametrize("background", [False, True])
def test_a_handler_decides_what_is_stored(background: bool) -> None:
    handler = JsonHandler()
    with PipelineCheckpoint("place", handler, background, fingerprint="a") as checkpointer:
        assert checkpointer.handler is handler
        checkpointer.save(Holder({"at": [1, (2, 3)]}), step=1, metadata={"b": 1})
    assert Checkpoint("place", read_only=True).load_bytes_sync() == b'{"at": [1, [2, 3]]}'
    assert restored(PipelineCheckpoint("place", handler, fingerprint="a")) == {"at": [1, [2, 3]]}


def test_the_default_handler_says_what_another_one_has_stored() -> None:
    PipelineCheckpoint("place", JsonHandler()).save(Holder({"at": 1}))
    with pytest.raises(UsageError, match=r"holds bytes, and no state.*Hint: Pass the handler="):
        PipelineCheckpoint("place").restore(Holder())


def test_a_handler_that_gives_no_dict_is_found_out() -> None:
    class Wrong(JsonHandler):
        def from_content(self, content):
            return [content]

    PipelineCheckpoint("place", JsonHandler()).save(Holder({"at": 1}))
    holder = Holder()
    with pytest.raises(UsageTypeError, match=r"from_content\(\) gave no dict, but list"):
        PipelineCheckpoint("place", Wrong()).restore(holder)
    assert holder.sets == 0


# --- with the loaders of others ----------------------------------------------------------------


@pytest.mark.timeout(90)  # the first import of torch on a slow disk
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_data_loader_resumes_in_the_middle_of_an_epoch() -> None:
    pytest.importorskip("torchdata", reason="NOT TESTED: pip install -r tests/requirements-torch.txt")
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> Any:
        return StatefulDataLoader(list(range(20)), batch_size=2, shuffle=False)

    saved = loader()
    batches = iter(saved)
    done = [next(batches).tolist() for _ in range(4)]
    PipelineCheckpoint("place").save(saved, step=4)
    resumed = PipelineCheckpoint("place").restore_latest(loader())
    assert done + [batch.tolist() for batch in resumed] == [batch.tolist() for batch in loader()]
