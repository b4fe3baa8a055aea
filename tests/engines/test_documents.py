"""docs/engines.md is complete, and says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from taskckpt import engines
from taskckpt.engines.environment import System
from taskckpt.engines.systems import SYSTEMS
from tests.engines.conftest import EXAMPLES, ROOT

PAGE = (ROOT / "docs" / "engines.md").read_text()
EXCERPTS = re.findall(r"^<!-- from (\S+) -->\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
REQUIREMENTS = sorted((ROOT / "tests" / "engines" / "requirements").glob("*.txt"))


def test_every_engine_is_on_the_page() -> None:
    assert [name for name in engines.names() if f"`{name}`" not in PAGE] == []


def row(system: System) -> str:
    """A batch system's line of the table."""
    attempt = f"`{system.attempt}`" if system.attempt else ""
    if system.counts_from:
        attempt += f", from {system.counts_from}"
    if system.if_missing is not None:
        attempt += f"; not set: {system.if_missing}"
    here = f"{spelled(system.detect)}. " if system.detect else ""
    rule = re.sub(r"\b[A-Z]+_[A-Z_]*\*?", r"`\g<0>`", system.rule)
    ranks = " or ".join(f"`{rank}` of `{size}`" for rank, size in system.ranks)
    base = f"`{system.base}`" if system.base else ""
    if system.base_is_of_run:
        base += ", this run's only"
    cells = (
        f"[{system.title}]({system.source}) `{system.name}`",
        spelled(system.run),
        spelled(system.items),
        attempt,
        "; base: ".join(filter(None, (ranks, base))),
        f"{here}{rule}",
    )
    return "| " + " | ".join(cells) + " |"


def spelled(names: tuple[str, ...]) -> str:
    """``A|B`` is "A or B", and what may be missing has a question mark."""
    return ", ".join(
        " or ".join(f"`{one}`" for one in name.removesuffix("?").split("|")) + ("?" if name.endswith("?") else "")
        for name in names
    )


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_the_table_says_what_the_table_of_systems_says(system: System) -> None:
    assert row(system) in PAGE.splitlines()


@pytest.mark.parametrize("system", [one for one in SYSTEMS if one.hint], ids=lambda system: system.name)
def test_what_a_hint_says_to_pass_is_on_the_page(system: System) -> None:
    passed = re.findall(
        r"\$?\{\{?[^}]+\}\}?|metadata\.[\w.]+\['[^']+'\]|\b[A-Z]+_[A-Z_]+\b|--[a-z-]+", system.hint or ""
    )
    assert passed
    assert [one for one in passed if one not in PAGE] == []


def test_excerpts_are_of_examples_that_run() -> None:
    """Lines may be left out, at three dots."""
    for path, code in EXCERPTS:
        lines = iter((ROOT / path).read_text().splitlines())
        for line in code.splitlines():
            if line.strip() not in ("", "..."):
                assert line in lines, f"{path} has not, or not here: {line}"


def test_every_example_is_on_the_page() -> None:
    shown = {path for path, _ in EXCERPTS}
    assert shown == {f"examples/engines/{path.name}" for path in EXAMPLES.glob("*.py")}
    assert [path for path in shown if f"(../{path})" not in PAGE] == []


@pytest.mark.parametrize("requirements", REQUIREMENTS, ids=lambda path: path.stem)
def test_the_versions_are_those_that_are_tested(requirements: Path) -> None:
    for name, version in re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)", requirements.read_text(), re.MULTILINE):
        assert re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.]*\d)", PAGE), f"{name} {version}"
