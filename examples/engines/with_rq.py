"""A job of RQ that dies, is retried by RQ and goes on.

pip install rq
REDIS=redis://localhost python examples/engines/with_rq.py
"""

import os

from redis import Redis
from rq import Queue, Retry, Worker

import taskckpt


def count(to: int) -> int:
    """Counts, and saves each number."""
    cp = taskckpt.checkpoint()
    saved = cp.load_sync()
    start = int(saved.read_text()) if saved else 0
    print("resumes from", start, flush=True)
    for done in range(start, to):
        if done in (3, 7) and done != start:
            raise RuntimeError(f"dies at {done}")
        cp.save_sync(str(done + 1).encode())
    return to


if __name__ == "__main__":
    queue = Queue("counting", connection=Redis.from_url(os.environ.get("REDIS", "redis://localhost")))
    job = queue.enqueue("with_rq.count", to=10, retry=Retry(max=3))
    Worker([queue], connection=queue.connection).work(burst=True)
    print("counted to", job.return_value())
