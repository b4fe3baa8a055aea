"""The task log as a model: rules, records, and the writer as a state machine.

Everything here is pure. A writer is a `Local` (what one process knows) that wants one store request at a
time, `Protocol.request(local)`, and moves on with the reply, `Protocol.advance(local, reply)`. The explorer
(`model_explorer.py`) owns the store, decides whose request is served next, and judges the outcome.

Words: an *attempt* is a claim nonce, a *writer* is a process. A parent and its forked child are two writers
of one attempt. Records are interned; a record is talked about by its number (`rid`), 0 meaning "none".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Rules:
    """The rules of the protocol. All on is the design; each one off brings a known bad schedule back."""

    second_listing: bool = True  # after a claim or join: list again, anything above voids it
    newest: int = 1  # so many newest slots are never deleted (64 in reality)
    own_run: bool = True  # a writer deletes its own records only, and none next to somebody else's
    late_slots: bool = True  # ... and none in a slot at which a create of its own was given up: it may still land
    slots_survive_clear: bool = True  # clear leaves the log, a slot number is never used twice
    fenced_clear: bool = True  # clear is a record that competes for a slot, deletion comes after
    claim_nonce_keys: bool = True  # payload keys carry the claim nonce
    save_nonce_keys: bool = True  # payload keys carry a nonce of the save, not just its number
    join: bool = True  # a child lists and joins at the top, instead of using its parent's tail
    save_nonce: bool = True  # "is it mine" compares save nonces, not claim nonces
    shared_claim: bool = True  # a child gets its parent's claim nonce
    fenced: int = 16  # so many claims before it a record names; who finds itself there before it is in is stale
    join_own: bool = True  # a claim of its own that a writer finds at the top is joined, like its parent's
    advance: bool = True  # an earlier save of our own in our slot: go on above it
    decided: bool = True  # what prune deletes was written in the commit, not found out afterwards
    lower_sweep: bool = True  # leftovers are swept only below one's own claim
    settle_leftovers: bool = True  # the payload of an undecided save stays until its slot is settled
    retain_resumed: bool = True  # the checkpoint resumed from stays until two own commits exist
    relist: bool = True  # gone between listing and reading: list again while the top moves, never None
    confirm_entries: bool = True  # load: a claim or join read at the listed top counts once a later listing shows it so
    confirm_stale: bool = True  # the same before a writer takes another attempt's record at the top for its end
    confirm_all: bool = False  # the same for every record that a load reads at the top: not needed
    agree: bool = True  # readdir: repeat until two listings agree
    shared: bool = True  # a payload goes only with the last retained commit that names it
    own_leftovers: bool = True  # the payload that an undecided commit repeats is no leftover of it
    left_behind: bool = True  # a rollback says what no later load may fall back to
    ask_again: bool = True  # what is repeated is decided anew where somebody else got the slot
    merge_pins: bool = True  # ... and so is what is pinned
    still_there: bool = True  # what somebody dropped meanwhile is neither repeated nor pinned


@dataclass(frozen=True)
class Writer:
    """One process: its script, and whose child it is.

    `load`, `save`, `clear`, `sweep`; `pin` the newest checkpoint, `unpin` the oldest pinned one, `rollback` to the
    oldest one there is, `prune`. One who joins to pin beside a running attempt is a child that never saves.
    """

    name: str
    script: tuple[str, ...]
    parent: int | None = None  # index of the writer it was forked from
    reader: bool = False  # a read-only view: never writes


@dataclass(frozen=True)
class Config:
    """One world to explore: the writers, the rules, and how bad the network and the file system are."""

    writers: tuple[Writer, ...]
    rules: Rules = Rules()
    faults: int = 0  # so many creates get no reply
    delayed: bool = False  # a create without a reply takes effect at any later time, or never
    readdir: tuple[int, ...] = ()  # writers whose listing is no snapshot
    separate_puts: bool = False  # an upload is a step of its own (needed only where data is listed)
    max_slot: int = 12  # creates above are not explored; `Result.cut` counts them


class Rec(NamedTuple):
    """A record of the log. `base` is a claim's or join's head and a commit's `previous`."""

    kind: str  # claim, join, commit, clear
    slot: int
    writer: int
    attempt: int  # the claim nonce
    claim: int  # rid of the claim it stands under; 0 in a claim itself
    n: int = 0  # the save nonce (unique with `writer`)
    base: int = 0  # rid of the newest commit or clear below
    kept: tuple[int, ...] = ()  # rids of the older commits that stay, newest first
    replaces: int = 0  # rid of the claim that this claim fences; real records carry nonces, see `fenced`
    key: int = -1  # number of the payload
    repeats: int = 0  # rid of the commit that this one repeats
    saves: int = 0  # commits of the claim since it resumed, without repeated ones
    pinned: tuple[int, ...] = ()  # rids of the originals that stay
    left: tuple[tuple[int, int], ...] = ()  # ranges of slots that are no ancestors
    verb: str = ""  # ghost: the operation that a repeated commit is of
    about: int = 0  # ghost: the original that it pins, unpins or goes back to


class Local(NamedTuple):
    """What one process knows, and (`pc`) which request it waits for."""

    pc: str
    op: int = 0  # index into the script
    n: int = 0  # saves begun
    last: int = 0  # own last slot; 0: not in yet
    first: int = 0  # own slots from here to `last` have nobody else's between them
    late: tuple[int, ...] = ()  # slots at which a create of our own was given up
    claim: int = 0
    base: int = 0  # newest commit or clear known
    seen: int = 0  # the top record that an entry is built on; what a load is about to read
    top: int = 0  # the top slot of the last listing
    put: bool = False  # the payload of save n is up
    todo: tuple[int, ...] = ()  # payloads still to delete
    dead: tuple[int, ...] = ()  # payloads of undecided saves
    floor: int = 0  # rid of the commit or clear whose prune runs
    target: int = 0  # what is rolled back to, pinned or unpinned
    was: int = 0  # the newest commit when that was decided (without `ask_again` or `merge_pins`)
    must: int = 0  # ghost: newest acknowledged record when this load began


Event = tuple[str, int] | None
Move = tuple[Local, Event]
ENTRIES = ("claim", "join")
REPEATS = ("pin", "unpin", "rollback", "prune")


def has(left: tuple[tuple[int, int], ...], slot: int) -> bool:
    """Whether a slot is in none of these ranges."""
    return not any(first <= slot <= last for first, last in left)


class Protocol:
    """The writers of one `Config`. Holds the tables that give records and payload keys their numbers."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rules = config.rules
        self.recs: list[Rec] = [Rec("none", 0, -1, -1, 0)]
        self._rids: dict[Rec, int] = {}
        self.keys: list[tuple[int, ...]] = []  # what names a payload
        self.key_names: list[str] = []  # for people: who wrote it first, in which save
        self._kids: dict[tuple[int, ...], int] = {}
        shared = config.rules.shared_claim
        self.attempts = [w.parent if w.parent is not None and shared else i for i, w in enumerate(config.writers)]

    # -- tables ---------------------------------------------------------------------------------------

    def rid(self, rec: Rec) -> int:
        found = self._rids.get(rec)
        if found is None:
            found = self._rids[rec] = len(self.recs)
            self.recs.append(rec)
        return found

    def key(self, me: int, local: Local, n: int) -> int:
        """The payload key of save `n`: claim slot, claim nonce, save nonce."""
        name: tuple[int, ...] = (self.recs[local.claim].slot, n)
        if self.rules.claim_nonce_keys:
            name += (self.attempts[me],)
        if self.rules.save_nonce_keys:
            name += (me,)
        found = self._kids.get(name)
        if found is None:
            found = self._kids[name] = len(self.keys)
            self.keys.append(name)
            self.key_names.append(f"{self.config.writers[me].name}{n}")
        return found

    def newest(self, rid: int) -> int:
        """The newest commit or clear that a record leads to: itself, or its head."""
        return self.recs[rid].base if self.recs[rid].kind in ENTRIES else rid

    def claim_of(self, rid: int) -> int:
        return rid if self.recs[rid].kind == "claim" else self.recs[rid].claim

    def fenced(self, rid: int) -> list[int]:
        """The attempts that claimed before the claim of record `rid`, newest first."""
        found, claim = [], self.recs[self.claim_of(rid)].replaces
        while claim:
            found.append(self.recs[claim].attempt)
            claim = self.recs[claim].replaces
        return found

    def original(self, rid: int) -> int:
        """The commit that first had this payload."""
        while self.recs[rid].repeats:
            rid = self.recs[rid].repeats
        return rid

    def retained(self, rid: int) -> tuple[int, ...]:
        """The commits that are there after commit `rid`, newest first; none after a clear."""
        return (rid, *self.recs[rid].kept) if self.recs[rid].kind == "commit" else ()

    def lineage(self, rid: int) -> Iterator[int]:
        """A commit and all that it goes on from, as it really is, down to the beginning."""
        while rid:
            yield rid
            rid = self.recs[rid].repeats or self.recs[rid].base

    def outcome(self, rid: int) -> Iterator[int]:
        """The same, and what it left behind because somebody asked for that."""
        while rid:
            yield rid
            rec = self.recs[rid]
            rid = rec.base if rec.verb == "rollback" else rec.repeats or rec.base

    # -- what a writer asks of the store --------------------------------------------------------------

    def request(self, me: int, local: Local) -> tuple[str, int]:
        """(verb, argument) of the request that `local` waits for."""
        pc = local.pc
        if pc in ("list", "verify", "confirm", "look", "peek", "sure"):
            return "list", 0
        if pc in ("top", "looked", "peeked"):
            return "read", local.top
        if pc == "head":
            return "read", self.recs[local.seen].slot
        if pc == "back":
            return "read", local.last + 1
        if pc == "get":
            return "get", self.recs[local.seen].key
        if pc == "entry":
            return "create", self.rid(self.entry(me, local))
        if pc == "commit":
            return "create", self.rid(self.commit(me, local))
        if pc == "put":
            return "put", self.key(me, local, local.n)
        if pc == "unlink":
            return "unlink", local.todo[0]
        return pc, local.floor  # trim, wipe, survey, recount

    def entry(self, me: int, local: Local) -> Rec:
        """The claim or join at the top: a join where the top is of our own attempt."""
        attempt, seen, slot = self.attempts[me], local.seen, local.top + 1
        base = self.newest(seen)
        if seen and self.recs[seen].attempt == attempt:
            return Rec("join", slot, me, attempt, self.claim_of(seen), base=base)
        return Rec("claim", slot, me, attempt, 0, base=base, replaces=self.claim_of(seen))

    def commit(self, me: int, local: Local) -> Rec:
        """The commit or clear at own last + 1."""
        head = Rec("clear", local.last + 1, me, self.attempts[me], local.claim, local.n, local.base)
        verb, base = self._verb(me, local), self.recs[local.base]
        if verb == "clear":
            return head
        saves = base.saves if base.claim == local.claim else 0
        new = head._replace(kind="commit", saves=saves, pinned=base.pinned)
        if verb == "save":
            new = new._replace(saves=saves + 1, key=self.key(me, local, local.n))
            return self._keeping(new, local.base if saves == 0 and self.rules.retain_resumed else 0)
        repeats = local.base if self.rules.ask_again else local.was
        if verb == "rollback":
            repeats, new = local.target, new._replace(saves=0)
        original, before = self.original(local.target), new.pinned
        new = new._replace(repeats=repeats, key=self.recs[repeats].key, verb=verb, about=original)
        if not self.rules.merge_pins:
            before = self.recs[local.was].pinned
        if verb == "pin":
            new = new._replace(pinned=tuple(sorted({*before, original})))
        if verb == "unpin":
            new = new._replace(pinned=tuple(r for r in before if r != original))
        return self._keeping(new, 0, all_=verb != "prune")

    def _keeping(self, new: Rec, resumed: int, *, all_: bool = False) -> Rec:
        """What a commit retains. keep=1: itself, what is pinned, and what we resumed from in our first.

        A repeated one retains all but the one that it repeats if that is the newest. Of several that repeat one
        checkpoint one stays: the newest ancestor, or else the newest.
        """
        before, position = self.retained(new.base), new.repeats or new.base
        left = self.recs[position].left
        if self.recs[position].slot < self.recs[new.base].slot and self.rules.left_behind:
            left += ((self.recs[position].slot + 1, self.recs[new.base].slot),)
        own = self.original(new.repeats)
        if all_:
            kept = tuple(r for r in before if r != new.base or self.original(r) != own)
        else:
            mine = sorted(before, key=lambda r: (has(left, self.recs[r].slot), self.recs[r].slot))
            chosen = {self.original(r): r for r in mine}
            stay = {*new.pinned, self.original(resumed)} - {0, own}
            kept = tuple(sorted((r for o, r in chosen.items() if o in stay), key=lambda r: -self.recs[r].slot))
        lowest = min((self.recs[r].slot for r in kept), default=new.slot)
        return new._replace(kept=kept, left=tuple(span for span in left if span[1] >= lowest))

    def goes(self, rid: int) -> tuple[int, ...]:
        """The payloads that commit or clear `rid` decides to delete."""
        rec = self.recs[rid]
        stays = {self.recs[r].key for r in self.retained(rid)} if self.rules.shared else set()
        keys = (self.recs[r].key for r in self.retained(rec.base) if r not in rec.kept)
        return tuple(dict.fromkeys(k for k in keys if k not in stays))

    # -- how a writer goes on -------------------------------------------------------------------------

    def advance(self, me: int, local: Local, reply: object) -> Move:
        """The next `Local` after `reply`, and what this moment means to the outside (an event)."""
        step = getattr(self, "_on_" + local.pc)
        move: Move = step(me, local, reply)
        return move

    def begin(self, me: int, local: Local) -> Local:
        """Start operation `local.op` of the script."""
        script = self.config.writers[me].script
        if local.op == len(script):
            return Local("done")
        verb = script[local.op]
        if self.config.writers[me].reader:
            return local._replace(pc="peek", top=0, seen=0)
        if verb == "load" and local.last:
            return local._replace(pc="look", top=0, seen=0)
        if not local.last:
            return local._replace(pc="list")
        if verb == "save":
            return local._replace(pc="put", n=local.n + 1)
        if verb == "sweep":
            return local._replace(pc="survey")
        if verb in REPEATS:
            return self._choose(me, local, verb)
        return local._replace(pc="commit" if self.rules.fenced_clear else "wipe", n=local.n + 1, put=True)

    def _choose(self, me: int, local: Local, verb: str) -> Local:
        """Which checkpoint an operation is about, of those that this process knows."""
        there = self.retained(local.base)
        if verb == "unpin":
            there = tuple(r for r in there if self.original(r) in self.recs[local.base].pinned)
        if not there:
            return self._next(me, local)
        target = there[0] if verb in ("pin", "prune") else there[-1]
        was = 0 if self.rules.ask_again and self.rules.merge_pins else local.base
        return local._replace(pc="commit", n=local.n + 1, put=True, target=target, was=was)

    def _try(self, me: int, local: Local) -> Move:
        """On to create the commit, unless what it is about was dropped meanwhile."""
        if local.target:
            there = self.retained(local.base)
            fits = self._verb(me, local) != "rollback" and self.original(local.target) in map(self.original, there)
            if not there or (self.rules.still_there and not fits and local.target not in there):
                return self._next(me, local), ("gone", local.target)
        return local._replace(pc="commit"), None

    def _verb(self, me: int, local: Local) -> str:
        return self.config.writers[me].script[local.op]

    def _next(self, me: int, local: Local) -> Local:
        now = local._replace(op=local.op + 1, todo=(), floor=0, put=False, seen=0, top=0, target=0, was=0, must=0)
        return self.begin(me, now)

    def _entered(self, me: int, local: Local, rid: int) -> Move:
        rec = self.recs[rid]
        dead = tuple(k for k in local.dead if k != rec.key)  # an undecided save that landed is no leftover
        now = local._replace(claim=self.claim_of(rid), base=self.newest(rid), dead=dead, seen=0)
        now = now._replace(last=rec.slot, first=rec.slot, top=0)
        event = ("held" if rec.kind == "claim" else "joined", rid)
        if local.put:
            return self._try(me, now)[0], event
        if self._loads(me, local):  # on with the view that we have
            return self._follow(me, now._replace(top=rec.slot), rid)[0], event
        return self.begin(me, now), event

    def _on_list(self, me: int, local: Local, top: int) -> Move:
        if top == 0:
            return local._replace(pc="entry", top=0, seen=0), None
        return local._replace(pc="top", top=top, seen=0), None

    def _on_verify(self, me: int, local: Local, reply: int | tuple[int, int]) -> Move:
        top, must = reply if isinstance(reply, tuple) else (reply, 0)
        if top == local.top + 1:
            return self._entered(me, local._replace(must=must), self.rid(self.entry(me, local)))
        return self._on_list(me, local, top)

    def _on_top(self, me: int, local: Local, rid: int) -> Move:
        if not rid:
            return local._replace(pc="list", top=0), None
        rec, attempt = self.recs[rid], self.attempts[me]
        if rec.attempt == attempt:
            if rec.writer == me and not self.rules.join_own:
                return self._entered(me, local, rid)
            return local._replace(pc="entry", seen=rid), None
        if not local.last and attempt not in self.fenced(rid)[: self.rules.fenced]:
            return local._replace(pc="entry", seen=rid), None
        return self._outdone(me, local, rid)

    def _outdone(self, me: int, local: Local, rid: int) -> Move:
        """Another attempt's record at the listed top, and we were in before."""
        now = local._replace(pc="confirm", seen=rid)
        return (now, None) if self.rules.confirm_stale else self._on_confirm(me, now, now.top)

    def _on_confirm(self, me: int, local: Local, top: int) -> Move:
        """We are stale; unless what we read landed in a hole after the listing."""
        if top == local.top:
            return Local("stale"), ("stale", local.claim)
        if local.last and self._loads(me, local):
            return local._replace(pc="look", top=0, seen=0), None
        return self._on_list(me, local, top)

    def _on_entry(self, me: int, local: Local, reply: str) -> Move:
        if reply != "ok":
            return local._replace(pc="list", seen=0, top=0), None
        if self.rules.second_listing:
            return local._replace(pc="verify"), None
        return self._entered(me, local, self.rid(self.entry(me, local)))

    def _on_put(self, me: int, local: Local, reply: object) -> Move:
        return local._replace(pc="commit", put=True), None

    def _on_commit(self, me: int, local: Local, reply: str) -> Move:
        if reply == "ok":
            return self._acknowledged(me, local, self.rid(self.commit(me, local)))
        if reply == "give up":
            given_up = self.commit(me, local)
            key = -1 if given_up.repeats and self.rules.own_leftovers else given_up.key
            local = local._replace(late=tuple(sorted({*local.late, local.last + 1})))
            dead = local.dead if key < 0 or key in local.dead else (*local.dead, key)
            if self.rules.settle_leftovers or not dead:
                return self._next(me, local._replace(dead=dead)), ("unknown", 0)
            return local._replace(pc="unlink", todo=dead, dead=()), ("unknown", 0)
        return local._replace(pc="back"), None

    def _on_back(self, me: int, local: Local, rid: int) -> Move:
        rec = self.recs[rid]
        if not rid:
            return local._replace(pc="commit"), None
        if rec.attempt != self.attempts[me]:
            return Local("stale"), ("stale", local.claim)
        if not self.rules.save_nonce and rec.kind == self.commit(me, local).kind:
            return self._acknowledged(me, local, self.rid(self.commit(me, local)))
        if rec.writer != me:
            return local._replace(pc="list"), None  # a sibling: join, the payload stays
        if rec.n == local.n:
            return self._acknowledged(me, local, rid)
        if not self.rules.advance:
            return Local("stale"), ("stale", local.claim)
        dead = tuple(k for k in local.dead if k != rec.key)
        return self._try(me, local._replace(last=rec.slot, base=self.newest(rid), dead=dead))

    def _acknowledged(self, me: int, local: Local, rid: int) -> Move:
        rec = self.recs[rid]
        now = local._replace(last=rec.slot, base=rid, floor=rid, todo=self.goes(rid) + local.dead, dead=())
        if not self.rules.decided:
            return now._replace(pc="recount", todo=()), ("saved", rid)
        if rec.kind == "clear" and not self.rules.slots_survive_clear:
            return now._replace(pc="wipe", todo=()), ("saved", rid)
        return now._replace(pc="unlink" if now.todo else "trim"), ("saved", rid)

    def _on_unlink(self, me: int, local: Local, reply: object) -> Move:
        left = local.todo[1:]
        if left:
            return local._replace(todo=left), None
        if local.floor:
            return local._replace(pc="trim", todo=()), None
        return self._next(me, local), None

    def _on_trim(self, me: int, local: Local, deleted: bool) -> Move:
        return (local if deleted else self._next(me, local)), None

    def _on_wipe(self, me: int, local: Local, reply: object) -> Move:
        return self._next(me, local), None

    def _on_survey(self, me: int, local: Local, keys: tuple[int, ...]) -> Move:
        """`keys`: payloads that no commit names. Ours to sweep are those of lower claims."""
        slot = self.recs[local.claim].slot
        todo = tuple(k for k in keys if self.keys[k][0] < slot or not self.rules.lower_sweep)
        return (local._replace(pc="unlink", todo=todo) if todo else self._next(me, local)), None

    def _on_recount(self, me: int, local: Local, keys: tuple[int, ...]) -> Move:
        """The wrong prune: what goes is what now lies below the newest commit."""
        return local._replace(pc="unlink" if keys else "trim", todo=keys), None

    # -- load -----------------------------------------------------------------------------------------

    def _loads(self, me: int, local: Local) -> bool:
        return self.config.writers[me].script[local.op] == "load"

    def _on_look(self, me: int, local: Local, reply: tuple[int, int]) -> Move:
        top, must = reply
        return local._replace(pc="looked", top=top, must=local.must or must), None

    def _on_looked(self, me: int, local: Local, rid: int) -> Move:
        """The load of one who is in: first, whether the task is still its own."""
        if not rid:
            return local._replace(pc="look"), None
        if self.recs[rid].attempt != self.attempts[me]:
            return self._outdone(me, local, rid)
        return self._on_peeked(me, local, rid)

    def _on_peek(self, me: int, local: Local, reply: tuple[int, int]) -> Move:
        top, must = reply
        if top and local.top == top:
            return Local("done"), ("corrupt", top)  # gone, and the top did not move
        now = local._replace(top=top, must=local.must or must)
        return (now._replace(pc="peeked"), None) if top else self._loaded(me, now, 0)

    def _on_peeked(self, me: int, local: Local, rid: int) -> Move:
        if not rid:
            return self._gone(me, local)
        entry = self.recs[rid].kind in ENTRIES and local.top != local.last  # our own entry is known to us
        if self.rules.confirm_all or (entry and self.rules.confirm_entries):
            return local._replace(pc="sure", seen=rid), None
        return self._follow(me, local, rid)

    def _on_sure(self, me: int, local: Local, reply: tuple[int, int]) -> Move:
        if reply[0] != local.top:
            return local._replace(pc="peeked", top=reply[0], seen=0), None
        return self._follow(me, local, local.seen)

    def _follow(self, me: int, local: Local, rid: int) -> Move:
        newest = self.newest(rid)
        if newest and newest != rid:
            return local._replace(pc="head", seen=newest), None
        return self._on_head(me, local._replace(seen=newest), newest)

    def _on_head(self, me: int, local: Local, rid: int) -> Move:
        if rid != local.seen:
            return self._gone(me, local)
        if self.recs[rid].kind == "commit":
            return local._replace(pc="get"), None
        return self._loaded(me, local, rid)

    def _on_get(self, me: int, local: Local, there: bool) -> Move:
        return self._loaded(me, local, local.seen) if there else self._gone(me, local)

    def _gone(self, me: int, local: Local) -> Move:
        return (local._replace(pc="peek", seen=0), None) if self.rules.relist else self._loaded(me, local, 0)

    def _loaded(self, me: int, local: Local, rid: int) -> Move:
        """Load ends with `rid`. The event says "lost" where something newer had been acknowledged before it began."""
        found, must = self.recs[rid], self.recs[local.must]
        fine = rid == local.must or found.slot > must.slot or (must.kind == "clear" and found.kind != "commit")
        return self._next(me, local), ("loaded", rid) if fine else ("lost", local.must)
