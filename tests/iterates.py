"""What the tests of ``iterate`` have in common: attempts that die, and sources that say where they are."""

from __future__ import annotations

import gc
from contextlib import suppress

from taskckpt import Checkpoint
from taskckpt._sources import shuffled


class Killed(BaseException):
    """The process ends here, as far as the test goes: whoever saw it saves nothing more."""


TEN = list(range(10))


def attempt() -> Checkpoint:
    """The next attempt at the one task of a test."""
    return Checkpoint("task")


def rest(source=TEN, *, cp=None, **options):
    """What a later attempt gets."""
    return list((cp or attempt()).iterate(source, **options))


def stop_at(item, source=TEN, *, cp=None, **options):
    """Dies in the body of this item."""
    with suppress(Killed):
        for one in (cp or attempt()).iterate(source, **options):
            if one == item:
                raise Killed
    gc.collect()


def break_at_4(it):
    """Ends the loop in the body of this item."""
    for item in it:
        if item == 4:
            break


def loaded(cp):
    state = cp.load_state_sync()
    assert state is not None
    return state


def position_of(cp):
    positions = cp._positions.snapshot()
    assert positions is not None
    return positions["default"]


class WithState:
    """Its own iterator, which can be gone over again; it says where it is."""

    def __init__(self, length):
        self.length, self.at, self.was_set, self.pulled, self.log = length, 0, 0, 0, []

    def __iter__(self):
        self.at = 0
        return self

    def __next__(self):
        if self.at == self.length:
            raise StopIteration
        self.at += 1
        self.pulled += 1
        return self.at - 1

    def get_state(self):
        return {"at": self.at, "log": self.log}

    def set_state(self, state):
        self.was_set += 1
        self.at = state["at"]


class WithStateDict:
    """As a StatefulDataLoader: iter() goes on where load_state_dict has said, or begins anew; shuffled by its state."""

    def __init__(self, length):
        self.length, self.seed, self.at, self.resumes, self.has_ended = length, 0, 0, False, True

    def __iter__(self):
        if self.has_ended or not self.resumes:
            self.at = 0
            self.seed += 1
        self.resumes = self.has_ended = False
        order = shuffled(self.length, self.seed, 0)
        while self.at < self.length:
            self.at += 1
            yield order[self.at - 1]
        self.has_ended = True

    def state_dict(self):
        return {"seed": self.seed, "at": self.at, "has_ended": self.has_ended}

    def load_state_dict(self, state):
        self.seed, self.at, self.has_ended = state["seed"], state["at"], state["has_ended"]
        self.resumes = True


class WithStatefulIterator:
    """Its iterators say where they are."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(WithState(self.length))
