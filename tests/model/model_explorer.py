"""The store, every interleaving, and the invariants.

`explore(config)` walks all reachable states breadth first, so that the first violation found has the shortest
schedule. A state is a tuple (see `State`); one step is one store request of one writer, served whole.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypeVar

from tests.model.protocol_model import ENTRIES, Config, Local, Protocol, Rec, has

T = TypeVar("T")
Scan = tuple[int, int, int, int]  # readdir: slots there at its start, slots touched since, the listing before, must
Step = tuple[str | int, ...]  # who, which request, its argument, how it went


class State(NamedTuple):
    """The store, the processes, the network, and ghosts (known to the judge only)."""

    log: tuple[int, ...]  # per slot: rid, minus rid once deleted
    data: int  # payloads there (bit set)
    locals: tuple[int, ...]  # per writer: number of its `Local`
    net: tuple[int, ...] = ()  # creates in flight that their client gave up on
    faults: int = 0  # left
    scans: tuple[Scan | None, ...] = ()  # listings under way
    ever: int = 0  # ghost: payload keys ever written
    best: int = 0  # ghost: rid of the newest acknowledged commit or clear
    held: int = 0  # ghost: slot of the newest claim that was held
    buried: tuple[int, ...] = ()  # ghost: rids that were created below a newer record, or in a used slot
    doomed: int = 0  # ghost: rids of the commits and foreign claims that a clear finished with
    pins: int = 0  # ghost: rids of what an acknowledged pin holds


@dataclass
class Result:
    """What an exploration saw."""

    states: int = 0
    steps: int = 0
    seconds: float = 0.0
    cut: int = 0  # creates above `max_slot` that were not followed
    complete: bool = True
    violations: tuple[str, ...] = ()
    schedule: list[Step] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)  # events met, to show that the run was not vacuous

    def __str__(self) -> str:
        lines = [
            f"{self.states:,} states, {self.steps:,} steps, {self.seconds:.1f} s, cut {self.cut}, {dict(self.seen)}"
        ]
        lines += [f"VIOLATED {name}" for name in self.violations]
        lines += [f"  {i:3} " + " ".join(map(str, step)) for i, step in enumerate(self.schedule, 1)]
        return "\n".join(lines)


Outcome = tuple[Step, State, tuple[str, ...]]  # label, what comes of it, violated invariants


class Explorer:
    """Serves requests on states and judges what comes out."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rules = config.rules
        self.protocol = Protocol(config)
        self.recs = self.protocol.recs
        self.result = Result()
        self._locals: list[Local] = []
        self._lids: dict[Local, int] = {}
        self._requests: dict[tuple[int, int], tuple[str, int]] = {}
        self._moves: dict[tuple[int, int, object], tuple[int, tuple[str, int] | None]] = {}
        self._views: dict[tuple[tuple[int, ...], int, int, int, int], tuple[str, ...]] = {}
        self._twins = [self._twin(i) for i in range(len(config.writers))]
        self._families = [i if w.parent is None else w.parent for i, w in enumerate(config.writers)]
        self._unborn = self._lid(Local("unborn"))
        self._starts = [self._lid(self.protocol.begin(i, Local("start"))) for i in range(len(config.writers))]

    def initial(self) -> State:
        born: list[int] = []
        for i, writer in enumerate(self.config.writers):
            waits = writer.parent is not None and not self.rules.join
            born.append(self._unborn if waits else self._lid(self.protocol.begin(i, Local("start"))))
        scans = (None,) * len(born) if self.config.readdir else ()
        return State((), 0, tuple(born), faults=self.config.faults, scans=scans)

    # -- steps ----------------------------------------------------------------------------------------

    def steps(self, state: State) -> Iterator[Outcome]:
        """All (label, next state, violated invariants)."""
        for i, lid in enumerate(state.locals):
            twin = self._twins[i]
            if twin is not None and state.locals[twin] == lid == self._starts[i]:
                continue  # twins are interchangeable: the first of them starts first
            yield from self._serve(state, i, lid)
        for rid in dict.fromkeys(state.net):
            yield self._deliver(state, rid)

    def _serve(self, state: State, i: int, lid: int) -> Iterator[Outcome]:
        name = self.config.writers[i].name
        verb, arg = self._request(i, lid)
        if verb in ("done", "stale"):
            return
        if verb == "unborn":
            yield from self._fork(state, i)
        elif verb == "list":
            yield from self._list(state, i, lid)
        elif verb == "read":
            rid = state.log[arg - 1] if arg <= len(state.log) else 0
            yield self._go(state, i, lid, max(rid, 0), (name, "read", arg), ())
        elif verb == "create":
            yield from self._create(state, i, lid, arg)
        elif verb == "put":
            after, wrong = _upload(state, arg)
            yield self._go(after, i, lid, "ok", (name, "put", self.protocol.key_names[arg]), wrong)
        elif verb == "get":
            there = bool(state.data >> arg & 1)
            yield self._go(state, i, lid, there, (name, "get", self.protocol.key_names[arg]), ())
        elif verb == "unlink":
            label = (name, "delete payload", self.protocol.key_names[arg])
            yield self._go(state._replace(data=state.data & ~(1 << arg)), i, lid, "ok", label, ())
            if state.faults:  # a delete that fails is a warning
                less = state._replace(faults=state.faults - 1)
                yield self._go(less, i, lid, "failed", (*label, "fails"), ())
        elif verb == "trim":
            yield from self._trim(state, i, lid, arg)
        elif verb == "wipe":
            yield self._wipe(state, i, lid)
        else:
            yield self._survey(state, i, lid, verb)

    def _fork(self, state: State, i: int) -> Iterator[Outcome]:
        """The wrong child: it starts with its parent's tail, once the parent is in."""
        parent = self.config.writers[i].parent
        assert parent is not None
        knows = self._locals[state.locals[parent]]
        if knows.last:
            born = self.protocol.begin(i, Local("start", last=knows.last, claim=knows.claim, base=knows.base))
            after = state._replace(locals=_put(state.locals, i, self._lid(born)))
            yield (self.config.writers[parent].name, "fork", self.config.writers[i].name), after, ()

    def _list(self, state: State, i: int, lid: int) -> Iterator[Outcome]:
        name = self.config.writers[i].name
        load = self._load_lists(i, lid)
        if i not in self.config.readdir:
            top = _top(state.log)
            yield self._go(state, i, lid, (top, state.best) if load else top, (name, "list", top), ())
            return
        scan, there = state.scans[i], _bits(state.log)
        if scan is None:
            after = state._replace(scans=_put(state.scans, i, (there, 0, -1, state.best)))
            yield (name, "opendir"), after, ()
            return
        start, touched, before, must = scan
        for part in _subsets(touched):  # POSIX: what came or went meanwhile may be seen or not
            found = start & ~touched | part
            label = (
                name,
                "readdir",
                " ".join(str(s) for s in range(1, found.bit_length() + 1) if found >> (s - 1) & 1),
            )
            if self.rules.agree and found != before:
                yield label, state._replace(scans=_put(state.scans, i, (there, 0, found, must))), ()
                continue
            after, top = state._replace(scans=_put(state.scans, i, None)), found.bit_length()
            yield self._go(after, i, lid, (top, must) if load else top, label, ())

    def _load_lists(self, i: int, lid: int) -> bool:
        """Whether this listing is one of a load, which must not give less than was acknowledged before it."""
        local = self._locals[lid]
        if local.pc == "verify":
            return self.config.writers[i].script[local.op] == "load"
        return local.pc in ("look", "peek", "sure")

    def _create(self, state: State, i: int, lid: int, rid: int) -> Iterator[Outcome]:
        rec, name = self.recs[rid], self.config.writers[i].name
        if rec.slot > self.config.max_slot:
            self.result.cut += 1
            return
        free = not (rec.slot <= len(state.log) and state.log[rec.slot - 1] > 0)
        done, wrong = self._place(state, rid) if free else (state, ())
        label = (name, "create", rec.slot, rec.kind)
        yield self._go(done, i, lid, "ok" if free else "taken", (*label, "ok" if free else "taken"), wrong)
        if not state.faults:
            return
        if self.config.delayed:
            done, wrong = state._replace(net=tuple(sorted((*state.net, rid)))), ()
        done = done._replace(faults=state.faults - 1)
        yield self._go(done, i, lid, "unknown", (*label, "no reply"), wrong)
        if rec.kind not in ENTRIES:
            yield self._go(done, i, lid, "give up", (*label, "no reply, save raises"), wrong)

    def _deliver(self, state: State, rid: int) -> Outcome:
        """A create that its client gave up on reaches the store."""
        rec, left = self.recs[rid], list(state.net)
        left.remove(rid)
        state = state._replace(net=tuple(left))
        wrong: tuple[str, ...] = ()
        free = not (rec.slot <= len(state.log) and state.log[rec.slot - 1] > 0)
        if free:
            state, wrong = self._place(state, rid)
            wrong += self._view(state)
        label = (self.config.writers[rec.writer].name, "late create", rec.slot, rec.kind, "ok" if free else "taken")
        return label, state, wrong

    def _place(self, state: State, rid: int) -> tuple[State, tuple[str, ...]]:
        """Put record `rid` into its free slot; judge whether it may be there."""
        rec, log, wrong = self.recs[rid], state.log, []
        top = _top(log)
        reused = rec.slot <= len(log) and log[rec.slot - 1] != 0
        held, above = state.held, self.recs[log[top - 1]] if top else self.recs[0]
        log = log + (0,) * (rec.slot - len(log))
        after = state._replace(log=_put(log, rec.slot - 1, rid), scans=_touch(state.scans, rec.slot))
        if rec.slot < top or reused:
            after = after._replace(buried=tuple(sorted({*state.buried, rid})))
            if rec.slot < top:
                return after, ()
        if rec.kind not in ENTRIES and self.recs[rec.claim].slot < held:
            wrong.append("I2 a save or clear of a fenced attempt takes effect")
        if (
            rec.kind == "claim"
            and top
            and above.attempt != rec.attempt
            and rec.attempt in self.protocol.fenced(log[top - 1])
        ):
            wrong.append("I2 a fenced attempt claims again")
        if rec.kind == "clear":
            over = (r for r in log if r > 0 and r != rec.claim and self.recs[r].kind in ("claim", "commit"))
            after = after._replace(doomed=after.doomed | sum(1 << r for r in over), pins=0)
        if rec.verb == "unpin":
            after = after._replace(pins=after.pins & ~(1 << rec.about))
        if rec.kind == "commit" and state.best and state.best not in self.protocol.outcome(rid):
            wrong.append("I11 an acknowledged save or clear is left behind, and nobody rolled it back")
        return after, tuple(wrong)

    def _trim(self, state: State, i: int, lid: int, floor: int) -> Iterator[Outcome]:
        """Delete any record that the guard lets go, or stop: batches have no order, and deletes may fail."""
        name = self.config.writers[i].name
        yield self._go(state, i, lid, False, (name, "prune ends"), ())
        for slot in self._deletable(state, i, self._locals[lid], floor):
            log = _put(state.log, slot - 1, -state.log[slot - 1])
            after = state._replace(log=log, scans=_touch(state.scans, slot))
            yield self._go(after, i, lid, True, (name, "delete record", slot), ())

    def _deletable(self, state: State, i: int, local: Local, floor: int) -> Iterator[int]:
        """The guard."""
        keep, log, first = self.recs[floor].kept, state.log, 0
        limit = min(self.recs[floor].slot - 1, _top(log) - self.rules.newest)
        if self.rules.own_run:
            first, limit = local.first, min(limit, local.last - self.rules.newest)
        for slot in range(first + 1, limit + 1):
            rid = log[slot - 1]
            if rid <= 0 or rid in keep or self.recs[rid].kind in ENTRIES:
                continue
            if self.rules.own_run and self.recs[rid].writer != i:
                continue
            if not self.rules.late_slots or slot not in local.late:
                yield slot

    def _wipe(self, state: State, i: int, lid: int) -> Outcome:
        """The wrong clear: delete everything, and with it the log where slots do not survive."""
        log = state.log if self.rules.slots_survive_clear else tuple(-abs(r) for r in state.log)
        return self._go(state._replace(log=log, data=0), i, lid, "ok", (self.config.writers[i].name, "delete all"), ())

    def _survey(self, state: State, i: int, lid: int, verb: str) -> Outcome:
        """survey: payloads no commit names. recount: payloads of all commits but the newest."""
        commits = [self.recs[r] for r in state.log if r > 0 and self.recs[r].kind == "commit"]
        named = {r.key for r in commits}
        if verb == "survey":
            keys = tuple(k for k in range(state.data.bit_length()) if state.data >> k & 1 and k not in named)
        else:
            keys = tuple(r.key for r in commits[:-1] if state.data >> r.key & 1)
        return self._go(state, i, lid, keys, (self.config.writers[i].name, "list all"), ())

    def _go(self, state: State, i: int, lid: int, reply: object, label: Step, wrong: tuple[str, ...]) -> Outcome:
        """Let writer `i` take `reply`, and judge the state that comes of it."""
        known = self._moves.get((i, lid, reply))
        if known is None:
            local, event = self.protocol.advance(i, self._locals[lid], reply)
            known = self._moves[i, lid, reply] = self._lid(local), event
        now, event = known
        after = state._replace(locals=_put(state.locals, i, now))
        if event is not None:
            self.result.seen[event[0]] += 1
            after, more = self._judge(after, i, event)
            wrong += more
        if self._locals[now].pc == "put" and not self.config.separate_puts:
            # An upload under a key of its own commutes with every other step: make it at once.
            after, more = _upload(after, self._request(i, now)[1])
            return self._go(after, i, now, "ok", label, wrong + more)
        return label, after, wrong + self._view(after)

    # -- judgement ------------------------------------------------------------------------------------

    def _judge(self, state: State, i: int, event: tuple[str, int]) -> tuple[State, tuple[str, ...]]:
        """What writer `i` now tells the outside, against what is true."""
        name, rid = event
        rec = self.recs[rid]
        if name in ("saved", "held", "joined"):
            there = rec.slot <= len(state.log) and abs(state.log[rec.slot - 1]) == rid
            if not there and rid not in state.buried:
                return state, ("I1 acknowledged, and it is not there",)
            if rid in state.buried:
                return state, (f"I2 {name} in a slot that was used before or lies below newer ones",)
        if name == "held":
            return state._replace(held=max(state.held, rec.slot)), ()
        if name == "saved" and rec.verb == "pin" and not self._undone(state, rec):
            state = state._replace(pins=state.pins | 1 << rec.about)
        if name == "saved":
            return state._replace(best=rid if rec.slot > self.recs[state.best].slot else state.best), ()
        if name == "stale":
            claims = (r for r in state.log[rec.slot :] if self.recs[r].kind == "claim" and r not in state.buried)
            newer = (self._families[self.recs[r].writer] != self._families[i] for r in claims)
            return state, () if any(newer) else ("I8 stale, and nobody took the task over",)
        if name == "lost":
            return state, ("I1 a load that began later gives something older, or None",)
        return state, ("I7 a reader calls it corrupt, and nothing is damaged",) if name == "corrupt" else ()

    def _undone(self, state: State, pin: Rec) -> bool:
        """Whether somebody unpinned or cleared what was pinned, before the one who pinned it heard of its success."""
        above = [self.recs[abs(rid)] for rid in state.log[pin.slot :]]
        return any(rec.kind == "clear" or (rec.verb, rec.about) == ("unpin", pin.about) for rec in above)

    def _view(self, state: State) -> tuple[str, ...]:
        """What a load that sees this whole state at once would find."""
        known = (state.log, state.data, state.best, state.doomed, state.pins)
        found = self._views.get(known)
        if found is None:
            found = self._views[known] = tuple(self._look(state))
        return found

    def _look(self, state: State) -> Iterator[str]:
        top, best = _top(state.log), self.recs[state.best]
        newest = self.protocol.newest(state.log[top - 1]) if top else 0
        rec = self.recs[newest]
        if newest and state.log[rec.slot - 1] != newest:
            yield "I5 the head of the newest record is deleted"
        if rec.kind == "commit" and not state.data >> rec.key & 1:
            yield "I5 the payload of the newest commit is not there"
        older = self.recs[rec.base]
        if rec.saves == 1 and not rec.repeats and older.kind == "commit" and not state.data >> older.key & 1:
            yield "I5 the checkpoint resumed from is gone, and there is one own commit only"
        yield from self._look_back(state, newest)
        if newest != state.best and rec.slot <= best.slot and (best.kind == "commit" or newest):
            yield (
                "I6 an acknowledged save is gone" if not newest else "I1 something older outranks an acknowledged save"
            )
        there = rec.kind == "commit" and state.log[rec.slot - 1] == newest and state.data >> rec.key & 1
        if there and state.doomed & (1 << newest | 1 << rec.claim):
            yield "I3 a finished task's state is back"

    def _look_back(self, state: State, newest: int) -> Iterator[str]:
        """What is retained beside the newest commit."""
        rec, lineage = self.recs[newest], set(self.protocol.lineage(newest))
        if not all(state.data >> self.recs[r].key & 1 for r in rec.kept):
            yield "I5 the payload of a retained commit is not there"
        if any(has(rec.left, self.recs[r].slot) and r not in lineage for r in rec.kept):
            yield "I9 a load may fall back to what was left behind"
        pinned = [r for r in range(state.pins.bit_length()) if state.pins >> r & 1]
        if not all(state.data >> self.recs[r].key & 1 for r in pinned):
            yield "I10 a pinned checkpoint is deleted"
        if not set(pinned) <= set(rec.pinned):
            yield "I10 a pin is lost"

    # -- tables ---------------------------------------------------------------------------------------

    def _lid(self, local: Local) -> int:
        found = self._lids.get(local)
        if found is None:
            found = self._lids[local] = len(self._locals)
            self._locals.append(local)
        return found

    def _request(self, i: int, lid: int) -> tuple[str, int]:
        found = self._requests.get((i, lid))
        if found is None:
            found = self._requests[i, lid] = self.protocol.request(i, self._locals[lid])
        return found

    def _twin(self, i: int) -> int | None:
        """The writer before `i`, if the two differ in name only."""
        writers, parents = self.config.writers, {w.parent for w in self.config.writers}
        if i == 0 or {i - 1, i} & (parents | set(self.config.readdir)) or writers[i].parent is not None:
            return None
        same = (writers[i].script, writers[i].reader) == (writers[i - 1].script, writers[i - 1].reader)
        return i - 1 if same and writers[i - 1].parent is None else None


def explore(config: Config, *, only: tuple[str, ...] = ("I",), limit: int = 5_000_000) -> Result:
    """Walk all states of `config`; stop at the first violation whose name begins with one of `only`."""
    began = time.perf_counter()
    world = Explorer(config)
    result, first = world.result, world.initial()
    parents: list[int] = [-1]
    index = {first: 0}
    frontier = [first]
    bad: tuple[int, Step, tuple[str, ...]] | None = None
    while frontier and bad is None and result.complete:
        below: list[State] = []
        for state in frontier:
            here = index[state]
            for label, after, wrong in world.steps(state):
                result.steps += 1
                if wrong and (names := tuple(dict.fromkeys(w for w in wrong if w.startswith(only)))):
                    bad = bad or (here, label, names)
                if after not in index:
                    index[after] = len(parents)
                    parents.append(here)
                    below.append(after)
            if bad:
                break
        frontier = below
        result.complete = len(parents) <= limit
    if bad:
        result.violations = bad[2]
        result.schedule = [*_path(world, list(index), parents, bad[0]), bad[1]]
    result.states, result.seconds = len(parents), time.perf_counter() - began
    return result


def _path(world: Explorer, states: list[State], parents: list[int], end: int) -> list[Step]:
    """The labels along the way to state number `end` (they are not kept while exploring, but found again)."""
    chain = [end]
    while parents[chain[-1]] >= 0:
        chain.append(parents[chain[-1]])
    chain.reverse()
    pairs = pairwise(chain)
    return [next(label for label, after, _ in world.steps(states[a]) if after == states[b]) for a, b in pairs]


def follow(config: Config, schedule: Iterable[Step]) -> tuple[str, ...]:
    """Take exactly these steps; the violations at the last one. A step that cannot be taken is a ValueError."""
    world = Explorer(config)
    state = world.initial()
    wrong: tuple[str, ...] = ()
    for number, step in enumerate(schedule, 1):
        choices = {label: (after, violated) for label, after, violated in world.steps(state)}
        if step not in choices:
            raise ValueError(f"step {number} {step} is not among {list(choices)}")
        state, wrong = choices[step]
    return wrong


def _upload(state: State, key: int) -> tuple[State, tuple[str, ...]]:
    wrong = ("I4 a payload key is written twice",) if state.ever >> key & 1 else ()
    return state._replace(data=state.data | 1 << key, ever=state.ever | 1 << key), wrong


def _top(log: tuple[int, ...]) -> int:
    """The highest slot that holds a record."""
    for slot in range(len(log), 0, -1):
        if log[slot - 1] > 0:
            return slot
    return 0


def _bits(log: tuple[int, ...]) -> int:
    return sum(1 << i for i, rid in enumerate(log) if rid > 0)


def _subsets(mask: int) -> Iterator[int]:
    part = mask
    while part:
        yield part
        part = (part - 1) & mask
    yield 0


def _put(items: tuple[T, ...], i: int, item: T) -> tuple[T, ...]:
    return (*items[:i], item, *items[i + 1 :])


def _touch(scans: tuple[Scan | None, ...], slot: int) -> tuple[Scan | None, ...]:
    """Tell the listings under way that `slot` came or went."""
    if not scans:
        return scans
    return tuple(s and (s[0], s[1] | 1 << slot - 1, s[2], s[3]) for s in scans)
