"""Loops of ``iterate`` beside and inside each other, threads, signals: no item counts that may not be done."""

from __future__ import annotations

import contextvars
import functools
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from taskckpt import Checkpoint
from taskckpt._operation import Stop
from taskckpt.errors import IdentityMismatchError, UsageTypeError
from taskckpt.testing import intercepted
from tests.iterates import TEN, Killed, WithState, attempt, loaded, rest

# --- killed ----------------------------------------------------------------------------------------

BEGINNING = """
import os, signal
from taskckpt import Checkpoint

cp = Checkpoint("task")
def body(item, dies):
    if item == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    print(item, flush=True)
"""


def lines_of(program: str, dies: object) -> list[str]:
    """What bodies have done in a process, until it killed itself if it was to."""
    done = subprocess.run(
        [sys.executable, "-c", f"{BEGINNING}\ndies = {dies!r}\n{program}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if dies is None else -signal.SIGKILL), done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("every", [None, 1])
@pytest.mark.parametrize("kind", ["", "async "])
def test_an_inner_loop_without_items_does_not_count_the_item_around(every, kind):
    program = f"""
import asyncio
async def main():
    {kind}for outer in cp.iterate(range(4), name="outer"):
        {kind}for inner in cp.iterate(lambda: [] if outer == 2 else [1, 2], name=f"inner of {{outer}}", every={every}):
            pass
        body(outer, dies)
asyncio.run(main())
"""
    assert lines_of(program, 2) == ["0", "1"]
    assert lines_of(program, None) == ["2", "3"]


@pytest.mark.parametrize(
    ("left", "right", "first"),
    [(None, 1, 4), (1, None, 3), (1, 1, 4), (2, 3, 3), (3, 2, 4), (2, None, 3), (None, 2, 4)],
)
def test_a_zip_that_is_killed_goes_on_in_step(left, right, first):
    program = f"""
for a, b in zip(cp.iterate(range(10), name="a", every={left}), cp.iterate(range(10), name="b", every={right})):
    assert a == b
    body(a, dies)
"""
    assert lines_of(program, 4) == ["0", "1", "2", "3"]
    # Where only the left one commits, the last pair comes again: of the right item nobody knew yet that it was done.
    assert lines_of(program, None) == [str(item) for item in range(first, 10)]


# --- in step ---------------------------------------------------------------------------------------


def test_the_end_of_one_loop_does_not_count_the_item_of_another():
    cp = attempt()
    pairs = list(zip(cp.iterate(range(6), name="a"), cp.iterate(range(3), name="b"), strict=False))
    assert pairs == [(0, 0), (1, 1), (2, 2)]
    assert rest(range(6), name="a") == [3, 4, 5]
    assert rest(range(3), name="b") == []


def stopped_zip(*, of_state: bool, every: int):
    """In the body of the fifth pair, without another word; and what the next attempt gets."""
    make = WithState if of_state else range

    def pairs(cp):
        left, right = cp.iterate(make(10), name="left", every=every), cp.iterate(make(10), name="right")
        return zip(left, right, strict=True)

    attempt().clear_sync()
    with suppress(Killed):
        for a, _ in pairs(attempt()):
            if a == 4:
                raise Killed
    again = attempt()
    return again._attempt.find_positions(Stop())["left"], list(pairs(again))


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_sources_with_states_go_on_in_step(every):
    position, resumed = stopped_zip(of_state=True, every=every)
    assert resumed == stopped_zip(of_state=False, every=every)[1]
    done = 4 // every * every - 1
    assert resumed[0] == (done, done)
    assert position["state_after"] == max(0, done + 1 - every)  # that of the commit before


def test_an_item_that_was_fetched_before_it_is_needed_is_not_lost():
    def run(cp, stop):
        lines, labels = iter(cp.iterate(TEN, name="lines", every=1)), iter(cp.iterate(TEN, name="labels"))
        line, done = next(lines), []
        for label in labels:
            following = next(lines, None)
            if label == stop:
                raise Killed
            done.append((line, label, following))
            line = following
        return done

    with suppress(Killed):
        run(attempt(), 4)
    assert run(attempt(), None)[0] in {(3, 3, 4), (4, 4, 5)}


def test_a_break_counts_both():
    cp = attempt()
    for a, _ in zip(cp.iterate(TEN, name="a"), cp.iterate(range(10), name="b"), strict=True):
        if a == 4:
            break
    assert rest(name="a") == rest(range(10), name="b") == TEN[5:]


# --- saves that take their time --------------------------------------------------------------------


def test_what_is_saved_in_the_background_has_the_positions_of_its_call():
    cp = attempt()
    done = threading.Event()

    def slow(when, verb, _keys):
        if (when, verb) == ("before", "write") and not done.wait(timeout=20):
            raise AssertionError

    with intercepted(slow), suppress(Killed):
        model = []
        for epoch in cp.iterate(range(3), name="epoch"):
            for item in cp.iterate(range(8), name=f"of epoch {epoch}"):
                if (epoch, item) == (1, 5):
                    done.set()
                    cp.wait()
                    raise Killed
                model.append([epoch, item])
            cp.save_later({"model": model})
    again = attempt()
    assert loaded(again)["model"] == [[0, item] for item in range(8)]
    assert next(iter(again.iterate(range(3), name="epoch"))) == 1
    assert next(iter(again.iterate(range(8), name="of epoch 1"))) == 0


class SlowState(WithState):
    """Its state is asked for by a thread, which then takes a while."""

    def __init__(self):
        super().__init__(10)
        self.is_asked, self.may_answer = threading.Event(), threading.Event()

    def get_state(self):
        if threading.current_thread() is not threading.main_thread():
            self.is_asked.set()
            assert self.may_answer.wait(timeout=20)
        return dict(super().get_state())


def test_a_thread_of_the_body_that_is_left_behind_counts_its_own_item():
    cp, source = attempt(), SlowState()
    context, thread = None, None
    for item in cp.iterate(source):
        if item == 3:
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(cp.save_state_sync, {"after": 3}))
            thread.start()
            assert source.is_asked.wait(timeout=20)
        if item == 6:
            assert thread is not None
            source.may_answer.set()
            thread.join()
            break
    again = attempt()
    assert loaded(again) == {"after": 3}
    assert list(again.iterate(SlowState())) == TEN[4:]


def rest_after_load():
    again = attempt()
    assert again.load_sync() is not None
    return rest(cp=again)


# --- signals ---------------------------------------------------------------------------------------


def rebinding(save, signum, frame):
    signum = frame = None
    save(signum, frame)


def deleting(save, signum, frame):
    del signum, frame
    save()


def renaming(save, signum, frame):
    signum = signal.Signals(signum).name
    save(signum)


def vanishing(save, signum, frame):
    signal.signal(signum, signal.SIG_IGN)
    del signum, frame
    save()


def deleting_any(save, *arguments):
    del arguments
    save()


class Handler:
    def __init__(self, save):
        self.save = save

    def __call__(self, signum, frame):
        del signum, frame
        self.save()

    def method(self, signum, frame):
        del signum, frame
        self.save()


HANDLERS: dict[str, Callable[..., Any]] = {
    **{one.__name__: functools.partial(functools.partial, one) for one in
       (rebinding, deleting, renaming, vanishing, deleting_any)},
    "object": Handler,
    "method": lambda save: Handler(save).method,
}  # fmt: skip


@pytest.fixture
def on_signal():
    before = signal.getsignal(signal.SIGUSR1)
    yield functools.partial(signal.signal, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("kind", HANDLERS)
def test_a_handler_that_rebinds_its_arguments_counts_no_item_in_whose_middle_it_is(on_signal, kind):
    cp = attempt()
    on_signal(HANDLERS[kind](lambda *_: cp.save_sync(b"")))
    with suppress(Killed):
        for item in cp.iterate(TEN):
            if item == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
                raise Killed
    assert rest_after_load() == TEN[4:]


def test_a_handler_that_the_body_calls_itself_counts_its_item(on_signal):
    cp = attempt()

    def save(signum=None, frame=None):
        saved = signum, frame
        cp.save_state_sync({"saved": repr(saved)})

    on_signal(save)
    with suppress(Killed):
        for item in cp.iterate(TEN):
            if item == 4:
                save()
                raise Killed
    assert rest_after_load() == TEN[5:]


# --- sources that change ---------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [None, 7])
def test_a_list_that_gets_longer_is_not_complete(shuffle):
    items = [0, 1, 2, 3]

    def run():
        for item in attempt().iterate(items, shuffle=shuffle, every=1):
            items[4:] = [99] * (item > 0)

    with pytest.raises(IdentityMismatchError, match="after 4 items of epoch 0, and its source has 5"):
        run()
    del items[4:]
    assert rest(items, shuffle=shuffle, every=1) == []


class EndsEarly:
    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 3:
            raise self.error
        return index

    error: type[Exception] = StopIteration


@pytest.mark.parametrize(("error", "expected"), [(StopIteration, IdentityMismatchError), (IndexError, IndexError)])
def test_a_sequence_that_ends_before_its_length_is_not_complete(error, expected):
    source = EndsEarly()
    source.error = error
    with pytest.raises(expected):
        rest(source, every=1)
    source.error = KeyError
    with pytest.raises(KeyError):  # it goes on there
        rest(source, every=1)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", [float, lambda number: {"a": [1, number]}])
def test_a_fingerprint_that_equals_nothing_is_refused(number, make):
    with pytest.raises(UsageTypeError, match="finite"):
        attempt().iterate(TEN, fingerprint=make(number))


def test_every_of_one_loop_does_not_move_another_past_its_payload(tmp_path):
    """The state of the outer loop is saved each third item; the inner loop commits by itself all the time."""
    cp, state = Checkpoint(tmp_path), list[int]()
    for item in cp.iterate(range(9), name="outer"):
        for _ in cp.iterate(range(4), name="inner", every=1):
            pass
        state.append(item)
        if item in (2, 5):
            cp.save_state_sync({"state": state})
        if item == 7:
            break
    retry = Checkpoint(tmp_path)
    found = retry.load_state_sync()
    assert found == {"state": [0, 1, 2, 3, 4, 5]}
    assert next(iter(retry.iterate(range(9), name="outer"))) == 6
