"""Several attempts of one task at once, with faults, crashes and rot, against the oracle."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import fsspec
import hypothesis.strategies as st
from hypothesis import event
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from taskckpt import Checkpoint
from taskckpt.errors import (
    CommitUnknownError,
    CorruptCheckpointError,
    StaleAttemptError,
    UnavailableError,
)
from taskckpt.testing import instant_retries, intercepted
from tests.stateful.oracle import CORRUPT, Family, Oracle, Saved

GUARDED, BATCH, INLINE = 4, 2, 1024
SIZES = {"small": 20, "large": 3000, "file": 2000, "folder": 2500}
MOST_ATTEMPTS = 15  # a record names 16 claims before it


class Crash(BaseException):
    """The process ends here: nothing of it reaches the store any more."""


@dataclass(eq=False)
class Process:
    """One process of an attempt."""

    name: str
    family: Family
    checkpoint: Checkpoint
    child: bool = False
    loaded: str | None = None
    stale: bool = False
    crashed: bool = False
    clean_since: int = -1  # how many faults there had been when it claimed; -1: it has not

    def __repr__(self) -> str:
        return self.name


class Place:
    """The task's store, seen from outside the package."""

    def __init__(self, kind: str, root: Path) -> None:
        self.kind = kind
        self.dest = str(root) if kind == "local" else f"memory:/{root}"
        self._fs = fsspec.filesystem("memory")

    def keys(self, folder: str) -> set[str]:
        root = self.dest.removeprefix("memory:/") + "/" + folder
        if self.kind == "local":
            return {os.path.join(at, name) for at, _, names in os.walk(root) for name in names}
        return set(self._fs.find(root))

    def read(self, key: str) -> bytes:
        return Path(key).read_bytes() if self.kind == "local" else bytes(self._fs.cat_file(key))

    def damage(self, key: str, how: str) -> None:
        data = self.read(key)
        middle = len(data) // 2
        data = data[:middle] + (b"" if how == "cut" else bytes([data[middle] ^ 1]) + data[middle + 1 :])
        if how == "gone":
            os.unlink(key) if self.kind == "local" else self._fs.rm_file(key)
        elif self.kind == "local":
            Path(key).write_bytes(data)
        else:
            self._fs.pipe_file(key, data)


class Attempts(RuleBasedStateMachine):
    """Two to four processes of one task at a time."""

    processes: Bundle[Process] = Bundle("processes")

    def __init__(self, kind: str, root: Path) -> None:
        super().__init__()
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        self.place = Place(kind, root / "task")
        if kind == "memory" and self.place.keys(""):
            fsspec.filesystem("memory").rm(str(root), recursive=True)
        self.scratch = root / "scratch"
        self.oracle = Oracle()
        self.families = self.count = 0
        self.fault: tuple[int, str] | None = None
        self.faults = 0
        self.crashing = False
        self.stack = ExitStack()
        self.stack.enter_context(intercepted(self.hook))
        self.stack.enter_context(instant_retries())

    def teardown(self) -> None:
        self.stack.close()

    # -- faults -----------------------------------------------------------------------------------------

    def hook(self, when: str, verb: str, keys: Sequence[str]) -> None:
        if self.crashing:
            raise Crash
        if self.fault is None:
            return
        left, how = self.fault
        if not how.endswith((when, f"{when} {verb}")):
            return
        self.fault = (left - 1, how)
        if left > 0:
            return
        self.fault = None
        self.faults += 1
        if how.startswith("crash"):
            self.crashing = True
            raise Crash
        raise UnavailableError(f"As wished, {how} {verb}.", uri=self.place.dest)

    @rule(left=st.integers(0, 12), how=st.sampled_from(["lost before", "lost after", "crash before", "crash after"]))
    def arm(self, left: int, how: str) -> None:
        self.fault = (left, how)

    @rule()
    def calm(self) -> None:
        self.fault = None

    # -- processes --------------------------------------------------------------------------------------

    @initialize(target=processes, keep=st.sampled_from([1, 2, 3, None]))
    def first_attempt(self, keep: int | None) -> Process:
        return self.new_attempt(keep)

    @precondition(lambda self: self.families < MOST_ATTEMPTS)
    @rule(target=processes, keep=st.sampled_from([1, 2, 3, None]))
    def attempt(self, keep: int | None) -> Process:
        return self.new_attempt(keep)

    def retried(self, process: Process) -> None:
        """The platform starts what was killed again."""
        if self.families < MOST_ATTEMPTS:
            process.__dict__.update(self.new_attempt(process.family.keep).__dict__)

    def new_attempt(self, keep: int | None) -> Process:
        self.families += 1
        family = Family(f"attempt{self.families}", keep)
        return Process(family.name, family, Checkpoint(self.place.dest, keep=keep))

    @rule(target=processes, parent=processes)
    def child(self, parent: Process) -> Process:
        self.count += 1
        checkpoint = pickle.loads(pickle.dumps(parent.checkpoint))
        return Process(f"{parent.name}.child{self.count}", parent.family, checkpoint, child=True)

    @rule(process=consumes(processes))
    def ends(self, process: Process) -> None:
        """It never asks the store again; a later one may be its child nonetheless."""

    # -- operations -------------------------------------------------------------------------------------

    @rule(process=processes, kind=st.sampled_from(sorted(SIZES)), later=st.booleans())
    def save(self, process: Process, kind: str, *, later: bool = False) -> None:
        self.count += 1
        label = f"{kind}-{self.count}"
        before = self.place.keys("data")

        def save() -> None:
            if later:
                assert process.checkpoint.save_later(self.content(label, kind)).result()
            else:
                process.checkpoint.save_sync(self.content(label, kind))

        result = self.operate(process, save)
        keys = tuple(self.place.keys("data") - before)
        if result in ("done", "unknown"):
            self.oracle.saved(Saved(label, result == "done", keys=keys), process.family, process.loaded)
        if result == "done" and kind != "small":
            assert len(keys) == 1
        if result == "done" and self.faults == process.clean_since and process.family.keep is not None:
            self.expect_few_objects(process, process.family.keep)

    @precondition(lambda self: self.fault is None)
    @rule(process=processes)
    def save_two_in_the_background(self, process: Process) -> None:
        """While one is in flight the other waits; their commits are in the order of the calls."""
        self.count += 2
        labels = [f"large-{self.count - 1}", f"large-{self.count}"]
        before = self.place.keys("data")

        def save() -> None:
            for label in labels:
                process.checkpoint.save_later(self.content(label, "large"), policy="queue")
            process.checkpoint.wait()

        if self.operate(process, save) == "done":
            for label in labels:
                keys = tuple(key for key in self.place.keys("data") - before if self.holds(key, label))
                assert keys or label != labels[-1]  # with keep=1 the first one may be gone already
                self.oracle.saved(Saved(label, certain=True, keys=keys), process.family, process.loaded)

    def holds(self, key: str, label: str) -> bool:
        return self.place.read(key).startswith(f"{label}.".encode())

    @rule(process=processes, kinds=st.lists(st.sampled_from(["large", "folder"]), min_size=2, max_size=3))
    def save_what_rots(self, process: Process, kinds: list[str]) -> None:
        for kind in kinds:
            self.save(process, kind)
        for _ in kinds[1:]:
            self.rot("flip")
        self.look()

    @rule(process=processes, kind=st.sampled_from(["large", "folder"]), lands=st.booleans())
    def save_again_after_a_lost_reply(self, process: Process, kind: str, *, lands: bool) -> None:
        self.save(process, "large")
        self.fault = (0, "lost after create" if lands else "lost before create")
        self.save(process, kind)
        self.fault = None
        self.look()  # and so it is known whether it landed
        self.save(process, "large")
        self.rot("flip")
        self.look()

    @precondition(lambda self: self.families < MOST_ATTEMPTS)
    @rule(target=processes, before=processes, keep=st.sampled_from([1, 2, 3, None]), loads=st.booleans())
    def retry_whose_first_save_rots(self, before: Process, keep: int | None, *, loads: bool) -> Process:
        for kind in ("large", "folder"):
            self.save(before, kind)
        process = self.new_attempt(keep)
        if loads:
            self.load(process)
        self.save(process, "large")
        self.rot("flip")
        self.look()
        return process

    @rule(process=processes, times=st.integers(4, 12))
    def save_often(self, process: Process, times: int) -> None:
        for number in range(times):
            self.save(process, "small" if number % 3 else "large")

    @rule(process=processes)
    def load(self, process: Process) -> None:
        found: list[str | None] = []
        result = self.operate(process, lambda: found.append(self.loaded(process.checkpoint)))
        if result == "done":
            self.judge_load(found[0])
            if found[0] != CORRUPT:
                process.loaded = found[0]

    @precondition(lambda self: any(one.claimed == "yes" for one in self.oracle.owners) and self.count % 3 == 0)
    @rule(process=processes)
    def clear(self, process: Process) -> None:
        result = self.operate(process, process.checkpoint.clear_sync)
        if result in ("done", "unknown"):
            self.oracle.saved(Saved(None, result == "done"), process.family, None)
            process.loaded = None

    @rule()
    def look(self) -> None:
        """A view that writes nothing."""
        fault, self.fault = self.fault, None
        self.judge_load(self.loaded(Checkpoint(self.place.dest, read_only=True)))
        self.fault = fault

    @rule(how=st.sampled_from(["flip", "cut", "gone"]))
    def rot(self, how: str) -> None:
        for saved in self.oracle.history:
            if saved.label is None or not saved.certain:
                return
            if not saved.damaged:
                if saved.keys and saved.keys[0] in self.place.keys("data"):
                    self.place.damage(saved.keys[0], how)
                    saved.damaged = True
                return

    # -- what must hold ---------------------------------------------------------------------------------

    def operate(self, process: Process, operation: Callable[[], object]) -> str:
        """Runs it, and judges whether it may end as it does: done, unknown, failed, stale or crashed."""
        result = self._operate(process, operation)
        event(result)
        return result

    def _operate(self, process: Process, operation: Callable[[], object]) -> str:
        if process.crashed:
            self.retried(process)
            return "crashed"
        fresh, faults = process.family.claimed == "no", self.faults
        try:
            operation()
        except StaleAttemptError:
            assert process.stale or self.oracle.may_be_stale(process.family), f"{process} is stale, and has the task"
            self.oracle.was_refused(process.family)
            process.stale = True
            return "stale"
        except CommitUnknownError:
            self.oracle.may_have_taken_part(process.family)
            return "unknown"
        except UnavailableError:
            self.oracle.may_have_taken_part(process.family)
            return "failed"
        except Crash:
            process.crashed = True
            self.crashing = False
            self.oracle.may_have_taken_part(process.family)
            return "unknown"
        assert not process.stale, f"{process} was stale before"
        assert self.oracle.may_succeed(process.family), f"{process} was outdone, and yet it goes on"
        self.oracle.took_part(process.family)
        if fresh:
            process.clean_since = faults
        return "done"

    def judge_load(self, label: str | None) -> None:
        allowed = self.oracle.loadable()
        event(f"loaded {label and label.partition('-')[0]}, of {len(allowed)} possible")
        assert label in allowed, f"loaded {label}, not one of {allowed}"
        self.oracle.was_loaded(label)

    def expect_few_objects(self, process: Process, keep: int) -> None:
        """Payloads: those kept, and what was resumed from. Records: the guard, and a batch that is not full yet."""
        assert len(self.place.keys("data")) <= keep + 1
        newest, run = "", 0
        for key in sorted(self.place.keys("log")):  # newest first
            record = json.loads(self.place.read(key).partition(b"\n")[0])
            newest = newest or record["writer"]
            if record["kind"] in ("claim", "join") or record["writer"] != newest:
                break
            run += record["kind"] == "commit"  # claims, joins and clears stay
        assert run <= keep + GUARDED + BATCH

    @invariant()
    def nothing_lies_about(self) -> None:
        if not self.faults:
            assert not [key for key in self.place.keys("") if "/.partial-" in key]

    # -- contents ---------------------------------------------------------------------------------------

    def content(self, label: str, kind: str) -> bytes | Path:
        data = label.encode().ljust(SIZES[kind], b".")
        if kind in ("small", "large"):
            return data
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        if kind == "file":
            (self.scratch / "model.bin").write_bytes(data)
            return self.scratch / "model.bin"
        folder = self.scratch / "folder"
        (folder / "sub").mkdir(parents=True)
        (folder / "label").write_bytes(label.encode())
        # What does not shrink, so that it becomes an object of its own.
        (folder / "sub" / "weights").write_bytes(noise(label, SIZES[kind]))
        return folder

    def loaded(self, checkpoint: Checkpoint) -> str | None:
        """The label of what is loaded, after a look at all of its bytes."""
        target = self.scratch.with_name("restored")
        shutil.rmtree(target, ignore_errors=True)
        try:
            found = checkpoint.load_sync(to=target)
        except CorruptCheckpointError:
            return CORRUPT
        if found is None:
            return None
        if found.is_dir():
            label = (found / "label").read_text()
            assert (found / "sub" / "weights").read_bytes() == noise(label, SIZES["folder"])
            return label
        data = found.read_bytes()
        label = data.rstrip(b".").decode()
        assert len(data) == SIZES[label.partition("-")[0]]
        assert (found.name == "model.bin") == label.startswith("file")
        return label


def noise(label: str, size_bytes: int) -> bytes:
    return random.Random(label).randbytes(size_bytes)
