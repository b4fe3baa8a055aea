"""A second reader of the stored format, version 1, written from docs/format.md alone: nothing of taskckpt in it.

`newest(folder)` gives the newest good checkpoint of a task's place on a local disk, or None, or raises.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from blake3 import blake3

NAME = re.compile(r"([0-9]{12})-([0-9]{12})(-[0-9a-f]{16})?\.jsonl", re.ASCII)
NEEDED: dict[str, dict[str, Any]] = {
    "claim": {"head": (int, type(None)), "unreadable": list, "replaces": (dict, type(None)), "continues_from": list},
    "join": {"head": (int, type(None)), "unreadable": list},
    "commit": {"checkpoint": dict, "previous": (int, type(None)), "count": int, "floor": int, "kept": list},
    "clear": {},
}  # fmt: skip


class CorruptError(Exception):
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
        found, cleared, sources = _newest_in(at, problems)
        if found is not None:
            return found
        if cleared:
            break
        places = [*(Path(unquote(urlsplit(url).path)) for url in sources), *places]
    if problems:
        raise CorruptError(problems)
    return None


def _newest_in(place: Path, problems: list[str]) -> tuple[Found | None, bool, list[str]]:
    names = _listing(place / "log")
    pending, done, sources = {max(names)} if names else set(), set(), []
    head: dict[str, Any] | None = None  # the newest commit
    claim: dict[str, Any] | None = None  # the claim that the newest readable record belongs to
    before = len(problems)
    while pending:
        slot = max(pending)
        pending.remove(slot)
        done.add(slot)
        for name in sorted(names.get(slot, ["missing"]), reverse=True):
            try:
                record = _record(place / "log" / name, slot)
            except CorruptError as error:
                if slot > 1:  # the first slot always holds a claim: no checkpoint is lost with it
                    problems.append(str(error))
                pending |= {max((s for s in names if s < slot), default=0)} - {0}
                continue
            claim = claim or record["claim"]
            if record["kind"] == "clear":
                return None, True, []
            if record["kind"] != "commit":
                sources += record.get("continues_from", [])
                pending |= {record["head"], *record["unreadable"]} - {None} - done
                continue
            head = head or record
            if not _retains(head, slot):
                continue
            try:
                return _restored(place, record["checkpoint"]), False, []
            except CorruptError as error:
                problems.append(str(error))
            below = {record["previous"], *head["kept"]} - {None}
            pending |= {s for s in below if s < slot and _retains(head, s)}
    while len(problems) > before and not sources and claim and claim["slot"] in names:
        try:
            record = _record(place / "log" / names[claim["slot"]][0], claim["slot"])
        except CorruptError:
            break
        sources, claim = record["continues_from"], record["replaces"]
    return None, False, sources


def _listing(folder: Path) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = NAME.fullmatch(path.name)
        if match and int(match[1]) + int(match[2]) == 999_999_999_999 and int(match[2]):
            names.setdefault(int(match[2]), []).append(path.name)
    return names


def _retains(head: dict[str, Any], slot: int) -> bool:
    return slot >= head["floor"] or slot in head["kept"]


def _record(path: Path, slot: int) -> dict[str, Any]:
    data = path.read_bytes() if path.exists() else b""
    first, newline, second = data.partition(b"\n")
    if second != b'{"blake3": "%s"}\n' % blake3(first + newline).hexdigest().encode():
        raise CorruptError(f"record {slot}: cut or damaged")
    body = json.loads(first)
    if body["format"] != 1 or body["kind"] not in NEEDED:
        raise UnsupportedError(f"record {slot}: format {body['format']}, kind {body['kind']}")
    needed: dict[str, Any] = {
        "slot": int,
        "claim": dict,
        "writer": str,
        "nonce": str,
        "time": str,
        "about": dict,
    } | NEEDED[body["kind"]]
    if body["slot"] != slot or not all(isinstance(body.get(name), types) for name, types in needed.items()):
        raise CorruptError(f"record {slot}: of another slot, or a field is missing")
    return body


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
