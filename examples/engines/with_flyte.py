"""A task of Flyte that dies, is retried by Flyte and goes on.

    pip install flyte
    python examples/engines/with_flyte.py

Coming from Flyte's own helper, change one line: ``cp`` was ``flyte.ctx().checkpoint``.
"""

import flyte

import taskckpt

env = flyte.TaskEnvironment("counting")


@env.task(retries=3)
def count(to: int) -> int:
    """Counts, and dies on the way."""
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
    flyte.init()
    print("counted to", flyte.with_runcontext(mode="local").run(count, to=10).outputs()[0])
