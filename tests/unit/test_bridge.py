from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

import pytest

from taskckpt import Checkpoint, _bridge
from taskckpt._bridge import in_thread
from taskckpt.errors import StaleAttemptError, UnavailableError, UsageError
from taskckpt.testing import intercepted


@pytest.fixture
def place(tmp_path):
    return tmp_path / "place"


def newest(place) -> bytes | None:
    return Checkpoint(place, read_only=True).load_bytes_sync()


def commits(place) -> int:
    return sum(b'"kind": "commit"' in path.read_bytes() for path in (place / "log").iterdir())


# --- cancelled ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 200_000], ids=["inline", "payload"])
def test_a_cancelled_save_never_commits_afterwards(place, size):
    """Cancelled at many moments: whatever is there when the cancelled await returns stays as it is."""
    outcomes = {"saved": 0, "not saved": 0}

    def slow(when, verb, keys):
        if when == "before" and verb in ("create", "write"):
            time.sleep(0.001)

    async def main():
        cp = Checkpoint(place)
        await cp.save(b"first")
        for number in range(150):
            before = newest(place)
            saving = asyncio.create_task(cp.save(b"%d" % number * size))
            await asyncio.sleep(number * 40e-6)
            saving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await saving
            after = newest(place)
            count = commits(place)
            assert after in (before, b"%d" % number * size)
            outcomes["saved" if after != before else "not saved"] += 1
            if number % 10 == 0:
                await asyncio.sleep(0.02)
                assert (newest(place), commits(place)) == (after, count), "something went on after the end"
        await asyncio.sleep(0.1)
        assert (newest(place), commits(place)) == (after, count)
        await cp.save(b"and it still works")

    with intercepted(slow):
        asyncio.run(main())
    assert newest(place) == b"and it still works"
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.parametrize("verb", ["list", "write", "create", "delete"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_cancelled_at_each_request(place, verb, when):
    """The request in flight ends first; a commit that had been decided stands, and nothing else follows it."""
    entered, go_on, requests = threading.Event(), threading.Event(), []

    def hook(now, what, keys):
        if armed:
            requests.append((now, what))
            if (now, what) == (when, verb) and not entered.is_set():
                entered.set()
                assert go_on.wait(10)

    armed: list[bool] = []

    async def main():
        cp = Checkpoint(place, keep=1)
        await cp.save(bytes(100_000))
        await cp.save(bytes(100_001))
        fresh = Checkpoint(place, keep=1)
        if verb == "delete":  # what an attempt came from stays until it has saved twice
            await fresh.save(bytes(100_001))
        armed.append(True)
        saving = asyncio.create_task(fresh.save(bytes(100_002)))
        assert await asyncio.to_thread(entered.wait, 10)
        saving.cancel()
        await asyncio.sleep(0.05)
        assert not saving.done(), "it waits for the request in flight"
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await saving
        seen, count = len(requests), commits(place)
        await asyncio.sleep(0.1)
        assert (len(requests), commits(place)) == (seen, count)
        armed.clear()
        return fresh

    with intercepted(hook):
        fresh = asyncio.run(main())
    assert newest(place) in (bytes(100_001), bytes(100_002))
    fresh.save_sync(b"next")
    assert newest(place) == b"next"


def test_cancelled_again_and_again(place):
    entered, go_on = threading.Event(), threading.Event()

    def hook(when, verb, keys):
        if when == "before" and verb == "create" and "log" in keys[0]:
            entered.set()
            assert go_on.wait(10)

    async def main():
        cp = Checkpoint(place)
        saving = asyncio.create_task(cp.save(b"1"))
        assert await asyncio.to_thread(entered.wait, 10)
        for _ in range(5):
            saving.cancel()
            await asyncio.sleep(0.01)
            assert not saving.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await saving

    with intercepted(hook):
        asyncio.run(main())
    assert newest(place) is None


def test_a_time_out_is_a_time_out(place):
    def hook(when, verb, keys):
        if when == "before" and verb == "create":
            time.sleep(0.2)

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Checkpoint(place).save(b"1"), timeout=0.05)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await Checkpoint(place).save(b"1")

    with intercepted(hook):
        asyncio.run(main())
    assert newest(place) is None


def test_a_cancelled_task_group_ends_its_saves(place):
    async def main():
        async def fail():
            await asyncio.sleep(0.01)
            raise ZeroDivisionError

        async def save_for_ever():
            cp = Checkpoint(place)
            while True:
                await cp.save(b"1")

        async def both():
            async with asyncio.TaskGroup() as group:
                group.create_task(save_for_ever())
                group.create_task(fail())

        with pytest.raises(ExceptionGroup) as info:
            await both()
        assert [type(error) for error in info.value.exceptions] == [ZeroDivisionError]
        count = commits(place)
        await asyncio.sleep(0.05)
        assert commits(place) == count

    asyncio.run(main())


def test_a_cancelled_wait_for_the_lock(place):
    """The save that waits its turn gives up at once, the one that runs is not disturbed."""
    entered, go_on = threading.Event(), threading.Event()

    def hook(when, verb, keys):
        if when == "before" and verb == "create" and not entered.is_set():
            entered.set()
            assert go_on.wait(10)

    async def main():
        cp = Checkpoint(place)
        first = asyncio.create_task(cp.save(b"first"))
        assert await asyncio.to_thread(entered.wait, 10)
        second = asyncio.create_task(cp.save(b"second"))
        await asyncio.sleep(0.1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(second, 5)
        go_on.set()
        await first

    with intercepted(hook):
        asyncio.run(main())
    assert newest(place) == b"first"


def test_an_error_that_came_while_cancelling_is_kept(place):
    async def main():
        entered, go_on = threading.Event(), threading.Event()

        def work(stop):
            entered.set()
            go_on.wait(10)
            raise UnavailableError("down")

        running = asyncio.create_task(in_thread(work))
        assert await asyncio.to_thread(entered.wait, 10)
        running.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError) as info:
            await running
        assert isinstance(info.value.__cause__, UnavailableError)

    asyncio.run(main())


def test_cancelled_before_a_thread_was_free():
    """Queued behind others: the cancelled work never starts to write."""
    started = []

    async def main():
        go_on = threading.Event()

        def block(stop):
            go_on.wait(10)

        def work(stop):
            started.append(1)
            stop.check()
            started.append(2)

        blockers = [asyncio.create_task(in_thread(block)) for _ in range(_bridge.THREADS)]
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(in_thread(work))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.sleep(0.05)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.gather(*blockers)

    asyncio.run(main())
    assert 2 not in started


# --- results and errors ------------------------------------------------------------------------


def test_results_errors_and_context_pass_through():
    variable: ContextVar[int] = ContextVar("variable")

    async def main():
        variable.set(7)
        assert await in_thread(lambda stop: variable.get()) == 7

        def change(stop):
            variable.set(8)

        await in_thread(change)
        assert variable.get() == 7
        error = StaleAttemptError("x", uri="u")

        def fail(stop):
            raise error

        with pytest.raises(StaleAttemptError) as info:
            await in_thread(fail)
        assert info.value is error

    asyncio.run(main())


def test_usage_errors_come_from_the_await(place):
    async def main():
        cp = Checkpoint(place)
        with pytest.raises(UsageError, match="no path"):
            await cp.save("no such file")
        with pytest.raises(TypeError):
            await cp.save(7)  # type: ignore[arg-type]

    asyncio.run(main())
    assert not place.exists()


def test_each_method_has_its_twin(place, tmp_path):
    (tmp_path / "file").write_text("content")

    async def main():
        cp = Checkpoint(place)
        assert await cp.load() is None
        assert await cp.load_bytes() is None
        await cp.save(tmp_path / "file")
        path = await cp.load()
        assert path is not None
        assert path.read_text() == "content"
        assert (await cp.load(to=tmp_path / "to")) == tmp_path / "to" / "file"
        assert await cp.load_bytes() == b"content"
        await cp.clear()
        assert await cp.load() is None

    asyncio.run(main())


# --- loops -------------------------------------------------------------------------------------


def test_one_loop_after_another(place):
    cp = Checkpoint(place)
    for number in range(5):
        asyncio.run(cp.save(b"%d" % number))
        assert asyncio.run(cp.load_bytes()) == b"%d" % number


def test_loops_in_several_threads(place):
    def run(number):
        async def main():
            cp = Checkpoint(place / str(number))
            for step in range(5):
                await cp.save(b"%d" % step)
            return await cp.load_bytes()

        return asyncio.run(main())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [b"4"] * 4


def test_plain_calls_inside_a_coroutine(place, tmp_path):
    """In a notebook cell a loop runs already, and plain calls must not care."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")

    async def main():
        cp = Checkpoint(place)
        assert cp.load_sync() is None
        cp.save_sync(tmp_path / "folder")
        assert (await cp.load()) is not None
        path = cp.load_sync()
        assert path is not None
        return (path / "file").read_text()

    assert asyncio.run(main()) == "x"


def test_plain_calls_inside_a_coroutine_on_s3(moto, new_bucket):
    """s3fs has a loop of its own in a thread; waiting for it must not need the one that runs here."""

    async def main():
        cp = Checkpoint(f"s3://{new_bucket(moto)}/place", storage_options=moto.storage_options)
        assert cp.load_sync() is None
        cp.save_sync(b"1")
        await cp.save(b"2")
        assert await cp.load_bytes() == b"2"
        assert await asyncio.to_thread(cp.load_bytes_sync) == b"2"
        return cp.load_bytes_sync()

    assert asyncio.run(main()) == b"2"


def test_concurrent_saves_queue_up(place):
    async def main():
        cp = Checkpoint(place, keep=None)
        await asyncio.gather(*(cp.save(b"%d" % number) for number in range(40)))
        return await cp.load_bytes()

    assert asyncio.run(main()) in {b"%d" % number for number in range(40)}
    assert commits(place) == 40


def test_more_loads_than_threads(place):
    async def main():
        cp = Checkpoint(place)
        await cp.save(b"1")
        found = await asyncio.wait_for(asyncio.gather(*(cp.load_bytes() for _ in range(100))), 15)
        assert found == [b"1"] * 100

    asyncio.run(main())


def test_the_loops_own_pool_may_be_full(place):
    async def main():
        loop, go_on = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))
        blocker = loop.run_in_executor(None, go_on.wait, 10)
        await asyncio.wait_for(Checkpoint(place).save(b"1"), 5)
        go_on.set()
        await blocker

    asyncio.run(main())


def test_after_a_fork(place):
    """The parent's threads do not exist in the child; it makes its own."""
    cp = Checkpoint(place)
    asyncio.run(cp.save(b"parent"))
    pid = os.fork()
    if not pid:
        try:
            asyncio.run(asyncio.wait_for(cp.save(b"child"), 10))
            os._exit(0 if asyncio.run(cp.load_bytes()) == b"child" else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert asyncio.run(cp.load_bytes()) == b"child"
    asyncio.run(cp.save(b"parent again"))


def test_a_fork_inside_a_coroutine(place):
    async def main():
        cp = Checkpoint(place)
        await cp.save(b"parent")
        pid = os.fork()
        if not pid:
            try:
                cp.save_sync(b"child")
                os._exit(0)
            finally:
                os._exit(4)
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        return await cp.load_bytes()

    assert asyncio.run(main()) == b"child"


# --- the loop is not held up -------------------------------------------------------------------


async def longest_gap(work, *, beat_s: float = 0.005) -> float:
    """How long a heart that beats in the loop had to wait at most while ``work`` ran."""
    gaps, running = [0.0], True

    async def beat():
        while running:
            began = time.perf_counter()
            await asyncio.sleep(beat_s)
            gaps.append(time.perf_counter() - began - beat_s)

    heart = asyncio.create_task(beat())
    await asyncio.sleep(0.05)
    gaps.clear()
    await work
    running = False
    await heart
    return max(gaps)


@pytest.mark.timeout(120)  # other tests may keep the disk busy
def test_saving_a_large_folder_does_not_hold_the_loop_up(place, tmp_path, capsys):
    """The target is 50 ms for 1 GiB, on a machine with nothing else to do; the limit leaves room for others."""
    size = int(os.environ.get("TEST_MIB", "256"))
    folder = tmp_path / "folder"
    folder.mkdir()
    block = os.urandom(1 << 20)
    for number in range(8):
        with open(folder / str(number), "wb") as file:
            file.writelines(index.to_bytes(8, "big") + block[8:] for index in range(size // 8))
    Path(folder / "many").mkdir()
    for number in range(2000):
        (folder / "many" / str(number)).write_bytes(b"x" * 100)

    async def main():
        cp = Checkpoint(place)
        await cp.save(b"warm")
        began = time.perf_counter()
        saving = await longest_gap(cp.save(folder))
        saved = time.perf_counter()
        loading = await longest_gap(cp.load())
        return saving, saved - began, loading, time.perf_counter() - saved

    saving, save_s, loading, load_s = asyncio.run(main())
    with capsys.disabled():
        print(
            f"\n  longest gap of the loop: {saving * 1000:.1f} ms in a save ({save_s:.1f} s), "
            f"{loading * 1000:.1f} ms in a load ({load_s:.1f} s) of {size} MiB",
            end="",
        )
    assert saving < 0.5
    assert loading < 0.5
