"""One process of a task that many claim at once: loads, then saves until it is outdone, killed or told to stop.

What happens, and when, goes line by line into a file that all of them share; a kill cuts no line.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time

from taskckpt import Checkpoint
from taskckpt.errors import CommitUnknownError, StaleAttemptError, UnavailableError

STALE = 3
NEVER_BEGAN = 4


def main(dest: str, options: str, notes: str, stop_file: str, seed: str) -> int:
    choose = random.Random(seed)
    output = os.open(notes, os.O_WRONLY | os.O_APPEND)

    def note(**what: object) -> None:
        os.write(output, (json.dumps({"pid": os.getpid(), "at": time.monotonic_ns(), **what}) + "\n").encode())

    if os.path.exists(stop_file):
        return NEVER_BEGAN
    checkpoint = Checkpoint(dest, keep=2, storage_options=json.loads(options))
    note(what="loading")
    try:
        found = checkpoint.load_bytes_sync()
        note(what="loaded", label=None if found is None else found.decode().strip())
        for number in range(100_000):
            last = os.path.exists(stop_file)
            label = f"{os.getpid()}-{number}"
            note(what="saving", label=label)
            with contextlib.suppress(CommitUnknownError, UnavailableError):
                checkpoint.save_sync(label.encode().ljust(choose.choice((50, 70_000))))
                note(what="saved", label=label)
                if last:
                    return 0
            time.sleep(choose.uniform(0, 0.01))
    except StaleAttemptError:
        note(what="stale")
        return STALE
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
