from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import pickle
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import taskckpt
from taskckpt import Checkpoint, TaskContext, _process, checkpoint, context, ctx, engines, task
from taskckpt._log import records as _records
from taskckpt.engines import EngineTask
from taskckpt.errors import (
    AmbiguousIdentityError,
    NoTaskContextError,
    StaleAttemptError,
    UsageError,
    UsageTypeError,
)

HERE = str(Path(__file__))
HANDED_DOWN = {
    f"TASKCKPT_{name}"
    for name in ("BASE", "RUN", "TASK", "ATTEMPT", "KEY", "KEEP", "RANK", "CLAIMS", "PLACE", "AMBIGUOUS")
}


@pytest.fixture(autouse=True)
def _process_as_new(monkeypatch):
    monkeypatch.setattr(_process.process, "implicit_base", None)
    monkeypatch.setattr(_process.process, "contexts", {})
    yield
    assert not _process.process.running, "a task was left behind as running"


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKCKPT_BASE", str(tmp_path / "base"))
    return str(tmp_path / "base")


@pytest.fixture
def engine():
    """An engine that runs whatever ``engine.running`` says."""

    class Engine:
        running: EngineTask | None = None

    made = Engine()
    engines.register("nightly", lambda: made.running)
    yield made
    engines.unregister("nightly")


def here() -> TaskContext:
    """The task that this code certainly is in."""
    found = ctx()
    assert found is not None
    return found


def records_of(cp: Checkpoint):
    log = Path(cp.remote_destination) / "log"
    found = [
        _records.decode(path.read_bytes(), slot=int(path.name.split("-")[1].partition(".")[0]), uri=str(path))
        for path in sorted(log.iterdir(), reverse=True)
    ]
    return [type(record).__name__ for record in found]


def seen_by(thread_target):
    """What a new thread gets from a function, or the exception that it raises there."""
    answers: queue.Queue[Any] = queue.Queue()

    def run():
        try:
            answers.put(thread_target())
        except Exception as error:
            answers.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    return answers.get_nowait()


class Helper:
    """A thread that does what it is told, and stays."""

    def __init__(self):
        self._todo: queue.Queue[Any] = queue.Queue()
        self._done: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _loop(self):
        while (function := self._todo.get()) is not None:
            try:
                self._done.put(function())
            except BaseException as error:
                self._done.put(error)

    def do(self, function):
        self._todo.put(function)
        return self._done.get(timeout=10)

    def close(self):
        self._todo.put(None)
        self._thread.join(10)


@pytest.fixture
def helpers():
    made: list[Helper] = []

    def make():
        made.append(Helper())
        return made[-1]

    yield make
    for helper in made:
        helper.close()


# --- nobody said -------------------------------------------------------------------------------


def test_outside_of_any_task():
    assert ctx() is None
    with pytest.raises(NoTaskContextError) as info:
        checkpoint()
    for way in ("taskckpt.checkpoint('my-task')", "@taskckpt.task", "TASKCKPT_TASK", "Checkpoint(dest)", "pool"):
        assert way in str(info.value)


@pytest.mark.parametrize("key", ["", "  ", 7, b"x"])
def test_a_key_is_a_text(key):
    with pytest.raises(UsageError, match="key="):
        checkpoint(key)


# --- the order of authority --------------------------------------------------------------------


def test_variables(base, monkeypatch):
    monkeypatch.setenv("TASKCKPT_TASK", "train[3]")
    monkeypatch.setenv("TASKCKPT_RUN", "run 7")
    monkeypatch.setenv("TASKCKPT_ATTEMPT", "2")
    current = ctx()
    assert current is not None
    assert (current.run, current.task, current.attempt, current.base) == ("run 7", "train[3]", 2, base)
    assert current.origins == {
        "run": "TASKCKPT_RUN", "task": "TASKCKPT_TASK", "attempt": "TASKCKPT_ATTEMPT", "base": "TASKCKPT_BASE",
    }  # fmt: skip
    assert current.checkpoint is checkpoint()
    assert ctx() is current, "decided once"
    paths = current.checkpoint_paths
    assert paths.checkpoint_path == paths.prev_checkpoint_path == current.checkpoint.remote_destination


def test_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKCKPT_TASK", "train")
    current = ctx()
    assert current is not None
    assert (current.run, current.attempt, current.base) == ("local", None, str(tmp_path / ".taskckpt"))
    assert current.origins == {"run": "made up", "task": "TASKCKPT_TASK", "attempt": "unknown", "base": "made up"}


def test_key_variable_spans_runs(base, monkeypatch):
    monkeypatch.setenv("TASKCKPT_KEY", "nightly")
    places = []
    for run in ("monday", "tuesday"):
        monkeypatch.setenv("TASKCKPT_RUN", run)
        current = ctx()
        assert current is not None
        assert current.key == "nightly"
        places.append(current.checkpoint.remote_destination)
    assert places == [f"{base}/by-key/nightly"] * 2


def test_engine_comes_last(base, monkeypatch, engine):
    engine.running = EngineTask("nightly", run="engine-run", task="engine-task", attempt=4, base="memory://engine")
    current = ctx()
    assert current is not None
    assert (current.run, current.task, current.attempt) == ("engine-run", "engine-task", 4)
    assert current.base == base, "TASKCKPT_BASE is stronger"
    assert current.origins == {"run": "nightly", "task": "nightly", "attempt": "nightly", "base": "TASKCKPT_BASE"}
    monkeypatch.delenv("TASKCKPT_BASE")
    current = ctx()
    assert current is not None
    assert current.base == "memory://engine"
    assert current.origins["base"] == "nightly"
    monkeypatch.setenv("TASKCKPT_RUN", "mine")
    monkeypatch.setenv("TASKCKPT_TASK", "also-mine")
    current = ctx()
    assert current is not None
    assert (current.run, current.task) == ("mine", "also-mine")


def test_arguments_come_first(base, monkeypatch, engine, tmp_path):
    engine.running = EngineTask("nightly", run="engine-run", task="engine-task", attempt=4, base="memory://engine")
    monkeypatch.setenv("TASKCKPT_RUN", "variable-run")
    monkeypatch.setenv("TASKCKPT_TASK", "variable-task")
    monkeypatch.setenv("TASKCKPT_ATTEMPT", "7")

    @task(run="argument-run", base=tmp_path / "argument", key="argument-key")
    def work():
        return ctx()

    current = work()
    assert (current.run, current.task, current.key) == ("argument-run", "argument-key", "argument-key")
    assert current.base == str(tmp_path / "argument")
    assert current.attempt == 0, "of the task itself, not of the process around it"
    assert current.origins == {"run": "argument", "base": "argument", "task": "key=", "attempt": "@task"}


def test_task_comes_before_variables(base, monkeypatch):
    monkeypatch.setenv("TASKCKPT_RUN", "r")
    monkeypatch.setenv("TASKCKPT_TASK", "outer")
    monkeypatch.setenv("TASKCKPT_ATTEMPT", "7")

    @task
    def work(x):
        return ctx()

    current = work(1)
    assert current.run == "r"
    assert current.task.startswith("test_task_comes_before_variables.<locals>.work(x=1) @ ")
    assert current.task.endswith(" <in> outer"), "two tasks in one process never share a place with the outer one"
    assert current.attempt == 0
    assert current.origins["task"] == "@task"
    assert current.checkpoint.remote_destination != checkpoint().remote_destination


def test_key_comes_before_everything(base, monkeypatch):
    monkeypatch.setenv("TASKCKPT_TASK", "outer")
    assert checkpoint("mine").remote_destination == f"{base}/by-key/mine"


@pytest.mark.parametrize("attempt", ["-1", "1.5", "one", "0x1", "1" * 10, "²"])
def test_an_attempt_is_a_number(base, monkeypatch, attempt):
    monkeypatch.setenv("TASKCKPT_TASK", "t")
    monkeypatch.setenv("TASKCKPT_ATTEMPT", attempt)
    with pytest.raises(UsageError, match="TASKCKPT_ATTEMPT"):
        ctx()


@pytest.mark.parametrize(("given", "attempt"), [("0", 0), ("007", 7), (" 3 ", 3), ("999999999", 999999999), ("", None)])
def test_attempts(base, monkeypatch, given, attempt):
    monkeypatch.setenv("TASKCKPT_TASK", "t")
    monkeypatch.setenv("TASKCKPT_ATTEMPT", given)
    assert getattr(ctx(), "attempt", "none") == attempt


@pytest.mark.parametrize("keep", ["0", "-1", "some", "1.5"])
def test_keep_is_a_number_or_all(base, monkeypatch, keep):
    monkeypatch.setenv("TASKCKPT_TASK", "t")
    monkeypatch.setenv("TASKCKPT_KEEP", keep)
    with pytest.raises(UsageError, match="TASKCKPT_KEEP"):
        ctx()


@pytest.mark.parametrize(("given", "keep"), [("1", 1), ("20", 20), ("all", None)])
def test_keeps(base, monkeypatch, given, keep):
    monkeypatch.setenv("TASKCKPT_TASK", "t")
    monkeypatch.setenv("TASKCKPT_KEEP", given)
    assert getattr(ctx(), "keep", "none") == keep


@pytest.mark.parametrize("blank", ["", " ", "''", '""'])
def test_blank_variables_say_nothing(tmp_path, monkeypatch, blank):
    for name in ("BASE", "RUN", "TASK", "KEY"):
        monkeypatch.setenv(f"TASKCKPT_{name}", blank)
    assert ctx() is None
    monkeypatch.setenv("TASKCKPT_TASK", "t")
    current = ctx()
    assert current is not None
    assert (current.run, current.base, current.key) == ("local", str(tmp_path / ".taskckpt"), None)


@pytest.mark.parametrize("name", ["BASE", "RUN", "TASK", "KEY"])
def test_a_template_that_nobody_replaced_is_refused(base, monkeypatch, name):
    """Else all runs of a workflow would share one name, and each other's state."""
    monkeypatch.setenv("TASKCKPT_TASK", "t")
    monkeypatch.setenv(f"TASKCKPT_{name}", "{{workflow.uid}}")
    with pytest.raises(UsageError, match=f"TASKCKPT_{name}"):
        ctx()


# --- the base ----------------------------------------------------------------------------------


def test_the_implicit_base_is_made_absolute_at_first_use(tmp_path, monkeypatch):
    assert checkpoint("one").remote_destination == str(tmp_path / ".taskckpt/by-key/one")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert checkpoint("two").remote_destination == str(tmp_path / ".taskckpt/by-key/two")


def test_a_relative_base_is_absolute_for_children(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKCKPT_BASE", "relative/base")

    @task
    def work():
        monkeypatch.chdir("/")
        return here().base, os.environ["TASKCKPT_BASE"]

    assert work() == (str(tmp_path / "relative/base"),) * 2


def test_an_engine_without_a_base_is_warned_about(tmp_path, engine, caplog):
    engine.running = EngineTask("nightly", run="r", task="t")
    with caplog.at_level(logging.WARNING, "taskckpt"):
        assert ctx() is not None
    (record,) = caplog.records
    message = record.getMessage()
    for said in ("nightly", str(tmp_path / ".taskckpt"), os.uname().nodename, "TASKCKPT_BASE"):
        assert said in message


@pytest.mark.parametrize("how", ["variable", "engine", "no engine"])
def test_no_warning_where_the_base_was_given(tmp_path, engine, caplog, monkeypatch, how):
    if how != "no engine":
        engine.running = EngineTask("nightly", run="r", task="t", base="memory://x" if how == "engine" else None)
    if how == "variable":
        monkeypatch.setenv("TASKCKPT_BASE", str(tmp_path / "base"))
    with caplog.at_level(logging.WARNING, "taskckpt"):
        ctx()
    assert not caplog.records


# --- engines -----------------------------------------------------------------------------------


def test_the_engine_registered_last_is_asked_first(base, engine):
    engine.running = EngineTask("nightly", run="r", task="outer")
    engines.register("inner", lambda: EngineTask("inner", run="r", task="inner"))
    try:
        assert getattr(ctx(), "task", None) == "inner"
    finally:
        engines.unregister("inner")
    assert getattr(ctx(), "task", None) == "outer"


def test_an_engine_may_be_idle(base, engine):
    assert ctx() is None
    assert engines.detect() is None
    engine.running = EngineTask("nightly", run="r", task="t")
    assert getattr(ctx(), "task", None) == "t"


def test_an_engine_that_fails_is_not_passed_over(base):
    def broken():
        raise ZeroDivisionError

    engines.register("broken", broken)
    try:
        with pytest.raises(UsageError, match=r"engine 'broken' failed .* ZeroDivisionError"):
            ctx()
    finally:
        engines.unregister("broken")


def test_engines_are_checked():
    with pytest.raises(UsageError, match="callable"):
        engines.register("x", 7)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no engine 'x'"):
        engines.unregister("x")


def test_engine_tasks_one_after_another_in_one_worker(base, engine):
    places = []
    for number in range(3):
        engine.running = EngineTask("nightly", run="r", task=f"t{number}", attempt=0)
        checkpoint().save_sync(b"%d" % number)
        places.append(checkpoint().remote_destination)
    assert len(set(places)) == 3
    engine.running = EngineTask("nightly", run="r", task="t1", attempt=1)
    assert checkpoint().load_bytes_sync() == b"1"


def test_another_attempt_in_the_same_worker_claims_anew(base, engine):
    engine.running = EngineTask("nightly", run="r", task="t", attempt=0)
    first = checkpoint()
    first.save_sync(b"0")
    engine.running = EngineTask("nightly", run="r", task="t", attempt=1)
    second = checkpoint()
    assert second is not first
    assert second.load_bytes_sync() == b"0"
    with pytest.raises(StaleAttemptError):
        first.save_sync(b"late")


# --- keys --------------------------------------------------------------------------------------


def test_a_key_twice_is_one_attempt(base):
    one, two = checkpoint("nightly"), checkpoint("nightly")
    one.save_sync(b"1")
    assert two.load_bytes_sync() == b"1"
    two.save_sync(b"2")
    one.save_sync(b"3")
    assert records_of(one).count("Claim") == 1


def test_a_key_spans_runs(base, monkeypatch):
    monkeypatch.setenv("TASKCKPT_RUN", "monday")
    checkpoint("nightly").save_sync(b"1")
    monkeypatch.setenv("TASKCKPT_RUN", "tuesday")
    assert checkpoint("nightly").load_bytes_sync() == b"1"


def test_the_key_of_the_task_around_is_the_task_around(base):
    @task(key="nightly")
    def work():
        assert checkpoint("nightly") is checkpoint()
        checkpoint().save_sync(b"1")
        checkpoint("nightly").save_sync(b"2")
        return checkpoint("other").remote_destination

    assert work() == f"{base}/by-key/other"


@pytest.mark.parametrize("key", ["a/b", "../x", "A", "ä" * 200, "by-key", ".", "{x}"])
def test_any_text_is_a_key(base, key):
    cp = checkpoint(key)
    cp.save_sync(key.encode())
    assert cp.load_bytes_sync() == key.encode()
    assert Path(cp.remote_destination).parent == Path(base) / "by-key"


# --- threads -----------------------------------------------------------------------------------


def test_threads_of_a_task_are_in_it(base):
    @task
    def work():
        assert seen_by(ctx) is ctx()
        assert seen_by(checkpoint) is checkpoint()
        assert seen_by(lambda: seen_by(ctx)) is ctx()
        with ThreadPoolExecutor(2) as pool:
            assert set(map(id, pool.map(lambda _: ctx(), range(8)))) == {id(ctx())}
        return True

    assert work()


def test_threads_save_for_their_task(base):
    @task
    def work():
        seen_by(lambda: checkpoint().save_sync(b"from a thread"))
        return checkpoint().load_bytes_sync(), records_of(checkpoint())

    assert work() == (b"from a thread", ["Claim", "Commit"][::1])


def test_pool_threads_older_than_the_task_do_not_guess(base):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()

        @task
        def work():
            return pool.submit(ctx).result(), pool.submit(checkpoint).exception()

        none, error = work()
    assert none is None
    assert isinstance(error, NoTaskContextError)
    assert "Threads of a pool that is older than the task do not see it" in str(error)


def test_older_threads_can_be_handed_the_context(base):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()

        @task
        def work():
            return pool.submit(contextvars.copy_context().run, ctx).result() is ctx()

        assert work()


def test_older_threads_fall_back_to_the_process(base, monkeypatch):
    monkeypatch.setenv("TASKCKPT_TASK", "outer")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()

        @task
        def work():
            return pool.submit(ctx).result()

        assert work().task == "outer"


def test_threads_left_by_an_earlier_task_do_not_join_the_next(base, helpers):
    @task
    def first():
        helper = helpers()
        assert helper.do(ctx) is ctx()
        return helper

    @task
    def second(helper):
        return helper.do(ctx), isinstance(helper.do(checkpoint), NoTaskContextError)

    helper = first()
    assert helper.do(ctx) is None
    assert task(key="second")(lambda: (helper.do(ctx), type(helper.do(checkpoint))))() == (None, NoTaskContextError)


def test_threads_of_the_outer_task_stay_with_it_while_an_inner_one_runs(base, helpers):
    @task
    def inner(helper):
        return helper.do(ctx), seen_by(ctx), ctx()

    @task
    def outer():
        helper = helpers()
        helper.do(int)
        seen, new, own = task(key="inner")(lambda: (helper.do(ctx), seen_by(ctx), ctx()))()
        assert seen is ctx(), "it was started by the outer task"
        assert new is own, "only the inner one can have started this"
        assert seen_by(ctx) is ctx()
        return True

    assert outer()


def test_two_tasks_in_parallel_threads_keep_apart(base):
    barrier = threading.Barrier(2, timeout=10)

    @task
    def work(number):
        barrier.wait()
        cp = checkpoint()
        cp.save_sync(b"%d" % number)
        barrier.wait()
        unclear = seen_by(ctx)
        barrier.wait()
        return here().task, cp.load_bytes_sync(), unclear

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(work, range(2))
    assert (one[1], two[1]) == (b"0", b"1")
    assert one[0] != two[0]
    for _, _, unclear in (one, two):
        assert isinstance(unclear, AmbiguousIdentityError), "a thread of which of the two?"
        assert "copy_context" in str(unclear.hint)


def test_a_task_and_one_in_its_own_thread_are_parallel_too(base, helpers):
    """The outer one goes on, so a new thread may be of either."""

    @task
    def outer():
        helper, started, done = helpers(), threading.Event(), threading.Event()

        @task(key="inner")
        def inner():
            started.set()
            done.wait(10)

        helper._todo.put(inner)
        started.wait(10)
        try:
            return seen_by(ctx), os.environ.get("TASKCKPT_AMBIGUOUS"), os.environ.get("TASKCKPT_TASK")
        finally:
            done.set()
            helper._done.get(timeout=10)

    unclear, told, told_task = outer()
    assert isinstance(unclear, AmbiguousIdentityError)
    assert (told, told_task) == ("2", None)


# --- asyncio -----------------------------------------------------------------------------------


def test_coroutines_of_a_task_are_in_it(base):
    @task
    async def work():
        own = ctx()

        async def look():
            await asyncio.sleep(0)
            return ctx()

        found = [await look(), await asyncio.create_task(look()), await asyncio.to_thread(ctx), seen_by(ctx)]
        found += await asyncio.gather(look(), look())
        return all(one is own for one in found)

    assert asyncio.run(work())


def test_tasks_in_one_loop_keep_apart(base):
    async def main():
        turn = asyncio.Barrier(3)

        @task
        async def work(number):
            async with turn:
                await checkpoint().save(b"%d" % number)
            async with turn:
                assert await asyncio.to_thread(lambda: checkpoint().load_bytes_sync()) == b"%d" % number
            return here().task

        async def bystander():
            async with turn:
                pass
            async with turn:
                return ctx()

        *tasks, none = await asyncio.gather(work(0), work(1), bystander())
        assert len(set(tasks)) == 2
        assert none is None, "a coroutine beside the task is not in it"

    asyncio.run(main())


def test_a_task_that_runs_beside_its_caller(base):
    """The outer coroutine goes on while the inner one runs, so a plain thread may be of either."""

    async def main():
        @task
        async def outer():
            ready, done = asyncio.Event(), asyncio.Event()

            @task(key="inner")
            async def inner():
                ready.set()
                await done.wait()

            beside = asyncio.create_task(inner())
            await ready.wait()
            unclear = seen_by(ctx)
            done.set()
            await beside
            return unclear, seen_by(ctx) is ctx()

        return await outer()

    unclear, clear = asyncio.run(main())
    assert isinstance(unclear, AmbiguousIdentityError)
    assert clear


def test_a_task_that_its_caller_waits_for(base):
    async def main():
        @task(key="inner")
        async def inner():
            return seen_by(ctx) is ctx(), os.environ["TASKCKPT_KEY"]

        @task
        async def outer():
            return await inner()

        return await outer()

    assert asyncio.run(main()) == (True, "inner")


def test_sync_and_async_tasks_nest(base):
    @task(key="c")
    def innermost():
        return here().task

    @task(key="b")
    async def inner():
        return innermost(), here().task

    @task(key="a")
    def outer():
        return asyncio.run(inner()), here().task

    assert outer() == (("c", "b"), "a")


# --- nested ------------------------------------------------------------------------------------


def test_nested_tasks_have_places_of_their_own(base):
    @task
    def outer():
        checkpoint().save_sync(b"outer")
        contexts = []
        for number in (1, 2):

            @task(key=f"inner{number}")
            def inner(x):
                checkpoint().save_sync(b"inner%d" % x)
                return here()

            contexts.append(inner(number))
        assert checkpoint().load_bytes_sync() == b"outer"
        return ctx(), *contexts

    contexts = outer()
    assert len({one.checkpoint.remote_destination for one in contexts}) == 3
    assert contexts[1].parent is contexts[0]


@task
def leaf(x):
    return ctx()


@task
def branch(name):
    return leaf(1)


def test_the_same_task_below_different_ones_has_different_places(base):
    assert leaf(1).place != branch("a").place != branch("b").place != leaf(1).place
    assert branch("a").place == branch("a").place


def test_a_nested_task_takes_run_and_base_from_the_outer_one(tmp_path):
    @task(run="r", base=tmp_path / "one", storage_options={"auto_mkdir": True})
    def outer():
        return leaf(1)

    inner = outer()
    assert (inner.run, inner.base, inner.origins["run"], inner.origins["base"]) == (
        "r", str(tmp_path / "one"), "argument", "argument",
    )  # fmt: skip
    assert inner.storage_options == {"auto_mkdir": True}


def test_a_base_of_its_own_does_not_change_the_run(tmp_path):
    @task(base=tmp_path / "two")
    def inner():
        return ctx()

    @task(run="r", base=tmp_path / "one", storage_options={"auto_mkdir": True})
    def outer():
        return inner()

    made = outer()
    assert (made.run, made.base) == ("r", str(tmp_path / "two"))
    assert made.origins["run"] == "argument", "so the end of it clears nothing"
    assert made.storage_options == {}, "credentials are for the store that they were given for"


# --- what children find in the environment -----------------------------------------------------


def now() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("TASKCKPT_")}


def test_the_environment_says_which_task_runs(base):
    @task(keep=7, run="r")
    def work():
        return ctx(), now()

    current, told = work()
    assert told.pop("TASKCKPT_CLAIMS").count(":") == 1
    assert told == {
        "TASKCKPT_BASE": base,
        "TASKCKPT_RUN": "r",
        "TASKCKPT_TASK": current.task,
        "TASKCKPT_ATTEMPT": "0",
        "TASKCKPT_KEEP": "7",
    }


def test_the_environment_is_restored(base, monkeypatch):
    monkeypatch.setenv("TASKCKPT_RUN", "r")
    monkeypatch.setenv("TASKCKPT_TASK", "outer")
    monkeypatch.setenv("TASKCKPT_OTHER", "x")
    assert ctx() is not None  # from now on, children of this process join its claim
    before = dict(os.environ)

    @task(key="k", keep=None)
    def work(fail):
        assert now()["TASKCKPT_KEY"] == "k"
        assert now()["TASKCKPT_KEEP"] == "all"
        assert "TASKCKPT_TASK" not in now(), "a key is stronger, but a reader should not have to know that"
        if fail:
            raise fail

    work(None)
    assert dict(os.environ) == before
    for error in (KeyboardInterrupt, SystemExit(3)):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            work(error)
        assert dict(os.environ) == before


def test_the_environment_after_nested_tasks_is_the_outer_ones(base):
    @task(key="inner")
    def inner():
        return now()

    @task(key="outer")
    def outer():
        before = now()
        within = inner()
        assert now() == before
        return within, before

    within, before = outer()
    assert (within["TASKCKPT_KEY"], before["TASKCKPT_KEY"]) == ("inner", "outer")
    assert set(before["TASKCKPT_CLAIMS"].split()) < set(within["TASKCKPT_CLAIMS"].split())
    assert "TASKCKPT_KEY" not in now()


def test_attempts_are_told(base):
    told = []

    @task(retries=2, wait_initial_s=0, wait_max_s=0)
    def work():
        told.append((here().attempt, now()["TASKCKPT_ATTEMPT"], now()["TASKCKPT_CLAIMS"]))
        raise OSError

    with pytest.raises(OSError):
        work()
    assert [(one, two) for one, two, _ in told] == [(0, "0"), (1, "1"), (2, "2")]
    assert len({claims for _, _, claims in told}) == 3, "each attempt claims anew"


def test_keys_used_on_the_way_are_handed_down_as_well(base):
    @task(key="outer")
    def outer():
        checkpoint("side").save_sync(b"1")
        own = here().environ()["TASKCKPT_CLAIMS"]
        return own, task(key="inner")(lambda: now()["TASKCKPT_CLAIMS"])()

    own, inner = outer()
    assert len(own.split()) == 2
    assert len(inner.split()) == 3
    assert set(own.split()) < set(inner.split())
    assert "TASKCKPT_CLAIMS" not in now(), "the key's too: it was that attempt's, and the attempt has ended"


def test_environ_says_everything(base):
    @task(key="k")
    def work():
        return here().environ()

    given = work()
    assert set(given) == HANDED_DOWN
    assert all(isinstance(value, str) for value in given.values())
    assert (given["TASKCKPT_KEY"], given["TASKCKPT_TASK"], given["TASKCKPT_AMBIGUOUS"]) == ("k", "", "")


def test_ambiguous_parents_say_so(base, monkeypatch):
    monkeypatch.setenv("TASKCKPT_AMBIGUOUS", "2")
    with pytest.raises(AmbiguousIdentityError, match="2 tasks at once") as info:
        ctx()
    assert "environ()" in str(info.value.hint)
    assert checkpoint.__name__
    current = leaf_given_its_environment(base, monkeypatch)
    assert current.task == "mine"


def leaf_given_its_environment(base, monkeypatch):
    """What the hint says to do."""
    for name, value in TaskContext("r", "mine", 1, base).environ().items():
        monkeypatch.setenv(name, value)
    found = ctx()
    assert found is not None
    return found


# --- contexts as values ------------------------------------------------------------------------


def test_a_context_is_pickled_with_its_claim(base):
    @task
    def work():
        here().checkpoint.save_sync(b"1")
        again = pickle.loads(pickle.dumps(ctx()))
        assert again.place == here().place
        assert again.checkpoint.load_bytes_sync() == b"1"
        again.checkpoint.save_sync(b"2")
        here().checkpoint.save_sync(b"3")
        return records_of(here().checkpoint)

    assert work().count("Claim") == 1


def test_a_checkpoint_is_never_none_and_always_true(base):
    @task
    def work():
        return here().checkpoint

    assert work()
    assert isinstance(work(), Checkpoint)


def test_secrets_are_not_shown(base):
    @task(storage_options={"secret": "hunter2"})
    def work():
        return repr(ctx()), repr(here().checkpoint)

    assert "hunter2" not in "".join(work())


def test_of_looks_at_other_tasks(base, monkeypatch):
    monkeypatch.setenv("TASKCKPT_RUN", "r")
    monkeypatch.setenv("TASKCKPT_TASK", "train")
    own = checkpoint()
    own.save_sync(b"1")
    checkpoint("k").save_sync(b"2")
    assert Checkpoint.of(task="train").load_bytes_sync() == b"1"
    assert Checkpoint.of(task="train", run="r").load_bytes_sync() == b"1"
    assert Checkpoint.of(key="k").load_bytes_sync() == b"2"
    own.save_sync(b"3")


def test_wrong_calls_of_task():
    with pytest.raises(UsageTypeError):
        task(7)  # type: ignore[call-overload]
    assert taskckpt.task is task
    assert sys.modules["taskckpt.context"] is context
