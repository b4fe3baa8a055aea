"""Tasks and real processes: scripts that are started, forked, spawned, killed and started again."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# A child that never comes back ends the test here, with what it printed, and not by the test's time-out.
WAIT_S = 15


@pytest.fixture
def script(tmp_path):
    """Write a script; ``script(text)(*args)`` runs it and gives what it printed with ``tell``."""

    def make(text: str, name: str = "script.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PREAMBLE + textwrap.dedent(text))
        return Script(path)

    return make


PREAMBLE = """\
import asyncio, json, multiprocessing, os, signal, subprocess, sys, threading, time
from pathlib import Path
import taskckpt
from taskckpt import Checkpoint, checkpoint, ctx, task
from taskckpt.errors import *

def tell(**what):
    with open("told", "a") as file:  # appended in one write: children tell as well
        file.write(json.dumps(what) + "\\n")

def caught(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

"""


def environment() -> dict[str, str]:
    """Ours, without a switch that would make every child compile the package again."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return own | {"PYTHONPATH": str(ROOT)}


class Script:
    def __init__(self, path: Path):
        self.path = path
        # From Python 3.12 on every fork of a process with threads says so; ours are forked on purpose.
        self.command = [sys.executable, "-W", "error", "-W", "ignore:This process", str(path)]

    def start(self, *args: str, env: dict[str, str] | None = None, command: list[str] | None = None):
        return subprocess.Popen(
            [*(command or self.command), *args],
            cwd=self.path.parent,
            env={**environment(), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *args: str, status: int = 0, wait_s: float = WAIT_S, **options) -> list[dict[str, Any]]:
        process = self.start(*args, **options)
        try:
            output, errors = process.communicate(timeout=wait_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            pytest.fail(f"still running: {output}{errors}")
        assert process.returncode == status, output + errors
        self.errors = errors
        return self.told()

    def told(self) -> list[dict[str, Any]]:
        path = self.path.parent / "told"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def kinds(self) -> list[str]:
        """The records of the one task that there is, oldest first."""
        logs = [log for log in self.path.parent.rglob("log") if ".taskckpt" in log.parts]
        assert len(logs) == 1, logs
        records = sorted(logs[0].iterdir(), reverse=True)
        return [json.loads(path.read_bytes().split(b"\n")[0])["kind"] for path in records]


def until(condition, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


# --- children ----------------------------------------------------------------------------------

CHILD = """
    def child(number=0):
        current = ctx()
        cp = checkpoint()
        tell(task=current.task, run=current.run, attempt=current.attempt, base=current.base,
             place=current.place.uri, found=cp.load_bytes_sync().decode(), keep=current.keep, key=current.key)
        cp.save_sync(b"child")
        return 0

    def start(how):
        if how == "os.fork":
            pid = os.fork()
            if not pid:
                try:
                    os._exit(child())
                finally:
                    os._exit(99)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        elif how == "subprocess":
            subprocess.run([sys.executable, *sys.orig_argv[1:5], __file__, "child"], check=True)
        elif how == "shell":
            subprocess.run(f"cd / && cd - >/dev/null && '{sys.executable}' '{__file__}' child", shell=True, check=True)
        elif how.startswith("pool-"):
            from concurrent.futures import ProcessPoolExecutor
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(how[5:])) as pool:
                list(pool.map(child, [1]))
        elif how.startswith("thread-"):
            thread = threading.Thread(target=start, args=[how[7:]])
            thread.start()
            thread.join()
        else:
            process = multiprocessing.get_context(how).Process(target=child)
            process.start()
            process.join()
            assert process.exitcode == 0, process.exitcode
"""
STARTS = ["os.fork", "fork", "spawn", "forkserver", "subprocess", "shell", "pool-fork", "pool-spawn", "pool-forkserver",
          "thread-fork", "thread-spawn", "thread-subprocess"]  # fmt: skip


@pytest.mark.parametrize("how", STARTS)
def test_a_child_is_in_the_task_and_does_not_fence_its_parent(script, how):
    run = script(
        CHILD
        + """
    @task(retries=1, keep=5, wait_initial_s=0)
    def parent(how):
        cp = checkpoint()
        if ctx().attempt == 0:
            raise OSError
        cp.save_sync(b"parent")
        start(how)
        tell(task=ctx().task, run=ctx().run, attempt=ctx().attempt, base=ctx().base, place=str(ctx().place.uri),
             found=cp.load_bytes_sync().decode(), keep=ctx().keep, key=ctx().key)
        cp.save_sync(b"parent again")
        start(how)
        cp.save_sync(b"and again")
        return cp.load_bytes_sync().decode()

    if __name__ == "__main__":
        if sys.argv[1] == "child":
            child()
        else:
            tell(result=parent(sys.argv[1]))
            assert not [name for name in os.environ if name.startswith("TASKCKPT")]
    """
    )
    child, parent, second, result = run(how)
    assert child.pop("found") == "parent"
    assert parent.pop("found") == "child", "the parent loads what the child saved"
    assert second.pop("found") == "parent again"
    assert child == parent == second
    assert (child["run"], child["attempt"], child["keep"]) == ("local", 1, 5)
    assert child["task"] == f'parent(how="{how}") @ {run.path}'
    assert result == {"result": "and again"}
    kinds = run.kinds()
    assert kinds.count("claim") == 1, kinds
    assert kinds.count("join") >= 2, kinds


@pytest.mark.parametrize("how", ["os.fork", "fork", "spawn", "forkserver", "subprocess"])
def test_the_child_may_be_the_first(script, how):
    run = script(
        CHILD.replace(".decode()", " and 'something'")
        + """
    @task
    def parent(how):
        start(how)
        cp = checkpoint()
        assert cp.load_bytes_sync() == b"child"
        cp.save_sync(b"parent")
        start(how)
        cp.save_sync(b"parent again")

    if __name__ == "__main__":
        child() if sys.argv[1] == "child" else parent(sys.argv[1])
    """
    )
    assert len(run(how)) == 2
    assert run.kinds().count("claim") == 1


@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver", "subprocess"])
def test_a_key_is_one_attempt_over_all_processes(script, how):
    run = script(
        CHILD
        + """
    def child(number=0):
        cp = checkpoint("nightly")
        tell(found=cp.load_bytes_sync().decode())
        cp.save_sync(b"child")

    if __name__ == "__main__":
        if sys.argv[1] == "child":
            child()
        else:
            cp = checkpoint("nightly")
            cp.save_sync(b"parent")
            start(sys.argv[1])
            assert cp.load_bytes_sync() == b"child"
            cp.save_sync(b"parent again")

            @task(key="other")
            def other():
                start(sys.argv[1])
                checkpoint("nightly").save_sync(b"in a task")

            other()
            start(sys.argv[1])
            cp.save_sync(b"parent in the end")
    """
    )
    assert [one["found"] for one in run(how)] == ["parent", "parent again", "in a task"]
    assert run.kinds().count("claim") == 1


@pytest.mark.parametrize("how", ["spawn", "forkserver", "subprocess"])
def test_a_task_in_a_child_has_a_place_of_its_own(script, how):
    run = script(
        CHILD
        + """
    @task
    def inner():
        checkpoint().save_sync(b"inner")
        tell(task=ctx().task, run=ctx().run)

    def child(number=0):
        inner()

    @task
    def outer(how):
        checkpoint().save_sync(b"outer")
        start(how)
        assert checkpoint().load_bytes_sync() == b"outer"
        inner()

    if __name__ == "__main__":
        child() if sys.argv[1] == "child" else outer(sys.argv[1])
    """
    )
    in_child, in_parent = run(how)
    assert in_child == in_parent, "the same task, wherever it runs"
    assert in_child["task"] == f'inner() @ {run.path} <in> outer(how="{how}") @ {run.path}'


def test_a_fork_server_hands_on_the_task_of_now(script):
    """It keeps the environment of its first start; the default on Linux from Python 3.14 on."""
    run = script("""
    def child():
        tell(seen=caught(lambda: ctx() and ctx().task), place=caught(lambda: checkpoint().remote_destination))

    def start():
        process = multiprocessing.get_context("forkserver").Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 0

    @task(key="one")
    def one():
        start()

    @task(key="two")
    def two():
        start()

    if __name__ == "__main__":
        if "before" in sys.argv:
            start()
        one()
        two()
        start()
    """)
    assert [one["seen"] for one in run()] == ["one", "two", None]
    assert [one["seen"] for one in run("before")] == [None, "one", "two", None]


def test_a_pool_older_than_the_task_does_not_guess(script):
    run = script("""
    def child(_):
        return caught(lambda: checkpoint().remote_destination), ctx() is None

    @task
    def work(pool):
        raise AssertionError

    if __name__ == "__main__":
        for how in ("fork", "spawn"):
            with multiprocessing.get_context(how).Pool(1) as pool:
                pool.map(abs, [1])
                tell(seen=task(key="k")(lambda: pool.map(child, [1]))()[0])
    """)
    for one in run():
        assert one["seen"][1] is True
        assert one["seen"][0].startswith("NoTaskContextError")


def test_two_tasks_at_once_leave_children_in_doubt(script):
    run = script("""
    together = threading.Barrier(2, timeout=10)

    @task
    def work(number):
        together.wait()
        checkpoint().save_sync(b"%d" % number)
        env = {**os.environ, **ctx().environ()}
        for one in (None, env):
            subprocess.run([sys.executable, __file__, "child"], env=one, check=True)
        together.wait()
        checkpoint().save_sync(b"end")

    if __name__ == "__main__":
        if sys.argv[1:] == ["child"]:
            tell(seen=caught(lambda: (ctx().attempt, checkpoint().load_bytes_sync().decode())))
        else:
            threads = [threading.Thread(target=work, args=[number]) for number in range(2)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            subprocess.run([sys.executable, __file__, "child"], check=True)
    """)
    told = [one["seen"] for one in run()]
    assert len(told) == 5
    assert sum("AmbiguousIdentityError: The parent of this process ran 2 tasks" in str(one) for one in told) == 2
    assert sorted(one for one in told if isinstance(one, list)) == [[0, "0"], [0, "1"]], "as the hint says"
    assert "NoneType" in told[-1], "afterwards there is no task any more"


@pytest.mark.parametrize("how", ["os.fork", "subprocess"])
def test_a_child_of_a_fenced_attempt_does_not_take_the_task_back(script, how):
    """It was started before its parent claimed, slept, and wakes up when a newer attempt has the task."""
    run = script(
        CHILD
        + """
    def child(number=0):
        while not os.path.exists("wake-up"):
            time.sleep(0.01)
        tell(child=caught(checkpoint().save_sync, b"old child"))
        return 0

    @task(key="k", retries=0)
    def work(how):
        thread = threading.Thread(target=start, args=[how])
        thread.start()
        time.sleep(0.3)
        checkpoint().save_sync(b"old")
        stranger = {"PYTHONPATH": os.environ["PYTHONPATH"]}
        subprocess.run([sys.executable, __file__, "newer"], env=stranger, check=True)
        Path("wake-up").touch()
        thread.join()
        tell(parent=caught(checkpoint().save_sync, b"old parent"))

    if __name__ == "__main__":
        if sys.argv[1] == "child":
            child()
        elif sys.argv[1] == "newer":
            checkpoint("k").save_sync(b"newer")
        elif sys.argv[1] == "look":
            tell(seen=checkpoint("k").load_bytes_sync().decode())
        else:
            work(sys.argv[1])
    """
    )
    told = run(how)
    assert [list(one) for one in told] == [["child"], ["parent"]]
    for one in told:
        assert next(iter(one.values())).startswith("StaleAttemptError"), told
    assert run("look") == [{"seen": "newer"}]


def test_a_checkpoint_may_be_handed_to_a_child(script):
    run = script("""
    def child(cp):
        tell(found=cp.load_bytes_sync().decode())
        cp.save_sync(b"child")

    if __name__ == "__main__":
        cp = Checkpoint("place")
        cp.save_sync(b"parent")
        for how in ("fork", "spawn", "forkserver"):
            process = multiprocessing.get_context(how).Process(target=child, args=[cp])
            process.start()
            process.join()
            assert process.exitcode == 0
            assert cp.load_bytes_sync() == b"child"
            cp.save_sync(b"parent")
    """)
    assert [one["found"] for one in run()] == ["parent"] * 3


# --- what a script is called -------------------------------------------------------------------

NAMED = """
    @task
    def work(x=1):
        tell(task=ctx().task)
        return 1

    if __name__ == "__main__":
        work()
"""


def test_a_script_is_named_by_its_path(script, tmp_path):
    run = script(NAMED)
    expected = [{"task": f"work(x=1) @ {run.path}"}]
    assert run() == expected
    relative = [sys.executable, "script.py"]
    assert run(command=relative) == expected
    (tmp_path / "link.py").symlink_to("script.py")
    # One file may be several programs, told apart by the names of links to it.
    assert run(command=[sys.executable, "link.py"]) == [{"task": f"work(x=1) @ {tmp_path / 'link.py'}"}]
    (tmp_path / "folder").symlink_to(".")
    assert run(command=[sys.executable, "folder/script.py"]) == expected


def test_a_module_is_named_by_its_name(script):
    run = script(NAMED, "package/module.py")
    (run.path.parent / "__init__.py").touch()
    elsewhere = Script(run.path.parent.parent / "x")
    command = [sys.executable, "-m", "package.module"]
    assert elsewhere(command=command) == [{"task": "work(x=1) @ package.module"}]
    imported = [sys.executable, "-c", "from package.module import work; work()"]
    assert elsewhere(command=imported) == [{"task": "work(x=1) @ package.module"}]


def test_a_package_is_named_by_its_name(script):
    run = script(NAMED, "package/__main__.py")
    elsewhere = Script(run.path.parent.parent / "x")
    assert elsewhere(command=[sys.executable, "-m", "package"]) == [{"task": "work(x=1) @ package"}]


@pytest.mark.parametrize("how", ["spawn", "forkserver"])
def test_a_spawned_child_finds_the_same_names(script, how):
    """There, ``__main__`` is called ``__mp_main__``."""
    text = f"""
    @task
    def work(x=1):
        tell(task=ctx().task, module=work.__module__)

    if __name__ == "__main__":
        process = multiprocessing.get_context("{how}").Process(target=work)
        process.start()
        process.join()
        assert process.exitcode == 0
    """
    run = script(text)
    assert run() == [{"task": f"work(x=1) @ {run.path}", "module": "__mp_main__"}]
    run = script(text, "package/module.py")
    elsewhere = Script(run.path.parent.parent / "x")
    assert elsewhere(command=[sys.executable, "-m", "package.module"])[0]["task"] == "work(x=1) @ package.module"


PROMPT = """
import taskckpt

@taskckpt.task
def work():
    return 1

@taskckpt.task(key="named")
def named():
    return taskckpt.ctx().key

print("named:", named())
work()
"""


@pytest.mark.parametrize("how", ["-c", "stdin", "interactive", "notebook"])
def test_a_prompt_needs_a_key(tmp_path, how):
    text = PROMPT
    if how == "notebook":  # as ipykernel does it
        text = f"import sys\nmain = sys.modules['__main__']\ndel main.__file__\nexec({PROMPT!r}, main.__dict__)"
    (tmp_path / "cell.py").write_text(text)
    command = [
        sys.executable,
        *{"-c": ["-c", text], "interactive": ["-i", "-q"], "stdin": ["-"], "notebook": ["cell.py"]}[how],
    ]
    given = text if how in ("stdin", "interactive") else None
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, cwd=tmp_path, timeout=WAIT_S, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "named: named" in done.stdout, done.stderr
    assert "UsageError: work is defined in a notebook or at a prompt" in done.stderr
    assert "key=" in done.stderr


# --- killed and started again ------------------------------------------------------------------


def test_a_script_that_is_killed_goes_on_until_it_is_done(script):
    """Ten times ``kill -9``, each at a different step, and the result is that of a run that was never killed."""
    run = script("""
    @task
    def count(target):
        cp = checkpoint()
        n = int(cp.load_bytes_sync() or b"0")
        tell(resumed=n)
        while n < target:
            n += 1
            cp.save_sync(b"%d" % n)
            if n % 3 == 0 and not os.path.exists(f"killed-{n}"):
                Path(f"killed-{n}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return n

    if __name__ == "__main__":
        tell(result=count(32))
    """)
    for number in range(10):
        assert run(status=-signal.SIGKILL) == [{"resumed": 3 * number}]
    assert run() == [{"resumed": 30}, {"result": 32}]
    assert run() == [{"resumed": 0}, {"result": 32}], "it ended well, so the next one starts afresh"


def test_retries_exhausted_and_started_again(script):
    run = script("""
    @task(retries=2, wait_initial_s=0)
    def work():
        cp = checkpoint()
        n = int(cp.load_bytes_sync() or b"0") + 1
        cp.save_sync(b"%d" % n)
        tell(n=n, attempt=ctx().attempt)
        if n < 8:
            raise OSError("boom")

    if __name__ == "__main__":
        work()
    """)
    assert run(status=1) == [{"n": n, "attempt": n - 1} for n in (1, 2, 3)]
    assert re.search(r"^OSError: boom$", run.errors, re.MULTILINE)
    assert run(status=1) == [{"n": n, "attempt": n - 4} for n in (4, 5, 6)]
    assert run() == [{"n": 7, "attempt": 0}, {"n": 8, "attempt": 1}]
    assert run(status=1)[0] == {"n": 1, "attempt": 0}


@pytest.mark.parametrize("style", ["sync", "async"])
def test_ctrl_c_ends_the_task_and_the_next_run_goes_on(script, style):
    run = script("""
    def before():
        Path("ready").touch()

    @task
    def work():
        cp = checkpoint()
        tell(found=(cp.load_bytes_sync() or b"nothing").decode())
        cp.save_sync(b"1")
        before()
        time.sleep(60)

    @task
    async def awork():
        cp = checkpoint()
        tell(found=(await cp.load_bytes() or b"nothing").decode())
        await cp.save(b"1")
        before()
        await asyncio.sleep(60)

    if __name__ == "__main__":
        asyncio.run(awork()) if sys.argv[1] == "async" else work()
    """)
    for expected in ("nothing", "1"):
        process = run.start(style)
        ready = run.path.parent / "ready"
        until(ready.exists, "the script was ready")
        ready.unlink()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode in (-signal.SIGINT, 130), errors
        assert "KeyboardInterrupt" in errors
        assert run.told() == [{"found": expected}]


TWO_COPIES = """
    @task(retries=3, wait_initial_s=0.01)
    def work():
        cp = checkpoint()
        n = int(cp.load_bytes_sync() or b"0")
        Path(f"running-{os.getpid()}").touch()
        while n < int(sys.argv[1]):
            n += 1
            cp.save_sync(b"%d" % n)
            time.sleep(0.01)
        return n

    if __name__ == "__main__":
        tell(result=caught(work), pid=os.getpid(), attempts=None)
"""


def test_of_two_live_copies_the_later_starter_wins(script):
    run = script(TWO_COPIES)
    early = run.start("100")
    until((run.path.parent / f"running-{early.pid}").exists, "the first copy runs")
    later = run.start("100")
    for process in (early, later):
        process.communicate(timeout=WAIT_S)
    told = {one["pid"]: one["result"] for one in run.told()}
    assert told[later.pid] == 100
    assert str(told[early.pid]).startswith("StaleAttemptError: A newer attempt took this task over")


def test_many_live_copies_come_to_an_end(script):
    """Started at once: no livelock, one of them ends well, and all the others stale."""
    run = script(TWO_COPIES)
    copies = [run.start("30") for _ in range(5)]
    for process in copies:
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, errors
    results = [one["result"] for one in run.told()]
    assert results.count(30) == 1, results
    assert sum(str(one).startswith("StaleAttemptError") for one in results) == 4, results


def test_a_stale_copy_never_clears(script):
    run = script("""
    @task
    def work():
        cp = checkpoint()
        tell(found=(cp.load_bytes_sync() or b"nothing").decode())
        if sys.argv[1] == "early":
            cp.save_sync(b"early")
            Path("ready").touch()
            while not os.path.exists("go"):
                time.sleep(0.01)
            return
        cp.save_sync(b"newer")
        os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        work()
    """)
    early = run.start("early")
    until((run.path.parent / "ready").exists, "the first copy has saved")
    assert run("later", status=-signal.SIGKILL)[-1] == {"found": "early"}
    (run.path.parent / "go").touch()
    _, errors = early.communicate(timeout=WAIT_S)
    assert early.returncode == 1
    assert "StaleAttemptError" in errors
    assert run("later", status=-signal.SIGKILL) == [{"found": "newer"}]


def test_variables_name_the_task_of_a_script(script):
    run = script("""
    cp = checkpoint()
    n = int(cp.load_bytes_sync() or b"0") + 1
    cp.save_sync(b"%d" % n)
    tell(n=n, task=ctx().task, attempt=ctx().attempt, place=cp.remote_destination)
    """)
    base = str(run.path.parent / "base")
    for attempt in range(3):
        env = {"TASKCKPT_BASE": "base", "TASKCKPT_RUN": "r", "TASKCKPT_TASK": "t", "TASKCKPT_ATTEMPT": str(attempt)}
        assert run(env=env) == [{"n": attempt + 1, "task": "t", "attempt": attempt, "place": f"{base}/r/t"}]
    assert run(env=env | {"TASKCKPT_RUN": "other"})[0]["n"] == 1
    assert run(env=env | {"TASKCKPT_TASK": "other"})[0]["n"] == 1
    run(status=1)
    assert "NoTaskContextError" in run.errors


# --- memory ------------------------------------------------------------------------------------

STREAM = """
    size, kind = int(sys.argv[1]) << 20, sys.argv[2]
    block = os.urandom(1 << 20)  # does not compress, so that what is stored is as large
    source = Path("source")
    if kind == "folder":
        source.mkdir()
    for number in range(4 if kind == "folder" else 1):
        with open(source / str(number) if kind == "folder" else source, "wb") as file:
            for index in range((size >> 20) // (4 if kind == "folder" else 1)):
                file.write(index.to_bytes(8, "big") + block[8:])

    def status(field):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) << 10

    def used():
        total = 0
        for folder, _, names in os.walk("."):
            for name in names:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_blocks * 512
                except FileNotFoundError:
                    pass
        return total

    most = 0
    def watch():
        global most
        while not done.wait(0.02):
            most = max(most, used())

    options = json.loads(sys.argv[4])
    os.environ["TASKCKPT_TMP"] = os.path.abspath("tmp")
    # Imports, connections and thread pools are no copies.
    warm = Checkpoint(sys.argv[3] + "-warm", storage_options=options)
    warm.save_sync(bytes(100_000)); warm.load_sync()
    cp = Checkpoint(sys.argv[3], storage_options=options)
    for what in (lambda: cp.save_sync(source), lambda: Checkpoint(sys.argv[3], storage_options=options).load_sync()):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, disk, most, done = status("VmRSS:"), used(), 0, threading.Event()
        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.monotonic()
        what()
        seconds = time.monotonic() - began
        done.set()
        watcher.join()
        tell(added=status("VmHWM:") - before, disk=max(most, used()) - disk, seconds=round(seconds, 2))
"""
MIB = 1 << 20

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="NOT TESTED: peak memory is read from /proc, on Linux only"
)


def check_streaming(told, size: int, *, disk_copies: tuple[int, int], capsys) -> None:
    for what, copies, one in zip(("save", "load"), disk_copies, told, strict=True):
        with capsys.disabled():
            print(
                f"\n  {what} of {size >> 20} MiB: {one['added'] >> 20} MiB more memory, "
                f"{one['disk'] >> 20} MiB on disk, {one['seconds']} s",
                end="",
            )
        assert one["added"] <= 128 * MIB, f"{what} took {one['added'] >> 20} MiB"
        assert one["disk"] <= copies * size + 64 * MIB, f"{what} took {one['disk'] >> 20} MiB on disk"


@needs_proc
@pytest.mark.timeout(120)  # other tests may keep the disk busy
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_memory_and_disk_stay_small_on_a_local_disk(script, kind, capsys):
    """The stored object and what is restored are one copy each; nothing is kept beside them."""
    run = script(STREAM)
    told = run("512", kind, "place", "{}", wait_s=100)
    check_streaming(told, 512 * MIB, disk_copies=(1, 1), capsys=capsys)


@needs_proc
@pytest.mark.timeout(120)  # other tests may keep the disk busy
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_memory_and_disk_stay_small_on_s3(script, kind, seaweedfs, new_bucket, capsys):
    """The only copy on this side is what is restored."""
    run = script(STREAM)
    told = run("256", kind, f"s3://{new_bucket(seaweedfs)}/place", json.dumps(seaweedfs.storage_options), wait_s=100)
    check_streaming(told, 256 * MIB, disk_copies=(0, 1), capsys=capsys)


# --- time --------------------------------------------------------------------------------------


def test_import_takes_no_time(tmp_path, capsys):
    """The target is 30 ms on a machine of today; the limit leaves room for slow and busy ones."""

    def cpu_ms(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000

    def median_ms(code: str) -> float:
        return statistics.median(cpu_ms(code) for _ in range(5))

    cpu_ms("import taskckpt")  # compiles
    bare = median_ms("pass")
    own, library = median_ms("import taskckpt") - bare, median_ms("import dataclasses, logging, pathlib, json") - bare
    with capsys.disabled():
        print(f"\n  import taskckpt: {own:.1f} ms, {library:.1f} of them in the standard library", end="")
    assert own < 150
