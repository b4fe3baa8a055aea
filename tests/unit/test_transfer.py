"""Which way bytes go to a bucket: s3fs or obstore, with the same options, credentials and errors; also after a fork."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from taskckpt import Checkpoint
from taskckpt._operation import Stop
from taskckpt._stores import obstore as _obstore
from taskckpt._stores import open_store, parse
from taskckpt._stores.obstore import ObstoreStore
from taskckpt._stores.obstore_options import s3_settings
from taskckpt._stores.s3 import S3Store
from taskckpt.errors import DeniedError, MissingDependencyError, NotFoundError, UnavailableError, UsageError
from taskckpt.testing import instant_retries
from tests.faults.proxy import Reply, proxy_of

ROOT = Path(__file__).parent.parent.parent
KEYS = {"key": "k", "secret": "s"}


def opened(url="s3://some-bucket/task", timeout_s=20, **options):
    return open_store(parse(url), storage_options=options, timeout_s=timeout_s)


def settings(url="s3://some-bucket/task", **options):
    return s3_settings(parse(url), options)


@pytest.fixture
def bucket(moto, new_bucket):
    return new_bucket(moto)


# --- the choice --------------------------------------------------------------------------------


def test_obstore_is_taken_where_it_is_installed():
    store = opened(**KEYS)
    assert isinstance(store, ObstoreStore)
    assert store.elsewhere() is None
    assert isinstance(opened("s3a://some-bucket/task"), ObstoreStore)


def test_a_variable_forces_one(monkeypatch):
    monkeypatch.setenv("TASKCKPT_TRANSFER", "fsspec")
    assert isinstance(opened(), S3Store)
    monkeypatch.setenv("TASKCKPT_TRANSFER", "obstore")
    assert isinstance(opened(), ObstoreStore)
    monkeypatch.setenv("TASKCKPT_TRANSFER", "Obstore")
    with pytest.raises(UsageError, match=r"'Obstore'.*fsspec or obstore"):
        opened()


def test_obstore_that_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isinstance(opened(), S3Store)
    monkeypatch.setenv("TASKCKPT_TRANSFER", "obstore")
    with pytest.raises(MissingDependencyError, match=r"taskckpt\[fast\]"):
        opened()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"session": object()}, "session"),
        ({"s3_additional_kwargs": {"ACL": "private"}}, "s3_additional_kwargs"),
        ({"version_aware": True}, "version_aware"),
        ({"client_kwargs": {"api_version": "2006-03-01"}}, r"client_kwargs\['api_version'\]"),
        ({"config_kwargs": {"proxies": {"https": "x"}}}, r"config_kwargs\['proxies'\]"),
        ({"config_kwargs": {"s3": {"use_accelerate_endpoint": True}}}, "use_accelerate_endpoint"),
        ({"no_such_option": 1}, "no_such_option"),
    ],
)
def test_what_obstore_does_not_know_goes_through_s3fs(options, name, monkeypatch, caplog):
    with caplog.at_level(logging.DEBUG, "taskckpt"):
        assert isinstance(opened(**KEYS, **options).elsewhere(), S3Store)
    assert any(record.levelno == logging.DEBUG and "does not know" in record.message for record in caplog.records)
    monkeypatch.setenv("TASKCKPT_TRANSFER", "obstore")
    with pytest.raises(UsageError, match=f"does not know.*{name}"):
        opened(**KEYS, **options).list_below("")


def test_what_obstore_does_not_know_of_the_environment_and_the_bucket(monkeypatch):
    assert settings("s3://bucket--use1-az4--x-s3/task", **KEYS).unhonoured == ["the bucket's name"]
    assert settings("s3://arn:aws:s3:us-east-1:1:accesspoint/x", **KEYS).unhonoured == ["the bucket's name"]
    monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", "true")
    assert settings(**KEYS).unhonoured == ["AWS_USE_FIPS_ENDPOINT"]


def test_what_means_nothing_here_is_passed_over():
    options = {"use_listings_cache": True, "default_block_size": 1, "max_concurrency": 3, "requester_pays": False}
    assert not settings(**KEYS, **options, config_kwargs={"max_pool_connections": 3}).unhonoured


# --- options -----------------------------------------------------------------------------------


def test_where_a_bucket_answers():
    def where(url="s3://some-bucket/task", **options):
        found = settings(url, **KEYS, **options)
        return found.config["endpoint"], found.config["virtual_hosted_style_request"]

    def style(name):
        return {"config_kwargs": {"s3": {"addressing_style": name}}}

    def region(name):
        return {"client_kwargs": {"region_name": name}}

    assert where() == ("https://some-bucket.s3.us-east-1.amazonaws.com", True)
    assert where(**region("eu-west-1")) == ("https://some-bucket.s3.eu-west-1.amazonaws.com", True)
    assert where(**region("cn-north-1")) == ("https://some-bucket.s3.cn-north-1.amazonaws.com.cn", True)
    assert where(use_ssl=False) == ("http://some-bucket.s3.us-east-1.amazonaws.com", True)
    assert where("s3://with.dots/task") == ("https://s3.us-east-1.amazonaws.com", False)
    assert where(**style("path")) == ("https://s3.us-east-1.amazonaws.com", False)
    assert where(endpoint_url="http://host:1/") == ("http://host:1", False)
    assert where(client_kwargs={"endpoint_url": "http://a:1"}, endpoint_url="http://b:2") == ("http://a:1", False)
    assert where(endpoint_url="https://host", **style("virtual")) == ("https://some-bucket.host", True)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9", "no url", "http://", "http://a b", "ftp://host"])
def test_an_address_that_is_none_is_a_usage_error(endpoint):
    with pytest.raises(UsageError, match="storage_options"):
        opened(**KEYS, endpoint_url=endpoint).list_below("")
    with pytest.raises(UsageError, match="region_name"):
        opened(**KEYS, client_kwargs={"region_name": "a region"}).list_below("")


def test_keys_are_taken_as_s3fs_takes_them(monkeypatch):
    def keys(**options):
        found = settings(**options).credentials()
        return found["access_key_id"], found["secret_access_key"], found["token"]

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "env-k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "env-s")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "env-t")
    assert keys() == ("env-k", "env-s", "env-t")
    assert keys(key="k", secret="s") == ("k", "s", None), "a token belongs to its key"
    assert keys(username="k", password="s", token="t") == ("k", "s", "t")
    client = {"aws_access_key_id": "ck", "aws_secret_access_key": "cs", "aws_session_token": "ct"}
    assert keys(key="k", secret="s", client_kwargs=client) == ("ck", "cs", "ct")
    assert settings(anon=True).credentials is None
    assert settings(anon=True).config["skip_signature"]


def test_payloads_are_signed_where_nothing_else_protects_them():
    assert settings(**KEYS).config["unsigned_payload"]
    assert not settings(**KEYS, endpoint_url="http://host").config["unsigned_payload"]
    signed = {"config_kwargs": {"s3": {"payload_signing_enabled": True}}}
    assert not settings(**KEYS, **signed).config["unsigned_payload"]


def test_certificates(tmp_path, monkeypatch):
    def trust(**options):
        return settings(**KEYS, **options).client

    (tmp_path / "ca.pem").write_bytes(b"some certificates")
    assert trust() == {}
    assert trust(client_kwargs={"verify": False}) == {"allow_invalid_certificates": True}
    assert trust(client_kwargs={"verify": f"{tmp_path}/ca.pem"}) == {"root_certificate": b"some certificates"}
    monkeypatch.setenv("AWS_CA_BUNDLE", f"{tmp_path}/ca.pem")
    assert trust() == {"root_certificate": b"some certificates"}
    assert trust(endpoint_url="http://host") == {}
    with pytest.raises(UsageError, match="certificates"):
        trust(client_kwargs={"verify": "/no/such/file"})


# --- credentials, against a server that checks them --------------------------------------------

CONFIG = """
[default]
region = eu-west-3
[profile other]
region = us-east-1
endpoint_url = {endpoint}
s3 =
    addressing_style = path
[profile quick]
s3 =
    use_accelerate_endpoint = true
"""
CREDENTIALS = """
[default]
aws_access_key_id = nobody
aws_secret_access_key = wrong
[other]
aws_access_key_id = {key}
aws_secret_access_key = {secret}
"""


@pytest.fixture
def home(seaweedfs, tmp_path, monkeypatch):
    """A home with the files of AWS; SeaweedFS lets only the profile ``other`` in."""
    folder = tmp_path / ".aws"
    folder.mkdir()
    (folder / "config").write_text(CONFIG.format(endpoint=seaweedfs.endpoint_url))
    (folder / "credentials").write_text(CREDENTIALS.format(key=seaweedfs.key, secret=seaweedfs.secret))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_CONFIG_FILE")
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE")
    return tmp_path


@pytest.fixture
def place(seaweedfs, new_bucket):
    return f"s3://{new_bucket(seaweedfs)}/task"


@pytest.fixture(params=["fsspec", "obstore"])
def _either(request, monkeypatch):
    monkeypatch.setenv("TASKCKPT_TRANSFER", request.param)


@pytest.mark.usefixtures("home", "_either")
def test_a_profile_is_found(place, monkeypatch):
    Checkpoint(place, storage_options={"profile": "other"}).save_sync(b"one")
    with pytest.raises(DeniedError):
        Checkpoint(place, storage_options={"profile": "other", "key": "nobody", "secret": "x"}).load_sync()
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert Checkpoint(place).load_bytes_sync() == b"one"
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(DeniedError, match="no-such-profile"):
        Checkpoint(place).load_sync()


@pytest.mark.usefixtures("home", "_either")
def test_keys_without_a_place_get_it_from_the_files(place, seaweedfs, monkeypatch):
    options = {"key": seaweedfs.key, "secret": seaweedfs.secret}
    monkeypatch.setenv("AWS_PROFILE", "other")
    Checkpoint(place, storage_options=options).save_sync(b"one")
    assert Checkpoint(place, storage_options=options).load_bytes_sync() == b"one"


@pytest.mark.usefixtures("home")
def test_a_profile_with_what_obstore_does_not_know_goes_through_s3fs():
    assert settings(profile="quick").unhonoured == ["s3.use_accelerate_endpoint"]


@pytest.mark.usefixtures("_either")
def test_the_variables_are_found(place, seaweedfs, monkeypatch):
    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)
    Checkpoint(place).save_sync(b"one")
    assert Checkpoint(place).load_bytes_sync() == b"one"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", seaweedfs.endpoint_url)
    assert Checkpoint(place).load_bytes_sync() == b"one"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DeniedError):
        Checkpoint(place).load_sync()


def test_credentials_that_expire_are_asked_for_again(tmp_path, monkeypatch, place, seaweedfs):
    """Through a process that gives them, as botocore's ``credential_process`` does; the second ones are right."""
    script = tmp_path / "give.py"
    script.write_text(
        textwrap.dedent(f"""
        import datetime, json, pathlib
        count = pathlib.Path({str(tmp_path / "count")!r})
        count.write_text(count.read_text() + "x" if count.exists() else "x")
        ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)  # so botocore renews them at once
        print(json.dumps({{"Version": 1, "AccessKeyId": {seaweedfs.key!r}, "SecretAccessKey": {seaweedfs.secret!r},
                           "Expiration": ends.isoformat()}}))
        """)
    )
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {sys.executable} {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("TASKCKPT_TRANSFER", "obstore")
    credentials = settings("s3://some-bucket/x").credentials
    first, second = credentials(), credentials()
    assert first["access_key_id"] == second["access_key_id"] == seaweedfs.key
    assert second["expires_at"] >= first["expires_at"]
    assert len((tmp_path / "count").read_text()) >= 2
    options = {"endpoint_url": seaweedfs.endpoint_url}
    Checkpoint(place, storage_options=options).save_sync(b"one")
    assert Checkpoint(place, storage_options=options).load_bytes_sync() == b"one"


def test_plain_keys_need_neither_botocore_nor_fsspec(moto, bucket):
    """So the first use costs what obstore costs."""
    code = f"""
    import sys, taskckpt
    options = {dict(moto.storage_options)!r}
    place = taskckpt.Checkpoint("s3://{bucket}/task", storage_options=options)
    assert place.load_sync() is None
    place.save_sync(b"one")
    reader = taskckpt.Checkpoint("s3://{bucket}/task", storage_options=options, read_only=True)
    assert reader.load_bytes_sync() == b"one"
    assert "obstore" in sys.modules
    print(sorted({{"botocore", "boto3", "s3fs", "fsspec", "aiohttp"}} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


# --- the bucket and its region -----------------------------------------------------------------


def test_a_bucket_in_another_region_is_found(moto, bucket):
    def signed_elsewhere(proxy, request, connection):
        text = dict(request.headers).get("authorization", "")
        if "/eu-west-3/" in text:
            return proxy.forward(request)
        if request.method == "HEAD":
            return Reply(400, "Bad Request", [("x-amz-bucket-region", "eu-west-3")], b"")
        body = b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>wrong region</Message></Error>"
        return Reply(400, "Bad Request", [("Content-Type", "application/xml")], body)

    with proxy_of(moto) as proxy:
        proxy.fault(signed_elsewhere, ".*")
        store = opened(f"s3://{bucket}/task", **proxy.options)
        assert store.list_below("").complete
        assert proxy.count()["HEAD-BUCKET"] == 1
        store.create("log/1", b"1", Stop())
        assert store.read("log/1") == b"1"
        assert proxy.count()["HEAD-BUCKET"] == 1, "it is remembered"


def page_of(keys, more):
    """The answer to a listing."""
    token = "<NextContinuationToken>t</NextContinuationToken>" if more else ""
    entries = "".join(
        f"<Contents><Key>{key}</Key><Size>1</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        for key in keys
    )
    body = f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{entries}</ListBucketResult>"
    return Reply(200, "OK", [("Content-Type", "application/xml")], body.encode())


PORTAL = Reply(200, "OK", [("Content-Type", "text/html")], b"<html>Please log in to the hotel's network</html>")
REFUSAL = Reply(403, "Forbidden", [], b"<Error><Code>AccessDenied</Code><Message>not all of it</Message></Error>")
RAW = page_of([], more=False)
THOUSAND = page_of((f"task/log/{number:06d}" for number in range(1000)), more=True)


@pytest.mark.parametrize(
    ("first", "last", "raw", "expected"),
    [
        (None, RAW, RAW, 0),
        (None, RAW, REFUSAL, 0),  # who may list below a prefix only
        (None, PORTAL, PORTAL, None),
        (THOUSAND, RAW, RAW, 1000),
        (THOUSAND, PORTAL, PORTAL, None),
        (THOUSAND, page_of(["task/log/1"], more=False), PORTAL, 1001),
    ],
)
def test_a_web_page_is_no_listing_and_no_end_of_one(moto, first, last, raw, expected):
    def reply(proxy, request, connection):
        if "list-type" not in request.target:
            return raw
        return last if first is None or "continuation-token" in request.target else first

    with proxy_of(moto) as proxy, instant_retries():
        proxy.fault(reply, "LIST.*")
        store = opened("s3://some-bucket/task", **proxy.options)
        if expected is None:
            with pytest.raises(UnavailableError, match="no listing"):
                store.list_below("log")
            return
        assert len(store.list_below("log").names) == expected
        if expected:
            proxy.heal()
            proxy.fault(reply, "LIST.*")
            assert not store.list_below("log", first_page=True).complete
            assert sum(proxy.count().values()) == 1


def test_a_delete_that_is_refused_is_not_tried_again(moto, bucket):
    body = (
        b"<DeleteResult><Error><Key>task/a</Key><Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>"
    )
    with proxy_of(moto) as proxy:
        proxy.fault(lambda *_: Reply(200, "OK", [], body), "DELETE.*")
        with pytest.raises(DeniedError, match="AccessDenied"):
            opened(f"s3://{bucket}/task", **proxy.options).delete(["a", "b"])
        assert sum(proxy.count().values()) == 1


def test_size_tells_a_missing_bucket_from_a_missing_key(moto, bucket):
    assert opened(f"s3://{bucket}/task", **moto.storage_options).size("log/1") is None
    with pytest.raises(NotFoundError, match="bucket"):
        opened("s3://no-such-bucket-here/task", **moto.storage_options).size("log/1")


# --- sweeping ----------------------------------------------------------------------------------


def test_who_sweeps_without_s3fs_is_said_once(moto, bucket, monkeypatch, caplog):
    store = opened(f"s3://{bucket}/task", **moto.storage_options)
    assert store.elsewhere() is None
    _obstore._say_who_sweeps.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, "taskckpt"):
        store.sweep(lambda key: True)
        store.sweep(lambda key: True)
    assert len([record for record in caplog.records if "lifecycle" in record.message]) == 1


# --- forks -------------------------------------------------------------------------------------

FORKS = """
import multiprocessing, os, signal, sys, threading
import taskckpt
from taskckpt._stores.obstore import ObstoreStore
signal.alarm(15)  # a child that hangs is killed, and its parent too
os.register_at_fork(after_in_child=lambda: signal.alarm(10))
options, bucket, how = {options!r}, {bucket!r}, sys.argv[1]

def save(place, number):
    place.save_sync(b"%d" % number)

def read(name):
    return taskckpt.Checkpoint(f"s3://{{bucket}}/{{name}}", storage_options=options, read_only=True).load_bytes_sync()

def in_a_child(function, *arguments):
    if how == "multiprocessing":
        child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
        child.start()
        child.join()
        return child.exitcode
    pid = os.fork()
    if not pid:
        function(*arguments)
        sys.exit(0)  # the interpreter ends as always: whatever it frees must not disturb the parent
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def forking(moto, bucket, how, code):
    code = FORKS.format(options=dict(moto.storage_options), bucket=bucket) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, how], capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


HOW = pytest.mark.parametrize("how", ["os.fork", "multiprocessing"])


@HOW
def test_a_child_and_its_parent_both_go_on(moto, bucket, how):
    """A checkpoint that was used before the fork, one that was made and not used, and one of the child's own."""
    code = """
    used = taskckpt.Checkpoint(f"s3://{bucket}/used", storage_options=options)
    made = taskckpt.Checkpoint(f"s3://{bucket}/made", storage_options=options)
    used.save_sync(b"0")
    busy = taskckpt.Checkpoint(f"s3://{bucket}/busy", storage_options=options)
    thread = threading.Thread(target=lambda: [save(busy, n) for n in range(30)])
    thread.start()
    for number in range(1, 6, 2):
        assert in_a_child(save, used, number) == 0
        assert read("used") == b"%d" % number
        save(used, number + 1)
        assert read("used") == b"%d" % (number + 1)
    assert in_a_child(save, made, 7) == 0
    assert read("made") == b"7"
    assert in_a_child(lambda: save(taskckpt.Checkpoint(f"s3://{bucket}/own", storage_options=options), 8)) == 0
    assert read("own") == b"8"
    thread.join()
    assert read("busy") == b"29"
    assert in_a_child(lambda: in_a_child(lambda: print("s3fs" in sys.modules, flush=True))) == 0
    """
    assert forking(moto, bucket, how, code) == ["False"]


@HOW
def test_a_child_that_forks_before_anything_uses_obstore(moto, bucket, how):
    code = """
    made = taskckpt.Checkpoint(f"s3://{bucket}/made", storage_options=options)
    def child():
        save(made, 1)
        print("obstore" in sys.modules, "s3fs" in sys.modules, flush=True)
    assert in_a_child(child) == 0
    assert read("made") == b"1"
    """
    assert forking(moto, bucket, how, code) == ["True", "False"]


@HOW
def test_a_child_without_s3fs_is_told_what_to_do(moto, bucket, how):
    code = """
    import importlib.util
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name: None if name == "s3fs" else real(name)
    used = taskckpt.Checkpoint(f"s3://{bucket}/used", storage_options=options)
    used.save_sync(b"0")
    def child():
        try:
            used.load_sync()
        except taskckpt.errors.UsageError as error:
            assert "spawn" in error.hint and "taskckpt[s3]" in error.hint, error
            print(error.code, flush=True)
    assert in_a_child(child) == 0
    used.save_sync(b"1")
    assert read("used") == b"1"
    """
    assert forking(moto, bucket, how, code) == ["missing-dependency"]


def test_spawned_children_use_obstore(moto, bucket):
    place = f"s3://{bucket}/task"
    Checkpoint(place, storage_options=moto.storage_options).save_sync(b"0")
    child = multiprocessing.get_context("spawn").Process(target=_load_in_a_child, args=(place, moto.storage_options))
    child.start()
    child.join()
    assert child.exitcode == 0


def _load_in_a_child(place, options):
    assert Checkpoint(place, storage_options=options).load_bytes_sync() == b"0"
    assert not _obstore._inherited
    assert "s3fs" not in sys.modules
