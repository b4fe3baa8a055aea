from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import logging
import multiprocessing
import pickle
import threading
import time
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskckpt import TaskContext, _identity, _process, checkpoint, ctx, task
from taskckpt._identity import identity_of
from taskckpt._operation import Stopped
from taskckpt.errors import (
    AmbiguousIdentityError,
    CommitUnknownError,
    CorruptCheckpointError,
    DeniedError,
    NotFoundError,
    SourceChangedError,
    StaleAttemptError,
    StorageFullError,
    UnavailableError,
    UnsupportedFormatError,
    UsageError,
    UsageTypeError,
)
from taskckpt.testing import instant_retries, intercepted

HERE = __name__


@pytest.fixture(autouse=True)
def _own_base(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKCKPT_BASE", str(tmp_path / "base"))
    monkeypatch.setattr(_process.process, "contexts", {})
    with instant_retries():
        yield


def here() -> TaskContext:
    """The task that this code certainly is in."""
    found = ctx()
    assert found is not None
    return found


def attempts_of(function, *args):
    """How often a task was tried, and what came of it."""
    try:
        return function(*args)
    except BaseException as error:
        return error


# --- retries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_retries_are_counted(retries):
    tried = []

    @task(retries=retries)
    def work():
        tried.append(here().attempt)
        raise OSError("boom")

    with pytest.raises(OSError, match="boom"):
        work()
    assert tried == list(range(retries + 1))


def test_three_retries_unless_told_otherwise():
    tried = []

    @task
    def bare():
        tried.append("bare")
        raise OSError

    @task()
    def called():
        tried.append("called")
        raise OSError

    for one in (bare, called):
        with pytest.raises(OSError):
            one()
    assert tried == ["bare"] * 4 + ["called"] * 4


def test_the_last_exception_is_the_original_one():
    raised: list[Exception] = []

    class MineError(Exception):
        pass

    @task(retries=2)
    def work():
        raised.append(MineError(len(raised)))
        raise raised[-1]

    with pytest.raises(MineError) as info:
        work()
    assert info.value is raised[-1]
    assert info.value.args == (2,)
    assert info.value.__cause__ is None
    assert "work" in [entry.name for entry in info.traceback], "the traceback leads to the user's line"


def test_a_retry_goes_on_where_the_last_attempt_stopped():
    resumed = []

    @task(retries=3)
    def work():
        cp = checkpoint()
        step = int(cp.load_bytes_sync() or b"0")
        resumed.append(step)
        while step < 10:
            step += 1
            cp.save_sync(b"%d" % step)
            if step in (3, 6):
                raise OSError
        return step

    assert work() == 10
    assert resumed == [0, 3, 6]


def test_coroutines_are_retried_as_well():
    resumed = []

    @task(retries=3)
    async def work(target):
        cp = checkpoint()
        step = int(await cp.load_bytes() or b"0")
        resumed.append((here().attempt, step))
        while step < target:
            step += 1
            await cp.save(b"%d" % step)
            if step in (3, 6):
                raise OSError
        return step

    assert inspect.iscoroutinefunction(work)
    assert asyncio.run(work(10)) == 10
    assert resumed == [(0, 0), (1, 3), (2, 6)]


def test_failed_attempts_are_told(caplog):
    @task(retries=1)
    def work():
        raise OSError("boom")

    with caplog.at_level(logging.WARNING, "taskckpt"), pytest.raises(OSError):
        work()
    (record,) = caplog.records
    assert "Attempt 1 of 2" in record.getMessage()
    assert "OSError: boom" in record.getMessage()


# --- on= ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on", "error", "tries"),
    [
        (OSError, OSError(), 4),
        (OSError, ConnectionResetError(), 4),
        (OSError, ValueError(), 1),
        ((OSError, ValueError), ValueError(), 4),
        ((OSError, ValueError), KeyError(), 1),
        (lambda error: "again" in str(error), KeyError("again"), 4),
        (lambda error: "again" in str(error), KeyError("never"), 1),
        (lambda error: isinstance(error, OSError), KeyboardInterrupt(), 1),
        (lambda _: True, KeyboardInterrupt(), 1),
        (Exception, KeyboardInterrupt(), 1),
        (Exception, SystemExit(3), 1),
        (Exception, GeneratorExit(), 1),
        (Exception, Stopped(), 1),
        (Exception, asyncio.CancelledError(), 1),
        ((), OSError(), 1),
    ],
)
@pytest.mark.parametrize("style", ["sync", "async"])
def test_which_exceptions_are_retried(on, error, tries, style):
    tried = []

    @task(on=on, key="on")
    def work():
        tried.append(1)
        raise error

    @task(on=on, key="on")
    async def awork():
        tried.append(1)
        raise error

    with pytest.raises(type(error)) as info:
        work() if style == "sync" else in_a_loop(awork)
    assert info.value is error
    assert len(tried) == tries


def in_a_loop(function):
    """Without asyncio.run, which turns some exceptions into others."""
    outcome: list[BaseException] = []

    async def run():
        try:
            await function()
        except BaseException as error:
            outcome.append(error)

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    raise outcome[0]


@pytest.mark.parametrize(
    "on", ["OSError", 7, None, [OSError], KeyboardInterrupt, BaseException, (OSError, "x"), (int,)]
)
def test_wrong_on_is_noticed_at_once(on):
    """Not when the task fails, where it would hide why."""
    with pytest.raises(UsageTypeError, match="on="):
        task(on=on)


@pytest.mark.parametrize("retries", [-1, 1.5, "3", None, True])
def test_wrong_retries_are_noticed_at_once(retries):
    with pytest.raises(UsageError, match="retries="):
        task(retries=retries)


@pytest.mark.parametrize("option", ["wait_initial_s", "wait_max_s"])
def test_negative_waits_are_noticed_at_once(option):
    with pytest.raises(UsageError, match="negative"):
        task(**{option: -1})  # type: ignore[call-overload]


def test_unknown_options_are_noticed_at_once():
    with pytest.raises(TypeError, match="retry"):
        task(retry=3)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "error",
    [
        StaleAttemptError("x"), CorruptCheckpointError("x"), DeniedError("x"), UsageError("x"), UsageTypeError("x"),
        NotFoundError("x"), UnsupportedFormatError("x"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("on", [Exception, OSError, lambda _: True])
def test_errors_of_ours_that_stay_are_never_retried(error, on):
    tried = []

    @task(on=on)
    def work():
        tried.append(1)
        raise error

    with pytest.raises(type(error)):
        work()
    assert len(tried) == 1


@pytest.mark.parametrize(
    "error", [UnavailableError("x"), StorageFullError("x"), CommitUnknownError("x"), SourceChangedError("x")]
)
def test_errors_of_ours_that_pass_are_retried(error):
    tried = []

    @task(retries=2)
    def work():
        tried.append(1)
        raise error

    with pytest.raises(type(error)):
        work()
    assert len(tried) == 3


def test_on_decides_about_our_passing_errors_too():
    tried = []

    @task(on=ValueError)
    def work():
        tried.append(1)
        raise UnavailableError("x")

    with pytest.raises(UnavailableError):
        work()
    assert len(tried) == 1


def test_a_store_that_comes_back_is_met_by_a_retry():
    down = [True, True]

    def hook(when, verb, keys):
        if when == "before" and verb == "create" and down:
            down.pop()
            raise UnavailableError("down")

    @task(retries=3)
    def work():
        checkpoint().save_sync(b"1")
        return here().attempt

    with intercepted(hook):
        assert work() == 2


# --- waiting -----------------------------------------------------------------------------------


def test_waiting_doubles_with_jitter_up_to_a_limit(monkeypatch):
    from taskckpt._testing import switches

    monkeypatch.setattr(switches, "instant_retries", False)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    @task(retries=6, wait_initial_s=1, wait_max_s=8)
    def work():
        raise OSError

    with pytest.raises(OSError):
        work()
    assert len(waits) == 6
    for wait, expected in zip(waits, [1, 2, 4, 8, 8, 8], strict=True):
        assert expected <= wait <= expected + 1


@pytest.mark.parametrize("style", ["sync", "async"])
def test_instant_retries_take_no_time(style):
    @task(retries=3, wait_initial_s=1000, wait_max_s=1000)
    def work():
        raise OSError

    @task(retries=3, wait_initial_s=1000, wait_max_s=1000)
    async def awork():
        raise OSError

    began = time.monotonic()
    with pytest.raises(OSError):
        work() if style == "sync" else asyncio.run(awork())
    assert time.monotonic() - began < 5


def test_instant_retries_are_for_inside_only():
    from taskckpt._testing import switches

    with instant_retries(), instant_retries():
        assert switches.instant_retries
    assert switches.instant_retries, "this test's own fixture"


# --- what may be a task ------------------------------------------------------------------------


def test_generators_are_refused():
    def generator():
        yield 1

    async def async_generator():
        yield 1

    for one in (generator, async_generator):
        with pytest.raises(UsageTypeError, match="generator"):
            task(one)
        with pytest.raises(UsageTypeError, match="generator"):
            task(retries=1)(one)


@pytest.mark.parametrize("what", [7, "name", None])
def test_what_is_no_function_is_refused(what):
    if what is None:
        assert callable(task(what)), "the same as task()"  # type: ignore[call-overload]
        return
    with pytest.raises(UsageTypeError, match="options have names"):
        task(what)


def test_metadata_stays():
    @task(retries=1)
    def work(x: int, *, y: str = "a") -> float:
        """What it does."""
        return 1.0

    assert work.__name__ == "work"
    assert work.__doc__ == "What it does."
    assert work.__module__ == __name__
    assert list(inspect.signature(work).parameters) == ["x", "y"]
    assert inspect.unwrap(work) is not work


@task
def importable(x):
    return x + 1


def test_decorated_functions_are_pickled_by_name():
    assert pickle.loads(pickle.dumps(importable)) is importable
    assert importable(1) == 2


def test_arguments_and_result_pass_through():
    @task(key="x")
    def work(*args, **kwargs):
        return args, kwargs

    marker = object()
    assert work(marker, a=marker) == ((marker,), {"a": marker})


def test_wrong_arguments_are_a_type_error():
    @task
    def work(x):
        return x

    with pytest.raises(TypeError):
        work()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        work(1, 2)  # type: ignore[call-arg]


# --- identity ----------------------------------------------------------------------------------


def f(a, b=2, *rest, c=None, **more):
    return ctx()


def name(*args, **kwargs):
    return identity_of(f, args, kwargs)


def test_an_identity_reads_well():
    assert name(1, c="x") == f'f(a=1, b=2, rest=(), c="x", more={{}}) @ {__name__}'.replace("rest=()", "rest=(,)")


def test_equal_calls_share():
    same = {name(1), name(a=1), name(1, 2), name(1, b=2), name(b=2, a=1), name(1, c=None)}
    assert len(same) == 1
    assert name(1, 2, 3, c=4, x=5, y=6) == name(1, 2, 3, y=6, x=5, c=4)
    assert name({"a": 1, "b": 2}) == name({"b": 2, "a": 1})
    assert name({3, 1, 2}) == name({2, 3, 1})
    assert name(Path("a") / "b") == name(Path("a/b"))


def test_different_calls_never_share():
    different = [
        1, 1.0, True, "1", b"1", None, 0, 0.0, False, "", b"", "None", "True", 2, -1, 1e300, float("inf"),
        float("nan"),
        [], (), {}, set(), frozenset(), [1], (1,), {1}, frozenset({1}), {1: 1}, [[1]], [(1,)], ([1],), [1, 1], [[1], 1],
        "a", ["a"], "['a']", '["a"]', ["a", "b"], ["a, b"], ['a", "b'],
        {"a": "b"}, {"a": {"b": 1}},
        {"a: b": 1}, {"a": "b: 1"},
        Path("a"), PurePosixPath("b"), "Path('a')", 'Path("a")', "a\n", "a\\n",
        "é", "e\u0301", "\ud800", b"\xff", "\xff",
        {1: "a"}, {1.0: "a"}, {True: "a"}, {"1": "a"}, {"a": 1, "b": 2}, {"a": 2, "b": 1}, {None: 1}, {(1, 2): 3},
        {"1", 1}, {"1"},
    ]  # fmt: skip
    names = [name(value) for value in different]
    assert len(set(names)) == len(different), [one for one in names if names.count(one) > 1]
    assert name(1, 2, 3) != name(1, 2, x=3) != name(1, 2, c=3)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


def exactly(value):
    """A stand-in for ``type(value) and value``, all the way down; dictionaries without their order."""
    if isinstance(value, dict):
        return dict, frozenset((exactly(key), exactly(inner)) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(exactly, value))
    return type(value), str(value) if isinstance(value, float) else value


@settings(max_examples=500)
@given(plain, plain)
def test_identity_is_equality_with_types(one, two):
    assert (name(one) == name(two)) == (exactly(one) == exactly(two))


def test_what_is_not_plain_needs_a_key():
    class Model:
        pass

    class Text(str):
        __slots__ = ()

    class Number(int):
        pass

    for value in (Model(), Text("a"), Number(1), object(), len, int, 1j, range(3), bytearray(b"a"), iter([])):
        with pytest.raises(UsageError, match=r"argument a is a \w+") as info:
            name(value)
        assert "key=" in str(info.value.hint)


@pytest.mark.parametrize(
    ("args", "kwargs", "named"),
    [((1, object()), {}, "b"), ((1, 2, [object()]), {}, r"rest\[0\]\[0\]"), ((1,), {"c": {"x": object()}}, r"c\['x'\]"),
     ((1,), {"z": object()}, r"more\['z'\]"), (((1, (2, {3, 4.5, None}, object())),), {}, r"a\[1\]\[2\]")],
)  # fmt: skip
def test_the_argument_that_is_not_plain_is_named(args, kwargs, named):
    with pytest.raises(UsageError, match=f"argument {named} is a object"):
        name(*args, **kwargs)


def test_functions_of_the_same_name_in_different_places():
    class A:
        @staticmethod
        def work():
            return ctx()

    class B:
        @staticmethod
        def work():
            return ctx()

    assert task(A.work)().place != task(B.work)().place


def test_methods_need_a_key():
    class Trainer:
        def __init__(self, name):
            self.name = name

        @task
        def plain(self):
            return ctx()

        @task(key=lambda self, step: f"{self.name}-{step}")
        def keyed(self, step):
            return here().key

        @staticmethod
        @task
        def static(x):
            return here().task

    with pytest.raises(UsageError, match="argument self is a Trainer"):
        Trainer("a").plain()
    assert Trainer("a").keyed(3) == "a-3"
    assert Trainer("b").keyed(step=3) == "b-3"
    assert "Trainer.static(x=1)" in Trainer.static(1)


@pytest.mark.parametrize("key", ["", " ", None, 7, ["a"]])
def test_a_key_function_must_give_a_text(key):
    @task(key=lambda: key)
    def work():
        pytest.fail("ran without a key")

    with pytest.raises(UsageError, match="key="):
        work()


def test_what_has_no_stable_name_needs_a_key():
    class Callable:
        def __call__(self):
            return ctx()

    for one in (lambda: f(1), functools.partial(f, 1), Callable()):
        with pytest.raises(UsageError, match="no stable name") as info:
            task(one)()
        assert "key=" in str(info.value.hint)
        assert task(key="named")(one)().key == "named"


# --- closures ----------------------------------------------------------------------------------


def test_closures_in_a_loop_are_tasks_of_their_own():
    results = []

    def main():
        for number in range(3):

            @task
            def work():
                cp = checkpoint()
                results.append((number, cp.load_bytes_sync()))  # noqa: B023 - that is what users do
                cp.save_sync(b"%d" % number)  # noqa: B023
                raise RuntimeError

            with pytest.raises(RuntimeError):
                work()

    with instant_retries():
        main()
    assert results == [(n, saved) for n in range(3) for saved in [None] + [b"%d" % n] * 3]


def test_closures_over_constants_are_told_apart_in_every_process():
    def make(number):
        @task
        def work():
            current = ctx()
            assert current
            return number, current.task

        return work

    one, two, again = make(1), make(2), make(1)
    assert one() == again() != two()


def test_closures_over_objects_are_ambiguous_while_both_live():
    def make(model):
        @task
        def work():
            return model

        return work

    one, two = make(object()), make(object())
    one()
    with pytest.raises(AmbiguousIdentityError):
        two()


def test_closures_that_arguments_or_keys_tell_apart():
    results = []
    for number in range(3):

        @task
        def by_default(number=number):
            results.append(number)

        @task
        def by_argument(x):
            results.append(number)  # noqa: B023

        @task(key=f"by-key-{number}")
        def by_key():
            results.append(number)  # noqa: B023

        by_default()
        by_argument(number)
        by_key()
    assert results == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_program_that_calls_its_main_again():
    """A loop around main() in one process: each time the same task, with new objects around it."""
    seen = []

    def main(folder):
        model, counter = object(), 0

        @task(clear_on_success=False)
        def work():
            nonlocal counter
            counter += 1
            seen.append((checkpoint().load_bytes_sync(), counter, bool(model), folder))
            checkpoint().save_sync(b"%d" % len(seen))

        work()
        work()

    for _ in range(2):
        main("x")
        gc.collect()
    assert [(one, two) for one, two, *_ in seen] == [(None, 1), (b"1", 2), (b"2", 1), (b"3", 2)]


def test_the_same_place_elsewhere_is_no_clash(tmp_path):
    def main(folder):
        @task(base=folder)
        def work():
            return folder

        return work()

    assert [main(tmp_path / "a"), main(tmp_path / "b")] == [tmp_path / "a", tmp_path / "b"]


def test_recursive_and_mutual_functions_are_one():
    def main():
        def helper():
            return 1

        @task
        def work(n):
            return work(n - 1) if n else helper()

        return work

    one, two = main(), main()
    assert one(2) == two(2) == 1


def test_two_functions_of_one_name():
    def first():
        def work():
            return ctx()

        return task(work)

    namespace: dict[str, Any] = {"__name__": __name__, "ctx": ctx, "task": task}
    exec("@task\ndef twice():\n    return ctx()\none = twice\n@task\ndef twice():\n    return ctx(), 2\n", namespace)
    namespace["one"]()
    with pytest.raises(AmbiguousIdentityError):
        namespace["twice"]()
    assert first()() is not None


def test_a_module_that_was_changed_and_loaded_again():
    for number in (1, 2):
        namespace: dict[str, Any] = {"__name__": "notebook_helpers", "task": task}
        exec(f"@task\ndef work():\n    return {number}\n", namespace)
        assert namespace["work"]() == number
        del namespace
        gc.collect()


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(_identity, "_MOST_KNOWN", 10)
    monkeypatch.setattr(_identity, "_known", type(_identity._known)())
    for number in range(30):
        f_task(number)
    assert len(_identity._known) == 10


f_task = task(f)


# --- the end of a task -------------------------------------------------------------------------


@task
def saver(**options):
    cp = checkpoint()
    found = cp.load_bytes_sync()
    cp.save_sync(b"1")
    return found


def run_twice(**options):
    work = task(**options)(inspect.unwrap(saver))
    assert work() is None
    return work()


def test_a_task_that_ended_well_starts_afresh():
    assert run_twice() is None


@pytest.mark.parametrize("options", [{"key": "k"}, {"run": "r"}, {"clear_on_success": False}, {"key": "k", "run": "r"}])
def test_state_stays_where_somebody_named_the_task(options):
    assert run_twice(**options) == b"1"


@pytest.mark.parametrize("options", [{"key": "k"}, {"run": "r"}, {}])
def test_clear_on_success_overrides(options):
    assert run_twice(clear_on_success=True, **options) is None


def test_state_stays_where_the_run_was_given(monkeypatch):
    monkeypatch.setenv("TASKCKPT_RUN", "r")
    assert run_twice() == b"1"


def test_state_stays_below_a_task_of_a_named_run():
    @task(run="r", key="outer")
    def outer():
        return run_twice()

    assert outer() == b"1"


@pytest.mark.parametrize("style", ["sync", "async"])
def test_state_stays_when_retries_are_exhausted(style):
    seen = []

    @task(retries=1, key=None)
    def work():
        seen.append(checkpoint().load_bytes_sync())
        checkpoint().save_sync(b"%d" % len(seen))
        raise OSError

    @task(retries=1)
    async def awork():
        seen.append(await checkpoint().load_bytes())
        await checkpoint().save(b"%d" % len(seen))
        raise OSError

    for _ in range(2):
        with pytest.raises(OSError):
            work() if style == "sync" else asyncio.run(awork())
    assert seen == [None, b"1", b"2", b"3"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_task_goes_on_next_time(error):
    seen = []

    @task
    def work():
        seen.append(checkpoint().load_bytes_sync())
        checkpoint().save_sync(b"1")
        if len(seen) == 1:
            raise error
        return "done"

    with pytest.raises(error):
        work()
    assert ctx() is None
    assert work() == "done"
    assert seen == [None, b"1"]


def test_a_cancelled_coroutine_goes_on_next_time():
    seen = []

    async def main():
        saved = asyncio.Event()

        @task
        async def work():
            seen.append(await checkpoint().load_bytes())
            await checkpoint().save(b"1")
            saved.set()
            if len(seen) == 1:
                await asyncio.sleep(60)

        running = asyncio.create_task(work())
        await saved.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await work()

    asyncio.run(main())
    assert seen == [None, b"1"]


def test_a_task_that_cannot_clear_has_ended_well_all_the_same(caplog):
    @task
    def work():
        checkpoint().save_sync(b"1")
        hook_on.append(1)
        return "done"

    hook_on: list[int] = []

    def hook(when, verb, keys):
        if hook_on and when == "before" and verb in ("create", "list"):
            raise UnavailableError("down")

    with intercepted(hook), caplog.at_level(logging.WARNING, "taskckpt"):
        assert work() == "done"
    assert any("ended well, but its state could not be cleared" in record.getMessage() for record in caplog.records)


def test_a_task_that_never_saved_leaves_nothing(tmp_path):
    @task
    def work():
        return 1

    assert work() == 1
    assert not list((tmp_path / "base").rglob("*.jsonl"))


# --- several live copies -----------------------------------------------------------------------


def test_of_two_live_copies_the_later_wins():
    """In one process: threads that start the same task, as two processes would."""
    saved, taken = threading.Event(), threading.Event()
    results = {}

    @task(clear_on_success=False, retries=5)
    def work():
        cp = checkpoint()
        if threading.current_thread().name == "early":
            cp.save_sync(b"early")
            saved.set()
            assert taken.wait(10)
            cp.save_sync(b"late")
        else:
            assert cp.load_bytes_sync() == b"early"
            cp.save_sync(b"later")
            taken.set()
        return "done"

    def run():
        results[threading.current_thread().name] = attempts_of(work)

    early, later = (threading.Thread(target=run, name=name) for name in ("early", "later"))
    early.start()
    assert saved.wait(10)
    later.start()
    early.join(10)
    later.join(10)
    assert results["later"] == "done"
    assert isinstance(results["early"], StaleAttemptError)


def test_a_stale_copy_clears_nothing():
    """The older copy ends well, without having saved again: it must not clear what the newer one saved."""
    started, go = threading.Event(), threading.Event()
    outcome = []

    @task
    def work():
        cp = checkpoint()
        if threading.current_thread().name == "early":
            cp.save_sync(b"early")
            started.set()
            assert go.wait(10)
            return "done"
        cp.save_sync(b"newer")
        go.set()
        early.join(10)
        return cp.load_bytes_sync()

    early = threading.Thread(target=lambda: outcome.append(attempts_of(work)), name="early")
    early.start()
    assert started.wait(10)
    assert work() == b"newer"
    assert isinstance(outcome[0], StaleAttemptError)


def test_each_attempt_fences_what_the_one_before_left_running():
    left = []

    @task(retries=1)
    def work():
        cp = checkpoint()
        cp.save_sync(str(here().attempt).encode())
        if here().attempt == 0:
            left.append(cp)
            raise OSError
        with pytest.raises(StaleAttemptError):
            left[0].save_sync(b"zombie")
        return cp.load_bytes_sync()

    assert work() == b"1"


# --- outside of this process -------------------------------------------------------------------


def test_a_pool_of_processes_runs_tasks():
    """Found by name in the child, and one place per argument."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(importable, [1, 2]) == [2, 3]
