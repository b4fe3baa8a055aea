"""An S3 server seen through Google Cloud Storage's XML interface, which no emulator speaks and obstore needs.

The two interfaces are one but for signatures and for the header that says "only if absent"
(https://cloud.google.com/storage/docs/xml-api/overview), so requests are signed anew and passed on: conditions,
uploads in parts and listings are those of a real server. Who asks, nobody checks.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from taskckpt.testing.servers import S3Server

_PASSED_ON = ("Content-Type", "Range")
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "date", "server"}


@dataclass(frozen=True)
class GoogleXml:
    """Where it is; buckets are made and emptied behind it."""

    name: str
    endpoint_url: str
    behind: S3Server

    @property
    def storage_options(self) -> dict[str, object]:
        return {"token": "not looked at", "endpoint_url": self.endpoint_url}

    def create_bucket(self, bucket: str) -> None:
        self.behind.create_bucket(bucket)

    def delete_bucket(self, bucket: str) -> None:
        self.behind.delete_bucket(bucket)

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.behind.put(bucket, key, data)


@contextlib.contextmanager
def google_xml(behind: S3Server) -> Iterator[GoogleXml]:
    """Runs it in a thread of this process."""

    class Handler(_Handler):
        s3 = behind

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield GoogleXml("google_xml", f"http://127.0.0.1:{server.server_port}", behind)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100  # with 5, one of eight that come at once waits for a second


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    s3: S3Server

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name: self.headers[name] for name in _PASSED_ON if name in self.headers}
        if self.headers.get("x-goog-if-generation-match") == "0":
            headers["If-None-Match"] = "*"
        path, mark, query = self.path.partition("?")
        # Google takes %2F for a slash, and a slash for %2F; S3's signatures do not.
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
        query = urllib.parse.urlencode(pairs, quote_via=urllib.parse.quote, safe="")
        path = urllib.parse.quote(urllib.parse.unquote(path)) + mark + query
        signed = self.s3._sign(self.command, path, body, headers)
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.s3.endpoint_url).netloc, timeout=15)
        with contextlib.closing(connection):
            connection.request(self.command, path, body, signed)
            answer = connection.getresponse()
            self._answer(answer, answer.read())

    def _answer(self, answer: http.client.HTTPResponse, body: bytes) -> None:
        self.send_response_only(answer.status)
        kept = {name.lower(): value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
        if self.command != "HEAD" and answer.status != 204:
            kept["content-length"] = str(len(body))
        for name, value in {**kept, "x-goog-generation": "1"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815 - http.server's names

    def log_message(self, *_: Any) -> None:
        pass
