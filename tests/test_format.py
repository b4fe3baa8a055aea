"""The stored format against its document: a second reader agrees with the package, and old bytes load for ever."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from blake3 import blake3

from taskckpt import Checkpoint, _chain
from taskckpt._archive import gzip as _gzip
from taskckpt._archive import tar as _tar
from taskckpt._layout import keyed_prefix, task_prefix
from taskckpt._log import records as _records
from taskckpt._log import retention as _retention
from taskckpt._log import slots as _log
from taskckpt.errors import CorruptCheckpointError, UnsupportedFormatError
from tests import format_reader
from tests.format_reader import CorruptError, Found, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "data" / "format-1"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
DOCUMENT = (ROOT / "docs" / "format.md").read_text()


# --- what each reader says, in one language


def package_says(place: Path, scratch: Path) -> Found | str | None:
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        loaded = Checkpoint(place, read_only=True).load_sync(to=scratch)
    except CorruptCheckpointError:
        return "corrupt"
    except UnsupportedFormatError:
        return "unsupported"
    if loaded is None:
        return None
    if loaded.is_file():
        return Found("bytes or file", loaded.read_bytes())
    tree = {str(path.relative_to(loaded)): _seen(path) for path in loaded.rglob("*")}
    return Found("folder", {".": None} | tree)


def _seen(path: Path) -> Any:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    return path.read_bytes() if path.is_file() else None


def reader_says(place: Path) -> Found | str | None:
    try:
        found = format_reader.newest(place)
    except CorruptError:
        return "corrupt"
    except UnsupportedError:
        return "unsupported"
    if found is None or found.kind == "folder":
        return found
    return Found("bytes or file", found.content)


def both_say(place: Path, scratch: Path) -> Found | str | None:
    package, reader = package_says(place, scratch), reader_says(place)
    assert package == reader
    return package


# --- golden checkpoints


def test_golden_checkpoints_are_all_here() -> None:
    assert set(EXPECTED) == {path.name for path in GOLDEN.iterdir() if path.is_dir()}
    assert len(EXPECTED) == 14


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_checkpoints_load_for_ever(name: str, tmp_path: Path) -> None:
    expected, place = EXPECTED[name], tmp_path / name
    shutil.copytree(GOLDEN / name, place)  # a load by the package may write beside it
    if expected in (None, "corrupt"):
        assert both_say(place, tmp_path / "scratch") == expected
        return
    found = format_reader.newest(place)
    assert found is not None
    Checkpoint(place).load_sync(to=tmp_path / "restored")  # as its next attempt, not as a mere reader
    for shown, entry in expected.items():
        path = tmp_path / "restored" / os.fsdecode(_bytes(shown))
        if "target" in entry:
            assert str(path.readlink()) == entry["target"]
            assert found.content[shown] == f"-> {entry['target']}"
            continue
        if "mode" in entry:
            info = path.stat()
            assert (f"{info.st_mode:o}", str(info.st_mtime_ns)) == (entry["mode"], entry["mtime_ns"])
        if "content" in entry:
            content = _bytes(entry["content"])
            assert path.read_bytes() == content
            assert content == (found.content[shown] if found.kind == "folder" else found.content)
    names = {os.fsdecode(_bytes(shown)) for shown in expected} - {"."}
    assert {str(path.relative_to(tmp_path / "restored")) for path in (tmp_path / "restored").rglob("*")} == names


def test_the_golden_state_is_that_state(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "state", tmp_path / "state")
    nested = {"lr": 1e-3, "done": [True, None], "data": bytes(range(200)) * 100}
    assert Checkpoint(tmp_path / "state").load_state_sync() == {"step": 7, "name": "größer", "nested": nested}
    found = format_reader.newest(GOLDEN / "state")
    assert found is not None
    assert found.kind == "state"


def _bytes(shown: str) -> bytes:
    return base64.b64decode(shown[7:]) if shown.startswith("base64:") else shown.encode()


def test_hard_links_of_the_golden_tree_are_one_file_again(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "tree", tmp_path / "tree")
    root = Checkpoint(tmp_path / "tree", read_only=True).load_sync()
    assert root is not None
    assert (root / "a.txt").samefile(root / "b.txt")


@pytest.mark.parametrize("name", [name for name, expected in EXPECTED.items() if expected is not None])
def test_every_bit_of_a_golden_checkpoint_counts(name: str, tmp_path: Path) -> None:
    """A flipped bit gives an older checkpoint or an error: never another content, and never None."""
    chance, saved = random.Random(name), contents_ever_saved(GOLDEN / name)
    for number in range(6):
        place = tmp_path / str(number)
        shutil.copytree(GOLDEN / name, place)
        path = chance.choice([path for path in sorted(place.rglob("*")) if path.is_file() and path.stat().st_size])
        flip(path, chance)
        said = both_say(place, tmp_path / "scratch")
        assert said == "corrupt" or (isinstance(said, Found) and said.content in saved), path.name


def contents_ever_saved(place: Path) -> list[Any]:
    saved = []
    for path in (place / "log").iterdir():
        try:
            record = format_reader._record(path, int(path.name[13:25]))
            if record["kind"] == "commit":
                saved.append(format_reader._restored(place, record["checkpoint"]).content)
        except CorruptError:
            continue
    return saved


# --- histories


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def save_bytes(checkpoint: Checkpoint, chance: random.Random) -> None:
    checkpoint.save_sync(chance.choice([b"", b"text", chance.randbytes(40), "größer ☃\n".encode()]))


def save_many_bytes(checkpoint: Checkpoint, chance: random.Random) -> None:
    checkpoint.save_sync(chance.randbytes(65 * 1024))


def save_file(checkpoint: Checkpoint, chance: random.Random) -> None:
    path = Path(f"model {chance.randrange(9)}.bin")
    path.write_bytes(chance.randbytes(chance.randrange(3000)))
    checkpoint.save_sync(path)


def save_folder(checkpoint: Checkpoint, chance: random.Random) -> None:
    shutil.rmtree("tree", ignore_errors=True)
    for number in range(chance.randrange(5)):
        path = Path("tree", *["sub"] * chance.randrange(3), f"{'x' * chance.choice([1, 120])}{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(chance.randrange(2000)))
        os.symlink(path.name, f"{path}-link")
    Path("tree").mkdir(exist_ok=True)
    checkpoint.save_sync("tree")


SAVES: list[Callable[[Checkpoint, random.Random], None]] = [save_bytes, save_many_bytes, save_file, save_folder]


def live(place: Path, chance: random.Random, *, src: Path | None = None) -> None:
    """One attempt: it may load, save, clear, and leave damage behind."""
    checkpoint = Checkpoint(place, src, keep=chance.choice([1, 2, 3, None]))
    if chance.random() < 0.7:
        try:
            checkpoint.load_sync()
        except CorruptCheckpointError:
            checkpoint.clear_sync()
    for _ in range(chance.randrange(5)):
        chance.choice(SAVES)(checkpoint, chance)
    if chance.random() < 0.1:
        checkpoint.clear_sync()


def damage(place: Path, chance: random.Random) -> None:
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size)
    # The newest records are where it hurts.
    path = chance.choice(files) if chance.random() < 0.3 else min((place / "log").iterdir())
    match chance.randrange(4):
        case 0:
            path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
        case 1 if path.parent.name != "log":
            path.unlink()
        case _:
            flip(path, chance)


@pytest.mark.parametrize("seed", range(40))
def test_the_second_reader_agrees_over_random_histories(seed: int, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.ERROR, logger="taskckpt")
    chance, place = random.Random(seed), tmp_path / "place"
    for _ in range(chance.randrange(1, 5)):
        live(place, chance)
        both_say(place, tmp_path / "scratch")
        if (place / "log").is_dir() and chance.random() < 0.4:
            damage(place, chance)
            both_say(place, tmp_path / "scratch")


@pytest.mark.parametrize("seed", range(10))
def test_the_second_reader_follows_sources_as_the_package_does(seed: int, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.ERROR, logger="taskckpt")
    chance = random.Random(1000 + seed)
    places = [tmp_path / f"place {number}" for number in range(4)]
    for place, src in zip(places, [None, *places], strict=False):
        live(place, chance, src=src)
        if (place / "log").is_dir() and chance.random() < 0.3:
            damage(place, chance)
    both_say(places[-1], tmp_path / "scratch")


def test_histories_have_all_outcomes(tmp_path: Path, caplog) -> None:
    """The two tests above would say nothing if every history ended alike."""
    caplog.set_level(logging.ERROR, logger="taskckpt")
    kinds = set()
    for seed in range(60):
        chance, place = random.Random(seed), tmp_path / str(seed)
        live(place, chance)
        if (place / "log").is_dir():
            damage(place, chance)
        said = reader_says(place)
        kinds.add(said.kind if isinstance(said, Found) else said)
    assert kinds == {None, "corrupt", "folder", "bytes or file"}


# --- the turns of the walk that random histories seldom take


def file_of(content: bytes) -> Path:
    path = Path("file.bin")
    path.write_bytes(content)
    return path


def break_newest_payload(place: Path) -> None:
    record = json.loads(min((place / "log").iterdir()).read_bytes().partition(b"\n")[0])
    (place / record["checkpoint"]["stored"]["key"]).write_bytes(b"?")


def both_read(place: Path) -> bytes | str | None:
    said = both_say(place, place.parent / "scratch")
    return said.content if isinstance(said, Found) else said


def test_a_commit_that_is_not_retained_is_passed_over(tmp_path: Path) -> None:
    place = tmp_path / "place"
    checkpoint = Checkpoint(place, keep=2)
    for content in (b"one", b"two", b"three"):
        checkpoint.save_sync(file_of(content) if content == b"three" else content)
    break_newest_payload(place)
    assert both_read(place) == b"two"
    flip(sorted((place / "log").iterdir())[1], random.Random(0))
    assert both_read(place) == "corrupt"  # "one" may be half deleted by now: the newest commit gave it up


def test_what_was_unreadable_when_the_task_was_claimed_counts_again_once_it_is_repaired(tmp_path: Path) -> None:
    place = tmp_path / "place"
    checkpoint = Checkpoint(place)
    checkpoint.save_sync(b"old")
    checkpoint.save_sync(b"new")
    newest = min((place / "log").iterdir())
    whole = newest.read_bytes()
    newest.write_bytes(whole[:50])
    assert Checkpoint(place).load_bytes_sync() == b"old"
    assert both_read(place) == b"old"
    newest.write_bytes(whole)
    assert both_read(place) == b"new"


def test_a_commit_below_the_floor_that_is_kept_is_found(tmp_path: Path) -> None:
    place = tmp_path / "place"
    checkpoint = Checkpoint(place)
    checkpoint.save_sync(b"good")
    checkpoint.save_sync(file_of(b"damaged"))
    break_newest_payload(place)
    retry = Checkpoint(place, keep=1)
    assert retry.load_bytes_sync() == b"good"
    retry.save_sync(file_of(b"damaged too"))
    break_newest_payload(place)
    assert both_read(place) == b"good"


def test_sources_are_asked_when_all_own_state_is_damaged(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "source").save_sync(b"from the source")
    place = tmp_path / "place"
    Checkpoint(place, tmp_path / "source").save_sync(file_of(b"own"))
    assert both_read(place) == b"own"
    break_newest_payload(place)
    assert both_read(place) == b"from the source"


def test_a_clear_ends_the_way_to_the_sources(tmp_path: Path) -> None:
    place, source = tmp_path / "place", tmp_path / "source"
    Checkpoint(source).save_sync(b"from the source")
    checkpoint = Checkpoint(place, source)
    assert checkpoint.load_bytes_sync() == b"from the source"
    assert both_read(place) == b"from the source"
    checkpoint.clear_sync()
    assert both_read(place) is None
    assert Checkpoint(place, source).load_sync() is None
    assert both_read(place) is None


def test_a_torn_first_record_is_no_lost_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "place"
    assert Checkpoint(place).load_sync() is None
    record = min((place / "log").iterdir())
    record.write_bytes(record.read_bytes()[:-20])
    assert both_read(place) is None


def test_a_damaged_first_record_may_have_named_a_source(tmp_path: Path) -> None:
    place = tmp_path / "place"
    assert Checkpoint(place).load_sync() is None
    flip(min((place / "log").iterdir()), random.Random(0))
    assert both_say(place, tmp_path / "scratch") == "corrupt"


# --- history


def task_of(place: Path, steps: int = 3, **options: Any) -> Checkpoint:
    checkpoint = Checkpoint(place, **options)
    for step in range(1, steps + 1):
        checkpoint.save_sync(file_of(b"step %d" % step), step=step, metadata={"a": 1}, metrics={"loss": float("nan")})
    return checkpoint


def test_what_was_rolled_back_is_never_fallen_back_to(tmp_path: Path) -> None:
    place = tmp_path / "place"
    checkpoint = task_of(place)
    checkpoint.rollback_sync(1)
    assert both_read(place) == b"step 1"
    checkpoint.save_sync(file_of(b"other"), step=2)
    assert both_read(place) == b"other"
    break_newest_payload(place)
    assert both_read(place) == b"step 1"


def test_a_pinned_task_still_loads_its_newest(tmp_path: Path) -> None:
    place = tmp_path / "place"
    task_of(place, keep=1).pin_sync(3)
    assert both_read(place) == b"step 3"
    Checkpoint(place, keep=1).save_sync(b"new")
    assert both_read(place) == b"new"


def test_positions_alone_are_no_checkpoint_and_do_not_hide_a_source(tmp_path: Path) -> None:
    place, source = tmp_path / "place", tmp_path / "source"
    for _ in Checkpoint(place).iterate(range(3)):
        pass
    assert both_read(place) is None
    task_of(source)
    other = tmp_path / "other"
    checkpoint = Checkpoint(other, source)
    for _ in checkpoint.iterate(range(3), every=1):
        pass
    assert [one.kind for one in checkpoint.checkpoints_sync()] == ["nothing"]
    assert both_read(other) == b"step 3"


def test_a_fork_is_followed_to_one_checkpoint(tmp_path: Path) -> None:
    place, source = tmp_path / "place", tmp_path / "source"
    original = task_of(source)
    first = original.checkpoints_sync()[-1]
    assert Checkpoint(place, fork_from=first).load_bytes_sync() == b"step 1"
    original.rollback_sync(1)
    original.save_sync(b"goes on", step=4)
    assert both_read(place) == b"step 1"


def test_a_page_of_the_index_is_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("writer", "catalogue"):
        monkeypatch.setattr(f"taskckpt._log.{room}.PAGE_COMMITS", 4)
    place = tmp_path / "place"
    checkpoint = Checkpoint(place, keep=None)
    for step in range(4):
        checkpoint.save_sync(b"%d" % step, step=step)
    (page,) = (place / "index").iterdir()
    assert re.fullmatch(r"000000000001-000000000005-[0-9a-f]{16}\.jsonl", page.name)
    *lines, last = page.read_bytes().splitlines(keepends=True)
    assert json.loads(last) == {"first": 1, "last": 5, "blake3": blake3(b"".join(lines)).hexdigest()}
    for step, (first, second) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        assert json.loads(second) == {"blake3": blake3(first).hexdigest()}
        body = json.loads(first)
        record = json.loads(record_in(place, body["slot"]).read_bytes().partition(b"\n")[0])
        assert body["checkpoint"]["step"] == step
        assert body["checkpoint"]["stored"].pop("left_out") is True
        del record["checkpoint"]["stored"]["inline"]
        assert body == record


def record_in(place: Path, slot: int) -> Path:
    return place / "log" / f"{999_999_999_999 - slot:012d}-{slot:012d}.jsonl"


# --- what a reader must refuse, and what it must pass over


def rewrite_newest(place: Path, **changes: Any) -> None:
    path = min((place / "log").iterdir())
    body = json.loads(path.read_bytes().partition(b"\n")[0]) | changes
    first = json.dumps(body).encode() + b"\n"
    path.write_bytes(first + b'{"blake3": "%s"}\n' % blake3(first).hexdigest().encode())


@pytest.mark.parametrize("changes", [{"format": 2}, {"kind": "pin"}, {"format": 2, "slot": "other"}])
def test_what_a_newer_version_wrote_is_refused_not_stepped_over(changes, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "place")
    checkpoint.save_sync(b"old")
    checkpoint.save_sync(b"new")
    rewrite_newest(tmp_path / "place", **changes)
    assert both_say(tmp_path / "place", tmp_path / "scratch") == "unsupported"


def test_unknown_fields_are_passed_over(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "place").save_sync(b"state")
    rewrite_newest(tmp_path / "place", step=17, labels={"kept": "for ever"})
    assert both_say(tmp_path / "place", tmp_path / "scratch") == Found("bytes or file", b"state")


@pytest.mark.parametrize("changes", [{"slot": 1}, {"count": None}, {"claim": []}, {"kept": {}}])
def test_a_record_that_says_nonsense_is_damaged_whatever_its_digest(changes, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "place")
    checkpoint.save_sync(b"old")
    checkpoint.save_sync(b"new")
    rewrite_newest(tmp_path / "place", **changes)
    assert both_say(tmp_path / "place", tmp_path / "scratch") == Found("bytes or file", b"old")


def test_names_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    place = tmp_path / "place"
    Checkpoint(place).save_sync(b"state")
    for name in (
        "000000000000-999999999998.jsonl",
        "999999999999-000000000000.jsonl",
        ".partial-999999999990-000000000009.jsonl~1",
        "999999999990-000000000009.jsonl.bak",
        ".nfs0001",
    ):
        (place / "log" / name).write_bytes(b"?")
    assert both_say(place, tmp_path / "scratch") == Found("bytes or file", b"state")


# --- the document


def folder_as_documented(text: str) -> str:
    """Section 2, "Names of folders", written down a second time."""
    plain = re.fullmatch(r"[a-z0-9_-]([a-z0-9._-]{0,78}[a-z0-9_-])?", text)
    if plain and not re.search(r"\.[0-9a-f]{16}\Z", text) and not is_device(text):
        return text
    readable = re.sub("[^A-Za-z0-9._-]+", "-", text).strip("-.").replace("..", ".")[:60].rstrip("-.") or "task"
    readable = f"_{readable}" if is_device(readable) else readable
    return f"{readable}.{short_hash(text)}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def is_device(text: str) -> bool:
    stem = text.lower().partition(".")[0]
    return stem in ("con", "prn", "aux", "nul") or re.fullmatch("(com|lpt)[0-9]", stem) is not None


def test_folders_are_named_as_documented() -> None:
    chance = random.Random(5)
    texts = [
        "../etc",
        "nightly-etl",
        "Train",
        "con",
        "com1.x",
        "console",
        "CON",
        "Lpt9.a",
        "by-key",
        "",
        ".",
        "a" * 80,
        "a" * 81,
    ]
    texts += ["x.0123456789abcdef", "größer", "\ud800", "a..b...c", "-a-", "f(x=1, y='2')", "x\n"]
    texts += ["".join(chance.choices("ab.-_/ AÄ0", k=chance.randrange(1, 90))) for _ in range(500)]
    for text in texts:
        assert keyed_prefix(text) == f"by-key/{folder_as_documented(text)}"
        run = f"by-key.{short_hash(text)}" if text == "by-key" else folder_as_documented(text)
        assert task_prefix(text, text) == f"{run}/{folder_as_documented(text)}"
    assert "`../etc` becomes `etc.f7f9121fdb53d8de`" in DOCUMENT
    assert folder_as_documented("../etc") == "etc.f7f9121fdb53d8de"


def test_the_worked_example_of_the_document_is_true(tmp_path: Path) -> None:
    place = tmp_path / "place"
    written = example_files(DOCUMENT)
    assert len(written) == 6
    for name, data in written.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert both_say(place, tmp_path / "scratch") == Found("bytes or file", b"\xff\x00")
    # Without the last record the folder is the newest: both readers take the payload apart.
    min((place / "log").iterdir()).unlink()
    assert both_say(place, tmp_path / "scratch") == Found("folder", {".": None, "notes.txt": b"step 2\n"})


def example_files(document: str) -> dict[str, bytes]:
    """Blocks headed by a file name in bold: as they are, or base64 if the heading says so."""
    found = {}
    pattern = r"^\*\*`((?:log|data)/[^`]+)`\*\*([^\n]*)\n+```\w*\n(.*?)```$"
    for name, how, text in re.findall(pattern, document, re.MULTILINE | re.DOTALL):
        found[name] = base64.b64decode(text) if "base64" in how else text.encode()
    return found


def test_the_numbers_of_the_document_are_those_of_the_package() -> None:
    for said in (
        f"at most {_tar.MAX_PATH_BYTES:,} bytes, {_tar.MAX_NAME_BYTES} a component and {_tar.MAX_DEPTH} folders deep",
        f"`bytes` of at most {_records.INLINE_LIMIT_BYTES:,}",
        f"the newest {_retention.GUARDED_SLOTS} slots",
        f"newest first, at most {_log.MAX_FENCED} |",
        f"in the order to look; at most {_log.MAX_SOURCES} |",
        f"at most {_chain.MAX_RECORDS_BACK} records from the newest down",
        f"makes\na member of every {_gzip.BLOCK_BYTES >> 20} MiB",
    ):
        assert said in DOCUMENT


def test_every_field_that_is_written_is_in_the_document(tmp_path: Path) -> None:
    chance, names = random.Random(1), set[str]()
    checkpoint = Checkpoint(tmp_path / "place", tmp_path / "other")
    for save in SAVES:
        save(checkpoint, chance)
    checkpoint.save_sync(b"\xff")
    checkpoint.clear_sync()
    history = task_of(tmp_path / "place", keep=None)
    history.pin_sync(2)
    history.rollback_sync(1)
    for item in history.iterate(range(2)):
        history.save_sync(b"x", step=10 + item)

    def collect(value: object) -> None:
        if isinstance(value, dict):
            names.update(key for key in value if isinstance(key, str))
            for key, inner in value.items():
                if key not in ("about", "metadata", "metrics"):  # information, in no fixed form
                    collect(inner)

    for path in (tmp_path / "place" / "log").iterdir():
        for line in path.read_bytes().splitlines():
            collect(json.loads(line))
    assert {"entries", "mtime_ns", "continues_from", "base64", "inline"} <= names
    assert {"left_behind", "highest_step", "pinned", "repeats", "catalogued", "positions", "metadata"} <= names
    assert not {name for name in names if f"`{name}`" not in DOCUMENT}
