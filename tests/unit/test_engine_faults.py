"""Faults that the engine layer once had: tasks that shared a place, retries that began at nothing, bare errors."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import taskckpt
from taskckpt import TaskContext, _process, checkpoint, ctx, engines, task
from taskckpt.engines import EngineTask, _task, ending
from taskckpt.errors import AmbiguousIdentityError, TaskckptError, UsageError

SLURM = {"SLURM_JOB_ID": "77", "SLURMD_NODENAME": "n1"}
SHOW = """
import taskckpt
try:
    found = taskckpt.ctx()
    print(found and f"{found.run} {found.task}")
except taskckpt.TaskckptError as error:
    print(error.code)
"""


class Message:
    """What an engine has of one execution of a task."""


class Worker:
    """An engine that runs what it is told in the thread that asks."""

    def __init__(self) -> None:
        self._here = threading.local()

    def run(self, function: Callable[[], Any], **says: Any) -> Any:
        message = Message()
        self._here.said = EngineTask("queue", **{"run": "r", "task": "t", "execution": message, **says})
        del message
        try:
            return function()
        finally:
            self._here.said = None

    def says(self) -> EngineTask | None:
        return getattr(self._here, "said", None)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    monkeypatch.setattr(_process, "process", _process.Process())
    os.environ["TASKCKPT_BASE"] = str(tmp_path / "base")
    yield
    for name in [name for name in os.environ if name.startswith(("TASKCKPT_", "SLURM"))]:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    engines.register("queue", made.says)
    yield made
    engines.unregister("queue")


def here() -> TaskContext | None:
    return ctx()


def in_thread(function: Callable[[], Any]) -> Any:
    answers: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            answers.put(function())
        except BaseException as error:
            answers.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    return answers.get_nowait()


def go_on(state: bytes) -> bytes | None:
    """What a task does: it loads, and saves."""
    mine = checkpoint()
    found = mine.load_bytes_sync()
    mine.save_sync(state)
    return found


def refused(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except TaskckptError:
        return None


# --- silent mix-ups ------------------------------------------------------------------------------


def test_threads_of_two_tasks_in_a_batch_job_do_not_share(worker: Worker) -> None:
    # Once: a helper thread of an engine's task, which the engine does not see, falls through to the system around
    # (slurm/77/<program>), which all items share: item 1 loads the state of item 0. Seen with real Dask (thread asks
    # first) and real Ray (always, since its execution is a tuple) under SLURM_JOB_ID.
    os.environ.update(SLURM)
    os.environ["TASKCKPT_INDEX"] = "x"  # pytest -n has no program

    def item(number: int) -> Any:
        ctx()  # from then on the process is known to run tasks
        return in_thread(lambda: refused(lambda: go_on(b"item %d" % number)))

    found = [worker.run(lambda n=n: item(n), task=f"item {n}", execution=("ray", n)) for n in range(2)]  # type: ignore[misc]
    assert found == [None, None]


def test_children_of_two_tasks_in_a_batch_job_do_not_share(worker: Worker, tmp_path: Path) -> None:
    # Once: the same for child processes: helper.py of item 0 and of item 1 are both slurm/77/helper.py.
    os.environ.update(SLURM)
    (tmp_path / "helper.py").write_text(SHOW)

    def item() -> str:
        ctx()
        return subprocess.run(
            [sys.executable, tmp_path / "helper.py"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        ).stdout.strip()

    found = [worker.run(item, task=f"item {n}", execution=("ray", n)) for n in range(2)]
    assert found[0] != found[1] or found[0] in ("None", "ambiguous-identity")


@pytest.mark.parametrize("variable", ["TASKCKPT_TASK", "handed down"])
def test_threads_of_two_tasks_below_a_named_process_do_not_share(worker: Worker, variable: str) -> None:
    # Once: the same where the process has a name in its environment (by a person, by `taskckpt run`, or by the task
    # that started the worker), as long as no task of the engine asked in its own thread before.
    if variable == "TASKCKPT_TASK":
        os.environ["TASKCKPT_TASK"] = "outer"
    else:
        os.environ.update(TaskContext("R", "outer", 0, os.environ["TASKCKPT_BASE"]).environ())

    def item(n: int) -> Any:
        refused(ctx)
        return in_thread(lambda: refused(lambda: go_on(b"item %d" % n)))

    assert [worker.run(lambda n=n: item(n), task=f"item {n}") for n in range(2)] == [None, None]  # type: ignore[misc]


def test_threads_of_two_items_in_a_task_do_not_share(worker: Worker) -> None:
    # Once: the same inside a @task that runs an engine's workers in threads: their helper threads are "the @task's".
    @task(key="main", retries=0)
    def main() -> list[Any]:
        def item(n: int) -> Any:
            def work() -> Any:
                ctx()
                return in_thread(lambda: refused(lambda: go_on(b"item %d" % n)))

            return worker.run(work, task=f"item {n}")

        return [in_thread(lambda n=n: item(n)) for n in range(2)]  # type: ignore[misc]

    assert main() == [None, None]


def test_a_pool_that_is_older_than_the_task_in_a_batch_job() -> None:
    # Once: outside of a batch job this is a NoTaskContextError; inside of one, two tasks share the job's identity.
    os.environ.update(SLURM)
    os.environ["TASKCKPT_INDEX"] = "x"
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()

        @task(retries=0)
        def item(number: int) -> bytes | None:
            return refused(lambda: pool.submit(go_on, b"item %d" % number).result())

        assert [item(0), item(1)] == [None, None]


def test_two_programs_of_one_base_name_in_a_job_do_not_share(tmp_path: Path) -> None:
    # Once: a batch job that runs prepare/main.py and then train/main.py: "another program is one of its own" (docs),
    # but the identity has only the base name, so train loads what prepare saved.
    found = []
    for folder in ("prepare", "train"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "main.py").write_text(
            f"import taskckpt; c = taskckpt.checkpoint(); print(c.load_bytes_sync()); c.save_sync(b'{folder}')"
        )
        found.append(
            subprocess.run(
                [sys.executable, tmp_path / folder / "main.py"],
                env={**os.environ, **SLURM}, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            ).stdout.strip()
        )  # fmt: skip
    assert found[1] in ("None", "")


@pytest.mark.parametrize("variable", ["TASKCKPT_KEY", "TASKCKPT_TASK"])
def test_a_name_for_many_worker_processes_is_refused(worker: Worker, variable: str) -> None:
    # Once: `_expect_one_task` remembers per process. Celery's prefork children and RQ's work horses are a process
    # for each task: with TASKCKPT_KEY in the worker's environment each job loads another job's state (seen with
    # Celery 5.7, prefork). In one process it is an AmbiguousIdentityError.
    os.environ[variable] = "nightly"
    answers = []
    for number in range(2):
        readable, writable = os.pipe()
        pid = os.fork()
        if not pid:
            found: Any = refused(lambda n=number: worker.run(lambda: go_on(b"item %d" % n), task=f"item {n}"))  # type: ignore[misc]
            os.write(writable, repr(found).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(writable)
        answers.append(os.read(readable, 100))
        os.close(readable)
    assert answers == [b"None", b"None"]


def test_names_of_nested_tasks_are_injective(worker: Worker) -> None:
    # Once: "X in Y" is not escaped: "load" in "clean in prod" and "load in clean" in "prod" are one place.
    def place(name: str, outer: TaskContext) -> str:
        os.environ.update(outer.environ())
        _process.process = _process.Process()
        return str(worker.run(lambda: checkpoint().remote_destination, task=name))

    base = os.environ["TASKCKPT_BASE"]
    one = place("load", TaskContext("R", "clean in prod", 0, base))
    two = place("load in clean", TaskContext("R", "prod", 0, base))
    of_key = place("load", TaskContext("R", "k", 0, base, key="k"))
    like_key = place("load", TaskContext("R", "key 'k'", 0, base))
    assert one != two
    assert of_key != like_key


def test_a_cleared_task_and_one_that_is_called_so(worker: Worker) -> None:
    # Once: " (cleared: 1)" can be part of a task's own name.
    one = worker.run(lambda: ctx(on_clear="fresh").place, task="t", generation="1")  # type: ignore[union-attr]
    assert one != worker.run(lambda: ctx(on_clear="fresh").place, task="t (cleared: 1)")  # type: ignore[union-attr]


def test_a_shard_and_a_key_that_is_called_so() -> None:
    # Once: key="shard/rank-0" and rank 0 of per_rank key="shard" are one place.
    assert checkpoint("shard/rank-0").remote_destination != checkpoint("shard", per_rank=True).remote_destination


class _Distributed(types.ModuleType):
    rank: int | None = None

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return self.rank is not None

    def get_rank(self) -> int | None:
        return self.rank

    def get_world_size(self) -> int:
        return 2


def test_rank_1_stays_so_when_the_group_is_taken_down(monkeypatch: pytest.MonkeyPatch) -> None:
    # Once: after destroy_process_group() rank 1 is nobody in particular, and saves over rank 0's state: with
    # mp.spawn below a @task they even share the claim, so that nothing is fenced.
    distributed = _Distributed("torch.distributed")
    monkeypatch.setitem(sys.modules, "torch.distributed", distributed)

    @task(retries=0)
    def train() -> None:
        distributed.rank = 1
        with pytest.raises(taskckpt.errors.UsageError):
            checkpoint().save_sync(b"by rank 1")
        distributed.rank = None
        with pytest.raises(taskckpt.errors.UsageError):
            checkpoint().save_sync(b"by rank 1, afterwards")

    train()


def test_per_rank_before_the_rank_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    # Once: before init_process_group() every rank is "rank-0" of a per_rank key; where they share a claim (children
    # of mp.spawn whose parent used the key) rank 1 loads and overwrites the shard of rank 0. And the same process
    # changes its shard when the group comes up.
    distributed = _Distributed("torch.distributed")
    monkeypatch.setitem(sys.modules, "torch.distributed", distributed)

    @task(retries=0)
    def train() -> None:
        checkpoint("shard", per_rank=True)
        distributed.rank = 1
        with pytest.raises(AmbiguousIdentityError, match="before anybody said which rank"):
            checkpoint("shard", per_rank=True)

    os.environ["WORLD_SIZE"] = "2"
    with pytest.raises(AmbiguousIdentityError, match="before anybody said which rank"):
        checkpoint("other", per_rank=True)
    del os.environ["WORLD_SIZE"]
    train()


# --- silent zeros --------------------------------------------------------------------------------


def test_a_retry_by_taskckpt_run_of_a_program_that_starts_a_flow(tmp_path: Path) -> None:
    # Once: `taskckpt run --key nightly -- python flow.py`: in a flow that the program starts, the identity contains
    # the id of the flow's run, which is another one on each retry: each attempt begins at nothing, and nobody says so.
    # (With TASKCKPT_KEY=nightly set by hand it resumes.) Seen with Prefect 3.8.8.
    (tmp_path / "flow.py").write_text(
        "import sys, uuid, taskckpt\n"
        "from taskckpt import engines\n"
        "run = str(uuid.uuid4())\n"
        "said = engines.EngineTask('flow', run=run, task='train', execution=engines.PROCESS)\n"
        "engines.register('flow', lambda: said)\n"
        "c = taskckpt.checkpoint(); print(c.load_bytes_sync()); c.save_sync(b'progress')\n"
        "sys.exit(1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "taskckpt", "run", "--key", "nightly", "--retries", "1", "--wait", "0", "-q", "--",
         sys.executable, str(tmp_path / "flow.py")],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    # What the engine calls anew each time cannot be found again: that much is said, and how to name it.
    assert done.stdout.split() == ["None", "None"]
    assert "found nothing for a task of flow in it" in done.stderr
    assert "name the task by a key" in done.stderr


def test_the_lineage_is_followed_inside_a_task(worker: Worker) -> None:
    # Once: inside of another task the name is made from said.run, whatever scope= says: a re-execution that was told
    # to follow its origin begins at nothing.
    @task(key="pipeline", retries=0)
    def pipeline(**says: Any) -> Any:
        return worker.run(lambda: ctx(scope="lineage").place, **says)  # type: ignore[union-attr]

    assert pipeline(run="first") == pipeline(run="second", origin_run="first")


def test_scope_in_a_call_does_not_make_a_task_two(worker: Worker) -> None:
    # Once: ctx(scope="lineage") and checkpoint() in one task are two contexts that "run at once": children and
    # threads get "2 tasks run in this process" from then on.
    def work() -> Any:
        ctx(scope="lineage")
        ctx()
        return in_thread(ctx)

    assert not isinstance(worker.run(work, run="r2", origin_run="r1", alone=True), AmbiguousIdentityError)


# --- loud, but wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a\0b", "\ud800"])
def test_a_name_that_no_environment_can_hold(key: str) -> None:
    # Once: a bare ValueError from os.environ; and what was half begun stays in `running`, so that every later task
    # of this process fails in the same way.
    @task(key=key, retries=0)
    def hostile() -> None: ...

    @task(key="fine", retries=0)
    def fine() -> int:
        return 1

    hostile()
    assert fine() == 1


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_an_engine_whose_task_no_environment_can_hold(worker: Worker, name: str) -> None:
    # Once: the first ctx() raises a bare ValueError, the second one succeeds.
    def work() -> list[str]:
        answers = []
        for _ in range(2):
            try:
                ctx()
                answers.append("ok")
            except Exception as error:
                answers.append(type(error).__name__)
        return answers

    first, second = worker.run(work, task=name, alone=True)
    assert first == second != "ValueError"


def test_a_call_with_a_long_list_can_start_processes() -> None:
    # Once: the identity holds all arguments, and goes into the environment as it is: above 128 KiB (6,000 paths) any
    # subprocess in the task fails with E2BIG, which has nothing to do with what it starts.
    @task(retries=0)
    def work(paths: list[str]) -> int:
        return subprocess.run(["true"], check=False).returncode

    assert work([f"/data/part-{number:06d}.parquet" for number in range(6000)]) == 0


@pytest.mark.parametrize("key", ['""', "{{day}}"])
def test_a_key_that_reads_like_an_unset_variable(key: str) -> None:
    # Once: a child is told the key, and takes it for nothing ('""': ctx() is None there, or the batch job's identity)
    # or for a template (an error). Such a key should be refused at once, or handed down so that it is understood.
    @task(key=key, retries=0)
    def work() -> str:
        return subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=False).stdout.strip()

    assert (refused(work) or key).endswith(key)


def test_more_live_executions_than_are_remembered(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    # Once: MOST_EXECUTIONS also drops executions that still live: ctx() is then another context with another claim,
    # which fences the task's own checkpoint; and its entry in `running` is never taken out again.
    monkeypatch.setattr(_process, "MOST_EXECUTIONS", 4)
    messages = [Message() for _ in range(6)]
    contexts = [worker.run(ctx, task=f"t{number}", execution=one) for number, one in enumerate(messages)]
    assert worker.run(ctx, task="t0", execution=messages[0]) is contexts[0]
    messages.clear()
    gc.collect()
    assert not _process.process.running


def test_keys_in_executions_that_were_dropped_are_forgotten(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    # Once: what MOST_EXECUTIONS drops is not ended: each key that a Ray or RQ SimpleWorker task used stays in
    # `contexts` for ever, with its checkpoint (5 KiB each, more once it was used).
    monkeypatch.setattr(_process, "MOST_EXECUTIONS", 4)
    for number in range(20):
        worker.run(lambda n=number: checkpoint(f"key {n}"), task=f"t{number}", execution=("ray", number))  # type: ignore[misc]
    assert len(_process.process.contexts) <= 5


def test_ctx_costs_less_than_1_ms_beside_500_others(worker: Worker) -> None:
    # Once: each beginning and each end of an execution goes through all that run (digests, claims, WeakSets), under
    # the lock: 5 ms with 200, 30 ms with 4,000: 4,097 beginnings took 129 s.
    messages = [Message() for _ in range(500)]
    for number, one in enumerate(messages):
        worker.run(ctx, task=f"t{number}", execution=one)
    began = time.perf_counter()
    for number in range(20):
        worker.run(ctx, task=f"more {number}")
    assert (time.perf_counter() - began) / 20 < 0.001


def test_a_pickled_context_has_the_claim_of_its_attempt(worker: Worker) -> None:
    # Once: the nonce is made when it is first asked for, so that a context that was pickled before has another one in
    # each process: they fence each other, though all are one attempt.
    def work() -> None:
        context = ctx()
        copy = pickle.loads(pickle.dumps(context))
        assert context is not None
        assert copy._nonce == context._nonce

    worker.run(work, execution=("ray", 1))


def test_a_broken_plugin_is_a_typed_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Once: a bare ModuleNotFoundError from every ctx(), also with TASKCKPT_ENGINE naming another engine, and from
    # survey(), whose promise is that one that fails does not hide the others.
    folder = tmp_path / "acme-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[taskckpt.engines]\nacme = acme_missing:find\n")
    monkeypatch.syspath_prepend(tmp_path)
    engines._ours.cache_clear()
    try:
        assert any(one.name == "acme" and one.error is not None for one in engines.survey())
        with pytest.raises(TaskckptError, match="acme"):
            ctx()
    finally:
        engines._ours.cache_clear()


def test_a_resolver_that_raises_is_a_typed_error_that_names_it() -> None:
    # Once: a bare KeyError from ctx(), in which nothing says that an engine did it.
    def broken() -> EngineTask | None:
        raise KeyError("x")

    engines.register("broken", broken)
    try:
        with pytest.raises(TaskckptError, match="broken"):
            ctx()
    finally:
        engines.unregister("broken")


def test_engines_may_be_registered_while_others_ask() -> None:
    # Once: RuntimeError: dictionary changed size during iteration. Here a resolver registers; a thread does as well.
    engines.register("late", lambda: engines.register("later", lambda: None))
    try:
        ctx()
    finally:
        engines.unregister("late")
        engines.unregister("later")


def _group() -> type[Exception]:
    return ExceptionGroup


def _with_arguments() -> type[Exception]:
    class NeedsError(Exception):
        def __new__(cls, code: int, reason: str) -> Any:
            return super().__new__(cls, code, reason)

    return NeedsError


@pytest.mark.parametrize("base", [_group, _with_arguments])
def test_an_ending_that_cannot_be_raised_is_refused_at_once(base: Callable[[], type[Exception]]) -> None:
    # Once: "Its __init__ is not called", but its __new__ is: a TypeError in the place of the StaleAttemptError, which
    # the engine retries. (A read-only `message` in the base does the same; so does a metaclass, in find() itself.)
    with pytest.raises(UsageError, match="cannot be combined"):
        ending(base())


def test_endings_do_not_grow() -> None:
    # Once: they are remembered by repr(attributes): one class for each object whose repr has its address.
    before = len(_task._endings)
    for _ in range(10):
        ending(OSError, reason=object)
        ending(OSError, reason=lambda: None)
    assert len(_task._endings) <= before + 2


def test_an_execution_that_is_an_asyncio_task_ends() -> None:
    # Once: Running.strand holds the asyncio task that asked, and that is the execution itself (Dask's coroutines) or
    # holds it in its context: it never ends. Seen with real Dask: after six `async def` tasks seven "run", for ever;
    # threads and children of all later tasks are ambiguous, and each ctx() gets slower.
    said: contextvars.ContextVar[EngineTask | None] = contextvars.ContextVar("said", default=None)

    async def item(number: int) -> None:
        said.set(EngineTask("aio", run="r", task=f"t{number}", execution=asyncio.current_task()))
        ctx()

    async def main() -> None:
        for number in range(5):
            await asyncio.create_task(item(number))

    engines.register("aio", said.get)
    try:
        asyncio.run(main())
        gc.collect()
        ctx()
        assert not _process.process.running
        assert "TASKCKPT_AMBIGUOUS" not in os.environ
    finally:
        engines.unregister("aio")


def test_a_plugin_in_an_archive_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Once: since 63001c3 entry points are looked for by os.scandir, which knows no zip files (pex, zipapp, Spark's
    # --py-files) and no other finder than that of folders: the engine is ignored without a word, and its tasks get
    # another identity, or none. importlib.metadata finds it.
    with zipfile.ZipFile(tmp_path / "acme.zip", "w") as archive:
        archive.writestr(
            "acme.py", "from taskckpt.engines import EngineTask\ndef find(): return EngineTask('acme', 'r', 't')"
        )
        archive.writestr("acme-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
        archive.writestr("acme-1.dist-info/entry_points.txt", "[taskckpt.engines]\nacme = acme:find\n")
    monkeypatch.syspath_prepend(tmp_path / "acme.zip")
    engines._ours.cache_clear()
    try:
        assert "acme" in engines.names()
    finally:
        engines._ours.cache_clear()


@pytest.mark.filterwarnings("error")
def test_looking_for_plugins_closes_what_it_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Once: os.scandir is left open where the first plugin is found: a ResourceWarning, which -W error makes a failure.
    (tmp_path / "acme-1.dist-info").mkdir()
    (tmp_path / "acme-1.dist-info" / "entry_points.txt").write_text("[taskckpt.engines]\n")
    for name in ("x", "y", "z"):
        (tmp_path / f"{name}-1.dist-info").mkdir()
        (tmp_path / f"{name}-1.dist-info" / "entry_points.txt").write_text("[taskckpt.engines]\n")
    monkeypatch.syspath_prepend(tmp_path)
    left: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", left.append)
    any(engines.GROUP.encode() in text for text in engines._entry_points_files())
    gc.collect()
    assert not left


SAVES = """
import sys, taskckpt
try:
    mine = taskckpt.checkpoint()
    print(mine.load_bytes_sync())
    mine.save_sync(" ".join(sys.argv[1:]).encode())
except taskckpt.TaskckptError as error:
    print(error.code)
"""


def run_in_job(script: Path, *arguments: str, **environ: str) -> str:
    return subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, **SLURM, **environ}, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
    ).stdout.strip()  # fmt: skip


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(SAVES)
    return tmp_path / "train.py"


def test_one_program_that_a_job_starts_twice_is_told_apart_or_refused(script: Path) -> None:
    # Once: `train.py --lr 1; train.py --lr 2` in one job: the second loaded what the first had saved.
    assert run_in_job(script, "a") == "None"
    assert run_in_job(script, "a") == "b'a'", "a requeued job goes on"
    assert run_in_job(script, "b") == "ambiguous-identity"
    assert run_in_job(script, "b", TASKCKPT_INDEX="b") == "None"
    assert run_in_job(script, "b", TASKCKPT_INDEX="b") == "b'b'"


@pytest.mark.parametrize("variable", ["TASKCKPT_TASK", "TASKCKPT_KEY"])
def test_the_index_counts_beside_a_name(script: Path, variable: str) -> None:
    # Once: ignored without a word, so that both items shared the name's place.
    for item in ("1", "2"):
        assert run_in_job(script, item, **{variable: "train", "TASKCKPT_INDEX": item}) == "None"
    assert run_in_job(script, "2", **{variable: "train", "TASKCKPT_INDEX": "2"}) == "b'2'"


def test_items_of_an_array_that_were_given_one_name(script: Path) -> None:
    # Once: item 2 loaded the state of item 1.
    named = {"TASKCKPT_TASK": "train", "SLURM_ARRAY_JOB_ID": "70"}
    assert run_in_job(script, "1", SLURM_ARRAY_TASK_ID="1", **named) == "None"
    assert run_in_job(script, "1", SLURM_ARRAY_TASK_ID="1", **named) == "b'1'"
    assert run_in_job(script, "2", SLURM_ARRAY_TASK_ID="2", **named) == "ambiguous-identity"


def test_a_relative_base_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Once: after os.chdir the state was looked for elsewhere.
    monkeypatch.chdir(tmp_path)
    os.environ["TASKCKPT_BASE"] = "relative"
    checkpoint("a").save_sync(b"1")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert checkpoint("a").load_bytes_sync() == b"1"


def test_one_process_that_a_launcher_started_is_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    # Once: its rank was None, so that `if ctx().rank == 0: save` never saved.
    for name, value in {"TORCHELASTIC_RUN_ID": "r", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    found = task(key="k", retries=0)(here)()
    assert found is not None
    assert (found.rank, found.world_size) == (0, 1)
    checkpoint("other").save_sync(b"1")


@pytest.mark.parametrize("name", ["", " ", "none"])
def test_names_that_no_engine_can_have(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of an engine"):
        engines.register(name, lambda: None)


def test_a_key_is_no_part_of_what_was_handed_down_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    # Once: below a task whose name no environment can hold, a key had that task's place.
    environ = TaskContext("R", "a\0b", 0, os.environ["TASKCKPT_BASE"]).environ()
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = ctx()
    assert found is not None
    assert checkpoint("k").remote_destination.endswith("/by-key/k") != found.place.uri.endswith("/by-key/k")


KEYED = SAVES.replace("taskckpt.checkpoint()", "taskckpt.checkpoint('model')")


def test_a_key_says_that_two_programs_are_one(tmp_path: Path) -> None:
    # Once: in a batch job a key was compared with the program that had saved, too.
    for name, expected in (("train.py", "None"), ("evaluate.py", "b'1'")):
        (tmp_path / name).write_text(KEYED)
        assert run_in_job(tmp_path / name, "1") == expected
