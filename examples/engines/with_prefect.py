"""A task of Prefect that dies, is retried by Prefect and goes on.

``python examples/engines/with_prefect.py`` (pip install prefect).
"""

from prefect import flow, task

import taskckpt


@task(retries=3)
def count(to: int) -> int:
    """Counts, and dies after 3 and after 7."""
    cp = taskckpt.checkpoint()
    saved = int(cp.load_bytes_sync() or 0)
    done = saved
    print("resumes from", done, flush=True)
    while done < to:
        if done in (3, 7) and done > saved:
            raise RuntimeError(f"dies at {done}")
        done += 1
        cp.save_sync(str(done).encode())
    return done


@flow
def counting() -> int:
    """The flow around it."""
    return count(10)


if __name__ == "__main__":
    print("counted to", counting())
