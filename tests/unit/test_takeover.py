"""Who has the task: launchers that only look, threads and workers that were left behind, replies that were lost."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import taskckpt
from taskckpt import Checkpoint, StaleAttemptError, _process, task
from taskckpt._process import CLAIMS, MOST_CLAIMS
from taskckpt.errors import CommitUnknownError, DeniedError, StorageFullError, UnavailableError, UsageError
from taskckpt.testing import intercepted
from tests.interrupts import interrupted_at, press_ctrl_c

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _process_as_new(monkeypatch, tmp_path):
    monkeypatch.setattr(_process, "process", _process.Process())
    monkeypatch.setenv("TASKCKPT_BASE", str(tmp_path / "base"))
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        monkeypatch.delenv(name, raising=False)


def payloads(place) -> list[Path]:
    return sorted(path for path in Path(place, "data").rglob("*") if path.is_file())


# --- launchers ---------------------------------------------------------------------------------

LOOKS = {
    "prev_exists": "taskckpt.checkpoint('train').prev_exists()",
    "ctx": "os.environ['TASKCKPT_TASK'] = 'x'; taskckpt.ctx(); taskckpt.ctx().checkpoint.prev_exists(); "
    "del os.environ['TASKCKPT_TASK']",
    "object": "taskckpt.checkpoint('train').path",
    "of": "taskckpt.checkpoint('train').save_sync(b'0'); os.environ.pop('TASKCKPT_CLAIMS'); "
    "taskckpt.Checkpoint.of(key='train').load_bytes_sync()",
    "nothing": "",
}
LAUNCHER = """
import os, subprocess, sys, taskckpt
child = '''
import sys, taskckpt
cp = taskckpt.checkpoint("train")
cp.load_bytes_sync()
print("ready", flush=True)
for line in sys.stdin:
    try:
        cp.save_sync(line.encode()); print("saved", flush=True)
    except taskckpt.StaleAttemptError:
        print("stale", flush=True)
'''
%s
def start():
    made = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert made.stdout.readline() == "ready\\n"
    return made
def tell(process):
    process.stdin.write("1\\n"); process.stdin.flush()
    return process.stdout.readline().strip()
first = start()
second = start()
print(tell(second), tell(first), tell(second))
for one in (first, second):
    one.communicate()
"""


def launched(look: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER % look],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("look", LOOKS)
def test_attempts_of_a_launcher_that_only_looked_fence_each_other(look):
    assert launched(LOOKS[look]) == "saved stale saved"


def test_workers_of_a_process_that_loaded_are_one_attempt():
    assert launched("taskckpt.checkpoint('train').load_sync()") == "saved saved saved"


@pytest.mark.parametrize("look", ["prev_exists", "load"])
def test_only_who_took_the_task_over_hands_it_down(look):
    cp = taskckpt.checkpoint("train")
    cp.prev_exists()
    assert CLAIMS not in os.environ
    if look == "load":
        cp.load_sync()
        assert len(os.environ[CLAIMS].split()) == 1


def test_many_keys_do_not_fill_the_environment():
    began = time.monotonic()
    for number in range(4000):
        taskckpt.checkpoint(f"item-{number}")
    assert CLAIMS not in os.environ
    for number in range(2 * MOST_CLAIMS):
        held = taskckpt.checkpoint(f"item-{number}")
        _process.hand_down_claim(taskckpt.context._keyed(f"item-{number}"))
    claims = os.environ[CLAIMS].split()
    assert len(claims) == MOST_CLAIMS
    assert claims[-1].endswith(held._attempt.claim_nonce), "the newest stay"

    @task(retries=0)
    def work():
        taskckpt.checkpoint("one more").load_sync()
        return os.environ[CLAIMS].split()

    inside = work()
    assert len(inside) == MOST_CLAIMS
    assert len(os.environ[CLAIMS].split()) <= MOST_CLAIMS
    assert time.monotonic() - began < 10


def test_claims_of_parents_stay_where_there_is_room(monkeypatch):
    monkeypatch.setenv(CLAIMS, "feed:beef")
    taskckpt.checkpoint("a").load_sync()
    taskckpt.checkpoint("b").load_sync()
    assert os.environ[CLAIMS].split()[0] == "feed:beef"
    assert len(os.environ[CLAIMS].split()) == 3


# --- what earlier attempts and calls left running ----------------------------------------------


@pytest.mark.parametrize("key", [None, "my-key"])
@pytest.mark.parametrize("first_call", ["load", "save"])
def test_a_thread_left_by_the_attempt_before_is_stale(key, first_call):
    left: list[Checkpoint] = []

    @task(retries=2, wait_initial_s=0, run="r")
    def work():
        cp = taskckpt.checkpoint(key)
        if first_call == "load":
            cp.load_sync()
        cp.save_sync(b"%d" % len(left))
        left.append(cp)
        if len(left) < 3:
            raise RuntimeError("timed out")
        for older in left[:2]:
            with pytest.raises(StaleAttemptError):
                older.save_sync(b"zombie")
        cp.save_sync(b"50")
        assert taskckpt.checkpoint(key) is cp
        return cp.remote_destination

    place = work()
    assert len({id(one) for one in left}) == 3
    assert Checkpoint(place, read_only=True).load_bytes_sync() == b"50"


def test_children_of_the_next_attempt_do_not_join_a_key_of_the_one_before():
    seen = []

    @task(retries=1, wait_initial_s=0)
    def work():
        seen.append(os.environ.get(CLAIMS, "").split())
        if len(seen) == 1:
            taskckpt.checkpoint("k").save_sync(b"1")
            seen[0] = os.environ[CLAIMS].split()
            raise RuntimeError("again")

    work()
    assert len(seen[0]) == 2
    assert len(seen[1]) == 1, "its own only"
    assert not set(seen[0]) & set(seen[1])


@pytest.mark.parametrize("clears", [True, False])
def test_what_an_ended_call_left_running_saves_no_more(clears):
    go, problems, places = threading.Event(), [], []

    @task(retries=0, clear_on_success=clears)
    def work():
        cp = taskckpt.checkpoint()
        places.append(cp.remote_destination)
        cp.save_sync(b"99")

        def late():
            go.wait(10)
            for act in (lambda: cp.save_sync(b"left over"), cp.clear_sync):
                try:
                    act()
                except StaleAttemptError as error:
                    problems.append(error)

        thread = threading.Thread(target=late)
        thread.start()
        return thread

    thread = work()
    go.set()
    thread.join(10)
    assert len(problems) == 2
    assert "has ended" in str(problems[0])
    assert Checkpoint(places[0], read_only=True).load_bytes_sync() == (None if clears else b"99")


def test_the_same_process_is_told_what_happened(tmp_path):
    one = Checkpoint(tmp_path / "p")
    one.save_sync(b"1")
    Checkpoint(tmp_path / "p").load_sync()
    for _ in range(2):
        with pytest.raises(StaleAttemptError, match=r"Another Checkpoint object of this very process.*read_only=True"):
            one.save_sync(b"2")


# --- loads that could not claim ----------------------------------------------------------------


class Faults:
    """Creating a record fails: before it arrives, or with the reply lost."""

    error: Exception | None = None
    when = "before"

    def __call__(self, when, verb, _keys):
        if verb == "create" and when == self.when and self.error is not None:
            raise self.error


@pytest.fixture
def faults():
    hook = Faults()
    with intercepted(hook):
        yield hook


@pytest.fixture
def place(tmp_path):
    Checkpoint(tmp_path / "p").save_sync(b"10")
    return tmp_path / "p"


def test_a_load_that_could_not_claim_is_overtaken_by_a_save(faults, place):
    older = Checkpoint(place)
    faults.error = DeniedError("the token is being rotated")
    assert older.load_bytes_sync() == b"10"
    faults.error = None
    newer = Checkpoint(place)
    assert newer.load_bytes_sync() == b"10"
    newer.save_sync(b"99")
    with pytest.raises(StaleAttemptError):
        older.save_sync(b"11")
    newer.save_sync(b"100")
    assert Checkpoint(place).load_bytes_sync() == b"100"


def test_a_load_that_could_not_claim_may_save_later(faults, place):
    only = Checkpoint(place)
    faults.error = DeniedError("the token is being rotated")
    assert only.load_bytes_sync() == b"10"
    with pytest.raises(DeniedError):
        only.save_sync(b"11")
    faults.error = None
    only.save_sync(b"11")
    assert Checkpoint(place).load_bytes_sync() == b"11"


def test_a_load_on_a_full_disk_tells_the_way_out(faults, place):
    faults.error = StorageFullError("No room to write.")
    with pytest.raises(StorageFullError) as caught:
        Checkpoint(place).load_bytes_sync()
    assert any("read_only=True" in note for note in caught.value.__notes__)
    assert Checkpoint(place, read_only=True).load_bytes_sync() == b"10"


# --- replies that were lost, signals, what is kept ---------------------------------------------


@pytest.mark.parametrize("clears", [1, 2])
def test_a_save_after_a_clear_without_an_answer_is_all_there_is(faults, place, clears):
    cp = Checkpoint(place, keep=3)
    cp.save_sync(b"old" * 50_000)
    cp.save_sync(b"old, too" * 50_000)
    faults.error, faults.when = UnavailableError("the reply was lost"), "after"
    for _ in range(clears):
        with pytest.raises(CommitUnknownError):
            cp.clear_sync()
    assert cp.load_bytes_sync() is None
    faults.error = None
    cp.save_sync(b"new" * 50_000)
    assert cp.load_bytes_sync() == b"new" * 50_000
    (payload,) = [path for path in payloads(place) if b"new" in path.read_bytes()]
    payload.write_bytes(b"damaged")
    with pytest.raises(taskckpt.errors.CorruptCheckpointError):
        Checkpoint(place).load_bytes_sync()  # and not what was cleared


@pytest.mark.parametrize("handed", [False, True], ids=["claims", "joins"])
@pytest.mark.parametrize("act", ["load", "save"])
def test_an_interrupt_at_any_line_of_a_takeover_leaves_it_able_to_save(tmp_path, handed, act):
    functions = {"hold", "view", "_held_view", "_take", "_make_claim", "_join", "_begin", "_create", "_probe"}
    at, interrupted = 0, True
    while interrupted:
        at += 1
        place = tmp_path / str(at)
        Checkpoint(place).save_sync(b"1")
        cp = Checkpoint(place)
        if handed:
            cp.load_sync()
            cp = copy.deepcopy(cp)
        first = cp.load_bytes_sync if act == "load" else lambda cp=cp: cp.save_sync(b"2")
        interrupted = interrupted_at(at, functions, first, press_ctrl_c)
        cp.save_sync(b"3")
        cp.save_sync(b"4")
        assert Checkpoint(place).load_bytes_sync() == b"4"
    assert at > 20, "there are lines to be interrupted at"


def test_a_signal_handler_must_not_clear_what_is_being_saved(tmp_path):
    cp = Checkpoint(tmp_path / "p")
    cp.save_sync(b"1")
    problems, armed = [], True

    def handler(*_):
        try:
            cp.clear_sync()
        except UsageError as error:
            problems.append(error)

    def hook(when, verb, _keys):
        nonlocal armed
        if armed and (when, verb) == ("after", "write"):
            armed = False
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with intercepted(hook):
            cp = Checkpoint(tmp_path / "p")
            cp.save_sync(b"2" * 200_000)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(problems) == 1
    assert "in the middle of a save" in str(problems[0])
    assert Checkpoint(tmp_path / "p").load_bytes_sync() == b"2" * 200_000
    cp = Checkpoint(tmp_path / "p")
    cp.save_sync(b"3")
    cp.clear_sync()
    assert cp.load_sync() is None


@pytest.mark.parametrize("loads", [True, False])
def test_what_was_resumed_from_stays_when_a_worker_saves_first(tmp_path, loads):
    place, big = tmp_path / "p", 100_000
    first = Checkpoint(place, keep=2)
    first.save_sync(b"1" * big)
    first.save_sync(b"2" * big)

    def damage(state):
        for path in payloads(place):
            if path.read_bytes()[:1] == state:
                path.write_bytes(b"XXXX")

    damage(b"2")
    second = Checkpoint(place, keep=1)
    assert second.load_bytes_sync() == b"1" * big
    worker = copy.deepcopy(second)
    if loads:
        assert worker.load_bytes_sync() == b"1" * big
    worker.save_sync(b"3" * big)
    damage(b"3")
    assert Checkpoint(place).load_bytes_sync() == b"1" * big
