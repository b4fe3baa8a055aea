"""Saves in the background: what is saved when, who gets the errors, and who may wait for what."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import taskckpt
from taskckpt import Checkpoint, PendingSave, StaleAttemptError, _later, _pending, _process, task
from taskckpt.errors import (
    NotFoundError,
    StillPendingError,
    UnavailableError,
    UsageError,
    UsageTypeError,
)
from taskckpt.testing import instant_retries, intercepted
from tests.interrupts import interrupted_at, press_ctrl_c


class Store:
    """The requests of saves, which can be held and can be made to fail."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.arrived = threading.Event()
        self.failing = 0

    def hook(self, when: str, verb: str, _keys: object) -> None:
        if (when, verb) != ("before", "create"):
            return
        self.arrived.set()
        assert self.is_open.wait(15)
        if self.failing:
            self.failing -= 1
            raise UnavailableError("As wished.")

    def hold(self) -> None:
        self.is_open.clear()
        self.arrived.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Commits end when this does."""
        self.hold()
        try:
            yield
        finally:
            self.is_open.set()

    def fail_once(self) -> None:
        self.failing = 1


@pytest.fixture
def store():
    made = Store()
    with instant_retries(), intercepted(made.hook):
        yield made


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "place"


@pytest.fixture
def cp(place, store) -> Checkpoint:
    made = Checkpoint(place, keep=None)
    made.save_sync(b"0")
    return made


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
    yield
    ends = time.monotonic() + 5
    while (left := [one for one in threading.enumerate() if one.name == "taskckpt-later"]) and time.monotonic() < ends:
        time.sleep(0.01)
    assert not left
    workers, untold = list(_later._workers), list(_pending.untold)
    _later._workers.clear()
    _pending.untold.clear()
    assert not workers
    assert not untold


def newest(place: Path) -> bytes | None:
    return Checkpoint(place, read_only=True).load_bytes_sync()


def history(place: Path) -> list[bytes]:
    """All that was committed, in order."""
    import json

    records = [json.loads(path.read_bytes().partition(b"\n")[0]) for path in sorted(Path(place, "log").iterdir())]
    commits = [one["checkpoint"]["stored"]["inline"]["text"].encode() for one in records if one["kind"] == "commit"]
    return commits[::-1]


# --- one in flight, one waiting ----------------------------------------------------------------


def test_it_goes_on_while_the_caller_does(place, cp, store):
    with store.held():
        pending = cp.save_later(b"1")
        assert isinstance(pending, PendingSave)
        assert store.arrived.wait(5)
        assert not pending.done()
        assert "in flight" in repr(pending)
        assert newest(place) == b"0"
    assert pending.result() is True
    assert pending.done()
    assert "saved" in repr(pending)
    assert newest(place) == b"1"


def test_a_newer_one_takes_the_place_of_the_one_that_waits(place, cp, store):
    with store.held():
        first = cp.save_later(b"1")
        assert store.arrived.wait(5)
        waiting = [cp.save_later(b"%d" % number) for number in range(2, 6)]
        assert [one.done() for one in (first, *waiting)] == [False, True, True, True, False]
        assert "superseded" in repr(waiting[0])
        assert "waiting" in repr(waiting[3])
        assert waiting[0].result(0) is False
    assert [one.result() for one in (first, *waiting)] == [True, False, False, False, True]
    assert history(place) == [b"0", b"1", b"5"]


def test_with_the_policy_queue_every_one_is_saved(place, cp, store):
    with store.held():
        cp.save_later(b"1", policy="queue")
        assert store.arrived.wait(5)
        cp.save_later(b"2", policy="queue")
        third = threading.Thread(target=cp.save_later, args=(b"3",), kwargs={"policy": "queue"})
        third.start()
        third.join(0.2)
        assert third.is_alive(), "the place of the one that waits is taken"
    third.join(5)
    cp.wait()
    assert history(place) == [b"0", b"1", b"2", b"3"]


def test_what_was_promised_to_be_saved_is_not_superseded(place, cp, store):
    with store.held():
        cp.save_later(b"1")
        assert store.arrived.wait(5)
        cp.save_later(b"2", policy="queue")
        third = threading.Thread(target=cp.save_later, args=(b"3",))
        third.start()
        third.join(0.2)
        assert third.is_alive()
    third.join(5)
    cp.wait()
    assert history(place) == [b"0", b"1", b"2", b"3"]


def test_a_queue_of_small_saves_is_not_slow(cp):
    began = time.monotonic()
    for number in range(50):
        cp.save_later(b"%d" % number, policy="queue")
    cp.wait()
    assert time.monotonic() - began < 2, "nobody sleeps through the end of the save before"


def test_what_may_change_is_copied(place, cp, store):
    for data in (bytearray(b"abc"), memoryview(bytearray(b"abc")), memoryview(bytearray(b"-a-b-c"))[1::2]):
        with store.held():
            pending = cp.save_later(data)
            memoryview(data)[:1] = b"X"
        assert pending.result()
        assert newest(place) == b"abc"


def test_bytes_are_not_copied(cp, store):
    data = bytes(1000)
    before = sys.getrefcount(data)
    with store.held():
        cp.save_later(data)
        assert sys.getrefcount(data) > before


def test_many_threads_at_once(place, cp):
    results = []

    def save(thread: int) -> None:
        mine = [
            cp.save_later(b"%d.%d" % (thread, number), policy=("latest", "queue")[thread % 2]) for number in range(20)
        ]
        results.append((thread, [one.result() for one in mine]))

    threads = [threading.Thread(target=save, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    saved = {b"%d.%d" % (thread, n) for thread, mine in results for n, one in enumerate(mine) if one}
    assert set(history(place)) - {b"0"} == saved, "True means saved, and False that it never was"
    assert all(all(mine) for thread, mine in results if thread % 2)
    for number in range(8):
        numbers = [int(one.partition(b".")[2]) for one in history(place) if one.startswith(b"%d." % number)]
        assert numbers == sorted(numbers)


# --- order -------------------------------------------------------------------------------------

AFTER = {
    "save": lambda cp: cp.save_sync(b"2"),
    "save async": lambda cp: asyncio.run(cp.save(b"2")),
    "load": lambda cp: cp.load_sync().read_bytes(),
    "load async": lambda cp: asyncio.run(cp.load()).read_bytes(),
    "load_bytes": lambda cp: cp.load_bytes_sync(),
    "clear": lambda cp: cp.clear_sync(),
    "clear async": lambda cp: asyncio.run(cp.clear()),
    "wait": lambda cp: cp.wait(),
}


@pytest.mark.parametrize("verb", AFTER)
def test_the_order_is_that_of_the_calls(verb, place, cp, store):
    store.hold()
    first, second = cp.save_later(b"1"), cp.save_later(b"1 again", policy="queue")
    threading.Timer(0.2, store.is_open.set).start()
    found = AFTER[verb](cp)
    assert first.done()
    assert second.done()
    if "load" in verb:
        assert found == b"1 again"
    elif "clear" in verb:
        assert newest(place) is None
    else:
        assert history(place) == [b"0", b"1", b"1 again", *([b"2"] if "save" in verb else [])]


def test_wait_waits_for_what_took_the_place(place, cp, store):
    store.hold()
    cp.save_later(b"1")
    assert store.arrived.wait(5)
    replaced = cp.save_later(b"2")
    cp.save_later(b"3")
    assert replaced.done()
    with pytest.raises(StillPendingError):
        cp.wait(0.1)
    store.is_open.set()
    cp.wait()
    assert newest(place) == b"3"


# --- waiting -----------------------------------------------------------------------------------


def test_the_time_to_wait(cp, store):
    with store.held():
        pending = cp.save_later(b"1")
        for wait in (pending.result, cp.wait):
            for seconds in (0, 0.05):
                began = time.monotonic()
                with pytest.raises(TimeoutError) as caught:
                    wait(seconds)
                assert isinstance(caught.value, StillPendingError)
                assert time.monotonic() - began < 1
            for nonsense in (-1, True, "1", float("nan")):
                with pytest.raises(UsageError):
                    wait(nonsense)
    assert pending.result(5)
    assert pending.result(0), "as often as one likes"
    cp.wait(0)


def test_ctrl_c_ends_the_waiting_and_not_the_save(place, cp, store):
    with store.held():
        pending = cp.save_later(b"1")
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pending.result()
        assert not pending.done()
    assert pending.result()
    assert newest(place) == b"1"


def test_awaiting(place, cp, store):
    async def main() -> None:
        store.hold()
        pending = cp.save_later(b"1")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(pending), 0.1)
        assert not pending.done(), "to cancel the await does not cancel the save"
        first, second = asyncio.create_task(_awaited(pending)), asyncio.create_task(_awaited(pending))
        await asyncio.sleep(0.05)
        assert not first.done(), "and the loop is free"
        store.is_open.set()
        assert await first is True
        assert await second is True
        assert await pending is True

    asyncio.run(main())
    assert newest(place) == b"1"


async def _awaited(pending: PendingSave) -> bool:
    return await pending


def test_awaiting_what_is_superseded_or_fails(cp, store):
    async def main() -> None:
        store.hold()
        first = cp.save_later(b"1")
        assert store.arrived.wait(5)
        waiting = asyncio.create_task(_awaited(cp.save_later(b"2")))
        await asyncio.sleep(0.01)
        third = cp.save_later(b"3")
        assert await waiting is False
        store.failing = 1
        store.is_open.set()
        with pytest.raises(UnavailableError):
            await first
        assert await third

    asyncio.run(main())


def test_a_loop_that_is_gone_does_not_matter(cp, store):
    async def main(pending: PendingSave) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(pending), 0.05)

    with store.held():
        pending = cp.save_later(b"1")
        asyncio.run(main(pending))
    assert pending.result()


def test_what_waits_for_its_turn_in_a_coroutine_can_be_cancelled(place, cp, store):
    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(cp.save(b"2"), 0.1)

    with store.held():
        pending = cp.save_later(b"1")
        assert store.arrived.wait(5)
        began = time.monotonic()
        asyncio.run(main())
        assert time.monotonic() - began < 2
    assert pending.result()
    assert history(place) == [b"0", b"1"], "a cancelled save never commits"


def test_no_loop_waits_for_a_save_in_the_background(cp, store):
    async def main() -> float:
        store.hold()
        cp.save_later(b"1")
        saving = asyncio.create_task(cp.save(b"2"))
        longest, ends = 0.0, time.monotonic() + 0.3
        while time.monotonic() < ends:
            began = time.monotonic()
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - began)
        store.is_open.set()
        await saving
        return longest

    assert asyncio.run(main()) < 0.2


# --- errors ------------------------------------------------------------------------------------

NEXT = AFTER | {"save_later": lambda cp: cp.save_later(b"2")}


def failed(cp: Checkpoint, store: Store, data: bytes = b"1") -> PendingSave:
    store.fail_once()
    pending = cp.save_later(data)
    while not pending.done():
        time.sleep(0.001)
    return pending


@pytest.mark.parametrize("verb", NEXT)
def test_the_next_call_of_any_kind_raises_it_once(verb, place, cp, store):
    pending = failed(cp, store)
    assert "failed with CommitUnknownError" in repr(pending)
    with pytest.raises(UnavailableError, match="As wished"):
        NEXT[verb](cp)
    assert history(place) == [b"0"], "and does nothing else"
    NEXT[verb](cp)
    cp.wait()
    with pytest.raises(UnavailableError):
        pending.result()


@pytest.mark.parametrize("who", ["result", "await"])
def test_whoever_got_it_has_got_it(who, place, cp, store):
    pending = failed(cp, store)
    with pytest.raises(UnavailableError):
        pending.result() if who == "result" else asyncio.run(_awaited(pending))
    cp.wait()
    cp.save_sync(b"2")
    assert newest(place) == b"2"


def test_to_look_at_it_is_not_to_get_it(cp, store):
    pending = failed(cp, store)
    assert pending.done()
    assert repr(pending)
    assert cp.prev_exists()
    with pytest.raises(UnavailableError):
        cp.wait()


def test_several_are_told_together(cp, store):
    store.failing = 2
    store.hold()
    cp.save_later(b"1")
    assert store.arrived.wait(5)
    cp.save_later(b"2", policy="queue")
    store.is_open.set()
    with pytest.raises(UnavailableError) as caught:
        cp.wait()
    assert any("a later save failed" in note for note in caught.value.__notes__)
    cp.wait()


def test_errors_of_one_checkpoint_are_not_those_of_another(tmp_path, cp, store):
    pending = failed(cp, store)
    other = Checkpoint(tmp_path / "other")
    other.save_sync(b"1")
    other.wait()
    with pytest.raises(UnavailableError):
        pending.result()


def test_it_is_in_the_log_at_once(cp, store, caplog):
    with pytest.raises(UnavailableError):
        failed(cp, store).result()
    assert any(one.levelno == logging.WARNING and "in the background failed" in one.message for one in caplog.records)


def test_who_is_stale_stays_so(place, cp, store):
    Checkpoint(place).save_sync(b"newer")
    pending = cp.save_later(b"1")
    with pytest.raises(StaleAttemptError):
        pending.result()
    for _ in range(2):
        with pytest.raises(StaleAttemptError):
            cp.save_later(b"2")
        with pytest.raises(StaleAttemptError):
            cp.save_sync(b"2")
    assert newest(place) == b"newer"


REFUSED = {
    "number": (7, UsageTypeError),
    "text": ("no path", UsageError),
    "absent": (Path("absent"), NotFoundError),
    "state": ({"a": [object()]}, UsageTypeError),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_saved_is_refused_at_once(what, place, cp):
    data, error = REFUSED[what]
    with pytest.raises(error):
        cp.save_later(data)
    cp.wait()
    assert history(place) == [b"0"]


def test_what_is_refused_does_not_take_a_place(place, cp, store):
    with store.held():
        cp.save_later(b"1")
        assert store.arrived.wait(5)
        waiting = cp.save_later(b"2")
        for data, error in REFUSED.values():
            with pytest.raises(error):
                cp.save_later(data)
        assert not waiting.done()
    assert waiting.result()
    assert newest(place) == b"2"


def test_other_calls_that_are_wrong(place, cp):
    for policy in ("newest", "", None, 1):
        with pytest.raises(UsageError, match="policy"):
            cp.save_later(b"1", policy=policy)
    with pytest.raises(UsageError, match="progress"):
        cp.save_later(b"1", progress=3)
    with pytest.raises(UsageError, match="contains"):
        cp.save_later(place)
    with pytest.raises(UsageError, match="read-only"):
        Checkpoint(place, read_only=True).save_later(b"1")
    cp._end()
    with pytest.raises(StaleAttemptError, match="has ended"):
        cp.save_later(b"1")


def test_progress_is_told_and_may_end_it(cp):
    told = []
    assert cp.save_later(bytes(200_000), progress=lambda done, total: told.append((done, total))).result()
    assert told[-1] == (200_000, 200_000)

    def stop(_done: int, _total: int) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        cp.save_later(bytes(200_000), progress=stop).result()


# --- handlers of signals, and other code that is in the middle of a save ------------------------


@contextmanager
def handling(handler) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_may_save_during_a_save_in_the_background(place, cp, store):
    def handler() -> None:
        threading.Timer(0.1, store.is_open.set).start()
        cp.save_sync(b"from the handler")

    with handling(handler):
        store.hold()
        pending = cp.save_later(b"1")
        assert store.arrived.wait(5)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert pending.result()
    assert history(place) == [b"0", b"1", b"from the handler"]


def test_a_handler_in_the_middle_of_a_save_comes_first(place, cp, store):
    """The save in the background waits for the one that is interrupted: the handler must not wait for it."""
    armed, problems, waiting = [True], [], []

    def handler() -> None:
        waiting.append(cp.save_later(b"later"))
        for wait in (waiting[0].result, cp.wait):
            try:
                wait()
            except UsageError as error:
                problems.append(str(error))
        cp.save_sync(b"from the handler")
        waiting.append(cp.save_later(b"later still", policy="queue"))

    def hook(when: str, verb: str, _keys: object) -> None:
        if armed and (when, verb) == ("before", "write"):
            armed.clear()
            os.kill(os.getpid(), signal.SIGUSR1)

    with handling(handler), intercepted(hook):
        cp = Checkpoint(place, keep=None)
        cp.save_sync(b"2" * 70_000)
    assert len(problems) == 2
    assert "in the middle of a save" in problems[0]
    cp.wait()
    assert [one.result() for one in waiting] == [True, True]
    assert newest(place) == b"later still"


def test_progress_may_save_as_well(place, cp):
    answers = []

    def progress(done: int, total: int) -> None:
        if done < total:
            return
        cp.save_sync(b"inner")
        with pytest.raises(UsageError, match="in the middle"):
            cp.wait()
        answers.append(cp.save_later(b"later"))

    pending = cp.save_later(bytes(100_000), progress=progress)
    assert pending.result()
    assert answers[0].result()
    assert newest(place) == b"later"


CRITICAL = {
    "save",
    "_in_the_way",
    "_begin",
    "_has",
    "_supersede",
    "supersede",
    "see_to_it",
    "keep",
    "__init__",
    "open",
} | {
    *(
        "wait",
        "wait_for_turn",
        "result",
        "outcome",
        "_expect_to_end",
        "done",
        "has_ended",
        "successor",
        "settle",
        "fail",
        "_end",
    ),
    *("raise_failures", "_copied", "set_aside", "process_root", "take", "give_back", "_is_mine", "snapshot", "release"),
}


@pytest.fixture
def quick_path(tmp_path) -> Iterator[Path]:
    """An empty folder where fsync is quick."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="taskckpt-test-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("policy", ["latest", "queue"])
def test_ctrl_c_at_any_line_leaves_it_able_to_save(policy, quick_path, store):
    at, more = 0, True
    while more:
        at += 1
        cp = Checkpoint(quick_path / str(at), keep=None)

        def act(cp=cp) -> None:
            cp.save_later(b"1", policy=policy)
            cp.save_later(b"2", policy=policy)
            cp.save_later(b"3", policy=policy).result()

        more = interrupted_at(at, CRITICAL, act, press_ctrl_c)
        cp.wait(5)
        assert cp.save_later(b"4").result(5)
        assert history(quick_path / str(at))[-1] == b"4"
    assert at > 50


@pytest.mark.parametrize("policy", ["latest", "queue"])
def test_a_handler_at_any_line_may_save_and_wait(policy, quick_path, store):
    at, more = 0, True
    while more:
        at += 1
        cp = Checkpoint(quick_path / str(at), keep=None)
        inner: list[PendingSave] = []

        def handler(cp=cp, inner=inner) -> None:
            inner.append(cp.save_later(b"handler later", policy="queue"))
            cp.save_sync(b"handler")

        def act(cp=cp) -> None:
            cp.save_later(b"1", policy=policy)
            cp.save_later(b"2", policy=policy)
            assert cp.save_later(b"3", policy=policy).result(5)

        more = interrupted_at(at, CRITICAL, act, handler)
        cp.wait(5)
        committed = history(quick_path / str(at))
        assert committed[-1] in (b"3", b"handler")
        if inner:
            assert inner[0].result(5)
            assert committed.index(b"handler later") < committed.index(b"handler")
        if policy == "queue":
            assert set(committed) >= {b"1", b"2", b"3"}
    assert at > 50


def test_a_handler_at_any_line_of_a_state_may_save_one_as_well(quick_path):
    at, more = 0, True
    while more:
        at += 1
        cp = Checkpoint(quick_path / str(at))
        state = {"step": b"x" * 100_000}

        def handler(cp=cp, state=state) -> None:
            cp.save_later(state, policy="queue")
            cp.save_state_sync(state)

        def act(cp=cp, state=state) -> None:
            for _ in range(3):
                cp.save_later(state)
            cp.wait(5)

        more = interrupted_at(at, CRITICAL, act, handler)
        assert cp.load_state_sync() == state
    assert at > 50


# --- processes ---------------------------------------------------------------------------------


def test_a_copy_has_none_of_them(place, cp, store):
    with store.held():
        pending = cp.save_later(b"1")
        assert store.arrived.wait(5)
        for made in (copy.deepcopy(cp), pickle.loads(pickle.dumps(cp))):
            made.wait(0)
            assert made._later._attempt is made._attempt
    assert pending.result()


def test_a_forked_child_has_none_of_them(place, cp, store):
    store.hold()
    pending, waiting = cp.save_later(b"1"), cp.save_later(b"2", policy="queue")
    assert store.arrived.wait(5)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            store.is_open.set()
            cp.wait(0)
            answers = []
            for one in (pending, waiting):
                try:
                    one.result(5)
                except UsageError as error:
                    answers.append("parent process" in str(error))
            assert cp.save_later(b"child").result(10)
            os.write(writing, repr(answers).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "[True, True]"
    os.waitpid(child, 0)
    store.is_open.set()
    cp.wait(5)
    assert history(place) == [b"0", b"child", b"1", b"2"]


# --- the end of a task -------------------------------------------------------------------------


@pytest.fixture
def _tasks(monkeypatch, tmp_path):
    monkeypatch.setattr(_process, "process", _process.Process())
    monkeypatch.setenv("TASKCKPT_BASE", str(tmp_path / "base"))


def as_task(is_async: bool, body, **options):
    """A task of a plain or async function with this body."""
    if not is_async:
        return task(key="t", wait_initial_s=0, **options)(body)

    async def run() -> object:
        return body()

    decorated = task(key="t", wait_initial_s=0, **options)(run)
    return lambda: asyncio.run(decorated())


both = pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])


@both
@pytest.mark.usefixtures("_tasks")
def test_a_task_has_saved_when_it_ends(is_async, store, tmp_path):
    threads = []

    def body() -> list[PendingSave]:
        store.hold()
        threading.Timer(0.1, store.is_open.set).start()
        pending = [
            taskckpt.checkpoint().save_later(b"1"),
            taskckpt.checkpoint("key").save_later(b"2"),
            Checkpoint(tmp_path / "own").save_later(b"3"),
        ]
        thread = threading.Thread(target=lambda: pending.append(taskckpt.checkpoint().save_later(b"4", policy="queue")))
        thread.start()
        threads.append(thread)
        thread.join()
        return pending

    pending = as_task(is_async, body)()
    assert [one.done() for one in pending] == [True] * 4
    assert [one.result() for one in pending] == [True] * 4
    assert Checkpoint.of(key="t").load_bytes_sync() == b"4"


@both
@pytest.mark.usefixtures("_tasks")
def test_a_failure_in_the_background_fails_the_attempt(is_async, store):
    seen = []

    def body() -> str:
        cp = taskckpt.checkpoint()
        seen.append(cp.load_bytes_sync())
        if len(seen) == 1:
            cp.save_sync(b"0")
            store.fail_once()
        cp.save_later(b"%d" % len(seen))
        return "done"

    assert as_task(is_async, body)() == "done"
    assert seen == [None, b"0"]
    assert Checkpoint.of(key="t").load_bytes_sync() == b"2"


@both
@pytest.mark.usefixtures("_tasks")
def test_a_task_that_fails_has_saved_all_the_same(is_async, store, caplog):
    def body() -> None:
        taskckpt.checkpoint().save_later(b"1").result()
        if failing:
            store.fail_once()
        taskckpt.checkpoint().save_later(b"2")
        raise ValueError("the task's own")

    failing: list[int] = []
    with pytest.raises(ValueError, match="the task's own") as caught:
        as_task(is_async, body, retries=0)()
    assert Checkpoint.of(key="t").load_bytes_sync() == b"2"
    assert not hasattr(caught.value, "__notes__")
    failing.append(1)
    with pytest.raises(ValueError, match="the task's own") as caught:
        as_task(is_async, body, retries=0)()
    assert "CommitUnknownError" in caught.value.__notes__[0]
    assert [one for one in caplog.records if one.levelno == logging.ERROR and one.exc_info]


@both
@pytest.mark.usefixtures("_tasks")
def test_what_was_begun_is_cleared_with_the_rest(is_async, store):
    def body() -> None:
        store.hold()
        threading.Timer(0.1, store.is_open.set).start()
        taskckpt.checkpoint().save_later(b"1")

    as_task(is_async, body, clear_on_success=True)()
    assert Checkpoint.of(key="t").load_bytes_sync() is None


@pytest.mark.usefixtures("_tasks")
def test_the_end_of_an_async_task_does_not_block_the_loop(store):
    @task(key="t")
    async def work() -> None:
        store.hold()
        taskckpt.checkpoint().save_later(b"1")

    async def main() -> None:
        running = asyncio.create_task(work())
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert not running.done()
        store.is_open.set()
        await running

    asyncio.run(main())
    assert Checkpoint.of(key="t").load_bytes_sync() == b"1"


@pytest.mark.usefixtures("_tasks")
def test_what_was_accepted_is_saved_after_ctrl_c_at_the_end(store):
    pending = []

    @task(key="t", retries=0)
    def work() -> None:
        taskckpt.checkpoint().save_sync(b"0")
        store.hold()
        pending.append(taskckpt.checkpoint().save_later(b"1"))
        assert store.arrived.wait(5)
        pending.append(taskckpt.checkpoint().save_later(b"2", policy="queue"))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        work()
    store.is_open.set()
    assert [one.result() for one in pending] == [True, True], "they were asked for before the end"
    assert Checkpoint.of(key="t").load_bytes_sync() == b"2"
