"""What is saved and loaded: five corpora with fixed seeds, the same bytes every time.

    python benchmarks/corpora.py A /dev/shm/a

A  8 files, 1 GiB: float32 weights and Adam moments, one file of an embedding half of whose rows saw no gradient
B  8 files, 512 MiB: logs as lines of JSON and as CSV
C  20,000 files of 1-16 KiB in 202 nested folders, about 166 MiB
D  1 KiB of bytes
E  one file of 1 GiB: float32 weights
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

KIB, MIB, GIB = 2**10, 2**20, 2**30
SEED = 20_260_101
FLOATS_AT_ONCE = 4 * MIB
LOG_STRETCH_BYTES = 8 * MIB

Floats: TypeAlias = npt.NDArray[np.float32]


def build(name: str, folder: Path | str, *, fraction: float = 1) -> Path:
    """Build a corpus in ``folder`` (made if missing) and give what a task would save of it.

    That is the folder itself for A, B and C, a file in it for D and E. A ``fraction`` below 1 makes a small
    corpus of the same kind, for tests.
    """
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    return BUILDERS[name](where, fraction)


def _generator(*what: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([SEED, *what]))


def _normals(rng: np.random.Generator, count: int, scale: float) -> Iterator[Floats]:
    for start in range(0, count, FLOATS_AT_ONCE):
        yield rng.standard_normal(min(FLOATS_AT_ONCE, count - start), dtype=np.float32) * np.float32(scale)


def _write_floats(path: Path, blocks: Iterator[Floats]) -> None:
    with path.open("wb", buffering=0) as out:
        for block in blocks:
            out.write(block.data)


def _training_state(folder: Path, fraction: float) -> Path:
    count = int(GIB * fraction) // 8 // 4
    for index in range(3):
        _write_floats(folder / f"weights-{index}.f32", _normals(_generator(1, index), count, 0.02))
        _write_floats(folder / f"exp_avg-{index}.f32", _normals(_generator(2, index), count, 1e-4))
    # Second moments are squares, smoothed over many steps: positive, and not far from their mean.
    squares = (np.square(block + np.float32(1e-3)) for block in _normals(_generator(3), count, 2e-4))
    _write_floats(folder / "exp_avg_sq-0.f32", squares)
    _write_floats(folder / "exp_avg-embedding.f32", map(_half_untouched, _normals(_generator(4), count, 1e-4)))
    return folder


def _half_untouched(block: Floats) -> Floats:
    """Zeros in every other run of eight rows of 1024: tokens that no batch contained."""
    rows = block[: block.size // KIB * KIB].reshape(-1, KIB)
    rows[np.arange(len(rows)) // 8 % 2 == 1] = 0
    return block


def _logs(folder: Path, fraction: float) -> Path:
    size = int(512 * MIB * fraction) // 8
    for index in range(8):
        kind, lines = ("csv", _csv_lines) if index % 2 else ("jsonl", _json_lines)
        # The same traffic on another day, and so on until the file is full: no compressor that is measured
        # here looks back over a whole stretch.
        stretch = lines(_generator(5, index), min(size, LOG_STRETCH_BYTES))
        with (folder / f"events-{index}.{kind}").open("wb") as out:
            for start in range(0, size, len(stretch)):
                day = b"2026-%02d-%02d" % (index + 1, start // len(stretch) + 1)
                out.write(stretch[: size - start].replace(b"2026-00-00", day))
    return folder


_LEVELS = ("INFO", "INFO", "INFO", "DEBUG", "WARNING", "ERROR")
_EVENTS = ("batch_done", "batch_loaded", "checkpoint_saved", "gradient_clipped", "worker_heartbeat", "queue_full")


def _json_lines(rng: np.random.Generator, size: int) -> bytes:
    template = (
        '{"time": "2026-00-00T%02d:%02d:%02d.%06dZ", "level": "%s", "worker": "worker-%02d", "event": "%s", '
        '"step": %d, "loss": %.6f, "grad_norm": %.4f, "tokens_per_s": %d, "span": "%016x"}\n'
    )
    return _formatted(template, rng, size, line_bytes=215)


def _csv_lines(rng: np.random.Generator, size: int) -> bytes:
    template = "2026-00-00T%02d:%02d:%02d.%06dZ,%s,worker-%02d,%s,%d,%.6f,%.4f,%d,%x\n"
    return _formatted(template, rng, size, line_bytes=85)


def _formatted(template: str, rng: np.random.Generator, size: int, *, line_bytes: int) -> bytes:
    count = size // line_bytes * 5 // 4 + 2
    seconds = np.sort(rng.integers(0, 86_400, count))
    columns = (
        (seconds // 3600).tolist(),
        (seconds // 60 % 60).tolist(),
        (seconds % 60).tolist(),
        rng.integers(0, 1_000_000, count).tolist(),
        [_LEVELS[number] for number in rng.integers(0, len(_LEVELS), count)],
        rng.integers(0, 16, count).tolist(),
        [_EVENTS[number] for number in rng.integers(0, len(_EVENTS), count)],
        range(10_000, 10_000 + count),
        (2.5 + 0.1 * rng.standard_normal(count)).tolist(),
        (1 + 0.2 * rng.random(count)).tolist(),
        rng.integers(180_000, 190_000, count).tolist(),
        rng.integers(0, 2**48, count).tolist(),
    )
    return "".join([template % values for values in zip(*columns, strict=True)]).encode()[:size]


def _small_files(folder: Path, fraction: float) -> Path:
    count = max(1, int(20_000 * fraction))
    rng = _generator(6)
    sizes = rng.integers(KIB, 16 * KIB + 1, count).tolist()
    text = _json_lines(rng, LOG_STRETCH_BYTES)
    read = 0
    for index, size in enumerate(sizes):
        if index % 100 == 0:
            nested = folder / f"group-{index // 10_000}" / f"part-{index // 100:03d}"
            nested.mkdir(parents=True, exist_ok=True)
        # Three parts in ten are noise: what is left compresses, the whole of it about twofold.
        noise = rng.bytes(size * 3 // 10)
        start = read % (LOG_STRETCH_BYTES - 16 * KIB)
        read += size - len(noise)
        (nested / f"item-{index:05d}.rec").write_bytes(noise + text[start : start + size - len(noise)])
    return folder


def _little(folder: Path, _fraction: float) -> Path:
    path = folder / "state.bin"
    path.write_bytes(_generator(7).bytes(KIB))
    return path


def _one_file(folder: Path, fraction: float) -> Path:
    path = folder / "weights.f32"
    _write_floats(path, _normals(_generator(8), int(GIB * fraction) // 4, 0.02))
    return path


BUILDERS: dict[str, Callable[[Path, float], Path]] = {
    "A": _training_state,
    "B": _logs,
    "C": _small_files,
    "D": _little,
    "E": _one_file,
}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BUILDERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fraction", type=float, default=1, help="of the full size, for a small one")
    options = parser.parse_args()
    began = time.monotonic()
    path = build(options.name, options.folder, fraction=options.fraction)
    print(f"{path}  ({time.monotonic() - began:.1f} s)")


if __name__ == "__main__":
    _main()
