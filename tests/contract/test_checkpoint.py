"""What a ``Checkpoint`` promises, over the four stores, by its plain calls and by its coroutines."""

from __future__ import annotations

import asyncio
import bz2
import gc
import gzip
import io
import itertools
import logging
import lzma
import multiprocessing
import os
import pickle
import shutil
import stat
import subprocess
import tarfile
import threading
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from taskckpt import Checkpoint
from taskckpt._layout import slot_key
from taskckpt._log.records import INLINE_LIMIT_BYTES
from taskckpt._workspace import process_root
from taskckpt.errors import (
    AlreadyExistsError,
    CorruptCheckpointError,
    NotFoundError,
    StaleAttemptError,
    UnavailableError,
    UsageError,
    UsageTypeError,
)
from taskckpt.testing import intercepted

BIG = bytes(range(256)) * 400  # more than what lies in a record
MTIME_NS = 1_600_000_000_123_456_789


def payloads(place, task="task"):
    return [key for key in place.keys(task) if key.startswith("data/")]


def records(place, task="task"):
    return [key for key in place.keys(task) if key.startswith("log/")]


def saved(place, way, data, task="task", **options):
    checkpoint = place.checkpoint(task, **options)
    way.save(checkpoint, data)
    return checkpoint


def tar_of(files, mode="w"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


# --- nothing yet -------------------------------------------------------------------------------


def test_nothing_saved_is_none_everywhere(place, way):
    checkpoint = place.checkpoint()
    assert checkpoint.prev_exists() is False
    assert way.load(checkpoint) is None
    assert way.load_bytes(checkpoint) is None
    assert checkpoint.prev_exists() is False
    assert checkpoint.path is None
    assert bool(checkpoint)
    assert place.checkpoint().prev_exists() is False


def test_what_it_is_called(place):
    checkpoint = place.checkpoint("task", [place.at("a").url, place.at("b").url])
    assert checkpoint.remote_destination == place.at("task").url
    assert checkpoint.remote_source == place.at("a").url
    assert place.checkpoint("task").remote_source is None
    assert checkpoint.remote_destination in repr(checkpoint)
    assert checkpoint.remote_source in repr(checkpoint)


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": True}, {"keep": 1.5}, {"timeout_s": 0}, {"src_kind": "x"}])
def test_options_that_make_no_sense_are_refused_at_once(options):
    with pytest.raises(UsageError):
        Checkpoint("somewhere", **options)


# --- bytes -------------------------------------------------------------------------------------

CONTENTS = {
    "empty": b"",
    "text": "grün".encode(),
    "zeros": bytes(20_000),
    "binary": bytes(range(256)),
    "inline": os.urandom(INLINE_LIMIT_BYTES),
    "just not inline": os.urandom(INLINE_LIMIT_BYTES + 1),
    "big zeros": bytes(300_000),
    "a tar": tar_of({"x": b"y"}),
    "a big tar": tar_of({"x": BIG}),
    "a tar.gz": tar_of({"x": b"y"}, "w:gz"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_bytes_come_back(place, way, name):
    content = CONTENTS[name]
    saved(place, way, content)
    later = place.checkpoint()
    assert later.prev_exists() is True
    path = way.load(later)
    assert path is not None
    assert path.name == "payload"
    assert path.parent == later.path
    assert path.read_bytes() == content
    assert way.load_bytes(later) == content


def test_bytes_of_several_chunks_come_back(place, way):
    content = os.urandom(9 * 2**20)
    saved(place, way, content)
    assert way.load_bytes(place.checkpoint()) == content


def test_all_that_is_like_bytes_is_taken(place, way):
    checkpoint = place.checkpoint()
    numbers = array("i", range(50))
    for data in (bytearray(b"abc"), memoryview(b"abc"), memoryview(b"-a-b-c")[1::2], memoryview(numbers)):
        way.save(checkpoint, data)
        assert way.load_bytes(checkpoint) == (data.tobytes() if isinstance(data, memoryview) else bytes(data))


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(place, way, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    checkpoint = place.checkpoint()
    for data, error, words in (
        ("state as text", UsageError, "encode()"),
        ("", UsageError, "encode()"),
        ("a" * 5000, UsageError, "encode()"),
        ("nul\0", UsageError, "encode()"),
        (tmp_path / "absent", NotFoundError, "absent"),
        (tmp_path / "pipe", UsageError, "pipe"),
        (None, UsageTypeError, "bytes"),
        (7, UsageTypeError, "bytes"),
        ({"step": object()}, UsageTypeError, "step" if way.name == "later" else "save_state()"),
        (["a"], UsageTypeError, "bytes"),
        (os.fsencode(tmp_path), None, ""),
    ):
        if error is None:
            way.save(checkpoint, data)  # bytes are content, never a path
            assert way.load_bytes(checkpoint) == data
            continue
        with pytest.raises(error) as caught:
            way.save(checkpoint, data)
        assert words in str(caught.value)
        assert place.keys() == []


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "mode"),
    [
        ("small.txt", b"hello", 0o640),
        ("empty", b"", 0o600),
        ("big.bin", BIG, 0o755),
        ("zeros", bytes(100_000), 0o444),
        ("a.tar", tar_of({"x": BIG}), 0o644),
        ("a.tar.gz", tar_of({"x": BIG}, "w:gz"), 0o644),
        ("grün und so.txt", b"x", 0o644),
    ],
)
def test_a_file_comes_back_as_a_file(place, way, tmp_path, name, content, mode):
    file = tmp_path / name
    file.write_bytes(content)
    file.chmod(mode)
    os.utime(file, ns=(MTIME_NS, MTIME_NS))
    saved(place, way, file)
    saved(place, way, str(file), "by-str")
    (payload,) = payloads(place)
    assert place.get(f"task/{payload}") == content, "the store holds the plain content"
    for task in ("task", "by-str"):
        later = place.checkpoint(task)
        for path in (way.load(later), way.load(later, to=tmp_path / f"{task}-restored")):
            assert path is not None
            assert path.is_file()
            assert path.read_bytes() == content
            assert stat.S_IMODE(path.stat().st_mode) == mode
            assert path.stat().st_mtime_ns == MTIME_NS
        assert path == tmp_path / f"{task}-restored" / name
        assert way.load_bytes(later) == content


# --- folders -----------------------------------------------------------------------------------


def make_tree(root):
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "sub" / "a.txt").write_text("a")
    (root / "sub" / "deep" / "big.bin").write_bytes(BIG)
    (root / "zero").write_bytes(b"")
    (root / "grün  \n.txt").write_text("odd")
    (root / "link").symlink_to("sub/a.txt")
    (root / "sub" / "up").symlink_to("../zero")
    os.link(root / "sub" / "a.txt", root / "hard")
    (root / "sub" / "a.txt").chmod(0o751)
    (root / "empty").chmod(0o700)
    (root / "sub" / "deep").chmod(0o555)
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, ns=(MTIME_NS, MTIME_NS), follow_symlinks=False)
    return root


def described(root):
    """An independent look at a tree: everything that is promised to be kept."""
    found = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        kind = stat.S_IFMT(info.st_mode)
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        mode = None if path.is_symlink() else stat.S_IMODE(info.st_mode)
        mtime = None if path.is_symlink() else info.st_mtime_ns
        found[str(path.relative_to(root))] = (kind, mode, mtime, content)
    return found


def test_a_folder_comes_back_as_it_was(place, way, tmp_path):
    tree = make_tree(tmp_path / "tree")
    saved(place, way, tree)
    later = place.checkpoint()
    for restored in (way.load(later), way.load(later, to=tmp_path / "to")):
        assert restored is not None
        assert described(restored) == described(tree)
        assert (restored / "hard").samefile(restored / "sub/a.txt")
    with pytest.raises(UsageError, match="folder"):
        way.load_bytes(later)


def test_any_tar_opens_a_saved_folder(place, way, tmp_path):
    tree = make_tree(tmp_path / "tree")
    saved(place, way, tree)
    (payload,) = payloads(place)
    assert payload.endswith(".tar.gz")
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "xzf", "-"], input=place.get(f"task/{payload}"), cwd=tmp_path / "out", check=True)
    (root,) = [tmp_path / "out", *(tmp_path / "out").glob("tree")][-1:]
    names = {str(path.relative_to(root)) for path in root.rglob("*")}
    assert names == set(described(tree))
    assert (root / "sub/deep/big.bin").read_bytes() == BIG


def test_an_empty_folder_is_a_checkpoint(place, way, tmp_path):
    (tmp_path / "nothing").mkdir()
    saved(place, way, tmp_path / "nothing")
    restored = way.load(place.checkpoint())
    assert restored is not None
    assert restored.is_dir()
    assert list(restored.iterdir()) == []


# --- where to ----------------------------------------------------------------------------------


def test_each_load_has_a_fresh_private_folder(place, way):
    checkpoint = saved(place, way, b"one")
    first = way.load(checkpoint)
    way.save(checkpoint, b"two")
    second = way.load(checkpoint)
    assert first is not None
    assert second is not None
    assert first.parent != second.parent
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")
    assert checkpoint.path == second.parent
    del checkpoint
    assert first.exists()
    assert first.is_relative_to(process_root())
    assert stat.S_IMODE(first.parent.stat().st_mode) & 0o077 == 0


def test_a_restored_folder_stays_when_a_forked_child_ends(place, way):
    saved(place, way, b"one")
    path = way.load(place.checkpoint(read_only=True))
    assert path is not None
    child = multiprocessing.get_context("fork").Process(target=path.read_bytes)
    child.start()
    child.join(15)
    assert child.exitcode == 0
    assert path.read_bytes() == b"one"


def test_load_to_takes_an_absent_or_empty_folder(place, way, tmp_path):
    checkpoint = saved(place, way, b"one")
    (tmp_path / "empty").mkdir()
    for to in (tmp_path / "absent/deeper", str(tmp_path / "empty"), "relative"):
        path = way.load(checkpoint, to=to)
        assert path == tmp_path / to / "payload"
        assert path.read_bytes() == b"one"
        assert [p.name for p in path.parent.iterdir()] == ["payload"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".taskckpt-")]


def test_load_to_leaves_a_full_folder_alone(place, way, tmp_path):
    checkpoint = saved(place, way, b"one")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(AlreadyExistsError, match="replace=True"):
        way.load(checkpoint, to=tmp_path / "full")
    for replace in (False, True):
        with pytest.raises(UsageError, match="file"):
            way.load(checkpoint, to=tmp_path / "file", replace=replace)
    assert (tmp_path / "file").read_text() == "precious"
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
    path = way.load(checkpoint, to=tmp_path / "full", replace=True)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["payload"]
    assert path is not None
    assert path.read_bytes() == b"one"


def test_load_to_touches_nothing_when_there_is_nothing_or_only_damage(place, way, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    assert way.load(place.checkpoint("nothing"), to=tmp_path / "full", replace=True) is None
    saved(place, way, BIG)
    (payload,) = payloads(place)
    place.put(f"task/{payload}", BIG[:-1] + b"!")
    with pytest.raises(CorruptCheckpointError):
        way.load(place.checkpoint(), to=tmp_path / "full", replace=True)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
    assert {p.name for p in tmp_path.iterdir()} <= {"full", "base"}


@pytest.mark.skipif(os.getuid() != 0, reason="NOT TESTED: mounting needs root (run the tests in a container)")
def test_load_to_takes_a_mount_point(place, way, tmp_path):
    (tmp_path / "mounted").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path / "mounted"], check=False).returncode:
        pytest.skip("NOT TESTED: this container may not mount (needs CAP_SYS_ADMIN)")
    try:
        tree = make_tree(tmp_path / "tree")
        checkpoint = saved(place, way, tree)
        (tmp_path / "mounted" / "old").write_text("goes")
        with pytest.raises(AlreadyExistsError):
            way.load(checkpoint, to=tmp_path / "mounted")
        assert way.load(checkpoint, to=tmp_path / "mounted", replace=True) == tmp_path / "mounted"
        assert described(tmp_path / "mounted") == described(tree)
        assert os.path.ismount(tmp_path / "mounted")
    finally:
        subprocess.run(["umount", tmp_path / "mounted"], check=True)


# --- keep, clear -------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "left"), [(1, 1), (2, 2), (3, 3), (None, 6)])
def test_so_many_checkpoints_are_kept(place, way, keep, left):
    checkpoint = place.checkpoint(keep=keep)
    for number in range(6):
        way.save(checkpoint, BIG + b"%d" % number)
    contents = {place.get(f"task/{key}")[len(BIG) :] for key in payloads(place)}
    assert contents == {b"%d" % number for number in range(6 - left, 6)}
    assert way.load_bytes(place.checkpoint()) == BIG + b"5"


def test_what_was_resumed_from_stays_until_two_newer_ones_exist(place, way):
    saved(place, way, BIG + b"good")
    attempt = place.checkpoint(keep=1)
    assert way.load_bytes(attempt) == BIG + b"good"
    kept = []
    for number in range(3):
        way.save(attempt, BIG + b"%d" % number)
        kept.append({place.get(f"task/{key}")[len(BIG) :] for key in payloads(place)})
    assert kept == [{b"good", b"0"}, {b"1"}, {b"2"}]


def test_clear_starts_over(place, way):
    checkpoint = saved(place, way, BIG)
    way.save(checkpoint, b"two")
    way.clear(checkpoint)
    assert payloads(place) == []
    for someone in (checkpoint, place.checkpoint()):
        assert someone.prev_exists() is False
        assert way.load(someone) is None
        assert way.load_bytes(someone) is None
    again = saved(place, way, b"three")
    assert way.load_bytes(again) == b"three"
    assert way.load_bytes(place.checkpoint()) == b"three"
    before = records(place)
    way.clear(place.checkpoint())
    assert set(records(place)) > set(before), "slot numbers are never used twice"
    assert place.checkpoint().prev_exists() is False


def test_clearing_nothing_writes_nothing(place, way):
    way.clear(place.checkpoint())
    assert place.keys() == []


def test_a_fenced_attempt_clears_nothing(place, way):
    old = saved(place, way, b"one")
    saved(place, way, b"two")
    with pytest.raises(StaleAttemptError):
        way.clear(old)
    assert way.load_bytes(place.checkpoint()) == b"two"


# --- src ---------------------------------------------------------------------------------------


def test_src_is_looked_at_after_dest(place, way):
    saved(place, way, b"from src", "src")
    attempt = place.checkpoint("task", place.at("src").url)
    assert attempt.prev_exists() is True
    assert way.load_bytes(attempt) == b"from src"
    way.save(attempt, b"own")
    assert way.load_bytes(attempt) == b"own"
    assert way.load_bytes(place.checkpoint("task", place.at("src").url)) == b"own"
    assert way.load_bytes(place.checkpoint("src", read_only=True)) == b"from src", "src was only read"


def test_of_several_sources_the_first_that_has_something_counts(place, way):
    saved(place, way, b"older", "b")
    saved(place, way, b"oldest", "c")
    sources = [place.at(name).url for name in "abc"]
    assert way.load_bytes(place.checkpoint("task", sources)) == b"older"
    assert way.load_bytes(place.checkpoint("other", tuple(reversed(sources)))) == b"oldest"


@pytest.mark.parametrize("nothing", [None, "", "  ", '""', "{{.prevCheckpointPrefix}}", [], [None, "", "{{x}}"]])
def test_a_source_that_is_none(nothing, tmp_path):
    checkpoint = Checkpoint(tmp_path / "task", nothing)
    assert checkpoint.remote_source is None
    assert checkpoint.load_sync() is None


def test_sources_of_other_types_are_refused(tmp_path):
    for src in (7, b"bytes", {"a"}, [7]):
        with pytest.raises(UsageTypeError):
            Checkpoint(tmp_path, src)  # type: ignore[arg-type]


def test_what_a_source_continues_from_is_followed(place, way):
    saved(place, way, b"the first", "a")
    for older, newer in itertools.pairwise("abcd"):  # each of these died before it saved anything
        assert way.load_bytes(place.checkpoint(newer, place.at(older).url)) == b"the first"
    assert way.load_bytes(place.checkpoint("e", place.at("d").url)) == b"the first"
    # Nor need a later attempt be told again where its task came from.
    assert way.load_bytes(place.checkpoint("d")) == b"the first"
    assert place.checkpoint("d", read_only=True).prev_exists() is True


def test_a_clear_ends_the_chain(place, way):
    saved(place, way, b"the first", "a")
    way.load(place.checkpoint("b", place.at("a").url))
    way.clear(place.checkpoint("b", place.at("a").url))
    assert way.load(place.checkpoint("b", place.at("a").url)) is None
    assert way.load(place.checkpoint("c", [place.at("b").url, place.at("a").url])) is None
    assert way.load_bytes(place.checkpoint("d", place.at("a").url)) == b"the first"


def test_sources_in_a_circle_end(place, way):
    for dest, src in ("ab", "bc", "ca", "aa"):
        assert way.load(place.checkpoint(dest, place.at(src).url)) is None
    saved(place, way, b"one", "c")
    assert way.load_bytes(place.checkpoint("a", place.at("b").url)) == b"one"


def test_damage_in_dest_falls_back_to_src(place, way, caplog):
    saved(place, way, b"from src", "src")
    saved(place, way, BIG, "task", src=place.at("src").url)
    (payload,) = payloads(place)
    place.put(f"task/{payload}", b"rotten")
    with caplog.at_level(logging.WARNING, "taskckpt"):
        assert way.load_bytes(place.checkpoint("task", place.at("src").url)) == b"from src"
    assert "damaged" in caplog.text


# --- what others wrote at src ------------------------------------------------------------------

FILES = {"model.bin": BIG, "sub/state.json": b"{}"}
ARCHIVES = {
    "tar": tar_of(FILES),
    "tar.gz": tar_of(FILES, "w:gz"),
    "tar.bz2": tar_of(FILES, "w:bz2"),
    "tar.xz": tar_of(FILES, "w:xz"),
    "two members gz": gzip.compress(tar_of(FILES)[:1000]) + gzip.compress(tar_of(FILES)[1000:]),
}
PLAIN = {
    "empty": b"",
    "text": b"42",
    "zeros": bytes(10240),
    "many zeros": bytes(1 << 20),
    "gz of text": gzip.compress(b"no tar"),
    "gz of other zeros": gzip.compress(bytes(4096)),
    "bz2 of text": bz2.compress(b"no tar"),
    "xz of text": lzma.compress(b"no tar"),
    "cut gz": gzip.compress(b"x")[:5],
    "gz magic": b"\x1f\x8b",
    "large": os.urandom(9 * 2**20),
    "almost a tar": tar_of(FILES)[:100] + b"!" + tar_of(FILES)[101:],
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_foreign_archive_is_a_folder(place, way, name):
    src = place.put("flyte/blob", ARCHIVES[name])
    root = way.load(place.checkpoint("task", src))
    assert root is not None
    assert {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()} == FILES
    as_bytes = place.checkpoint("other", src, src_kind="bytes")
    assert way.load_bytes(as_bytes) == ARCHIVES[name]


def test_a_foreign_empty_folder_is_a_folder(place, way):
    src = place.put("flyte/blob", tar_of({}, "w:gz"))
    root = way.load(place.checkpoint("task", src))
    assert root is not None
    assert root.is_dir()
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("name", PLAIN)
def test_any_other_foreign_object_is_plain(place, way, name):
    src = place.put("flyte/blob", PLAIN[name])
    attempt = place.checkpoint("task", src)
    assert attempt.prev_exists() is True
    path = way.load(attempt)
    assert path is not None
    assert path.name == "payload"
    assert path.read_bytes() == PLAIN[name]
    assert way.load_bytes(attempt) == PLAIN[name]


def test_the_kind_of_a_foreign_object_can_be_said(place, way):
    zeros = place.put("flyte/zeros", bytes(10240))
    root = way.load(place.checkpoint("task", zeros, src_kind="folder"))
    assert root is not None
    assert root.is_dir()
    text = place.put("flyte/text", b"no tar at all")
    with pytest.raises(CorruptCheckpointError):
        way.load(place.checkpoint("other", text, src_kind="folder"))


def test_a_damaged_foreign_archive_is_an_error(place, way):
    blob = bytearray(tar_of(FILES, "w:gz"))
    blob[-6] ^= 1  # in the checksum
    for name, data in (("flipped", bytes(blob)), ("cut", bytes(blob[:-20]))):
        src = place.put(f"flyte/{name}", data)
        with pytest.raises(CorruptCheckpointError):
            way.load(place.checkpoint(f"task-{name}", src))


def test_a_folder_of_other_things_at_src_is_refused(place, way):
    place.put("flyte/some/one", b"1")
    place.put("flyte/some/two", b"2")
    with pytest.raises(UsageError, match="src"):
        way.load(place.checkpoint("task", place.at("flyte/some").url))


# --- looking without touching ------------------------------------------------------------------


def test_a_read_only_view_never_writes_and_never_fences(place, way):
    owner = saved(place, way, b"one")
    before = place.keys()
    view = place.checkpoint(read_only=True)
    assert way.load_bytes(view) == b"one"
    path = way.load(view)
    assert path is not None
    assert view.prev_exists() is True
    for verb, arguments in ((way.save, (view, b"x")), (way.clear, (view,))):
        with pytest.raises(UsageError, match="read-only"):
            verb(*arguments)
    assert place.keys() == before
    way.save(owner, b"two")
    assert way.load_bytes(view) == b"two"
    assert way.load(place.checkpoint("nothing", read_only=True)) is None
    assert place.keys("nothing") == []


def test_prev_exists_takes_nothing_over(place, way):
    owner = saved(place, way, b"one")
    assert place.checkpoint().prev_exists() is True
    way.save(owner, b"two")


def test_a_view_of_another_task(place, way, monkeypatch):
    saved(place, way, b"keyed", "by-key/my-task")
    owner = saved(place, way, b"nightly", "nightly/train")
    options = {"base": place.url, "storage_options": place.options}
    assert way.load_bytes(Checkpoint.of(key="my-task", **options)) == b"keyed"
    view = Checkpoint.of(run="nightly", task="train", **options)
    assert way.load_bytes(view) == b"nightly"
    with pytest.raises(UsageError):
        way.save(view, b"x")
    way.save(owner, b"more")
    monkeypatch.setenv("TASKCKPT_BASE", place.url)
    monkeypatch.setenv("TASKCKPT_RUN", "nightly")
    assert way.load_bytes(Checkpoint.of(task="train", storage_options=place.options)) == b"more"
    with pytest.raises(NotFoundError, match="train"):
        Checkpoint.of(run="nightly", task="trian", **options)
    with pytest.raises(NotFoundError, match="no tasks"):
        Checkpoint.of(run="absent", task="train", **options)
    wrongs: list[dict[str, Any]] = [{}, {"key": "a", "task": "b"}]
    for wrong in wrongs:
        with pytest.raises(UsageError, match=r"key=.*task="):
            Checkpoint.of(**wrong, **options)


# --- attempts ----------------------------------------------------------------------------------


def test_an_attempt_loads_what_it_saved(place, way, tmp_path):
    checkpoint = place.checkpoint()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "x").write_text("x")
    for number, data in enumerate((b"one", BIG, tmp_path / "tree", tmp_path / "tree" / "x", b"")):
        way.save(checkpoint, data)
        path = way.load(checkpoint)
        assert path is not None
        if number == 2:
            assert (path / "x").read_text() == "x"
        else:
            assert path.read_bytes() == (Path(data).read_bytes() if number == 3 else data)


def test_a_newer_attempt_fences_all_older_ones(place, way):
    attempts = [place.checkpoint() for _ in range(4)]
    for number, attempt in enumerate(attempts):
        if number % 2:
            way.load(attempt)
        way.save(attempt, BIG + b"%d" % number)
    keys = place.keys()
    for attempt in attempts[:-1]:
        for _ in range(2):  # final: asking again does not help
            with pytest.raises(StaleAttemptError) as caught:
                way.save(attempt, BIG)
            with pytest.raises(StaleAttemptError):
                way.load(attempt)
            assert caught.value.uri == place.at("task").url
    assert place.keys() == keys, "what a fenced attempt uploaded is gone"
    way.save(attempts[-1], BIG + b"last")
    assert way.load_bytes(place.checkpoint()) == BIG + b"last"


def test_loading_takes_the_task_over(place, way):
    old = saved(place, way, b"one")
    assert way.load_bytes(place.checkpoint()) == b"one"
    with pytest.raises(StaleAttemptError):
        way.save(old, b"two")
    assert way.load_bytes(place.checkpoint()) == b"one"


@pytest.mark.parametrize("broken_verb", ["list", "read", "create"])
def test_a_load_after_a_failed_load_tries_again(place, way, broken_verb):
    saved(place, way, b"one")
    broken = threading.Event()
    broken.set()

    def hook(when, verb, keys):
        if (when, verb) == ("before", broken_verb) and broken.is_set():
            raise UnavailableError("the store is down", uri="test")

    with intercepted(hook):
        attempt = place.checkpoint()
        for _ in range(2):
            with pytest.raises(UnavailableError, match="the store is down"):
                way.load(attempt)
        broken.clear()
        assert way.load_bytes(attempt) == b"one"
        way.save(attempt, b"two")
    assert way.load_bytes(place.checkpoint()) == b"two"


def test_damage_is_passed_over_with_a_warning_and_all_of_it_is_an_error(place, way, caplog):
    checkpoint = place.checkpoint()
    for number in range(3):
        way.save(checkpoint, BIG + b"%d" % number)
    keys = payloads(place)
    by_content = {place.get(f"task/{key}")[len(BIG) :]: key for key in keys}
    for number, damage in ((2, BIG + b"X"), (1, BIG[:5]), (0, b"")):
        place.put(f"task/{by_content[b'%d' % number]}", damage)
        with caplog.at_level(logging.WARNING, "taskckpt"):
            caplog.clear()
            view = place.checkpoint(read_only=True)
            if number:
                assert way.load_bytes(view) == BIG + b"%d" % (number - 1)
                assert "damaged" in caplog.text
                assert by_content[b"%d" % number] in caplog.text
                continue
            for look in (way.load, way.load_bytes):
                with pytest.raises(CorruptCheckpointError) as caught:
                    look(view)
                assert all(key in str(caught.value) for key in keys)
            assert view.prev_exists() is True
    with pytest.raises(CorruptCheckpointError):
        way.load(place.checkpoint())


def test_a_payload_that_is_gone_is_damage_not_nothing(place, way):
    saved(place, way, BIG)
    place.open("task").delete(payloads(place))
    with pytest.raises(CorruptCheckpointError):
        way.load(place.checkpoint())


def test_a_record_that_is_gone_is_damage_not_nothing(place, way):
    saved(place, way, b"one")
    way.load(place.checkpoint())  # its claim names the commit
    place.open("task").delete([slot_key(2)])
    for read_only in (True, False):
        with pytest.raises(CorruptCheckpointError):
            way.load(place.checkpoint(read_only=read_only))


# --- threads, children, tasks ------------------------------------------------------------------


def test_threads_share_one_and_saves_queue_up(place, way):
    checkpoint = place.checkpoint(keep=None)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: way.save(checkpoint, b"%d" % number), range(12)))
        loaded = list(pool.map(lambda _: way.load_bytes(checkpoint), range(6)))
    assert len(set(loaded)) == 1
    assert len(records(place)) == 13, "one claim, twelve commits"
    assert way.load_bytes(place.checkpoint()) == loaded[0]


def test_coroutines_share_one_and_saves_queue_up(place):
    checkpoint = place.checkpoint(keep=None)

    async def main():
        await asyncio.gather(*(checkpoint.save(b"%d" % number) for number in range(12)))
        return await asyncio.gather(*(checkpoint.load_bytes() for _ in range(6)))

    assert len(set(asyncio.run(main()))) == 1
    assert len(records(place)) == 13


def test_a_cancelled_save_never_commits_afterwards(place):
    checkpoint = place.checkpoint()
    checkpoint.save_sync(b"one")
    reached, go_on = threading.Event(), threading.Event()

    def hook(when, verb, keys):
        if (when, verb) == ("before", "create"):
            reached.set()
            assert go_on.wait(10)

    async def main():
        save = asyncio.ensure_future(checkpoint.save(b"two"))
        assert await asyncio.to_thread(reached.wait, 10)
        save.cancel()
        await asyncio.sleep(0.02)
        assert not save.done(), "it waits until the request in flight has ended"
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await save
        return sorted(records(place))

    with intercepted(hook):
        checkpoint._attempt._store = checkpoint._attempt._log._store = place.open("task")
    then = asyncio.run(main())
    assert sorted(records(place)) == then, "nothing comes later"
    assert checkpoint.load_bytes_sync() == b"one"
    checkpoint.save_sync(b"three")
    assert place.checkpoint().load_bytes_sync() == b"three"


def in_child(method, work, *arguments):
    child = multiprocessing.get_context(method).Process(target=work, args=arguments)
    child.start()
    child.join(18)
    if child.is_alive():
        child.kill()
    return child.exitcode


def work_of_a_child(checkpoint, expected, data):
    found = checkpoint.load_bytes_sync()
    assert found == expected, found
    checkpoint.save_sync(data)
    assert checkpoint.load_bytes_sync() == data


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_joins_and_the_parent_goes_on(place, way, method):
    if place.name == "memory":
        pytest.skip("memory:// is one process only; see test_memory_is_one_process_only")
    checkpoint = Checkpoint(place.at("task").url, storage_options=place.plain_options)
    way.save(checkpoint, b"parent")
    assert in_child(method, work_of_a_child, checkpoint, b"parent", b"child") == 0
    assert way.load_bytes(checkpoint) == b"child"
    way.save(checkpoint, b"parent again")
    assert way.load_bytes(checkpoint) == b"parent again"
    # A child of an attempt that was fenced meanwhile is fenced as well.
    assert way.load_bytes(place.checkpoint()) == b"parent again"
    assert in_child(method, expect_stale, checkpoint) == 0
    assert way.load_bytes(place.checkpoint(read_only=True)) == b"parent again"


def expect_stale(checkpoint):
    for call in (checkpoint.load_sync, lambda: checkpoint.save_sync(b"x"), checkpoint.clear_sync):
        with pytest.raises(StaleAttemptError):
            call()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_first_of_a_family_claims_and_the_others_join(place, way, method):
    if place.name == "memory":
        pytest.skip("memory:// is one process only; see test_memory_is_one_process_only")
    checkpoint = Checkpoint(place.at("task").url, storage_options=place.plain_options)
    assert in_child(method, work_of_a_child, checkpoint, None, b"child") == 0
    way.save(checkpoint, b"parent")
    assert way.load_bytes(checkpoint) == b"parent"
    assert way.load_bytes(place.checkpoint()) == b"parent"


def free_what_was_inherited(checkpoint):
    import fsspec.asyn

    async def collect():
        gc.collect()
        await asyncio.sleep(0.05)  # what the finalizers have begun goes on

    checkpoint.load_sync()
    fsspec.asyn.sync(fsspec.asyn.get_loop(), collect)


def test_a_child_that_frees_what_it_inherited_does_not_stall_its_parent(seaweedfs_place):
    """Connections, and the epoll instance that watches them, are shared by a fork."""
    place = seaweedfs_place
    checkpoint = Checkpoint(place.at("task").url, storage_options=place.plain_options)
    checkpoint.save_sync(b"one")
    for _ in range(2):
        assert in_child("fork", free_what_was_inherited, checkpoint) == 0
        began = time.monotonic()
        assert checkpoint.load_bytes_sync() == b"one"
        assert time.monotonic() - began < 5


def test_a_copy_joins(place, way):
    checkpoint = place.checkpoint() if place.server is None else None
    checkpoint = checkpoint or Checkpoint(place.at("task").url, storage_options=place.plain_options)
    way.save(checkpoint, b"one")
    copy = pickle.loads(pickle.dumps(checkpoint))
    assert way.load_bytes(copy) == b"one"
    way.save(copy, b"two")
    way.save(checkpoint, b"three")
    way.save(copy, b"four")
    assert way.load_bytes(checkpoint) == b"four"


def say_what_happens(checkpoint, answers):
    for call in (checkpoint.load_sync, lambda: checkpoint.save_sync(b"child"), checkpoint.prev_exists):
        try:
            answers.put(f"no error: {call()!r}")
        except UsageError as error:
            answers.put(str(error))


@pytest.mark.filterwarnings("ignore:memory.// lives in this process only")
@pytest.mark.parametrize("used_before", [True, False])
def test_memory_is_one_process_only(memory_place, used_before):
    checkpoint = memory_place.checkpoint()
    if used_before:
        checkpoint.save_sync(b"one")
    for method in ("fork", "spawn"):
        answers = multiprocessing.get_context(method).SimpleQueue()
        assert in_child(method, say_what_happens, checkpoint, answers) == 0
        for answer in [answers.get() for _ in range(3)]:
            assert "one process only" in answer


def test_memory_warns_once_made(memory_place):
    with pytest.warns(UserWarning, match="this process only"):
        assert memory_place.checkpoint().load_sync() is None


def test_local_paths_of_all_kinds_are_one_place(tmp_path):
    Checkpoint(tmp_path / "a b").save_sync(b"one")
    for other in (str(tmp_path / "a b"), "a b", f"file://{tmp_path}/a%20b", f"file:{tmp_path}/a%20b/", "./x/../a b"):
        assert Checkpoint(other, read_only=True).load_bytes_sync() == b"one"
    shutil.rmtree(tmp_path / "a b")
    assert Checkpoint(tmp_path / "a b").load_sync() is None
