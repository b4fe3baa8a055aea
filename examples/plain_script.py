"""A script without any engine or decorator: it may be killed at any moment, and started again goes on.

Let a shell start it until it ends well:

    until python plain_script.py; do echo "it died, starting it again"; sleep 1; done

While it runs, kill it from another terminal as often as you like, as hard as you like:

    pkill -9 -f plain_script.py

It adds up the squares of 1 to 400. Whatever happened on the way, the result is 21413400.
"""

from __future__ import annotations

import json
import time

import taskckpt

LAST = 400


def main() -> None:
    """Add up, saving after each number."""
    checkpoint = taskckpt.checkpoint("sum-of-squares")  # the key names the task: the same on every start
    saved = checkpoint.load_bytes_sync()
    done, total = (0, 0) if saved is None else json.loads(saved)
    print(f"starting after {done}", flush=True)
    for number in range(done + 1, LAST + 1):
        time.sleep(0.005)  # the work
        total += number * number
        checkpoint.save_sync(json.dumps([number, total]).encode())
        print(f"saved {number}", flush=True)
    print(f"result: {total}")
    checkpoint.clear_sync()  # done: the next start begins anew


if __name__ == "__main__":
    main()
