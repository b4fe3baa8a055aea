"""How the house is built: which room may know which, and how large a room may grow."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "taskckpt"

# One file each, and none knows another.
ENGINES = [
    *("engines.airflow", "engines.celery", "engines.dagster", "engines.dagster_pipes", "engines.dask"),
    *("engines.dramatiq", "engines.flyte", "engines.flytekit", "engines.huey", "engines.metaflow"),
    *("engines.prefect", "engines.ray", "engines.rq", "engines.snakemake", "engines.temporal"),
]
# From top to bottom: each module imports only what stands below it. A new module gets its place here.
LAYERS = [
    *("__main__", "cli", "cli._change", "cli._verify", "cli._pull", "cli._dest", "cli._look"),
    *("cli._engines", "cli._explain", "cli._run", "cli._save", "cli._who"),
    *("cli._history", "cli._options", "cli._targets", "cli._exits", "cli._output"),
    *("testing", "testing._contract", "testing._intercept", "testing.servers", "testing._cloud_servers"),
    *("testing._process", "testing._guard"),
    *("integrations.celery", "integrations.dagster", "integrations"),
    "__init__",
    *("stages", "stages._manager", "stages._run", "stages._look", "stages._stage"),
    *("stages._versions", "stages._markers", "stages._fingerprint", "stages._status"),
    *("iterators", "iterators._checkpoints", "iterators._retention", "iterators._states"),
    *(
        "_task",
        "latest",
        "_view",
        "context",
        "_task_context",
        "_process",
        "_checkpoint",
        "_iterate",
        "_loop",
        "_interrupts",
        "_positions",
        "_sources",
    ),
    *("_history_verbs", "_history", "_later", "_pending", "_aside", "_attempt", "_telling"),
    *("_bridge", "_workspace", "_chain", "_selection", "_arguments", "_payload"),
    *("_log.writer", "_log.slots", "_log.catalogue", "_foreign"),
    *("_archive.extract", "_archive.pack", "_archive.gzip", "_archive.tar", "_archive"),
    *("_log.retention", "_log.history", "_log.records", "_log.fields", "_log", "_progress"),
    *("_stores.obstore", "_stores.obstore_clouds", "_stores.obstore_options"),
    *("_stores.azure", "_stores.gcs", "_stores.s3", "_stores.fsspec", "_stores.local", "_layout", "_stores"),
    *("_states", "_states.reader", "_states.writer"),
    *("_states.snapshot", "_states.arrays", "_states.dtypes", "_states.safetensors"),
    *("engines", "engines.systems", "engines.environment", *ENGINES, "engines._frames", "engines._task"),
    "_identity",
    *("_keep", "_when", "_operation", "_testing", "errors"),
]

# Doors that open upwards, inside of functions only: factories, and two rooms that share one door.
UPWARDS = {("_checkpoint", "_view"), ("_stores", "_stores.fsspec"), ("_stores", "_stores.local")}
UPWARDS |= {("engines", "cli._explain")}  # what the command tells, within a task
UPWARDS |= {("_stores.fsspec", f"_stores.{name}") for name in ("s3", "gcs", "azure", "obstore")}

CLI = (
    *("", "._change", "._engines", "._verify", "._pull", "._look", "._run", "._save"),
    *("._options", "._exits", "._output"),
)

# What comes from elsewhere, and who may ask for it. "lazily" is: inside of functions.
OUTSIDE = {
    "aiobotocore": {"_stores.s3": "lazily", "_stores.fsspec": "lazily"},
    "aiohttp": {"_stores.gcs": "lazily"},
    "azure": {"_stores.azure": "lazily", "_stores.obstore_clouds": "lazily"},
    "asyncio": {"_bridge": "at once"},
    "blake3": {"_log.records": "at once", "_log.catalogue": "at once", "_payload": "at once"},
    "click": {f"cli{room}": "at once" for room in CLI},
    "rich": {"cli._output": "lazily"},
    "botocore": {"_stores.s3": "lazily", "_stores.fsspec": "lazily", "_stores.obstore_options": "lazily"},
    "fsspec": {"_stores.fsspec": "lazily"},
    "obstore": {"_stores.obstore": "lazily"},
    "google": {"_stores.obstore_clouds": "lazily"},
    "isal": {"_archive.gzip": "at once", "_foreign": "at once"},
    "s3fs": {"_stores.s3": "lazily", "_stores.fsspec": "lazily"},
    "tqdm": {"_progress": "lazily"},
    "tenacity": {"_operation": "lazily", "_task": "lazily", "cli._run": "lazily"},
    "zstandard": {"_foreign": "lazily"},
    "celery": {"integrations.celery": "at once", "engines.celery": "lazily"},
    "dagster": {"integrations.dagster": "at once"},
    "xxhash": {},
}
NEVER = {"pickle", "shelve", "marshal", "cloudpickle", "dill", "requests", "concurrent.interpreters"}

# Signals between rooms: never errors to users. Whoever adds one shows that it cannot leave the package.
SIGNALS = {"LogMoved", "Malformed", "Refused", "Stopped", "_ClaimDenied", "_Newer", "_SourceError"}

LONG_FILE, LONGEST_FILE = 450, 620
LONG_FUNCTION, LONGEST_FUNCTION = 40, 60
# Lines that hold code, in all modules of the core: not in what is built on ``Checkpoint``, which anybody could write.
BUILT_ON_IT = ("testing", "cli", "stages", "iterators", "integrations", "engines")
LARGEST_CORE = 11_700

TREES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}


class Import(NamedTuple):
    importer: str
    name: str
    how: str  # "at once", "lazily" or "for types"
    line: int


def imports_of(module: str) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, how: str) -> None:
        for child in ast.iter_child_nodes(node):
            within = how
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                within = "lazily"
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                within = "for types"
            elif isinstance(child, ast.Import):
                found.extend(Import(module, alias.name, how, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno}: imports are absolute"
                assert child.module
                for alias in child.names:
                    name = f"{child.module}.{alias.name}"
                    is_module = child.module == "taskckpt" or name.removeprefix("taskckpt.") in TREES
                    found.append(Import(module, name if is_module else child.module, how, child.lineno))
            visit(child, within)

    visit(TREES[module], "at once")
    return found


ALL = [one for module in TREES for one in imports_of(module)]


def test_each_module_has_its_place():
    assert set(TREES) == set(LAYERS), "a module is new or gone: say in LAYERS where it stands"


def test_imports_run_one_way():
    wrong = []
    for one in ALL:
        if not one.name.startswith("taskckpt.") or one.how == "for types":
            continue
        imported = one.name.removeprefix("taskckpt.")
        if not imported[0].islower() and imported[0] != "_":
            imported = "__init__"  # a name that the package itself shows
        assert imported in TREES, one
        downwards = LAYERS.index(imported) > LAYERS.index(one.importer)
        if not downwards and not ((one.importer, imported) in UPWARDS and one.how == "lazily"):
            wrong.append(one)
    assert not wrong


def test_the_doors_upwards_are_needed():
    used = {(one.importer, one.name.removeprefix("taskckpt.")) for one in ALL if one.how == "lazily"}
    assert used >= UPWARDS


def test_who_may_ask_for_what_comes_from_elsewhere():
    wrong = []
    for one in ALL:
        top = one.name.partition(".")[0]
        if top in NEVER:
            wrong.append(one)
        elif top in OUTSIDE and not one.importer.startswith("testing"):
            allowed = OUTSIDE[top].get(one.importer)
            if one.how != "for types" and (allowed is None or (allowed == "lazily" and one.how != "lazily")):
                wrong.append(one)
        elif top not in {"taskckpt", *OUTSIDE, *sys.stdlib_module_names} and not one.importer.startswith("testing"):
            wrong.append(one)
    assert not wrong


def test_only_one_module_imports_fsspec_one_obstore_and_one_asyncio():
    """The rules that matter most, once more and without exceptions."""
    for name, where in (("fsspec", {"_stores.fsspec"}), ("obstore", {"_stores.obstore"}), ("asyncio", {"_bridge"})):
        found = {one.importer for one in ALL if one.name.partition(".")[0] == name and one.importer[:7] != "testing"}
        assert found <= where


def test_the_core_knows_no_engine():
    engines = {
        "airflow",
        "dagster",
        "flyte",
        "flytekit",
        "kfp",
        "luigi",
        "metaflow",
        "prefect",
        "ray",
        "celery",
        "argo",
    }
    built_for_them = ("engines.", "integrations.")
    found = [one for one in ALL if one.name.partition(".")[0] in engines]
    assert not [one for one in found if not one.importer.startswith(built_for_them)]


def classes(module: str) -> list[ast.ClassDef]:
    return [node for node in ast.walk(TREES[module]) if isinstance(node, ast.ClassDef)]


def test_errors_come_from_one_place():
    made = {
        node.name
        for module in TREES
        if module != "errors"
        for node in classes(module)
        if any(ast.unparse(base).endswith(("Error", "Exception", "Warning")) for base in node.bases)
    }
    assert made <= SIGNALS, "a new exception: it belongs into errors.py, or it is a signal that stays inside"


def test_the_package_raises_only_its_own_errors():
    """What leaves it is a TaskckptError; an assertion is a bug, and a few builtins are Python's own protocols."""
    own = {node.name for node in classes("errors")} | SIGNALS
    protocols = {"AttributeError", "AssertionError", "NotImplementedError", "StopIteration", "asyncio.CancelledError"}
    # Raised where ``translating`` turns them into ours, and where gzip's own are met.
    inside = {"OSError", "NotADirectoryError", "FileExistsError", "EOFError"}
    found: dict[str, list[str]] = {}
    for module, tree in TREES.items():
        if module.startswith("testing"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func)
                if name[:1].isupper() and name not in own | protocols | inside:
                    found.setdefault(name, []).append(f"{module}:{node.lineno}")
    assert not found


def test_nothing_is_caught_and_dropped():
    """A bare except or one of everything raises again, hands the error on, or says why not."""
    wrong = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.unparse(node.type) if node.type else "BaseException"
            if caught in ("Exception", "BaseException"):
                raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                uses = node.name and any(isinstance(i, ast.Name) and i.id == node.name for i in ast.walk(node))
                if not raises and not uses:
                    wrong.append(f"{module}:{node.lineno}")
    assert not wrong


HOOKS = {"os.register_at_fork", "copyreg.pickle"}


def test_nothing_happens_at_import():
    """No threads, no environment: only definitions, and hooks of the process. No cleanup in ``__del__`` either."""
    wrong = []
    for module, tree in TREES.items():
        methods = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        wrong += [f"{module}:{node.lineno}" for node in methods if node.name == "__del__"]
        calls = (node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        wrong += [f"{module}:{call.lineno}" for call in calls if ast.unparse(call.func) not in HOOKS]
    assert not wrong


# --- size --------------------------------------------------------------------------------------


def code_lines(path: Path) -> int:
    """Lines with code on them: no blank ones, no comments, no docstrings."""
    text = path.read_text()
    lines = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node):
            first = node.body[0]
            lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def test_files_and_functions_stay_short(capsys):
    long: list[str] = []
    too_long: list[str] = []
    core = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        length = len(path.read_text().splitlines())
        if not name.startswith(BUILT_ON_IT):
            core += code_lines(path)
        if length > LONG_FILE:
            (too_long if length > LONGEST_FILE else long).append(f"{name}: {length} lines")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                size = (node.end_lineno or 0) - body[0].lineno + 2
                if size > LONG_FUNCTION:
                    (too_long if size > LONGEST_FUNCTION else long).append(f"{name}: {node.name} has {size} lines")
    with capsys.disabled():
        print(f"\n  the core has {core} lines of code", *long, sep="\n  longer than it should be: ", end="")
    assert not too_long
    assert core <= LARGEST_CORE


# --- what an import loads ----------------------------------------------------------------------

HEAVY = {
    *("aiohttp", "asyncio", "botocore", "click", "fsspec", "multiprocessing", "numpy", "rich", "s3fs", "ssl"),
    *("tarfile", "tenacity"),
}


def loaded_by(code: str, tmp_path: Path) -> set[str]:
    """Which modules a new interpreter has after some code, beyond those that it has anyway."""
    code = f"import sys\nbefore = set(sys.modules)\n{code}\nloaded = set(sys.modules) - before\n"
    code += "import json\nprint(json.dumps(sorted(loaded)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "code",
    [
        "import taskckpt",
        "from taskckpt import *",
        "import taskckpt; cp = taskckpt.Checkpoint('place'); cp.save_sync(b'1'); assert cp.load_sync()",
        "import taskckpt, os; os.mkdir('f'); cp = taskckpt.checkpoint('k'); cp.save_sync('f'); cp.load_sync()",
        "import taskckpt; taskckpt.Checkpoint('s3://bucket/place')",
        "import taskckpt; taskckpt.task(lambda: 1); taskckpt.ctx()",
    ],
)
def test_what_is_not_needed_is_not_loaded(tmp_path, code):
    assert not loaded_by(code, tmp_path) & HEAVY


def test_plain_tasks_do_without_asyncio_of_ours(tmp_path):
    """tenacity imports asyncio itself; that costs what it costs, but once a task runs and not before."""
    found = loaded_by("import taskckpt\ntaskckpt.task(key='k')(lambda: 1)()", tmp_path)
    assert "taskckpt._bridge" not in found
    assert "fsspec" not in found


def test_each_module_can_be_imported_first(tmp_path):
    """No cycle that only works in one order."""
    names = [f"taskckpt.{name}" for name in TREES if name != "__init__" and not name.startswith("integrations.")]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    for loaded in [one for one in sys.modules if one.partition('.')[0] == 'taskckpt']:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    loaded_by(code, tmp_path)


def test_all_names_of_the_package_exist():
    import taskckpt

    assert sorted(taskckpt.__all__) == taskckpt.__all__
    assert all(getattr(taskckpt, name) is not None for name in taskckpt.__all__)
    assert taskckpt.__version__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        taskckpt.nonsense  # noqa: B018
