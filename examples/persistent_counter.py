"""A counter that fails on the way, is retried, and goes on where it stopped.

    python persistent_counter.py

The checkpoints go to ./.taskckpt, or to TASKCKPT_BASE if that is set (s3://bucket/folder, for instance).
"""

from __future__ import annotations

import taskckpt

TARGET = 10
# What goes wrong at which count. Each happens once, as failures of a network do.
FAILURES: dict[int, Exception] = {
    4: ConnectionResetError("the server hung up"),
    5: TimeoutError("no answer for 30 seconds"),
    8: MemoryError("out of memory"),
}


def work(count: int) -> None:
    """Stand in for work that may fail."""
    if count in FAILURES:
        raise FAILURES.pop(count)


@taskckpt.task(retries=5, wait_initial_s=0.1)
def persistent_counter(target: int) -> int:
    """Count to ``target``, saving each count."""
    context = taskckpt.ctx()
    assert context is not None  # inside a task there always is one
    checkpoint = context.checkpoint

    # 1. Restore
    saved = checkpoint.load_sync()
    count = int(saved.read_text()) if saved else 0
    print(f"attempt {context.attempt} resumes from {count}")

    # 2. Execute and persist
    while count < target:
        try:
            work(count + 1)
        except Exception as error:
            print(f"attempt {context.attempt} fails at {count + 1}: {type(error).__name__}: {error}")
            raise
        count += 1
        checkpoint.save_sync(str(count).encode())
        print(f"attempt {context.attempt} saved {count}")
    return count


if __name__ == "__main__":
    print("result:", persistent_counter(TARGET))
