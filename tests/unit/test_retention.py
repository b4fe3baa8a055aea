"""Retention against an oracle that knows only the promise: sets of slots, no floors and no chains."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskckpt._keep import policy_of
from taskckpt._layout import payload_key
from taskckpt._log.records import ClaimId, Commit, Content, Digest, Lineage, Notes, Origin, Stamp, Stored
from taskckpt._log.retention import (
    GUARDED_SLOTS,
    Kept,
    Plan,
    Retention,
    dead_payloads,
    dead_records,
)

NONCE = "ab" * 8


def key_of(original: int) -> str:
    return f"data/{original}"


def kept(slot: int, original: int | None = None, step: int | None = None) -> Kept:
    """The payloads of odd slots lie in objects."""
    original = original or slot
    return Kept(slot, (key_of(original),) if original % 2 else (), original, step)


def safe(original: int | None) -> dict[int, str]:
    return {} if original is None else {original: "the attempt resumed from it"}


def commit_of(new: Kept, plan: Plan, pinned: tuple[int, ...] = ()) -> Commit:
    return Commit(
        Stamp(new.slot, ClaimId(1, NONCE), "w", "n", "t"),
        content=Content("bytes", Digest(1, "00")),
        stored=Stored(Digest(1, "00"), key=key_of(new.original) if new.original % 2 else None, inline=None),
        previous=None,
        resumed_from=None,
        count=1,
        floor=plan.floor,
        kept=plan.kept,
        notes=Notes(new.step),
        pinned=pinned,
        repeats=None if new.original == new.slot else Origin(new.original, "t"),
    )


def writer_of(
    keep: int | None, slots: list[int], *, floor: int | None = None, pinned: tuple[int, ...] = ()
) -> Retention:
    """A writer that found these commits, newest first."""
    if not slots:
        return Retention(policy_of(keep))
    plan = Plan(slots[0], tuple(slots[1:])) if floor is None else Plan(floor, ())
    return Retention(policy_of(keep), commit_of(kept(slots[0]), plan, pinned), [kept(slot) for slot in slots[1:]])


@dataclass
class Oracle:
    """What the promise says: the newest ``keep`` checkpoints stay, what is pinned, and the one resumed from."""

    keep: int | None
    alive: dict[int, int] = field(default_factory=dict)  # slot -> original
    pinned: set[int] = field(default_factory=set)

    def commit(self, slot: int, original: int, protected: int | None, *, repeats: bool) -> set[int]:
        before = dict(self.alive)
        if self.keep is None:
            self.alive[slot] = original
            return set()
        newest = max(self.alive, default=None)
        if repeats and newest is not None and self.alive[newest] == original:
            del self.alive[newest]
        self.alive[slot] = original
        if not repeats:
            self.alive = {max(one for one in self.alive if self.alive[one] == of): of for of in self.alive.values()}
            window = sorted(self.alive, reverse=True)[: self.keep]
            safe = {one for one, of in self.alive.items() if of in self.pinned or of == protected}
            self.alive = {one: of for one, of in self.alive.items() if one in window or one in safe}
        return set(before) - set(self.alive)


@st.composite
def histories(draw):
    keep = draw(st.none() | st.integers(1, 6))
    inherited = sorted(draw(st.sets(st.integers(1, 30), max_size=8)), reverse=True)
    words = ["commit"] * 6 + ["clear", "repeat", "repeat", "pin"]
    steps = draw(st.lists(st.tuples(st.sampled_from(words), st.integers(1, 4), st.integers(0, 5)), max_size=25))
    return keep, inherited, steps, draw(st.integers(0, 7))


@settings(max_examples=1000)
@given(histories())
def test_random_histories(history):
    keep, inherited, steps, resumed = history
    retention = writer_of(keep, inherited)
    oracle = Oracle(keep, {slot: slot for slot in inherited})
    # The state resumed from is protected until the attempt has two commits of its own.
    protected, own = (inherited[resumed] if resumed < len(inherited) else None), 0
    top = 31
    for what, gap, which in steps:
        top += gap
        if what == "clear":
            gone = {old.slot for old in retention.cleared()}
            assert gone == set(oracle.alive) if keep is not None else gone <= set(oracle.alive)
            oracle = Oracle(keep)
            protected = None
            continue
        alive = sorted(oracle.alive, reverse=True)
        repeats = what != "commit" and which < len(alive)
        original = oracle.alive[alive[which]] if repeats else top
        new = kept(top, original)
        if what == "pin" and repeats:
            oracle.pinned.add(original)
        pinned = tuple(sorted(oracle.pinned))
        plan = retention.plan_all(new) if repeats else retention.plan(new, pinned, safe(protected))
        commit = commit_of(new, plan, pinned)
        own += not repeats
        dropped = retention.committed(commit)
        gone = oracle.commit(top, original, protected, repeats=repeats)
        assert {old.slot for old in dropped} == gone
        for slot in range(1, top + 1):
            if slot in oracle.alive:
                assert commit.retains(slot), slot
            elif slot in gone:
                assert not commit.retains(slot), slot
        assert retention.newest == top
        if keep is not None:
            assert retention.keys() == {key_of(of) for of in oracle.alive.values() if of % 2}
        if own >= 2:
            protected = None


def test_the_state_resumed_from_outlives_the_window():
    retention = writer_of(1, [5])
    first = commit_of(kept(8), retention.plan(kept(8), (), protected=safe(5)))
    assert (first.floor, first.kept) == (8, (5,))
    assert retention.committed(first) == []
    assert retention.keys() == {"data/5"}
    second = commit_of(kept(9), retention.plan(kept(9), ()))
    assert (second.floor, second.kept) == (9, ())
    assert sorted(old.slot for old in retention.committed(second)) == [5, 8]


def test_an_older_state_resumed_from_is_protected_too():
    """The newest was damaged, so the attempt went on from the one before, which keep=1 would drop."""
    retention = writer_of(1, [9, 4])
    commit = commit_of(kept(12), retention.plan(kept(12), (), protected=safe(4)))
    assert commit.kept == (4,)
    assert [old.slot for old in retention.committed(commit)] == [9]


def test_keep_all_drops_nothing_and_says_so_in_every_commit():
    retention = Retention(None, commit_of(kept(4), Plan(2, (1,))))
    for slot in range(10, 200):
        commit = commit_of(kept(slot), retention.plan(kept(slot), ()))
        assert (commit.floor, commit.kept) == (2, (1,))
        assert retention.committed(commit) == []


def test_keep_all_after_a_clear_starts_a_new_floor():
    retention = writer_of(None, [4], floor=2)
    assert [old.slot for old in retention.cleared()] == [4]
    assert retention.plan(kept(7), ()) == Plan(7, ())


def test_what_cannot_be_read_stays():
    retention = Retention(policy_of(1), commit_of(kept(9), Plan(9, (6, 4))), [kept(4)], unknown=[6])
    commit = commit_of(kept(10), retention.plan(kept(10), ()))
    assert commit.kept == (6,)
    assert [old.slot for old in retention.committed(commit)] == [9, 4]
    assert retention.plan(kept(11), ()).kept == (6,)


def test_pinned_ones_stay_until_they_are_unpinned():
    retention = writer_of(2, [9, 8, 3], pinned=(3,))
    assert retention.keys() >= {"data/3"}
    commit = commit_of(kept(10), retention.plan(kept(10), retention.pinned), (3,))
    assert [old.slot for old in retention.committed(commit)] == [8]
    assert commit.kept == (9, 3)
    commit = commit_of(kept(11), retention.plan(kept(11), ()))
    assert [old.slot for old in retention.committed(commit)] == [9, 3]
    assert retention.pinned == ()


def test_a_payload_that_two_commits_share_is_needed_as_long_as_one_is_there():
    retention = writer_of(1, [9, 7, 5])
    rolled_back = commit_of(kept(11, original=5), retention.plan_all(kept(11, original=5)))
    assert rolled_back.kept == (9, 7, 5), "what is left behind goes on from it as well"
    assert retention.committed(rolled_back) == []
    next_one = commit_of(kept(12), retention.plan(kept(12), (), protected=safe(5)))
    assert next_one.kept == (11,)
    assert [old.slot for old in retention.committed(next_one)] == [9, 7, 5]
    assert retention.keys() == {"data/5"}


def test_of_two_that_repeat_one_checkpoint_an_ancestor_stays():
    retention = writer_of(3, [9, 7, 5])
    retention.committed(commit_of(kept(11, original=5), retention.plan_all(kept(11, original=5))))
    plan = retention.plan(kept(13), (), lineage=Lineage(((10, 12),)))
    assert plan.kept == (9, 7), "that rollback was taken back, and is older than it seems"


def test_more_or_fewer_may_be_kept_than_the_attempt_before_kept():
    fewer = writer_of(1, [9, 8, 7])
    commit = commit_of(kept(10), fewer.plan(kept(10), ()))
    assert sorted(old.slot for old in fewer.committed(commit)) == [7, 8, 9]
    more = writer_of(5, [9])
    for slot in range(10, 14):
        commit = commit_of(kept(slot), more.plan(kept(slot), ()))
        assert commit.kept == tuple(range(slot - 1, 8, -1)), "what was dropped before does not come back"
        assert more.committed(commit) == []


@pytest.mark.parametrize("keep", [1, None])
def test_the_reasons_are_those_of_the_plan(keep):
    retention = writer_of(keep, [9, 8, 7, 3])
    reasons = retention.reasons(kept(9), pinned=(3,), protected=safe(8))
    if keep is None:
        assert set(reasons) == {9, 8, 7, 3}
    else:
        assert reasons == {9: "the newest", 8: "the attempt resumed from it", 3: "pinned"}


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
    notes = Notes(7, {"a": 1}, {"loss": 0.5})
    commit = Commit(
        Stamp(4, ClaimId(1, NONCE), "w", "n", "t"),
        Content("bytes", Digest(1, "00")),
        stored,
        *(None, None, 1, 4),
        notes=notes,
        repeats=Origin(2, "t"),
        positions=Stored(Digest(1, "00"), key="data/y"),
    )
    assert Kept.of(commit) == Kept(4, (key, "data/y") if key else ("data/y",), 2, 7, {"loss": 0.5})
