"""Real attempts of one task, each in a thread of its own, whose every store request waits to be let go.

A `Stage` is the store and the network: it lets one request of one actor through at a time, loses replies, and
delivers creates long after their client gave them up. It notes what reaches the store, for `judge.py`.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from taskckpt import Checkpoint
from taskckpt._layout import parse_slot_name
from taskckpt._testing import switches
from taskckpt.errors import AlreadyExistsError, CommitUnknownError, StaleAttemptError, TaskckptError, UnavailableError
from taskckpt.testing import InterceptedStore

if TYPE_CHECKING:
    from taskckpt._operation import Stop
    from taskckpt._stores import Store

PATIENCE_S = 10.0
SIZE_BYTES = 200

Verdict = Literal["go", "fail", "lose reply", "deliver later", "give up", "give up, deliver later"]
LATER = ("deliver later", "give up, deliver later")


@dataclass(frozen=True)
class Request:
    verb: str
    keys: tuple[str, ...]

    @property
    def slot(self) -> int | None:
        name = parse_slot_name(self.keys[0].rpartition("/")[2]) if self.keys else None
        return None if name is None else name.slot

    @property
    def lists_log(self) -> bool:
        return self.verb == "list" and self.keys == ("log",)


@dataclass(frozen=True)
class Landed:
    """A record that reached the store: by whom, when, and what it says."""

    clock: int
    who: str
    label: str
    record: dict  # type: ignore[type-arg]
    void: bool  # in a slot that was used before, or below the newest one

    verb: str = ""  # what its writer was about

    @property
    def slot(self) -> int:
        return int(self.record["slot"])

    @property
    def repeats(self) -> bool:
        return "repeats" in self.record

    @property
    def kind(self) -> str:
        return str(self.record["kind"])

    @property
    def attempt(self) -> str:
        return str(self.record["claim"]["nonce"])

    @property
    def key(self) -> str | None:
        """Where its payload lies."""
        checkpoint = self.record.get("checkpoint")
        return checkpoint["stored"].get("key") if checkpoint else None


@dataclass
class Outcome:
    """How one operation of an actor went: `result` is a label, None, "done", or the name of an error."""

    who: str
    verb: str
    label: str
    began: int = -1  # when its first request was let go
    ended: int = -1
    result: str | None = "unfinished"


class Upload(NamedTuple):
    clock: int
    who: str
    label: str
    key: str


class _LostReply(Exception):  # noqa: N818 - no answer came; the client below the log tries again
    pass


class _Closed(BaseException):
    pass


class StagedStore(InterceptedStore):
    """A store whose requests are let through by a stage."""

    def __init__(self, store: Store, stage: Stage) -> None:
        super().__init__(store, stage.hook)
        self.inner = store
        self._stage = stage

    def create(self, key: str, data: bytes, stop: Stop) -> None:
        actor = self._stage.actor()
        if actor is None:
            return self.inner.create(key, data, stop)
        label = actor.label
        actor.creating = lambda: self._stage.land(self.inner, actor.name, label, key, data, stop)
        while True:
            with contextlib.suppress(_LostReply):
                self._hook("before", "create", [key])
                actor.creating()
                self._hook("after", "create", [key])
                return None

    def write(self, key: str, *args: object) -> None:
        actor = self._stage.actor()
        super().write(key, *args)  # type: ignore[arg-type]
        if actor is not None:
            self._stage.uploads.append(Upload(self._stage.clock, actor.name, actor.label, key))

    def delete(self, keys: Sequence[str]) -> None:
        super().delete(keys)
        self._stage.deleted(keys)


@dataclass
class Actor:
    """One process: a checkpoint, and what it does with it, one operation after the other."""

    name: str
    checkpoint: Checkpoint
    script: tuple[str, ...]
    family: str
    pending: Request | None = None
    verdict: Verdict | None = None
    done: bool = False
    label: str = ""
    creating: Callable[[], None] | None = None
    outcome: Outcome | None = None
    thread: threading.Thread | None = None
    saves: int = 0


class Stage:
    """All actors of one story, and what came of it."""

    def __init__(self, dest: str, *, keep: int | None = 1) -> None:
        self.dest = dest
        self.keep = keep
        self.actors: dict[str, Actor] = {}
        self.clock = 0
        self.landed: list[Landed] = []
        self.uploads: list[Upload] = []
        self.gone: list[tuple[int, str]] = []  # when, deleted key
        self.outcomes: list[Outcome] = []
        self.late: list[tuple[str, int, Callable[[], None]]] = []
        self._by_thread: dict[int, Actor] = {}
        self._moved = threading.Condition()
        self._closed = False

    def __enter__(self) -> Self:
        self._before = switches.wrap_store
        switches.wrap_store = lambda store: StagedStore(store, self)
        return self

    def __exit__(self, *_: object) -> None:
        switches.wrap_store = self._before
        with self._moved:
            self._closed = True
            self._moved.notify_all()
        for actor in self.actors.values():
            if actor.thread is not None:
                actor.thread.join(PATIENCE_S)

    # -- actors -----------------------------------------------------------------------------------------

    def enter(self, name: str, script: tuple[str, ...], *, parent: str = "", view: bool = False) -> Actor:
        """An attempt of its own; a child of another one, as spawned with its checkpoint; or a read-only view."""
        family = self.actors[parent].family if parent else name
        if parent:
            checkpoint = pickle.loads(pickle.dumps(self.actors[parent].checkpoint))
        else:
            checkpoint = Checkpoint(self.dest, keep=self.keep, read_only=view)
        actor = self.actors[name] = Actor(name, checkpoint, script, family)
        return actor

    def begin(self, name: str) -> None:
        """Let an actor run up to its first request."""
        actor = self.actors[name]
        actor.thread = threading.Thread(target=self._run, args=(actor,), name=name, daemon=True)
        actor.thread.start()
        self._settle(actor)

    def _run(self, actor: Actor) -> None:
        self._by_thread[threading.get_ident()] = actor
        try:
            for verb in actor.script:
                if not self._operate(actor, verb):
                    break
        except _Closed:
            pass
        finally:
            with self._moved:
                actor.done = True
                self._moved.notify_all()

    def _operate(self, actor: Actor, verb: str) -> bool:
        """One operation; tried again where the store was unavailable. False ends the actor."""
        if verb == "save":
            actor.saves += 1
        actor.label = f"{actor.name}{actor.saves}" if verb == "save" else ""
        while True:
            outcome = actor.outcome = Outcome(actor.name, verb, actor.label)
            self.outcomes.append(outcome)
            try:
                outcome.result = self.call(actor.checkpoint, verb, actor.label)
            except CommitUnknownError:
                outcome.result = "unknown"
            except UnavailableError:
                outcome.result = "unavailable"
                continue
            except StaleAttemptError:
                outcome.result = "stale"
                return False
            except TaskckptError as error:
                outcome.result = type(error).__name__
            finally:
                outcome.ended = self.clock
            return True

    @staticmethod
    def call(checkpoint: Checkpoint, verb: str, label: str = "") -> str | None:
        if verb == "save":
            checkpoint.save_sync(label.encode().ljust(SIZE_BYTES))
            return "done"
        if verb == "clear":
            checkpoint.clear_sync()
            return "done"
        if verb == "prune":
            checkpoint.prune_sync()
            return "done"
        if verb != "load":
            return Stage.mark(checkpoint, verb)
        found = checkpoint.load_bytes_sync()
        return None if found is None else found.decode().strip()

    @staticmethod
    def mark(checkpoint: Checkpoint, verb: str) -> str:
        """Pins the newest checkpoint, unpins the oldest pinned one, or goes back to the oldest."""
        there = checkpoint.checkpoints_sync()
        if verb == "unpin":
            there = [one for one in there if one.pinned]
        if not there:
            return "nothing to do"
        if verb == "pin":
            checkpoint.pin_sync(there[0])
        elif verb == "unpin":
            checkpoint.unpin_sync(there[-1])
        else:
            checkpoint.rollback_sync(there[-1])
        return "done"

    def final(self) -> Outcome:
        """What a view that comes after everything loads."""
        outcome = Outcome("the end", "load", "", self.clock, self.clock)
        self.outcomes.append(outcome)
        try:
            outcome.result = self.call(Checkpoint(self.dest, read_only=True), "load")
        except TaskckptError as error:
            outcome.result = type(error).__name__
        return outcome

    # -- requests ---------------------------------------------------------------------------------------

    def actor(self) -> Actor | None:
        return self._by_thread.get(threading.get_ident())

    def hook(self, when: str, verb: str, keys: Sequence[str]) -> None:
        actor = self.actor()
        if actor is None:
            return
        if when == "after":
            if actor.verdict == "lose reply":
                raise _LostReply
            if actor.verdict == "give up":
                raise UnavailableError("The reply was lost.", uri=self.dest)
            return
        with self._moved:
            actor.pending, actor.verdict = Request(verb, tuple(keys)), None
            self._moved.notify_all()
            while actor.verdict is None and not self._closed:
                self._moved.wait()
            if actor.verdict is None:
                raise _Closed
            actor.pending = None
        if actor.verdict in LATER:
            assert actor.creating is not None
            self.late.append((actor.name, Request(verb, tuple(keys)).slot or 0, actor.creating))
        if actor.verdict == "deliver later":
            raise _LostReply
        if actor.verdict in ("fail", "give up, deliver later"):
            raise UnavailableError("No answer.", uri=self.dest)

    def let_go(self, name: str, verdict: Verdict = "go") -> None:
        """Let the pending request of an actor through, and wait for what it asks next."""
        actor = self.actors[name]
        with self._moved:
            assert actor.pending is not None, f"{name} asks for nothing"
            assert actor.outcome is not None
            if actor.outcome.began < 0:
                actor.outcome.began = self.clock
            self.clock += 1
            actor.verdict, actor.pending = verdict, None
            self._moved.notify_all()
        self._settle(actor)

    def _settle(self, actor: Actor) -> None:
        with self._moved:
            quiet = self._moved.wait_for(lambda: actor.done or actor.pending is not None, PATIENCE_S)
        if not quiet:
            raise TimeoutError(f"{actor.name} neither ends nor asks for anything")

    def deliver(self, number: int = 0) -> None:
        """A create that its client gave up on reaches the store."""
        self.clock += 1
        with contextlib.suppress(AlreadyExistsError):
            self.late.pop(number)[2]()

    def drain(self, *names: str) -> None:
        """Everybody goes on alone until it ends: first these, then the others in the order of their entrance."""
        for name in dict.fromkeys((*names, *self.actors)):
            actor = self.actors[name]
            if actor.thread is None:
                self.begin(name)
            while not actor.done:
                self.let_go(name)

    # -- what reached the store -------------------------------------------------------------------------

    def land(self, store: Store, who: str, label: str, key: str, data: bytes, stop: Stop) -> None:
        store.create(key, data, stop)
        record = json.loads(data.partition(b"\n")[0])
        used = [one.slot for one in self.landed]
        void = bool(used) and (record["slot"] in used or record["slot"] < max(used))
        landed = Landed(self.clock, who, label, record, void, self.actors[who].outcome.verb)  # type: ignore[union-attr]
        if landed.repeats:  # it is known by what was saved
            label = next(one.label for one in self.landed if one.kind == "commit" and one.key == landed.key)
            landed = replace(landed, label=label)
        self.landed.append(landed)

    def deleted(self, keys: Sequence[str]) -> None:
        self.gone += [(self.clock, key) for key in keys]

    def story(self) -> str:
        """The records in the order in which they landed; those in brackets are void."""
        return ", ".join(
            f"{one.who} ({one.kind} {one.slot})" if one.void else f"{one.who} {one.kind} {one.slot}"
            for one in self.landed
        )

    def results(self) -> dict[str, list[str | None]]:
        """Per actor: how its operations ended."""
        return {name: list(self._results_of(name)) for name in self.actors}

    def _results_of(self, name: str) -> Iterator[str | None]:
        return (outcome.result for outcome in self.outcomes if outcome.who == name)
