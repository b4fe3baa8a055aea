"""What the core asks of a store: ten verbs, rooted at a task's prefix; and which store a URI means.

Keys are relative to the root and come from ``_layout``. All verbs are synchronous, safe to call from
several threads, and raise only errors of ``taskckpt.errors``; passing faults have been retried by then.

Streams are iterators of chunks, here and in all of taskckpt. A chunk is valid until the next one is asked for: its
buffer may be filled anew then, since fresh memory costs more than most of what is done with it. Whoever keeps a chunk
longer copies it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from taskckpt._operation import Stop
from taskckpt._testing import switches
from taskckpt.errors import NotFoundError, UsageError, UsageTypeError

LOCAL_PROTOCOLS = ("file", "local")
S3_PROTOCOLS = ("s3", "s3a")
GCS_PROTOCOLS = ("gs", "gcs")
AZURE_PROTOCOLS = ("az", "abfs", "abfss")

# What the operating system says where a disk or a quota is full, or a file as large as it may get.
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))

# What streams are cut into: large enough to hide a round trip, small enough that a few fit in memory.
CHUNK_BYTES = 8 * 1024 * 1024

# What files are read in: large enough to hide the calls, small enough to stay in a core's cache until it was used.
READ_BYTES = 1024 * 1024


# How many names the first page of a listing has, where a client can choose: clients take 0.1 ms to parse one of them.
FIRST_PAGE = 16


@dataclass(frozen=True, slots=True)
class Listing:
    """Names below a folder, relative to it and in any order; not ``complete`` if only the first page."""

    names: Collection[str]
    complete: bool = True


class Store(Protocol):
    """One task's place in a store.

    Attributes:
        uri: The root, absolute, for people and for records.
        exclusive: True where ``create`` is known to refuse a taken key, False where it is known not to, None
            where an owner has to probe it.
    """

    uri: str
    exclusive: bool | None

    def list_below(self, folder: str, *, first_page: bool = False) -> Listing:
        """All objects below a folder, recursively; an absent folder is an empty one.

        ``first_page`` allows to stop after the first page in ascending order of names.
        """
        ...

    def sizes_below(self, folder: str) -> dict[str, int]:
        """The same objects, each with its size in bytes."""
        ...

    def folders(self, folder: str) -> list[str]:
        """Names of the folders right below a folder, sorted; an absent folder has none. ``""`` is the root."""
        ...

    def read(self, key: str) -> bytes:
        """A small object. NotFoundError if it is absent."""
        ...

    def size(self, key: str) -> int | None:
        """The size of the object in bytes, or None if there is none. ``""`` is the root itself."""
        ...

    def stream(self, key: str, size_bytes: int, stop: Stop) -> Iterator[bytes | memoryview]:
        """An object of a known size in chunks, in order. NotFoundError if it is absent."""
        ...

    def create(self, key: str, data: bytes, stop: Stop) -> None:
        """Creates a small object, whole and durable. AlreadyExistsError if the key is taken."""
        ...

    def write(self, key: str, chunks: Iterable[bytes | memoryview], size_hint: int, stop: Stop) -> None:
        """Writes an object from a stream: durable when it returns, and absent when it raises.

        ``size_hint`` is about how many bytes will come, at the most.
        """
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; absent ones do not matter."""
        ...

    def sweep(self, is_dead: Callable[[str], bool]) -> None:
        """Removes what killed writers left half-written below keys for which ``is_dead`` holds."""
        ...


@dataclass(frozen=True, slots=True)
class Location:
    """A URI taken apart: where to look, without having looked."""

    protocol: str
    path: str

    @property
    def is_local(self) -> bool:
        return self.protocol in LOCAL_PROTOCOLS

    @property
    def in_one_process(self) -> bool:
        """Whether it lies in the memory of one process, where no other one sees it."""
        return self.protocol == "memory"

    @property
    def uri(self) -> str:
        """For people: a plain path where it is local, else a URL."""
        return self.path if self.is_local else f"{self.protocol}://{self.path}"

    @property
    def record_uri(self) -> str:
        """For records: always a URL."""
        return Path(self.path).as_uri() if self.is_local else self.uri

    def child(self, name: str) -> Location:
        return Location(self.protocol, os.path.join(self.path, name) if self.is_local else f"{self.path}/{name}")


# "s3//bucket", "s3:bucket": slips of the pen in the URL of a store that is not this disk.
_NEAR_URL = re.compile(r"(s3a?|gs|gcs|az|abfss?|adl|hdfs|memory|https?|s?ftp|file)(?::|//)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?=/)")


def parse(target: str | os.PathLike[str], *, what: str = "dest") -> Location:
    """Where a URI or a local path points to. Relative paths become absolute now.

    Raises:
        UsageError: It is blank, an unreplaced ``{{template}}``, a chained or malformed URL.
        UsageTypeError: It is neither a str nor a path.
    """
    text = os.fspath(target) if isinstance(target, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise UsageTypeError(f"{what} must be a str or a Path, not {type(target).__name__}.")
    if isinstance(target, str):
        text = text.strip()
    if is_unset(text):
        raise UsageError(
            f"{what} is {text!r}: no place to save to.",
            hint="Pass a folder or a URL such as s3://bucket/task.",
        )
    if "\0" in text or ("::" in text and "://" in text):
        raise UsageError(f"{what} {text!r} is no plain URL.", hint="Chained URLs (a::b) and NUL are not taken.")
    if not isinstance(target, str) and _NEAR_URL.match(text) and ":/" in text:
        raise UsageError(
            f"{what} is a Path made of a URL.", uri=text, hint="Pass the URL as a str: a Path loses a slash."
        )
    scheme = _SCHEME.match(text) if isinstance(target, str) else None
    if scheme is not None:
        return _parse_url(text, scheme[1].lower(), what)
    if isinstance(target, str):
        _refuse_near_urls(text, what)
    try:
        return Location("file", os.path.abspath(os.path.expanduser(text)))
    except FileNotFoundError as error:
        raise NotFoundError(f"{what} is relative, and the current folder is gone.", uri=text) from error


def _refuse_near_urls(text: str, what: str) -> None:
    """What was meant as a URL must not become a folder on this disk."""
    near = _NEAR_URL.match(text)
    if near is not None:
        raise UsageError(
            f"{what} {text!r} is no URL.", hint=f"Did you mean {near[1]}://{text[near.end() :].lstrip('/')}?"
        )
    if text.startswith(("$", "%")):
        raise UsageError(
            f"{what} {text!r}: variables are not expanded.", hint="Use os.path.expandvars, or write ./ before it."
        )


def is_unset(source: object) -> bool:
    """True for what an engine passes when there is nothing: blank, ``""`` in quotes, ``{{template}}``."""
    if source is None:
        return True
    if not isinstance(source, str):
        return False
    text = source.strip()
    return text in ("", '""', "''") or (text.startswith("{{") and text.endswith("}}"))


def _parse_url(text: str, protocol: str, what: str) -> Location:
    if protocol in LOCAL_PROTOCOLS:
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise UsageError(f"{what} {text!r} names a host.", hint="Write file:///absolute/path.")
        raw = text.split(":", 1)[1].removeprefix("//").removeprefix(parts.netloc)
        return Location("file", os.path.abspath(unquote(raw)))
    rest = text.split(":", 1)[1]
    if not rest.startswith("//"):
        raise UsageError(f"{what} {text!r} is no URL.", hint=f"Did you mean {protocol}:/{rest}?")
    path = rest[2:].rstrip("/")
    if "//" in path.lstrip("/"):
        raise UsageError(f"{what} {text!r} has '//' in it.", hint="Write one slash.")
    if protocol != "memory" and not path.strip("/"):
        raise UsageError(f"{what} {text!r} names no bucket or path.", hint=f"Write {protocol}://bucket/path.")
    if any(part in (".", "..") for part in path.split("/")):
        raise UsageError(f"{what} {text!r} has '.' or '..' in it.", hint="Write the path out.")
    return Location(protocol, path.lstrip("/") if protocol in S3_PROTOCOLS else path)


def open_store(location: Location, *, storage_options: Mapping[str, Any] | None, timeout_s: float) -> Store:
    """The store behind a location. Opens connections only when a verb is called.

    Raises:
        UsageError: The protocol is unknown, or the options make no sense.
        MissingDependencyError: The protocol's package is not installed.
    """
    store = _open(location, dict(storage_options or {}), timeout_s)
    return store if switches.wrap_store is None else switches.wrap_store(store)


def _open(location: Location, storage_options: dict[str, Any], timeout_s: float) -> Store:
    if location.is_local:
        from taskckpt._stores.local import LocalStore

        return LocalStore(location.path)
    from taskckpt._stores.fsspec import open_remote

    return open_remote(location, storage_options, timeout_s)
