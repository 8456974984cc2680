"""`drex bench --url`: an open-loop client, and what it reports."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from server_fixtures import NAME
from typer.testing import CliRunner

from drex.cli.main import app
from drex.load_test.load import Outcome, arrive
from drex.load_test.load_report import parse_goodput, summarise
from drex.sim.workload import Job


def bench(base: str, *options: str, report: Path | None = None) -> Any:
    """Run the command in this process."""
    written = ("--json", str(report)) if report else ()
    return CliRunner().invoke(app, ["bench", "--url", base, *options, *written])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"the cat {i} sat on the mat"}) + "\n" for i in range(5)))
    return path


@pytest.mark.parametrize("chat", [False, True])
def test_a_server_under_load(base: str, prompts: Path, tmp_path: Path, chat: bool) -> None:
    options = ("--rate", "100", "--requests", "30", "--output-tokens", "9", "--ignore-eos", "--goodput", "ttft:60000")
    kind = ("--chat",) if chat else ()
    done = bench(base, *options, *kind, "--prompts", str(prompts), report=tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["completed"] == 30
    assert found["failed"] == 0
    assert found["total_output_tokens"] == 30 * 9
    assert found["output_throughput"] == pytest.approx(270 / found["duration"])
    assert found["goodput_share"] == 1
    assert found["model_id"] == NAME
    for kind_of_time in ("ttft", "tpot", "itl", "e2el"):
        mean, median, p95, p99 = (found[f"{name}_{kind_of_time}_ms"] for name in ("mean", "median", "p95", "p99"))
        assert 0 < median <= p95 <= p99
        assert mean > 0
    assert found["mean_ttft_ms"] < found["mean_e2el_ms"]
    assert "30 requests done, 0 failed" in done.output


def test_arrivals_and_lengths_of_a_trace(base: str, tmp_path: Path) -> None:
    rows = [(0.0, 10, 5), (0.1, 20, 7), (0.5, 400, 3)]
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,context_tokens,generated_tokens\n" + "".join(f"{a},{c},{g}\n" for a, c, g in rows))
    options = ("--trace", str(trace), "--trace-scale", "0.5", "--ignore-eos")
    done = bench(base, *options, report=tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["completed"] == 3
    assert found["total_output_tokens"] == 2 + 4 + 2
    assert found["duration"] > 0.5
    assert found["total_input_tokens"] == pytest.approx(215, rel=0.4)


def test_a_server_that_fails_is_counted(base: str, prompts: Path, tmp_path: Path) -> None:
    options = ("--requests", "4", "--output-tokens", "5000")
    done = bench(base, *options, "--prompts", str(prompts), report=tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["completed"], found["failed"]) == (0, 4)
    assert "max_model_len" in next(iter(found["errors"]))
    assert "4 failed" in done.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policies", "drex"], "--policies goes without --url"),
        (["--goodput", "speed:5"], "give ttft, tpot or e2el"),
        (["--goodput", "ttft:-1"], "give ttft, tpot or e2el"),
        (["--rate", "0"], "--rate is 0"),
        (["--prompts", "/nowhere"], "expected JSON lines"),
    ],
)
def test_bad_options(base: str, options: list[str], said: str) -> None:
    assert said in str(bench(base, *options).exception)


def test_a_server_that_is_not_there() -> None:
    assert "name a server that runs" in str(bench("http://127.0.0.1:9").exception)
    alone = CliRunner().invoke(app, ["bench", "--chat"])
    assert "--chat goes with --url" in str(alone.exception)


def test_arrivals_have_the_rate_and_the_burstiness() -> None:
    jobs = [Job(1, 1)] * 4000
    for burstiness in (0.25, 1.0, 4.0):
        times = [job.arrival for job in arrive(jobs, 50.0, burstiness, seed=1)]
        gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
        assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.1)
        assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.1)
    assert {job.arrival for job in arrive(jobs, None, 1.0, seed=1)} == {0.0}


def test_times_are_those_of_their_definitions() -> None:
    outcomes = [
        Outcome(first=0.1, last=0.5, gaps=[0.1, 0.3], prompt_tokens=5, tokens=3),
        Outcome(first=0.3, last=0.3, prompt_tokens=2, tokens=1),
        Outcome(error="status 429"),
    ]
    found = summarise(outcomes, 2.0, parse_goodput(["ttft:200", "tpot:250"]))
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["mean_tpot_ms"] == pytest.approx(200)
    assert found["mean_itl_ms"] == pytest.approx(200)
    assert found["median_e2el_ms"] == pytest.approx(400)
    assert found["request_goodput"] == 0.5
    assert found["goodput_share"] == pytest.approx(1 / 3)
    assert found["output_throughput"] == 2
    assert found["errors"] == {"status 429": 1}
