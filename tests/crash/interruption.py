"""Every call with which a process writes, counted; and what happens at the one that a test has chosen."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

DISK_CALLS = (
    "open",
    "write",
    "fsync",
    "link",
    "rename",
    "replace",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
    "truncate",
    "ftruncate",
)
S3_CALLS = frozenset(
    {
        "put_object",
        "create_multipart_upload",
        "upload_part",
        "complete_multipart_upload",
        "abort_multipart_upload",
        "delete_object",
        "delete_objects",
    }
)

# _IOR('X', 125, __u32): the file system stops at once, and forgets what is not on the disk yet.
EXT4_IOC_SHUTDOWN = 0x8004587D
SHUTDOWN_NO_LOG_FLUSH = 2


@dataclass
class Interruption:
    """At call number ``at`` (from 1; 0 is never): ``act`` before it, in the middle of it, or after it.

    In the middle of a ``write``, half of the bytes are written; other calls have no middle, only an end.
    """

    at: int
    when: str
    act: Callable[[], None]
    calls: list[str] = field(default_factory=list)
    counting: bool = False

    def is_now(self, name: str) -> bool:
        """Counts a call that is about to happen."""
        if not self.counting:
            return False
        self.calls.append(name)
        return len(self.calls) == self.at


def watch_disk(interruption: Interruption) -> None:
    """Wraps the calls in ``os`` that change a disk, for the rest of this process."""
    for name in DISK_CALLS:
        setattr(os, name, _wrapped(name, getattr(os, name), interruption))


def _wrapped(name: str, call: Callable[..., Any], interruption: Interruption) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        reads = name == "open" and arguments[1] & os.O_ACCMODE == os.O_RDONLY
        if reads or not interruption.is_now(name):
            return call(*arguments, **named)
        if interruption.when == "before":
            interruption.act()
        if interruption.when == "middle" and name == "write":
            arguments = arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2]
        try:
            return call(*arguments, **named)
        finally:
            if interruption.when != "before":
                interruption.act()

    return wrapper


def watch_s3(interruption: Interruption) -> None:
    """Wraps the requests of s3fs that change a bucket, for the rest of this process."""
    import s3fs
    from fsspec.asyn import sync_wrapper

    original = s3fs.S3FileSystem._call_s3

    async def call(self: Any, method: str, *arguments: Any, **named: Any) -> Any:
        now = method in S3_CALLS and interruption.is_now(method)
        if now and interruption.when == "before":
            interruption.act()
        try:
            return await original(self, method, *arguments, **named)
        finally:
            if now and interruption.when == "after":
                interruption.act()

    s3fs.S3FileSystem._call_s3 = call
    s3fs.S3FileSystem.call_s3 = sync_wrapper(call)


def watch_obstore(interruption: Interruption) -> None:
    """Wraps what changes a bucket through obstore, under the names that it has in S3, for the rest of this process."""
    import obstore

    def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            now = interruption.is_now(name)
            if now and interruption.when == "before":
                interruption.act()
            try:
                return call(*arguments, **named)
            finally:
                if now and interruption.when == "after":
                    interruption.act()

        return wrapper

    class Writer:
        def __init__(self, writer: Any) -> None:
            self.write = around("upload_part", writer.write)
            self.close = around("complete_multipart_upload", writer.close)
            self._writer = writer

        def __exit__(self, *reason: object) -> None:
            around("abort_multipart_upload", self._writer.__exit__)(*reason)

    open_writer = obstore.open_writer
    begin = around("create_multipart_upload", lambda *given, **named: Writer(open_writer(*given, **named)))
    replaced: Any = obstore
    replaced.open_writer = begin
    replaced.put = around("put_object", obstore.put)
    replaced.delete = around("delete_objects", obstore.delete)


def watch_http(interruption: Interruption) -> None:
    """Wraps the requests of aiohttp that change anything, for the rest of this process: gcsfs's and adlfs's."""
    import aiohttp
    import yarl

    original = aiohttp.ClientSession._request

    async def request(self: Any, method: str, url: Any, **named: Any) -> Any:
        query = {**yarl.URL(url).query, **(named.get("params") or {})}
        name = "-".join(filter(None, (method.upper(), query.get("comp") or query.get("uploadType"))))
        # Where a session of an upload goes on, its kind and its key are in the address, and are not what happens.
        name = "PUT" if "upload_id" in query else name
        now = name[:3] != "GET" and name[:4] != "HEAD" and interruption.is_now(name)
        if now and interruption.when == "before":
            interruption.act()
        try:
            return await original(self, method, url, **named)
        finally:
            if now and interruption.when == "after":
                interruption.act()

    aiohttp.ClientSession._request = request  # type: ignore[assignment]


# --- what may happen ---------------------------------------------------------------------------


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def cut_power(mount: str) -> None:
    """The power of the disk that is mounted there goes, and this process with it."""
    shut_down(mount)
    kill()


def shut_down(mount: str) -> None:
    descriptor = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, SHUTDOWN_NO_LOG_FLUSH.to_bytes(4, "little"))
    finally:
        os.close(descriptor)


def exit_on_sigterm() -> None:
    """What a well-behaved task does with SIGTERM; the signal arrives at once."""

    def leave(_number: int, _frame: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, leave)
    signal.raise_signal(signal.SIGTERM)


def press_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def fail(number: int) -> Callable[[], None]:
    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def cancel(task: asyncio.Task[Any], loop: asyncio.AbstractEventLoop) -> None:
    """Cancels a task of a loop in another thread; returns when the task knows."""
    known = threading.Event()

    def after_rounds(left: int) -> None:
        if left:
            loop.call_soon(after_rounds, left - 1)
        else:
            known.set()

    def begin() -> None:
        task.cancel()
        after_rounds(3)

    loop.call_soon_threadsafe(begin)
    assert known.wait(5)


ACTS: dict[str, Callable[[], None]] = {
    "SIGKILL": kill,
    "SIGTERM": exit_on_sigterm,
    "SIGINT": press_ctrl_c,
    "EIO": fail(errno.EIO),
    "ENOSPC": fail(errno.ENOSPC),
}
