"""Show a task that fails, is retried and goes on where it stopped: in a local folder, then on an S3 server.

Run by ``make demo``. The S3 server is SeaweedFS, started here on 127.0.0.1 and stopped in the end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from taskckpt.testing.servers import seaweedfs

if TYPE_CHECKING:
    from collections.abc import Mapping

SCRIPT = Path(__file__).with_name("persistent_counter.py")


def main() -> None:
    """Run the script twice; end with its status if it fails."""
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="taskckpt-demo-") as folder:
        say(f"1 of 2: {SCRIPT.name} with its checkpoints in a local folder, {folder}/.taskckpt")
        run(folder, {})
    say("2 of 2: the same on S3; starting a SeaweedFS server ...")
    with seaweedfs() as server, tempfile.TemporaryDirectory(prefix="taskckpt-demo-") as folder:
        server.create_bucket("demo")
        say(f"SeaweedFS answers at {server.endpoint_url}; the checkpoints go to s3://demo/checkpoints")
        run(folder, {**server.environment, "TASKCKPT_BASE": "s3://demo/checkpoints"})
    say("Both runs came to their end, and the server is stopped.")


def run(folder: str, environment: Mapping[str, str]) -> None:
    """Run the script in a folder of its own, as if nobody had told taskckpt anything else."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TASKCKPT_"))}
    command = [sys.executable, "-u", str(SCRIPT)]
    status = subprocess.run(command, cwd=folder, env={**own, **environment}, check=False).returncode
    if status:
        sys.exit(f"{SCRIPT.name} ended with status {status}")


def say(text: str) -> None:
    """Print a line that stands out from what the script prints."""
    print(f"\n=== {text}", flush=True)


def stop(number: int, _frame: object) -> NoReturn:
    """End by an exception, so that the server is stopped."""
    sys.exit(128 + number)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped, and the server with it")
