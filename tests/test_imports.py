"""What imports what, and without what: no import runs upward, and control code runs where torch is not installed."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from drex.control.request import Request
from drex.control.seats import Seats

BLOCKED = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'safetensors', 'tokenizers'], None));"
ROOT = Path(__file__).parents[1]
LAYERS = (
    ("text_files", "extras", "progress", "cache", "errors"),
    ("extensions",),
    ("config",),
    ("sampling_params", "outputs"),
    ("control",),
    ("compute",),
    ("inputs", "engine"),
    ("profiling", "sim"),
    ("assembly",),
    ("llm",),
    ("tuning", "server", "testing"),
    ("comparison",),
    ("report", "load_test"),
    ("cli",),
)
"""The packages and modules of drex, from the lowest up: each imports from those below it, or from itself."""


def imports_of_drex() -> dict[str, set[str]]:
    """The modules of drex that each of its modules imports, anywhere in the file."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in (ROOT / "drex").rglob("*.py")}
    names = {name.removesuffix(".__init__"): file for name, file in files.items()}
    found: dict[str, set[str]] = {name: set() for name in names}
    for name, file in names.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                found[name] |= {each if each in names else node.module for each in inner} & names.keys()
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & names.keys()
    return found


def test_no_import_runs_upward() -> None:
    height = {name: level for level, layer in enumerate(LAYERS) for name in layer}
    found = imports_of_drex()
    assert len(found) > 150
    upward = []
    for name, imported in found.items():
        for other in imported - {"drex"}:
            if name != "drex":  # the package itself offers what users import
                here, there = name.split(".")[1], other.split(".")[1]
                if here != there and height[there] >= height[here]:
                    upward.append((name, other))
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Raises CycleError, naming the circle."""
    of_files = {name: imported - {name, "drex"} for name, imported in imports_of_drex().items()}
    assert len(list(TopologicalSorter(of_files).static_order())) > 150


def test_control_has_no_clock_thread_or_file() -> None:
    forbidden = {"time", "datetime", "threading", "concurrent", "asyncio", "multiprocessing", "pathlib", "io", "os"}
    found = set()
    for file in (ROOT / "drex" / "control").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "open", file
    assert "numpy" in found
    assert not found & (forbidden | {"torch", "threadpoolctl"})


def written(tree: ast.AST) -> set[tuple[str, str]]:
    """(what is written to, the attribute written) of all assignments, deletions and calls that change in place."""
    found = set()
    for node in ast.walk(tree):
        stored = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
        target: ast.AST = node
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            stored, target = node.func.attr in IN_PLACE, node.func.value
        while stored and isinstance(target, ast.Subscript):
            target = target.value
        if stored and isinstance(target, ast.Attribute):
            owner = target.value
            found.add((owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "?"), target.attr))
    return found


IN_PLACE = ("append", "extend", "pop", "clear", "insert", "remove", "update", "put", "fill")


def test_only_their_owners_write_to_requests_and_columns() -> None:
    """`control/request.py` writes to requests, `control/seats.py` to the columns of what runs."""
    columns = set(vars(Seats(1, 2, 3)))
    fields = {field.name for field in dataclasses.fields(Request)}
    owners = {"seats.py", "request.py"}
    files = [
        file for room in ("control", "engine", "comparison", "sim") for file in (ROOT / "drex" / room).rglob("*.py")
    ]
    wrong = {
        (file.name, name, attribute)
        for file in files
        if file.name not in owners
        for name, attribute in written(ast.parse(file.read_text(encoding="utf-8")))
        if (name in ("seats", "columns") and attribute in columns)
        or (name in ("request", "each", "sample") and attribute in fields)
    }
    assert wrong == set()
    here = {pair for file in files if file.name in owners for pair in written(ast.parse(file.read_text("utf-8")))}
    assert {("self", "reached"), ("self", "context"), ("self", "due")} <= here


def test_control_works_with_torch_absent() -> None:
    """All of it is imported, and some of its tests pass."""
    folder = Path(__file__).parent / "control"
    files = [str(folder / f"test_{name}.py") for name in ("slots", "cost")]
    arguments = [*files, "--confcutdir", str(folder), "-p", "no:cacheprovider"]
    imports = (
        "import importlib, pkgutil, drex.control;"
        "names = [each.name for each in pkgutil.walk_packages(drex.control.__path__, 'drex.control.')];"
        "assert len(names) > 25;"
        "[importlib.import_module(name) for name in names];"
    )
    run = f"import pytest; sys.exit(pytest.main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", BLOCKED + imports + run], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_public_settings_import_with_torch_absent() -> None:
    code = "from drex import EarlyExit, RequestOutput, SamplingParams; import drex.control.scheduler"
    subprocess.run([sys.executable, "-c", BLOCKED + code], check=True, timeout=60)


def test_the_simulator_runs_with_torch_absent() -> None:
    words = ["drex", "simulate", "--requests", "8", "--in-flight", "4"]
    code = f"sys.argv = {words!r}; from drex.cli.main import app; app()"
    done = subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "drex" in done.stdout


def test_nothing_says_to_install_drex_by_name() -> None:
    """On PyPI that name is another package's: drex is installed from a clone."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "drex").rglob("*.py")]
    by_name = re.compile(r"install\b[^\n]*[\"'\s]drex(\[|\"|$)", re.MULTILINE)
    found = {file.name: match[0] for file in files if (match := by_name.search(file.read_text(encoding="utf-8")))}
    assert len(files) > 100
    assert found == {}
