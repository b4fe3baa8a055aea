"""What is wrong with a story, by the invariants of `tests/model/README.md`. Knows the records, not the package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from tests.replay.stage import Landed, Outcome, Stage


def violations(stage: Stage) -> list[str]:
    """All that is wrong, each beginning with the number of its invariant."""
    found = [*_payloads(stage), *_records(stage), *_repeated(stage), *_pins(stage)]
    for outcome in stage.outcomes:
        found += _load(stage, outcome) if outcome.verb == "load" else _change(stage, outcome)
        if outcome.result == "stale" and not _outdone(stage, outcome):
            found.append(f"I8 {outcome.who} is stale, and nobody took the task over")
    return found


def _entries(stage: Stage, who: str) -> list[Landed]:
    return [one for one in stage.landed if one.who == who and one.kind in ("claim", "join")]


def _records(stage: Stage) -> Iterator[str]:
    claims: list[str] = []
    for one in (one for one in stage.landed if one.kind == "claim" and not one.void):
        if one.attempt in claims[:-1] and claims[-1] != one.attempt:
            yield f"I2 {one.who}, fenced, claims again"
        claims.append(one.attempt)


def _payloads(stage: Stage) -> Iterator[str]:
    for key, times in Counter(upload.key for upload in stage.uploads).items():
        if times > 1:
            yield f"I4 a payload key: {key} was uploaded {times} times"
    for upload in stage.uploads:
        entries = [one for one in _entries(stage, upload.who) if one.clock <= upload.clock]
        if entries and entries[-1].void:
            yield f"I2 held: {upload.who} uploads {upload.label} and does not hold the task"
    for one in stage.landed:
        if not one.void and any(clock < one.clock and key == one.key for clock, key in stage.gone):
            yield f"I5 {one.label} is committed, and its payload is deleted"
    for clock, key in stage.gone:
        commits = [
            one for one in stage.landed if one.clock <= clock and not one.void and one.kind in ("commit", "clear")
        ]
        for commit in _needed(commits):
            if commit.key == key:
                yield f"I5 the payload of {commit.label} is deleted, and it is needed"


def _needed(commits: list[Landed]) -> Iterator[Landed]:
    """The newest commit, and what its attempt resumed from until it has two."""
    if not commits:
        return
    newest = commits[-1]
    yield newest
    yield from (one for one in commits if one.slot in newest.record.get("kept", ()))
    before = commits[-2] if len(commits) > 1 else None
    if newest.kind == "commit" and before is not None and before.kind == "commit" and before.attempt != newest.attempt:
        yield before


def _acknowledged(stage: Stage, before: int) -> Iterator[Landed]:
    """The records of what had returned by then."""
    for outcome in stage.outcomes:
        if outcome.verb != "load" and outcome.result == "done" and outcome.ended <= before:
            record = _record_of(stage, outcome)
            if record is not None:
                yield record


def _record_of(stage: Stage, outcome: Outcome) -> Landed | None:
    kind = "clear" if outcome.verb == "clear" else "commit"
    for one in reversed(stage.landed):
        same = one.verb == outcome.verb if one.repeats else one.label == outcome.label
        if same and one.who == outcome.who and one.kind == kind and outcome.began <= one.clock <= outcome.ended:
            return one
    return None


def _change(stage: Stage, outcome: Outcome) -> Iterator[str]:
    """A save or a clear that is said to be done must be, at the top of the log of its time."""
    if outcome.result != "done":
        return
    record = _record_of(stage, outcome)
    if record is None:
        somebody_wrote = any(one.clock < outcome.ended for one in stage.landed)
        if outcome.verb == "save" or (outcome.verb == "clear" and somebody_wrote):
            yield f"I1 {outcome.who}'s {outcome.verb} {outcome.label} is said to be done, and there is no record of it"
        return
    if record.void:
        yield f"I2 saved: {outcome.who}'s {outcome.verb} {outcome.label} lies below others"
    newer = [one for one in stage.landed if one.kind == "claim" and not one.void and one.clock < record.clock]
    if newer and max(newer, key=lambda one: one.slot).attempt != record.attempt:
        yield f"I2 saved: {outcome.who}'s {outcome.verb} {outcome.label} was acknowledged after it was fenced"


def _repeated(stage: Stage) -> Iterator[str]:
    """A commit that is repeated is the newest, but for a rollback, which says what it leaves behind."""
    commits = [one for one in stage.landed if one.kind in ("commit", "clear") and not one.void]
    for before, one in pairwise(commits):
        if one.repeats and one.verb != "rollback" and (before.kind, before.label) != ("commit", one.label):
            yield f"I11 {one.who}'s {one.verb} leaves {before.label or before.kind} behind"
        if one.verb != "rollback":
            continue
        behind = [range(first, last + 1) for first, last in one.record.get("left_behind", ())]
        for older in (older for older in commits if older.slot in one.record["kept"] and older.label != one.label):
            if older.slot > one.record["repeats"]["slot"] and not any(older.slot in span for span in behind):
                yield f"I9 a load may fall back to {older.label}, which {one.who} left behind"


def _pins(stage: Stage) -> Iterator[str]:
    """What was pinned stays so until somebody unpins anything, or clears."""
    for outcome in stage.outcomes:
        pin = _record_of(stage, outcome) if (outcome.verb, outcome.result) == ("pin", "done") else None
        if pin is None:
            continue
        original = pin.record["pinned"][0]
        keys = {one.key for one in stage.landed if one.kind == "commit" and one.slot == original}
        later = [one for one in stage.landed if one.slot >= pin.slot and not one.void]
        ends = min((one.clock for one in later if one.kind == "clear" or one.verb == "unpin"), default=stage.clock + 1)
        if any(clock < ends and key in keys for clock, key in stage.gone):
            yield f"I10 {outcome.who} pinned {pin.label}, and it is deleted"
        for one in later:
            if one.kind == "commit" and one.clock < ends and original not in one.record.get("pinned", ()):
                yield f"I10 {outcome.who}'s pin of slot {original} is lost in slot {one.slot}"


def _load(stage: Stage, outcome: Outcome) -> Iterator[str]:
    if outcome.result in ("stale", "unavailable", "unfinished"):
        return
    found = [one for one in stage.landed if one.kind == "commit" and one.label == outcome.result]
    if outcome.result is not None and not found:
        number = "I5" if outcome.who == "the end" else "I7"
        yield f"{number} {outcome.who} loads {outcome.result}, and nothing was damaged"
        return
    mine = [one for one in _entries(stage, outcome.who) if one.clock <= outcome.ended]
    if mine and mine[-1].void:
        yield f"I2 held: {outcome.who} believes that it holds the task"
    must = max(_acknowledged(stage, outcome.began), key=lambda one: one.slot, default=None)
    if must is None:
        return
    newer = any(one is must or (one.slot > must.slot and not one.void) for one in found)
    clears = [one for one in stage.landed if one.kind == "clear" and not one.void and one.clock <= outcome.ended]
    finished = outcome.result is None and any(one.slot >= must.slot for one in clears)
    if not finished and not newer:
        yield f"I1 {outcome.who} loads {outcome.result}, and {must.label or must.kind} was acknowledged before it began"
        yield "I3 a finished task's state is back" if must.kind == "clear" else "I6 an acknowledged save is lost"
    elif must.kind == "clear" and found and not _claimed_after(stage, found[0], must):
        yield f"I3 {outcome.result} is back after a clear"


def _claimed_after(stage: Stage, commit: Landed, clear: Landed) -> bool:
    """Whether a commit belongs to the attempt that cleared, or to one that claimed after it."""
    claims = [one for one in stage.landed if one.kind == "claim" and one.attempt == commit.attempt and not one.void]
    return commit.attempt == clear.attempt or any(one.clock > clear.clock for one in claims)


def _outdone(stage: Stage, outcome: Outcome) -> bool:
    """Whether somebody else claimed after the family of this actor did."""
    family = {name: actor.family for name, actor in stage.actors.items()}
    claims = [one for one in stage.landed if one.kind == "claim" and not one.void and one.clock <= outcome.ended]
    claimants = [family[one.who] for one in claims]
    mine = family[outcome.who]
    return mine in claimants and any(other != mine for other in claimants[claimants.index(mine) :])
