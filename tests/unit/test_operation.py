from __future__ import annotations

import logging
import threading
import time
from contextlib import closing

import pytest

from taskckpt import _operation
from taskckpt._operation import TRIES, Stop, Stopped, made_ahead, ordered_map, with_retries
from taskckpt.errors import DeniedError, NotFoundError, StorageFullError, TaskckptError, UnavailableError
from taskckpt.testing import instant_retries


class Flaky:
    """Fails so many times, and counts."""

    def __init__(self, failures, error=UnavailableError):
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error(f"failure {self.calls}")
        return "done"


@pytest.mark.parametrize("failures", range(TRIES))
def test_passing_faults_are_tried_again(failures):
    request = Flaky(failures)
    with instant_retries():
        assert with_retries(request, timeout_s=10) == "done"
    assert request.calls == failures + 1


def test_the_last_error_is_raised_after_five_tries(caplog):
    request = Flaky(99)
    with instant_retries(), caplog.at_level(logging.INFO, "taskckpt"), pytest.raises(UnavailableError) as caught:
        with_retries(request, timeout_s=10)
    assert request.calls == TRIES == 5
    assert caught.value.message == "failure 5"
    assert any("Tried 5 times" in note for note in caught.value.__notes__)
    assert "trying again" in caplog.text


@pytest.mark.parametrize("error", [DeniedError, NotFoundError, StorageFullError, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [0, 2])
def test_nothing_else_is_tried_again(error, before):
    calls = []

    def request():
        calls.append(1)
        raise UnavailableError("passing") if len(calls) <= before else error("final")

    with instant_retries(), pytest.raises(error, match="final"):
        with_retries(request, timeout_s=10)
    assert len(calls) == before + 1


def test_no_try_begins_after_the_time_is_up():
    def slow():
        calls.append(1)
        time.sleep(0.06)
        raise UnavailableError("slow")

    for timeout_s, most in ((0.05, 1), (0.1, 2)):
        calls: list[int] = []
        with instant_retries(), pytest.raises(UnavailableError) as caught:
            with_retries(slow, timeout_s=timeout_s)
        assert 1 <= len(calls) <= most
        assert "Tried" in "".join(caught.value.__notes__)


def test_waits_grow_and_stay_within_bounds(monkeypatch):
    slept: list[float] = []
    stop = Stop()
    monkeypatch.setattr(stop, "sleep", slept.append)
    with pytest.raises(UnavailableError):
        with_retries(Flaky(99), timeout_s=300, stop=stop)
    assert len(slept) == TRIES - 1
    assert slept[0] == _operation.FIRST_WAIT_S
    for number, wait in enumerate(slept[1:]):
        assert 0 <= wait <= min(_operation.FIRST_WAIT_S * 2 ** (number + 1), _operation.LONGEST_WAIT_S)


def test_who_gave_up_makes_no_request():
    stop, request = Stop(), Flaky(0)
    stop.set()
    with pytest.raises(Stopped):
        with_retries(request, timeout_s=10, stop=stop)
    assert request.calls == 0


def test_who_gives_up_while_waiting_is_let_go_at_once():
    stop, request = Stop(), Flaky(99)
    threading.Timer(0.05, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        with_retries(request, timeout_s=300, stop=stop)
    assert time.monotonic() - began < 5
    assert request.calls < TRIES


def test_stopped_is_no_exception_that_others_catch():
    assert not issubclass(Stopped, Exception)
    assert not issubclass(Stopped, TaskckptError)
    stop = Stop()
    stop.check()
    stop.sleep(0)
    stop.set()
    for call in (stop.check, lambda: stop.sleep(60)):
        with pytest.raises(Stopped):
            call()


# --- ordered_map -------------------------------------------------------------------------------


def test_results_come_in_order():
    def slow_first(number):
        time.sleep(0.02 if number == 0 else 0)
        return number * 2

    assert list(ordered_map(slow_first, range(20), threads=4)) == list(range(0, 40, 2))
    assert list(ordered_map(slow_first, (), threads=4)) == []


@pytest.mark.parametrize(("threads", "ahead"), [(1, 0), (2, 0), (4, 0), (2, 3)])
def test_only_so_many_are_under_way(threads, ahead):
    lock, running, most, taken = threading.Lock(), 0, 0, 0

    def items():
        nonlocal taken
        for number in range(20):
            taken += 1
            yield number

    def work(number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        return number

    for done in ordered_map(work, items(), threads=threads, ahead=ahead):
        assert taken - done <= threads + ahead
    assert most <= threads


def test_an_error_comes_where_its_result_would_have():
    def work(number):
        if number == 3:
            raise ValueError("three")
        return number

    results = ordered_map(work, range(10), threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_whoever_stops_early_waits_for_what_runs_and_starts_no_more():
    ended = []

    def work(number):
        time.sleep(0.02)
        ended.append(number)
        return number

    results = ordered_map(work, range(100), threads=3)
    assert next(results) == 0
    results.close()
    now = list(ended)
    assert len(now) <= 5
    time.sleep(0.05)
    assert ended == now


def test_a_source_that_raises_is_heard():
    def items():
        yield 1
        raise OSError("the source broke")

    with pytest.raises(OSError, match="the source broke"):
        list(ordered_map(lambda number: number, items(), threads=2))


def test_without_threads_the_work_is_done_here(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr("concurrent.futures.ThreadPoolExecutor.submit", refuse)
    here = threading.get_ident()
    assert list(ordered_map(lambda n: (n, threading.get_ident()), range(3), threads=2)) == [(n, here) for n in range(3)]


# --- made_ahead --------------------------------------------------------------------------------


def test_the_next_item_is_made_while_the_consumer_works_and_no_further_one():
    made = []
    second = threading.Event()

    def items():
        for number in range(5):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    found = made_ahead(items())
    assert next(found) == 0
    assert second.wait(5)
    time.sleep(0.02)
    assert made == [0, 1]
    assert list(found) == [1, 2, 3, 4]
    assert list(made_ahead(())) == []


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        raise Stopped

    found = made_ahead(items())
    assert next(found) == 1
    with pytest.raises(Stopped):
        next(found)


def test_whoever_closes_waits_for_the_item_that_is_being_made():
    begun, ended = threading.Event(), []

    def items():
        for number in range(5):
            if number == 1:
                begun.set()
            time.sleep(0.02)
            ended.append(number)
            yield number

    source = items()
    found = made_ahead(source)
    next(found)
    begun.wait()
    found.close()
    assert ended == [0, 1]
    source.close()  # which no thread is in any more
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("taskckpt_")]


def failing_start(monkeypatch, at, error):
    """The start of our ``at``-th thread fails, or is interrupted when the thread runs already."""
    original, count = threading.Thread.start, 0

    def start(self):
        nonlocal count
        count += self.name.startswith("taskckpt")
        if count != at or not self.name.startswith("taskckpt"):
            original(self)
            return
        if error is KeyboardInterrupt:
            original(self)
        raise error("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_thread_that_cannot_be_started_makes_no_call_twice(monkeypatch, at):
    failing_start(monkeypatch, at, RuntimeError)
    calls = []
    items = (number for number in range(40))

    def work(number):
        calls.append(number)
        time.sleep(0.002)
        return number

    assert list(ordered_map(work, made_ahead(items), threads=3, ahead=1)) == list(range(40))
    assert sorted(calls) == list(range(40))


@pytest.mark.parametrize("at", [1, 2])
def test_a_thread_whose_start_was_interrupted_is_waited_for(monkeypatch, at):
    failing_start(monkeypatch, at, KeyboardInterrupt)
    under_way = []

    def work(number):
        under_way.append(number)
        time.sleep(0.2)
        under_way.remove(number)

    with pytest.raises(KeyboardInterrupt):
        list(ordered_map(work, range(10), threads=2))
    assert under_way == []


def test_so_it_is_with_what_is_made_ahead(monkeypatch):
    failing_start(monkeypatch, 1, KeyboardInterrupt)

    def items():
        time.sleep(0.2)
        yield 1

    source = items()
    with pytest.raises(KeyboardInterrupt), closing(source), closing(made_ahead(source)) as ahead:
        list(ahead)
