"""Two calls meet exactly if they are the same call, however the script was started."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import taskckpt
from taskckpt import _identity, task
from taskckpt._identity import identity_of
from taskckpt.errors import UsageError, UsageTypeError

ROOT = Path(__file__).parent.parent.parent

SCRIPT = """
import sys, taskckpt
@taskckpt.task(retries=0, clear_on_success=False)
def main():
    cp = taskckpt.checkpoint()
    print(cp.load_bytes_sync(), cp.remote_destination)
    cp.save_sync(b"saved")
if __name__ == "__main__":
    main()
"""


@pytest.fixture(autouse=True)
def _base(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKCKPT_BASE", str(tmp_path / "base"))


def python(*args, cwd=None, status=0):
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return [line.split(" ", 1) for line in done.stdout.splitlines() if ".taskckpt" in line or "/base/" in line]


def script(path: Path, text: str = SCRIPT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


# --- who else is __main__ ----------------------------------------------------------------------

START = {
    "plain": lambda one: [one],
    "cProfile": lambda one: ["-m", "cProfile", one],
    "trace": lambda one: ["-m", "trace", "--count", "--no-report", "-C", one.parent / "counts", one],
    "runpy main": lambda one: ["-c", f"import runpy; runpy.run_path({str(one)!r}, run_name='__main__')"],
    "runpy": lambda one: ["-c", f"import runpy; runpy.run_path({str(one)!r})['main']()"],
    "exec": lambda one: [
        "-c",
        f"f = {str(one)!r}; exec(compile(open(f).read(), f, 'exec'), {{'__name__': '__main__', '__file__': f}})",
    ],
}


@pytest.mark.parametrize("how", START)
def test_a_script_is_itself_under_any_starter(tmp_path, how):
    one, other = (script(tmp_path / name) for name in ("a.py", "b.py"))
    ((_, place),) = python(*START[how](one))
    ((seen, other_place),) = python(*START[how](other))
    assert place != other_place, "another script is another task"
    assert seen == "None"
    assert python(*START[how](one)) == [["b'saved'", place]]


@pytest.mark.parametrize("how", ["cProfile", "runpy main", "exec"])
def test_profiled_and_plain_are_the_same_task(tmp_path, how):
    one = script(tmp_path / "a.py")
    ((_, place),) = python(one)
    assert python(*START[how](one)) == [["b'saved'", place]]


def test_links_to_one_file_are_different_scripts(tmp_path):
    real = script(tmp_path / "dispatch.py")
    places = set()
    for name in ("train.py", "evaluate.py"):
        (tmp_path / name).symlink_to(real)
        ((seen, place),) = python(tmp_path / name)
        assert seen == "None"
        places.add(place)
    assert len(places) == 2


def test_one_script_in_a_folder_that_is_reached_by_two_ways(tmp_path):
    one = script(tmp_path / "real" / "train.py")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ((_, place),) = python(one)
    assert python(tmp_path / "link" / "train.py") == [["b'saved'", place]]
    assert python("train.py", cwd=tmp_path / "link") == [["b'saved'", place]]


# --- functions of one name ---------------------------------------------------------------------


def place_of(function, *args):
    """Where a call of a task saves."""
    return task(retries=0, clear_on_success=False)(function)(*args)


def timed(function):
    def wrapper(*args):  # forgot functools.wraps
        return function(*args)

    return wrapper


def train(_n):
    return taskckpt.checkpoint().remote_destination


def evaluate(_n):
    return taskckpt.checkpoint().remote_destination


def test_wrappers_without_wraps_are_told_apart_by_what_they_wrap():
    assert place_of(timed(train), 1) != place_of(timed(evaluate), 1)
    assert place_of(timed(train), 1) == place_of(timed(train), 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [(0.1, 0.2), ("a", "b"), (1, 1.0), (1, True), (None, 0), (b"x", "x"), ((1, 2), (2, 1)), (Path("a"), "a")],
    ids=repr,
)
def test_captured_constants_tell_apart(one, other):
    def make(rate):
        def work():
            assert rate is not make
            return taskckpt.checkpoint().remote_destination

        return work

    places = [place_of(make(rate)) for rate in (one, other, one)]
    assert places[0] != places[1]
    assert places[0] == places[2]


def test_what_a_function_assigns_itself_is_no_part_of_its_name():
    count = 0

    def work():
        nonlocal count
        count += 1
        return taskckpt.checkpoint().remote_destination

    assert place_of(work) == place_of(work)


def test_a_key_and_a_task_of_the_same_name_are_different_parents(monkeypatch):
    inner = functools.partial(place_of, train, 1)
    below_key = task(key="train", retries=0)(inner)()
    monkeypatch.setenv("TASKCKPT_TASK", "train")
    below_task = inner()
    assert below_key != below_task
    monkeypatch.delenv("TASKCKPT_TASK")
    assert task(key="train", retries=0)(inner)() == below_key
    assert inner() not in (below_key, below_task)


# --- arguments ---------------------------------------------------------------------------------


def name(value):
    def work(value):
        pass

    return identity_of(work, (value,), {})


def test_text_that_json_would_mix_up():
    texts = ["\N{GRINNING FACE}", "\ud83d\ude00", "\ud83d", "\\ud83d", "\\ud83d\\ude00", "'\\ud83d'", '"', "\\", ""]
    assert len({name(text) for text in texts}) == len(texts)
    assert len({name(os.fsdecode(raw)) for raw in (b"\xff", b"\xfe", b"\xc3\xbf")}) == 3
    for text in texts:
        assert place_of(train, text) == place_of(train, text)


def test_what_cannot_be_written_out_needs_a_key():
    itself: list[object] = []
    itself.append(itself)
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    mutual: dict[str, object] = {}
    mutual["x"] = {"y": mutual}
    for value in (10**5000, -(10**5000), [10**5000], itself, deep, mutual):
        with pytest.raises(UsageError, match="key="):
            name(value)
    while deep:
        deep = deep[0]


# --- what has not run when it returns ----------------------------------------------------------


def hidden(function):
    """A decorator that hides from ``inspect`` what it wraps."""

    def wrapper():
        return function()

    return functools.wraps(function)(wrapper)


async def coroutine():
    raise AssertionError("never runs")


def generator():
    yield 1


async def async_generator():
    yield 1


def future():
    return asyncio.get_event_loop_policy().new_event_loop().create_future()


@pytest.mark.parametrize("function", [coroutine, generator, async_generator], ids=lambda one: one.__name__)
@pytest.mark.filterwarnings("error")
def test_what_only_begins_later_has_not_ended_well(function):
    def begin():
        cp = taskckpt.checkpoint("watch")
        cp.save_sync(b"7")
        return function()

    with pytest.raises(UsageTypeError, match="has not run yet"):
        task(retries=3, key="watch", clear_on_success=True)(hidden(begin))()
    assert taskckpt.Checkpoint.of(key="watch").load_bytes_sync() == b"7", "nothing is cleared"


def test_plain_results_are_results():
    for result in (None, [1], iter([1]), map(str, [1]), {"a": 1}, range(3)):
        assert task(retries=0)(hidden(lambda result=result: result)) is not None
        assert task(retries=0, key="k")(lambda result=result: result)() is result


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_task_goes_below_staticmethod(kind):
    with pytest.raises(UsageTypeError, match="below @staticmethod"):
        task(kind(train))
    with pytest.raises(UsageTypeError, match="below @staticmethod"):
        task(retries=1)(kind(train))


def test_the_right_order_works():
    class Model:
        @staticmethod
        @task(key="static", retries=0)
        def work(n):
            return n + 1

    assert Model.work(1) == 2
    assert Model().work(1) == 2


@pytest.mark.parametrize("options", [{"retry": 3}, {"retries": 1, "tries": 2}, {"base_url": "x"}, {"name": "x"}])
def test_mistyped_options_are_told_what_there_is(options):
    with pytest.raises(UsageTypeError, match=r"no option (retry|tries|base_url|name)\b.*retries.*clear_on_success"):
        task(**options)


# --- forks -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_while_another_thread_names_a_task():
    work = task(retries=0)(train)
    work(0)
    with _identity._lock:  # another thread is in a call of a task just now
        pid = os.fork()
        if pid == 0:
            signal.alarm(5)
            status = 1
            try:
                work(1)
                status = 0
            finally:
                os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, "14: it hung"


# --- places ------------------------------------------------------------------------------------

SLIPS = ["s3//b", "s3:b", "s3a:b/x", "gs//b/x", "$HOME/x", "${HOME}/x", "%TMP%/x", "s3://b/a//c", "s3:/b/x"]
SLIPS += ["http:x", "file//x", "memory:x"]


@pytest.mark.parametrize("text", SLIPS)
def test_slips_of_the_pen_are_no_folders_here(tmp_path, monkeypatch, text):
    monkeypatch.delenv("TASKCKPT_BASE")
    before = sorted(tmp_path.iterdir())
    for make in (
        lambda: taskckpt.Checkpoint(text),
        lambda: taskckpt.Checkpoint(tmp_path / "x", src=text),
        lambda: taskckpt.Checkpoint.of(key="k", base=text),
        lambda: task(base=text, retries=0)(train)(1),
    ):
        with pytest.raises(UsageError):
            make()
    monkeypatch.setenv("TASKCKPT_BASE", text)
    with pytest.raises(UsageError):
        taskckpt.checkpoint("k")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("url", ["s3://bucket/runs/7", "gs://b/x", "file:///tmp/x", "memory://x"])
def test_a_path_made_of_a_url(url):
    with pytest.raises(UsageError, match="Path made of a URL"):
        taskckpt.Checkpoint(Path(url))


@pytest.mark.parametrize("text", ["./$HOME/x", "./s3:b", "a:b", "dir/s3:b", "x$y", "s3", "s3x/y", "12:30"])
def test_odd_names_that_are_folders_all_the_same(tmp_path, text):
    cp = taskckpt.Checkpoint(text)
    cp.save_sync(b"1")
    assert cp.remote_destination == str(tmp_path / text)


@pytest.mark.parametrize("key", ["s3://bucket/x", "file:///x", "memory://x"])
def test_a_key_is_no_url(key):
    with pytest.raises(UsageError, match="is a URL, and a key is a name"):
        taskckpt.checkpoint(key)
