"""Retention against an oracle that knows only the promise: sets of slots, no floors and no chains."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskckpt._layout import payload_key
from taskckpt._log.records import ClaimId, Commit, Content, Digest, Stamp, Stored
from taskckpt._log.retention import (
    GUARDED_SLOTS,
    Kept,
    Plan,
    Retention,
    dead_payloads,
    dead_records,
)

NONCE = "ab" * 8


def kept(slot: int) -> Kept:
    return Kept(slot, f"data/{slot}" if slot % 2 else None)


def commit_of(slot: int, plan: Plan) -> Commit:
    return Commit(
        Stamp(slot, ClaimId(1, NONCE), "w", "n", "t"),
        content=Content("bytes", Digest(1, "00")),
        stored=Stored(Digest(1, "00"), key=kept(slot).key),
        previous=plan.previous,
        resumed_from=None,
        count=1,
        floor=plan.floor,
        kept=plan.kept,
    )


@dataclass
class Oracle:
    """What the promise says: the newest ``keep`` stay, and the one resumed from while it is protected."""

    keep: int | None
    alive: set[int] = field(default_factory=set)

    def commit(self, slot: int, protected: int | None) -> set[int]:
        before = self.alive | ({protected} if protected is not None else set())
        newest = sorted(self.alive | {slot}, reverse=True)
        self.alive = set(newest if self.keep is None else newest[: self.keep])
        if protected is not None:
            self.alive.add(protected)
        if self.keep is None:
            self.alive |= before
        return before - self.alive

    def clear(self) -> set[int]:
        gone, self.alive = self.alive, set()
        return gone


def is_retained(slot: int, newest: Commit) -> bool:
    """As ``docs/format.md`` tells a reader."""
    return slot >= newest.floor or slot in newest.kept


@st.composite
def histories(draw):
    keep = draw(st.none() | st.integers(1, 6))
    inherited = sorted(draw(st.sets(st.integers(1, 30), max_size=8)), reverse=True)
    if keep is not None:
        inherited = inherited[:keep]  # as the log gives them to the writer
    steps = draw(st.lists(st.tuples(st.sampled_from(["commit"] * 6 + ["clear"]), st.integers(1, 4)), max_size=25))
    return keep, inherited, steps, draw(st.integers(0, 7))


@settings(max_examples=1000)
@given(histories())
def test_random_histories(history):
    keep, inherited, steps, resumed = history
    floor = inherited[-1] if inherited else 0
    retention = Retention(keep, map(kept, inherited), floor)
    oracle = Oracle(keep, set(inherited))
    # The state resumed from is protected until the attempt has two commits of its own.
    source = inherited[resumed] if resumed < len(inherited) else None
    protected, own = source, 0
    top = 31
    for what, gap in steps:
        top += gap
        if what == "clear":
            gone = {old.slot for old in retention.cleared()}
            expected = oracle.clear()
            assert gone == expected if keep is not None else gone <= expected
            protected = None
            continue
        saved = None if protected is None else kept(protected)
        plan = retention.plan(top, protected=saved)
        assert plan.previous == max(oracle.alive, default=None)
        commit = commit_of(top, plan)
        own += 1
        dropped = retention.committed(commit, protected=saved)
        gone = oracle.commit(top, protected)
        assert {old.slot for old in dropped} == gone
        assert all(old == kept(old.slot) for old in dropped), "each with its own payload"
        for slot in range(1, top + 1):
            if slot in oracle.alive:
                assert is_retained(slot, commit), slot
            elif slot in gone:
                assert not is_retained(slot, commit), slot
        assert retention.newest == top
        if keep is not None:
            assert retention.keys() == {key for slot in oracle.alive if (key := kept(slot).key)}
        if own >= 2:
            protected = None


@settings(max_examples=300)
@given(st.integers(1, 5), st.lists(st.integers(1, 5), min_size=1, max_size=40))
def test_the_newest_ones_stay_and_payloads_do_not_pile_up(keep, gaps):
    retention = Retention(keep)
    slots: deque[int] = deque(maxlen=keep)
    existing: set[int] = set()
    top = 1
    for gap in gaps:
        top += gap
        slots.append(top)
        existing.add(top)
        commit = commit_of(top, retention.plan(top, protected=None))
        existing -= {old.slot for old in retention.committed(commit, protected=None)}
        assert existing == set(slots)
        assert commit.floor == slots[0]
        assert commit.kept == ()


def test_the_state_resumed_from_outlives_the_window():
    retention = Retention(1, [kept(5)], floor=5)
    first = commit_of(8, retention.plan(8, protected=kept(5)))
    assert (first.floor, first.kept) == (8, (5,))
    assert retention.committed(first, protected=kept(5)) == []
    assert retention.keys() == {"data/5"}
    second = commit_of(9, retention.plan(9, protected=None))
    assert (second.floor, second.kept, second.previous) == (9, (), 8)
    assert sorted(old.slot for old in retention.committed(second, protected=None)) == [5, 8]


def test_an_older_state_resumed_from_is_protected_too():
    """The newest was damaged, so the attempt went on from the one before, which keep=1 would drop."""
    retention = Retention(1, [kept(9)], floor=9)
    commit = commit_of(12, retention.plan(12, protected=kept(4)))
    assert commit.kept == (4,)
    assert [old.slot for old in retention.committed(commit, protected=kept(4))] == [9]
    assert is_retained(4, commit)


def test_keep_all_drops_nothing_and_says_so_in_every_commit():
    retention = Retention(None, [kept(4)], floor=2, pinned=[kept(1)])
    for slot in range(10, 200):
        commit = commit_of(slot, retention.plan(slot, protected=None))
        assert (commit.floor, commit.kept) == (2, (1,))
        assert retention.committed(commit, protected=None) == []


def test_keep_all_after_a_clear_starts_a_new_floor():
    retention = Retention(None, [kept(4)], floor=2)
    assert [old.slot for old in retention.cleared()] == [4]
    plan = retention.plan(7, protected=None)
    assert plan == Plan(None, 7, ())


def test_pinned_ones_stay_until_a_commit_lets_them_go():
    retention = Retention(2, [kept(9), kept(8)], floor=8, pinned=[kept(3)])
    assert "data/3" in set(retention.keys())
    commit = commit_of(10, retention.plan(10, protected=kept(3)))
    assert [old.slot for old in retention.committed(commit, protected=kept(3))] == [8]
    assert commit.kept == (3,)


def test_more_or_fewer_may_be_kept_than_the_attempt_before_kept():
    fewer = Retention(1, [kept(9), kept(8), kept(7)], floor=7)
    commit = commit_of(10, fewer.plan(10, protected=None))
    assert sorted(old.slot for old in fewer.committed(commit, protected=None)) == [7, 8, 9]
    more = Retention(5, [kept(9)], floor=9)
    for slot in range(10, 14):
        commit = commit_of(slot, more.plan(slot, protected=None))
        assert commit.floor == 9, "what was dropped before does not come back"
        assert more.committed(commit, protected=None) == []


# --- garbage -----------------------------------------------------------------------------------

claims = st.integers(1, 20)


@given(
    st.lists(st.tuples(claims, st.integers(1, 5)), max_size=30, unique=True),
    claims,
    st.integers(0, 20),
    st.data(),
)
def test_only_payloads_of_lower_claims_are_garbage(saved, own, above, data):
    keys = {(claim, number): payload_key(claim, NONCE, number, NONCE) for claim, number in saved}
    living = set(data.draw(st.lists(st.sampled_from(sorted(keys.values())), unique=True))) if keys else set()
    strangers = ["data/README", "data/x/y", "log/000000000001-abababababababab/1", "data/1-ab/3", "other"]
    dead = dead_payloads([*strangers, *keys.values()], claim_slot=own, above=above, living=living)
    assert set(dead) == {key for (claim, _), key in keys.items() if above <= claim < own and key not in living}
    assert len(dead) == len(set(dead))


@given(st.lists(st.integers(1, 300), unique=True), st.integers(1, 300), st.integers(0, 300))
def test_records_at_the_top_and_at_the_edges_stay(dropped, first, length):
    last = first + length
    for slot in dead_records(dropped, first=first, last=last):
        assert slot in dropped
        assert first < slot < last, "both neighbours were written by the same writer"
        assert slot <= last - 64, "the newest 64 slots are never deleted"
    inside = [slot for slot in dropped if first < slot <= last - 64]
    assert dead_records(dropped, first=first, last=last) == inside


def test_the_guard_is_that_of_the_format():
    assert GUARDED_SLOTS == 64


@pytest.mark.parametrize("key", [None, "data/x"])
def test_kept_is_made_from_a_commit(key):
    stored = Stored(Digest(1, "00"), key=key) if key else Stored(Digest.of(b"1"), inline=b"1")
    commit = Commit(
        Stamp(4, ClaimId(1, NONCE), "w", "n", "t"), Content("bytes", Digest(1, "00")), stored, None, None, 1, 4
    )
    assert Kept.of(commit) == Kept(4, key)
