"""One server of each kind for a whole run of pytest, however many workers of xdist ask for it."""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, NamedTuple, Protocol

from taskckpt.testing import servers

S3 = ("moto", "seaweedfs")
START: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "moto": servers.moto,
    "seaweedfs": servers.seaweedfs,
    "fake_gcs": servers.fake_gcs,
    "azurite": servers.azurite,
}


class Servers(Protocol):
    def get(self, name: str) -> Any: ...


class OwnServers:
    """The servers, started when first asked for, in the process that lives longest; closed at its end."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._started: dict[str, Any] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Any:
        with self._lock:
            if name not in self._started:
                try:
                    self._started[name] = self._stack.enter_context(START[name]())
                except Exception as error:
                    self._started[name] = error  # every test that asks gets the same answer at once
        found = self._started[name]
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        with self._lock:
            self._stack.close()

    @functools.cached_property
    def address(self) -> Address:
        """Where workers ask for a server, from the first look at this on."""
        password = secrets.token_hex(16)
        listener = Listener(("127.0.0.1", 0), authkey=bytes.fromhex(password))
        self._stack.callback(listener.close)
        threading.Thread(target=_accept, args=(listener, self), daemon=True).start()
        return Address(listener.address[1], password)


class Address(NamedTuple):
    port: int
    password: str  # hexadecimal, as execnet takes plain values only


def _accept(listener: Listener, own: OwnServers) -> None:
    while True:
        try:
            connection = listener.accept()
        except OSError:
            return  # closed: the run is over
        threading.Thread(target=_answer, args=(connection, own), daemon=True).start()


def _answer(connection: Connection, own: OwnServers) -> None:
    with connection:
        try:
            connection.send(own.get(connection.recv()))
        except Exception as error:  # handed on: the worker raises it
            connection.send(error)


class SharedServers(NamedTuple):
    """The same servers, seen from a worker."""

    address: Address

    def get(self, name: str) -> Any:
        place = ("127.0.0.1", self.address.port)
        with Client(place, authkey=bytes.fromhex(self.address.password)) as connection:
            connection.send(name)
            answer = connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer
