"""What imports without what: control code runs where torch is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BLOCKED = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'safetensors', 'tokenizers'], None));"


def test_control_is_tested_with_torch_absent() -> None:
    folder = Path(__file__).parent / "control"
    arguments = [str(folder), "--confcutdir", str(folder), "-p", "no:cacheprovider"]
    code = f"import pytest; sys.exit(pytest.main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_public_settings_import_with_torch_absent() -> None:
    code = "from drex import EarlyExit, RequestOutput, SamplingParams; import drex.control.scheduler"
    subprocess.run([sys.executable, "-c", BLOCKED + code], check=True, timeout=60)
