"""The schedules that break a weaker protocol, on the real code: it stays right, and without its rule it breaks.

Each test plays `tests/model/schedules.py` request by request on real attempts. With the guard at 1 instead of 64
slots, what takes a pause of 64 saves in life takes one here.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from taskckpt import Checkpoint, _payload
from taskckpt._attempt import Attempt, Owner
from taskckpt._layout import SlotName, payload_key
from taskckpt._log import retention as _retention
from taskckpt._log import slots
from taskckpt._log import writer as _log
from taskckpt._log.history import LogMoved, LogReader, View
from taskckpt._log.records import Commit
from taskckpt._log.slots import new_nonce
from taskckpt._log.writer import TaskLog
from taskckpt._stores import Listing
from taskckpt._stores.local import LocalStore
from taskckpt.errors import CommitUnknownError
from taskckpt.testing import intercepted
from tests.model.schedules import SCHEDULES
from tests.replay.director import Director
from tests.replay.judge import violations
from tests.replay.stage import Actor, Stage

BY_NAME = {schedule.name: schedule for schedule in SCHEDULES}
pytestmark = pytest.mark.filterwarnings("ignore:memory... lives in this process only")


@pytest.fixture(autouse=True)
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard at its weakest, and every payload an object of its own, as in the model."""
    monkeypatch.setattr(_retention, "GUARDED_SLOTS", 1)
    monkeypatch.setattr(_log, "RECORD_BATCH", 1)
    monkeypatch.setattr(_payload, "INLINE_LIMIT_BYTES", -1)


@pytest.fixture(params=["local", "memory"])
def dest(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "task") if request.param == "local" else f"memory:/{tmp_path}"


# --- with all rules: what the schedule's `instead` says


class Expected(NamedTuple):
    """How each actor's operations end, what loads afterwards, and the records in the order of their landing."""

    results: dict[str, list[str | None]]
    final: str | None
    story: str


EXPECTED: dict[str, Expected] = {
    "aba-after-clear": Expected(
        {"A": ["stale"], "B": ["done", "done"]},
        None,
        "A claim 1, B claim 2, B commit 3, B clear 4",
    ),
    "aba-payload-key": Expected(
        {"A": ["stale"], "B": ["done", "done"], "C": ["done"]},
        "C1",
        "A claim 1, B claim 2, B commit 3, B clear 4, C claim 5, C commit 6",
    ),
    "claim-in-a-hole": Expected(
        {"A": ["done", "done", "done"], "B": ["done"]},
        "B1",
        "A claim 1, A commit 2, A commit 3, A commit 4, B (claim 2), B claim 5, B commit 6",
    ),
    "child-with-its-parents-tail": Expected(
        {"A": ["done", "done"], "Q": ["done"]},
        "Q1",
        "A claim 1, A commit 2, A commit 3, Q join 4, Q commit 5",
    ),
    "child-payload-key": Expected(
        {"A": ["done"], "Q": ["done"]},
        "A1",
        "A claim 1, Q join 2, Q commit 3, A join 4, A commit 5",
    ),
    "siblings-record-as-lost-reply": Expected(
        {"A": ["done"], "Q": ["done"]},
        "Q1",
        "A claim 1, A commit 2, Q join 3, Q commit 4",
    ),
    "child-without-the-nonce": Expected(
        {"A": ["done", "done"], "Q": ["done"]},
        "Q1",
        "A claim 1, Q join 2, A join 3, A commit 4, A commit 5, Q join 6, Q commit 7",
    ),
    "lost-reply-and-prune": Expected(
        {"A": ["done"], "B": ["done", "done"]},
        "B2",
        "A claim 1, A commit 2, B claim 3, B commit 4, B commit 5",
    ),
    "clear-by-a-stale-attempt": Expected(
        {"A": ["stale"], "B": ["done"]},
        "B1",
        "A claim 2, B claim 3, B commit 4",
    ),
    "sweep-eats-a-siblings-upload": Expected(
        {"A": ["done"], "Q": ["done"]},
        "Q1",
        "A claim 2, A commit 3, Q join 4, Q commit 5",
    ),
    "prune-decided-after-the-fence": Expected(
        {"A": ["done"], "B": ["done"]},
        "B1",
        "A claim 1, A commit 2, B claim 3, B commit 4",
    ),
    "void-claim-read-as-the-top": Expected(
        {"A": ["done", "done"], "B": ["done"], "R": ["A2"]},
        "B1",
        "A claim 1, A commit 2, A commit 3, B (claim 2), B claim 4, B commit 5",
    ),
    "void-join-read-as-the-top": Expected(
        {"A": ["done", "done"], "Q": ["A2"], "P": [None, "A2"]},
        "A2",
        "P claim 1, A join 2, A commit 3, A commit 4, Q (join 3), Q join 5",
    ),
    "own-late-claim-read-as-held": Expected(
        {"A": ["done", "done"], "B": ["unavailable", "done"]},
        "B1",
        "A claim 1, A commit 2, A commit 3, B (claim 2), B claim 4, B commit 5",
    ),
    "stale-by-a-void-claim": Expected(
        {"A": ["done", "done"], "B": ["done"], "Q": ["done"]},
        "B1",
        "A claim 1, A commit 2, A commit 3, B (claim 2), Q join 4, Q commit 5, B claim 6, B commit 7",
    ),
    "late-save-read-as-the-top": Expected(
        {"A": ["unknown", "done", "done"], "R": ["A3"]},
        "A3",
        "A claim 1, A commit 2, A commit 3",
    ),
    "child-of-a-fenced-parent-claims": Expected(
        {"A": ["stale"], "B": ["done"], "Q": ["stale"]},
        "B1",
        "A claim 1, B claim 2, B commit 3",
    ),
    "own-earlier-save-read-as-stale": Expected(
        {"A": ["unknown", "done"]},
        "A2",
        "A claim 1, A commit 2, A commit 3",
    ),
    "leftover-of-an-undecided-save": Expected(
        {"A": ["unknown", "done"]},
        "A2",
        "A claim 1, A commit 2, A commit 3",
    ),
    "gone-read-as-none": Expected(
        {"A": ["done", "done"], "R": ["A2"]},
        "A2",
        "A claim 1, A commit 2, A commit 3",
    ),
    "resumed-from-goes-too-early": Expected(
        {"A": ["done"], "B": ["done"]},
        "B1",
        "A claim 1, A commit 2, B claim 3, B commit 4",
    ),
    "shared-payload-goes-with-one-of-its-commits": Expected(
        {"A": ["done", "done"]},
        "A1",
        "A claim 1, A commit 2, A commit 3",
    ),
    "undecided-pin-takes-the-payload-along": Expected(
        {"A": ["done", "unknown", "done"]},
        "A1",
        "A claim 1, A commit 2, A commit 3",
    ),
    "fall-back-to-what-was-rolled-back": Expected(
        {"A": ["done"], "B": ["done", "done"]},
        "A1",
        "A claim 1, A commit 2, B claim 3, B commit 4, B commit 5",
    ),
    "pin-beside-a-save-leaves-it-behind": Expected(
        {"A": ["done"], "B": ["done"], "J": ["done"]},
        "B1",
        "A claim 1, A commit 2, J claim 3, B join 4, B commit 5, J join 6, J commit 7",
    ),
    "pin-beside-a-pin-undoes-it": Expected(
        {"A": ["done"], "B": ["done", "done", "done"], "J": ["done"]},
        "B2",
        "A claim 1, A commit 2, J claim 3, B join 4, B commit 5, B commit 6, J join 7, J commit 8, B join 9, "
        "B commit 10",
    ),
    "pin-of-what-is-gone": Expected(
        {"A": ["done", "done"], "J": ["NotFoundError"]},
        "A2",
        "A claim 1, A commit 2, J join 3, A join 4, A commit 5, J join 6",
    ),
}


# --- without a rule


def _no_second_listing(patch: pytest.MonkeyPatch) -> None:
    original = TaskLog._make_claim

    def make_claim(self: TaskLog, survey: Any, stop: Any) -> View | None:
        slot = survey.view.top + 1
        patch.setattr(self.reader, "look", lambda **_: View({slot: (SlotName(slot, None),)}, (slot,), complete=True))
        try:
            return original(self, survey, stop)
        finally:
            patch.delattr(self.reader, "look")

    patch.setattr(TaskLog, "_make_claim", make_claim)


def _names(store: Any, folder: str) -> list[str]:
    return list(store.list_below(folder).names)


def _clear_takes_the_log(patch: pytest.MonkeyPatch) -> None:
    original = TaskLog.clear

    def clear(self: TaskLog, stop: Any) -> None:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(self, "_delete_quietly", lambda keys: None)
            original(self, stop)
        self._store.delete([f"{folder}/{name}" for folder in ("log", "data") for name in _names(self._store, folder)])

    patch.setattr(TaskLog, "clear", clear)


def _payload_keys_without(patch: pytest.MonkeyPatch, *, claim_nonce: bool) -> None:
    def key(slot: int, nonce: str, number: int, save_nonce: str, suffix: str = "") -> str:
        return payload_key(slot, nonce if claim_nonce else "0" * 16, number, "0" * 16, suffix)

    patch.setattr(_log, "payload_key", key)


def _bare_keys_and_clear_takes_the_log(patch: pytest.MonkeyPatch) -> None:
    _clear_takes_the_log(patch)
    _payload_keys_without(patch, claim_nonce=False)


def _keys_without_save_nonce(patch: pytest.MonkeyPatch) -> None:
    _payload_keys_without(patch, claim_nonce=True)


def _fork_with_tail(patch: pytest.MonkeyPatch) -> None:
    def fork(parent: Actor, child: Actor) -> None:
        log = copy.copy(parent.checkpoint._attempt._own_log(parent.checkpoint._attempt.open_store()))
        log._writer, log._dropped, log._unsettled = new_nonce(), [], []
        log._store = child.checkpoint._attempt.open_store()
        log.reader = LogReader(log._store)
        child.checkpoint._attempt._log = log

    patch.setattr(Director, "on_fork", staticmethod(fork), raising=False)


def _fork_with_tail_and_one_nonce(patch: pytest.MonkeyPatch) -> None:
    _fork_with_tail(patch)
    original = TaskLog._append

    def append(self: TaskLog, build: Any, stop: Any) -> Any:
        def same(slot: int) -> Any:
            record = build(slot)
            object.__setattr__(record.stamp, "nonce", "0" * 16)
            return record

        return original(self, same, stop)

    patch.setattr(TaskLog, "_append", append)


def _children_with_nonces_of_their_own(patch: pytest.MonkeyPatch) -> None:
    original = Attempt.__setstate__

    def setstate(self: Attempt, state: dict[str, Any]) -> None:
        original(self, state)
        self._owner = Owner()

    patch.setattr(Attempt, "__setstate__", setstate)


def _prune_what_others_wrote(patch: pytest.MonkeyPatch) -> None:
    def drop(self: TaskLog, kept: list[Any]) -> None:
        self._dropped += [one.slot for one in kept]

    patch.setattr(TaskLog, "_drop", drop)
    patch.setattr(_log, "dead_records", lambda dropped, *, first, last: [slot for slot in dropped if slot < last])


def _clear_without_a_record(patch: pytest.MonkeyPatch) -> None:
    def clear(self: TaskLog, stop: Any) -> None:
        self._store.delete([f"data/{name}" for name in self._store.list_below("data").names])

    patch.setattr(TaskLog, "clear", clear)


def _sweep_of_all_claims(patch: pytest.MonkeyPatch) -> None:
    def dead(keys: Any, *, living: set[str], **_: object) -> list[str]:
        return [key for key in keys if key not in living]

    patch.setattr(_log, "dead_payloads", dead)


def _prune_by_listing(patch: pytest.MonkeyPatch) -> None:
    """Deletes the payloads of all commits but the newest, whatever there is by now."""

    def prune(self: TaskLog) -> None:
        commits = []
        for slot in self.reader.look().slots:
            commits += [
                found for found in self.reader.read_slot(View({}, (slot,), True), slot) if type(found) is Commit
            ]
        self._delete_quietly([commit.stored.key for commit in commits[:-1] if commit.stored.key])

    patch.setattr(TaskLog, "_delete_dead_records", prune)


def _no_confirmation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LogReader, "expect_top", lambda self, view: None)


def _no_fenced_nonces(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slots, "_fenced_by", lambda owner: ())


def _own_claim_is_believed(patch: pytest.MonkeyPatch) -> None:
    original = TaskLog._join

    def join(self: TaskLog, survey: Any, stop: Any) -> View | None:
        top = survey.view.top
        if self.reader.read(SlotName(top, None)).stamp.writer != self._writer:
            return original(self, survey, stop)
        self._begin(survey.owner, top, survey)
        view: View = survey.view
        return view

    patch.setattr(TaskLog, "_join", join)


class _Forgetful(set[int]):
    def add(self, element: int, /) -> None:
        pass


def _late_slots_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = TaskLog.__init__

    def init(self: TaskLog, *args: Any, **more: Any) -> None:
        original(self, *args, **more)
        self._late_slots = _Forgetful()

    patch.setattr(TaskLog, "__init__", init)


def _undecided_payloads_go_at_once(patch: pytest.MonkeyPatch) -> None:
    original = TaskLog._create_settling

    def create(self: TaskLog, record: Any, stop: Any) -> Any:
        try:
            return original(self, record, stop)
        except CommitUnknownError:
            self._delete_quietly([record.stored.key])
            raise

    patch.setattr(TaskLog, "_create_settling", create)


def _gone_is_nothing(patch: pytest.MonkeyPatch) -> None:
    original = LogReader.read_slot

    def read_slot(self: LogReader, view: View, slot: int) -> Any:
        try:
            return original(self, view, slot)
        except LogMoved:
            return []

    patch.setattr(LogReader, "read_slot", read_slot)


def _nothing_is_protected(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TaskLog, "protected", lambda _self, **_options: {})


def _own_earlier_save_is_a_rival(patch: pytest.MonkeyPatch) -> None:
    original = TaskLog._holder

    def holder(self: TaskLog, name: SlotName, stop: Any) -> Any:
        found = original(self, name, stop)
        object.__setattr__(found.stamp.claim, "nonce", "0" * 16)
        return found

    patch.setattr(TaskLog, "_holder", holder)


def _shared_payloads_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_retention.Retention, "keys", lambda self: set())


def _undecided_repeats_own_their_payload(patch: pytest.MonkeyPatch) -> None:
    original = TaskLog._settle

    def settle(self: TaskLog, slot: int, but: Commit | None = None) -> None:
        lost = [one for one in self._unsettled if one.stamp.slot <= slot and one is not but]
        original(self, slot, but)
        self._delete_quietly([key for one in lost for key in one.keys])

    patch.setattr(TaskLog, "_settle", settle)


def _nothing_is_left_behind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TaskLog, "_left_behind", lambda self, position: ())


def _decided_once(patch: pytest.MonkeyPatch) -> None:
    original, first = TaskLog._repeated, dict[str, Commit]()

    def repeated(self: TaskLog, commit: Commit, slot: int, nonce: str, **more: Any) -> Commit:
        return original(self, first.setdefault(nonce, commit), slot, nonce, **more)

    patch.setattr(TaskLog, "_repeated", repeated)


def _pins_decided_once(patch: pytest.MonkeyPatch) -> None:
    original, first = TaskLog._repeated, dict[str, tuple[int, ...]]()

    def repeated(self: TaskLog, commit: Commit, slot: int, nonce: str, **more: Any) -> Commit:
        self._retained().pinned = first.setdefault(nonce, self._retained().pinned)
        return original(self, commit, slot, nonce, **more)

    patch.setattr(TaskLog, "_repeated", repeated)


def _gone_is_named_all_the_same(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TaskLog, "_expect_retained", lambda self, commit: commit)


WITHOUT: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "aba-after-clear": _clear_takes_the_log,
    "aba-payload-key": _bare_keys_and_clear_takes_the_log,
    "claim-in-a-hole": _no_second_listing,
    "child-with-its-parents-tail": _fork_with_tail,
    "child-payload-key": _keys_without_save_nonce,
    "siblings-record-as-lost-reply": _fork_with_tail_and_one_nonce,
    "child-without-the-nonce": _children_with_nonces_of_their_own,
    "lost-reply-and-prune": _prune_what_others_wrote,
    "clear-by-a-stale-attempt": _clear_without_a_record,
    "sweep-eats-a-siblings-upload": _sweep_of_all_claims,
    "prune-decided-after-the-fence": _prune_by_listing,
    "void-claim-read-as-the-top": _no_confirmation,
    "void-join-read-as-the-top": _no_confirmation,
    "own-late-claim-read-as-held": _own_claim_is_believed,
    "stale-by-a-void-claim": _no_confirmation,
    "late-save-read-as-the-top": _late_slots_are_forgotten,
    "child-of-a-fenced-parent-claims": _no_fenced_nonces,
    "own-earlier-save-read-as-stale": _own_earlier_save_is_a_rival,
    "leftover-of-an-undecided-save": _undecided_payloads_go_at_once,
    "gone-read-as-none": _gone_is_nothing,
    "resumed-from-goes-too-early": _nothing_is_protected,
    "shared-payload-goes-with-one-of-its-commits": _shared_payloads_are_not_counted,
    "undecided-pin-takes-the-payload-along": _undecided_repeats_own_their_payload,
    "fall-back-to-what-was-rolled-back": _nothing_is_left_behind,
    "pin-beside-a-save-leaves-it-behind": _decided_once,
    "pin-beside-a-pin-undoes-it": _pins_decided_once,
    "pin-of-what-is-gone": _gone_is_named_all_the_same,
}

# Who decides what to write, and is overtaken then.
EAGER = {
    "pin-beside-a-save-leaves-it-behind": ("J",),
    "pin-beside-a-pin-undoes-it": ("J",),
    "pin-of-what-is-gone": ("J",),
}
# Stories that need somebody before them: a sweep and a clear do nothing in a log that began with them.
SHIFTED = ("sweep-eats-a-siblings-upload", "clear-by-a-stale-attempt")


def _play(dest: str, name: str) -> Stage:
    with Stage(dest) as stage:
        shift = name in SHIFTED
        if shift:
            Checkpoint(dest).load_sync()
        Director(stage, BY_NAME[name], shift=int(shift), eager=EAGER.get(name, ())).play()
    return stage


@pytest.mark.parametrize("name", EXPECTED)
def test_the_real_code_does_what_the_schedule_demands(dest: str, name: str) -> None:
    stage = _play(dest, name)
    expected = EXPECTED[name]
    assert not violations(stage)
    assert stage.results() == expected.results
    assert stage.outcomes[-1].result == expected.final
    assert stage.story() == expected.story


@pytest.mark.parametrize("name", WITHOUT)
def test_without_its_rule_the_real_code_breaks(dest: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    WITHOUT[name](monkeypatch)
    found = violations(_play(dest, name))
    assert any(one.startswith(BY_NAME[name].violates[:2]) for one in found), found


def test_every_schedule_is_replayed() -> None:
    on_listings = {"readdir-is-no-snapshot"}  # takes place inside one request, see below
    assert EXPECTED.keys() | on_listings == WITHOUT.keys() | on_listings == BY_NAME.keys()


# --- what is no matter of whole requests


@pytest.mark.parametrize("once", [False, True])
def test_a_scan_that_misses_the_newest_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, once: bool) -> None:
    """`readdir-is-no-snapshot`: while R scans the folder, slot 3 comes and slot 2 goes, and it sees neither."""
    dest = str(tmp_path / "task")
    writer = Checkpoint(dest, keep=1)
    writer.save_sync(b"A1")
    scan, saved = LocalStore._walk, list[bool]()

    def torn(self: LocalStore, folder: str) -> set[str]:
        if folder != "log" or saved:
            return scan(self, folder)
        saved.append(True)
        before = scan(self, folder)
        writer.save_sync(b"A2")
        after = scan(self, folder)
        return before & after

    reader = Checkpoint(dest, read_only=True)
    monkeypatch.setattr(LocalStore, "_walk", torn)
    if once:
        monkeypatch.setattr(LocalStore, "list_below", lambda self, folder, **_: Listing(self._walk(folder)))
        monkeypatch.setattr(LogReader, "expect_top", lambda self, view: None)
    assert reader.load_bytes_sync() == (None if once else b"A2")


def test_a_forked_child_and_its_parent_save_in_turns(tmp_path: Path) -> None:
    """`siblings-record-as-lost-reply` with a child that is one: it is stopped before its join, its parent saves."""
    (asked, ask), (told, tell) = os.pipe(), os.pipe()
    checkpoint = Checkpoint(tmp_path / "task", keep=1)
    checkpoint.save_sync(b"A1")
    pid = os.fork()
    if pid == 0:
        os._exit(_child(checkpoint, ask, told))
    os.read(asked, 1)
    checkpoint.save_sync(b"A2")
    os.write(tell, b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert Checkpoint(tmp_path / "task", read_only=True).load_bytes_sync() == b"Q1"
    checkpoint.save_sync(b"A3")
    names = sorted(name.partition("-")[2] for name in os.listdir(tmp_path / "task" / "log"))
    # A's claim and second save, Q's join and save, A's join and third save; its first save is pruned.
    assert [int(name.removesuffix(".jsonl")) for name in names] == [1, 3, 4, 5, 6, 7]
    assert Checkpoint(tmp_path / "task", read_only=True).load_bytes_sync() == b"A3"


def _child(checkpoint: Checkpoint, ask: int, told: int) -> int:
    """Loads, saves and loads; waits before its first create."""
    waited = list[bool]()

    def hook(when: str, verb: str, keys: object) -> None:
        if (when, verb) == ("before", "create") and not waited:
            waited.append(True)
            os.write(ask, b"?")
            os.read(told, 1)

    try:
        with intercepted(hook):
            checkpoint.save_sync(b"Q1")
        return 0 if checkpoint.load_bytes_sync() == b"Q1" else 1
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        return 2
