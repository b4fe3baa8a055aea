"""An actor of Dramatiq that dies, is retried by Dramatiq and goes on.

    pip install dramatiq
    python examples/engines/with_dramatiq.py

The broker and its worker live in this process here; with Redis or RabbitMQ nothing else changes.
"""

import dramatiq
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import CurrentMessage

import taskckpt

broker = StubBroker()
broker.add_middleware(CurrentMessage())  # tells which message it is; async actors need it
dramatiq.set_broker(broker)


@dramatiq.actor(max_retries=3, min_backoff=100)
def count(to: int) -> None:
    """Counts, and saves each number."""
    cp = taskckpt.checkpoint()
    saved = cp.load_sync()
    start = int(saved.read_text()) if saved else 0
    print("resumes from", start, flush=True)
    for done in range(start, to):
        if done in (3, 7) and done != start:
            raise RuntimeError(f"dies at {done}")
        cp.save_sync(str(done + 1).encode())
    print("counted to", to)


if __name__ == "__main__":
    worker = dramatiq.Worker(broker)
    worker.start()
    count.send(to=10)
    broker.join(count.queue_name)
    worker.join()
    worker.stop()
