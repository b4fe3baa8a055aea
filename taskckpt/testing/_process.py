"""Servers as processes: on free ports, with data of their own, gone when their owner is, however it went."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from taskckpt.errors import UnavailableError

_STARTS = 3


class Server(Protocol):
    """What is asked of a server: its name, where it is, and whether it works already."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def endpoint_url(self) -> str:
        """``http://127.0.0.1:<port>``."""
        ...

    def try_it(self) -> None:
        """Store an object. Raises OSError, HTTPException or UnavailableError while the server is not ready."""
        ...


S = TypeVar("S", bound=Server)


@dataclass(frozen=True, slots=True)
class Plan(Generic[S]):
    """How to start a server, and what it will be once it answers."""

    command: list[str]
    server: S
    environment: dict[str, str] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serve(make_plan: Callable[[Path], Plan[S]], start_timeout_s: float) -> Generator[S]:
    """Run a server, in a temporary folder, until the block ends."""
    server, guard = start(make_plan, start_timeout_s)
    try:
        yield server
    finally:
        _stop(guard)


def start(make_plan: Callable[[Path], Plan[S]], start_timeout_s: float) -> tuple[S, subprocess.Popen[str]]:
    """Start a server and wait until it works. UnavailableError with its log if it never does."""
    tries_left = _STARTS
    while True:
        tries_left -= 1
        folder = Path(tempfile.mkdtemp(prefix="taskckpt-server-"))
        plan = make_plan(folder)
        guard = _launch(plan, folder)
        with contextlib.ExitStack() as stack:
            stack.callback(_stop, guard)
            assert guard.stdout is not None
            made: Any = plan.server  # each is a dataclass with a pid
            server: S = replace(made, pid=int(guard.stdout.readline()))
            problem = _wait_until_ready(server, guard, start_timeout_s)
            stack.pop_all()
        if problem is None:
            return server, guard
        log = _stop(guard)
        # Between our look for free ports and the server's bind, somebody else may take one.
        if not (tries_left and ("address already in use" in log.lower() or "EADDRINUSE" in log)):
            message = f"{server.name} does not start: {problem}. Its log ends:\n{log}"
            raise UnavailableError(message, uri=server.endpoint_url)


def _launch(plan: Plan[Any], folder: Path) -> subprocess.Popen[str]:
    guard = str(Path(__file__).with_name("_guard.py"))
    leftovers = "\n".join([str(folder), *plan.leftovers])
    return subprocess.Popen(
        [sys.executable, "-I", guard, str(folder / "server.log"), leftovers, *plan.command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=folder,  # servers look for their configuration in the current folder
        env={**os.environ, **plan.environment},
        start_new_session=True,  # a Ctrl-C is ours to handle
    )


def _wait_until_ready(server: Server, guard: subprocess.Popen[str], timeout_s: float) -> str | None:
    """Wait until the server stores an object; give what is wrong if it does not come to that."""
    deadline = time.monotonic() + timeout_s
    while guard.poll() is None:
        try:
            server.try_it()
        except (OSError, http.client.HTTPException, UnavailableError) as error:
            problem = str(error)
        else:
            return None
        if time.monotonic() > deadline:
            return f"it is not ready after {timeout_s} s: {problem}"
        time.sleep(0.05)
    return f"it ended with exit status {guard.returncode}"


def _stop(guard: subprocess.Popen[str]) -> str:
    """Stop the server, remove its data, and give the end of its log."""
    # Both a signal and the end of the pipe: a forked child of ours may hold the latter open.
    guard.terminate()
    log, _ = guard.communicate()
    return log


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on, below the range from which systems take outgoing ones."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = random.randrange(20_000, 32_000)  # noqa: S311 - no secret
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                ports.append(port)
        return ports
