"""For the tests of queues: what their workers tell, and a Redis."""

from __future__ import annotations

import atexit
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.engines.conftest import Engine, numbers


class Work:
    """An application in an environment, its workers, and the lines that its tasks wrote."""

    def __init__(self, engine: Engine, **environ: str) -> None:
        self.engine = engine
        self.path = engine.folder / "events.txt"
        self.environ = {"EVENTS": str(self.path), **environ}
        (engine.folder / "queue").mkdir()

    def start(self, *command: str, log: str = "worker") -> subprocess.Popen[str]:
        """A worker, and a group for its processes."""
        return self.engine.start(*command, env=self.environ, log=self.engine.folder / f"{log}.txt")

    def run(self, code: str, **environ: str) -> str:
        """Code in a process of its own."""
        return self.engine.run("python", "-c", code, env={**self.environ, **environ})

    @property
    def events(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def resumed(self, item: str) -> list[int]:
        return numbers("\n".join(self.events), f"{item} resumes from")

    def attempts(self, item: str) -> list[int]:
        return numbers("\n".join(self.events), f"{item} attempt")

    def wait_for(self, *lines: str, times: int = 1, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while any(self.events.count(line) < times for line in lines):
            if time.monotonic() > deadline:
                outputs = [f"{one}:\n{one.read_text()[-4000:]}" for one in sorted(self.engine.folder.glob("*.txt"))]
                pytest.fail(f"{lines} did not come.\n" + "\n".join(outputs))
            time.sleep(0.05)

    def log(self, name: str = "worker") -> str:
        return (self.engine.folder / f"{name}.txt").read_text()

    def wait_for_log(self, what: str, name: str = "worker", timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while what not in self.log(name):
            assert time.monotonic() < deadline, self.log(name)[-4000:]
            time.sleep(0.05)

    def let_go(self, item: str) -> None:
        """Ends the wait of a task that hangs."""
        Path(f"{self.path}.go-{item}").touch()


def redis_socket(engine: Engine) -> str:
    """The path of the socket of a Redis that ends with the test, and keeps nothing."""
    if shutil.which("redis-server") is None:
        pytest.skip("NOT TESTED: Redis is not there: apt install redis-server")
    folder = tempfile.mkdtemp(prefix="taskckpt-redis-")  # names of sockets must be short
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "socket"
    log = engine.folder / "redis.log"
    engine.start("redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--dir", folder, log=log)
    for _ in range(200):
        time.sleep(0.05)
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
                client.sendall(b"PING\r\n")
                if client.recv(100).startswith(b"+PONG"):
                    return str(path)
            except OSError:
                continue
    pytest.fail("Redis does not answer.")
