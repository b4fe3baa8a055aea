"""A script that runs a server and stops it when its owner is gone, however the owner went.

Arguments: the log file, the paths to remove afterwards (one argument, separated by newlines), the command.
Standard input is a pipe that the owner holds: when it closes (the owner closed it, crashed or was killed),
the server is killed and the paths are removed. Prints the server's pid first, and the end of its log at last.
Imports nothing of taskckpt.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


def main(log: str, leftovers: str, *command: str) -> int:
    """Run the command until it ends or the owner is gone; give its exit status."""
    # Ctrl-C is for the owner to decide about, and the kill below must come before our own end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Path(log).open("wb") as output:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)

    def kill(_signal: int, _frame: FrameType | None) -> None:
        server.kill()

    signal.signal(signal.SIGTERM, kill)
    sys.stdout.write(f"{server.pid}\n")
    sys.stdout.flush()
    threading.Thread(target=_kill_at_end_of_input, args=(server,), daemon=True).start()
    status = server.wait()
    end = Path(log).read_bytes()[-2000:]
    for path in leftovers.splitlines():
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
    # Last: if the owner is gone, nobody reads this, and the pipe is broken.
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), end)
    return status


def _kill_at_end_of_input(server: subprocess.Popen[bytes]) -> None:
    sys.stdin.read()
    # Not SIGTERM: SeaweedFS takes 15 s to shut down, for data that is thrown away here.
    server.kill()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
