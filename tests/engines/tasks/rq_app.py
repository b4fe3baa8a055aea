"""What enqueues jobs of RQ; the functions are those of queue_work."""

from __future__ import annotations

import os
import time
from typing import Any

from redis import Redis
from rq import Queue, Repeat, Retry

queue = Queue(connection=Redis.from_url(os.environ["REDIS"]))


def send(function: str, *arguments: str, **options: Any) -> Any:
    return queue.enqueue(f"queue_work.{function}", *arguments, **{"retry": Retry(max=3), **options})


def send_repeated(item: str) -> None:
    send("count", item, repeat=Repeat(times=1, interval=0))


def find_abandoned() -> None:
    """What a worker does every ten minutes, as it would be in some time."""
    queue.started_job_registry.cleanup(timestamp=time.time() + 10_000)
