"""``iterate``: what is committed when, what a save carries, and how several loops get on."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import uuid
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskckpt import Checkpoint, EverySteps, StaleAttemptError, task
from taskckpt._positions import Positions
from taskckpt._sources import shuffled
from taskckpt.errors import (
    UnavailableError,
    UsageError,
    UsageTypeError,
)
from taskckpt.testing import instant_retries, intercepted
from tests.iterates import (
    TEN,
    Killed,
    WithState,
    WithStatefulIterator,
    attempt,
    break_at_4,
    loaded,
    position_of,
    rest,
    stop_at,
)

# Most of these look at positions alone. Who loads nothing is warned; that has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The iterate .* and what was saved with it:taskckpt.TaskckptWarning")

# --- commits ---------------------------------------------------------------------------------------


def test_every_so_many_items():
    for item in (0, 1, 3, 4, 6, 9):
        stop_at(item, every=3)
        assert rest(every=3)[0] == item // 3 * 3
        attempt().clear_sync()


@pytest.mark.parametrize("every", [3, "3", EverySteps(3), "3|1h"])
def test_every_in_all_its_forms(every):
    stop_at(7, every=every)
    assert rest(every=every) == [6, 7, 8, 9]


def test_every_so_much_time():
    stop_at(7, every="1h")
    assert rest(every="1h") == TEN
    attempt().clear_sync()
    with suppress(Killed):
        for item in attempt().iterate(TEN, every="0.001s"):
            threading.Event().wait(0.011)
            if item == 7:
                raise Killed
    assert rest() == [7, 8, 9]


@pytest.mark.parametrize("every", [0, -1, True, "often", 1.5, "0s"])
def test_an_every_that_makes_no_sense_is_refused_at_once(every):
    with pytest.raises(UsageError):
        attempt().iterate(TEN, every=every)


def test_the_end_is_remembered_until_it_is_cleared():
    assert rest(every=3) == TEN
    assert rest(every=3) == []
    assert rest() == []
    attempt().clear_sync()
    assert rest() == TEN


def test_without_every_a_loop_without_saves_resumes_too():
    break_at_4(attempt().iterate(TEN))
    assert rest() == [5, 6, 7, 8, 9]
    assert rest() == []
    assert attempt().load_sync() is None


def test_without_every_a_payload_and_its_position_stay_together():
    cp = attempt()
    for item in cp.iterate(TEN):
        if item == 2:
            cp.save_sync(b"after 2")
        if item == 5:
            break
    second = attempt()
    assert second.load_bytes_sync() == b"after 2"
    assert rest(cp=second) == [3, 4, 5, 6, 7, 8, 9]
    assert rest() == [3, 4, 5, 6, 7, 8, 9]  # the end came after the last save, so it was not committed
    third = attempt()
    break_at_4(third.iterate(TEN))
    third.save_sync(b"after 4")  # the save that goes with it
    assert rest() == [5, 6, 7, 8, 9]


def test_with_every_the_position_moves_on_without_the_payload():
    cp = attempt()
    for item in cp.iterate(TEN, every=4):
        if item == 2:
            cp.save_sync(b"after 2")
        if item == 5:
            break
    second = attempt()
    assert second.load_bytes_sync() == b"after 2"
    assert rest(cp=second, every=4) == [6, 7, 8, 9]
    assert attempt().load_bytes_sync() == b"after 2"
    assert rest() == []


def test_a_save_in_the_body_counts_its_item():
    cp = attempt()
    with suppress(Killed):
        for item in cp.iterate(TEN):
            if item == 5:
                cp.save_sync(b"", metadata={"item": item})
                raise Killed
    assert attempt().checkpoints_sync()[0].metadata == {"item": 5}
    assert rest() == [6, 7, 8, 9]


def test_a_save_beside_the_loop_counts_what_is_done():
    cp = attempt()
    with suppress(Killed):
        for item in cp.iterate(TEN):
            if item == 5:
                raise Killed
    cp.save_sync(b"in an except clause, say")
    assert rest() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("verb", ["save_sync", "save_state_sync", "save_later"])
def test_every_verb_that_saves_carries_positions(verb):
    cp = attempt()
    for item in cp.iterate(TEN):
        if item == 5:
            getattr(cp, verb)({} if "state" in verb else b"")
        if item == 7:
            break
    cp.wait()
    assert rest() == [6, 7, 8, 9]


def commits(cp):
    return len(list((Path(cp.remote_destination) / "log").glob("*.jsonl")))


def test_what_a_save_has_carried_is_not_committed_again():
    cp = attempt()
    cp.save_sync(b"")
    before = commits(cp)
    for item in cp.iterate(TEN, every=5):
        if item == 4:
            cp.save_sync(b"")
        if item == 7:
            cp.save_sync(b"")
            break
    assert commits(cp) == before + 2


def test_a_resumed_loop_that_does_nothing_commits_nothing():
    rest(every=2)
    cp = attempt()
    before = commits(cp)
    assert rest(cp=cp, every=2) == []
    assert commits(cp) <= before + 1  # its claim


class Requests:
    """Requests that create something can be held up, or fail."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Event()
        self.fails = False

    def hook(self, when, verb, _keys):
        if (when, verb) == ("before", "create"):
            self.arrived.set()
            assert self.gate.wait(15)
            if self.fails:
                raise UnavailableError("As wished.")


@pytest.fixture
def requests():
    requests = Requests()
    with intercepted(requests.hook), instant_retries():
        yield requests
    requests.gate.set()


def test_a_commit_waits_for_no_save_in_the_background(requests):
    cp = attempt()
    cp.load_sync()
    seen = []
    for item in cp.iterate(TEN, every=2):
        seen.append(item)
        if item == 1:
            requests.arrived.clear()
            requests.gate.clear()
            cp.save_later(b"after 1")
            assert requests.arrived.wait(15)
        if item == 6:  # three commits were due
            requests.gate.set()
            cp.wait()
            before = commits(cp)
        if item == 7:  # the one that is overdue was made when that was through
            assert commits(cp) == before + 1
            break
    assert seen == TEN[:8]
    assert rest() == [8, 9]


def test_an_error_of_the_background_comes_out_of_the_loop(requests):
    cp = attempt()
    cp.load_sync()
    seen = []

    def loop():
        for item in cp.iterate(TEN, every=2):
            seen.append(item)
            if item == 0:
                requests.fails = True
                cp.save_later(b"")
                cp._later.wait(None)
                requests.fails = False

    with pytest.raises(UnavailableError, match="As wished"):
        loop()
    assert seen == [0, 1]


@pytest.mark.parametrize("when", ["before the loop", "at its end"])
def test_a_loop_begins_and_ends_with_the_errors_of_the_background(requests, when):
    cp = attempt()
    cp.load_sync()
    cp._positions._left.clear()

    def save():
        requests.fails = True
        cp.save_later(b"")
        cp._later.wait(None)
        requests.fails = False

    seen = []

    def loop():
        for item in cp.iterate(TEN, every=100):
            seen.append(item)
            if item == 9:
                save()

    if when == "before the loop":
        save()
    with pytest.raises(UnavailableError, match="As wished"):
        loop()
    assert seen == ([] if when == "before the loop" else TEN)


def test_a_commit_that_fails_comes_out_of_the_loop_and_the_items_are_done(requests):
    it = attempt().iterate(TEN, every=4)
    seen = []

    def loop():
        for item in it:
            seen.append(item)
            requests.fails = item == 3

    with pytest.raises(UnavailableError, match="As wished"):
        loop()
    requests.fails = False
    assert seen == [0, 1, 2, 3]
    assert list(it) == [4, 5, 6, 7, 8, 9]


def test_a_commit_that_fails_at_the_end_is_made_by_the_next_loop(requests):
    it = attempt().iterate(TEN, every=100)

    def loop():
        for item in it:
            requests.fails = item == 9

    with pytest.raises(UnavailableError, match="As wished"):
        loop()
    requests.fails = False
    assert list(it) == []
    assert rest() == []


def test_a_commit_that_fails_at_a_break_is_told_to_the_log(requests, caplog):
    it = attempt().iterate(TEN, every=100)
    with caplog.at_level(logging.WARNING, "taskckpt"):
        for item in it:
            if item == 4:
                requests.fails = True
                break
    requests.fails = False
    assert "The position of the iterate 'default' was not committed" in caplog.text
    assert "CommitUnknownError: The store never told" in caplog.text
    assert list(it) == [5, 6, 7, 8, 9]  # in this process it is known all the same


def test_an_attempt_that_was_taken_over_stops_at_its_next_commit():
    seen = []

    def loop():
        for item in attempt().iterate(TEN, every=2):
            seen.append(item)
            if item == 4:
                attempt().load_sync()

    with pytest.raises(StaleAttemptError):
        loop()
    assert seen == [0, 1, 2, 3, 4, 5]
    assert rest() == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("last", [0, 4])
def test_a_loop_that_is_left_after_clear_leaves_nothing(last):
    cp = attempt()
    for item in cp.iterate(TEN, every=2):
        if item == last:
            cp.clear_sync()
            break
    assert rest() == TEN


def test_a_loop_that_was_cleared_begins_anew_in_the_same_process():
    cp = attempt()
    it = cp.iterate(TEN)
    for item in it:
        if item == 4:
            cp.clear_sync()
            break
    assert list(it) == TEN


@pytest.mark.parametrize("last", [0, 4, 9])
def test_a_loop_does_not_go_on_after_clear(last):
    cp, seen = attempt(), []

    def loop():
        for item in cp.iterate(TEN, every=100):
            seen.append(item)
            if item == last:
                cp.clear_sync()

    with pytest.raises(UsageError, match=r"clear.* while the iterate 'default' was running.*break.*begin it anew"):
        loop()
    assert seen == TEN[: last + 1]
    assert rest() == TEN


# --- a load in the body ----------------------------------------------------------------------------


def go_back(cp, verb):
    """To what was saved with item 3."""
    if verb == "rollback_sync":
        cp.rollback_sync(3)
    elif verb == "load":
        asyncio.run(cp.load(step=3))
    else:
        getattr(cp, verb)(step=3)


def saved_up_to_5(cp):
    """A loop that is in the body of item 7, with a save of each item up to 5."""
    for item in cp.iterate(TEN):
        if item <= 5:
            cp.save_state_sync({"seen": TEN[: item + 1]}, step=item)
        if item == 7:
            yield item


@pytest.mark.parametrize("verb", ["load_sync", "load", "load_state_sync", "rollback_sync"])
def test_no_save_goes_with_an_item_that_the_task_has_gone_back_from(verb):
    cp = attempt()

    def loop():
        for _ in saved_up_to_5(cp):
            go_back(cp, verb)
            cp.save_state_sync({"seen": [*TEN[:4], 7]})

    with pytest.raises(UsageError, match=r"went back .* while the iterate 'default' was running.*break"):
        loop()
    model = loaded(cp)["seen"]
    if verb == "rollback_sync":
        assert model + rest(cp=cp) == TEN
    else:
        assert model == TEN[:6]  # a load alone changes nothing in the store


@pytest.mark.parametrize("later", [False, True])
def test_no_item_comes_after_the_task_went_back(later):
    cp, seen = attempt(), []

    def loop():
        for item in cp.iterate(TEN):
            seen.append(item)
            cp.save_sync(b"", step=item)
            if item == 5:
                go_back(cp, "load_sync")
                if later:
                    with pytest.raises(UsageError, match="went back"):
                        cp.save_later(b"")

    with pytest.raises(UsageError, match="went back"):
        loop()
    assert seen == TEN[:6]


def test_a_loop_inside_one_that_does_not_go_on_saves_nothing():
    cp = attempt()
    for item in cp.iterate(TEN, name="outer"):
        cp.save_sync(b"", step=item)
        if item == 5:
            go_back(cp, "load_sync")
            for _ in cp.iterate(TEN, name="inner"):
                with pytest.raises(UsageError, match="while the iterate 'outer' was running"):
                    cp.save_sync(b"")
                break
            break
    assert rest(cp=cp, name="outer") == TEN[4:]


def test_an_asynchronous_loop_does_not_go_on_either():
    async def loop():
        cp = attempt()
        async for item in cp.iterate(AsyncSource()):
            await cp.save(b"", step=item)
            if item == 5:
                await cp.load(step=3)
            assert item < 6
        pytest.fail("It has gone on.")

    with pytest.raises(UsageError, match="went back"):
        asyncio.run(loop())


@pytest.mark.parametrize("every", [None, 1])
def test_who_leaves_the_loop_and_begins_it_anew_gets_what_belongs_to_what_was_loaded(every):
    cp, seen = attempt(), []
    it = cp.iterate(TEN, every=every)
    for item in it:
        seen.append(item)
        cp.save_state_sync({"seen": seen}, step=item)
        if item == 5:
            seen = loaded_at(cp, 3)
            break
    for item in it:
        seen.append(item)
        cp.save_state_sync({"seen": seen}, step=item, overwrite=True)
    assert seen == TEN
    assert loaded(attempt())["seen"] == TEN


def loaded_at(cp, step):
    state = cp.load_state_sync(step=step)
    assert state is not None
    return state["seen"]


def test_a_load_of_where_the_loop_stands_is_fine():
    cp = attempt()
    seen: list[int] = []
    for item in cp.iterate(TEN, epochs=2):
        if seen:
            assert loaded(cp)["seen"] == seen  # of the body before
        seen.append(item)
        cp.save_state_sync({"seen": seen})
        assert loaded(cp)["seen"] == seen  # of this body
    assert seen == TEN * 2
    assert rest(epochs=2) == []


def test_loops_of_other_threads_are_told_too():
    cp = attempt()
    there, here = threading.Barrier(2, timeout=15), threading.Barrier(2, timeout=15)
    errors = []

    def run():
        try:
            for item in cp.iterate(TEN, name="there"):
                if item == 4:
                    there.wait()
                    here.wait()
        except UsageError as error:
            errors.append(str(error))

    for item in cp.iterate(TEN, name="here"):
        if item == 0:
            cp.save_sync(b"")
            thread = threading.Thread(target=run)
            thread.start()
            there.wait()
            cp.load_sync()
            cp.save_sync(b"", metadata={"item": item})  # this one stands where it was
            here.wait()
            thread.join()
    assert len(errors) == 1
    assert "while the iterate 'there' was running" in errors[0]
    cp = attempt()
    assert rest(cp=cp, name="there") == TEN
    assert rest(cp=cp, name="here") == TEN[1:]


# --- what was not loaded ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("default::taskckpt.TaskckptWarning")
def test_who_does_not_load_what_was_saved_is_warned(recwarn):
    cp = attempt()
    for item in cp.iterate(TEN):
        if item == 4:
            cp.save_sync(b"")
            break
    cp = attempt()
    for _ in cp.iterate(TEN):
        break
    for _ in cp.iterate(TEN, name="default"):
        break
    assert len(recwarn) == 1
    warning = recwarn.pop()
    assert "'default' resumes at item 5 of epoch 0" in str(warning.message)
    assert "what was saved with it was not loaded" in str(warning.message)
    assert warning.filename == __file__
    asyncio.run(collect(TEN))
    assert recwarn.pop().filename == __file__
    cp = attempt()
    assert cp.load_bytes_sync() == b""
    assert rest(cp=cp) == TEN[5:]
    assert not rest(TEN, every=100)[5:]  # the effect lies elsewhere then
    assert rest(range(4), name="new", cp=attempt()) == [0, 1, 2, 3]
    assert not recwarn.list


@pytest.mark.filterwarnings("default::taskckpt.TaskckptWarning")
def test_nobody_is_warned_who_has_loaded_later_or_gets_no_more_items(recwarn):
    cp = attempt()
    for name in ("a", "b"):
        for item in cp.iterate(TEN, name=name):
            if item == 4:
                cp.save_sync(b"")
                break
    cp = attempt()
    break_at_4(cp.iterate(TEN, name="a", every=100))
    cp.load_sync()
    assert rest(cp=cp, name="b") == TEN[5:]
    cp.save_sync(b"")
    assert rest(name="b") == []
    assert not recwarn.list


@pytest.mark.filterwarnings("default::taskckpt.TaskckptWarning")
def test_nobody_is_warned_where_only_a_position_was_saved(recwarn):
    break_at_4(attempt().iterate(TEN))
    assert rest() == TEN[5:]
    assert not recwarn.list


# --- how many are left -----------------------------------------------------------------------------


def test_the_length_is_what_is_left():
    cp = attempt()
    it = cp.iterate(TEN, epochs=2)
    assert len(it) == 20
    for item in it:
        assert len(it) == 20 - item
        if item == 4:
            break
    assert len(it) == 15
    assert len(cp.iterate(dict.fromkeys(range(3)), name="other")) == 3
    assert [*it] == [*TEN[5:], *TEN]
    assert len(cp.iterate(TEN, epochs=2)) == 0


def test_what_has_no_length_says_so_as_others_do():
    it = attempt().iterate(lambda: iter(TEN))
    with pytest.raises(TypeError, match="is not known"):
        len(it)
    assert list(it) == TEN


def test_what_it_looks_like():
    assert repr(attempt().iterate(TEN, name="train", shuffle=7, epochs=2)) == (
        "iterate(list, name='train', length=10, shuffle=7, epochs=2)"
    )
    assert repr(attempt().iterate(lambda: TEN)) == "iterate(function, name='default', epochs=1)"


class Handlers:
    def __init__(self, call):
        self.call = call

    def method(self, number, frame):
        self.call()

    def any_arguments(self, *arguments):
        self.call()

    @classmethod
    def all(cls, call):
        handlers = cls(call)
        return {
            "function": lambda number, frame: call(),
            "method": handlers.method,
            "any arguments": handlers.any_arguments,
            "partial": functools.partial(lambda mine, number, frame: call(), "mine"),
        }


@pytest.fixture
def on_signal():
    before = signal.getsignal(signal.SIGUSR1)
    yield functools.partial(signal.signal, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_handler_between_any_two_lines_of_the_loop_counts_no_item_that_is_not_done(on_signal):
    cp = attempt()
    begun, counted = 0, []

    def look(number, frame):
        if cp._positions.are_known and cp._positions._running:
            position = position_of(cp)
            counted.append((begun, position["epoch"] * 10 + position["done"]))

    def interrupt(frame, _event, _argument):
        if frame.f_code.co_filename.endswith(("_loop.py", "_iterate.py", "_positions.py")):
            sys.settrace(None)
            signal.raise_signal(signal.SIGUSR1)
            sys.settrace(interrupt)
        return interrupt

    on_signal(look)
    it = cp.iterate(TEN, every=2)
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        for item in it:
            begun = item + 1
    finally:
        sys.settrace(before)
    assert {begun for begun, _ in counted} == set(range(11))
    for begun, done in counted:
        assert begun - 1 <= done <= begun


@pytest.mark.parametrize("kind", Handlers.all(None))
def test_a_signal_handler_that_saves_counts_no_item_in_whose_middle_it_is(on_signal, kind):
    cp = attempt()
    on_signal(Handlers.all(lambda: cp.save_sync(b""))[kind])
    with suppress(Killed):
        for item in cp.iterate(TEN):
            if item == 4:
                signal.raise_signal(signal.SIGUSR1)
                raise Killed
    assert rest() == TEN[4:]


def test_a_handler_that_is_called_by_the_body_counts_its_item():
    cp = attempt()

    def save(*_):
        cp.save_sync(b"")

    with suppress(Killed):
        for item in cp.iterate(TEN):
            if item == 4:
                save()
                raise Killed
    assert rest() == TEN[5:]


# --- exactly once ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:memory:taskckpt.TaskckptWarning")
@settings(max_examples=60)
@given(
    length=st.integers(0, 12),
    epochs=st.integers(1, 3),
    shuffle=st.none() | st.integers(-3, 3),
    every=st.integers(1, 5),
    kind=st.sampled_from(["sequence", "iterable", "function", "states", "states of its iterator"]),
    deaths=st.lists(st.integers(0, 12), max_size=6),
)
def test_killed_at_any_item_any_number_of_times(length, epochs, shuffle, every, kind, deaths):
    shuffle = shuffle if kind == "sequence" else None
    make: Any = {
        "sequence": lambda: list(range(length)),
        "iterable": lambda: dict.fromkeys(range(length)),
        "function": lambda: lambda: iter(range(length)),
        "states": lambda: WithState(length),
        "states of its iterator": lambda: WithStatefulIterator(length),
    }[kind]
    # The oracle: all items in order, and how many are committed.
    everything = [
        (epoch, item)
        for epoch in range(epochs)
        for item in (range(length) if shuffle is None else shuffled(length, shuffle, epoch))
    ]
    committed = 0
    place = f"memory://{uuid.uuid4().hex}"
    for survives in deaths:
        seen = 0
        with suppress(Killed):
            for item in Checkpoint(place).iterate(make(), every=every, shuffle=shuffle, epochs=epochs):
                assert item == everything[committed + seen][1]
                if seen == survives:
                    raise Killed
                seen += 1
        whole = committed + seen == len(everything)
        committed = len(everything) if whole else committed + seen // every * every
    left = list(Checkpoint(place).iterate(make(), shuffle=shuffle, epochs=epochs))
    assert left == [item for _, item in everything[committed:]]
    assert list(Checkpoint(place).iterate(make(), shuffle=shuffle, epochs=epochs)) == []


@pytest.mark.filterwarnings("ignore:memory:taskckpt.TaskckptWarning")
@settings(max_examples=60)
@given(data=st.data(), kind=st.sampled_from(["sequence", "states", "iterable"]))
def test_the_model_and_its_position_are_never_out_of_step(data, kind):
    place = f"memory://{uuid.uuid4().hex}"
    make: Any = {"sequence": lambda: TEN, "states": lambda: WithState(10), "iterable": lambda: dict.fromkeys(TEN)}[kind]
    Checkpoint(place).save_state_sync({"seen": []})
    for _ in range(4):
        cp = Checkpoint(place)
        model = loaded(cp)["seen"]
        with suppress(Killed):
            for item in cp.iterate(make(), epochs=2):
                model.append(item)
                match data.draw(st.sampled_from(["go on", "save", "save later", "break", "die", "load"])):
                    case "save":
                        cp.save_state_sync({"seen": model})
                    case "save later":
                        cp.save_later({"seen": model}, policy="queue")
                    case "break":
                        break
                    case "die":
                        raise Killed
                    case _:
                        pass
        cp.wait()
        if data.draw(st.booleans()):
            cp.save_state_sync({"seen": committed_part(cp, model)})
    cp = Checkpoint(place)
    model = loaded(cp)["seen"]
    model += list(cp.iterate(make(), epochs=2))
    assert model == TEN * 2


def committed_part(cp, model):
    """The items that count as done, as who rolls the model back to the last whole item does."""
    position = position_of(cp)
    return model[: position["epoch"] * 10 + position["done"]]


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "options"),
    [(range(10), {}), (TEN[1:], {}), (TEN, {"shuffle": 1}), (TEN, {"fingerprint": 1})],
    ids=["type", "length", "shuffle", "fingerprint"],
)
def test_two_unnamed_iterates_over_different_things_are_refused(first, options):
    cp = attempt()
    for _ in cp.iterate(first, **options):
        break
    with pytest.raises(UsageError, match=r"Two iterates.* have no name.*name='train'.*name='default'"):
        for _ in cp.iterate(TEN):
            pass


def test_two_unnamed_iterates_over_functions_are_refused_since_nobody_knows_what_they_make():
    cp = attempt()
    for _ in cp.iterate(lambda: TEN):
        break
    with pytest.raises(UsageError, match=r"Two iterates.* have no name"):
        next(iter(cp.iterate(lambda: TEN)))
    for _ in cp.iterate(lambda: TEN, name="default"):
        break
    assert rest(lambda: TEN, cp=cp, name="default") == TEN[2:]


def test_two_unnamed_iterates_at_the_same_time_are_refused():
    cp = attempt()
    for _ in cp.iterate(TEN):
        with pytest.raises(UsageError, match=r"Two iterates.* have no name"):
            next(iter(cp.iterate(TEN)))


def test_the_same_loop_written_once_more_goes_on():
    cp = attempt()
    for item in cp.iterate(TEN):
        if item == 4:
            break
    assert list(cp.iterate(list(TEN))) == TEN[5:]  # a retry further down, or the same cell again
    with pytest.raises(UsageError, match="has come to its end"):
        next(iter(cp.iterate(TEN)))


def test_who_names_the_default_means_it():
    cp = attempt()
    break_at_4(cp.iterate(TEN))
    assert list(cp.iterate(TEN, name="default")) == [5, 6, 7, 8, 9]


def test_the_same_loop_goes_on_where_it_was_left():
    cp, seen = attempt(), []
    for _ in range(3):
        for item in cp.iterate(TEN):
            seen.append(item)
            if item % 3 == 2:
                break
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_retry_by_hand_goes_on_where_it_failed():
    it, seen = attempt().iterate(TEN), []
    for fails_at in (2, 5, 7):
        with suppress(Killed):
            for item in it:
                if item == fails_at:
                    raise Killed
                seen.append(item)
    assert seen == TEN[:7]


def test_epochs_by_hand_are_refused_instead_of_giving_nothing():
    cp, rounds = attempt(), []

    def loop():
        for _ in range(3):
            rounds.append(list(cp.iterate(TEN)))  # noqa: PERF401 - what came before the error counts

    with pytest.raises(UsageError, match=r"has come to its end.*epochs=3"):
        loop()
    assert rounds == [TEN]


def test_a_retry_by_hand_that_loads_finds_the_end():
    cp, rounds = attempt(), []
    for _ in range(3):
        cp.load_sync()
        rounds.append(list(cp.iterate(TEN, every=3)))
    assert rounds == [TEN, [], []]


def test_names_keep_positions_apart_and_all_are_carried_on():
    for name in ("a", "b"):
        for item in attempt().iterate(TEN, every=100, name=name):
            if item == (3 if name == "a" else 6):
                break
    assert rest(name="c") == TEN
    assert rest(name="a") == [4, 5, 6, 7, 8, 9]
    assert rest(name="b") == [7, 8, 9]
    assert rest(name="a") == []


@pytest.mark.parametrize("name", ["", 3, b"a"])
def test_a_name_is_a_text(name):
    with pytest.raises(UsageTypeError, match="name="):
        attempt().iterate(TEN, name=name)


def test_one_name_cannot_run_twice_at_a_time():
    cp = attempt()
    first = iter(cp.iterate(TEN, name="a"))
    assert next(first) == 0
    with pytest.raises(UsageError, match="'a' is running already"):
        next(iter(cp.iterate(TEN, name="a")))
    assert next(first) == 1
    first.close()
    assert next(iter(cp.iterate(TEN, name="a"))) == 1


def test_a_loop_inside_a_loop():
    cp = attempt()
    with suppress(Killed):
        for outer in cp.iterate(["w", "x", "y"], name="outer"):
            for inner in cp.iterate(TEN, name=f"inner of {outer}"):
                if (outer, inner) == ("x", 4):
                    cp.save_sync(b"")  # that outer one is not done
                    raise Killed
    again, seen = attempt(), []
    for outer in again.iterate(["w", "x", "y"], name="outer"):
        seen += [(outer, inner) for inner in again.iterate(TEN, name=f"inner of {outer}")]
    assert seen == [("x", inner) for inner in range(5, 10)] + [("y", inner) for inner in TEN]


def nested(cp, dies_at=None, *, saves=False):
    """What comes of one loop in another, up to where it dies."""
    seen = []
    with suppress(Killed):
        for outer in cp.iterate(list("wxyz"), name="outer"):
            for inner in cp.iterate(TEN, name="inner"):
                seen.append((outer, inner))
                if (outer, inner) == dies_at:
                    if saves:
                        cp.save_sync(b"")
                    raise Killed
    return seen


def test_an_inner_loop_begins_anew_in_each_item_of_the_outer_one():
    assert len(nested(attempt())) == 40


@pytest.mark.parametrize("inner_item", [0, 4, 9])
def test_an_inner_loop_resumes_in_the_middle_of_the_right_item(inner_item):
    everything = [(outer, inner) for outer in "wxyz" for inner in TEN]
    there = everything.index(("x", inner_item))
    cp = attempt()
    assert nested(cp, dies_at=("x", inner_item), saves=True) == everything[: there + 1]
    second = attempt()
    assert nested(second, dies_at=("y", 3)) == everything[there + 1 : 24]
    assert nested(attempt()) == everything[there + 1 :]


def test_an_inner_loop_that_was_left_is_not_gone_on_with_in_the_next_item():
    cp, seen = attempt(), []
    for outer in cp.iterate(["x", "y"], name="outer"):
        for inner in cp.iterate(TEN[outer == "y" :], name="inner", every=1):  # of another length, too
            seen.append((outer, inner))
            if inner == 1:
                break
    assert seen == [("x", 0), ("x", 1), ("y", 1)]


def test_inner_loops_without_items_are_no_loop_over_nothing():
    cp = attempt()
    for outer in cp.iterate(TEN, name="outer"):
        assert list(cp.iterate(TEN[: outer % 2], name="inner")) == TEN[: outer % 2]


def test_three_loops_inside_each_other():
    everything = list(itertools.product("ab", "c", TEN))

    def run(cp, last=-1):
        seen = []
        with suppress(Killed):
            for a in cp.iterate(["a", "b"], name="1"):
                for b in cp.iterate(["c"], name="2"):  # has one item: where it stands is the same in both
                    for c in cp.iterate(TEN, name="3"):
                        seen.append((a, b, c))
                        if len(seen) == last:
                            cp.save_sync(b"")
                            raise Killed
        return seen

    assert run(attempt(), 14) == everything[:14]
    assert run(attempt(), 3) == everything[14:17]
    assert run(attempt()) == everything[17:]


def test_a_loop_that_goes_in_step_with_one_that_was_begun_before_resumes():
    cp = attempt()
    left = iter(cp.iterate(TEN, name="left"))
    next(left)
    with suppress(Killed):
        for right in cp.iterate(TEN, name="right"):
            next(left)
            if right == 4:
                cp.save_sync(b"")
                raise Killed
    again = attempt()
    left = iter(again.iterate(TEN, name="left"))
    assert next(left) == 6
    assert rest(cp=again, name="right") == TEN[5:]


def test_a_load_in_the_inner_body_is_seen_by_both_loops():
    cp = attempt()
    for outer in cp.iterate(list("wxyz"), name="outer"):
        for inner in cp.iterate(TEN, name="inner"):
            if inner == 4:
                cp.save_sync(b"", step="wxyz".index(outer))
                if outer == "y":
                    cp.load_sync(step=0)
                    with pytest.raises(UsageError, match="went back"):
                        cp.save_sync(b"")
                    break
        if outer == "y":
            break
    assert nested(cp)[:6] == [*(("w", item) for item in TEN[5:]), ("x", 0)]


def test_a_save_after_the_inner_loop_counts_the_outer_item():
    cp = attempt()
    for outer in cp.iterate(TEN, name="outer"):
        for inner in cp.iterate(TEN, name=f"inner of {outer}"):
            if inner == 3:
                break
        if outer == 2:
            cp.save_sync(b"")
            break
    assert rest(name="outer") == TEN[3:]
    assert rest(name="inner of 2") == TEN[4:]


def test_commits_of_an_inner_loop_do_not_count_the_outer_item():
    cp = attempt()
    with suppress(Killed):
        for outer in cp.iterate(TEN, name="outer"):
            for inner in cp.iterate(TEN, name=f"inner of {outer}", every=2):
                if (outer, inner) == (2, 5):
                    raise Killed
    assert rest(name="outer") == TEN[2:]
    assert rest(name="inner of 2") == TEN[4:]


def test_loops_in_step_count_both():
    cp = attempt()
    with suppress(Killed):
        for left, _ in zip(cp.iterate(TEN, name="left"), cp.iterate(range(10), name="right"), strict=True):
            if left == 4:
                cp.save_sync(b"")
                raise Killed
    assert rest(name="left") == TEN[5:]
    assert rest(range(10), name="right") == TEN[5:]


def test_loops_in_step_by_hand_count_both():
    cp = attempt()
    right = iter(cp.iterate(TEN, name="right"))
    with suppress(Killed):
        for left in cp.iterate(TEN, name="left"):
            next(right)
            if left == 4:
                cp.save_sync(b"")
                raise Killed
    assert rest(name="left") == TEN[5:]
    assert rest(name="right") == TEN[5:]


def test_a_body_that_saves_in_another_function_or_generator():
    cp = attempt()

    def items():
        yield from cp.iterate(TEN)

    with suppress(Killed):
        for item in items():
            if item == 4:
                cp.save_sync(b"")
                raise Killed
    assert rest() == TEN[5:]


# --- threads and processes -------------------------------------------------------------------------


def test_two_threads():
    cp = attempt()
    barrier = threading.Barrier(2, timeout=15)
    errors = []

    def run(name, saves):
        try:
            for item in cp.iterate(TEN, name=name):
                barrier.wait()
                if item == 4:
                    if saves:
                        cp.save_sync(b"")
                    barrier.wait()
                    raise Killed  # noqa: TRY301
        except Killed:
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=args) for args in (("a", True), ("b", False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert rest(name="a") == TEN[5:]  # its body has saved
    assert rest(name="b") == TEN[4:]  # its body was in the middle of something


def test_many_threads_with_many_commits():
    cp = attempt()
    errors = []

    def run(name):
        try:
            for item in cp.iterate(WithState(10), name=name, every=1):
                if item == 6:
                    break
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(str(number),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    last = attempt()
    for number in range(6):
        assert list(last.iterate(WithState(10), name=str(number))) == [7, 8, 9]


def test_a_save_carries_where_all_loops_are_when_it_is_called():
    cp = attempt()
    items = iter(cp.iterate(TEN))
    next(items)
    looks: list[Any] = [cp._positions.snapshot()]
    thread = threading.Thread(target=lambda: looks.append(cp._positions.snapshot()))
    thread.start()
    thread.join()
    next(items)
    next(items)
    here, elsewhere = (look["default"]["done"] for look in looks)
    assert here == 1
    assert elsewhere == 0  # what is done later may be missing in what is saved


def test_what_the_store_has_is_learnt_once():
    positions = Positions()
    positions.learn({"a": {"done": 1}})
    positions.learn({"a": {"done": 2}})  # by another thread, which was slower
    assert positions.snapshot() == {"a": {"done": 1}}


def test_a_forked_child_counts_on_its_own():
    cp = attempt()
    with suppress(Killed):
        for item in cp.iterate(TEN, every=100):
            if item == 4:
                child = os.fork()
                if not child:
                    cp.save_sync(b"by the child, in the body")
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
                raise Killed
    assert rest() == TEN[5:]


def test_a_pickled_checkpoint_takes_positions_along():
    cp = attempt()
    for item in cp.iterate(TEN):
        if item == 4:
            other = pickle.loads(pickle.dumps(cp))
            copied = copy.deepcopy(cp)
            break
    assert position_of(other)["done"] == 5
    assert position_of(copied) == position_of(other)
    assert pickle.loads(pickle.dumps(Positions())).snapshot() is None


WORKER = """
import sys
from taskckpt import Checkpoint
cp = Checkpoint("task")
for item in cp.iterate(range(1000), every=7):
    print(item, flush=True)
"""


def test_processes_that_are_killed():
    seen = []
    for kill_after in (3, 20, 60, 1, 100, None):
        with subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = itertools.islice(iter(process.stdout.readline, ""), kill_after)
            items = [int(line) for line in lines]
            if kill_after is not None:
                process.kill()
                items += [int(line) for line in process.stdout.read().splitlines()]
        seen.append(items)
    assert seen[0][0] == 0
    for before, after in itertools.pairwise(seen):
        assert before[-1] - 7 <= after[0] <= before[-1] + 1  # at most seven come again
        assert after[0] % 7 == 0
        assert after == list(range(after[0], after[-1] + 1))
    assert seen[-1][-1] == 999


# --- tasks and views -------------------------------------------------------------------------------


def test_in_a_task_that_is_retried():
    import taskckpt

    seen: list[int] = []

    @task(retries=3, wait_initial_s=0, key="iterates")
    def work():
        context = taskckpt.ctx()
        assert context is not None
        for item in context.checkpoint.iterate(TEN, every=1):
            seen.append(item)
            if item in (3, 7) and seen.count(item) == 1:
                raise OSError("once")

    work()
    assert seen == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9]


def test_a_loop_cannot_outlive_its_task():
    import taskckpt

    @task(key="iterates")
    def work():
        context = taskckpt.ctx()
        assert context is not None
        items = iter(context.checkpoint.iterate(TEN, every=2))
        return next(items), items

    first, items = work()
    assert first == 0
    with pytest.raises(StaleAttemptError, match="has ended"):
        list(items)


def test_a_view_cannot_iterate():
    rest()
    with pytest.raises(UsageError, match="read-only"):
        rest(cp=Checkpoint("task", read_only=True))


def test_a_load_of_an_earlier_step_goes_back_with_its_position():
    cp = attempt()
    for item in cp.iterate(TEN):
        cp.save_sync(str(item).encode(), step=item)
    second = attempt()
    assert second.load_sync(step=7) is not None
    assert rest(cp=second) == [8, 9]


def test_a_rollback_goes_back_with_its_position_and_a_pin_does_not():
    cp = attempt()
    it = cp.iterate(TEN)
    for item in it:
        cp.save_sync(b"", step=item)
        if item == 6:
            break
    for item in it:
        if item == 8:
            break
    cp.pin_sync(6)
    cp.save_sync(b"", step=8)
    assert rest(cp=attempt()) == [9]
    cp = attempt()
    cp.rollback_sync(5)
    assert rest(cp=cp) == [6, 7, 8, 9]


# --- asyncio ---------------------------------------------------------------------------------------


class AsyncSource:
    def __init__(self, length=10):
        self.length = length

    async def __aiter__(self):
        for item in range(self.length):
            await asyncio.sleep(0)
            yield item


class AsyncWithState:
    def __init__(self):
        self.at = 0

    def __aiter__(self):
        self.at = 0
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        if self.at == 10:
            raise StopAsyncIteration
        self.at += 1
        return self.at - 1

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


async def ten():
    for item in TEN:
        yield item


@pytest.mark.parametrize(
    "make",
    [lambda: TEN, lambda: dict.fromkeys(TEN), AsyncSource, AsyncWithState, lambda: ten, lambda: WithState(10)],
    ids=["list", "iterable", "async iterable", "async states", "async function", "states"],
)
def test_async_for(make):
    async def some(stop_after):
        seen: list[int] = []
        with suppress(Killed):
            async for item in attempt().iterate(make(), every=2, epochs=2):
                if len(seen) == stop_after:
                    raise Killed
                seen.append(item)
        return seen

    assert asyncio.run(some(5)) == TEN[:5]
    assert asyncio.run(some(3)) == TEN[4:7]
    assert asyncio.run(some(99)) == TEN[6:] + TEN
    assert asyncio.run(some(99)) == []


def test_an_asynchronous_source_needs_an_asynchronous_loop():
    with pytest.raises(UsageTypeError, match="async for"):
        rest(AsyncSource())
    with pytest.raises(UsageTypeError, match=r"an async_generator: it can be gone over only once"):
        attempt().iterate(ten())


def test_saves_in_the_body_of_an_asynchronous_loop():
    async def first():
        cp = attempt()
        with suppress(Killed):
            async for item in cp.iterate(AsyncSource()):
                if item == 2:
                    await cp.save(b"")
                if item == 5:
                    await asyncio.to_thread(cp.save_sync, b"")
                    raise Killed

    asyncio.run(first())
    assert asyncio.run(collect(AsyncSource())) == TEN[6:]


async def collect(source, **options):
    return [item async for item in attempt().iterate(source, **options)]


def test_two_tasks_of_one_event_loop():
    cp = attempt()

    async def run(name, saves):
        async for item in cp.iterate(AsyncSource(), name=name):
            if item == 4:
                if saves:
                    await cp.save(b"")
                raise Killed
            await asyncio.sleep(0)

    async def both():
        other = asyncio.create_task(run("b", saves=False))
        with suppress(Killed):
            await run("a", saves=True)
        with suppress(Killed, asyncio.CancelledError):
            other.cancel()
            await other

    with suppress(Killed):
        asyncio.run(both())
    assert asyncio.run(collect(AsyncSource(), name="a")) == TEN[5:]
    left = asyncio.run(collect(AsyncSource(), name="b"))
    assert left[-1:] == [9]
    assert left[0] <= 4


def test_a_source_of_both_kinds_is_gone_over_as_the_loop_is():
    class Both(AsyncSource):
        def __iter__(self):
            return iter("sync")

    assert asyncio.run(collect(Both(), name="async")) == TEN
    assert rest(Both(), name="sync") == list("sync")


def test_an_asynchronous_loop_that_has_ended_stays_so():
    async def main():
        items = aiter(attempt().iterate(AsyncSource(2)))
        assert [await anext(items), await anext(items)] == [0, 1]
        for _ in range(3):
            with pytest.raises(StopAsyncIteration):
                await anext(items)

    asyncio.run(main())
    assert asyncio.run(collect(AsyncSource(2))) == []


def test_an_asynchronous_loop_whose_source_has_failed_is_over():
    class Fails(AsyncSource):
        fails = "at once"

        def __aiter__(self):
            if self.fails == "at once":
                raise KeyError(self.fails)
            return self.items()

        async def items(self):
            yield 0
            if self.fails:
                raise KeyError(self.fails)
            yield 1

    async def main():
        source = Fails()
        it = attempt().iterate(source)
        with pytest.raises(KeyError, match="at once") as held:
            await anext(aiter(it))
        source.fails = "later"
        items = aiter(it)  # it is not still running
        assert await anext(items) == 0
        with pytest.raises(KeyError, match="later"):
            await anext(items)
        with pytest.raises(StopAsyncIteration):
            await anext(items)
        source.fails = ""
        assert [item async for item in it] == [1]
        return held

    asyncio.run(main())


def test_commits_do_not_block_the_event_loop(requests):
    async def main():
        async def loop():
            async for _ in attempt().iterate(AsyncSource(), every=5):
                requests.arrived.clear()
                requests.gate.clear()  # the next commit will hang

        looping = asyncio.create_task(loop())
        await asyncio.to_thread(requests.arrived.wait, 15)
        await asyncio.sleep(0.01)
        await asyncio.to_thread(requests.arrived.wait, 15)
        assert not looping.done()
        requests.gate.set()
        looping.cancel()
        with suppress(asyncio.CancelledError):
            await looping

    asyncio.run(main())


# --- memory and time -------------------------------------------------------------------------------


def test_nobody_but_the_body_holds_an_item():
    class Item:
        pass

    def items():
        for _ in range(3):
            yield Item()

    for item in attempt().iterate(items):
        reference = weakref.ref(item)
        del item
        gc.collect()
        assert reference() is None


def test_a_loop_that_was_left_lets_go_of_its_source():
    source = WithState(10)
    reference = weakref.ref(source)
    cp = attempt()
    for item in cp.iterate(source):
        if item == 4:
            break
    del source
    gc.collect()
    assert reference() is None
