"""The documents are true: programs run and print what they say, tables are complete, links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from taskckpt import errors

if TYPE_CHECKING:
    from taskckpt.testing.servers import S3Server

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
PYTHON = r"^(?:<!-- (needs|from) (\S+) -->\n)?```python\n(.*?)^```$"


class Block(NamedTuple):
    """A Python block of a page. ``needs`` comes from an invisible line above it: <!-- needs torch -->.

    What stands below <!-- from examples/engines/with_flyte.py --> is part of that program, and is compared with it by
    tests/engines/test_documents.py.
    """

    name: str
    code: str
    needs: str | None


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(PYTHON, text, re.MULTILINE | re.DOTALL):
            line = text[: match.start(3)].count("\n") + 1
            if match[1] != "from":
                found.append(Block(f"{page.name}:{line}", match[3], match[2]))
    return found


BLOCKS = blocks()


def promised(code: str) -> list[str]:
    """What a block says that it prints: '# prints this, then that'."""
    return [line for said in re.findall(r"# prints (.*)", code) for line in said.split(", then ")]


def start(code: str, folder: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    script = folder / "block.py"
    script.write_text(code)
    return subprocess.run(
        [sys.executable, str(script)], cwd=folder, env={**os.environ, **(environment or {})},
        capture_output=True, text=True, timeout=18, check=False,
    )  # fmt: skip


def run(code: str, folder: Path, environment: dict[str, str] | None = None) -> list[str]:
    done = start(code, folder, environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if "s3://" not in block.code], ids=lambda block: block.name
)
def test_a_block_runs_and_prints_what_it_says(block: Block, tmp_path: Path) -> None:
    if block.needs is not None and importlib.util.find_spec(block.needs) is None:
        pytest.skip(f"NOT TESTED: needs {block.needs} (pip install -r tests/requirements-torch.txt)")
    assert run(block.code, tmp_path) == promised(block.code)


@pytest.mark.parametrize("block", [block for block in BLOCKS if "s3://" in block.code], ids=lambda block: block.name)
def test_a_block_for_s3_runs_and_prints_what_it_says(block: Block, moto: S3Server, tmp_path: Path) -> None:
    moto.create_bucket("my-bucket")
    try:
        assert run(block.code, tmp_path, moto.environment) == promised(block.code)
    finally:
        moto.delete_bucket("my-bucket")


def test_no_block_was_missed() -> None:
    assert len(BLOCKS) >= 14
    assert sum("s3://" in block.code for block in BLOCKS) == 1
    for page in PAGES:
        for language in re.findall(r"^ *```(\S*)$", page.read_text(), re.MULTILINE):
            assert language in ("", "python", "sh", "text", "json", "yaml"), page.name


def test_the_first_example_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    first = BLOCKS[0].code
    assert BLOCKS[0].name.startswith("README.md")
    assert len(first.splitlines()) <= 7
    dies = first.replace("step += 1 ", "step += 1; step == 43 and __import__('os').kill(__import__('os').getpid(), 9) ")
    assert start(dies, tmp_path).returncode == -9
    tells = first.replace("while step", "print(step)\nwhile step")
    assert run(tells, tmp_path) == ["42"]
    assert run(tells, tmp_path) == ["100"]


# --- commands


def test_the_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)


# --- tables


def test_every_error_is_in_the_readme_with_its_code() -> None:
    known = {
        (kind.__name__, kind.code)
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.TaskckptError) and kind is not errors.TaskckptError
    }
    assert set(re.findall(r"^\| `(\w+Error)` \| `([\w-]+)` \|", README, re.MULTILINE)) == known
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert {(name, code) for name, code in known if f"`{code}`" in text and f"`{name}`" in text} == known


def test_every_variable_is_in_the_readme() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "taskckpt").rglob("*.py"))
    read = set(re.findall(r"TASKCKPT_[A-Z]+", source))
    # context.py makes some of the names from their ends.
    read |= {f"TASKCKPT_{end}" for end in re.findall(r"[A-Z]+", re.findall(r"for n in \((.*?)\)", source)[0])}
    assert read == set(re.findall(r"TASKCKPT_[A-Z]+", README))


# --- links


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "code", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_every_page_is_on_the_map() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "index.md" or f"({page.name})" in index
