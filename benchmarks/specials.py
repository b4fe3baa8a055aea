"""Rows that are no single save or load of a corpus: latencies, stalls, imports, a task's ten thousandth save."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import corpora, measure
from benchmarks.contests import OURS
from benchmarks.operations import CONTESTANTS, missing
from benchmarks.places import Folders, Place, open_place
from benchmarks.report import Limit, Line, Target, seconds_line

IMPORTS = 15
EARLY = slice(5, 15)
LATE = 100
MANY_BUDGET_S = 120


@dataclass(frozen=True, slots=True)
class Settings:
    where: Folders
    places: Sequence[str]
    repeat: int
    fraction: float
    quick: bool


class Special:
    """One kind of row."""

    def __init__(self, name: str, run: Callable[[Settings], Iterator[Line]], *, quick: bool = True) -> None:
        self.name = name
        self.run = run
        self.quick = quick


def _probe(place: Place, probe: str, who: str, verb: str, source: Path, name: str, **options: Any) -> Any:
    """What a probe answers; raises Failure."""
    job = place.job(_without_transfer(who), verb, source, name)
    environment = dict(place.environment)
    if who in CONTESTANTS:
        environment |= CONTESTANTS[who].environment
    order = {"probe": probe, "job": dataclasses.asdict(job), "options": options}
    place.settle()
    with tempfile.TemporaryDirectory(dir=place.scratch) as folder:
        return measure.run_module("benchmarks.probes", order, Path(folder), environment)[0]


def _without_transfer(who: str) -> str:
    return who.partition(" ")[0]


def _tried(what: str, who: str, get: Callable[[], Line]) -> Line:
    if who in CONTESTANTS and (lacks := missing(who)):
        return Line(what, who, note=f"NOT THERE: {lacks}")
    try:
        line = get()
    except measure.Failure as failure:
        line = Line(what, who, note=f"FAILED: {failure}")
    _tell(line)
    return line


def _tell(line: Line) -> None:
    figure = f"{statistics.median(line.walls) * 1e3:.3g} ms" if line.samples else line.note
    print(f"  {line.what:20} {line.who:18} {figure}", flush=True)


# --- 1 KiB -------------------------------------------------------------------------------------


def latency(settings: Settings) -> Iterator[Line]:
    """The median of many, one after the other in one process; processes take turns."""
    source = corpora.build("D", settings.where.in_memory / "D")
    for name in settings.places:
        with open_place(name, settings.where) as place:
            whos = (*OURS[name], "flyte")
            rounds = [{who: _little(place, who, source, number) for who in whos} for number in range(settings.repeat)]
            for verb in ("save", "load"):
                yield from _latency_lines(f"{verb} 1 KiB, {name}", verb, whos, rounds)


def _little(place: Place, who: str, source: Path, number: int) -> Mapping[str, list[float]] | str:
    if lacks := missing(who):
        return f"NOT THERE: {lacks}"
    name = f"little-{number}-{who.replace(' ', '-')}"
    try:
        answer: Mapping[str, list[float]] = _probe(place, "little", who, "save", source, name, count=200)
    except measure.Failure as failure:
        return f"FAILED: {failure}"
    return answer


def _latency_lines(
    what: str, verb: str, whos: Sequence[str], rounds: Sequence[Mapping[str, Mapping[str, list[float]] | str]]
) -> Iterator[Line]:
    lines: dict[str, Line] = {}
    for who in whos:
        answers = [each[who] for each in rounds]
        note = next((answer for answer in answers if isinstance(answer, str)), "median of 200")
        figures = [statistics.median(answer[verb]) for answer in answers if not isinstance(answer, str)]
        lines[who] = seconds_line(what, who, figures, note=note)
    for who, line in lines.items():
        if who != "flyte" and line.samples and lines["flyte"].samples:
            line.verdicts.append(Target("flyte", 1, 1.5).judge(line.walls, lines["flyte"].walls))
        _tell(line)
        yield line


# --- the event loop ----------------------------------------------------------------------------

STALL = Limit("longest stall", 20, 5, "ms")


def stalls(settings: Settings) -> Iterator[Line]:
    source = corpora.build("A", settings.where.in_memory / "A", fraction=settings.fraction)
    for name in settings.places:
        with open_place(name, settings.where) as place:
            for who in OURS[name]:
                for verb in ("save", "load"):
                    yield _stall(place, f"event loop, {verb} A, {name}", who, verb, source, settings.repeat)
            if name == "tmpfs" and not settings.quick:
                yield _stall(place, f"event loop, save A, {name}", "flyte", "save", source, 1)


def _stall(place: Place, what: str, who: str, verb: str, source: Path, repeat: int) -> Line:
    def get() -> Line:
        name = f"stall-{who.replace(' ', '-')}"
        answers = [_probe(place, "stall", who, verb, source, name) for _ in range(repeat)]
        figures = [answer["stall"] for answer in answers]
        verdicts = [STALL.judge(statistics.median(figures) * 1e3)] if who.startswith("taskckpt") else []
        took_s = statistics.median(answer["wall"] for answer in answers)
        elsewhere = statistics.median(answer["elsewhere"] for answer in answers)
        note = f"of {took_s:.2f} s; meanwhile a loop in another process that does nothing: {elsewhere * 1e3:.3g} ms"
        return seconds_line(what, who, figures, *verdicts, note=note)

    return _tried(what, who, get)


# --- save_later --------------------------------------------------------------------------------


def held_up(settings: Settings) -> Iterator[Line]:
    source = corpora.build("D", settings.where.in_memory / "D")
    what = "save_later, 1 GiB"
    for name in settings.places:
        if name == "seaweedfs":
            continue  # what holds the task up happens before the store is asked
        with open_place(name, settings.where) as place:
            who = OURS[name][0]
            if missing(who):
                who = OURS[name][-1]
            rounds = 1 if settings.quick else max(3, settings.repeat)
            try:
                answer = _probe(
                    *(place, "held up", who, "save", source, "later"), rounds=rounds, fraction=settings.fraction
                )
            except measure.Failure as failure:
                answer = f"FAILED: {failure}"
            if isinstance(answer, str):
                yield Line(f"{what}, {name}", who, note=answer)
                continue
            copies, held = answer["copy"][1:], answer["held up"][1:]
            verdict = Target("a copy", 2, 1.2, faster=False).judge(held, copies)
            first = f"the first, which takes the memory: {answer['held up'][0]:.2f} s"
            yield seconds_line(f"{what}, {name}", who, held, verdict, note=first)
            yield seconds_line(f"{what}, {name}", "a copy", copies)


# --- import ------------------------------------------------------------------------------------


def imports(settings: Settings) -> Iterator[Line]:
    """Whole processes, less one that imports nothing; they take turns."""
    del settings
    modules = [name for name in ("taskckpt", "flyte") if name == "taskckpt" or not missing(name)]
    extra: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(IMPORTS):
        bare = _process_s("pass")
        for name in modules:
            extra[name].append(_process_s(f"import {name}") - bare)
    for name in modules:
        verdicts = []
        if name == "taskckpt":
            verdicts.append(Limit("import", 30, 15, "ms").judge(statistics.median(extra[name]) * 1e3))
        yield seconds_line("import", name, extra[name], *verdicts, note=f"median of {IMPORTS}, less a bare Python")


def _process_s(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


# --- ten thousand saves ------------------------------------------------------------------------


def many_saves(settings: Settings) -> Iterator[Line]:
    source = corpora.build("D", settings.where.in_memory / "D")
    for name in settings.places:
        if name == "seaweedfs":
            continue  # its own growth would be what is measured
        for keep in (3, None):
            with open_place(name, settings.where) as place:
                for who in OURS[name]:
                    yield _many(place, who, keep, source, 1000 if settings.quick else 10_000)


def _many(place: Place, who: str, keep: int | None, source: Path, count: int) -> Line:
    what = f"{count:,} saves, keep={keep}, {place.name}"

    def get() -> Line:
        name = f"many-{who.replace(' ', '-')}"
        times = _probe(place, "many", who, "save", source, name, count=count, keep=keep, budget_s=MANY_BUDGET_S)
        early, late = statistics.median(times[EARLY]), statistics.median(times[-LATE:])
        verdict = Target("the 10th", 1.2, 1, faster=False).judge([late], [early])
        cut = "" if len(times) == count else f"; stopped after {len(times):,}, {MANY_BUDGET_S} s"
        note = f"median of the last {LATE}; of the 6th to 15th {early * 1e3:.3g} ms{cut}"
        return seconds_line(what, who, [late], verdict, note=note)

    return _tried(what, who, get)


SPECIALS = (
    Special("1 KiB", latency),
    Special("event loop", stalls),
    Special("save_later", held_up),
    Special("import", imports),
    Special("saves", many_saves),
)
