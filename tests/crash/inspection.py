"""What lies in a task's place, read without the package: what is retained, and what is garbage."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from taskckpt.testing.servers import AzureServer, GCSServer, S3Server


class Place(NamedTuple):
    """Every object of a task by its key, and the keys of uploads that nobody completed."""

    objects: Mapping[str, bytes]
    uploads: list[str]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Newest first; only those that can be read."""
        found = []
        for key, data in self.objects.items():
            if re.fullmatch(r"log/[0-9-]+\.jsonl", key):
                try:
                    found.append(json.loads(data.split(b"\n")[0]))
                except ValueError:
                    continue
        return sorted(found, key=lambda record: -record["slot"])

    @property
    def torn(self) -> set[str]:
        """Records that are not whole."""
        return {key for key, data in self.objects.items() if key.endswith(".jsonl") and data.count(b"\n") != 2}

    @property
    def retained(self) -> set[str]:
        """The keys of the payloads that the newest commit says are there."""
        kinds = [record["kind"] for record in self.records]
        commits = [record for record in self.records if record["kind"] == "commit"]
        if not commits or "clear" in kinds[: kinds.index("commit")]:
            return set()
        newest = commits[0]
        last_clear = max((r["slot"] for r in self.records if r["kind"] == "clear"), default=0)
        stored = (
            commit["checkpoint"]["stored"]
            for commit in commits
            if (commit["slot"] >= newest["floor"] or commit["slot"] in newest["kept"]) and commit["slot"] > last_clear
        )
        return {where["key"] for where in stored if "key" in where}

    @property
    def garbage(self) -> set[str]:
        """Payloads that nobody retains, half-written files and uploads."""
        payloads = {key for key in self.objects if key.startswith("data/")} - self.retained
        partial = {key for key in self.objects if "/.partial-" in key}
        return payloads | partial | set(self.uploads)

    @property
    def missing(self) -> set[str]:
        return self.retained - self.objects.keys()


def local_place(dest: Path) -> Place:
    files = (path for path in dest.rglob("*") if path.is_file())
    return Place({str(path.relative_to(dest)): path.read_bytes() for path in files}, [])


def s3_place(server: S3Server, bucket: str, prefix: str) -> Place:
    status, listing = server.request("GET", f"/{bucket}?list-type=2&prefix={prefix}%2F")
    assert status == 200
    keys = re.findall(r"<Key>([^<]+)</Key>", listing.decode())
    objects = {}
    for key in keys:
        status, data = server.request("GET", f"/{bucket}/{key}")
        assert status == 200
        objects[key.removeprefix(f"{prefix}/")] = data
    status, uploads = server.request("GET", f"/{bucket}?uploads")
    assert status == 200
    return Place(objects, re.findall(r"<Key>([^<]+)</Key>", uploads.decode()))


def cloud_place(server: GCSServer | AzureServer, bucket: str, prefix: str) -> Place:
    keys = server.keys(bucket, f"{prefix}/")
    objects = {key.removeprefix(f"{prefix}/"): server.get(bucket, key) for key in keys}
    uploads = []
    if isinstance(server, AzureServer):
        uploads = sorted(set(server.keys(bucket, f"{prefix}/", uncommitted=True)) - set(keys))
    return Place(objects, uploads)
