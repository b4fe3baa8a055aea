"""What was measured, in one table, and whether the targets are met."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.measure import Sample

MIB = 2**20
HEAD = ("what", "who", "wall", "cpu", "memory MiB", "temp MiB", "moved MiB", "requests", "of target")


@dataclass(frozen=True, slots=True)
class Verdict:
    """A measured figure and what was asked of it."""

    text: str
    must: bool | None = None
    """Whether what must be is; None if nothing was asked."""

    aim: bool | None = None

    def __str__(self) -> str:
        if self.must is None:
            return self.text
        outcome = "met, and the aim" if self.must and self.aim else "met" if self.must else "**MISSED**"
        return f"{self.text}: {outcome}"


@dataclass(frozen=True, slots=True)
class Target:
    """What must and what should come out.

    Attributes:
        peer: Against whom.
        must: The ratio that has to be reached.
        aim: The one that would be good.
        faster: True: so many times faster than the peer, at least; False: so many times its time, at most.
    """

    peer: str
    must: float
    aim: float
    faster: bool = True

    def judge(self, ours: Sequence[float], peers: Sequence[float]) -> Verdict:
        """Pair by pair: both of a pair ran one after the other."""
        pairs = list(zip(ours, peers, strict=False))
        if self.faster:
            ratio = statistics.median(peer / mine for mine, peer in pairs)
            text = f"{ratio:.2f}x faster than {self.peer} (must {self.must:g}, aim {self.aim:g})"
            return Verdict(text, ratio >= self.must, ratio >= self.aim)
        ratio = statistics.median(mine / peer for mine, peer in pairs)
        text = f"{ratio:.2f}x the time of {self.peer} (must {self.must:g}, aim {self.aim:g})"
        return Verdict(text, ratio <= self.must, ratio <= self.aim)


@dataclass(frozen=True, slots=True)
class Limit:
    """The most of something that there may be."""

    what: str
    must: float
    aim: float
    unit: str

    def judge(self, figure: float) -> Verdict:
        text = f"{self.what} {figure:.3g} {self.unit} (must {self.must:g}, aim {self.aim:g})"
        return Verdict(text, figure <= self.must, figure <= self.aim)


@dataclass(slots=True)
class Line:
    """One row: what one contestant took for one thing."""

    what: str
    who: str
    samples: list[Sample] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    note: str = ""

    @property
    def walls(self) -> list[float]:
        return [sample.wall_s for sample in self.samples]


def seconds_line(what: str, who: str, figures_s: Iterable[float], *verdicts: Verdict, note: str = "") -> Line:
    """A row of times only."""
    samples = [Sample(figure, 0, -1, -1) for figure in figures_s]
    return Line(what, who, samples, list(verdicts), note)


def table(lines: Sequence[Line]) -> str:
    """Markdown that can also be read as it is."""
    rows = [HEAD, *map(_cells, lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)]
    texts = []
    for number, row in enumerate(rows):
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        texts.append("| " + " | ".join([*padded, row[-1]]) + " |")
        if not number:
            texts.append("|" + "|".join("-" * (width + 2) for width in [*widths, len(HEAD[-1])]) + "|")
    return "\n".join(texts)


def summary(lines: Sequence[Line]) -> str:
    judged = [(line, verdict) for line in lines for verdict in line.verdicts if verdict.must is not None]
    missed = [f"- {line.what}, {line.who}: {verdict.text}" for line, verdict in judged if not verdict.must]
    aims = sum(bool(verdict.must and verdict.aim) for _, verdict in judged)
    head = f"{len(judged)} targets: {len(judged) - len(missed)} met, of these {aims} the aim too; {len(missed)} missed."
    return "\n".join([head, *missed])


def _cells(line: Line) -> tuple[str, ...]:
    last = "; ".join([*map(str, line.verdicts), *([line.note] if line.note else [])])
    if not line.samples:
        return (line.what, line.who, *[""] * 6, last)
    middle = _median_sample(line.samples)
    counts = f" (n={len(line.samples)})" if len(line.samples) < 3 else ""
    return (
        line.what,
        line.who,
        _time(middle.wall_s) + counts,
        _time(middle.cpu_s) if middle.cpu_s else "",
        _mib(middle.memory_bytes),
        _mib(middle.temp_bytes),
        _mib(middle.moved_bytes),
        "" if middle.requests is None else str(middle.requests),
        last,
    )


def _median_sample(samples: Sequence[Sample]) -> Sample:
    def median(name: str) -> float | None:
        figures = [figure for sample in samples if (figure := getattr(sample, name)) is not None]
        return statistics.median(figures) if figures else None

    requests, moved = median("requests"), median("moved_bytes")
    return Sample(
        median("wall_s") or 0,
        median("cpu_s") or 0,
        int(median("memory_bytes") or 0),
        int(max(sample.temp_bytes for sample in samples)),
        None if moved is None else int(moved),
        None if requests is None else int(requests),
    )


def _time(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def _mib(count: int | None) -> str:
    return "" if count is None or count < 0 else f"{count / MIB:.3g}" if count < 10 * MIB else f"{count / MIB:.0f}"
