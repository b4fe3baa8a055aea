"""A Dask task whose worker is killed: Dask runs it again on another worker, and it goes on from its last save.

pip install taskckpt distributed
python examples/engines/with_dask.py
"""

import os
import signal

from distributed import Client, LocalCluster

import taskckpt


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
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        # retries= is for exceptions; a lost worker is none.
        print("counted to", client.submit(count_to, 5, retries=3).result())
