"""Three counters at once on one event loop, each with its own state; each fails once and is retried.

    python async_counter.py

``await checkpoint.load()`` and ``await checkpoint.save()`` never block the loop. Calls of a task with
different arguments are different tasks, so the counters do not see each other's state.
"""

from __future__ import annotations

import asyncio

import taskckpt

fails_at = {"a": 2, "b": 3, "c": 4}


@taskckpt.task(retries=2, wait_initial_s=0.1)
async def count_to(target: int, name: str) -> int:
    """Count to ``target``, saving each count."""
    context = taskckpt.ctx()
    assert context is not None  # inside a task there always is one
    saved = await context.checkpoint.load_bytes()
    count = 0 if saved is None else int(saved)
    print(f"{name}: attempt {context.attempt} resumes from {count}")
    while count < target:
        await asyncio.sleep(0.01)  # the work
        count += 1
        await context.checkpoint.save(str(count).encode())
        if fails_at.get(name) == count:
            del fails_at[name]
            raise ConnectionResetError(f"{name} lost its connection after {count}")
    return count


async def main() -> None:
    """Run them side by side."""
    results = await asyncio.gather(*(count_to(5, name) for name in ("a", "b", "c")))
    print("results:", results)


if __name__ == "__main__":
    asyncio.run(main())
