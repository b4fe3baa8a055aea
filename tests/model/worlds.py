"""From plain data to configurations: the schedules' worlds, and those in which all rules are on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.model.protocol_model import Config, Rules, Writer
from tests.model.schedules import Schedule


def writers(*rows: tuple[str, str, str]) -> tuple[Writer, ...]:
    """Writers from (name, script, parent's name or "" or "view")."""
    names = [name for name, _, _ in rows]
    parents = [names.index(parent) if parent in names else None for _, _, parent in rows]
    return tuple(
        Writer(name, tuple(script.split()), parent=parent, reader=role == "view")
        for (name, script, role), parent in zip(rows, parents, strict=True)
    )


def world_of(schedule: Schedule, *, rules_on: bool) -> Config:
    """The world of a schedule, with its rules off as it says, or with all of them on."""
    names = [name for name, _, _ in schedule.writers]
    off: dict[str, Any] = {} if rules_on else dict.fromkeys(schedule.off, False)
    return Config(
        writers(*schedule.writers),
        Rules(**off),
        faults=schedule.faults,
        delayed=schedule.delayed,
        readdir=tuple(names.index(name) for name in schedule.readdir),
        separate_puts=True,
        max_slot=schedule.max_slot,
    )


def _world(*rows: str, readdir: tuple[int, ...] = (), newest: int = 1, **how: Any) -> Config:
    """Build a world from rows like "NAME script", "NAME<PARENT script" or "NAME<view script"."""
    split = [row.partition(" ") for row in rows]
    named = [(*who.partition("<")[::2], script) for who, _, script in split]
    people = writers(*((name, script, parent) for name, parent, script in named))
    return Config(people, Rules(newest=newest), readdir=readdir, **how)


def slow_listing(newest: int, saves: int, *, agree: bool) -> Config:
    """B takes the task over with a listing that is no snapshot, while A saves `saves` times and prunes."""
    world = _world("A" + " save" * saves, "B save", readdir=(1,), newest=newest, max_slot=14)
    return replace(world, rules=replace(world.rules, agree=agree))


def shallow_fenced(fenced: int) -> Config:
    """Three attempts, so that two newer claims may come between an attempt's own and its next look."""
    world = _world("A save", "B save", "C save")
    return replace(world, rules=replace(world.rules, fenced=fenced))


# R only reads, Q and P are forked from A, J and K join to pin and prune.
# States and seconds of each stand in the README.
SAFE: dict[str, Config] = {
    "three attempts": _world("A save save", "B save save", "C save save"),
    "three attempts, reader": _world("A save save", "B save", "C save", "R<view load"),
    "reader, two attempts": _world("A save save save", "B save save", "R<view load load"),
    "clear": _world("A save clear", "B save clear save", "R<view load"),
    "three attempts, clear": _world("A save clear", "B save save", "C clear save"),
    "owners load": _world("A load save load", "B load save save load", "C load save"),
    "lost replies": _world("A save save save", "B save save", "R<view load", faults=1),
    "two lost replies, clear": _world("A save clear save", "B save save", faults=2),
    "late create": _world("A save save save", "B save save", faults=1, delayed=True),
    "late create, clear": _world("A save clear save", "B save", "R<view load", faults=1, delayed=True),
    "two late creates": _world("A save save save", "B save", faults=2, delayed=True),
    "child": _world("A save save save", "Q<A save save", max_slot=9),
    "child, clear, reader": _world("A save clear", "Q<A save", "R<view load", max_slot=7),
    "child, late create": _world("A save save", "Q<A save", faults=1, delayed=True, max_slot=7),
    "child, owners load": _world("A save load save", "Q<A save load save", max_slot=8),
    "two children, owners load": _world("A save save", "Q<A save", "P<A load load", max_slot=6),
    "late create, owners load": _world("A save load save load", "B load save", faults=1, delayed=True),
    "child, second attempt": _world("A save save", "Q<A save", "B save save", max_slot=7),
    "sweep": _world("A save sweep", "Q<A save", "B save sweep", separate_puts=True, max_slot=6),
    "sweep, late create": _world("A save save", "B sweep save sweep", faults=1, delayed=True, separate_puts=True),
    "readdir": _world("A save save", "B save", "R<view load", readdir=(1, 2)),
    "readdir, guard of 2": _world("A save save save", "B save", newest=2, readdir=(0, 1)),
    "pins": _world("A save pin save unpin save", "B save save pin save"),
    "joiner": _world("A save save save", "J<A pin prune", max_slot=9),
    "joiner, lost reply": _world("A save save", "J<A pin", faults=1, max_slot=8),
    "joiner, late create": _world("A save save", "J<A pin prune", faults=1, delayed=True, max_slot=7),
    "joiner, clear": _world("A save clear save", "J<A pin rollback", max_slot=8),
    "joiner, second attempt": _world("A save save", "J<A pin", "B save save", max_slot=8),
    "rollback, reader": _world("A save pin save rollback save", "B save rollback", "R<view load"),
    "rollback, joiner": _world("A save", "B save rollback save", "J<B pin", max_slot=7),
    "rollback, lost reply": _world("A save pin save rollback save", "B save rollback save", faults=1),
    "rollback, late create": _world("A save pin save rollback save", "B save", faults=1, delayed=True),
}

FULL: dict[str, Config] = {
    "three attempts, two lost replies": _world("A save save", "B save save", "C save save", faults=2),
    "three attempts, late create": _world("A save save save", "B save save", "C save", faults=1, delayed=True),
    "three attempts, clear, late create": _world("A save clear", "B save save", "C save", faults=1, delayed=True),
    "reader, two late creates": _world("A save save save", "B save", "R<view load", faults=2, delayed=True),
    "reader, three late creates": _world("A save save save save", "R<view load load", faults=3, delayed=True),
    "child, second attempt, late create": _world(
        "A save save", "Q<A save", "B save", faults=1, delayed=True, max_slot=7
    ),
    "two children": _world("A save", "Q<A save", "P<A save", max_slot=7),
    "child, third attempt, clear": _world("A save", "Q<A save", "B save clear", "C save", max_slot=7),
    "child, sweep, clear": _world("A save clear", "Q<A save save", "B sweep save", separate_puts=True, max_slot=8),
    "readdir of all, clear": _world("A save clear", "B save", "R<view load", readdir=(0, 1, 2)),
    "readdir, late create": _world("A save save", "B save", faults=1, delayed=True, readdir=(0, 1)),
    "two joiners": _world("A save save", "J<A pin", "K<A unpin pin", max_slot=8),
    "joiner, second attempt, late create": _world(
        "A save save", "J<A pin", "B save", faults=1, delayed=True, max_slot=8
    ),
    "rollback, joiner, lost reply": _world("A save", "B save rollback save", "J<B pin", faults=1, max_slot=8),
}
