"""What imports without what: control code runs where torch is not installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BLOCKED = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'safetensors', 'tokenizers'], None));"


def test_control_works_with_torch_absent() -> None:
    """All of it is imported, and some of its tests pass."""
    folder = Path(__file__).parent / "control"
    files = [str(folder / f"test_{name}.py") for name in ("slots", "cost")]
    arguments = [*files, "--confcutdir", str(folder), "-p", "no:cacheprovider"]
    imports = (
        "import importlib, pkgutil, drex.control;"
        "names = [each.name for each in pkgutil.iter_modules(drex.control.__path__)];"
        "[importlib.import_module(f'drex.control.{name}') for name in names];"
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
    root = Path(__file__).parents[1]
    files = [root / "README.md", *(root / "docs").glob("*.md"), *(root / "drex").rglob("*.py")]
    by_name = re.compile(r"install\b[^\n]*[\"'\s]drex(\[|\"|$)", re.MULTILINE)
    found = {file.name: match[0] for file in files if (match := by_name.search(file.read_text(encoding="utf-8")))}
    assert len(files) > 100
    assert found == {}
