"""`drex bench`, `simulate`, `profile` and `advise` as a user runs them, on a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DREX = str(Path(sys.executable).with_name("drex"))
FREE_OF_INVOLUNTARY_EXITS = {"full", "split", "drex", "art", "consensus"}
EXITS = ("--exits", "2,4", "--thresholds", "0.35", "--dtype", "float32")
KEYS = {
    *("policy", "in_flight", "tokens_per_s", "full", "theta_star", "ideal", "efficiency", "rct_ms", "ttft_ms"),
    *("tpot_ms", "goodput", "involuntary_exits", "involuntary_stays", "exits", "mean_depth", "decision_accuracy"),
    *("decisions", "cost_error", "slots", "quality"),
}


def drex(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run([DREX, *arguments], capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def report(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    prompts = [[3 + (i * 7 + k) % 90 for k in range(12)] for i in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in prompts))
    done = drex(
        *("bench", str(text_model), *EXITS, "--prompts", str(folder / "prompts.jsonl"), "--in-flight", "1,4"),
        *("--policies", "full,split,drex,art,consensus,majority,greedy,latency_only", "--output-tokens", "12"),
        *("--requests", "8", "--repeats", "1", "--json", str(folder / "r.json"), "--html", str(folder / "r.html")),
    )
    assert done.returncode == 0, done.stderr
    assert "4 in flight" in done.stdout
    assert (folder / "r.html").read_text().lstrip().lower().startswith("<!doctype html>")
    found: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return found


def test_bench_reports_every_policy_at_every_count(report: dict[str, Any]) -> None:
    assert report["label"] == "trained model"
    assert {"machine", "versions", "workload", "runs"} <= set(report)
    assert len(report["runs"]) == 2 * 8
    for run in report["runs"]:
        assert set(run) >= KEYS
        assert sum(run["exits"].values()) == 8 * 12
        assert run["tokens_per_s"] > 0
        if run["policy"] in FREE_OF_INVOLUNTARY_EXITS:
            assert run["involuntary_exits"] == 0


def test_bench_serves_rebatched_output_that_equals_flushing_at_once(report: dict[str, Any]) -> None:
    by_policy = {run["policy"]: run for run in report["runs"] if run["in_flight"] == 4}
    assert by_policy["drex"]["exits"] == by_policy["split"]["exits"]
    assert by_policy["drex"]["quality"] == by_policy["split"]["quality"]
    assert by_policy["full"]["quality"]["token_agreement"] == 1.0
    assert by_policy["full"]["mean_depth"] == 6
    assert by_policy["drex"]["involuntary_stays"] == 0
    assert by_policy["greedy"]["involuntary_exits"] > 0


def test_simulate_on_a_machine_and_on_a_measured_profile(text_model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "profile.json"
    done = drex(
        "profile", str(text_model), "--exits", "3", "--thresholds", "0.5", "--max-num-seqs", "4", "--out", str(kept)
    )
    assert done.returncode == 0, done.stderr
    for source in (("--machine", "h100"), ("--profile", str(kept))):
        done = drex(
            *("simulate", "--shape", "llama-160m", "--in-flight", "4", "--requests", "24", *source),
            *("--json", str(tmp_path / "s.json")),
        )
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "s.json").read_text())
        assert "simulated" in found["label"]
        rates = {run["policy"]: run["tokens_per_s"] for run in found["runs"]}
        assert rates["drex"] > 0
        assert {run["policy"] for run in found["runs"]} == {"full", "split", "drex"}


def test_advise_says_yes_or_no_and_why(text_model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the cat sat on the mat; the dog sat on the log. " * 60)
    done = drex(
        "advise", str(text_model), "--text", str(tmp_path / "t.txt"), "--exits", "2,4", "--tokens", "256", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["text"].startswith(("Yes: threshold", "No, run full depth"))
    assert found["pays"] == (found["recommended"] is not None)
    every, fewer = found["outcomes"][:6], found["outcomes"][6:]
    assert [outcome["threshold"] for outcome in every] == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert all(outcome["exits"] == [2, 4] and len(outcome["exit_rates"]) == 2 for outcome in every)
    # Where any threshold is good enough, each exit point is looked at alone too.
    assert [outcome["exits"] for outcome in fewer] in ([], [[2], [4]])
    assert "after layer" in found["text"] or "no threshold keeps the loss" in found["text"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bench", "--policies", "drex,best"), "policy 'best': choose one of"),
        (("bench", "--exit-rates", "0.5"), "--exit-rates goes with --shape"),
        (("bench", "--shape", "gpt-5"), "shape 'gpt-5': choose one of"),
        (("simulate", "--machine", "abacus"), "--machine 'abacus': choose one of"),
        (("simulate", "--exit-rates", "1.5"), "give a share in [0, 1)"),
        (("simulate", "--exits", "99"), "name layers between 1 and 39"),
        (("simulate", "--trace", "/nowhere.csv"), "can't be read as a trace"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = drex(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
