"""A proxy in front of an S3 server that knows the requests, counts them, and breaks those that it is told to."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from taskckpt.testing.servers import S3Server

HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Request:
    """One request, named after what it does in S3: LIST, GET, HEAD, CREATE, PUT, PART, DELETE, ..."""

    verb: str
    key: str
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def about(self) -> str:
        """The verb with the part of a task that it concerns: ``CREATE log``."""
        part = next((part for part in ("log", "data") if f"/{part}/" in f"/{self.key}"), "")
        return f"{self.verb} {part}".strip()


def verb_of(method: str, target: str, headers: list[tuple[str, str]]) -> tuple[str, str]:
    split = urlsplit(target)
    _, _, key = unquote(split.path).lstrip("/").partition("/")
    query = parse_qs(split.query, keep_blank_values=True)
    exclusive = any(name.lower() == "if-none-match" for name, _ in headers)
    verb = {
        "GET": "UPLOADS" if "uploads" in query else "GET" if key else "LIST",
        "HEAD": "HEAD" if key else "HEAD-BUCKET",
        "PUT": "PART" if "partNumber" in query else "CREATE" if exclusive else "PUT",
        "POST": "BEGIN" if "uploads" in query else "COMPLETE" if "uploadId" in query else "DELETE",
        "DELETE": "ABORT" if "uploadId" in query else "DELETE",
    }.get(method, method)
    if not key:
        # Of a bulk delete, the keys are in the body: payloads, as a rule.
        key = "data/" if "delete" in query else query.get("prefix", [""])[0]
    return verb, key


@dataclass(frozen=True)
class Reply:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes

    def head(self, method: str) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {self.reason}"]
        lines += [f"{name}: {value}" for name, value in self.headers if name.lower() not in HOP_HEADERS]
        length = next((value for name, value in self.headers if name.lower() == "content-length"), None)
        length = length if method == "HEAD" and length is not None else str(len(self.body))
        if self.status not in (204, 304):
            lines.append(f"Content-Length: {length}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _HungUpError(Exception):
    """The connection ends here, without a word or in the middle of one."""


@dataclass
class Fault:
    """What happens to requests of some verbs: ``times`` of them (None: all), after ``skip`` that pass.

    ``on`` is a regular expression for ``Request.about``: ``"CREATE log"``, ``"GET .*"``.
    """

    action: Callable[[Proxy, Request, socket.socket], Reply]
    on: str
    times: int | None = None
    skip: int = 0
    seen: int = 0

    def takes(self, request: Request) -> bool:
        if not re.fullmatch(self.on, request.about):
            return False
        self.seen += 1
        return self.seen > self.skip and (self.times is None or self.seen <= self.skip + self.times)

    @property
    def hit(self) -> bool:
        return self.seen > self.skip


# --- what can go wrong -------------------------------------------------------------------------


def answer(status: int, code: str) -> Callable[..., Reply]:
    """The server refuses, and nothing happened."""

    def act(proxy: Proxy, request: Request, connection: socket.socket) -> Reply:
        body = f"<Error><Code>{code}</Code><Message>{code}, says the proxy</Message></Error>".encode()
        body = b"" if request.method == "HEAD" else body
        return Reply(status, code, [("Content-Type", "application/xml")], body)

    return act


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def drop(proxy: Proxy, request: Request, connection: socket.socket) -> Reply:
    """The connection is reset before the request had any effect."""
    reset(connection)
    raise _HungUpError


def lose_reply(proxy: Proxy, request: Request, connection: socket.socket) -> Reply:
    """The request takes effect, and the connection is reset before the reply."""
    proxy.forward(request)
    reset(connection)
    raise _HungUpError


def error_after_effect(proxy: Proxy, request: Request, connection: socket.socket) -> Reply:
    """The request takes effect, and the reply says that it failed."""
    proxy.forward(request)
    return answer(500, "InternalError")(proxy, request, connection)


def hang(proxy: Proxy, request: Request, connection: socket.socket) -> Reply:
    """No answer ever comes."""
    proxy.closed.wait(60)
    raise _HungUpError


def cut(share: float) -> Callable[..., Reply]:
    """The reply ends early: after the headers and a share of the body."""

    def act(proxy: Proxy, request: Request, connection: socket.socket) -> Reply:
        reply = proxy.forward(request)
        connection.sendall(reply.head(request.method) + reply.body[: int(len(reply.body) * share)])
        connection.shutdown(socket.SHUT_WR)
        raise _HungUpError

    return act


def cut_headers(proxy: Proxy, request: Request, connection: socket.socket) -> Reply:
    """The reply ends in the middle of its headers."""
    connection.sendall(proxy.forward(request).head(request.method)[:20])
    reset(connection)
    raise _HungUpError


def flip(proxy: Proxy, request: Request, connection: socket.socket) -> Reply:
    """One bit of the reply's body is wrong."""
    reply = proxy.forward(request)
    body = bytearray(reply.body)
    if body:
        body[len(body) // 2] ^= 4
    return Reply(reply.status, reply.reason, reply.headers, bytes(body))


def flip_unseen(proxy: Proxy, request: Request, connection: socket.socket) -> Reply:
    """The same, and no checksum of the transport notices: the object at rest is damaged."""
    reply = flip(proxy, request, connection)
    headers = [(n, v) for n, v in reply.headers if "checksum" not in n.lower() and n.lower() != "etag"]
    return Reply(reply.status, reply.reason, headers, reply.body)


def without_condition(proxy: Proxy, request: Request, connection: socket.socket) -> Reply:
    """The store does not know If-None-Match, and overwrites."""
    return proxy.forward(request, without="if-none-match")


# --- the proxy ---------------------------------------------------------------------------------


@dataclass
class Proxy:
    """Listens on a port of its own in front of ``server``."""

    server: S3Server
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)
    port: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def options(self) -> dict[str, object]:
        return {**self.server.storage_options, "endpoint_url": f"http://127.0.0.1:{self.port}"}

    def fault(self, action: Callable[..., Reply], on: str, *, times: int | None = None, skip: int = 0) -> Fault:
        """From now on, requests that ``on`` describes go wrong."""
        added = Fault(action, on, times, skip)
        self.faults.append(added)
        return added

    def heal(self) -> None:
        """Nothing goes wrong any more, and counting begins anew."""
        self.faults.clear()
        self.requests.clear()

    def count(self) -> Counter[str]:
        return Counter(request.about for request in self.requests)

    def forward(self, request: Request, *, without: str = "") -> Reply:
        upstream = http.client.HTTPConnection(urlsplit(self.server.endpoint_url).netloc, timeout=30)
        with contextlib.closing(upstream):
            upstream.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers:
                if name.lower() not in ("expect", "connection", "transfer-encoding", without):
                    upstream.putheader(name, value)
            upstream.endheaders(request.body)
            came = upstream.getresponse()
            return Reply(came.status, came.reason, came.getheaders(), came.read())

    def handle(self, request: Request, connection: socket.socket) -> Reply:
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault.takes(request)), None)
        return self.forward(request) if fault is None else fault.action(self, request, connection)


class _Handler(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self) -> None:
        proxy: Proxy = self.server.proxy  # type: ignore[attr-defined]
        with contextlib.suppress(_HungUpError, OSError, http.client.HTTPException):
            while (request := self._next()) is not None:
                reply = proxy.handle(request, self.connection)
                body = b"" if request.method == "HEAD" else reply.body
                self.wfile.write(reply.head(request.method) + body)

    def _next(self) -> Request | None:
        line = self.rfile.readline()
        if not line.strip():
            return None
        method, target, _ = line.decode("latin-1").split(" ", 2)
        headers = []
        while (header := self.rfile.readline().decode("latin-1").strip()) != "":
            name, _, value = header.partition(":")
            headers.append((name, value.strip()))
        known = {name.lower(): value for name, value in headers}
        assert "transfer-encoding" not in known, "chunked requests are not understood here"
        if known.get("expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.rfile.read(int(known.get("content-length", 0)))
        verb, key = verb_of(method, target, headers)
        return Request(verb, key, method, target, headers, body)


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A broken connection is what this is all about."""


@contextlib.contextmanager
def proxy_of(server: S3Server) -> Iterator[Proxy]:
    proxy = Proxy(server)
    with _Listener(("127.0.0.1", 0), _Handler) as listener:
        listener.proxy = proxy  # type: ignore[attr-defined]
        proxy.port = listener.server_address[1]
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.closed.set()
            listener.shutdown()
            thread.join()


def closed_port() -> int:
    """A port that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says anything."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield listening.getsockname()[1]


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._began
