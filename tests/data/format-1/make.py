"""Made the golden checkpoints in this folder, once. They must load for ever; they are never made again.

    python tests/data/format-1/make.py FOLDER
    python tests/data/format-1/make.py --example

makes such a set anew in FOLDER (with other nonces and times), for a look at what changed; prints section 10
of docs/format.md anew. A format version 2 gets a folder and a script of its own.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from taskckpt import Checkpoint
from taskckpt.errors import CorruptCheckpointError

STATE = {"step": 7, "name": "größer", "nested": {"lr": 1e-3, "done": [True, None], "data": bytes(range(200)) * 100}}
NOON = 1_750_000_000_123_456_789  # an mtime, in nanoseconds


def main(folder: Path) -> None:
    platform.node = lambda: "example"
    folder.mkdir(parents=True)
    expected: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for make in (text, binary, empty, file, odd_name, tree, attempts, joined, cleared, damaged_payload,
                     damaged_record, cut_record, nothing_intact, state):  # fmt: skip
            name = make.__name__.replace("_", "-")
            make(str(folder / name))
            expected[name] = described(str(folder / name))
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


# --- the histories


def text(dest: str) -> None:
    Checkpoint(dest).save_sync("Schritt 7: größer\n\u2028\x00".encode())


def binary(dest: str) -> None:
    Checkpoint(dest).save_sync(bytes(range(256)))


def empty(dest: str) -> None:
    Checkpoint(dest).save_sync(b"")


def file(dest: str) -> None:
    path = Path("modèle.bin")
    path.write_bytes(b"weights" * 30)
    path.chmod(0o640)
    os.utime(path, ns=(NOON, NOON))
    Checkpoint(dest).save_sync(path)


def odd_name(dest: str) -> None:
    path = Path(os.fsdecode(b"caf\xe9"))  # no valid UTF-8
    path.write_bytes(b"")
    path.chmod(0o400)
    os.utime(path, ns=(-1, -1))
    Checkpoint(dest).save_sync(path)
    path.unlink()


def tree(dest: str) -> None:
    make_tree(Path("tree"))
    Checkpoint(dest).save_sync("tree")


def make_tree(root: Path) -> None:
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "a.txt").write_bytes(b"first")
    (root / "sub" / ("long-" * 25)).write_bytes(b"long name")
    (root / "sub" / "run.sh").write_bytes(b"#!/bin/sh\n")
    (root / "sub" / "run.sh").chmod(0o755)
    os.link(root / "a.txt", root / "b.txt")
    (root / "link").symlink_to("sub/run.sh")
    for folder, _, names in os.walk(root, topdown=False):
        for path in (*(Path(folder, name) for name in names), Path(folder)):
            os.utime(path, ns=(NOON, NOON), follow_symlinks=False)
            if not path.is_symlink() and path.name != "run.sh":
                path.chmod(0o750 if path.is_dir() else 0o600)


def attempts(dest: str) -> None:
    for attempt in range(3):
        checkpoint = Checkpoint(dest, keep=1)
        checkpoint.load_sync()
        for step in range(2):
            checkpoint.save_sync(f"attempt {attempt}, step {step}".encode())
    Checkpoint(dest).load_sync()  # an attempt that died before its first save


def joined(dest: str) -> None:
    parent = Checkpoint(dest)
    parent.save_sync(b"parent")
    child = os.fork()
    if not child:
        parent.save_sync(b"child")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def cleared(dest: str) -> None:
    checkpoint = Checkpoint(dest)
    checkpoint.save_sync(b"gone")
    checkpoint.clear_sync()
    Checkpoint(dest).load_sync()


def damaged_payload(dest: str) -> None:
    checkpoint = Checkpoint(dest)
    checkpoint.save_sync(b"good")
    path = Path("model.bin")
    path.write_bytes(b"bad")
    checkpoint.save_sync(path)
    flip(*Path(dest, "data").glob("*/*"))


def damaged_record(dest: str) -> None:
    checkpoint = Checkpoint(dest)
    checkpoint.save_sync(b"good")
    checkpoint.save_sync(b"bad")
    flip(min(Path(dest, "log").iterdir()))


def cut_record(dest: str) -> None:
    damaged_record(dest)
    newest = min(Path(dest, "log").iterdir())
    newest.write_bytes(newest.read_bytes()[:100])
    Checkpoint(dest).load_sync()  # the next attempt's claim names the slot that it could not read


def nothing_intact(dest: str) -> None:
    Checkpoint(dest).save_sync(b"lost")
    flip(min(Path(dest, "log").iterdir()))


def state(dest: str) -> None:
    Checkpoint(dest).save_state_sync(STATE)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- what must come back


def described(dest: str) -> Any:
    try:
        loaded = Checkpoint(dest, read_only=True).load_sync(to="restored")
    except CorruptCheckpointError:
        return "corrupt"
    if loaded is None:
        return None
    # A file or bytes lie below the folder, under a name; a folder is the folder itself.
    root = Path("restored")
    entries = sorted((root, *root.rglob("*"))) if loaded.is_dir() else [root / loaded.name]
    result = {shown(os.fsencode(os.path.relpath(path, root))): entry(path) for path in entries}
    shutil.rmtree(root)
    return result


def entry(path: Path) -> dict[str, Any]:
    if path.is_symlink():
        return {"target": str(path.readlink())}
    info = path.stat()
    result: dict[str, Any] = {"mode": f"{info.st_mode:o}", "mtime_ns": str(info.st_mtime_ns)}
    if path.name == "payload":
        result = {}  # bytes have neither
    if path.is_file():
        result["content"] = shown(path.read_bytes())
    return result


def shown(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(data).decode()


# --- the worked example of the document


def print_example() -> None:
    platform.node = lambda: "example"
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        first = Checkpoint("place")
        first.load_sync()
        first.save_sync(b"step 1")
        notes = Path("notes", "notes.txt")
        notes.parent.mkdir()
        notes.write_bytes(b"step 2\n")
        for path, mode in ((notes, 0o644), (notes.parent, 0o755)):
            path.chmod(mode)
            os.utime(path, ns=(1_750_000_000 * 10**9,) * 2)
        first.save_sync("notes")
        second = Checkpoint("place")
        second.load_sync()
        second.save_sync(b"\xff\x00")
        for path in (*sorted(Path("place/log").iterdir(), reverse=True), *Path("place/data").glob("*/*")):
            show_file(path)


def show_file(path: Path) -> None:
    data, name = path.read_bytes(), path.relative_to("place")
    if path.suffix == ".jsonl":
        print(f"**`{name}`**\n\n```json\n{data.decode()}```\n")
    else:
        print(f"**`{name}`** ({len(data)} bytes, in base64)\n\n```text\n{base64.encodebytes(data).decode()}```\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--example"]:
        print_example()
    else:
        main(Path(sys.argv[1]).absolute())
