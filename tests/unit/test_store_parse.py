from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from taskckpt import Checkpoint
from taskckpt._stores import Location, is_unset, open_store, parse
from taskckpt.errors import MissingDependencyError, TaskckptWarning, UsageError, UsageTypeError


def opened(url, **options):
    return open_store(parse(url), storage_options=options, timeout_s=1)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/a/b", "/a/b"),
        ("/a/b/", "/a/b"),
        ("//a///b", "//a/b"),
        ("/a/./c/../b", "/a/b"),
        ("  /a/b  ", "/a/b"),
        ("/a/with space", "/a/with space"),
        ("/a/100%25", "/a/100%25"),
        ("/a/grün", "/a/grün"),
        ("/a/b?c#d", "/a/b?c#d"),
        ("file:/a/b", "/a/b"),
        ("file:///a/b", "/a/b"),
        ("file:///a/b/", "/a/b"),
        ("file://localhost/a/b", "/a/b"),
        ("FILE:///a/b", "/a/b"),
        ("local:///a/b", "/a/b"),
        ("file:///a/with%20space", "/a/with space"),
        ("file:///a/100%25", "/a/100%"),
        ("file:///a/gr%C3%BCn", "/a/grün"),
        ("file:///a/b?c#d", "/a/b?c#d"),
        ("file:///a/../b", "/b"),
        ("/a:/b", "/a:/b"),
        ("/", "/"),
    ],
)
def test_local_places(text, path):
    assert parse(text) == Location("file", path)
    assert parse(text).is_local
    assert parse(text).uri == path


def test_relative_places_are_those_of_now(tmp_path, monkeypatch):
    for text in ("a/b", "./a/b", "a//b/", "x/../a/b", Path("a/b"), Path("a") / "b"):
        assert parse(text) == Location("file", str(tmp_path / "a/b"))
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse("~/a") == parse(Path("~/a")) == Location("file", "/home/somebody/a")
    # In a Path, nothing is blank: it is what the disk has.
    assert parse(Path(" a ")) == Location("file", str(tmp_path / " a "))
    assert parse("C:a") == Location("file", str(tmp_path / "C:a"))
    assert parse("a:b/c") == parse(Path("a:b/c")) == Location("file", str(tmp_path / "a:b/c"))


@pytest.mark.parametrize(
    ("text", "protocol", "path"),
    [
        ("s3://bucket/a/b", "s3", "bucket/a/b"),
        ("s3://bucket/a/b//", "s3", "bucket/a/b"),
        ("s3a://bucket/a", "s3a", "bucket/a"),
        ("S3://Bucket/A", "s3", "Bucket/A"),
        ("s3://bucket", "s3", "bucket"),
        ("s3://bucket/with space", "s3", "bucket/with space"),
        ("s3://bucket/with%20percent", "s3", "bucket/with%20percent"),
        ("s3://bucket/a..b", "s3", "bucket/a..b"),
        ("memory://a/b", "memory", "a/b"),
        ("memory:///a/b", "memory", "/a/b"),
        ("memory://", "memory", ""),
        ("gs://bucket/a", "gs", "bucket/a"),
        ("s4://bucket/a", "s4", "bucket/a"),
        ("  s3://bucket/a\n", "s3", "bucket/a"),
    ],
)
def test_remote_places(text, protocol, path):
    assert parse(text) == Location(protocol, path)
    assert not parse(text).is_local
    assert parse(parse(text).uri) == parse(text)


def test_the_uri_of_records_is_always_a_url():
    assert parse("/a/with space").record_uri == "file:///a/with%20space"
    assert parse("s3://bucket/a b").record_uri == "s3://bucket/a b"
    for text in ("/a/100%25 ü?#", "/", "/a/b", "s3://bucket/a", "memory://a/b"):
        assert parse(parse(text).record_uri) == parse(text)


def test_children():
    assert parse("/a").child("b/c") == Location("file", "/a/b/c")
    assert parse("s3://bucket").child("b/c") == Location("s3", "bucket/b/c")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no place"),
        ("   ", "no place"),
        ('""', "no place"),
        ("''", "no place"),
        ("{{.prevCheckpointPrefix}}", "no place"),
        (" {{ x }} ", "no place"),
        ("s3:/bucket/a", "s3://bucket/a"),
        ("gs:/bucket", "gs://bucket"),
        ("s3://", "bucket"),
        ("s3:///", "bucket"),
        ("s3://bucket/a//b", "//"),
        ("s3://bucket/../a", r"'\.\.'"),
        ("s3://bucket/./a", r"'\.'"),
        ("simplecache::s3://bucket/a", "Chained"),
        ("zip://a.zip::s3://bucket/a", "Chained"),
        ("file://host/a", "host"),
        ("file://a", "host"),
        ("/a\0b", "NUL"),
        ("s3://bucket/a\0", "NUL"),
    ],
)
def test_what_is_no_place(text, words):
    for what in ("dest", "src"):
        with pytest.raises(UsageError, match=words) as caught:
            parse(text, what=what)
        assert what in str(caught.value)
        assert caught.value.hint


def test_a_path_made_of_a_url_has_lost_a_slash():
    for url in ("s3://bucket/a", "memory://a"):
        with pytest.raises(UsageError, match="as a str"):
            parse(Path(url))


@pytest.mark.parametrize("target", [None, 7, b"/a", bytearray(b"a"), ["a"], ("a",), object(), 1.5, True])
def test_what_is_neither_text_nor_a_path(target):
    with pytest.raises(UsageTypeError, match="str or a Path"):
        parse(target)
    with pytest.raises(UsageTypeError):
        Checkpoint(target)


def test_a_path_of_bytes_is_refused():
    class BytesPath(os.PathLike[bytes]):
        def __fspath__(self):
            return b"/a"

    with pytest.raises(UsageTypeError):
        parse(BytesPath())  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [None, "", " ", "\t\n", '""', "''", "{{x}}", " {{.prevCheckpointPrefix}} "])
def test_unset(source):
    assert is_unset(source)


@pytest.mark.parametrize("source", ["a", "/", "{{x}}/a", "a{{x}}", '"', Path(), Path("{{x}}"), 0, b"", [], False])
def test_not_unset(source):
    assert not is_unset(source)


# --- opening -----------------------------------------------------------------------------------


def test_opening_looks_at_nothing(tmp_path):
    assert opened(str(tmp_path / "absent")).uri == str(tmp_path / "absent")
    assert opened("s3://no-such-bucket/a").uri == "s3://no-such-bucket/a"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("url", "near"), [("s4://bucket/a", "s3"), ("memry://a", "memory"), ("qqqqqq://a/b", "")])
def test_an_unknown_protocol_is_never_the_local_disk(url, near, tmp_path):
    for call in (
        lambda: opened(url),
        lambda: Checkpoint(url).load_sync(),
        lambda: Checkpoint(url).save_sync(b"x"),
        lambda: Checkpoint(tmp_path / "task", url).load_sync(),
    ):
        with pytest.raises(UsageError, match="Unknown protocol") as caught:
            call()
        assert near in str(caught.value.hint)
    # Only the task whose src is wrong has been claimed.
    assert {path.name for path in tmp_path.iterdir()} <= {"task"}


def missing(monkeypatch, *modules):
    import fsspec  # noqa: F401 - its attribute of this name is not the module

    monkeypatch.setenv("TASKCKPT_TRANSFER", "fsspec")  # obstore would do without
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    for protocol in ("s3", "gs", "az"):  # what was found before is remembered
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/a", "gcsfs"), ("az://bucket/a", "adlfs")])
def test_a_missing_package_is_named(monkeypatch, url, package):
    missing(monkeypatch, package)
    for call in (Checkpoint(url).load_sync, lambda: Checkpoint(url).save_sync(b"x")):
        with pytest.raises(MissingDependencyError, match=package) as caught:
            call()
        assert isinstance(caught.value, ImportError)


def test_without_s3fs_the_extra_is_named(monkeypatch):
    missing(monkeypatch, "s3fs")
    with pytest.raises(MissingDependencyError, match=r"taskckpt\[s3\]"):
        Checkpoint("s3://bucket/a").load_sync()


@pytest.mark.parametrize("url", ["s3://bucket/a", "memory://a"])
def test_asynchronous_file_systems_are_refused(url):
    with pytest.raises(UsageError, match="asynchronous"):
        Checkpoint(url, storage_options={"asynchronous": True}).load_sync()


@pytest.mark.parametrize(
    "options", [{"client_kwargs": 7}, {"endpoint_url": "no endpoint"}, {"client_kwargs": {"no_such_argument": 1}}]
)
def test_options_that_do_not_fit_are_a_usage_error(options):
    with pytest.raises(UsageError, match="storage_options"):
        Checkpoint("s3://bucket/a", storage_options={"key": "a", "secret": "b", **options}).load_sync()


def test_memory_says_what_it_is():
    with pytest.warns(TaskckptWarning, match="this process only"):
        opened("memory://a")
