"""The benchmarks themselves: their input, their server, their instruments. No time is judged here."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="NOT TESTED: the benchmarks need numpy (pip install numpy)")

from benchmarks import corpora, measure, report
from benchmarks.memory_s3 import memory_s3
from benchmarks.operations import Job

ROOT = Path(__file__).parent.parent
KIB, MIB = 2**10, 2**20


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- corpora -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", "ABCDE")
def test_a_corpus_is_the_same_every_time(name, tmp_path):
    corpora.build(name, tmp_path / "one", fraction=1 / 256)
    corpora.build(name, tmp_path / "other", fraction=1 / 256)
    assert digests(tmp_path / "one") == digests(tmp_path / "other")


def test_corpora_have_the_sizes_that_they_are_said_to_have(tmp_path):
    def sizes(name):
        corpora.build(name, tmp_path / name, fraction=1 / 128)
        return [path.stat().st_size for path in (tmp_path / name).rglob("*") if path.is_file()]

    assert sizes("A") == [MIB] * 8
    assert sizes("B") == [MIB // 2] * 8
    assert len(small := sizes("C")) == 20_000 // 128
    assert min(small) >= KIB
    assert max(small) <= 16 * KIB
    assert sizes("D") == [KIB]
    assert sizes("E") == [8 * MIB]


def test_files_of_a_corpus_differ(tmp_path):
    corpora.build("A", tmp_path / "A", fraction=1 / 256)
    corpora.build("C", tmp_path / "C", fraction=1 / 256)
    for folder in ("A", "C"):
        found = list(digests(tmp_path / folder).values())
        assert len(found) == len(set(found))


# --- the in-memory S3 --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with memory_s3() as running:
        running.create_bucket("b")
        yield running


@pytest.fixture
def fs(server):
    s3fs = pytest.importorskip("s3fs", reason="NOT TESTED: pip install s3fs")
    made = s3fs.S3FileSystem(**server.storage_options, use_listings_cache=False, skip_instance_cache=True)
    yield made
    if left := made.find("b"):
        made.rm(left)


def write_in_parts(fs, path, content):
    with fs.open(path, "wb", block_size=5 * MIB) as file:
        for start in range(0, len(content), MIB):
            file.write(content[start : start + MIB])


def test_small_and_large_objects_come_back(fs):
    large = bytes(range(256)) * (12 * MIB // 256) + b"end"
    fs.pipe_file("b/small", b"\0one")
    fs.pipe_file("b/empty", b"")
    fs.pipe_file("b/in one request", large)
    write_in_parts(fs, "b/in parts", large)
    assert fs.cat_file("b/small") == b"\0one"
    assert fs.cat_file("b/empty") == b""
    assert fs.cat_file("b/in one request") == large
    assert fs.cat_file("b/in parts") == large
    assert fs.info("b/in parts")["size"] == len(large)


def test_ranges_cross_the_borders_of_parts(fs):
    large = bytes(range(251)) * (12 * MIB // 251)
    write_in_parts(fs, "b/in parts", large)
    for start, end in [(0, 1), (MIB - 1, MIB + 1), (5 * MIB - 7, 5 * MIB + 7), (len(large) - 5, None), (-9, None)]:
        assert fs.cat_file("b/in parts", start=start, end=end) == large[start:end]


def test_listings_know_folders(fs):
    for number in range(5):
        fs.pipe_file(f"b/tree/{number % 2}/{number}", b"x")
    fs.pipe_file("b/tree-not", b"x")
    assert fs.ls("b/tree", detail=False) == ["b/tree/0", "b/tree/1"]
    assert fs.find("b/tree") == [f"b/tree/{n % 2}/{n}" for n in (0, 2, 4, 1, 3)]


def test_listings_come_in_pages(fs):
    for name in "abcde":
        fs.pipe_file(f"b/tree/{name}", b"x")
    fs.pipe_file("b/tree-not", b"x")
    pages: list[list[str]] = []
    more = {"MaxKeys": 2}
    while more:
        page = fs.call_s3("list_objects_v2", Bucket="b", Prefix="tree/", **more)
        pages.append([entry["Key"][-1] for entry in page["Contents"]])
        more = {"MaxKeys": 2, "ContinuationToken": page["NextContinuationToken"]} if page["IsTruncated"] else {}
    assert pages == [["a", "b"], ["c", "d"], ["e"]]


def test_what_is_deleted_is_gone(fs):
    for number in range(4):
        fs.pipe_file(f"b/tree/{number}", b"x")
    fs.rm_file("b/tree/0")
    assert fs.find("b") == ["b/tree/1", "b/tree/2", "b/tree/3"]
    fs.rm(["b/tree/1", "b/tree/2"])
    assert fs.find("b") == ["b/tree/3"]
    with pytest.raises(FileNotFoundError):
        fs.cat_file("b/tree/1")


def test_obstore_understands_the_server(fs, server):
    obstore = pytest.importorskip("obstore", reason="NOT TESTED: pip install obstore")
    from benchmarks.operations import _obstore

    store = _obstore(Job("obstore", "save", "", "s3://b/x", server.storage_options))
    for key in ("one", "two"):
        obstore.put(store, f"tree/{key}", bytes(12 * MIB), chunk_size=5 * MIB)
    assert bytes(obstore.get_range(store, "tree/two", start=5 * MIB - 1, length=2)) == b"\0\0"
    assert [found["path"] for page in obstore.list(store, "tree") for found in page] == ["tree/one", "tree/two"]
    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        obstore.put(store, "tree/one", b"", mode="create")
    obstore.delete(store, ["tree/one", "tree/two"])
    assert fs.find("b") == []


def test_only_if_absent_refuses_the_second(fs):
    fs.pipe_file("b/slot", b"first", mode="create")
    with pytest.raises(OSError, match="PreconditionFailed"):
        fs.call_s3("put_object", Bucket="b", Key="slot", Body=b"second", IfNoneMatch="*")
    assert fs.cat_file("b/slot") == b"first"


def test_uploads_in_parts_are_listed_and_aborted(fs):
    begun = fs.call_s3("create_multipart_upload", Bucket="b", Key="half")
    target = {"Bucket": "b", "Key": "half", "UploadId": begun["UploadId"]}
    fs.call_s3("upload_part", PartNumber=1, Body=b"x", **target)
    assert [found["Key"] for found in fs.call_s3("list_multipart_uploads", Bucket="b")["Uploads"]] == ["half"]
    assert [part["Size"] for part in fs.call_s3("list_parts", **target)["Parts"]] == [1]
    fs.call_s3("abort_multipart_upload", **target)
    assert "Uploads" not in fs.call_s3("list_multipart_uploads", Bucket="b")
    with pytest.raises(FileNotFoundError):
        fs.call_s3("complete_multipart_upload", MultipartUpload={"Parts": []}, **target)


def test_chunks_of_amazon_within_chunks_of_http_are_undone(fs, server):
    # How Arrow's client sends its uploads, and with it Ray.
    import http.client

    content = bytes(range(256)) * 1024
    inner = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (content[:100_000], content[100_000:]))
    inner += b"0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
    headers = {"x-amz-decoded-content-length": str(len(content)), "Transfer-Encoding": "chunked"}
    connection = http.client.HTTPConnection(server.endpoint_url.removeprefix("http://"), timeout=10)
    for key in ("one", "two"):  # on one connection: the first is read to its end
        pieces = (inner[start : start + 7777] for start in range(0, len(inner), 7777))
        connection.request("PUT", f"/b/{key}", pieces, headers, encode_chunked=True)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
    connection.close()
    assert fs.cat_file("b/one") == content
    assert fs.cat_file("b/two") == content


def test_the_server_counts(fs, server):
    job = Job("nobody", "save", "", "s3://b/x", server.storage_options, counted=True)
    fs.connect()
    before = measure.read_counters(job)
    fs.pipe_file("b/counted", b"x" * 1000)
    after = measure.read_counters(job)
    assert after["bytes_received"] - before["bytes_received"] == 1000
    assert after["PUT"] - before["PUT"] == 1


def test_taskckpt_saves_to_it_and_loads(server, tmp_path):
    from taskckpt import Checkpoint

    server.create_bucket("taskckpt")
    source = corpora.build("C", tmp_path / "source", fraction=1 / 256)
    Checkpoint("s3://taskckpt/task", storage_options=server.storage_options).save_sync(source)
    restored = Checkpoint("s3://taskckpt/task", storage_options=server.storage_options).load_sync()
    assert digests(restored) == digests(source)


# --- instruments -------------------------------------------------------------------------------


def test_files_that_come_and_go_are_seen(tmp_path):
    (tmp_path / "watched").mkdir()
    code = (
        "import os, sys, time\n"
        "file = open(sys.argv[1] + '/gone', 'wb'); file.write(bytes(8 << 20)); file.flush()\n"
        "time.sleep(0.3); os.remove(file.name); print('unlinked', flush=True); time.sleep(0.3)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "watched")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        file = tmp_path / "watched" / "gone"
        seen = [(now, file.exists()) for now in measure._watched(process, file.parent)]
    assert any(size >= 8 * MIB and has_name for size, has_name in seen)
    assert any(size >= 8 * MIB and not has_name for size, has_name in seen)


def test_added_memory_is_that_of_the_operation():
    code = (
        "from benchmarks import measure\n"
        "bytearray(b'x') * (200 << 20)\n"  # before: forgotten
        "before = measure._forget_peak()\n"
        "bytearray(b'x') * (50 << 20)\n"
        "print(measure._peak() - before)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    if not sys.platform.startswith("linux"):
        pytest.skip("NOT TESTED: only Linux forgets a process's peak")
    assert 45 * MIB < int(answer.stdout) < 100 * MIB


def test_a_restored_tree_that_differs_is_noticed(tmp_path):
    source = corpora.build("C", tmp_path / "source", fraction=1 / 1000)
    copy = corpora.build("C", tmp_path / "copy", fraction=1 / 1000)
    measure.expect_same_tree(source, copy)
    last = max(path for path in copy.rglob("*") if path.is_file())
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="not what was saved"):
        measure.expect_same_tree(source, copy)


def test_targets_are_judged_pair_by_pair():
    target = report.Target("peer", must=3, aim=5)
    assert target.judge([1, 1, 1], [4, 4, 100]) == report.Verdict("4.00x faster than peer (must 3, aim 5)", True, False)
    assert target.judge([2, 1], [2, 5]) == report.Verdict("3.00x faster than peer (must 3, aim 5)", True, False)
    assert not target.judge([1], [2]).must
    at_most = report.Target("peer", must=1.5, aim=1.1, faster=False)
    assert at_most.judge([1.05], [1]).aim
    assert at_most.judge([1.4], [1]).must
    assert not at_most.judge([1.6], [1]).must


# --- the command -------------------------------------------------------------------------------


def test_the_command_runs_a_row_and_prints_the_table(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "C, tmpfs", "--fraction", "0.002"]
    folders = ["--memory", str(tmp_path), "--disk", str(tmp_path)]
    done = subprocess.run([*command, *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in done.stdout.splitlines() if line[:1] == "|"]
    walls = {(row[0], row[1]): row[2] for row in rows}
    for verb in ("save", "load"):
        for who in ("taskckpt", "cp -r"):
            assert walls[f"{verb} C, tmpfs", who].endswith("s (n=1)"), done.stdout
    assert "must 1.5, aim 1.1" in done.stdout
    assert "targets:" in done.stdout
    assert list(tmp_path.iterdir()) == []
