"""A second reader of the stored format, version 1, written from docs/format.md alone: nothing of taskckpt in it.

`newest(folder)` gives the newest good checkpoint of a task's place on a local disk, or None, or raises. The place is at
rest: what section 5 says about listing again while others write is left out.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import re
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = re.compile(r"([0-9]{12})-([0-9]{12})(-[0-9a-f]{16})?\.jsonl", re.ASCII)
COMMON = {"slot": int, "claim": dict, "writer": str, "nonce": str, "time": str, "about": dict}
NEEDED: dict[str, dict[str, type]] = {
    "claim": {"unreadable": list, "continues_from": list},
    "join": {"unreadable": list},
    "commit": {"checkpoint": dict, "count": int, "floor": int, "kept": list},
    "clear": {},
}


class CorruptError(Exception):
    pass


class CorruptRecordError(CorruptError):
    pass


class UnsupportedError(Exception):
    pass


class Found(NamedTuple):
    kind: str
    content: Any  # bytes; of a folder {name: bytes of a file, "-> target" of a symlink, None of a folder}


def newest(place: Path) -> Found | None:
    problems: list[str] = []
    places, seen = [place], set()
    while places:
        at = places.pop(0)
        if at in seen:
            continue
        seen.add(at)
        if at.parent.name == "log" and NAME.fullmatch(at.name):
            return _named(at)
        found, cleared, sources = _newest_in(at, problems)
        if found is not None:
            return found
        if cleared:
            break
        places = [*(Path(unquote(urlsplit(url).path)) for url in sources), *places]
    if problems:
        raise CorruptError(problems)
    return None


def _named(path: Path) -> Found:
    """The checkpoint of one record, which may have been repeated since."""
    place, slot = path.parent.parent, int(path.name[13:25])
    wanted = _record(path, slot).get("repeats", {"slot": slot})["slot"]
    records = [_record(place / "log" / names[0], one) for one, names in _listing(place / "log").items()]
    commits = [record for record in records if record["kind"] == "commit"]
    head = max(commits, key=lambda commit: commit["slot"])
    for commit in sorted(commits, key=lambda commit: -commit["slot"]):
        retained = commit["slot"] >= head["floor"] or commit["slot"] in head["kept"]
        if retained and wanted in (commit["slot"], commit.get("repeats", {}).get("slot")):
            return _restored(place, commit["checkpoint"])
    raise CorruptError(f"the checkpoint of {path} is not there any more")


def _newest_in(place: Path, problems: list[str]) -> tuple[Found | None, bool, list[str]]:
    names, before = _listing(place / "log"), len(problems)
    pending, done, sources = {max(names)} if names else set(), set(), []
    newest: dict[str, Any] | None = None  # of the commits
    while pending:
        slot = max(pending)
        pending.remove(slot)
        done.add(slot)
        for name in sorted(names.get(slot, ["missing"]), reverse=True):
            try:
                record = _record(place / "log" / name, slot)
                if record["kind"] == "clear":
                    return None, True, []
                if record["kind"] != "commit":
                    sources += record.get("continues_from", [])
                    claim = {record["claim"]["slot"]} if record["kind"] == "join" else set()
                    pending |= ({record["head"], *record["unreadable"]} | claim) - {None} - done
                    continue
                newest = newest or record
                if not _retains(newest, slot):
                    continue
                if record["checkpoint"]["kind"] == "nothing":
                    return None, False, record.get("continues_from", [])
                below = {record["previous"], *newest["kept"]} - {None}
                pending |= {s for s in below if s < slot and _retains(newest, s)}
                return _restored(place, record["checkpoint"]), False, []
            except CorruptError as error:
                if isinstance(error, CorruptRecordError):
                    pending |= {max((s for s in names if s < slot), default=0)} - {0}
                # The first slot always holds a claim; one that was never finished names no source either.
                if slot > 1 or (place / "log" / names[slot][0]).read_bytes().endswith(b"}\n"):
                    problems.append(str(error))
    for slot in sorted(names, reverse=True)[:64] if len(problems) > before and not sources else ():
        with contextlib.suppress(CorruptError):
            sources = sources or _record(place / "log" / names[slot][0], slot).get("continues_from", [])
    return None, False, sources


def _listing(folder: Path) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = NAME.fullmatch(path.name)
        if match and int(match[1]) + int(match[2]) == 999_999_999_999 and int(match[2]):
            names.setdefault(int(match[2]), []).append(path.name)
    return names


def _retains(head: dict[str, Any], slot: int) -> bool:
    is_left_behind = any(first <= slot <= last for first, last in head.get("left_behind", []))
    return (slot >= head["floor"] or slot in head["kept"]) and not is_left_behind


def _record(path: Path, slot: int) -> dict[str, Any]:
    data = path.read_bytes() if path.exists() else b""
    first, newline, second = data.partition(b"\n")
    if second != b'{"blake3": "%s"}\n' % blake3(first + newline).hexdigest().encode():
        raise CorruptRecordError(f"record {slot}: missing, cut or damaged")
    body: dict[str, Any] = json.loads(first)
    if body["format"] != 1:
        raise UnsupportedError(f"record {slot}: format {body['format']}")
    _require(body, COMMON, slot)
    if body["kind"] not in NEEDED:
        raise UnsupportedError(f"record {slot}: kind {body['kind']}")
    _require(body, NEEDED[body["kind"]], slot)
    _require_sense(body, slot)
    return body


def _require(body: dict[str, Any], fields: Mapping[str, type], slot: int) -> None:
    if body["slot"] != slot or not all(isinstance(body.get(name), kind) for name, kind in fields.items()):
        raise CorruptRecordError(f"record {slot}: of another slot, or a field is missing or of another type")


def _require_sense(body: dict[str, Any], slot: int) -> None:
    floor, claim, spans = body.get("floor", slot), body["claim"]["slot"], body.get("left_behind", [])
    below = [*body.get("unreadable", []), *(body[name] for name in ("head", "previous") if body.get(name) is not None)]
    lasts = [0, *(last for _, last in spans)]
    if not (
        (claim == slot if body["kind"] == "claim" else 1 <= claim < slot)
        and floor <= slot
        and all(1 <= one < slot for one in below)
        and all(1 <= one < floor for one in body.get("kept", []))
        and all(before < first <= last < slot for before, (first, last) in zip(lasts, spans, strict=False))
    ):
        raise CorruptRecordError(f"record {slot}: speaks of slots that cannot be")


def _restored(place: Path, checkpoint: dict[str, Any]) -> Found:
    stored, content, kind = checkpoint["stored"], checkpoint["content"], checkpoint["kind"]
    if "inline" in stored:
        inline = stored["inline"]
        data = inline["text"].encode() if "text" in inline else base64.b64decode(inline["base64"])
    else:
        path = place / stored["key"]
        data = path.read_bytes() if path.exists() else b""
    _check(data, stored, "stored bytes")
    if kind == "folder":
        data = gzip.decompress(data)
    _check(data, content, "content")
    return Found(kind, _tree(data) if kind == "folder" else data)


def _check(data: bytes, digest: dict[str, Any], what: str) -> None:
    if len(data) != digest["size"] or blake3(data).hexdigest() != digest["blake3"]:
        raise CorruptError(f"the {what} are not those that were saved")


def _tree(data: bytes) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if member.issym():
                tree[name] = f"-> {member.linkname}"
            elif member.islnk():
                tree[name] = tree[member.linkname]
            else:
                file = tar.extractfile(member)
                tree[name] = None if file is None else file.read()
    return tree
