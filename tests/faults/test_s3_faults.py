"""S3 that fails: each fault in each request of each operation gives the right result, or the right error."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest

from taskckpt import Checkpoint
from taskckpt._log.records import Commit
from taskckpt.errors import (
    CommitUnknownError,
    CorruptCheckpointError,
    DeniedError,
    NotFoundError,
    StaleAttemptError,
    TaskckptWarning,
    UnavailableError,
)
from taskckpt.testing import servers
from tests.faults import proxy as p
from tests.faults.conftest import TIMEOUT_S
from tests.faults.proxy import Stopwatch, answer, closed_port, cut, silent_port

PAYLOAD = os.urandom(100_000)
LARGE = os.urandom(1000) * 9_000  # two parts
# Sticky faults end after a few tries; no more than this passes before the caller knows.
DEADLINE_S = 2 * TIMEOUT_S + 2


@pytest.fixture(autouse=True, params=["fsspec", "obstore"])
def transfer(request, monkeypatch):
    """Both ways to the store, which fail alike."""
    if request.param == "fsspec":
        monkeypatch.setenv("TASKCKPT_TRANSFER", "fsspec")
    return request.param


once = pytest.mark.parametrize("transfer", ["fsspec"], indirect=True)  # the same for both, and slow


# --- the operations ----------------------------------------------------------------------------


class Load:
    requests = ("LIST log", "GET log", "GET data", "CREATE log")

    def prepare(self, site):
        site.next_attempt().save_sync(PAYLOAD)
        return site.checkpoint()

    def act(self, attempt):
        assert attempt.load_bytes_sync() == PAYLOAD

    def expect_done(self, site):
        assert site.view().load_bytes_sync() == PAYLOAD
        assert len(site.keys("log")) == 3, "a claim, a commit, a claim"

    def expect_failed(self, site):
        assert site.view().load_bytes_sync() == PAYLOAD


@dataclass
class Save:
    data: bytes
    requests: tuple[str, ...]

    def prepare(self, site):
        attempt = site.checkpoint()
        attempt.save_sync(b"before")
        return attempt

    def act(self, attempt):
        attempt.save_sync(self.data)

    def expect_done(self, site):
        assert site.view().load_bytes_sync() == self.data
        assert len(site.keys("log")) == 3, "a claim and two commits"
        assert len(site.keys("data")) == (len(self.data) > 2**16)

    def expect_failed(self, site):
        assert site.view().load_bytes_sync() in (b"before", self.data)


class ColdSave(Save):
    def prepare(self, site):
        site.next_attempt().save_sync(b"before")
        return site.checkpoint()

    def expect_done(self, site):
        assert site.view().load_bytes_sync() == self.data
        assert len(site.keys("log")) == 4, "a claim, a commit, and again"


class Clear:
    requests = ("LIST log", "LIST data", "CREATE log")

    def prepare(self, site):
        attempt = site.checkpoint()
        attempt.save_sync(PAYLOAD)
        return attempt

    def act(self, attempt):
        attempt.clear_sync()

    def expect_done(self, site):
        assert site.view().load_bytes_sync() is None
        assert site.keys("data") == []

    def expect_failed(self, site):
        assert site.view().load_bytes_sync() in (None, PAYLOAD)


OPERATIONS: dict[str, Any] = {
    "load": Load(),
    "save inline": Save(b"x", ("CREATE log",)),
    "save a payload": Save(PAYLOAD, ("PUT data", "CREATE log")),
    "save in parts": Save(LARGE, ("BEGIN data", "PART data", "COMPLETE data", "CREATE log")),
    "first save": ColdSave(b"x", ("LIST log", "GET log", "CREATE log")),
    "clear": Clear(),
}
PLACES = [("fsspec", name, on) for name, operation in OPERATIONS.items() for on in operation.requests]
# Each kind of request once: the operations are the same whatever they go through.
PLACES += [("obstore", "load", on) for on in ("LIST log", "GET data")]
PLACES += [("obstore", "save in parts", on) for on in OPERATIONS["save in parts"].requests]
# Of the requests of an upload, which obstore repeats itself, it takes for final: what only conditional requests get,
# and a first reply whose body is cut. The save fails then, with UnavailableError.
FINAL_TO_OBSTORE = [("body cut", "BEGIN data"), *(("409", f"{verb} data") for verb in ("BEGIN", "PART", "COMPLETE"))]
at_each_place = pytest.mark.parametrize(("transfer", "name", "on"), PLACES, indirect=["transfer"])

PASSING = {
    "409": answer(409, "ConditionalRequestConflict"),
    "429": answer(429, "TooManyRequests"),
    "500": answer(500, "InternalError"),
    "503": answer(503, "SlowDown"),
    "connection reset": p.drop,
    "reply lost": p.lose_reply,
    "error though it worked": p.error_after_effect,
    "headers cut": p.cut_headers,
    "body cut": cut(0.5),
}
STICKY = {name: PASSING[name] for name in ("500", "503", "connection reset", "reply lost", "error though it worked")}
# aiohttp sends an idempotent request again at once when its connection breaks: that is within one try.
SENT_TWICE = {"connection reset", "reply lost", "headers cut"}


@at_each_place
def test_a_fault_that_passes_is_not_noticed(site, transfer, name, on):
    operation = OPERATIONS[name]
    for fault, action in PASSING.items():
        final = transfer == "obstore" and (fault, on) in FINAL_TO_OBSTORE
        site = site.anew()
        site.proxy.heal()
        attempt = operation.prepare(site)
        site.proxy.heal()
        planned = site.proxy.fault(action, on, times=1)
        if final:
            with pytest.raises(UnavailableError):
                operation.act(attempt)
            assert site.view().load_bytes_sync() == b"before"
            continue
        operation.act(attempt)
        assert planned.hit, f"{fault}: {site.proxy.count()}"
        operation.expect_done(site)
        if on == "BEGIN data" and fault in ("reply lost", "error though it worked", "headers cut", "body cut"):
            continue  # nobody knows the name of that upload; the next attempt sweeps it
        assert site.uploads() == []


@at_each_place
def test_a_fault_that_stays_is_a_typed_error_and_nothing_is_lost(site, transfer, name, on):
    operation = OPERATIONS[name]
    for fault, action in STICKY.items():
        site = site.anew()
        site.proxy.heal()
        attempt = operation.prepare(site)
        site.proxy.heal()
        site.proxy.fault(action, on)
        if transfer == "obstore" and on == "COMPLETE data" and action in (p.lose_reply, p.error_after_effect):
            operation.act(attempt)  # it aborts what failed, is told that there is no such upload, and finds the object
            operation.expect_done(site)
            continue
        watch = Stopwatch()
        with pytest.raises(UnavailableError) as caught:
            operation.act(attempt)
        assert watch() < DEADLINE_S
        assert caught.value.uri is not None
        assert site.bucket in caught.value.uri
        at_most = 10 if fault in SENT_TWICE and on not in ("BEGIN data", "COMPLETE data") else 5
        if on == "PART data":
            at_most *= 2  # two parts
        assert 1 < site.proxy.count()[on] <= at_most, f"{fault}: {site.proxy.count()}"
        operation.expect_failed(site)
        site.proxy.heal()
        operation.act(attempt)  # the same attempt goes on when the store is back
        expected = {"load": PAYLOAD, "clear": None}.get(name, getattr(operation, "data", None))
        assert site.next_attempt().load_bytes_sync() == expected
        assert len(site.keys("data")) <= 2


@at_each_place
def test_a_refusal_is_denied_at_once(site, name, on):
    operation = OPERATIONS[name]
    if (name, on) == ("load", "CREATE log"):
        pytest.skip("a load that may not claim gives the state: see test_who_may_only_read_gets_the_state")
    for code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
        site = site.anew()
        site.proxy.heal()
        attempt = operation.prepare(site)
        site.proxy.heal()
        site.proxy.fault(answer(403 if code != "ExpiredToken" else 400, code), on)
        with pytest.raises(DeniedError) as caught:
            operation.act(attempt)
        assert caught.value.hint is not None
        assert "credentials" in caught.value.hint
        assert site.proxy.count()[on] == (1 if on != "PART data" else site.proxy.count()[on])
        assert site.proxy.count()[on] <= 2
        operation.expect_failed(site)
        site.proxy.heal()
        operation.act(attempt)


@pytest.mark.parametrize(
    ("transfer", "on"),
    [
        *(("fsspec", on) for on in ("LIST log", "GET log", "GET data", "CREATE log")),
        *(("obstore", on) for on in ("GET data", "CREATE log")),
    ],
    indirect=["transfer"],
)
def test_a_server_that_hangs_once_and_for_ever(site, on):
    operation = Load()
    attempt = operation.prepare(site)
    site.proxy.heal()
    site.proxy.fault(p.hang, on, times=1)
    operation.act(attempt)
    operation.expect_done(site)
    attempt = site.checkpoint()
    site.proxy.heal()
    site.proxy.fault(p.hang, on)
    watch = Stopwatch()
    with pytest.raises(UnavailableError):
        attempt.load_bytes_sync()
    assert watch() < DEADLINE_S
    site.proxy.heal()
    assert attempt.load_bytes_sync() == PAYLOAD


def test_the_error_says_how_often_it_was_tried(site):
    site.proxy.fault(answer(503, "SlowDown"), "LIST log")
    with pytest.raises(UnavailableError) as caught:
        site.checkpoint().load_sync()
    assert site.proxy.count() == {"LIST log": 5}
    assert "Tried 5 times" in "".join(caught.value.__notes__)
    assert "SlowDown" in str(caught.value)


# --- lost replies, one by one ------------------------------------------------------------------


@pytest.mark.parametrize("action", [p.lose_reply, p.error_after_effect])
def test_a_lost_reply_of_a_commit_is_a_success(site, action):
    attempt = site.checkpoint(keep=None)
    for number in range(3):
        site.proxy.heal()
        site.proxy.fault(action, "CREATE log", times=1)
        attempt.save_sync(b"%d" % number)
        site.proxy.heal()
        assert site.view().load_bytes_sync() == b"%d" % number
    assert len(site.keys("log")) == 4, "no commit is there twice"


def test_a_commit_that_nobody_confirms_is_settled_by_the_next_save(site):
    attempt = site.checkpoint(keep=None)
    attempt.save_sync(b"before")
    for action, then in ((p.lose_reply, PAYLOAD), (p.drop, b"before")):
        site.proxy.fault(action, "CREATE log")
        site.proxy.fault(answer(500, "InternalError"), "GET log")
        with pytest.raises(CommitUnknownError, match=r"never told whether slot"):
            attempt.save_sync(PAYLOAD)
        assert site.view().load_bytes_sync() == then
        site.proxy.heal()
        attempt.save_sync(b"before")
        assert site.view().load_bytes_sync() == b"before"
    assert len(site.keys("log")) == 5, "claim, before, PAYLOAD, before, before"


def test_an_upload_whose_beginning_was_lost_is_swept_by_the_next_attempt(site):
    attempt = site.checkpoint()
    site.proxy.fault(p.lose_reply, "BEGIN data", times=1)
    attempt.save_sync(LARGE)
    assert len(site.uploads()) == 1
    site.checkpoint().save_sync(b"next")
    assert site.uploads() == []
    assert site.view().load_bytes_sync() == b"next"


def test_a_failed_upload_is_aborted(site):
    attempt = site.checkpoint()
    site.proxy.fault(answer(500, "InternalError"), "PART data", skip=1)
    with pytest.raises(UnavailableError):
        attempt.save_sync(LARGE)
    assert site.proxy.count()["ABORT data"] == 1
    assert site.uploads() == []
    assert site.view().load_sync() is None


# --- damaged replies ---------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["GET log", "GET data"])
@pytest.mark.parametrize("action", [p.flip, p.flip_unseen, cut(0.0), cut(0.99)])
def test_a_reply_damaged_once_is_read_again(site, transfer, on, action):
    site.next_attempt().save_sync(PAYLOAD)
    planned = site.proxy.fault(action, on, times=1)
    attempt = site.checkpoint()
    unseen = (p.flip_unseen, p.flip) if transfer == "obstore" else (p.flip_unseen,)  # which looks at no checksums
    if on == "GET data" and action in unseen:
        # No transport noticed it, but our digest does; the only copy counts as damaged, and is not lost.
        with pytest.raises(CorruptCheckpointError):
            attempt.load_bytes_sync()
    assert attempt.load_bytes_sync() == PAYLOAD
    assert planned.hit


@pytest.mark.parametrize("on", ["GET log", "GET data"])
def test_damage_at_rest_is_corrupt_and_never_nothing(site, on):
    site.next_attempt().save_sync(PAYLOAD)
    site.proxy.fault(p.flip_unseen, on)
    for look in (site.checkpoint(), site.checkpoint(read_only=True)):
        with pytest.raises(CorruptCheckpointError):
            look.load_bytes_sync()
        assert look.prev_exists() is True


def test_a_listing_that_is_no_listing_is_never_nothing(site):
    site.next_attempt().save_sync(PAYLOAD)
    for body in (b"", b"<html>Please log in to the hotel's network</html>", b'{"status": "ok"}', b"<ListBucketResult"):

        def portal(proxy, request, connection, body=body):
            return p.Reply(200, "OK", [("Content-Type", "text/html")], body)

        site.proxy.heal()
        site.proxy.fault(portal, "LIST.*")
        with pytest.raises(UnavailableError):
            site.checkpoint(read_only=True).load_sync()


# --- deleting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["403", *PASSING])
def test_deleting_that_fails_does_not_fail_a_save_or_a_clear(site, fault, caplog):
    action = answer(403, "AccessDenied") if fault == "403" else PASSING[fault]
    attempt = site.checkpoint(keep=1)
    attempt.save_sync(PAYLOAD)
    site.proxy.heal()
    site.proxy.fault(action, "DELETE.*")
    with caplog.at_level(logging.WARNING, "taskckpt"):
        for number in range(3):
            attempt.save_sync(PAYLOAD + b"%d" % number)
        assert site.view().load_bytes_sync() == PAYLOAD + b"2"
        attempt.clear_sync()
    assert site.view().load_bytes_sync() is None
    if fault != "body cut":  # a reply without a body has none to cut
        warned = [record for record in caplog.records if "could not be deleted" in record.message]
        assert len(warned) == 1, "once is enough"
    assert site.proxy.count()["DELETE data"] > 0
    site.proxy.heal()
    attempt.save_sync(b"on")
    assert site.view().load_bytes_sync() == b"on"


# --- who may do what ---------------------------------------------------------------------------


def test_who_may_only_read_gets_the_state(site, caplog):
    owner = site.next_attempt()
    owner.save_sync(PAYLOAD)
    attempt = site.checkpoint()
    site.proxy.fault(answer(403, "AccessDenied"), "CREATE.*|PUT.*")
    with caplog.at_level(logging.WARNING, "taskckpt"):
        assert attempt.load_bytes_sync() == PAYLOAD
    assert "saving will fail" in caplog.text
    for data in (b"x", PAYLOAD):
        with pytest.raises(DeniedError):
            attempt.save_sync(data)
    owner.save_sync(b"nobody was fenced")
    assert site.view().load_bytes_sync() == b"nobody was fenced"


def test_who_may_not_list_is_denied_and_not_told_that_nothing_is_there(site):
    site.next_attempt().save_sync(b"one")
    site.proxy.fault(answer(403, "AccessDenied"), "LIST.*")
    for call in (
        lambda: site.checkpoint().load_sync(),
        lambda: site.checkpoint().load_bytes_sync(),
        lambda: site.checkpoint().prev_exists(),
        lambda: site.checkpoint(read_only=True).load_sync(),
        lambda: site.checkpoint().save_sync(b"x"),
        lambda: site.checkpoint().clear_sync(),
        lambda: Checkpoint.of(key="x", base=site.url, storage_options=site.proxy.options),
    ):
        with pytest.raises(DeniedError, match="ListBucket"):
            call()
    assert site.view().load_bytes_sync() == b"one"


def every_call(url, options, **arguments):
    arguments = {"timeout_s": TIMEOUT_S, **arguments}
    yield lambda: Checkpoint(url, storage_options=options, **arguments).load_sync()
    yield lambda: Checkpoint(url, storage_options=options, **arguments).save_sync(b"x")
    yield lambda: Checkpoint(url, storage_options=options, **arguments).save_sync(PAYLOAD)
    yield lambda: Checkpoint(url, storage_options=options, **arguments).prev_exists()
    yield lambda: Checkpoint(url, storage_options=options, **arguments).clear_sync()
    yield lambda: Checkpoint(url, storage_options=options, read_only=True, **arguments).load_bytes_sync()


def test_a_misspelt_bucket_is_not_found_and_named(s3_server):
    watch = Stopwatch()
    for call in every_call("s3://no-such-bucket-here/run/task", s3_server.storage_options):
        with pytest.raises(NotFoundError, match="bucket") as caught:
            call()
        assert "no-such-bucket-here" in str(caught.value)
    assert watch() < 10


@once
def test_a_misspelt_bucket_at_src_is_not_found_and_named(s3_server, s3_bucket):
    options = s3_server.storage_options
    with pytest.raises(NotFoundError, match="no-such-bucket-here"):
        Checkpoint(f"s3://{s3_bucket}/task", "s3://no-such-bucket-here/x", storage_options=options).load_sync()


def test_wrong_credentials_are_denied(seaweedfs, new_bucket):
    url = f"s3://{new_bucket(seaweedfs)}/task"
    Checkpoint(url, storage_options=seaweedfs.storage_options).save_sync(b"one")
    for stranger in (replace(seaweedfs, secret="wrong"), replace(seaweedfs, key="nobody")):
        for call in every_call(url, stranger.storage_options):
            with pytest.raises(DeniedError) as caught:
                call()
            assert url in str(caught.value)
    assert Checkpoint(url, storage_options=seaweedfs.storage_options).load_bytes_sync() == b"one"


def test_no_credentials_at_all_are_denied_quickly(seaweedfs, new_bucket, monkeypatch):
    url = f"s3://{new_bucket(seaweedfs)}/task"
    # As on a machine of no cloud, where the address of the metadata service leads nowhere.
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    with silent_port() as port:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{port}")
        options = {"endpoint_url": seaweedfs.endpoint_url, "client_kwargs": {"region_name": "us-east-1"}}
        for call in list(every_call(url, options, timeout_s=30))[:2]:
            watch = Stopwatch()
            with pytest.raises(DeniedError, match="credentials"):
                call()
            assert watch() < 5


def test_a_profile_that_is_not_there_is_a_typed_error(moto):
    options = {**moto.storage_options, "profile": "no-such-profile"}
    del options["key"], options["secret"]
    with pytest.raises(DeniedError, match="no-such-profile"):
        Checkpoint("s3://some-bucket/task", storage_options=options).load_sync()


# --- the server goes ---------------------------------------------------------------------------


def test_nobody_listens(moto):
    options = {**moto.storage_options, "endpoint_url": f"http://127.0.0.1:{closed_port()}"}
    for call in every_call("s3://some-bucket/task", options):
        watch = Stopwatch()
        with pytest.raises(UnavailableError, match="endpoint"):
            call()
        assert watch() < DEADLINE_S


def test_a_host_that_does_not_exist(moto):
    options = {**moto.storage_options, "endpoint_url": "http://no-such-host.invalid"}
    with pytest.raises(UnavailableError):
        Checkpoint("s3://some-bucket/task", storage_options=options, timeout_s=TIMEOUT_S).load_sync()


def test_a_server_that_is_paused_and_then_killed_in_the_middle():
    with servers.moto() as server:
        server.create_bucket("here")
        attempt = Checkpoint("s3://here/task", storage_options=server.storage_options, timeout_s=TIMEOUT_S)
        attempt.save_sync(PAYLOAD)
        os.kill(server.pid, signal.SIGSTOP)
        watch = Stopwatch()
        with pytest.raises(UnavailableError):
            attempt.load_sync()
        with pytest.raises(UnavailableError):
            attempt.save_sync(b"two")
        assert watch() < 2 * DEADLINE_S
        os.kill(server.pid, signal.SIGCONT)
        attempt.save_sync(b"three")
        assert attempt.load_bytes_sync() == b"three"
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError):
            attempt.load_sync()
        with pytest.raises(UnavailableError):
            attempt.save_sync(b"four")


def test_a_server_that_comes_back(real_site):
    attempt = real_site.checkpoint()
    attempt.save_sync(PAYLOAD)
    real_site.proxy.fault(p.drop, ".*")
    for call in (attempt.load_sync, lambda: attempt.save_sync(b"x"), attempt.prev_exists, attempt.clear_sync):
        with pytest.raises(UnavailableError):
            call()
    real_site.proxy.heal()
    assert attempt.load_bytes_sync() == PAYLOAD
    attempt.save_sync(b"two")
    assert real_site.view().load_bytes_sync() == b"two"


# --- a store without If-None-Match -------------------------------------------------------------


def commits(site):
    view = site.view()
    reader = view._attempt._origin(view._attempt.open_store()).reader
    listing = reader.look()
    found = [record for slot in listing.slots for record in reader.read_slot(listing, slot)]
    return [record.stored.inline for record in found if isinstance(record, Commit)]


@once
def test_a_store_that_overwrites_is_noticed_loudly_and_loses_nothing(site):
    site.proxy.fault(p.without_condition, "CREATE.*")
    first = site.checkpoint(keep=None)
    with pytest.warns(TaskckptWarning, match="overwrites"):
        first.save_sync(b"first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.save_sync(b"again")
    assert first.load_bytes_sync() == b"again"
    second = site.checkpoint(keep=None)
    with pytest.warns(TaskckptWarning, match="overwrites"):
        assert second.load_bytes_sync() == b"again"
    acknowledged = [b"first", b"again"]
    for number in range(3):
        for name, attempt in ((b"old", first), (b"new", second)):
            try:
                attempt.save_sync(name + b"%d" % number)
            except StaleAttemptError:
                assert attempt is first, "the newer attempt wins"
            else:
                acknowledged.append(name + b"%d" % number)
    assert set(acknowledged) <= set(commits(site)), "nothing that was acknowledged is overwritten"
    assert {b"new0", b"new1", b"new2"} <= set(acknowledged)
    with pytest.warns(TaskckptWarning):
        assert site.checkpoint().load_bytes_sync() == b"new2"
    assert site.view().load_bytes_sync() == b"new2"


# --- how many requests -------------------------------------------------------------------------

# What each operation costs, for all to see; a change of these numbers is a change of the package.
COSTS = {
    "load, nothing there": {"LIST log": 2, "CREATE log": 2},
    "first save after that load": {"CREATE log": 1},
    "small save": {"CREATE log": 1},
    "save of a payload": {"PUT data": 1, "CREATE log": 1},
    "save of two parts": {"BEGIN data": 1, "PART data": 2, "COMPLETE data": 1, "CREATE log": 1},
    "load of what it saved itself": {"LIST log": 1},
    "read-only load, small": {"LIST log": 1, "GET log": 1},
    "read-only load, a payload": {"LIST log": 1, "GET log": 1, "GET data": 1},
    "prev_exists": {"LIST log": 1, "GET log": 1},
}


def test_the_requests_of_each_operation(site, transfer):
    proxy, measured = site.proxy, {}

    def measure(name, call):
        proxy.heal()
        call()
        measured[name] = dict(proxy.count())

    attempt = site.checkpoint(keep=None)
    measure("load, nothing there", attempt.load_sync)
    measure("first save after that load", lambda: attempt.save_sync(b"1"))
    measure("small save", lambda: attempt.save_sync(b"2"))
    measure("read-only load, small", site.checkpoint(read_only=True).load_sync)
    measure("prev_exists", site.checkpoint().prev_exists)
    measure("load of what it saved itself", attempt.load_sync)
    measure("save of a payload", lambda: attempt.save_sync(PAYLOAD))
    measure("read-only load, a payload", site.checkpoint(read_only=True).load_sync)
    measure("save of two parts", lambda: attempt.save_sync(LARGE))
    later = site.checkpoint()
    measure("next attempt: load", later.load_sync)
    measure("next attempt: first save", lambda: later.save_sync(b"3"))
    measure("next attempt: second save", lambda: later.save_sync(b"4"))
    measure("clear", later.clear_sync)
    for name, cost in measured.items():
        print(f"{name:32} {sum(cost.values()):3}  {cost}")
    costs = dict(COSTS)
    if transfer == "obstore":
        # It cannot tell an empty listing from a web page: the bucket is looked at once more, in the raw.
        costs["load, nothing there"] = {**COSTS["load, nothing there"], "LIST": 1}
    assert {name: measured[name] for name in costs} == costs
    assert sum(measured["next attempt: load"].values()) <= 12
    assert sum(measured["next attempt: first save"].values()) <= 8
    assert measured["next attempt: second save"]["CREATE log"] == 1
    assert sum(measured["clear"].values()) <= 6


@once
def test_a_load_costs_the_same_after_many_saves(site):
    attempt = site.checkpoint()
    costs = []
    for number in range(150):
        attempt.save_sync(b"%d" % number)
        if number in (5, 149):
            site.proxy.heal()
            site.checkpoint(read_only=True).load_sync()
            costs.append(site.proxy.count())
    assert costs[0] == costs[1] == {"LIST log": 1, "GET log": 1}
