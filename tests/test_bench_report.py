"""The page of `drex bench`: whole, self-contained, escaped, and unmoved by what a report leaves out."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from drex.report.html import render

VOID = {"meta", "br", "hr", "img", "link", "input", "col"}
ODD = "split <b>&\"'"
COUNTS = (1, 8, 32)


def a_run(policy: str, in_flight: int, scale: float) -> dict[str, Any]:
    times = {"mean": 101.5 * scale, "p50": 97.25 * scale, "p95": 141.75 * scale, "p99": 190.5 * scale}
    return {
        "policy": policy,
        "in_flight": in_flight,
        "tokens_per_s": 1203.4 * scale,
        "each": [1189.6 * scale, 1203.4 * scale, 1211.8 * scale],
        "full": 1003.2 * scale,
        "theta_star": 1303.1 * scale,
        "ideal": 1507.7 * scale,
        "efficiency": 0.7983,
        **{f"{kind}_ms": times for kind in ("rct", "ttft", "tpot", "itl")},
        "goodput": 0.871,
        "involuntary_exits": 17 if policy == ODD else 0,
        "involuntary_stays": 3,
        "exits": {"4": 4321, "8": 1234, "12": 2345},
        "mean_depth": 7.23,
        "confidence_p5": 0.7012,
        "decision_accuracy": 0.9871,
        "decisions": 2468,
        "cost_error": {"p50": 0.0312, "p90": 0.1234},
        "slots": {"peak": 56789, "capacity": 98304},
        "quality": {"token_agreement": 0.9771, "edit_similarity": 0.9662, "rouge_l": 0.9553,
                    "loss": 2.3456, "loss_full": 2.3367},
        "time": {"segments": [3.21, 2.34, 1.87], "own": 0.432},
        "occupancy": [[0.01 * step, step % 7, step % 3] for step in range(400)],
    }  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    """Two policies at three in-flight counts; the second knows less the more it has in flight."""
    odd = [a_run(ODD, n, 0.9 * (place + 1)) for place, n in enumerate(COUNTS)]
    odd[1].update(quality=None, full=None, theta_star=None, goodput=None, occupancy=None, cost_error={}, each=None)
    odd[2].update(rct_ms=None, exits=None, time=None, slots=None, confidence_p5=None)
    return {
        "machine": {"cpu": "A <cpu> & co", "cores": 2, "threads": None, "device": "cpu"},
        "versions": {"drex": "0.1.0", "torch": "2.11.0"},
        "date": "2026-03-04T09:12:44+00:00",
        "label": "random weights, synthetic exit trace",
        "model": "m<odel>",
        "kv_fill": "recompute",
        "criterion": "trace",
        "exit_layers": [4, 8],
        "num_layers": 12,
        "workload": {"kind": "closed", "requests": 200, "prompt_tokens": [32, 128], "output_tokens": [96, 96],
                     "exit_rates": [0.585, 0.39], "repeats": 3, "note": "<i>"},
        "runs": [*odd, *(a_run("drex", n, float(place + 1)) for place, n in enumerate(COUNTS))],
    }  # fmt: skip


class Page(HTMLParser):
    """Checks that every tag is closed by its own, and gathers what there is."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_the_page_is_well_formed_and_has_every_chart_and_table(report: dict[str, Any]) -> None:
    page = Page(render(report))
    heads = "Throughput", "Request completion time", "Where the time goes", "What waits", "Where tokens leave"
    for head in (*heads, "What it costs in quality", "All numbers"):
        assert head in page.words
    assert page.count("svg") == page.count("desc")
    assert page.count("title") == page.count("svg") + 1
    assert page.count("table") == page.count("caption") == 4
    anchors = {at["id"] for _, at in page.tags if at.get("id")}
    assert {str(at["href"])[1:] for tag, at in page.tags if tag == "a"} <= anchors


def test_the_page_fetches_nothing(report: dict[str, Any]) -> None:
    html = render(report)
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", html))
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", html)
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed")
        assert "src" not in attributes
        assert str(attributes.get("href", "#")).startswith("#")


def test_every_number_is_in_the_tables(report: dict[str, Any]) -> None:
    cells = Page(render(report)).cells
    for run in report["runs"]:
        assert f"{run['tokens_per_s']:,.0f}" in cells
        if run["each"]:
            assert " · ".join(f"{one:,.0f}" for one in run["each"]) in cells
    last = {
        "3,010": "full depth", "3,909": "theta*", "4,523": "ideal", "79.8 %": "efficiency", "87.1 %": "goodput",
        "304": "mean", "292": "p50", "425": "p95", "572": "p99", "4,321": "exits", "1,234": "exits", "2,345": "exits",
        "7.23": "depth", "17": "involuntary exits", "3": "stays", "0.7012": "confidence", "98.7 %": "accuracy",
        "2,468": "decisions", "3.1 %": "cost error", "12.3 %": "cost error", "56,789": "peak", "98,304": "capacity",
        "0.9771": "agreement", "0.9662": "edit", "0.9553": "rouge", "2.3456": "loss", "2.3367": "full depth's loss",
        "3.21": "segment 0", "2.34": "segment 1", "1.87": "segment 2", "0.432": "own time", "\u2013": "unknown",
    }  # fmt: skip
    assert {number: what for number, what in last.items() if number not in cells} == {}


def test_yardsticks_stand_beside_decoding_alone_where_that_is_known(report: dict[str, Any]) -> None:
    """They know no prompts; `full` is made so that the ratios tell which rate they were taken of."""
    runs = [{**a_run(policy, 8, 1.0), "decode_tokens_per_s": 1254.0} for policy in ("drex", ODD)]
    known, unknown = render({**report, "runs": runs}), render({**report, "runs": [a_run("drex", 8, 1.0)]})
    assert "drex: 1.25\u00d7" in known  # 1254.0 / 1003.2
    assert "96.2 %" in Page(known).words  # 1254.0 / 1303.1
    assert "ideal: 1,508" not in known
    assert "drex: 1.20\u00d7" in unknown  # 1203.4 / 1003.2
    assert "92.3 %" in Page(unknown).words
    assert "ideal: 1,508" in unknown


def test_what_a_report_says_is_text(report: dict[str, Any]) -> None:
    html = render(report)
    page = Page(html)
    for raw in ("<b>&", "<cpu>", "<odel>", "<i>"):
        assert raw not in html
    assert ODD in page.cells
    assert {"A <cpu> & co", "m<odel>", "<i>"} <= set(page.words)


def test_synthetic_exits_are_marked_in_the_head_and_at_every_figure(report: dict[str, Any]) -> None:
    synthetic, trained = Page(render(report)), Page(render({**report, "label": "trained model"}))
    assert synthetic.words.count(report["label"]) == 7
    assert ("p", {"class": "warning", "role": "note"}) in synthetic.tags
    assert ("p", {"class": "warning", "role": "note"}) not in trained.tags
    assert "trained model" in trained.words


def an_ahead(drafted: int) -> dict[str, Any]:
    """What a run under run-ahead says of its drafts."""
    bins = [(0.28125, 0, 0, 0.0), (0.46875, 64, 16, 24.0), (0.90625, 36, 27, 30.6)]
    names = "confidence", "verified", "accepted", "expected"
    return {
        "drafted": drafted,
        "verified": 100,
        "accepted": 43,
        "rolled_back": 71,
        "calibration_error": 0.0771,
        "tokens_per_flush": 5.43,
        "calibration": [dict(zip(names, each, strict=True)) for each in bins],
    }


def test_drafts_are_shown_where_a_policy_drafts(report: dict[str, Any]) -> None:
    heads = {"Which drafts are right", "What becomes of drafts"}
    assert heads.isdisjoint(Page(render(report)).words)
    none = {**a_run("drex+lossless", 8, 1.0), "run_ahead": {**an_ahead(0), "calibration": []}}
    ahead = [{**a_run("drex+run-ahead", n, 1.0), "run_ahead": an_ahead(1580)} for n in COUNTS]
    assert heads.isdisjoint(Page(render({**report, "runs": [*report["runs"], none]})).words)
    page = Page(render({**report, "runs": [*report["runs"], none, *ahead]}))
    assert heads <= set(page.words)
    # Tips: all counts in flight together by confidence, and each one's rows over its 7,900 tokens.
    tips = {str(at["data-tip"]) for _, at in page.tags if at.get("data-tip")}
    assert "drex+run-ahead, confidence about 0.46875\n192 drafts\naccepted: 25.0 %\nlearnt: 37.5 %" in tips
    said = "drafted: 1,580, 0.2 a token", "accepted: 43, 0.00544 a token", "rolled back: 71, 0.00899 a token"
    assert "\n".join(["drex+run-ahead, 8 in flight", *said]) in tips
    assert not any("lossless, confidence" in tip or "confidence about 0.28" in tip for tip in tips)
    assert {"1,580", "43", "71", "7.7 %", "5.43"} <= set(page.cells)


def test_anything_about_drafts_may_be_missing(report: dict[str, Any]) -> None:
    for way in leaves(an_ahead(1580))[1:]:
        ahead = an_ahead(1580)
        place: Any = ahead
        for key in way[:-1]:
            place = place[key]
        place[way[-1]] = None
        runs = [{**a_run("drex+run-ahead", 8, 1.0), "run_ahead": ahead}]
        assert not any("None" in words for words in Page(render({**report, "runs": runs})).words), way


def leaves(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values, containers included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(found for key, one in inner for found in leaves(one, (*way, key)))]


def test_any_value_may_be_missing(report: dict[str, Any]) -> None:
    report["runs"] = [{**report["runs"][-1], "occupancy": [[0, 1, 0], [1, 0, 2], [2, 1, 1]]}, report["runs"][0]]
    for way in leaves(report):
        required = not way or way[-1] in ("policy", "in_flight", "tokens_per_s")
        if required or (way[0] == "runs" and way[1:2] > (0,)) or (way[0] == "runs" and len(way) == 2):
            continue
        lacking = copy.deepcopy(report)
        place = lacking
        for key in way[:-1]:
            place = place[key]
        place[way[-1]] = None
        assert not any("None" in words for words in Page(render(lacking)).words), way


@pytest.mark.parametrize("in_flight", [0, 1, 8])
def test_runs_of_which_nothing_else_is_known(in_flight: int) -> None:
    bare = {"policy": "drex", "in_flight": in_flight, "tokens_per_s": 12.5}
    unknown = {**dict.fromkeys(a_run("drex", 1, 1.0)), **bare, "policy": "full"}
    page = Page(render({"runs": [bare, unknown]}))
    assert page.cells.count("12.5") == 2
    Page(render({**dict.fromkeys(("machine", "versions", "label", "workload", "exit_layers")), "runs": []}))
    Page(render({}))


def test_nothing_but_zeros_and_infinities() -> None:
    run = a_run("drex", 4, 0.0)
    run.update(each=[], exits={"4": 0, "12": 0}, time={"segments": [0.0, 0.0], "own": 0}, ideal=float("inf"))
    run.update(theta_star=float("nan"), occupancy=[[0, 0], [0, 0]])
    page = Page(render({"runs": [run], "exit_layers": [4], "num_layers": 12}))
    assert not any(word in str(value) for _, at in page.tags for value in at.values() for word in ("nan", "inf "))
