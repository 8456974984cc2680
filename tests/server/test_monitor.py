"""What operators and pages see: models, metrics by the names that dashboards chart, the live view."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_fixtures import NAME

from drex import __version__

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "drex.json"
HISTOGRAMS = {
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens"),
    *("request_generation_tokens", "iteration_tokens_total"),
}
OWN = {
    *("drex_buffered_rows", "drex_buffer_rows_total", "drex_buffer_row_seconds_total", "drex_passes_total"),
    *("drex_rows_total", "drex_pass_seconds_total", "drex_exits_total", "drex_involuntary_exits_total"),
    *("drex_involuntary_stays_total", "drex_tokens_per_second", "drex_cost_error", "drex_goodput", "drex_late_total"),
}


def scrape(base: str) -> dict[tuple[str, str], float]:
    """Series by name and what distinguishes them beside the model."""
    text = httpx.get(f"{base}/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {**sample.labels}
            assert labels.pop("model_name", NAME) == NAME
            found[sample.name, ",".join(labels.values())] = sample.value
    return found


def test_models_say_where_they_exit(client: openai.OpenAI) -> None:
    cards = list(client.models.list())
    assert [card.id for card in cards] == [NAME, "alias"]
    assert client.models.retrieve("alias").early_exit == {
        "layers": 6,
        "exits": [2, 4],
        "thresholds": [0.3, 0.3],
        "criterion": "max_prob",
        "schedule": "constant",
        "kv_fill": "recompute",
        "run_ahead": "trusted",
    }
    assert cards[0].max_model_len == 1024


def test_health_version_and_what_there_is(base: str) -> None:
    assert httpx.get(f"{base}/health").status_code == 200
    assert httpx.get(f"{base}/version").json() == {"version": __version__}
    assert httpx.get(f"{base}/").status_code == 200


def test_metrics_count_what_was_served(client: openai.OpenAI, base: str) -> None:
    before = scrape(base)
    # Under run-ahead several tokens may come at once, with one gap before them.
    asked: dict[str, Any] = {"tpot_ms": 60_000.0, "return_exit_layers": True, "ignore_eos": True, "run_ahead": "off"}
    reply = client.completions.create(
        model=NAME, prompt=[[5, 6, 7], [8, 9]], temperature=0, max_tokens=30, extra_body=asked
    )
    after = scrape(base)

    def grown(name: str, labels: str = "") -> float:
        return after[name, labels] - before.get((name, labels), 0.0)

    assert grown("vllm:prompt_tokens_total") == 5
    assert grown("vllm:generation_tokens_total") == 60
    assert grown("vllm:request_success_total", "length") == 2
    for name in HISTOGRAMS - {"inter_token_latency_seconds", "iteration_tokens_total"}:
        assert grown(f"vllm:{name}_count") == 2, name
    assert grown("vllm:inter_token_latency_seconds_count") == 58
    assert grown("vllm:request_generation_tokens_sum") == 60
    whole, parts = "vllm:e2e_request_latency_seconds_sum", ("queue", "prefill", "decode")
    split = sum(grown(f"vllm:request_{part}_time_seconds_sum") for part in parts)
    assert abs(grown(whole) - split) < 1e-6
    depths = [token["exit_layer"] for choice in reply.choices for token in choice.tokens]
    for layer in (2, 4, 6):
        assert grown("drex_exits_total", str(layer)) == depths.count(layer)
    # First tokens never wait; every other token that went deeper than an exit point waited there.
    for layer in (2, 4):
        assert grown("drex_buffer_rows_total", str(layer)) == sum(depth > layer for depth in depths) - 2
    passes = sum(grown("drex_passes_total", str(segment)) for segment in range(3))
    assert passes == grown("vllm:iteration_tokens_total_count") > 0
    assert grown("vllm:iteration_tokens_total_sum") == sum(grown("drex_rows_total", str(s)) for s in range(3))
    assert after["drex_involuntary_exits_total", ""] == 0
    assert after["vllm:kv_cache_usage_perc", ""] == after["vllm:num_requests_running", ""] == 0
    assert after["drex_goodput", ""] > 0
    assert grown("drex_http_responses_total", "/v1/completions,200") == 1


def test_metrics_have_the_names_that_are_charted(base: str, client: openai.OpenAI) -> None:
    client.completions.create(model=NAME, prompt=[5], max_tokens=20, extra_body={"tpot_ms": 60_000.0})
    names = {name for name, _ in scrape(base)}
    gauges = {f"vllm:{name}" for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")}
    assert gauges | OWN | {f"vllm:{name}_bucket" for name in HISTOGRAMS} <= names
    charted = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            charted |= set(re.findall(r"(?:vllm:|drex_|process_)\w+", target["expr"]))
    assert len(charted) > 20
    assert charted <= names


def test_the_live_view_shows_the_engine_at_work(client: openai.OpenAI, base: str) -> None:
    stream = client.completions.create(
        model=NAME, prompt=[5, 6], n=8, max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    states = []
    with httpx.stream("GET", f"{base}/live") as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        for line in reply.iter_lines():
            if line:
                states.append(json.loads(line.removeprefix("data: ")))
            if len(states) == 3:
                break
    stream.close()
    assert {"achieved", "theta_star", "ideal", "full", "waiting", "slots"} <= set(states[0])
    assert states[-1]["running"] == 8
    assert states[-1]["slots_in_use"] > 0
    assert set(states[-1]["buffered"]) == {"2", "4"}
    assert set(states[-1]["exits"]) == {"2", "4", "6"}
    assert states[2]["tokens"] > states[0]["tokens"]
    assert [segment["passes"] for segment in states[2]["segments"]] > [s["passes"] for s in states[0]["segments"]]
    assert 0.15 < states[2]["time"] - states[1]["time"] < 1


@pytest.mark.parametrize(
    "path", ["/health", "/version", "/metrics", "/v1/models", f"/v1/models/{NAME}", "/live", "/openapi.json", "/"]
)
def test_head_is_answered_where_get_is_and_ends_without_a_body(base: str, path: str) -> None:
    with httpx.stream("GET", f"{base}{path}", timeout=10) as got:
        expected = got.status_code, got.headers["content-type"] if path != "/health" else None
    head = httpx.head(f"{base}{path}", timeout=10)
    assert (head.status_code, head.headers.get("content-type")) == expected
    assert head.content == b""


def test_head_is_refused_where_only_post_is(base: str) -> None:
    assert httpx.head(f"{base}/v1/completions").status_code == 405
    assert httpx.head(f"{base}/v1/models/nothing").status_code == 404
    wrong = httpx.post(f"{base}/health")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, HEAD")
    paths = httpx.get(f"{base}/openapi.json").json()["paths"]
    assert all("head" not in operations for operations in paths.values())
