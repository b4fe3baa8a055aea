"""Who saves and loads what, where; and how fast taskckpt has to be there.

A contest is one row of the table per contestant. They take turns, so that a busy minute of the machine hits all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import corpora, measure
from benchmarks.operations import CONTESTANTS, missing
from benchmarks.places import LOCAL, Folders, Place, open_place
from benchmarks.report import Limit, Line, Target, Verdict

MIB = 2**20
SAVE_MEMORY = Limit("added memory", 128, 64, "MiB")
LOAD_MEMORY = Limit("added memory", 160, 96, "MiB")
NO_TEMP = Limit("temporary disk", 0, 0, "MiB")

OURS = {
    "tmpfs": ("taskckpt",),
    "disk": ("taskckpt",),
    "seaweedfs": ("taskckpt obstore", "taskckpt fsspec"),
    "memory": ("taskckpt obstore", "taskckpt fsspec"),
}


@dataclass(frozen=True, slots=True)
class Contest:
    """One thing to do, and who does it.

    Attributes:
        verb: ``"save"`` or ``"load"``.
        corpus: ``"A"`` to ``"E"``.
        place: Where.
        peers: Who does it beside us.
        targets: What is asked of us there.
        more_of_ours: Variants of ours that are measured too.
        slow: Peers that take so long that once must do.
        quick: Whether it is part of a quick run.
    """

    verb: str
    corpus: str
    place: str
    peers: tuple[str, ...]
    targets: tuple[Target, ...] = ()
    more_of_ours: Mapping[str, tuple[Target, ...]] = field(default_factory=dict)
    slow: tuple[str, ...] = ()
    quick: bool = False

    @property
    def what(self) -> str:
        return f"{self.verb} {self.corpus}, {self.place}"

    @property
    def ours(self) -> tuple[str, ...]:
        return OURS[self.place]

    @property
    def contestants(self) -> tuple[str, ...]:
        return (*self.ours, *self.more_of_ours, *self.peers, *self.slow)

    def targets_of(self, who: str) -> tuple[Target, ...]:
        return self.targets if who in self.ours else self.more_of_ours.get(who, ())


def _flyte(must: float, aim: float) -> Target:
    return Target("flyte", must, aim)


def _at_most(peer: str, must: float, aim: float) -> Target:
    return Target(peer, must, aim, faster=False)


def _local(verb: str, corpus: str, peers: Sequence[str], *targets: Target, quick: bool = False) -> Iterator[Contest]:
    for place in LOCAL:
        yield Contest(verb, corpus, place, tuple(peers), targets, quick=quick and place == "tmpfs")


_TREES = ("s3fs", "obstore", "ray train")

CONTESTS = (
    *_local("save", "A", ("flyte", "tar + zstd -1", "ray train", "torch dcp", "cp -r"), _flyte(12, 20), quick=True),
    *(
        Contest(
            "load",
            "A",
            place,
            ("flyte", "tar + zstd -1", "ray train", "torch dcp", "cp -r"),
            more_of_ours={"taskckpt deflated": (_flyte(3.5, 6),), "taskckpt stored": (_flyte(5, 8),)},
            quick=place == "tmpfs",
        )
        for place in LOCAL
    ),
    *_local("save", "B", ("flyte", "tar + zstd -1", "cp -r"), _flyte(40, 60)),
    *_local("load", "B", ("flyte", "tar + zstd -1", "cp -r"), _flyte(2.2, 4.5)),
    *_local(
        *("save", "C", ("flyte", "tar + zstd -1", "ray train", "cp -r")),
        *(_flyte(9, 14), _at_most("tar + zstd -1", 1.5, 1.1)),
        quick=True,
    ),
    *_local(
        *("load", "C", ("flyte", "tar + zstd -1", "ray train", "cp -r")),
        *(_flyte(4.5, 7), _at_most("cp -r", 1.5, 1.2)),
        quick=True,
    ),
    *_local("save", "E", ("flyte", "cp -r")),
    *_local("load", "E", ("flyte", "cp -r")),
    Contest(
        *("save", "A", "seaweedfs", ("flyte", "bare upload", *_TREES)),
        (_flyte(5.5, 7), _at_most("bare upload", 1.5, 1.15)),
        quick=True,
    ),
    Contest("load", "A", "seaweedfs", ("flyte", *_TREES)),
    Contest("save", "B", "seaweedfs", ("flyte", "obstore"), (_flyte(20, 35),)),
    Contest("load", "B", "seaweedfs", ("flyte", "obstore")),
    Contest("save", "C", "seaweedfs", ("flyte", "obstore"), (_flyte(5, 8),), slow=("s3fs", "ray train")),
    Contest("load", "C", "seaweedfs", ("flyte", "obstore"), slow=("s3fs",)),
    Contest("save", "E", "seaweedfs", ("flyte", "s3fs", "obstore"), (_at_most("obstore", 1.5, 1.1),)),
    Contest("load", "E", "seaweedfs", ("flyte", "s3fs", "obstore"), (_at_most("obstore", 1.5, 1.1),)),
    Contest("save", "A", "memory", ("flyte", *_TREES, "torch dcp"), (_flyte(15, 25),), quick=True),
    Contest("load", "A", "memory", ("flyte", "s3fs", "obstore"), (_flyte(3.5, 5),), quick=True),
    Contest("save", "E", "memory", ("flyte", "s3fs", "obstore"), (_at_most("obstore", 1.5, 1.1),), quick=True),
    Contest("load", "E", "memory", ("flyte", "s3fs", "obstore"), (_at_most("obstore", 1.5, 1.1),), quick=True),
)


class Arena:
    """Runs contests: builds each corpus once, keeps what was saved until it has been loaded."""

    def __init__(self, where: Folders, *, repeat: int, fraction: float) -> None:
        self._where = where
        self._repeat = repeat
        self._fraction = fraction

    def run(self, contests: Sequence[Contest]) -> Iterator[Line]:
        """The rows, contest by contest. Those of one corpus come together, and in it those of one place."""
        for corpus in sorted({contest.corpus for contest in contests}):
            folder = self._where.in_memory / corpus
            source = corpora.build(corpus, folder, fraction=self._fraction)
            for name in OURS:
                here = [contest for contest in contests if (contest.corpus, contest.place) == (corpus, name)]
                if here:
                    with open_place(name, self._where) as place:
                        yield from _Stage(place, source, self._where, self._repeat, here).run()
            shutil.rmtree(folder)


class _Stage:
    """One corpus at one place."""

    def __init__(self, place: Place, source: Path, where: Folders, repeat: int, contests: Sequence[Contest]) -> None:
        self._place = place
        self._source = source
        self._where = where
        self._repeat = repeat
        self._contests = sorted(contests, key=lambda contest: contest.verb, reverse=True)  # saves first
        self._stock: dict[str, str] = {}
        self._cleanup = ExitStack()

    def run(self) -> Iterator[Line]:
        with self._cleanup:
            for contest in self._contests:
                lines = {who: Line(contest.what, who) for who in contest.contestants}
                for number in range(self._repeat):
                    self._round(contest, lines, number)
                yield from _judged(contest, lines)

    def _round(self, contest: Contest, lines: Mapping[str, Line], number: int) -> None:
        for who, line in lines.items():
            if line.note or (number and who in contest.slow):
                continue
            if lacks := missing(who):
                line.note = f"NOT THERE: {lacks}"
                continue
            try:
                line.samples.append(self._once(contest, who, number))
            except measure.Failure as failure:
                line.note = f"FAILED: {failure}"
            print(f"  {contest.what:20} {who:18} {line.note or f'{line.samples[-1].wall_s:.2f} s'}", flush=True)

    def _once(self, contest: Contest, who: str, number: int) -> measure.Sample:
        if contest.verb == "save":
            return self._save(who, f"{contest.corpus}-{_slug(who)}-{number}")
        kind = CONTESTANTS[who].stored_as
        if kind not in self._stock:
            self._save(who, f"{contest.corpus}-{_slug(who)}-stock")
        return self._measure(who, "load", self._source, self._stock[kind])

    def _save(self, who: str, name: str) -> measure.Sample:
        source = self._archive() if who == "bare upload" else self._source
        sample = self._measure(who, "save", source, name)
        if self._place.server is None:
            sample.moved_bytes = sum(measure.disk_bytes(str(path)) for path in Path(self._place.root).glob(f"{name}"))
        kind = CONTESTANTS[who].stored_as
        loaded = {one for contest in self._contests if contest.verb == "load" for one in contest.contestants}
        if kind in self._stock or kind not in {CONTESTANTS[one].stored_as for one in loaded}:
            self._place.remove(name)
        else:
            self._stock[kind] = name
        return sample

    def _measure(self, who: str, verb: str, source: Path, name: str) -> measure.Sample:
        job = self._place.job(who, verb, source, name)
        environment = {**self._place.environment, **CONTESTANTS[who].environment}
        self._place.settle()
        return measure.run(job, self._place.scratch, environment)

    def _archive(self) -> Path:
        """The one object that a save of ours uploads, as a file."""
        found = self._stock.get("archive file")
        if found is None:
            place = self._cleanup.enter_context(open_place("tmpfs", self._where))
            measure.run(place.job("taskckpt", "save", self._source, "archive"), place.scratch, {})
            files = [path for path in Path(place.root).rglob("*") if path.is_file()]
            found = self._stock["archive file"] = str(max(files, key=lambda path: path.stat().st_size))
        return Path(found)


def _slug(who: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in who)


def _judged(contest: Contest, lines: Mapping[str, Line]) -> Iterator[Line]:
    for who, line in lines.items():
        if line.samples and who.startswith("taskckpt"):
            line.verdicts += _speed_verdicts(contest.targets_of(who), line, lines)
            if who in contest.ours and contest.corpus in "AE":
                memory = max(sample.memory_bytes for sample in line.samples) / MIB
                line.verdicts.append((SAVE_MEMORY if contest.verb == "save" else LOAD_MEMORY).judge(memory))
            if who in contest.ours:
                line.verdicts.append(NO_TEMP.judge(max(sample.temp_bytes for sample in line.samples) / MIB))
        elif line.samples:
            line.verdicts += _comparisons(contest.ours, line, lines)
        yield line


def _speed_verdicts(targets: Sequence[Target], line: Line, lines: Mapping[str, Line]) -> Iterator[Verdict]:
    for target in targets:
        if lines[target.peer].samples:
            yield target.judge(line.walls, lines[target.peer].walls)


def _comparisons(ours: Sequence[str], line: Line, lines: Mapping[str, Line]) -> Iterator[Verdict]:
    for who in ours:
        if lines[who].samples:
            pairs = zip(lines[who].walls, line.walls, strict=False)
            ratios = sorted(peer / mine for mine, peer in pairs)
            yield Verdict(f"{ratios[len(ratios) // 2]:.2f}x the time of {who}")
