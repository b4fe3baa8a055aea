from __future__ import annotations

import string
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from taskckpt import _layout
from taskckpt._layout import (
    DATA,
    HIGHEST_SLOT,
    KEYED_RUN,
    SlotName,
    claim_of_payload,
    folder_name,
    keyed_prefix,
    parse_slot_name,
    payload_key,
    run_folder,
    slot_key,
    task_prefix,
)

ALLOWED = set(string.ascii_letters + string.digits + "._-")
DEVICES = ["con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(10))]

NASTY = [
    *("", " ", ".", "..", "...", "/", "//", "\\", "~", "-", "_", "*", "?", "%", "%2e%2e", "{{run}}", "\0", "\n"),
    *("../etc", "../../etc/passwd", "/etc/passwd", "a/../b", "a/./b", "a//b", "a/", "/a", "a\\b", "C:\\x", "C:"),
    *("a.", "a..", "a ", " a", "a.b", ".a", ".hidden", "-rf", "--help", "$HOME", "`id`", "a;b", "a|b", "a\0b"),
    *("Train", "train", "TRAIN", "tRain", "é", "e\u0301", "Ⅷ", "ﬀ", "ff", "ß", "SS", "ss", "İ", "i", "\u0131", "I"),
    *("a\u202eb", "\ufeffa", "\ud800", "a\udcff", "😀", "日本", "a\tb", "a\r\nb", "a" * 80, "a" * 81, "a" * 300),
    *("log", "data", KEYED_RUN, "by-key/", "by-key/x", "BY-KEY", "By-Key", "by-key.", "local", "LOCAL"),
    *("etc.f7f9121fdb53d8de", "a.0123456789abcdef", "a.0123456789ABCDEF", "task.0123456789abcdef", ".0123456789abcdef"),
    *DEVICES, *(name.upper() for name in DEVICES), *(f"{name}.txt" for name in DEVICES),
    *("s3://bucket/x", "file:///etc", "train(lr=0.1)", "train(lr=0.1) ", "train-lr-0.1-"),
    *("f(x=1) @ /a.py", "f(x=1) @ /b.py"),
]  # fmt: skip

# Short alphabets make near misses likely; whole texts bring what nobody thought of.
names = st.one_of(
    st.sampled_from(NASTY),
    st.text(),
    st.text(alphabet="aA.-_/ 0f", max_size=12),
    st.text(alphabet="ab.", min_size=70, max_size=100),
    st.text(alphabet=st.characters(codec=None, categories=("Cs", "Lu", "Ll")), max_size=8),
    st.from_regex(r"[a-z]{0,3}\.[0-9a-f]{15,17}", fullmatch=True),
)


def hostile_identities() -> list[str]:
    made = list(dict.fromkeys(NASTY))
    made += [f"{a}{b}" for a in ("../", "a/", ".", "x:", "A") for b in NASTY][: 300 - len(made)]
    return list(dict.fromkeys(made))


def check_folder_name(folder: str) -> None:
    assert folder
    assert set(folder) <= ALLOWED
    assert len(folder) <= 80
    assert folder not in (".", "..")
    assert not folder.startswith(".")
    assert not folder.endswith(".")  # Windows drops it
    assert folder.partition(".")[0].lower() not in DEVICES


@settings(max_examples=1000)
@given(names)
@example("a..b")
def test_folder_names_are_safe(name):
    check_folder_name(folder_name(name))
    assert folder_name(name) == folder_name(name)


@settings(max_examples=2000)
@given(names, names)
@example("Train", "train")
@example("a/b", "a-b")
@example("../etc", "etc.f7f9121fdb53d8de")
def test_different_names_never_share_a_folder(one, two):
    # Upper and lower case count as one, as on the disks of macOS and Windows.
    assert (folder_name(one).lower() == folder_name(two).lower()) == (one == two)


def test_nasty_names_are_told_apart_by_every_disk():
    nasty = list(dict.fromkeys(NASTY))
    folders = [unicodedata.normalize("NFC", folder_name(name)).casefold() for name in nasty]
    assert len(set(folders)) == len(nasty)


@given(names)
def test_an_escaped_name_is_never_the_escape_of_another(name):
    # A folder's name used as a name again (people copy what they see) is a different task.
    folder = folder_name(name)
    assert folder == name or folder_name(folder) != folder


@pytest.mark.parametrize("name", ["nightly-etl", "a", "0", "_", "train_7.v2", "x" * 80, "2026-11-21"])
def test_plain_names_stay_as_they_are(name):
    assert folder_name(name) == name


def test_known_answers():
    """These folders exist on users' disks: the function may never change."""
    assert folder_name("train(lr=0.1)") == "train-lr-0.1.193bb8dafa9e442e"
    assert folder_name("Train") == "Train.e99c90db87c0e400"
    assert folder_name("a" * 81) == "a" * 60 + ".8c48280d57fb88f1"
    assert folder_name("../etc") == "etc.f7f9121fdb53d8de"
    assert folder_name("") == "task.e3b0c44298fc1c14"  # SHA-256 of nothing
    assert folder_name("\ud800").startswith("task.")


@given(names, names)
@example(KEYED_RUN, "x")
@example(KEYED_RUN.upper(), "x")
def test_no_run_gets_into_the_folder_of_keyed_tasks(run, task):
    assert run_folder(run).lower() != KEYED_RUN
    assert task_prefix(run, task).partition("/")[0].lower() != KEYED_RUN
    assert keyed_prefix(task).startswith(f"{KEYED_RUN}/")


def test_300_hostile_identities_touch_no_foreign_key():
    """Each identity's keys lie below its own prefix, and no prefix lies within another one."""
    identities = hostile_identities()
    assert len(identities) >= 300
    identities = identities[:300]
    prefixes = {task_prefix("run", one).lower(): one for one in identities}
    prefixes |= {keyed_prefix(one).lower(): one for one in identities}
    prefixes |= {task_prefix(one, "task").lower(): one for one in identities}
    assert len(prefixes) == 900
    for prefix in prefixes:
        run, separator, task = prefix.partition("/")
        assert separator
        assert "/" not in task, "exactly two levels, so that no task lies inside another one"
        check_folder_name(run)
        check_folder_name(task)


def test_300_hostile_identities_on_a_real_disk(tmp_path):
    from taskckpt import Checkpoint

    base, outside = tmp_path / "base", tmp_path / "canary"
    outside.write_text("untouched")
    for number, one in enumerate(hostile_identities()[:300]):
        Checkpoint(base / task_prefix("run", one)).save_sync(b"%d" % number)
    for number, one in enumerate(hostile_identities()[:300]):
        view = Checkpoint.of(run="run", task=one, base=base)
        assert view.load_bytes_sync() == b"%d" % number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "canary"]
    assert outside.read_text() == "untouched"
    assert len(list((base / "run").iterdir())) == 300


# --- slots and payloads ------------------------------------------------------------------------

slots = st.integers(1, HIGHEST_SLOT)
nonces = st.text(alphabet="0123456789abcdef", min_size=16, max_size=16)


@given(slots, st.none() | nonces)
def test_slot_names_come_back(slot, nonce):
    folder, _, name = slot_key(slot, nonce).partition("/")
    assert folder == _layout.LOG
    assert parse_slot_name(name) == SlotName(slot, nonce)


@given(st.lists(slots, unique=True, min_size=2))
def test_slot_names_sort_newest_first(some):
    keys = {slot_key(slot): slot for slot in some}
    assert [keys[key] for key in sorted(keys)] == sorted(some, reverse=True)


def test_the_order_holds_at_every_power_of_ten():
    some = sorted({10**i + d for i in range(12) for d in (-1, 0, 1)} - {0, -1})
    keys = [slot_key(slot) for slot in some if 1 <= slot <= HIGHEST_SLOT]
    assert sorted(keys) == keys[::-1]


@pytest.mark.parametrize("slot", [0, -1, HIGHEST_SLOT + 1])
def test_a_slot_out_of_range_is_a_bug(slot):
    with pytest.raises(AssertionError):
        slot_key(slot)


@given(st.text() | st.from_regex(r"\d{12}-\d{12}(-[0-9a-f]{16})?\.jsonl"))
def test_only_our_own_names_are_slots(name):
    parsed = parse_slot_name(name)
    assert parsed is None or slot_key(parsed.slot, parsed.nonce) == f"log/{name}"


def test_names_of_others_are_no_slots():
    real = slot_key(7).removeprefix("log/")
    assert parse_slot_name(real) == SlotName(7, None)
    strangers = [real[1:], f"{real}~", f".{real}", f"{real}.tmp", f"x/{real}", real.upper(), f"{real}\n", "", ".nfs000"]
    strangers += [
        real.replace("0007.", "0008."),
        real.translate({ord("0"): "\u0660", ord("7"): "\u0667"}),
    ]  # another 7, of Arabic
    strangers += [f"{HIGHEST_SLOT:012d}-{0:012d}.jsonl"]
    for name in strangers:
        assert parse_slot_name(name) is None, name


@given(slots, nonces, st.integers(1, 10**8 - 1), nonces, st.sampled_from(["", ".tar.gz"]))
def test_payload_keys_name_their_claim_and_save(slot, nonce, number, save, suffix):
    key = payload_key(slot, nonce, number, save, suffix)
    assert key.startswith(f"{DATA}/")
    assert claim_of_payload(key) == (slot, nonce)
    assert key.endswith(f"{number:08d}-{save}{suffix}")


@given(st.text())
def test_keys_of_others_belong_to_no_claim(key):
    assert claim_of_payload(key) is None
    assert claim_of_payload(f"{DATA}/{key}") is None
