"""Tasks of Huey: on Redis if there is one, else in SQLite, or at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import queue_work
from huey import MemoryHuey, RedisHuey, SqliteHuey

# A result is told when there are no retries left.
LAST_ERROR = {"store_intermediate_errors": False}

if "REDIS" in os.environ:
    huey = RedisHuey("counting", url=os.environ["REDIS"], **LAST_ERROR)
elif "IMMEDIATE" in os.environ:
    huey = MemoryHuey("counting", immediate=True)
else:
    huey = SqliteHuey("counting", filename=os.environ["EVENTS"] + ".db", **LAST_ERROR)


@huey.task(retries=2)
def count(item: str, how: str) -> str:
    return queue_work.count(item, how)


@huey.task(retries=2)
def stale() -> None:
    queue_work.become_stale()


@huey.task()
def identities() -> str:
    queue_work.tell_identities()
    return "told"


@huey.task()
def bystander() -> str:
    queue_work.bystander()
    return "told"


def wait_for(event: str) -> None:
    while event not in Path(os.environ["EVENTS"]).read_text():
        time.sleep(0.05)
