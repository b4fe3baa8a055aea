"""What Google Cloud Storage and Azure may answer beside the truth, and what comes of it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest

from taskckpt import Checkpoint
from taskckpt._operation import Stop
from taskckpt._stores import gcs as _gcs
from taskckpt._stores import open_store, parse
from taskckpt.errors import (
    AlreadyExistsError,
    DeniedError,
    NotFoundError,
    TaskckptError,
    UnavailableError,
    UsageError,
)
from taskckpt.testing import instant_retries


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple's, never changed


class Server:
    """Gives the answers of a script, the last one for ever, and keeps what it was asked.

    An answer with status 0 is no HTTP.
    """

    def __init__(self) -> None:
        self.script: list[Answer] = []
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.asked.append((self.command, self.path, dict(self.headers), body))
                answer = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                if not answer.status:
                    self.wfile.write(answer.body)
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any  # noqa: N815 - http.server's names

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


@pytest.fixture
def scripted():
    with Server().running() as server, instant_retries():
        yield server


def opened(transfer, url, options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKCKPT_TRANSFER", transfer)
        return open_store(parse(url), storage_options=options, timeout_s=5)


def gcs(url):
    return opened("fsspec", "gs://bucket/task", {"token": "anon", "endpoint_url": url})


def gcs_obstore(url):
    return opened("obstore", "gs://bucket/task", {"token": "not looked at", "endpoint_url": url})


def azure(url, transfer="fsspec"):
    account = f"AccountName=a;AccountKey=a2V5;BlobEndpoint={url}/a;DefaultEndpointsProtocol=http;"
    return opened(transfer, "az://bucket/task", {"connection_string": account})


def azure_obstore(url):
    return azure(url, "obstore")


ALL = [gcs, gcs_obstore, azure, azure_obstore]


def verbs(store):
    return [
        lambda: store.list_below("log"),
        lambda: store.read("log/1"),
        lambda: store.size("log/1"),
        lambda: list(store.stream("log/1", 3, Stop())),
        lambda: store.create("log/1", b"data", Stop()),
        lambda: store.write("data/1", [b"data"], 4, Stop()),
        lambda: store.delete(["data/1"]),
    ]


@pytest.mark.parametrize(
    ("status", "tries", "error"),
    [
        (400, 1, UsageError),
        (401, 1, DeniedError),
        (403, 1, DeniedError),
        (429, 5, UnavailableError),
        (500, 5, UnavailableError),
        (503, 5, UnavailableError),
    ],
)
@pytest.mark.parametrize("cloud", ALL)
def test_every_verb_tells_what_the_store_says(cloud, status, tries, error, scripted):
    body = json.dumps({"error": {"code": status, "message": "this and that"}}).encode()
    scripted.script = [Answer(status, body, {"Content-Type": "application/json"})]
    store = cloud(scripted.url)
    for verb in verbs(store):
        scripted.asked.clear()
        with pytest.raises(error) as caught:
            verb()
        assert (caught.value.uri or "").startswith(store.uri)
        assert len(scripted.asked) == tries, "one layer tries again, not two"


@pytest.mark.parametrize("body", [b"", b"<html>Welcome to our network</html>", b"{}", b"[]"])
@pytest.mark.parametrize("cloud", ALL)
def test_any_web_page_is_no_empty_listing(cloud, body, scripted):
    scripted.script = [Answer(200, body, {"Content-Type": "text/html"})]
    with pytest.raises(TaskckptError):
        cloud(scripted.url).list_below("log")
    with pytest.raises(TaskckptError):
        cloud(scripted.url).list_below("log", first_page=True)


@pytest.mark.parametrize("cloud", ALL)
def test_nobody_there(cloud):
    for verb in verbs(cloud("http://127.0.0.1:1")):
        with instant_retries(), pytest.raises(UnavailableError):
            verb()


GARBAGE = b"garbage\r\n\r\n"
CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncut"


@pytest.mark.parametrize(
    ("cloud", "body"),
    [
        *((gcs, body) for body in (b"", GARBAGE, CUT)),
        (azure, GARBAGE),
        *((cloud, body) for cloud in (gcs_obstore, azure_obstore) for body in (b"", GARBAGE)),
    ],
)
def test_a_reply_that_is_no_http_or_cut_may_pass(cloud, body, scripted):
    scripted.script = [Answer(0, body)]
    with pytest.raises(UnavailableError):
        cloud(scripted.url).read("log/1")
    assert len(scripted.asked) >= 5


# --- the servers' own words ----------------------------------------------------------------------


@pytest.fixture(params=["fsspec", "obstore"])
def transfer(request, monkeypatch):
    monkeypatch.setenv("TASKCKPT_TRANSFER", request.param)
    return request.param


@pytest.mark.parametrize(("name", "protocol"), [("fake_gcs", "gs"), ("azurite", "az")])
def test_a_bucket_that_is_not_there_is_no_empty_one(name, protocol, request):
    server = request.getfixturevalue(name)
    for read_only in (True, False):
        url = f"{protocol}://no-such-bucket/x"
        with pytest.raises(NotFoundError, match="no such bucket"):
            Checkpoint(url, storage_options=server.storage_options, read_only=read_only).load_sync()
    store = open_store(parse(url), storage_options=server.storage_options, timeout_s=5)
    with pytest.raises(NotFoundError, match="no such bucket"):
        store.size("x")


@pytest.mark.parametrize(("name", "protocol"), [("fake_gcs", "gs"), ("azurite", "az")])
def test_an_object_that_is_not_there_is_no_missing_bucket(name, protocol, request, new_bucket):
    server = request.getfixturevalue(name)
    bucket = f"bucket-{new_bucket(server)}"
    server.create_bucket(bucket)
    store = open_store(parse(f"{protocol}://{bucket}/x"), storage_options=server.storage_options, timeout_s=5)
    with pytest.raises(NotFoundError, match="No such object"):
        store.read("log/1")
    server.delete_bucket(bucket)


def test_a_wrong_key_is_refused(azurite, new_bucket, transfer):
    bucket = new_bucket(azurite)
    azurite.put(bucket, "task/log/x", b"x")
    wrong = replace(azurite, key="d3Jvbmc=")
    for verb in verbs(open_store(parse(f"az://{bucket}/task"), storage_options=wrong.storage_options, timeout_s=5)):
        with pytest.raises(DeniedError):
            verb()


def test_options_that_name_no_account(transfer):
    for options in ({}, {"acount_name": "a"}, {"account_key": "a2V5"}, {"connection_string": "nonsense"}):
        with pytest.raises(UsageError):
            Checkpoint("az://bucket/x", storage_options={"anon": True, **options}).load_sync()


def test_the_ways_into_azure(azurite, new_bucket, monkeypatch, transfer):
    bucket = new_bucket(azurite)
    Checkpoint(f"az://{bucket}/task", storage_options=azurite.storage_options).save_sync(b"one")
    signed = (
        f"BlobEndpoint={azurite.endpoint_url}/{azurite.account};SharedAccessSignature={azurite.sas_token};"
        "DefaultEndpointsProtocol=http;"
    )
    for protocol in ("az", "abfs"):
        look = Checkpoint(f"{protocol}://{bucket}/task", storage_options={"connection_string": signed}, read_only=True)
        assert look.load_bytes_sync() == b"one"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azurite.connection_string)
    assert Checkpoint(f"az://{bucket}/task", read_only=True).load_bytes_sync() == b"one"


def test_the_environment_leads_to_an_emulator_of_google(fake_gcs, new_bucket, monkeypatch):
    bucket = new_bucket(fake_gcs)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", fake_gcs.endpoint_url)
    for protocol in ("gs", "gcs"):
        Checkpoint(f"{protocol}://{bucket}/{protocol}").save_sync(b"one")
        assert Checkpoint(f"{protocol}://{bucket}/{protocol}", read_only=True).load_bytes_sync() == b"one"


def test_a_url_may_name_the_account(monkeypatch):
    monkeypatch.setenv("TASKCKPT_TRANSFER", "fsspec")
    location = parse("abfs://bucket@mine.dfs.core.windows.net/task")
    store: Any = open_store(location, storage_options={"account_key": "a2V5"}, timeout_s=5)
    assert store._container.account_name == "mine"
    assert store._container.container_name == "bucket"
    assert store._key("log/1") == "task/log/1"


# --- a lost reply, and an upload that goes on -----------------------------------------------------


@pytest.mark.parametrize("cloud", ALL)
def test_a_taken_key_after_a_lost_reply(cloud, scripted):
    body = b"<?xml version='1.0' encoding='utf-8'?><Error><Code>BlobAlreadyExists</Code><Message>Is.</Message></Error>"
    taken = Answer(409, body, {"x-ms-error-code": "BlobAlreadyExists", "Content-Type": "application/xml"})
    taken = Answer(412) if cloud in (gcs, gcs_obstore) else taken
    scripted.script = [Answer(503), taken]
    with pytest.raises(AlreadyExistsError):
        cloud(scripted.url).create("log/1", b"record", Stop())
    (_, _, _, first), (_, _, _, second) = scripted.asked
    assert first.count(b"record") == second.count(b"record") == 1


DONE = Answer(200, b'{"size": "25"}')


def resumed(server, answers, monkeypatch):
    monkeypatch.setattr(_gcs, "PART_BYTES", 10)
    server.script = [Answer(200, b"", {"Location": f"{server.url}/session"}), *answers]
    gcs(server.url).write("data/1", [b"0123456789abcdefghijABCDE"], 25, Stop())
    return [(method, headers.get("Content-Range"), body) for method, _, headers, body in server.asked[1:]]


def kept(end):
    return Answer(308, b"", {"Range": f"bytes=0-{end - 1}"} if end else {})


WHOLE = [
    ("PUT", "bytes 0-9/*", b"0123456789"),
    ("PUT", "bytes 10-19/*", b"abcdefghij"),
    ("PUT", "bytes 20-24/25", b"ABCDE"),
]


def test_an_upload_in_parts(scripted, monkeypatch):
    assert resumed(scripted, [kept(10), kept(20), DONE], monkeypatch) == WHOLE


def test_a_part_is_sent_again(scripted, monkeypatch):
    sent = resumed(scripted, [kept(10), Answer(503), kept(20), Answer(500), DONE], monkeypatch)
    assert sent == [WHOLE[0], WHOLE[1], WHOLE[1], WHOLE[2], WHOLE[2]]


def test_what_the_server_did_not_keep_is_sent_again(scripted, monkeypatch):
    assert resumed(scripted, [kept(10), kept(14), kept(20), kept(22), DONE], monkeypatch) == [
        *WHOLE[:2],
        ("PUT", "bytes 14-19/*", b"efghij"),
        WHOLE[2],
        ("PUT", "bytes 22-24/25", b"CDE"),
    ]


@pytest.mark.parametrize(
    "answers",
    [
        [kept(0), DONE],
        [kept(10), kept(10), DONE],
        [kept(10), kept(20), kept(25), DONE],
        [kept(10), kept(30), DONE],
        [kept(10), kept(20), Answer(200, b'{"size": "24"}'), DONE],
    ],
    ids=["nothing kept", "no progress", "all kept and no end", "more than was sent", "another size"],
)
def test_an_upload_that_does_not_add_up_is_ended(answers, scripted, monkeypatch):
    with pytest.raises(UnavailableError):
        resumed(scripted, answers, monkeypatch)
    assert scripted.asked[-1][:2] == ("DELETE", "/session")
