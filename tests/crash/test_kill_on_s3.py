"""SIGKILL before and after every request with which a process changes a bucket."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from taskckpt.testing.servers import S3Server
from tests.crash.contents import NOTHING
from tests.crash.forker import Forker, Job
from tests.crash.inspection import Place, s3_place
from tests.crash.recovery import expect_old_or_new, noted, recover, states

# Each: steps, how many of them are only there to begin with, and keep.
STORIES: dict[str, tuple[Sequence[str], int, int]] = {
    "the very first save: inline": (["save inline 1"], 0, 3),
    "the very first save: folder": (["save folder 1"], 0, 3),
    "a retry saves: bytes": (["save bytes 1", "new", "load", "save bytes 2"], 2, 3),
    "a retry saves in the background: folder": (["save bytes 1", "new", "load", "later folder 2"], 2, 3),
    "a second save and prune, keep=1": (["save file 1", "save file 2", "save file 3"], 1, 1),
    "a second save and prune, keep=2": (["save bytes 1", "save file 2", "save bytes 3"], 2, 2),
    "clear": (["save bytes 1", "save folder 2", "new", "clear", "save inline 3"], 3, 3),
}


class Bucket:
    """Kills attempts in a bucket, each below a prefix of its own."""

    def __init__(
        self, forks: Forker, sources: Path, tmp: Path, server: S3Server, bucket: str, layer: str = "s3"
    ) -> None:
        self.forks = forks
        self._server = server
        self._bucket = bucket
        self._number = 0
        self.job = Job("", [], sources, tmp, storage_options=server.storage_options, layer=layer)

    def calls(self, job: Job) -> list[str]:
        outcome = self.forks.run(self.below_a_new_prefix(job))
        assert expect_old_or_new(outcome, job, NOTHING) == {states(NOTHING, job.steps)[-1]}
        return outcome.calls

    def kill(self, job: Job) -> str:
        job = self.below_a_new_prefix(job)
        outcome = self.forks.run(job)
        assert outcome.killed
        allowed = expect_old_or_new(outcome, job, NOTHING)
        seen, _ = recover(self.forks, job)
        assert seen in allowed, f"{seen}, but {allowed} may be there"
        place = self.place()
        assert not place.missing
        assert not place.garbage
        return seen

    def place(self) -> Place:
        return s3_place(self._server, self._bucket, str(self._number))

    def below_a_new_prefix(self, job: Job) -> Job:
        self._number += 1
        return replace(job, dest=f"s3://{self._bucket}/{self._number}")


@pytest.fixture(params=["moto-s3", "seaweedfs-s3", "seaweedfs-obstore"])
def bucket(request, s3_forks, sources, quick_path, new_bucket):
    """A server, and the transfer that reaches it."""
    name, _, layer = request.param.partition("-")
    server = request.getfixturevalue(name)
    return Bucket(s3_forks, sources, quick_path, server, new_bucket(server), layer)


def kill_at(bucket: Bucket, job: Job, calls: Sequence[str], moments: Iterable[tuple[int, str]]) -> set[str]:
    """Gives what was loaded, all moments together."""
    seen = set()
    for at, when in moments:
        with noted(when, at, calls):
            seen.add(bucket.kill(replace(job, at=at, when=when)))
    return seen


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", STORIES)
def test_old_or_new(name, when, bucket):
    steps, skip, keep = STORIES[name]
    job = replace(bucket.job, steps=steps, skip=skip, keep=keep)
    calls = bucket.calls(job)
    assert "put_object" in calls
    seen = kill_at(bucket, job, calls, product(range(1, len(calls) + 1), [when]))
    assert len(seen) >= (2 if when == "after" else 1)


@pytest.mark.parametrize(
    "moments",
    [
        [("create_multipart_upload", "after"), ("upload_part", "before"), ("upload_part", "after")],
        [("complete_multipart_upload", "before"), ("complete_multipart_upload", "after"), ("put_object", "after")],
    ],
    ids=["parts", "whole"],
)
def test_an_upload_in_parts_is_all_or_nothing(moments, bucket):
    job = replace(bucket.job, steps=["save inline 1", "new", "load", "save large 2"], skip=3)
    calls = bucket.calls(job)
    parts = calls.count("upload_part")
    assert parts > 2
    assert calls[0] == "create_multipart_upload"
    assert calls[parts + 1 : parts + 3] == ["complete_multipart_upload", "put_object"]
    seen = kill_at(bucket, job, calls, [(calls.index(call) + 1, when) for call, when in moments])
    assert seen == {"inline 1"} | ({"large 2"} if ("put_object", "after") in moments else set())


def test_what_a_killed_upload_left_is_swept_by_the_next_attempt(bucket):
    job = replace(bucket.job, steps=["save large 1"])
    calls = bucket.calls(job)
    killed = bucket.below_a_new_prefix(replace(job, at=calls.index("complete_multipart_upload") + 1))
    assert bucket.forks.run(killed).killed
    assert len(bucket.place().uploads) == 1
    recover(bucket.forks, killed)
    assert bucket.place().uploads == []
