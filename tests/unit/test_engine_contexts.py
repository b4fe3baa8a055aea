"""Who a task is under an engine: which of several counts, and what its threads and child processes are told."""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import taskckpt
from taskckpt import Checkpoint, TaskContext, _process, checkpoint, ctx, engines, task
from taskckpt.engines import PROCESS, EngineTask, ending
from taskckpt.errors import (
    AmbiguousIdentityError,
    NoTaskContextError,
    StaleAttemptError,
    TaskckptWarning,
    UsageError,
)


class Message:
    """What an engine has of one execution of a task; it lets go of it afterwards."""


class Worker:
    """An engine that runs whatever it is told in the thread that asks, as queues do."""

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
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_process, "process", _process.Process())
    monkeypatch.setenv("TASKCKPT_BASE", str(tmp_path / "base"))
    return str(tmp_path / "base")


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    engines.register("queue", made.says)
    yield made
    engines.unregister("queue")


def here() -> TaskContext:
    found = ctx()
    assert found is not None
    return found


def save_as(key: str, content: bytes = b"x", **options: Any) -> None:
    checkpoint(key, **options).save_sync(content)


def in_thread(function: Callable[[], Any]) -> Any:
    answers: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            answers.put(function())
        except Exception as error:
            answers.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    return answers.get_nowait()


CHILD = """
import json, taskckpt
try:
    found = taskckpt.ctx()
    print(json.dumps(found and [found.run, found.task, found.attempt]))
except taskckpt.errors.TaskckptError as error:
    print(json.dumps(error.code))
"""


def child(environ: dict[str, str] | None = None) -> Any:
    """What a child process says that it is."""
    done = subprocess.run([sys.executable, "-c", CHILD], env=environ, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


# --- one execution ---------------------------------------------------------------------------------


def test_each_execution_is_an_attempt_of_its_own_whatever_number_it_is_told(worker: Worker) -> None:
    def save(number: int) -> Checkpoint:
        made = here().checkpoint
        assert here().checkpoint is made
        made.load_sync()
        made.save_sync(b"%d" % number)
        return made

    first = worker.run(lambda: save(1), attempt=0)
    second = worker.run(lambda: save(2), attempt=0)  # delivered again, with the same number
    assert first is not second
    with pytest.raises(StaleAttemptError):
        first.save_sync(b"3")
    assert worker.run(lambda: checkpoint().load_bytes_sync(), attempt=0) == b"2"


def test_two_live_copies_of_one_message_in_one_process(worker: Worker) -> None:
    both, results = threading.Barrier(2, timeout=10), queue.Queue[Any]()

    def copy(number: int) -> None:
        cp = here().checkpoint
        both.wait()
        try:
            cp.load_sync()
            cp.save_sync(b"%d" % number)
            both.wait()
            cp.save_sync(b"%d again" % number)
        except (StaleAttemptError, threading.BrokenBarrierError) as error:
            both.abort()
            results.put(type(error))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: worker.run(lambda: copy(number), attempt=0), (1, 2)))
    assert StaleAttemptError in {results.get_nowait() for _ in range(results.qsize())}


def test_nothing_is_remembered_of_executions_that_ended(worker: Worker) -> None:
    for number in range(50):
        worker.run(lambda: checkpoint().save_sync(b"x"), task=f"t{number}", alone=True)
        worker.run(partial(save_as, f"key {number % 3}"), task=f"t{number}", alone=True)
    gc.collect()
    process = _process.process
    assert not process.running
    assert not process.executions
    assert len(process.contexts) == 0
    assert "TASKCKPT_TASK" not in os.environ


def test_executions_of_which_nobody_tells_the_end_are_not_kept_for_ever(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_process, "MOST_EXECUTIONS", 4)
    for number in range(10):
        context = worker.run(here, task=f"t{number}", execution=("thread", number))
        assert worker.run(here, task=f"t{number}", execution=("thread", number)) is context
    assert len(_process.process.executions) == 4


def test_an_execution_that_ends_in_the_middle_of_anything(worker: Worker) -> None:
    """The garbage collector runs whenever it likes: while what runs here is looked at, too."""
    cycles: list[Any] = []

    def work() -> None:
        said = worker.says()
        assert said is not None
        loop: list[Any] = [said.execution]
        loop.append(loop)
        cycles.append(loop)
        assert here().task == said.task

    for number in range(20):
        worker.run(partial(work), task=f"t{number}", alone=True)
    assert len(_process.process.running) == 20
    with _process.exclusively():
        running = iter(_process.process.running.values())
        next(running)
        cycles.clear()
        gc.collect()
        assert len(list(running)) == 19, "nobody took them out meanwhile"
    assert not _process.process.running
    assert "TASKCKPT_AMBIGUOUS" not in os.environ


# --- threads and child processes -------------------------------------------------------------------


def test_threads_and_children_of_the_only_task_are_told(worker: Worker) -> None:
    def work() -> None:
        context = here()
        assert in_thread(ctx) is context
        assert child() == ["r", "t", 3]

    worker.run(work, alone=True, attempt=3)
    assert child() is None
    assert in_thread(ctx) is None


def test_a_process_that_is_one_task(worker: Worker) -> None:
    def work() -> Any:
        context = here()
        assert in_thread(ctx) is context
        return child()

    assert worker.run(work, execution=PROCESS, attempt=0) == ["r", "t", 0]
    assert worker.run(work, execution=PROCESS, attempt=1) == ["r", "t", 1]
    assert worker.run(work, execution=PROCESS, task="next") == ["r", "next", None]


def test_where_others_may_run_threads_and_children_must_be_told(worker: Worker) -> None:
    def work() -> None:
        context = here()
        assert isinstance(in_thread(ctx), AmbiguousIdentityError)
        assert child() == "ambiguous-identity"
        assert child({**os.environ, **context.environ()}) == ["r", "t", None]

    worker.run(work)
    assert child() is None


def test_where_nobody_tells_the_end_children_are_told_nothing(worker: Worker) -> None:
    def work() -> None:
        context = here()
        assert in_thread(ctx) is None
        assert child() is None
        assert child({**os.environ, **context.environ()}) == ["r", "t", None]

    worker.run(work, execution=("thread", 1))


def test_a_child_joins_and_does_not_fence(worker: Worker) -> None:
    def work() -> None:
        cp = checkpoint()
        save = "import taskckpt; cp = taskckpt.checkpoint(); cp.load_sync(); cp.save_sync(b'by the child')"
        subprocess.run([sys.executable, "-c", save], check=True)
        assert cp.load_bytes_sync() == b"by the child"
        cp.save_sync(b"by the parent")

    worker.run(work, alone=True)


# --- one inside of another --------------------------------------------------------------------------


def test_a_task_in_an_engines_task_is_part_of_it(worker: Worker) -> None:
    @task
    def inner() -> tuple[str, str]:
        return here().run, here().task

    run, name = worker.run(inner)
    assert run == "r"
    assert name.endswith(" <in> t")


def test_an_engines_task_in_a_task_is_part_of_that(worker: Worker) -> None:
    """Each item of a flow that a task runs is a task: they do not share the one around them."""

    @task(key="pipeline", retries=0)
    def pipeline() -> list[TaskContext]:
        return [worker.run(here, task=f"item {number}") for number in range(2)]

    first, second = pipeline()
    assert (first.task, second.task) == ("r/item 0 <in key> pipeline", "r/item 1 <in key> pipeline")
    assert first.place != second.place


def test_what_a_task_handed_down_is_around_an_engines_task(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that a task started, and which runs many."""

    @task(retries=0)
    def driver() -> dict[str, str]:
        return here().environ()

    environ = driver()
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = [worker.run(here, task=f"item {number}").task for number in range(2)]
    assert found == [f"r/item {number} <in> {environ['TASKCKPT_TASK']}" for number in range(2)]
    # What is not in one of its parts is in none of them, and not in the driver either.
    assert child() == "ambiguous-identity"
    assert worker.run(child) == "ambiguous-identity"
    assert isinstance(in_thread(ctx), AmbiguousIdentityError)


def test_a_process_of_the_same_task_stays_in_it(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks whose engine says who they are, as the process above them did."""
    environ = worker.run(lambda: here().environ())
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_process, "process", _process.Process())
    context = worker.run(here)
    assert (context.run, context.task) == ("r", "t")
    assert environ["TASKCKPT_CLAIMS"].endswith(context._nonce)


def test_what_a_person_named_wins(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKCKPT_TASK", "mine")
    context = worker.run(here, attempt=2, task="theirs")
    assert (context.run, context.task, context.attempt) == ("r", "mine", 2)


def test_a_name_for_a_worker_of_many_tasks_is_refused(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKCKPT_TASK", "mine")
    worker.run(here, task="first")
    worker.run(here, task="first")
    with pytest.raises(AmbiguousIdentityError, match="TASKCKPT_TASK names one task, and queue runs several"):
        worker.run(here, task="second")


def test_what_all_threads_see_is_around_what_one_thread_runs(worker: Worker) -> None:
    """A workflow's step that runs a cluster's workers in threads of its own."""
    said = EngineTask("flow", run="f", task="step", in_all_threads=True)
    engines.register("flow", lambda: said)
    try:
        assert here().task == "step"
        found = in_thread(lambda: worker.run(here, task="item"))
        assert (found.run, found.task) == ("f/r", "step/item")
        assert worker.run(here, task="item").task == "step", "in the main thread the workflow is the inner one"
    finally:
        engines.unregister("flow")


# --- what cannot be told apart ---------------------------------------------------------------------

UNCLEAR = {"ambiguous": "Its items are all called alike.", "hint": "Pass a key."}


def test_an_ambiguous_identity_is_an_error(worker: Worker) -> None:
    with pytest.raises(AmbiguousIdentityError, match=r"queue: Its items are all called alike\. Hint: Pass a key\."):
        worker.run(ctx, **UNCLEAR)
    with pytest.raises(AmbiguousIdentityError):
        worker.run(checkpoint, **UNCLEAR)

    @task
    def inner() -> None:
        raise AssertionError

    with pytest.raises(AmbiguousIdentityError):
        worker.run(inner, **UNCLEAR)


def test_a_run_that_is_not_known_for_sure_is_settled_by_its_origin(worker: Worker) -> None:
    says = {**UNCLEAR, "lineage_settles": True, "origin_run": "first"}
    with pytest.raises(AmbiguousIdentityError):
        worker.run(ctx, **says)
    assert worker.run(lambda: ctx(scope="lineage"), **says).run == "first"
    with pytest.raises(AmbiguousIdentityError):
        worker.run(lambda: ctx(scope="lineage"), **UNCLEAR, origin_run="first")


def test_a_key_settles_it(worker: Worker) -> None:
    def save() -> None:
        checkpoint("item 1", keep=1).save_sync(b"1")

    worker.run(save, **UNCLEAR)
    assert worker.run(lambda: checkpoint("item 1").load_bytes_sync(), **UNCLEAR) == b"1"

    @task(key="item 2")
    def inner() -> str:
        return here().task

    assert worker.run(inner, **UNCLEAR) == "item 2"


def test_so_does_a_name(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKCKPT_TASK", "item 1")
    assert worker.run(here, **UNCLEAR).task == "item 1"


def test_a_key_and_a_name_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKCKPT_TASK", "a")
    monkeypatch.setenv("TASKCKPT_KEY", "b")
    with pytest.raises(UsageError, match="contradict each other"):
        ctx()


# --- scopes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "variable", "@task"])
def test_the_lineage_is_followed_if_asked_for(worker: Worker, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    says = {"run": "second", "origin_run": "first"}
    assert worker.run(here, **says).run == "second"
    if how == "variable":
        monkeypatch.setenv("TASKCKPT_SCOPE", "lineage")
        assert worker.run(here, **says).run == "first"
    elif how == "argument":
        assert worker.run(lambda: ctx(scope="lineage"), **says).run == "first"
    else:
        assert worker.run(task(scope="lineage")(here), **says).run == "first"
    monkeypatch.setenv("TASKCKPT_RUN", "mine")
    assert worker.run(lambda: ctx(scope="lineage"), **says).run == "mine"


def test_an_operators_clear_may_mean_to_start_over(worker: Worker) -> None:
    kept = worker.run(here, generation="1")
    assert kept.place == worker.run(here, generation="2").place
    fresh = [worker.run(lambda: ctx(on_clear="fresh"), generation=one).place for one in "112"]
    assert fresh[0] == fresh[1] != fresh[2]


@pytest.mark.parametrize(("argument", "variable"), [("scope", "TASKCKPT_SCOPE"), ("on_clear", "TASKCKPT_ON_CLEAR")])
def test_unknown_words(argument: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=f"{argument}='all' is unknown"):
        ctx(**{argument: "all"})  # type: ignore[arg-type]
    monkeypatch.setenv(variable, "all")
    with pytest.raises(UsageError, match=f"{variable}='all' is unknown"):
        ctx()


# --- bases -----------------------------------------------------------------------------------------


def test_a_key_does_not_lie_where_only_one_run_looks(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TASKCKPT_BASE")
    says = {"base": str(tmp_path / "run 1"), "base_is_of_run": True}
    assert worker.run(here, **says).base == str(tmp_path / "run 1")

    @task(key="k")
    def keyed() -> None:
        raise AssertionError

    for use in (lambda: checkpoint("k"), keyed):
        with pytest.raises(UsageError, match="spans runs, and the base that queue offers is this run's only"):
            worker.run(use, **says)
    monkeypatch.setenv("TASKCKPT_BASE", str(tmp_path / "lasting"))
    assert worker.run(lambda: checkpoint("k").load_sync(), **says) is None


@pytest.mark.parametrize("attempt", [0, 1, None])
def test_a_retry_that_finds_nothing_on_a_disk_of_this_host_says_so_loudly(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, attempt: int | None
) -> None:
    monkeypatch.delenv("TASKCKPT_BASE")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", TaskckptWarning)
        worker.run(lambda: checkpoint().load_sync(), attempt=attempt)
    assert [one.levelname for one in caplog.records if "State of this queue task" in one.message] == ["WARNING"]
    loud = [one.message for one in caplog.records if one.levelno == logging.ERROR]
    assert bool(loud) is bool(told) is (attempt == 1)
    if loud:
        assert "found nothing" in loud[0]
        assert str(Path(".taskckpt").absolute()) in loud[0]
        assert "TASKCKPT_BASE" in loud[0]


def test_a_base_that_is_a_file(worker: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TASKCKPT_BASE")
    (tmp_path / "file").touch()
    with pytest.raises(taskckpt.TaskckptError):
        worker.run(lambda: checkpoint().load_sync(), base=str(tmp_path / "file"))


# --- ranks -----------------------------------------------------------------------------------------


def test_other_ranks_only_load_and_fence_nobody(worker: Worker) -> None:
    def rank_0() -> Checkpoint:
        cp = checkpoint()
        cp.load_sync()
        cp.save_sync(b"1")
        return cp

    def rank_1() -> None:
        assert (here().rank, here().world_size) == (1, 2)
        assert checkpoint().load_bytes_sync() == b"1"
        for refused in (lambda: checkpoint().save_sync(b"2"), lambda: checkpoint().clear_sync()):
            with pytest.raises(UsageError, match=r"Rank 1 does not .*rank 0 saves"):
                refused()

    def first() -> None:
        cp = rank_0()
        worker_of_rank_1 = threading.Thread(target=lambda: worker.run(rank_1, rank=1, world_size=2))
        worker_of_rank_1.start()
        worker_of_rank_1.join()
        cp.save_sync(b"3")

    worker.run(first, rank=0, world_size=2)


def test_children_of_a_rank_are_told_which(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = worker.run(lambda: here().environ(), rank=1, world_size=2)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert here().rank == 1
    with pytest.raises(UsageError, match=r"Rank 1 does not save"):
        checkpoint().save_sync(b"x")
    monkeypatch.setenv("TASKCKPT_RANK", "-1")
    with pytest.raises(UsageError, match="TASKCKPT_RANK='-1' must be"):
        ctx()


def test_each_rank_may_have_a_checkpoint_of_its_own(worker: Worker) -> None:
    for rank in range(2):
        worker.run(partial(save_as, "shard", b"%d" % rank, per_rank=True), rank=rank, world_size=2)
    for rank in range(2):
        found = worker.run(lambda: checkpoint("shard", per_rank=True).load_bytes_sync(), rank=rank, world_size=2)
        assert found == b"%d" % rank


def test_a_task_of_another_rank_does_not_clear_what_rank_0_saved(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    @task(clear_on_success=True)
    def work() -> None:
        if here().rank == 0:
            checkpoint().save_sync(b"1")
        checkpoint().load_sync()

    worker.run(work, rank=1, world_size=2)
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


# --- errors ----------------------------------------------------------------------------------------


class Fatal(Exception):  # noqa: N818 - an engine's
    """An engine's exception that ends a task; it takes arguments of its own."""

    def __init__(self, code: int) -> None:
        self.code_of_engine = code


def test_a_stale_attempt_is_the_engines_own_end_of_a_task(worker: Worker) -> None:
    stale = ending(Fatal, code_of_engine=7)
    assert ending(Fatal, code_of_engine=7) is stale

    def work() -> None:
        cp = checkpoint()
        cp.load_sync()
        Checkpoint(here().place.uri).load_sync()
        cp.save_sync(b"x")

    with pytest.raises(StaleAttemptError) as raised:
        worker.run(work, stale=stale)
    assert isinstance(raised.value, Fatal)
    assert raised.value.code_of_engine == 7
    assert raised.value.code == "stale-attempt"
    assert "took the task over" in str(raised.value)
    again = pickle.loads(pickle.dumps(raised.value))
    assert type(again) is stale
    assert (str(again), again.uri, again.hint) == (str(raised.value), raised.value.uri, raised.value.hint)
    with pytest.raises(Fatal):
        worker.run(task(retries=0)(work), stale=stale)


def test_a_checkpoint_of_an_engine_can_be_given_to_a_child(worker: Worker) -> None:
    cp = worker.run(checkpoint, stale=ending(Fatal))
    assert pickle.loads(pickle.dumps(cp)).load_sync() is None


# --- what engines say ------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["run", "task"])
@pytest.mark.parametrize("value", ["", " ", None, 7])
def test_names_that_are_none(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"gave {field}="):
        EngineTask("x", **{"run": "r", "task": "t", field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["attempt", "rank", "world_size"])
@pytest.mark.parametrize("value", [-1, 10**9, "1", 1.0, True])
def test_numbers_that_cannot_be(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"gave {field}="):
        EngineTask("x", run="r", task="t", **{field: value})  # type: ignore[arg-type]


def test_one_engine_or_none_can_be_chosen(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKCKPT_ENGINE", "none")
    assert worker.run(ctx) is None
    monkeypatch.setenv("TASKCKPT_ENGINE", "queue")
    assert worker.run(here).task == "t"
    with pytest.raises(UsageError, match="queue does not run this code"):
        ctx()
    monkeypatch.setenv("TASKCKPT_ENGINE", "prefekt")
    with pytest.raises(UsageError, match=r"is no engine.*prefect"):
        ctx()


def test_engines_of_entry_points_are_asked(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "from taskckpt.engines import EngineTask\ndef find(): return EngineTask('theirs', run='r', task='published')\n"
    )
    metadata = tmp_path / "theirs-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[taskckpt.engines]\ntheirs = theirs:find\n")
    assert child({**os.environ, "PYTHONPATH": str(tmp_path)}) == ["r", "published", None]


def test_survey_tells_what_each_says_and_which_fail(worker: Worker) -> None:
    def broken() -> EngineTask:
        raise ZeroDivisionError

    engines.register("broken", broken)
    try:
        found = {one.name: one for one in worker.run(engines.survey)}
    finally:
        engines.unregister("broken")
    assert isinstance(found["broken"].error, UsageError)
    assert found["queue"].task is not None
    assert found["queue"].task.task == "t"
    assert {"flyte", "prefect", "ray", "celery"} <= found.keys()
    assert found["prefect"].task is None


def test_the_same_words_never_name_two_tasks() -> None:
    assert engines.name_of("a/b", "c") != engines.name_of("a", "b/c")
    assert engines.name_of("a%2Fb") != engines.name_of("a/b")


def test_the_innermost_base_and_rank_count() -> None:
    system = EngineTask("batch", run="1", task="1", rank=3, world_size=4, base="/opt", in_environment=True)
    launcher = EngineTask("torchrun", run="2", task="2", rank=1, world_size=2, in_environment=True)
    planner = EngineTask("flow", run="3", task="3")
    joined = engines._joined([("task", planner), ("launcher", launcher), ("system", system)])
    assert joined == (replace(planner, rank=1, world_size=2, base="/opt"), 1, 2)
    # A worker of a cluster may be a rank of its batch job; what it runs is not.
    assert engines._joined([("task", planner), ("system", system)]).task == replace(planner, base="/opt")
    assert engines._joined([("launcher", launcher), ("system", system)]).task == replace(system, rank=1, world_size=2)
    assert engines._joined([("launcher", launcher)]) == (launcher, 1, 2)
    # Which run it is of is not known, so it is no task: only a rank of whatever this is.
    assert engines._joined([("launcher", replace(launcher, ambiguous="It tells ranks only."))]) == (None, 1, 2)


def test_ranks_of_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun tells ranks, and no run: the script's own task or key is the identity."""
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")

    @task
    def work() -> tuple[str, int | None]:
        with pytest.raises(UsageError, match=r"Rank 1 does not save"):
            checkpoint().save_sync(b"x")
        return here().run, here().rank

    assert work() == ("local", 1)
    assert ctx() is None
    with pytest.raises(UsageError, match=r"Rank 1 does not save"):
        checkpoint("k").save_sync(b"x")


def test_a_rank_that_is_told_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group that begins inside of the task."""

    @task
    def work() -> None:
        checkpoint().save_sync(b"before")
        assert here().rank is None
        monkeypatch.setenv("PMI_RANK", "1")
        monkeypatch.setenv("PMI_SIZE", "2")
        assert (here().rank, here().world_size) == (1, 2)
        assert here() is here()
        with pytest.raises(UsageError, match=r"Rank 1 does not save"):
            checkpoint().save_sync(b"by rank 1")
        monkeypatch.setenv("PMI_RANK", "0")

    work()


def test_no_task_is_told_how_to_name_it() -> None:
    with pytest.raises(NoTaskContextError):
        checkpoint()
