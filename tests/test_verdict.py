"""What a benchmark's report comes to: its verdict, its doubts, and tables that hold on a narrow terminal."""

from __future__ import annotations

import io
import os
import re
import time
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from test_bench_report import a_run

from drex.cli import advise, evaluate, profile
from drex.cli.info import _print as print_info
from drex.comparison.advise import Advice, Outcome
from drex.comparison.busy import OtherLoad, busy_seconds
from drex.comparison.verdict import doubts, verdict
from drex.control.cost.profile import nominal
from drex.load_test import load_report
from drex.report.html import render
from drex.report.table import show
from drex.tuning.evaluate import Quality


def report_of(turns: dict[str, dict[int, list[float]]], **more: Any) -> dict[str, Any]:
    """A report whose runs have these tokens a second, by policy, count in flight and turn."""
    runs = [
        {**a_run(policy, count, 1.0), "tokens_per_s": sorted(each)[len(each) // 2], "each": each, "quality": None}
        for policy, counts in turns.items()
        for count, each in counts.items()
    ]
    machine = {"cpu": "a cpu", "cores": 2, "threads": 2, "device": None}
    return {
        "machine": machine,
        "label": "trained model",
        "timing": "measured",
        "model": "m",
        "date": "today",
        "kv_fill": "recompute",
        "exit_layers": [4, 8],
        "num_layers": 12,
        "workload": {"kind": "closed", "requests": 8},
        "runs": runs,
        **more,
    }


FULL = {1: [100.0, 110.0, 90.0], 8: [400.0, 420.0, 380.0], 32: [800.0, 820.0, 780.0]}


def times(factors: dict[int, tuple[float, ...]]) -> dict[int, list[float]]:
    """Tokens a second of a policy, from its factors over each of full depth's turns."""
    return {count: [a * b for a, b in zip(each, FULL[count], strict=True)] for count, each in factors.items()}


VERDICTS = {
    "pays everywhere": (
        {1: (1.5, 1.6, 1.4), 8: (1.2, 1.3, 1.25), 32: (1.1, 1.05, 1.2)},
        "Early exit pays: drex+run-ahead is 1.50, 1.25 and 1.10 times as fast as full depth at 1, 8 and 32 in flight.",
    ),
    "pays nowhere": (
        {1: (0.8, 0.9, 0.7), 8: (1.0, 0.98, 1.01)},
        "Early exit does not pay: drex+run-ahead is 0.80 and 1.00 times as fast as full depth at 1 and 8 in flight.",
    ),
    "depends": (
        {1: (0.8, 0.9, 0.7), 8: (0.7, 1.02, 1.4), 32: (1.3, 1.4, 1.5)},
        "Early exit pays at 32 in flight, where drex+run-ahead is 1.40 times as fast as full depth, not at 1 (0.80); "
        "at 8 turns differ too much to tell (1.02).",
    ),
    "can't be told": (
        {8: (0.7, 1.02, 1.4)},
        "Turns differ too much to tell whether early exit pays: drex+run-ahead is 1.02 times as fast as full depth "
        "at 8 in flight, so raise --repeats.",
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_is_one_sentence_about_what_is_served_by_default(case: str) -> None:
    factors, said = VERDICTS[case]
    slow = times(dict.fromkeys(factors, (0.5, 0.5, 0.5)))
    full = {count: FULL[count] for count in factors}
    report = report_of({"full": full, "drex": slow, "drex+run-ahead": times(factors)})
    assert verdict(report) == said
    assert said in unescape(render(report))
    assert said in " ".join(shown(report, 80).split())


def test_turns_are_compared_with_those_beside_them_not_with_the_median() -> None:
    """A machine that gets slower meets both policies of a turn."""
    report = report_of({"full": {8: [100.0, 80.0, 60.0]}, "drex": {8: [120.0, 96.0, 72.0]}})
    assert verdict(report).startswith("Early exit pays: drex is 1.20 times as fast")


def test_one_turn_alone_tells_large_differences_only() -> None:
    said = [verdict(report_of({"full": {1: [100.0]}, "drex": {1: [speed]}})) for speed in (110.0, 103.0, 97.0, 90.0)]
    heads = ("Early exit pays", "Turns differ too much", "Turns differ too much", "Early exit does not pay")
    assert all(words.startswith(head) for words, head in zip(said, heads, strict=True))


def test_an_open_loop_is_judged_by_how_soon_requests_are_done() -> None:
    report = report_of({"full": {8: [100.0] * 3}, "drex": {8: [100.0] * 3}}, workload={"kind": "open", "requests": 8})
    full, drex = report["runs"]
    full["rct_ms"], drex["rct_ms"] = ({**full["rct_ms"], "mean": mean} for mean in (300.0, 200.0))
    assert verdict(report).startswith("Early exit pays: drex is 1.50 times as fast as full depth at 8 in flight")


def test_the_verdict_says_what_is_missing_modelled_or_doubtful() -> None:
    turns = {"full": {8: FULL[8]}, "drex": times({8: (1.2, 1.2, 1.2)})}
    needs = "that takes the policies drex+run-ahead and full, and drex+run-ahead and full did not run"
    assert needs in verdict(report_of({"split": {8: FULL[8]}}))
    assert verdict(report_of({"drex": {8: FULL[8]}})).endswith("policies drex and full, and full did not run.")
    modelled = verdict(report_of(turns, timing="modelled"))
    assert modelled.startswith("In the model of the machine, early exit pays: drex is 1.20 times")
    busy = report_of(turns, machine={"cpu": "a cpu", "cores": 2, "threads": 2, "others_cpu_share": 0.4})
    assert verdict(busy).startswith("On a busy machine, early exit pays")
    report = report_of(turns)
    report["runs"][1]["quality"] = {"token_agreement": 0.953}
    assert verdict(report).endswith("; 95% of its tokens are full depth's.")


@pytest.mark.parametrize("share", [None, 0.0, 0.09, 0.4])
def test_a_busy_machine_is_said_to_have_been_busy(share: float | None) -> None:
    machine = {"cpu": "a cpu", "cores": 2, "threads": 2, "device": None, "others_cpu_share": share}
    report = report_of({"full": {8: FULL[8]}}, machine=machine)
    said = "The machine was busy: other processes took 40% of its 2 cores meanwhile"
    busy = share == 0.4
    assert (said in (doubts(report) or "")) == busy
    assert (said in unescape(render(report))) == busy
    assert (said in " ".join(shown(report, 80).split())) == busy


def test_others_cpu_time_is_that_of_the_cores_less_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"

    def write(*ticks: int) -> None:
        lines = [f"cpu{core} {user} 1 2 900 5 3 4 7 0 0" for core, user in enumerate(ticks)]
        stat.write_text("\n".join(["cpu  1 1 1 1 1 1 1 1 0 0", *lines, "intr 5"]))

    second = os.sysconf("SC_CLK_TCK")
    write(100, 200, 300)
    assert busy_seconds(stat, {0, 2}) == (100 + 300 + 2 * (1 + 2 + 3 + 4 + 7)) / second
    clock, own = [0.0], [0.0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    used = lambda: SimpleNamespace(user=own[0], system=0.0, children_user=0.0, children_system=0.0)  # noqa: E731
    monkeypatch.setattr(os, "times", used)
    load = OtherLoad(stat)
    clock[0], own[0] = 10.0, 6.0
    write(100 + 8 * second, 200 + 5 * second, 300 + 9 * second)
    assert load.share() == pytest.approx((8 + 5 - 6) / (10 * 2))  # the third core is not ours
    own[0] = 13.5  # a clock tick more than was counted
    assert load.share() == 0.0
    own[0] = 100.0  # counters that leave this process out say nothing
    assert load.share() is None
    stat.unlink()
    assert load.share() is None
    assert OtherLoad(stat).share() is None


def test_modelled_times_are_said_to_be_modelled_at_every_figure(tmp_path: Path) -> None:
    report = report_of({"full": {8: FULL[8]}, "drex": {8: FULL[8]}}, label="simulated: whatever")
    simulated, measured = (unescape(render({**report, "timing": timing})) for timing in ("modelled", "measured"))
    said = "times are modelled, not measured"
    figures = len(re.findall(r"<section><h2>", simulated)) - 1  # the last one holds the tables
    assert figures > 3
    assert simulated.count(f"<strong>{said}</strong>") == 1
    assert simulated.count(f'<span class="tag">{said}</span>') == figures
    assert "Timings are real" not in simulated
    assert ">drex simulate · today<" in simulated
    assert "modelled" not in measured
    assert "Times are modelled, not measured" in shown({**report, "timing": "modelled"}, 80)


def shown(report: dict[str, Any], width: int) -> str:
    """A report as a terminal of some width shows it."""
    file = io.StringIO()
    show(report, Console(file=file, width=width))
    return file.getvalue()


def printed(table: Any) -> str:
    file = io.StringIO()
    Console(file=file, width=80).print(table)
    return file.getvalue()


def holds_at_80(text: str, *cells: str) -> None:
    """Fail where a line is longer than 80 columns, was cut, or lacks a cell."""
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert [cell for cell in cells if cell not in text] == []


def test_the_benchmarks_table_holds_at_80_columns() -> None:
    wide = {"mean": 123_456.0, "p50": 1.0, "p95": 1.0, "p99": 654_321.0}
    runs = [
        {
            **a_run(policy, 1024, 1.0),
            "tokens_per_s": 123_456.0,
            "each": [123_456.0],
            "rct_ms": wide,
            "decode_tokens_per_s": 234_567.0,
            "ttft_ms": {**wide, "mean": 98_765.0},
            "tpot_ms": {**wide, "mean": 1234.5},
            "mean_depth": 126.4,
            "involuntary_exits": 1_234_567,
            "involuntary_stays": 654_321,
            "quality": {"token_agreement": 0.98},
        }
        for policy in ("full", "drex+run-ahead", "latency_only")
    ]
    cells = ("123456", "234567", "654321", "98765", "1234.5", "126.4", "1234567", "0.98")
    holds_at_80(shown(report_of({}, runs=runs), 80), *cells)


def test_the_other_tables_hold_at_80_columns() -> None:
    exits = tuple(range(4, 24, 4))
    counts = (1, 4, 8, 16, 32, 64, 128, 256)
    outcome = Outcome(0.75, exits, (0.57, 0.19, 0.2, 0.31, 1.0), 1.0, 1.123, dict.fromkeys(counts, 12.34))
    advice = Advice(True, "Yes", (outcome,), None)
    for start in range(0, len(counts), advise.COUNTS_ABREAST):
        abreast = counts[start : start + advise.COUNTS_ABREAST]
        holds_at_80(printed(advise._table(advice, abreast)), "12.34", "0.75", "+12.3%", "100.0%", *map(str, abreast))
    shares = dict.fromkeys((*exits, 24), 0.166)
    quality = Quality(0.65, 12.3456, 1.2345, 0.987, 0.834, 14.25, shares)
    holds_at_80(printed(evaluate._table([quality])), "12.3456", "+23.45%", "0.987", "83.4%", "14.25", "24: 16.6%")
    holds_at_80(printed(profile._table(nominal((10, 10, 20)), 64)), "layers (ms)")
    loaded = {f"{name}_{kind}_ms": 123_456.7 for name in ("mean", "median", "p95", "p99") for kind in load_report.KINDS}
    file = io.StringIO()
    facts = {"model_id": "m", "endpoint": "u", "completed": 1, "failed": 0, "duration": 1.0, "errors": {}}
    rates = {"request_goodput": 1.0, "goodput_share": 1.0, "output_throughput": 1e5, "request_throughput": 1e3}
    load_report.show({**loaded, **facts, **rates}, Console(file=file, width=80))
    holds_at_80(file.getvalue(), "123456.7")


def test_info_holds_at_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    segment = {"layers": [101, 126], "head": "linear", "threshold": 0.123456, "kv_bytes_per_token": 1e6}
    sizes = ("weight_bytes", "exit_head_bytes", "kv_bytes_per_token", "kv_bytes_per_request", "parameters")
    counts = ("layers", "hidden_size", "heads", "kv_heads", "vocab_size", "max_model_len")
    names = {"model": "Llama-3.1-405B", "type": "llama", "dtype": "bfloat16", "criterion": "max_prob"}
    facts = {**names, "kv_fill": "recompute", **dict.fromkeys(sizes, 10**12), **dict.fromkeys(counts, 131_072)}
    print_info({**facts, "segments": [segment] * 3})
    holds_at_80(capsys.readouterr().out, "101-126", "0.123456", "976.6 KiB")
