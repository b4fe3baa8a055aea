"""What a command says: tables for people, one JSON document for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeAlias

import click

if TYPE_CHECKING:
    from taskckpt._progress import Report
    from taskckpt._selection import CheckpointInfo

JSON: TypeAlias = "str | int | float | bool | Sequence[JSON] | Mapping[str, JSON] | None"

# Wide enough that no value is ever folded where a program reads.
PIPE_WIDTH = 100_000

# A column's title; a number's is right-justified.
NUMBERS = frozenset(
    ("attempt", "bytes", "checkpoints", "log", "payloads", "size", "stale", "step", "checked", "unreferenced")
)


# Printable, but not seen, or drawn as one with what is before it: terminals disagree how wide that is.
_UNSEEN = frozenset(
    map(
        chr,
        (
            *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0),  # a joiner, and fillers
            *range(0xFE00, 0xFE10),  # variants
            *range(0x1F3FB, 0x1F400),  # colours of skin
            *range(0xE0100, 0xE01F0),  # more variants
        ),
    )
)


def plain(value: object) -> str:
    r"""Text that a terminal shows and does not obey: what cannot be printed or seen is escaped, line ends too.

    >>> plain("a" + chr(27) + "[31mred")
    'a\\x1b[31mred'
    """
    return "".join(one if one.isprintable() and one not in _UNSEEN else ascii(one)[1:-1] for one in str(value))


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rows below their titles. Nothing is ever cut: it is folded on a terminal, and as long as it is in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    on_terminal = sys.stdout.isatty()
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold" if on_terminal else "")
    for title in titles:
        grid.add_column(title.upper(), justify="right" if title in NUMBERS else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(plain("-" if cell is None else cell)) for cell in row))
    # Rendered first and written by ourselves: rich would end the process where the reader of a pipe leaves.
    console = Console(file=sys.stdout, width=None if on_terminal else PIPE_WIDTH, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(grid)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def facts(about: Mapping[str, object]) -> None:
    """One fact a line, its name before it."""
    lines = [(plain(name), plain("-" if value is None else value)) for name, value in about.items()]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {value}")


def document(content: Mapping[str, JSON]) -> None:
    """The one JSON document of a command. Only ASCII: no terminal obeys it."""
    click.echo(json.dumps(content, indent=2, allow_nan=False))


def notice(text: str, *, as_json: bool) -> None:
    """A warning, on stderr."""
    click.echo(json.dumps({"warning": text}) if as_json else plain(f"warning: {text}"), err=True)


def checkpoint_fields(info: CheckpointInfo) -> dict[str, JSON]:
    """A checkpoint as ``--json`` says it."""
    return {
        "uri": info.uri,
        "slot": info.slot,
        "step": info.step,
        "attempt": info.attempt,
        "time": iso(info.time),
        "kind": info.kind,
        "name": info.name,
        "size_bytes": info.size_bytes,
        "stored_bytes": info.stored_bytes,
        "metadata": finite(info.metadata),
        "metrics": finite(info.metrics),
        "pinned": info.pinned,
        "resumed_from": info.resumed_from,
        "in_lineage": info.in_lineage,
    }


def finite(value: JSON) -> JSON:
    """The same with text for floats that are not finite: JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list) else value


def iso(time: datetime) -> str:
    """As ``2026-11-21T06:23:26.705927Z``."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def size(count: int) -> str:
    """Bytes for people: ``1.5 MiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} PiB"


def age(time: datetime) -> str:
    """How long ago, for people. A clock that is ahead of ours makes it "just now"."""
    seconds = (datetime.now(UTC) - time).total_seconds()
    if seconds < 1:
        return "just now"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def when(time: datetime | None) -> str | None:
    """For people, and exactly: ``3 min ago (2026-11-21T06:23:26.705927Z)``."""
    return None if time is None else f"{age(time)} ({iso(time)})"


def metrics_text(metrics: Mapping[str, float]) -> str:
    """All metrics in one cell."""
    return ", ".join(f"{name}={value:.6g}" for name, value in metrics.items())


@contextmanager
def bar(title: str, *, quiet: bool) -> Generator[Report | None]:
    """A bar on the terminal; nothing where stderr is none, or where ``quiet``."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(plain(title), total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
