"""How a loop over ``iterate`` is left, and what the next attempt gets."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import sys
import threading
from contextlib import closing, suppress

import pytest

from tests.iterates import (
    TEN,
    Killed,
    attempt,
    rest,
    stop_at,
)

# These look at positions alone. Who loads nothing is warned, as test_iterate.py tests.
pytestmark = pytest.mark.filterwarnings("ignore:The iterate .* and what was saved with it:taskckpt.TaskckptWarning")


def by_break(it):
    for item in it:
        if item == 4:
            break


def by_return(it):
    for item in it:
        if item == 4:
            return item
    return None


def by_return_of_a_call(it):
    for item in it:
        if item == 4:
            return str(item)
    return None


def by_break_in_with(it):
    for item in it:
        with suppress(KeyError):
            if item == 4:
                break


def by_return_in_with(it):
    for item in it:
        with suppress(KeyError):
            if item == 4:
                return item
    return None


def by_break_in_finally(it):
    for item in it:
        try:
            if item == 4:
                break
        finally:
            str(item)


def by_break_of_two_loops(it):
    for _ in range(3):
        for item in it:
            if item == 4:
                break
        break


def by_return_from_two_loops(it):
    for _ in range(3):
        for item in it:
            if item == 4:
                return


def by_return_from_a_loop_inside(it):
    for item in it:
        for number in range(9):
            if item == number == 4:
                return


def by_break_after_an_error_was_handled(it):
    for item in it:
        try:
            raise KeyError  # noqa: TRY301
        except KeyError as error:
            last = error
            if item == 4:
                break
    return last


def by_break_of_enumerate(it):
    for _, item in enumerate(it):
        if item == 4:
            break


def by_break_of_zip(it):
    for item, _ in zip(it, itertools.count(), strict=False):
        if item == 4:
            break


def by_break_in_match(it):
    for item in it:
        match item:
            case 4:
                break
            case _:
                pass


def by_break_under_a_tracer(it):
    before = sys.gettrace()
    sys.settrace(lambda *_: lambda *_: None)
    try:
        by_break(it)
    finally:
        sys.settrace(before)


def by_break_in_a_thread(it):
    thread = threading.Thread(target=by_break, args=(it,))
    thread.start()
    thread.join()


def by_break_in_a_coroutine(it):
    async def loop():
        for item in it:
            await asyncio.sleep(0)
            if item == 4:
                break

    asyncio.run(loop())


def by_break_in_a_generator(it):
    def loop():
        for item in it:
            yield item
            if item == 4:
                break

    list(loop())


def by_break_async(it):
    async def loop():
        async for item in it:
            await asyncio.sleep(0)
            if item == 4:
                break

    asyncio.run(loop())


def by_return_async(it):
    async def loop():
        async for item in it:
            if item == 4:
                return item
        return None

    asyncio.run(loop())


DONE = [one for name, one in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("leave", DONE, ids=lambda leave: leave.__name__)
def test_who_leaves_a_loop_has_done_the_item(leave):
    leave(attempt().iterate(TEN, every=100))
    assert rest() == [5, 6, 7, 8, 9]


def on_raise(it):
    for item in it:
        if item == 4:
            raise Killed


def on_an_error_of_a_call(it):
    for item in it:
        if item == 4:
            int("four")


def on_an_error_of_an_index(it):
    for item in it:
        if item == 4:
            [][item]


def on_an_assertion(it):
    for item in it:
        assert item < 4


def on_an_error_in_with(it):
    for item in it:
        with closing(open(os.devnull)):
            if item == 4:
                raise Killed


def on_an_error_in_finally(it):
    for item in it:
        try:
            if item == 4:
                raise Killed
        finally:
            str(item)


def on_an_error_while_returning(it):
    for item in it:
        if item == 4:
            return {}[item]
    return None


def on_an_error_that_is_suppressed(it):
    with suppress(KeyError):
        for item in it:
            if item == 4:
                raise KeyError


def on_an_error_that_is_handled(it):
    try:
        for item in it:
            if item == 4:
                raise KeyError  # noqa: TRY301
    except KeyError:
        pass


def on_ctrl_c(it):
    for item in it:
        if item == 4:
            signal.raise_signal(signal.SIGINT)


def on_sys_exit(it):
    for item in it:
        if item == 4:
            sys.exit(3)


def on_an_error_in_a_comprehension(it):
    return [1 // (4 - item) for item in it]


def on_an_error_of_what_it_is_zipped_with(it):
    def fails():
        yield from range(4)
        raise Killed

    for _ in zip(it, fails(), strict=False):
        pass


def on_the_end_of_what_it_is_zipped_with(it):
    for _ in zip(it, range(4), strict=False):  # the item for which there is no partner has never been seen
        pass


def on_close(it):
    items = iter(it)
    for _ in range(5):
        next(items)
    items.close()


def on_a_drop_of_what_was_held(it):
    items = iter(it)
    for _ in range(5):
        next(items)
    del items


def on_a_drop_in_a_statement(it):
    held = [iter(it)]
    for _ in range(5):
        next(held[0])
    other = held
    del held

    def drop():
        other.pop()

    drop()


def on_a_cancelled_task(it):
    async def loop():
        for item in it:
            if item == 4:
                await asyncio.sleep(60)

    async def cancel():
        started = asyncio.create_task(loop())
        await asyncio.sleep(0)
        started.cancel()
        await started

    with suppress(asyncio.CancelledError):
        asyncio.run(cancel())


def on_an_error_async(it):
    async def loop():
        async for item in it:
            await asyncio.sleep(0)
            if item == 4:
                raise Killed

    asyncio.run(loop())


def on_a_cancelled_task_async(it):
    reached = asyncio.Event()

    async def loop():
        async for item in it:
            if item == 4:
                reached.set()
                await asyncio.sleep(60)

    async def cancel():
        started = asyncio.create_task(loop())
        await reached.wait()
        started.cancel()
        await started

    with suppress(asyncio.CancelledError):
        asyncio.run(cancel())


NOT_DONE = [one for name, one in list(globals().items()) if name.startswith("on_")]


@pytest.mark.parametrize("leave", NOT_DONE, ids=lambda leave: leave.__name__)
def test_after_an_error_or_in_doubt_the_item_comes_again(leave):
    cp = attempt()
    it = cp.iterate(TEN, every=100)
    with suppress(Killed, KeyboardInterrupt, SystemExit, Exception):
        leave(it)
    gc.collect()
    cp.save_sync(b"")  # commits where it stands
    assert rest() == [4, 5, 6, 7, 8, 9]


def test_an_error_commits_nothing():
    stop_at(4, every=3)
    assert rest() == [3, 4, 5, 6, 7, 8, 9]


def test_in_any_other_python_nothing_is_assumed(monkeypatch):
    monkeypatch.setattr(sys.implementation, "name", "other")
    by_break(attempt().iterate(TEN, every=2))
    assert rest() == [4, 5, 6, 7, 8, 9]
