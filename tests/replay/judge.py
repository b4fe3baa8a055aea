"""What is wrong with a story, by the invariants of `tests/model/README.md`. Knows the records, not the package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tests.replay.stage import Landed, Outcome, Stage


def violations(stage: Stage) -> list[str]:
    """All that is wrong, each beginning with the number of its invariant."""
    found = [*_payloads(stage), *_records(stage)]
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
    before = commits[-2] if len(commits) > 1 else None
    if newest.kind == "commit" and before is not None and before.kind == "commit" and before.attempt != newest.attempt:
        yield before


def _acknowledged(stage: Stage, before: int) -> Iterator[Landed]:
    """The records of saves and clears that had returned by then."""
    for outcome in stage.outcomes:
        if outcome.verb in ("save", "clear") and outcome.result == "done" and outcome.ended <= before:
            record = _record_of(stage, outcome)
            if record is not None:
                yield record


def _record_of(stage: Stage, outcome: Outcome) -> Landed | None:
    kind = {"save": "commit"}.get(outcome.verb, outcome.verb)
    for one in reversed(stage.landed):
        if one.who == outcome.who and one.kind == kind and one.label == outcome.label and one.clock <= outcome.ended:
            return one
    return None


def _change(stage: Stage, outcome: Outcome) -> Iterator[str]:
    """A save or a clear that is said to be done must be, at the top of the log of its time."""
    if outcome.result != "done":
        return
    record = _record_of(stage, outcome)
    if record is None:
        if outcome.verb == "save" or any(one.clock < outcome.ended for one in stage.landed):
            yield f"I1 {outcome.who}'s {outcome.verb} {outcome.label} is said to be done, and there is no record of it"
        return
    if record.void:
        yield f"I2 saved: {outcome.who}'s {outcome.verb} {outcome.label} lies below others"
    newer = [one for one in stage.landed if one.kind == "claim" and not one.void and one.clock < record.clock]
    if newer and max(newer, key=lambda one: one.slot).attempt != record.attempt:
        yield f"I2 saved: {outcome.who}'s {outcome.verb} {outcome.label} was acknowledged after it was fenced"


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
