"""Names in a store: where a task's records and payloads lie. Pure; ``docs/format.md`` is the contract.

``<base>/<run>/<task>/log/<reverse>-<slot>.jsonl``, ``<base>/<run>/<task>/data/<claim>/<payload>``, and pages of
``<base>/<run>/<task>/index/``, which save long histories from being read record by record.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

LOG = "log"
DATA = "data"
INDEX = "index"

# Twelve digits hold more slots than a task can fill (30,000 years at one save a second).
SLOT_DIGITS = 12
HIGHEST_SLOT = 10**SLOT_DIGITS - 1

# A run of this name is reserved for tasks that the user named with key=: their state spans runs.
KEYED_RUN = "by-key"
LOCAL_RUN = "local"

_SLOT_NAME = re.compile(rf"([0-9]{{{SLOT_DIGITS}}})-([0-9]{{{SLOT_DIGITS}}})(?:-([0-9a-f]{{16}}))?\.jsonl")
_PAGE_NAME = re.compile(rf"([0-9]{{{SLOT_DIGITS}}})-([0-9]{{{SLOT_DIGITS}}})-[0-9a-f]{{16}}\.jsonl")
_CLAIM_FOLDER = re.compile(rf"([0-9]{{{SLOT_DIGITS}}})-([0-9a-f]{{16}})")

# Upper case is left out on purpose: disks that ignore case would put "Train" and "train" in one folder.
_PLAIN_NAME = re.compile(r"[a-z0-9_-](?:[a-z0-9._-]{0,78}[a-z0-9_-])?")
_ENDS_LIKE_A_DIGEST = re.compile(r"\.[0-9a-f]{16}")
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9._-]+")
# Names that Windows and object stores treat specially.
_DEVICE_NAME = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?")


@dataclass(frozen=True, slots=True)
class SlotName:
    """A record's name taken apart. ``nonce`` is set only on stores without a conditional create."""

    slot: int
    nonce: str | None


def slot_key(slot: int, nonce: str | None = None) -> str:
    """The key of a record.

    The number comes first as (highest - slot): object stores list in ascending order, so one page
    of a listing holds the newest records, however long the log has become.
    """
    if not 1 <= slot <= HIGHEST_SLOT:
        raise AssertionError(f"slot {slot} is out of range")
    tail = "" if nonce is None else f"-{nonce}"
    return f"{LOG}/{HIGHEST_SLOT - slot:0{SLOT_DIGITS}d}-{slot:0{SLOT_DIGITS}d}{tail}.jsonl"


def parse_slot_name(name: str) -> SlotName | None:
    """The slot that a name in ``log/`` stands for, or None for a name that is no record's."""
    match = _SLOT_NAME.fullmatch(name)
    if match is None or int(match[1]) + int(match[2]) != HIGHEST_SLOT or int(match[2]) == 0:
        return None
    return SlotName(int(match[2]), match[3])


def page_key(first: int, last: int, nonce: str) -> str:
    """The key of a page of the index, which says what the commits of these slots say."""
    return f"{INDEX}/{first:0{SLOT_DIGITS}d}-{last:0{SLOT_DIGITS}d}-{nonce}.jsonl"


def parse_page_name(name: str) -> tuple[int, int] | None:
    """The first and last slot that a page in ``index/`` is about, or None for a name that is no page's."""
    match = _PAGE_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def slot_of_record(key: str) -> int | None:
    """The slot of the record that a key or URI ends in, or None if it is no record's."""
    folder, _, name = key.rpartition("/")
    found = parse_slot_name(name) if folder.rpartition("/")[2] == LOG else None
    return None if found is None else found.slot


def payload_key(claim_slot: int, claim_nonce: str, number: int, save_nonce: str, suffix: str = "") -> str:
    """The key of a payload: it names its claim and its save, so no two saves ever write one key."""
    return f"{DATA}/{claim_folder(claim_slot, claim_nonce)}/{number:08d}-{save_nonce}{suffix}"


def claim_folder(claim_slot: int, claim_nonce: str) -> str:
    """The folder below ``data/`` that holds the payloads saved under one claim."""
    return f"{claim_slot:0{SLOT_DIGITS}d}-{claim_nonce}"


def claim_of_payload(key: str) -> tuple[int, str] | None:
    """Slot and nonce of the claim that a key below ``data/`` belongs to, or None if it is not ours."""
    folder, separator, _ = key.removeprefix(f"{DATA}/").partition("/")
    match = _CLAIM_FOLDER.fullmatch(folder)
    return (int(match[1]), match[2]) if match and separator else None


def folder_name(name: str) -> str:
    """A run's or a task's name as one folder name: injective, and safe on every store.

    A plain name (lower case, digits, ``.``, ``_``, ``-``; at most 80 characters) stays as it is.
    Anything else keeps a readable part and gets a digest of the whole name: ``train(lr=0.1)`` becomes
    ``train-lr-0.1.`` and 16 hex digits of its SHA-256.

    >>> folder_name("nightly-etl")
    'nightly-etl'
    >>> folder_name("../etc")
    'etc.f7f9121fdb53d8de'
    """
    if _PLAIN_NAME.fullmatch(name) and not _ENDS_LIKE_A_DIGEST.search(name[-17:]) and not _DEVICE_NAME.fullmatch(name):
        return name
    return _escaped(name)


def _escaped(name: str) -> str:
    # surrogatepass: names may come from file names and variables that are no valid Unicode.
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    readable = _NOT_ALLOWED.sub("-", name).strip("-.").replace("..", ".")[:60].rstrip("-.")
    if _DEVICE_NAME.fullmatch(readable.lower()):
        readable = f"_{readable}"  # to Windows, con.txt is the device con as well
    return f"{readable or 'task'}.{digest}"


def run_folder(run: str) -> str:
    """The folder of a run. The reserved name is escaped like any name that is not plain."""
    return folder_name(run) if run != KEYED_RUN else _escaped(run)


def task_prefix(run: str, task: str) -> str:
    """``<run>/<task>`` below a base."""
    return f"{run_folder(run)}/{folder_name(task)}"


def keyed_prefix(key: str) -> str:
    """``by-key/<key>`` below a base: the place of a task that the user named."""
    return f"{KEYED_RUN}/{folder_name(key)}"
