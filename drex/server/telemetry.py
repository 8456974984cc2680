"""What Prometheus scrapes: vLLM's names where they mean the same, and drex's own.

Events are counted in the engine's thread as they happen; the rest is read from the engine's report at each scrape.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from drex.control.request import Request
from drex.engine.metrics import PassRecord
from drex.engine.streams import Event, Timing
from drex.server.replies import LivePass, SegmentWork

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
MODEL = "model_name"
LATEST = 256
"""Passes that are remembered one by one."""


class Telemetry:
    """Counts and measures for one engine; an `Observer`.

    Args:
        model_name: the label of all series.
        exits: layers after which there is an exit point.
        num_layers: of the model.

    Attributes:
        exit_counts: tokens so far, by layers executed.
        segments: passes, rows and seconds so far, by segment.
        tokens: so far.
        latest: the last passes, their times by `time.monotonic`.
    """

    def __init__(self, model_name: str, exits: Sequence[int], num_layers: int) -> None:
        self.exit_counts = dict.fromkeys((*exits, num_layers), 0)
        self.segments: list[SegmentWork] = [{"passes": 0, "rows": 0, "seconds": 0.0} for _ in range(len(exits) + 1)]
        self.tokens = 0
        self.latest: deque[LivePass] = deque(maxlen=LATEST)
        self._exits, self._model_name = tuple(exits), model_name
        self._waited_rows = [0] * len(exits)
        self._waited_seconds = [0.0] * len(exits)
        self._report: dict[str, Any] = {}
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)
        self._first = self._histogram("time_to_first_token_seconds", "Time to first token", LONG)
        self._gap = self._histogram("inter_token_latency_seconds", "Gap between tokens", SHORT)
        self._mean_gap = self._histogram("request_time_per_output_token_seconds", "Mean time of later tokens", SHORT)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to last token", LONG)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to first pass", LONG)
        self._prefill = self._histogram("request_prefill_time_seconds", "From first pass to first token", LONG)
        self._decode = self._histogram("request_decode_time_seconds", "From first to last token", LONG)
        self._inference = self._histogram("request_inference_time_seconds", "From first pass to last token", LONG)
        self._prompt_size = self._histogram("request_prompt_tokens", "Prompt tokens of a request", SIZES)
        self._output_size = self._histogram("request_generation_tokens", "Output tokens of a request", SIZES)
        self._iteration = self._histogram("iteration_tokens_total", "Rows of a pass", SIZES)
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that got a token")
        self._output_tokens = self._counter("vllm:generation_tokens", "Tokens generated")
        self._finished = Counter(
            "vllm:request_success",
            "Requests that ended, by reason: stop, length, abort or error",
            [MODEL, "finished_reason"],
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(model_name, reason)
        self._replies = Counter(
            "drex_http_responses", "HTTP responses", [MODEL, "path", "status"], registry=self._registry
        )

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"vllm:{name}", text, [MODEL], buckets=buckets, registry=self._registry).labels(
            self._model_name
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, [MODEL], registry=self._registry).labels(self._model_name)

    # Events, in the engine's thread

    def passed(self, record: PassRecord) -> None:
        """A pass was run."""
        rows = record.load.rows + record.load.kv_rows
        ran = range(len(self.segments)) if record.through else range(record.segment, record.segment + 1)
        # How long each took is not known where one pass ran all.
        seconds, now = record.seconds / len(ran), time.monotonic()
        for number in ran:
            segment = self.segments[number]
            segment["passes"] += 1
            segment["rows"] += rows
            segment["seconds"] += seconds
            self.latest.append(
                {
                    "number": record.number,
                    "time": now - seconds * (ran.stop - 1 - number),
                    "seconds": seconds,
                    "segment": number,
                    "rows": rows,
                    "waiting": list(record.live[1:]) or None,
                }
            )
        for boundary, waiting in enumerate(record.live[1:]):
            self._waited_seconds[boundary] += waiting * record.seconds
        self._iteration.observe(rows)

    def emitted(self, event: Event, timing: Timing, now: float) -> None:
        """A request got tokens or ended."""
        tokens = event.chunk.tokens
        if tokens:
            self.tokens += len(tokens)
            self._output_tokens.inc(len(tokens))
            if timing.latest is None:
                self._prompt_tokens.inc(len(event.request.prompt))
                self._first.observe(now - timing.arrived)
            else:
                self._gap.observe(now - timing.latest)
        for token in tokens:
            self.exit_counts[token.exit_layer] += 1
            for check in token.checks:
                self._waited_rows[check.exit_index] += self._exits[check.exit_index] < token.exit_layer
        if event.whole is not None:
            self._ended(event.request, event.whole.finish_reason, timing, now)

    def aborted(self, request: Request, timing: Timing) -> None:
        """Nobody waits for a request any more."""
        self._finished.labels(self._model_name, "abort").inc()

    def _ended(self, request: Request, reason: str, timing: Timing, now: float) -> None:
        self._finished.labels(self._model_name, reason).inc()
        first = request.first_token_at
        if first is None or timing.started is None:
            return
        self._whole.observe(now - timing.arrived)
        self._queue.observe(timing.started - timing.arrived)
        self._prefill.observe(first - timing.started)
        self._decode.observe(now - first)
        self._inference.observe(now - timing.started)
        self._prompt_size.observe(len(request.prompt))
        self._output_size.observe(request.num_output)
        if request.num_output > 1:
            self._mean_gap.observe((now - first) / (request.num_output - 1))

    # In the event loop's thread

    def replied(self, path: str, status: int) -> None:
        """An HTTP response was sent; `path` is the route's, not the client's."""
        self._replies.labels(self._model_name, path, str(status)).inc()

    def render(self, report: dict[str, Any]) -> bytes:
        """The text that Prometheus reads; `report` is the engine's, of now."""
        self._report = report
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What is read from the engine's report; called by the registry."""
        report = self._report
        if not report:
            return
        usage = report["slots_in_use"] / report["slots"]
        yield self._gauge("vllm:num_requests_running", "Requests in flight", {(): report["running"]})
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue", {(): report["waiting"]})
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of K/V slots in use, 0 to 1", {(): usage})
        yield self._count("vllm:num_preemptions", "Requests that lost their K/V", {(): report["preemptions"]})
        yield from self._own(report)

    def _own(self, report: dict[str, Any]) -> Iterator[Metric]:
        points = [(str(layer),) for layer in self._exits]
        yield self._gauge(
            "drex_buffered_rows",
            "Rows that wait after an exit point",
            dict(zip(points, report["buffered"], strict=True)),
            ("exit_layer",),
        )
        for name, text, values in (
            ("drex_buffer_rows", "Rows that went through the buffer after an exit point", self._waited_rows),
            ("drex_buffer_row_seconds", "Row-seconds in the buffer after an exit point", self._waited_seconds),
        ):
            yield self._count(name, text, dict(zip(points, values, strict=True)), ("exit_layer",))
        for name, text, work in (
            ("drex_passes", "Passes over a segment", [one["passes"] for one in self.segments]),
            ("drex_rows", "Rows of the passes over a segment", [one["rows"] for one in self.segments]),
            ("drex_pass_seconds", "Seconds in passes over a segment", [one["seconds"] for one in self.segments]),
        ):
            yield self._count(name, text, {(str(i),): value for i, value in enumerate(work)}, ("segment",))
        exits = {(str(layer),): count for layer, count in self.exit_counts.items()}
        yield self._count("drex_exits", "Tokens by layers executed", exits, ("layer",))
        for name, text in (
            ("involuntary_exits", "Tokens emitted at an exit point below its threshold"),
            ("involuntary_stays", "Tokens that reached a threshold and were emitted deeper"),
            ("unchecked", "Tokens that could have exited and were not asked"),
            ("late", "Tokens that came after they were due"),
            ("infeasible", "Tokens that could not come in time when they were buffered"),
        ):
            yield self._count(f"drex_{name}", text, {(): report[name]})
        drafts = report["run_ahead"]
        yield self._count("drex_drafts", "Tokens taken tentatively", {(): drafts["drafted"]})
        yield self._count("drex_drafts_accepted", "Tentative tokens that were right", {(): drafts["accepted"]})
        yield self._count("drex_rolled_back", "Tokens taken back with a wrong one", {(): drafts["rolled_back"]})
        rates = {(name,): report[name] for name in ("achieved", "theta_star", "ideal", "full")}
        yield self._gauge("drex_tokens_per_second", "Tokens a second while decoding", rates, ("kind",))
        errors = {(quantile,): value for quantile, value in report["cost_error"].items()}
        yield self._gauge("drex_cost_error", "Relative error of predicted pass times", errors, ("quantile",))
        yield self._gauge("drex_goodput", "Share of requests with targets that met them", {(): report["goodput"]})
        slots = {("in_use",): report["slots_in_use"], ("total",): report["slots"]}
        yield self._gauge("drex_kv_slots", "K/V slots, of a token at a layer", slots, ("state",))

    def _gauge(self, name: str, text: str, values: Mapping[Any, Any], labels: tuple[str, ...] = ()) -> Metric:
        """A gauge; values that aren't known yet are left out."""
        return self._fill(GaugeMetricFamily(name, text, labels=(MODEL, *labels)), values)

    def _count(self, name: str, text: str, values: Mapping[Any, Any], labels: tuple[str, ...] = ()) -> Metric:
        return self._fill(CounterMetricFamily(name, text, labels=(MODEL, *labels)), values)

    def _fill(self, family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[Any, Any]) -> Metric:
        for labels, value in values.items():
            if value is not None:
                family.add_metric((self._model_name, *labels), value)
        return family
