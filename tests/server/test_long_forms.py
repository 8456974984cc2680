"""The short forms of the soak and of fuzzing: the same scripts, fewer requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from server_fixtures import until

from drex.server.run import Server

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("fuzz.py", ("--cases", "300", "--examples", "3", "--seed", "7")),
        ("soak.py", ("--requests", "200", "--clients", "16")),
    ],
)
def test_nothing_breaks(server: Server, base: str, script: str, options: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / script), "--url", base, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    report = json.loads(done.stdout)
    if script == "soak.py":
        # Memory is that of the tests here, and grows for its own reasons.
        assert [problem for problem in report["problems"] if "memory" not in problem] == []
        assert report["requests"] == 200
        assert set(report["ends"]) == {"whole", "streamed", "cancelled", "refused"}
    else:
        assert done.returncode == 0, done.stderr
        assert report["cases"] >= 300
    until(lambda: server.serving.unfinished == 0)
    assert server.serving.engine.failure is None
    assert server.serving.llm.engine.scheduler.pool.in_use == 0
