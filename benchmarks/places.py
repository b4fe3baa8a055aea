"""Where is saved to: a folder in memory, a folder on a disk, SeaweedFS, and the in-memory S3 beside this file."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory_s3 import memory_s3
from benchmarks.operations import Job
from taskckpt.testing.servers import S3Server, seaweedfs

BUCKET = "bench"
# An archive, a tree and Flyte's archive of the largest corpus; more is taken when it is needed.
RESERVE_MIB = 2560

LOCAL = ("tmpfs", "disk")
ON_S3 = ("seaweedfs", "memory")


@dataclass(frozen=True, slots=True)
class Place:
    """A store that is up.

    Attributes:
        name: ``"tmpfs"``, ``"disk"``, ``"seaweedfs"`` or ``"memory"``.
        root: A folder, or ``s3://bucket``.
        scratch: Where the processes that are measured have their temporary folders, and restore to.
        server: The server, if it is one.
    """

    name: str
    root: str
    scratch: Path
    server: S3Server | None = None

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return self.server.storage_options if self.server else {}

    @property
    def environment(self) -> Mapping[str, str]:
        if self.server is None:
            return {}
        flyte = {
            "FLYTE_AWS_ENDPOINT": self.server.endpoint_url,
            "FLYTE_AWS_ACCESS_KEY_ID": self.server.key,
            "FLYTE_AWS_SECRET_ACCESS_KEY": self.server.secret,
        }
        return {**self.server.environment, **flyte}

    def job(self, who: str, verb: str, source: Path, name: str) -> Job:
        return Job(who, verb, str(source), f"{self.root}/{name}", self.storage_options, counted=self.name == "memory")

    def remove(self, name: str) -> None:
        """Remove what was saved under a name. SeaweedFS would not give the room back: there it stays."""
        if self.server is None:
            for path in Path(self.root).glob(f"{name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif self.name == "memory":
            request = urllib.request.Request(f"{self.server.endpoint_url}/-/empty?prefix={name}", method="POST")
            urllib.request.urlopen(request).close()

    def settle(self) -> None:
        """Let the disk write what it was given, so that the next one does not wait for it."""
        if self.name in ("disk", "seaweedfs"):
            os.sync()


@dataclass(frozen=True, slots=True)
class Folders:
    """The two folders that everything happens in, removed at the end."""

    in_memory: Path
    on_disk: Path


@contextlib.contextmanager
def folders(memory_parent: Path, disk_parent: Path) -> Generator[Folders]:
    with (
        tempfile.TemporaryDirectory(prefix="taskckpt-bench-", dir=memory_parent) as in_memory,
        tempfile.TemporaryDirectory(prefix="taskckpt-bench-", dir=disk_parent) as on_disk,
    ):
        yield Folders(Path(in_memory), Path(on_disk))


@contextlib.contextmanager
def open_place(name: str, where: Folders) -> Generator[Place]:
    """A place, empty and ready."""
    if name in LOCAL:
        base = where.in_memory if name == "tmpfs" else where.on_disk
        with tempfile.TemporaryDirectory(dir=base) as folder:
            scratch, root = Path(folder) / "scratch", Path(folder) / "store"
            scratch.mkdir()
            root.mkdir()
            yield Place(name, str(root), scratch)
        return
    start: Callable[[], contextlib.AbstractContextManager[S3Server]]
    start = seaweedfs if name == "seaweedfs" else lambda: memory_s3(reserve_mib=RESERVE_MIB)
    with start() as server, tempfile.TemporaryDirectory(dir=where.in_memory) as folder:
        server.create_bucket(BUCKET)
        yield Place(name, f"s3://{BUCKET}", Path(folder), server)


def filesystem_of(path: Path) -> str:
    """The type of the file system that a path is on, or "unknown"."""
    real = os.path.realpath(path)
    best, kind = "", "unknown"
    with contextlib.suppress(OSError), open("/proc/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            _, point, found, *_ = line.split(" ")
            if len(point) >= len(best) and (real + "/").startswith(point.rstrip("/") + "/"):
                best, kind = point, found
    return kind
