"""SIGKILL before and after every request with which a process changes a bucket of Google's or Azure's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby, product

import pytest

from taskckpt.testing.servers import AzureServer, GCSServer
from tests.crash.contents import NOTHING
from tests.crash.forker import Forker, Job
from tests.crash.inspection import Place, cloud_place
from tests.crash.recovery import expect_old_or_new, noted, recover, states

# What a large upload and its commit are made of; parts come several times in a row.
UPLOAD = {
    "obstore": ["create_multipart_upload", "upload_part", "complete_multipart_upload", "put_object"],
    "fake_gcs": ["POST-resumable", "PUT", "POST-multipart"],
    "azurite": ["PUT-block", "PUT-blocklist", "PUT"],
}


@dataclass
class Cloud:
    """Kills attempts in a bucket, each below a prefix of its own."""

    forks: Forker
    name: str
    protocol: str
    server: GCSServer | AzureServer
    bucket: str
    job: Job
    number: int = 0

    def anew(self, job: Job) -> Job:
        self.number += 1
        return replace(job, dest=f"{self.protocol}://{self.bucket}/{self.number}")

    def place(self) -> Place:
        return cloud_place(self.server, self.bucket, f"{self.number}")

    def calls(self, job: Job) -> list[str]:
        outcome = self.forks.run(self.anew(job))
        assert expect_old_or_new(outcome, job, NOTHING) == {states(NOTHING, job.steps)[-1]}
        return outcome.calls

    def kill(self, job: Job) -> str:
        job = self.anew(job)
        outcome = self.forks.run(job)
        assert outcome.killed
        allowed = expect_old_or_new(outcome, job, NOTHING)
        seen, _ = recover(self.forks, job)
        assert seen in allowed, f"{seen}, but {allowed} may be there"
        place = self.place()
        assert not place.missing
        assert not place.garbage
        return seen


@pytest.fixture(params=["fake_gcs", "azurite", "azurite obstore"])
def cloud(request, cloud_forks, sources, quick_path):
    name, _, transfer = request.param.partition(" ")
    server = request.getfixturevalue(name)
    protocol = {"fake_gcs": "gs", "azurite": "az"}[name]
    job = Job("", [], sources, quick_path, storage_options=server.storage_options, layer=transfer or "http")
    bucket = f"kill-{id(job)}"
    server.create_bucket(bucket)
    yield Cloud(cloud_forks, transfer or name, protocol, server, bucket, job)
    server.delete_bucket(bucket)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_large_upload_is_all_or_nothing(cloud, when):
    job = replace(cloud.job, steps=["save inline 1", "new", "load", "save large 2"], skip=3)
    calls = cloud.calls(job)
    assert [name for name, _ in groupby(calls)] == UPLOAD[cloud.name]
    seen = set()
    for at in sorted({1, 2, 3, len(calls) // 2, *range(len(calls) - 2, len(calls) + 1)}):
        with noted(when, at, calls):
            seen.add(cloud.kill(replace(job, at=at, when=when)))
    assert seen == ({"inline 1", "large 2"} if when == "after" else {"inline 1"})


@pytest.mark.parametrize(
    ("steps", "skip", "keep"),
    [(["save folder 1"], 0, 3), (["save bytes 1", "save file 2", "clear"], 1, 1)],
    ids=["first save", "prune and clear"],
)
def test_old_or_new(cloud, steps, skip, keep):
    job = replace(cloud.job, steps=steps, skip=skip, keep=keep)
    calls = cloud.calls(job)
    for at, when in product(range(1, len(calls) + 1), ["before", "after"]):
        with noted(when, at, calls):
            cloud.kill(replace(job, at=at, when=when))


def test_a_cancelled_upload_leaves_nothing(cloud):
    job = replace(cloud.job, steps=["save inline 1", "async large 2"], skip=1, how="cancel", when="before")
    for at in range(1, 5):
        job = cloud.anew(replace(job, at=at))
        outcome = cloud.forks.run(job)
        assert outcome.answers == ["done", "cancelled"], (at, outcome.calls)
        # Azure knows no end of an upload: a part that was under way may arrive after the others were removed.
        assert not cloud.place().uploads or cloud.name == "obstore"
        assert recover(cloud.forks, job)[0] == "inline 1"
        assert not cloud.place().garbage
