"""A Ray task whose worker is killed: Ray runs it again, and it goes on from its last save.

pip install taskckpt ray
python examples/engines/with_ray.py
"""

import os
import signal

import ray

import taskckpt


@ray.remote(max_retries=3)  # for a lost worker; for exceptions, too: retry_exceptions=[ConnectionError]
def count_to(target: int) -> int:
    """Counts, saves each number, and dies at 2 the first time."""
    cp = taskckpt.checkpoint()
    count = began = int(cp.load_bytes_sync() or 0)
    print("resumes from", count, flush=True)
    while count < target:
        count += 1  # the work
        cp.save_sync(str(count).encode())
        if count == 2 and began == 0:
            os.kill(os.getpid(), signal.SIGKILL)  # once, as a machine may end
    return count


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False)
    print("counted to", ray.get(count_to.remote(5)))
