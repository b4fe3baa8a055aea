"""A task of Metaflow that dies, is retried by Metaflow and goes on.

``python examples/engines/with_metaflow.py run`` (pip install metaflow).
"""

from metaflow import FlowSpec, retry, step

import taskckpt


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


class CountingFlow(FlowSpec):
    """One step does the work."""

    @retry(times=3, minutes_between_retries=0)
    @step
    def start(self) -> None:
        """Each attempt is a process of its own."""
        self.done = count(10)
        self.next(self.end)

    @step
    def end(self) -> None:
        """Metaflow keeps what start found."""
        print("counted to", self.done)


if __name__ == "__main__":
    CountingFlow()
