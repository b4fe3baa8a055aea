"""An activity of Temporal that dies, is retried and goes on.

    pip install temporalio
    python examples/engines/with_temporal.py

Temporal's environment for tests stands in for a server and its worker. With these, the workflow says
``workflow.execute_activity(count, 10, start_to_close_timeout=..., retry_policy=RetryPolicy(maximum_attempts=4))``.
"""

import dataclasses

from temporalio import activity
from temporalio.testing import ActivityEnvironment

import taskckpt


@activity.defn
def count(to: int) -> int:
    cp = taskckpt.checkpoint()
    saved = cp.load_sync()
    start = int(saved.read_text()) if saved else 0
    print("resumes from", start, flush=True)
    for done in range(start, to):
        if done in (3, 7) and done != start:
            raise RuntimeError(f"dies at {done}")
        cp.save_sync(str(done + 1).encode())
    return to


def executed(to: int, *, attempts: int) -> int:
    for attempt in range(1, attempts + 1):
        worker = ActivityEnvironment()
        worker.info = dataclasses.replace(worker.info, activity_type="count", attempt=attempt)
        try:
            return worker.run(count, to)
        except RuntimeError as error:
            print(error)
    raise RuntimeError(f"{attempts} attempts failed")


if __name__ == "__main__":
    print("counted to", executed(10, attempts=4))
