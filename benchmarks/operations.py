"""What each contestant does to save a folder or a file somewhere, and to bring it back.

An operation is prepared first (what a task that runs has already: imports, a state dict in memory) and then called,
with the clock running. A load gives the path of what it restored, for a look at whether everything is there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Job:
    """One operation.

    Attributes:
        who: The contestant, a key of ``CONTESTANTS``.
        verb: ``"save"`` or ``"load"``.
        source: The folder or file that is saved; for a load, the one that was saved.
        url: Where to: a local path or ``s3://bucket/key``.
        storage_options: How fsspec's file system reaches the server; empty for a local path.
        counted: Whether the server can tell what went through it.
    """

    who: str
    verb: str
    source: str
    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    counted: bool = False

    @property
    def on_s3(self) -> bool:
        return self.url.startswith("s3://")

    @property
    def bucket(self) -> str:
        return self.url.removeprefix("s3://").partition("/")[0]

    @property
    def key(self) -> str:
        return self.url.removeprefix("s3://").partition("/")[2]


Operation: TypeAlias = Callable[[], Path | None]
Prepare: TypeAlias = Callable[[Job], Operation]

# Whatever a restored folder lives as long as.
_kept_alive: list[object] = []


def _fresh_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="restored-"))


# --- taskckpt ----------------------------------------------------------------------------------


def _taskckpt_save(job: Job) -> Operation:
    from taskckpt import Checkpoint

    def save() -> None:
        Checkpoint(job.url, storage_options=job.storage_options).save_sync(job.source)

    return save


def _taskckpt_load(job: Job) -> Operation:
    from taskckpt import Checkpoint

    return lambda: Checkpoint(job.url, storage_options=job.storage_options).load_sync()


def _taskckpt_save_with(worth: float) -> Prepare:
    """The same with another threshold for what is deflated and what is stored."""

    def prepare(job: Job) -> Operation:
        from taskckpt._archive import gzip as _gzip

        assert isinstance(_gzip._WORTH, float)  # noqa: SLF001 - there is no option for it, on purpose
        _gzip._WORTH = worth  # noqa: SLF001
        return _taskckpt_save(job)

    return prepare


# --- peers -------------------------------------------------------------------------------------


def _flyte_save(job: Job) -> Operation:
    import flyte

    return lambda: flyte.Checkpoint(job.url).save_sync(Path(job.source))


def _flyte_load(job: Job) -> Operation:
    import flyte

    def load() -> Path | None:
        checkpoint = flyte.Checkpoint(job.url + "-next", job.url)
        _kept_alive.append(checkpoint)  # it takes the restored tree with it when it goes
        path = checkpoint.load_sync()
        return None if path is None else Path(path)

    return load


def _arrow(job: Job) -> tuple[Any, str]:
    from pyarrow import fs

    if not job.on_s3:
        return fs.LocalFileSystem(), job.url
    options = job.storage_options
    scheme, _, endpoint = options["endpoint_url"].partition("://")
    s3 = fs.S3FileSystem(
        access_key=options["key"],
        secret_key=options["secret"],
        endpoint_override=endpoint,
        scheme=scheme,
        region=options["client_kwargs"]["region_name"],
    )
    return s3, f"{job.bucket}/{job.key}"


def _ray_save(job: Job) -> Operation:
    # What ray.train.report(checkpoint=...) does in a worker.
    from ray.train import Checkpoint
    from ray.train.v2._internal.execution.storage import StorageContext

    filesystem, path = _arrow(job)
    context = StorageContext(path, "experiment", storage_filesystem=filesystem)

    def save() -> None:
        context.persist_current_checkpoint(Checkpoint.from_directory(job.source), "checkpoint")

    return save


def _ray_load(job: Job) -> Operation:
    from ray.train import Checkpoint

    filesystem, path = _arrow(job)
    checkpoint = Checkpoint(f"{path}/experiment/checkpoint", filesystem)
    return lambda: Path(checkpoint.to_directory(_fresh_folder()))


def _tensors(job: Job) -> dict[str, Any]:
    import numpy as np
    import torch

    files = [path for path in sorted(Path(job.source).iterdir()) if path.is_file()]
    return {path.name: torch.from_numpy(np.fromfile(path, np.uint8)) for path in files}


def _dcp_save(job: Job) -> Operation:
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    state = _tensors(job)

    def save() -> None:
        state_dict_saver.save(state, storage_writer=FsspecWriter(job.url, **job.storage_options), no_dist=True)

    return save


def _dcp_load(job: Job) -> Operation:
    import torch
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    state = {name: torch.zeros_like(tensor) for name, tensor in _tensors(job).items()}

    def load() -> None:
        state_dict_loader.load(state, storage_reader=FsspecReader(job.url, **job.storage_options), no_dist=True)

    return load


def _s3fs_save(job: Job) -> Operation:
    import s3fs

    recursive = os.path.isdir(job.source)
    slash = "/" if recursive else ""

    def save() -> None:
        s3fs.S3FileSystem(**job.storage_options).put(job.source + slash, job.url + slash, recursive=recursive)

    return save


def _s3fs_load(job: Job) -> Operation:
    import s3fs

    recursive = os.path.isdir(job.source)
    slash = "/" if recursive else ""

    def load() -> Path:
        target = _fresh_folder() / "tree"
        s3fs.S3FileSystem(**job.storage_options).get(job.url + slash, f"{target}{slash}", recursive=recursive)
        return target

    return load


def _obstore(job: Job) -> Any:
    from obstore.store import S3Store

    options = job.storage_options
    return S3Store(
        job.bucket,
        endpoint=options["endpoint_url"],
        access_key_id=options["key"],
        secret_access_key=options["secret"],
        region=options["client_kwargs"]["region_name"],
        # Else each body is hashed to be signed: three times slower, and no client of HTTPS does it.
        unsigned_payload=True,
        client_options={"allow_http": True},
    )


OBSTORE_THREADS = 4


def _obstore_save(job: Job) -> Operation:
    import obstore

    source = Path(job.source)

    def put(store: Any, path: Path) -> None:
        key = job.key if path == source else f"{job.key}/{path.relative_to(source)}"
        obstore.put(store, key, path, chunk_size=16 * MIB, max_concurrency=4)

    def save() -> None:
        store = _obstore(job)
        files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
        with ThreadPoolExecutor(OBSTORE_THREADS) as pool:
            list(pool.map(lambda path: put(store, path), files))

    return save


def _obstore_load(job: Job) -> Operation:
    import obstore

    def get(store: Any, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            for chunk in obstore.get(store, key).stream(8 * MIB):
                out.write(chunk)

    def load() -> Path:
        store = _obstore(job)
        target = _fresh_folder() / "tree"
        if os.path.isfile(job.source):
            get(store, job.key, target)
            return target
        keys = [entry["path"] for page in obstore.list(store, job.key + "/") for entry in page]
        with ThreadPoolExecutor(OBSTORE_THREADS) as pool:
            list(pool.map(lambda key: get(store, key, target / key.removeprefix(job.key + "/")), keys))
        return target

    return load


def _zstd(*, decompress: bool) -> list[str]:
    if program := shutil.which("zstd"):
        return [program, "-dcq"] if decompress else [program, "-1", "-T0", "-cq"]
    verb = "ZstdDecompressor()" if decompress else "ZstdCompressor(level=1, threads=-1)"
    return [
        sys.executable,
        "-c",
        f"import sys, zstandard as z; z.{verb}.copy_stream(sys.stdin.buffer, sys.stdout.buffer)",
    ]


def _tar_zstd_save(job: Job) -> Operation:
    os.makedirs(os.path.dirname(job.url), exist_ok=True)

    def save() -> None:
        with (
            open(job.url, "wb") as out,
            subprocess.Popen(["tar", "cf", "-", "-C", job.source, "."], stdout=subprocess.PIPE) as tar,
        ):
            subprocess.run(_zstd(decompress=False), stdin=tar.stdout, stdout=out, check=True)
        assert not tar.returncode

    return save


def _tar_zstd_load(job: Job) -> Operation:
    def load() -> Path:
        target = _fresh_folder()
        with (
            open(job.url, "rb") as archive,
            subprocess.Popen(_zstd(decompress=True), stdin=archive, stdout=subprocess.PIPE) as zstd,
        ):
            _run(["tar", "xf", "-", "-C", str(target)], zstd.stdout)
        assert not zstd.returncode
        return target

    return load


def _cp_save(job: Job) -> Operation:
    os.makedirs(os.path.dirname(job.url), exist_ok=True)
    return lambda: _run(["cp", "-r", job.source, job.url])


def _cp_load(job: Job) -> Operation:
    def load() -> Path:
        target = _fresh_folder() / "tree"
        _run(["cp", "-r", job.url, str(target)])
        return target

    return load


def _run(command: list[str], stdin: IO[bytes] | None = None) -> None:
    subprocess.run(command, stdin=stdin, check=True)


# --- who there is ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contestant:
    """How one of them saves and loads.

    Attributes:
        save: Prepares a save.
        load: Prepares a load.
        needs: The modules, and programs with a "!", without which it is not there.
        stored_as: Contestants with the same word here read what the others wrote.
        environment: Set for its processes.
    """

    save: Prepare
    load: Prepare
    needs: tuple[str, ...]
    stored_as: str
    environment: Mapping[str, str] = field(default_factory=dict)


def _ours(save: Prepare, stored_as: str, needs: tuple[str, ...] = (), transfer: str = "") -> Contestant:
    environment = {"TASKCKPT_TRANSFER": transfer} if transfer else {}
    return Contestant(save, _taskckpt_load, ("taskckpt", *needs), stored_as, environment)


CONTESTANTS = {
    "taskckpt": _ours(_taskckpt_save, "taskckpt"),
    "taskckpt obstore": _ours(_taskckpt_save, "taskckpt", ("taskckpt._stores.obstore", "obstore"), "obstore"),
    "taskckpt fsspec": _ours(_taskckpt_save, "taskckpt", ("s3fs",), "fsspec"),
    "taskckpt deflated": _ours(_taskckpt_save_with(1.0), "taskckpt deflated"),
    "taskckpt stored": _ours(_taskckpt_save_with(0.0), "taskckpt stored"),
    "flyte": Contestant(_flyte_save, _flyte_load, ("flyte",), "flyte"),
    "ray train": Contestant(_ray_save, _ray_load, ("ray", "pyarrow"), "ray"),
    "torch dcp": Contestant(_dcp_save, _dcp_load, ("torch", "s3fs"), "dcp"),
    "s3fs": Contestant(_s3fs_save, _s3fs_load, ("s3fs",), "tree"),
    "obstore": Contestant(_obstore_save, _obstore_load, ("obstore",), "tree"),
    "bare upload": Contestant(_obstore_save, _obstore_load, ("obstore",), "archive"),
    "tar + zstd -1": Contestant(_tar_zstd_save, _tar_zstd_load, ("tar!", "zstd! or zstandard"), "zstd"),
    "cp -r": Contestant(_cp_save, _cp_load, ("cp!",), "cp"),
}


def missing(who: str) -> str | None:
    """What a contestant lacks here, or None."""
    for need in CONTESTANTS[who].needs:
        if not any(map(_is_there, need.split(" or "))):
            return need.replace("!", "")
    return None


def _is_there(need: str) -> bool:
    from importlib.util import find_spec

    return (shutil.which(need[:-1]) if need.endswith("!") else find_spec(need)) is not None


def prepare(job: Job) -> Operation:
    contestant = CONTESTANTS[job.who]
    return (contestant.save if job.verb == "save" else contestant.load)(job)
