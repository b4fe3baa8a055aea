from __future__ import annotations

import os
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskckpt import latest_checkpoint
from taskckpt.errors import DeniedError, NotFoundError, TaskckptWarning, UsageError, UsageTypeError
from taskckpt.latest import natural_order

ALL = "**/*"


@pytest.fixture
def make(tmp_path):
    def make(name: str, *, mtime: float = 1_000_000_000, content: str = "x"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        os.utime(path, (mtime, mtime))
        return path

    return make


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_no_root_gives_none():
    assert latest_checkpoint(None) is None
    assert latest_checkpoint(None, "[", key=lambda path: 0) is None


def test_the_newest_by_mtime(root, make):
    make("version_0/last.ckpt", mtime=2000)
    newest = make("version_1/last.ckpt", mtime=3000)
    make("version_2/last.ckpt", mtime=1000)
    make("version_2/other.ckpt", mtime=9000)
    assert latest_checkpoint(root) == newest
    assert latest_checkpoint(str(root)) == newest


def test_nanoseconds_count(root, make):
    for name, ns in (("b/last.ckpt", 1), ("a/last.ckpt", 2)):
        os.utime(make(name), ns=(0, 10**18 + ns))
    assert latest_checkpoint(root) == root / "a/last.ckpt"


def test_the_newest_by_key(root, make):
    for step in (3, 20, 100):
        make(f"step-{step}.ckpt", mtime=1000 - step, content="x" * (200 - step))
    assert latest_checkpoint(root, "*.ckpt", key=lambda path: path.stat().st_size) == root / "step-3.ckpt"
    assert latest_checkpoint(root, "*.ckpt", key=lambda path: int(path.stem[5:])) == root / "step-100.ckpt"


def test_ties_go_to_the_natural_order_of_the_name(root, make):
    for step in (1, 2, 9, 10, 100, 11):
        make(f"step-{step}.ckpt")
    assert latest_checkpoint(root, "*.ckpt") == root / "step-100.ckpt"
    assert latest_checkpoint(root, "*.ckpt", key=lambda path: 0) == root / "step-100.ckpt"
    (root / "step-100.ckpt").unlink()
    assert latest_checkpoint(root, "*.ckpt") == root / "step-11.ckpt"
    make("epoch=9/step-99.ckpt")
    make("epoch=10/step-1.ckpt")
    assert latest_checkpoint(root, "epoch*/*.ckpt") == root / "epoch=10/step-1.ckpt"


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=10, unique=True))
def test_numbers_sort_as_numbers(numbers):
    from pathlib import Path

    names = [Path(f"a{n}b{n % 7}.ckpt") for n in numbers]
    assert sorted(names, key=natural_order) == [Path(f"a{n}b{n % 7}.ckpt") for n in sorted(numbers)]


@given(st.lists(st.text(alphabet="a0²٣9-_.", min_size=1, max_size=8), min_size=2, max_size=6))
def test_any_names_can_be_compared(names):
    from pathlib import Path

    assert sorted(map(Path, names), key=natural_order)


def test_empty_files_are_passed_over(root, make):
    full = make("a/last.ckpt", mtime=1000)
    make("b/last.ckpt", mtime=2000, content="")
    assert latest_checkpoint(root) == full


def test_dangling_links_are_passed_over(root, make):
    full = make("a/last.ckpt")
    (root / "b").mkdir()
    (root / "b" / "last.ckpt").symlink_to(root / "nowhere")
    (root / "c").mkdir()
    (root / "c" / "last.ckpt").symlink_to("last.ckpt")  # a link to itself
    assert latest_checkpoint(root) == full


def test_a_link_to_a_file_counts_as_that_file(root, make):
    make("a/one.ckpt", mtime=3000)
    make("b/last.ckpt", mtime=2000)
    (root / "c").mkdir()
    (root / "c" / "last.ckpt").symlink_to("../a/one.ckpt")
    assert latest_checkpoint(root) == root / "c" / "last.ckpt"


def test_folders_are_passed_over(root, make):
    full = make("a/last.ckpt", mtime=1000)
    (root / "b" / "last.ckpt").mkdir(parents=True)
    (root / "b" / "last.ckpt" / "x").write_text("x")
    assert latest_checkpoint(root) == full
    assert latest_checkpoint(root, "*/last.ckpt") == full


def test_an_empty_root_gives_none_and_says_nothing(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_checkpoint(root) is None
        (root / "empty" / "er").mkdir(parents=True)
        assert latest_checkpoint(root) is None


def test_no_match_warns_and_names_a_few_files(root, make):
    for number in range(8):
        make(f"sub/model-{number}.pt")
    with pytest.warns(TaskckptWarning, match=r"fits '\*\*/last\.ckpt'") as caught:
        assert latest_checkpoint(root) is None
    (warning,) = caught
    text = str(warning.message)
    assert str(root) in text
    assert [f"model-{n}.pt" in text for n in range(8)] == [True] * 5 + [False] * 3
    assert text.endswith(", ...")
    assert warning.filename == __file__, "the warning points at the caller"


def test_only_empty_files_match_warns_too(root, make):
    make("last.ckpt", content="")
    with pytest.warns(TaskckptWarning, match=r"last\.ckpt"):
        assert latest_checkpoint(root) is None


def test_a_root_that_is_a_file(root, make):
    path = make("last.ckpt")
    with pytest.raises(UsageError, match="is a file") as info:
        latest_checkpoint(path)
    assert info.value.uri == str(path)
    assert info.value.hint


@pytest.mark.parametrize(
    "uri", ["s3://bucket/x", "gs://b", "memory://x", "http://a/b", "file:///tmp", "S3://b/x", "abfs://a@b/c"]
)
def test_a_remote_root(uri):
    with pytest.raises(UsageError, match="is a URL") as info:
        latest_checkpoint(uri)
    assert "load()" in str(info.value.hint)


def test_a_root_that_is_not_there(tmp_path):
    with pytest.raises(NotFoundError) as info:
        latest_checkpoint(tmp_path / "misspelt")
    assert info.value.uri == str(tmp_path / "misspelt")


@pytest.mark.parametrize("root", ["", "  "])
def test_a_blank_root(root):
    with pytest.raises(UsageError, match="blank"):
        latest_checkpoint(root)


@pytest.mark.parametrize("root", [7, ["a"], {"a"}, b"/tmp", True, object()])
def test_a_root_of_a_wrong_type(root):
    with pytest.raises(UsageTypeError):
        latest_checkpoint(root)


@pytest.mark.parametrize("glob", ["", "/", "/etc/*", "/etc/passwd"])
def test_a_pattern_that_is_not_relative(root, glob):
    with pytest.raises(UsageError, match="relative pattern"):
        latest_checkpoint(root, glob)


@pytest.mark.parametrize("glob", [7, None, b"*", ["*"]])
def test_a_pattern_of_a_wrong_type(root, glob):
    with pytest.raises(UsageTypeError):
        latest_checkpoint(root, glob)


@pytest.mark.parametrize("glob", ["a**b", "../*", "../**/*", "**/../../*"])
def test_a_pattern_that_makes_no_sense_or_climbs_out(root, make, tmp_path, glob):
    """What lies outside of root is never found, whatever the pattern is."""
    make("last.ckpt")
    (tmp_path / "outside.ckpt").write_text("x")
    with pytest.raises(UsageError):
        latest_checkpoint(root, glob)


def test_relative_roots(root, make, monkeypatch):
    make("a/last.ckpt")
    monkeypatch.chdir(root)
    found = latest_checkpoint(".")
    assert found is not None
    assert found.resolve() == root / "a" / "last.ckpt"


def test_hidden_files_count_like_others(root, make):
    assert make(".hidden/last.ckpt") == latest_checkpoint(root)


def test_errors_of_key_are_not_hidden(root, make):
    make("last.ckpt")
    with pytest.raises(ZeroDivisionError):
        latest_checkpoint(root, key=lambda path: 1 / 0)


def test_a_key_that_cannot_be_compared(root, make):
    make("a/last.ckpt")
    make("b/last.ckpt")
    with pytest.raises(TypeError):
        latest_checkpoint(root, key=lambda path: object())


def test_a_folder_that_may_not_be_read(root, monkeypatch):
    """Python's glob takes it for an empty one. Root may read everything, so the refusal is played."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DeniedError):
        latest_checkpoint(root)


def test_what_load_gave(tmp_path):
    """As in the example of the source document: a restored folder, and the newest file in it."""
    from taskckpt import Checkpoint

    out = tmp_path / "out"
    (out / "lightning" / "version_3").mkdir(parents=True)
    (out / "lightning" / "version_3" / "last.ckpt").write_text("weights")
    Checkpoint(tmp_path / "task").save_sync(out)
    restored = Checkpoint(tmp_path / "task").load_sync()
    found = latest_checkpoint(restored)
    assert found is not None
    assert found.read_text() == "weights"
    assert latest_checkpoint(Checkpoint(tmp_path / "nothing").load_sync()) is None
