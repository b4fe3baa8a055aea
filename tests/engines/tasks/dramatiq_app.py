"""Actors of Dramatiq on Redis. CURRENT=yes adds the middleware that tells the current message."""

from __future__ import annotations

import os

import dramatiq
import queue_work
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AsyncIO, CurrentMessage

# Whoever is silent for a second is gone, and others look for that all the time.
broker = RedisBroker(url=os.environ["REDIS"], heartbeat_timeout=1000, maintenance_chance=1_000_000)
broker.add_middleware(AsyncIO())
if os.environ.get("CURRENT"):
    broker.add_middleware(CurrentMessage())
dramatiq.set_broker(broker)

QUICK = {"max_retries": 3, "min_backoff": 10, "max_backoff": 20}


@dramatiq.actor(**QUICK)
def count(item: str, how: str) -> None:
    queue_work.count(item, how)


@dramatiq.actor(**QUICK)
async def count_async(item: str, how: str) -> None:
    queue_work.count(item, how)


@dramatiq.actor(**QUICK)
def stale() -> None:
    queue_work.become_stale()


@dramatiq.actor
def identities() -> None:
    queue_work.tell_identities()


@dramatiq.actor
def bystander() -> None:
    queue_work.bystander()
