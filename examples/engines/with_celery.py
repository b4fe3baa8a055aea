"""A task of Celery that dies, is retried by Celery and goes on; and then its worker is killed.

    pip install celery
    python examples/engines/with_celery.py

The queue is a folder here, which needs no broker. With one nothing changes but its address.
"""

import os
import signal
import subprocess
import sys
import tempfile

from celery import Celery

from taskckpt.integrations.celery import CheckpointedTask

FOLDER = os.environ.setdefault("QUEUE", tempfile.mkdtemp())
QUEUE = {"data_folder_in": FOLDER, "data_folder_out": FOLDER, "control_folder": FOLDER}
app = Celery("with_celery", broker="filesystem://", backend=f"file://{FOLDER}")
app.conf.update(broker_transport_options=QUEUE, worker_lost_wait=1)


@app.task(base=CheckpointedTask, bind=True, autoretry_for=(RuntimeError,), default_retry_delay=1)
def count(self: CheckpointedTask, to: int) -> int:
    """Counts, and saves each number."""
    cp = self.checkpoint  # taskckpt.checkpoint() is the same, and all that a task with another base needs
    saved = cp.load_sync()
    start = int(saved.read_text()) if saved else 0
    print(f"resumes from {start}", flush=True)
    for done in range(start, to):
        if done == 3 and done != start:
            raise RuntimeError(f"dies at {done}")
        if done == 7 and done != start:
            os.kill(os.getpid(), signal.SIGKILL)
        cp.save_sync(str(done + 1).encode())
    return to


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    worker = subprocess.Popen([sys.executable, "-m", "celery", "-A", "with_celery", "worker", "-c", "1"], cwd=here)
    print("counted to", count.delay(to=10).get(timeout=60))
    worker.terminate()
    worker.wait()
