"""`python -m tests.model NAME`: print the shortest counterexample of a schedule's world, or what a world holds."""

from __future__ import annotations

import sys

from tests.model.model_explorer import explore
from tests.model.schedules import SCHEDULES
from tests.model.worlds import FULL, SAFE, world_of


def main(names: list[str]) -> None:
    schedules = {schedule.name: schedule for schedule in SCHEDULES}
    worlds = SAFE | FULL
    for name in names or schedules:
        if name in schedules:
            schedule = schedules[name]
            result = explore(world_of(schedule, rules_on=False), only=(schedule.violates,))
            print(f"{name}, without {', '.join(schedule.off)}: {result}")
        elif name in worlds:
            print(f"{name}: {explore(worlds[name])}")
        else:
            raise SystemExit(f"no such name: {name!r}; there are {[*schedules, *worlds]}")


main(sys.argv[1:])
