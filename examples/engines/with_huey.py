"""A task of Huey that dies, is retried by Huey and goes on.

    pip install huey
    python examples/engines/with_huey.py

The queue is a file, and its worker lives in this process here; with Redis nothing else changes.
"""

import os
import tempfile

from huey import SqliteHuey

import taskckpt

QUEUE = os.path.join(tempfile.mkdtemp(), "queue.db")
huey = SqliteHuey(filename=QUEUE, store_intermediate_errors=False)  # the result is what the last attempt gave


@huey.task(retries=3)
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
    consumer = huey.create_consumer()
    consumer.start()
    print("counted to", count(to=10).get(blocking=True, timeout=60))
    consumer.stop()
