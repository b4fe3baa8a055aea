"""What ``iterate`` goes over: in which order, from where on, and what is refused."""

from __future__ import annotations

import gc
from collections import UserList
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskckpt._sources import shuffled
from taskckpt.errors import (
    IdentityMismatchError,
    UnsupportedFormatError,
    UsageError,
    UsageTypeError,
)
from tests.iterates import (
    TEN,
    Killed,
    WithState,
    WithStateDict,
    WithStatefulIterator,
    attempt,
    break_at_4,
    position_of,
    rest,
    stop_at,
)

# These look at positions alone. Who loads nothing is warned, as test_iterate.py tests.
pytestmark = pytest.mark.filterwarnings("ignore:The iterate .* and what was saved with it:taskckpt.TaskckptWarning")

# --- shuffles and epochs ---------------------------------------------------------------------------


def test_a_shuffle_is_the_same_for_ever():
    # Not only within this version of Python: what was saved by one is resumed by another.
    assert list(shuffled(10, 7, 0)) == [7, 8, 5, 1, 4, 6, 0, 9, 2, 3]
    assert list(shuffled(10, 7, 1)) == [5, 3, 8, 1, 6, 2, 7, 4, 0, 9]
    assert list(shuffled(10, -7, 0)) == [1, 9, 5, 8, 3, 2, 7, 4, 6, 0]


@given(st.integers(0, 200), st.integers(), st.integers(0, 5))
def test_a_shuffle_has_every_item_once(length, seed, epoch):
    assert sorted(shuffled(length, seed, epoch)) == list(range(length))


def test_a_shuffle_is_fair():
    firsts = [shuffled(4, seed, 0).index(0) for seed in range(4000)]
    for place in range(4):
        assert 900 < firsts.count(place) < 1100


def test_each_epoch_has_an_order_of_its_own():
    items = rest(shuffle=1, epochs=3)
    epochs = [tuple(items[start : start + 10]) for start in (0, 10, 20)]
    assert len(set(epochs)) == 3


def test_more_epochs_than_before_go_on():
    assert rest(epochs=1) == TEN
    assert rest(epochs=3) == TEN * 2
    assert rest(epochs=3) == []


@pytest.mark.parametrize("source", [TEN, dict.fromkeys(TEN)], ids=["sequence", "iterable"])
def test_fewer_epochs_than_were_begun_are_refused(source):
    for count, _ in enumerate(attempt().iterate(source, epochs=3)):
        if count == 24:
            break
    with pytest.raises(IdentityMismatchError, match=r"item 5 of epoch 2, counted from 0: that is beyond epochs=2"):
        rest(source, epochs=2)
    assert rest(source, epochs=3) == TEN[5:]


@pytest.mark.parametrize("epochs", [0, -1, True, 1.5, None])
def test_a_number_of_epochs_that_makes_no_sense(epochs):
    with pytest.raises(UsageError, match="epochs"):
        attempt().iterate(TEN, epochs=epochs)


def test_a_source_that_gives_nothing_the_second_time():
    once = iter(TEN)
    with pytest.raises(UsageError, match=r"gave nothing in epoch 1: it can be gone over only once"):
        rest(lambda: once, epochs=2)


# --- identity --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ((TEN, {}), ([*TEN, 10], {}), "length was 10, and is 11"),
        ((TEN, {}), (tuple(TEN), {}), "type was 'list', and is 'tuple'"),
        ((TEN, {}), (TEN, {"shuffle": 1}), "shuffle was None, and is 1"),
        ((TEN, {"shuffle": 1}), (TEN, {"shuffle": 2}), "shuffle was 1, and is 2"),
        ((TEN, {"fingerprint": "v1"}), (TEN, {"fingerprint": "v2"}), "fingerprint was 'v1', and is 'v2'"),
        ((TEN, {}), (TEN, {"fingerprint": ("v", 1)}), r"fingerprint was None, and is \('v', 1\)"),
        ((TEN, {}), (lambda: TEN, {}), "type was 'list', and is 'function'; length was 10, and is None"),
    ],
)
def test_another_source_is_told_apart_and_both_sides_are_shown(then, now, words):
    (source, options), (other, other_options) = then, now
    break_at_4(attempt().iterate(source, **options))
    with pytest.raises(IdentityMismatchError, match=words):
        rest(other, **other_options)
    assert len(rest(source, **options)) == 5 if not options.get("shuffle") else True


def test_no_state_is_set_before_identities_are_compared():
    break_at_4(attempt().iterate(WithState(10), fingerprint=1))
    source = WithState(10)
    with pytest.raises(IdentityMismatchError):
        rest(source, fingerprint=2)
    assert source.was_set == 0


def test_a_fingerprint_is_plain_and_kept_as_it_was():
    fingerprint = {"files": ["a", "b"]}
    it = attempt().iterate(TEN, fingerprint=fingerprint)
    fingerprint["files"].append("c")
    break_at_4(it)
    assert rest(fingerprint={"files": ["a", "b"]}) == [5, 6, 7, 8, 9]
    with pytest.raises(UsageTypeError, match="fingerprint"):
        attempt().iterate(TEN, fingerprint=np.arange(3))


def test_a_source_that_has_become_shorter():
    break_at_4(attempt().iterate(lambda: iter(TEN)))
    with pytest.raises(IdentityMismatchError, match=r"is at item 5 of epoch 0; its source has only 3 now"):
        rest(lambda: iter(range(3)))


def test_a_position_that_cannot_be_understood():
    cp = attempt()
    cp._positions.learn({"default": {"from": "the future"}})
    with pytest.raises(UnsupportedFormatError, match="'default' cannot be understood"):
        rest(cp=cp)


# --- sources ---------------------------------------------------------------------------------------


class GetItemOnly:
    def __getitem__(self, index):
        if index == 10:
            raise IndexError
        return index


class Frame:
    """As a frame of pandas: indexed by the names of columns, over which it iterates."""

    def keys(self):
        return list("abcdefghij")

    def __len__(self):
        return 3

    def __getitem__(self, key):
        return {"a": 1}[key]

    def __iter__(self):
        return iter(self.keys())


class Dataset:
    """Only what a map-style dataset of PyTorch has."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        assert type(index) is int
        return index


SOURCES: dict[str, Any] = {
    "list": lambda: TEN,
    "tuple": lambda: tuple(TEN),
    "range": lambda: range(10),
    "array": lambda: np.arange(10),
    "UserList": lambda: UserList(TEN),
    "dataset": Dataset,
    "dict": lambda: dict.fromkeys(TEN),
    "values": lambda: dict(enumerate(TEN)).values(),
    "getitem": GetItemOnly,
    "generator function": lambda: lambda: (item for item in TEN),
    "function of a list": lambda: lambda: TEN,
    "states": lambda: WithState(10),
    "function of states": lambda: lambda: WithState(10),
    "states of its iterator": lambda: WithStatefulIterator(10),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_each_kind_of_source_resumes_three_times(kind):
    seen = []
    for _ in range(3):
        with suppress(Killed):
            for count, item in enumerate(attempt().iterate(SOURCES[kind](), every=3, epochs=2)):
                if count == 4:
                    raise Killed
                seen.append(int(item))
    seen += map(int, rest(SOURCES[kind](), epochs=2))
    assert seen == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, *TEN]


def test_columns_of_a_frame():
    assert rest(Frame()) == list("abcdefghij")


def test_a_loader_goes_on_in_the_order_that_it_had_in_each_epoch():
    loader = WithStateDict(10)
    expected = [*loader, *loader, *loader]
    seen = []
    for count in (4, 7, 9, 3):
        for number, item in enumerate(attempt().iterate(WithStateDict(10), every=1, epochs=3)):
            seen.append(item)
            if number == count - 1:
                break
    seen += rest(WithStateDict(10), epochs=3)
    assert seen == expected


def test_a_loader_at_the_very_end_of_an_epoch():
    loader = WithStateDict(10)
    expected = [*loader, *loader]
    seen = []
    for number, item in enumerate(attempt().iterate(WithStateDict(10), epochs=2)):
        seen.append(item)
        if number == 9:
            break
    assert seen + rest(WithStateDict(10), epochs=2) == expected


def test_a_loader_with_more_epochs_than_before():
    loader = WithStateDict(10)
    expected = [*loader, *loader]
    assert rest(WithStateDict(10)) + rest(WithStateDict(10), epochs=2) == expected


def test_a_loader_after_an_error_in_the_same_process():
    loader = WithStateDict(10)
    expected = list(loader)
    cp, loader = attempt(), WithStateDict(10)
    seen: list[int] = []
    for fails_at in (3, 6, None):
        with suppress(Killed):
            for item in cp.iterate(loader):
                if len(seen) == fails_at:
                    raise Killed
                seen.append(item)
    assert seen == expected


def test_a_loop_goes_on_from_the_state_that_a_save_has_carried():
    cp, source = attempt(), WithState(10)
    it = cp.iterate(source)
    with suppress(Killed):
        for item in it:
            if item == 5:
                cp.save_sync(b"")
            if item == 8:
                raise Killed
    assert list(it) == [8, 9]
    assert source.pulled == 9 + 4  # from 6 on, and not from the beginning


def test_a_break_stores_the_state_as_it_is():
    break_at_4(attempt().iterate(WithState(10), every=100))
    source = WithState(10)
    assert rest(source) == [5, 6, 7, 8, 9]
    assert source.pulled == 5


def test_a_source_that_is_not_interrupted_is_never_set_back():
    source = WithState(10)
    assert rest(source, epochs=3) == TEN * 3
    assert source.was_set == 0


def test_a_state_that_was_set_is_not_changed_by_the_source():
    class Keeps(WithState):
        def set_state(self, state):
            super().set_state(state)
            self.state = state

        def __next__(self):
            if self.was_set:
                self.state["at"] = 99
            return super().__next__()

    stop_at(7, Keeps(10), every=3)
    it = attempt().iterate(Keeps(10))
    for fails_at in (7, 8):
        with suppress(Killed):
            for item in it:
                if item == fails_at:
                    raise Killed
    assert list(it) == [8, 9]


def test_states_are_copies():
    source = WithState(10)
    cp = attempt()
    for item in cp.iterate(source, every=100):
        if item == 3:
            cp._positions.snapshot()
            source.log.append("changed")
        if item == 4:
            position = position_of(cp)
            source.log.append("changed again")
            break
    assert position["state"] == {"at": 5, "log": ["changed"]}


def test_a_state_that_cannot_be_stored_is_refused_by_its_path():
    source = WithState(10)
    source.log.append(object())
    with pytest.raises(UsageTypeError, match=r"\['default'\]\['state'\]\['log'\]\[0\]|\[.default.\]"):
        rest(source)


def test_a_state_for_a_source_that_has_none():
    break_at_4(attempt().iterate(lambda: WithState(10)))
    with pytest.raises(IdentityMismatchError, match="this one has none"):
        rest(lambda: iter(TEN))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ((one for one in TEN), r"cannot resume a generator: it can be gone over only once.*a function that makes it"),
        (iter(TEN), "cannot resume a list_iterator: it can be gone over only once"),
        (map(str, TEN), "cannot resume a map: it can be gone over only once"),
        ("text", "does not go over the characters of a str"),
        (b"bytes", "does not go over the characters of a bytes"),
        ({1, 2}, "A set gives its items in another order"),
        (frozenset({1, 2}), "A set gives its items in another order"),
        (7, "cannot go over an int\\."),
        (None, "cannot go over a NoneType\\."),
    ],
)
def test_what_cannot_be_gone_over_a_second_time_is_refused_at_once(source, words):
    with pytest.raises(UsageTypeError, match=words):
        attempt().iterate(source)


def test_an_open_file_is_refused_and_the_hint_works(tmp_path):
    path = tmp_path / "lines"
    path.write_text("a\nb\nc\n")
    with path.open() as file, pytest.raises(UsageTypeError, match="can be gone over only once"):
        attempt().iterate(file)
    for line in attempt().iterate(path.open):
        assert line == "a\n"
        break
    gc.collect()
    for line in attempt().iterate(path.open):
        assert line == "b\n"
        break


def test_a_function_that_makes_nothing_of_use():
    with pytest.raises(UsageTypeError, match="makes an int, which has no items"):
        rest(lambda: 3)
    with pytest.raises(UsageTypeError, match="A set gives"):
        rest(lambda: {1})


@pytest.mark.parametrize("source", [dict.fromkeys(TEN), lambda: TEN, WithState(3)], ids=["dict", "function", "states"])
def test_only_sequences_are_shuffled(source):
    with pytest.raises(UsageError, match="shuffle= takes a sequence"):
        attempt().iterate(source, shuffle=1)


@pytest.mark.parametrize("seed", [True, 1.5, "1"])
def test_a_seed_is_an_int(seed):
    with pytest.raises(UsageTypeError, match="seed"):
        attempt().iterate(TEN, shuffle=seed)


def test_an_error_of_the_source_comes_out_as_it_is():
    def fails():
        yield from range(4)
        raise KeyError("of the source")

    with pytest.raises(KeyError, match="of the source"):
        for _ in attempt().iterate(fails, every=2):
            pass
    assert rest(lambda: iter(TEN)) == [4, 5, 6, 7, 8, 9]
