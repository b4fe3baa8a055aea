"""An S3 server in memory, fast enough not to be what is measured.

    with memory_s3() as server:
        server.create_bucket("mine")

SeaweedFS and Amazon's own limits hide how much work a client does. This one copies bytes between a socket and
memory that it never gives back, and nothing else: no digests, no signatures, no disk. It is a process of its
own, with a thread per connection; Python's lock is free while bytes move.

It knows what clients ask of it: PUT, GET (with ranges), HEAD, DELETE, deletion of many, listing (version 2),
multipart uploads, and ``If-None-Match: *``. ``GET /-/counters`` tells what went through;
``POST /-/empty?prefix=`` removes objects.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import email.utils
import itertools
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import weakref
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from xml.sax.saxutils import escape

from taskckpt.testing.servers import S3Server

KIB, MIB = 2**10, 2**20
EXTENT_BYTES = MIB
ARENA_BYTES = 64 * MIB
SMALL_BYTES = 64 * KIB
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


@contextlib.contextmanager
def memory_s3(*, reserve_mib: int = 0) -> Generator[S3Server]:
    """Run the server as a process of its own, which ends with the block or with this process.

    ``reserve_mib`` of memory are taken from the system at the start: the first upload does not wait for it.
    """
    command = [sys.executable, str(Path(__file__)), "--reserve-mib", str(reserve_mib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(process.stdout.readline())
        try:
            yield S3Server("memory", f"http://127.0.0.1:{port}", "any", "any-secret", pid=process.pid)
        finally:
            process.stdin.close()
            process.terminate()


# --- memory ------------------------------------------------------------------------------------


class Arena:
    """Memory in extents of 1 MiB, used again and again: a page that is new costs more than its copy."""

    def __init__(self, reserve_bytes: int) -> None:
        self._free: list[memoryview] = []
        self._lock = threading.Lock()
        while len(self._free) * EXTENT_BYTES < reserve_bytes:
            self._grow()

    def take(self) -> memoryview:
        with self._lock:
            if not self._free:
                self._grow()
            return self._free.pop()

    def give_back(self, extents: list[memoryview]) -> None:
        with self._lock:
            self._free.extend(extents)

    def _grow(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
        whole = memoryview(mmap.mmap(-1, ARENA_BYTES, flags=flags))
        self._free.extend(whole[start : start + EXTENT_BYTES] for start in range(0, ARENA_BYTES, EXTENT_BYTES))


class Body:
    """The bytes of an object or of a part; the arena has them back when the last reader is done."""

    def __init__(self, arena: Arena, source: Source, size_hint: int) -> None:
        self.pieces: list[memoryview] = []
        extents: list[memoryview] = []
        weakref.finalize(self, arena.give_back, extents)
        while True:
            if size_hint <= SMALL_BYTES:
                extent = memoryview(bytearray(size_hint + 1))
            else:
                extent = arena.take()
                extents.append(extent)
            filled = source.read_into(extent)
            self.pieces.append(extent[:filled])
            if filled < len(extent):
                break
        self.size = sum(map(len, self.pieces))


# --- what comes over the wire ------------------------------------------------------------------


class Source(Protocol):
    """Where bytes come from. ``read_into`` fills the whole of ``view``, less only at the end."""

    def read_into(self, view: memoryview) -> int: ...
    def read_line(self) -> bytes: ...


class Wire:
    """A connection, read with one system call for as much as is wanted."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._ahead = bytearray(SMALL_BYTES)
        self._start = self._end = 0

    def read_into(self, view: memoryview) -> int:
        done = min(len(view), self._end - self._start)
        view[:done] = memoryview(self._ahead)[self._start : self._start + done]
        self._start += done
        while done < len(view):
            count = self._connection.recv_into(view[done:], 0, socket.MSG_WAITALL)
            if not count:
                raise ConnectionError("the client hung up")
            done += count
        return done

    def read_line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            if self._start == self._end:
                self._start, self._end = 0, self._connection.recv_into(self._ahead)
                if not self._end:
                    raise ConnectionError("the client hung up")
            stop = self._ahead.find(b"\n", self._start, self._end) + 1 or self._end
            line += self._ahead[self._start : stop]
            self._start = stop
        return line.rstrip(b"\r\n")


class Sized:
    """The next ``size`` bytes of another source."""

    def __init__(self, source: Source, size: int) -> None:
        self._source = source
        self._left = size

    def read_into(self, view: memoryview) -> int:
        done = self._source.read_into(view[: self._left])
        self._left -= done
        return done

    def read_line(self) -> bytes:
        line = self._source.read_line()
        self._left -= len(line) + 2
        return line


class Chunked:
    """The content of HTTP's and of Amazon's chunks, which differ only in what follows a chunk's size."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = 0
        self._ended = False

    def read_into(self, view: memoryview) -> int:
        done = 0
        while done < len(view) and not self._ended:
            if not self._left:
                self._next_chunk()
            count = self._source.read_into(view[done : done + self._left])
            done += count
            self._left -= count
            if count and not self._left:
                self._source.read_line()
        return done

    def read_line(self) -> bytes:
        # Amazon's chunks may come within those of HTTP. The lines between them are short.
        line = bytearray()
        one = bytearray(1)
        while not line.endswith(b"\n") and self.read_into(memoryview(one)):
            line += one
        return bytes(line.rstrip(b"\r\n"))

    def _next_chunk(self) -> None:
        self._left = int(self._source.read_line().partition(b";")[0], 16)
        if not self._left:
            self._ended = True
            while self._source.read_line():
                pass  # trailers: checksums that nobody checks here
            if not isinstance(self._source, Wire):
                self._source.read_into(memoryview(bytearray(1)))  # to its own end, which comes now


@dataclass(slots=True)
class Request:
    """One request: its head is parsed, its body waits in the connection."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Source
    body_size: int
    """As announced; that of the content may be less."""

    @property
    def bucket(self) -> str:
        return self.path.partition("/")[0]

    @property
    def key(self) -> str:
        return self.path.partition("/")[2]

    def read_all(self) -> bytes:
        content = bytearray(self.body_size + 1)
        return bytes(content[: self.body.read_into(memoryview(content))])


def read_request(wire: Wire, connection: socket.socket) -> Request:
    method, target, _ = wire.read_line().decode().split(" ")
    headers: dict[str, str] = {}
    while line := wire.read_line():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    path, _, query = target.partition("?")
    size = int(headers.get("content-length", 0))
    body: Source = Sized(wire, size)
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = Chunked(wire)
    if "x-amz-decoded-content-length" in headers:
        body = Chunked(body)
        size = int(headers["x-amz-decoded-content-length"])
    fields = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    return Request(method, urllib.parse.unquote(path[1:]), fields, headers, body, size)


# --- what is kept ------------------------------------------------------------------------------


class Refused(Exception):  # noqa: N818 - an answer, not a failure
    """An answer other than success."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code


@dataclass(slots=True)
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[memoryview] = field(default_factory=list)
    size: int | None = None
    """What Content-Length says, if it is not the size of the pieces."""

    keeps: object = None
    """Kept alive until the answer is sent: memory of deleted objects is used again."""


@dataclass(frozen=True, slots=True)
class Object:
    bodies: tuple[Body, ...]
    etag: str
    modified: float
    content_type: str

    @property
    def size(self) -> int:
        return sum(body.size for body in self.bodies)

    def range(self, start: int, stop: int) -> Iterator[memoryview]:
        at = 0
        for piece in itertools.chain.from_iterable(body.pieces for body in self.bodies):
            if at < stop and at + len(piece) > start:
                yield piece[max(0, start - at) : stop - at]
            at += len(piece)


@dataclass(slots=True)
class Upload:
    key: str
    content_type: str
    parts: dict[int, tuple[str, Body]] = field(default_factory=dict)


@dataclass(slots=True)
class Bucket:
    objects: dict[str, Object] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    uploads: dict[str, Upload] = field(default_factory=dict)

    def put(self, key: str, made: Object, request: Request) -> None:
        if key not in self.objects:
            bisect.insort(self.keys, key)
        elif request.headers.get("if-none-match") == "*":
            raise Refused(412, "PreconditionFailed")
        self.objects[key] = made

    def remove(self, key: str) -> None:
        if self.objects.pop(key, None) is not None:
            del self.keys[bisect.bisect_left(self.keys, key)]


class Shelf:
    """All buckets, and what each kind of request does to them. One lock, held for no copy of bytes."""

    def __init__(self, reserve_bytes: int) -> None:
        self._arena = Arena(reserve_bytes)
        self._buckets: dict[str, Bucket] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()

    def answer(self, request: Request) -> Answer:
        # Before the lock: this is where the time goes.
        body = None
        if request.method == "PUT" and request.key:
            body = Body(self._arena, request.body, request.body_size)
        content = b"" if body else request.read_all()
        with self._lock:
            if request.bucket == "-":
                return self._about_the_server(request)
            answer = self._dispatch(request, body, content)
            self._counters["requests"] += 1
            self._counters[request.method] += 1
            self._counters["bytes_received"] += body.size if body else len(content)
            return answer

    def count_sent(self, size: int) -> None:
        with self._lock:
            self._counters["bytes_sent"] += size

    def _about_the_server(self, request: Request) -> Answer:
        if request.key == "empty":
            prefix = request.query.get("prefix", "")
            for bucket in self._buckets.values():
                for key in [key for key in bucket.keys if key.startswith(prefix)]:
                    bucket.remove(key)
        return _text(json.dumps(self._counters))

    def _dispatch(self, request: Request, body: Body | None, content: bytes) -> Answer:
        if request.method == "PUT" and not request.key:
            self._buckets.setdefault(request.bucket, Bucket())
            return Answer()
        if not request.bucket:
            return _xml("ListAllMyBucketsResult", f"<Buckets>{''.join(map(_bucket_entry, self._buckets))}</Buckets>")
        bucket = self._buckets.get(request.bucket)
        if bucket is None:
            raise Refused(404, "NoSuchBucket")
        if not request.key:
            return self._on_bucket(request, bucket, content)
        if request.method in ("GET", "HEAD"):
            return _list_parts(request, bucket) if "uploadId" in request.query else _get(request, bucket)
        if request.method == "PUT":
            assert body is not None
            put = self._put_part if "uploadId" in request.query else self._put
            return put(request, bucket, body)
        if request.method == "DELETE":
            if "uploadId" in request.query:
                _upload(request, bucket)
                del bucket.uploads[request.query["uploadId"]]
            else:
                bucket.remove(request.key)
            return Answer(204)
        return self._complete(request, bucket, content) if "uploadId" in request.query else self._begin(request, bucket)

    def _on_bucket(self, request: Request, bucket: Bucket, content: bytes) -> Answer:
        if request.method == "HEAD":
            return Answer()
        if request.method == "POST":  # ?delete
            keys = [entry.findtext("{*}Key", "") for entry in ET.fromstring(content).iterfind("{*}Object")]
            for key in keys:
                bucket.remove(key)
            # Whether it was asked for or not: obstore takes no answer without it.
            return _xml("DeleteResult", "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys))
        if request.method == "DELETE":
            if bucket.objects:
                raise Refused(409, "BucketNotEmpty")
            del self._buckets[request.bucket]
            return Answer(204)
        if "location" in request.query:
            return _xml("LocationConstraint", "")
        return _list_uploads(request, bucket) if "uploads" in request.query else _list(request, bucket)

    def _put(self, request: Request, bucket: Bucket, body: Body) -> Answer:
        made = Object((body,), self._etag(), time.time(), request.headers.get("content-type", "binary/octet-stream"))
        bucket.put(request.key, made, request)
        return Answer(headers={"ETag": made.etag})

    def _put_part(self, request: Request, bucket: Bucket, body: Body) -> Answer:
        etag = self._etag()
        _upload(request, bucket).parts[int(request.query["partNumber"])] = etag, body
        return Answer(headers={"ETag": etag})

    def _begin(self, request: Request, bucket: Bucket) -> Answer:
        number = f"upload-{next(self._numbers)}"
        bucket.uploads[number] = Upload(request.key, request.headers.get("content-type", "binary/octet-stream"))
        content = f"<Key>{escape(request.key)}</Key><UploadId>{number}</UploadId>"
        return _xml("InitiateMultipartUploadResult", f"<Bucket>{request.bucket}</Bucket>{content}")

    def _complete(self, request: Request, bucket: Bucket, content: bytes) -> Answer:
        upload = _upload(request, bucket)
        named = [int(entry.findtext("{*}PartNumber", "")) for entry in ET.fromstring(content).iterfind("{*}Part")]
        if not upload.parts.keys() >= set(named):
            raise Refused(400, "InvalidPart")
        bodies = tuple(upload.parts[number][1] for number in named)
        made = Object(bodies, self._etag(), time.time(), upload.content_type)
        bucket.put(request.key, made, request)
        del bucket.uploads[request.query["uploadId"]]
        key = f"<Key>{escape(request.key)}</Key><ETag>{escape(made.etag)}</ETag>"
        return _xml("CompleteMultipartUploadResult", f"<Bucket>{request.bucket}</Bucket>{key}")

    def _etag(self) -> str:
        return f'"{next(self._numbers):032x}"'


def _upload(request: Request, bucket: Bucket) -> Upload:
    upload = bucket.uploads.get(request.query["uploadId"])
    if upload is None or upload.key != request.key:
        raise Refused(404, "NoSuchUpload")
    return upload


def _get(request: Request, bucket: Bucket) -> Answer:
    found = bucket.objects.get(request.key)
    if found is None:
        raise Refused(404, "NoSuchKey")
    headers = {
        "ETag": found.etag,
        "Last-Modified": email.utils.formatdate(found.modified, usegmt=True),
        "Content-Type": found.content_type,
        "Accept-Ranges": "bytes",
    }
    start, stop, status = 0, found.size, 200
    if "range" in request.headers:
        start, stop = _wanted(request.headers["range"], found.size)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{found.size}"
        status = 206
    pieces = [] if request.method == "HEAD" else list(found.range(start, stop))
    return Answer(status, headers, pieces, stop - start, found)


def _wanted(text: str, size: int) -> tuple[int, int]:
    first, _, last = text.removeprefix("bytes=").partition("-")
    if not first:
        return max(0, size - int(last)), size
    if int(first) >= size:
        raise Refused(416, "InvalidRange")
    return int(first), min(size, int(last) + 1) if last else size


def _list(request: Request, bucket: Bucket) -> Answer:
    prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
    after = request.query.get("continuation-token") or request.query.get("start-after", "")
    most = int(request.query.get("max-keys", 1000))
    encoded = request.query.get("encoding-type") == "url"
    quote: Callable[[str], str] = urllib.parse.quote if encoded else escape
    entries: list[str] = []
    last = ""
    at = max(bisect.bisect_left(bucket.keys, prefix), bisect.bisect_right(bucket.keys, after))
    while at < len(bucket.keys) and len(entries) < most and bucket.keys[at].startswith(prefix):
        last = bucket.keys[at]
        below, found, _ = last[len(prefix) :].partition(delimiter) if delimiter else (last, "", "")
        if found:
            folder = prefix + below + delimiter
            last = folder + "\U0010ffff"
            entries.append(f"<CommonPrefixes><Prefix>{quote(folder)}</Prefix></CommonPrefixes>")
            at = bisect.bisect_right(bucket.keys, last)
            continue
        entries.append(_entry(quote(last), bucket.objects[last]))
        at += 1
    truncated = at < len(bucket.keys) and bucket.keys[at].startswith(prefix)
    more = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if truncated else ""
    head = f"<Name>{request.bucket}</Name><Prefix>{quote(prefix)}</Prefix><KeyCount>{len(entries)}</KeyCount>"
    state = f"<MaxKeys>{most}</MaxKeys><IsTruncated>{str(truncated).lower()}</IsTruncated>"
    encoding = "<EncodingType>url</EncodingType>" if encoded else ""
    return _xml("ListBucketResult", head + encoding + state + more + "".join(entries))


def _entry(key: str, found: Object) -> str:
    content = f"<Key>{key}</Key><LastModified>{_stamp(found.modified)}</LastModified><ETag>{escape(found.etag)}</ETag>"
    return f"<Contents>{content}<Size>{found.size}</Size><StorageClass>STANDARD</StorageClass></Contents>"


def _bucket_entry(name: str) -> str:
    return f"<Bucket><Name>{name}</Name><CreationDate>{_stamp(0)}</CreationDate></Bucket>"


def _list_uploads(request: Request, bucket: Bucket) -> Answer:
    prefix = request.query.get("prefix", "")
    entries = (
        f"<Upload><Key>{escape(upload.key)}</Key><UploadId>{number}</UploadId>"
        f"<Initiated>{_stamp(0)}</Initiated></Upload>"
        for number, upload in bucket.uploads.items()
        if upload.key.startswith(prefix)
    )
    return _xml("ListMultipartUploadsResult", "<IsTruncated>false</IsTruncated>" + "".join(entries))


def _list_parts(request: Request, bucket: Bucket) -> Answer:
    entries = (
        f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(etag)}</ETag><Size>{body.size}</Size></Part>"
        for number, (etag, body) in sorted(_upload(request, bucket).parts.items())
    )
    return _xml("ListPartsResult", "<IsTruncated>false</IsTruncated>" + "".join(entries))


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def _text(text: str) -> Answer:
    return Answer(pieces=[memoryview(text.encode())])


def _xml(root: str, content: str) -> Answer:
    answer = _text(f'<?xml version="1.0" encoding="UTF-8"?><{root} xmlns="{NAMESPACE}">{content}</{root}>')
    answer.headers["Content-Type"] = "application/xml"
    return answer


# --- the server --------------------------------------------------------------------------------


def serve(listener: socket.socket, shelf: Shelf) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_converse, args=(connection, shelf), daemon=True).start()


def _converse(connection: socket.socket, shelf: Shelf) -> None:
    with connection, contextlib.suppress(ConnectionError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = Wire(connection)
        while True:
            request = read_request(wire, connection)
            try:
                answer = shelf.answer(request)
            except Refused as refusal:
                answer = _text(f"<Error><Code>{refusal.code}</Code><Message>{refusal.code}</Message></Error>")
                answer.headers["Content-Type"] = "application/xml"
                answer.status = refusal.status
            counted = (lambda _: None) if request.bucket == "-" else shelf.count_sent
            _send(connection, answer, counted, with_body=request.method != "HEAD")


def _send(connection: socket.socket, answer: Answer, count: Callable[[int], None], *, with_body: bool) -> None:
    size = sum(map(len, answer.pieces)) if answer.size is None else answer.size
    head = _head(answer.status, {**answer.headers, "Content-Length": str(size)})
    pieces = answer.pieces if with_body else []
    if size <= SMALL_BYTES:
        head, pieces = head + b"".join(pieces), []
        count(size)
    connection.sendall(head)
    for piece in pieces:
        count(len(piece))  # one by one: a client may hang up in the middle
        connection.sendall(piece)


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {'OK' if status < 300 else 'Refused'}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _main() -> None:
    parser = argparse.ArgumentParser(description="An S3 server in memory. It ends when its standard input does.")
    parser.add_argument("--reserve-mib", type=int, default=0)
    shelf = Shelf(parser.parse_args().reserve_mib * MIB)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        print(listener.getsockname()[1], flush=True)
        threading.Thread(target=serve, args=(listener, shelf), daemon=True).start()
        sys.stdin.read()
        os._exit(0)  # whatever is being answered, nobody listens any more


if __name__ == "__main__":
    _main()
