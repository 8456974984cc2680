"""Virtual time: workloads, executors without a model, the driver that feeds an engine, and its metrics."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drex.config import EngineConfig, ExitRule
from drex.control.cost.model import CostModel, Load
from drex.control.cost.profile import nominal
from drex.control.decisions import Decisions
from drex.control.memory.slots import SlotLayout
from drex.control.plan import Evaluations, Pass, PassResult
from drex.control.request import Request, TokenRecord
from drex.control.scheduler import Scheduler
from drex.engine.driver import serve
from drex.engine.engine import Engine
from drex.engine.executor import Executor
from drex.engine.metrics import Metrics, quantiles
from drex.outputs import ExitCheck, FinishReason
from drex.sampling_params import SamplingParams
from drex.sim.executor import RecordedExits, Recorder, Replay, Said, VirtualExecutor
from drex.sim.workload import Job, draw_jobs, read_trace

TRACES = Path(__file__).parents[2] / "shared" / "data" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason=f"recorded traces are not part of the project: {TRACES}")


def make_engine(executor: Executor, lengths: tuple[int, ...] = (2, 2), **changes: Any) -> Engine:
    config = EngineConfig(
        256, **{"max_num_seqs": 6, "max_num_batched_tokens": 512, "kv_cache_tokens": 20_000} | changes
    )
    scheduler = Scheduler(config, SlotLayout(lengths), "recompute", CostModel(nominal(lengths)))
    return Engine(scheduler, executor)


def virtual(lengths: tuple[int, ...] = (2, 2), **more: Any) -> VirtualExecutor:
    return VirtualExecutor(CostModel(nominal(lengths)), **more)


def requests(
    jobs: Sequence[Job], segments: int = 2, rates: Sequence[float] = (0.6, 0.6), **params: Any
) -> Iterator[tuple[float, Request]]:
    """Requests of jobs, with exits that are taken by these shares of the rows."""
    rule = ExitRule("trace", tuple(1 - rate for rate in rates[: segments - 1]))
    for number, job in enumerate(jobs):
        asked = SamplingParams(temperature=0.0, max_tokens=job.output, ignore_eos=True, **params)
        prompt = (3,) * job.prompt
        yield (
            job.arrival,
            Request(f"r{number}", prompt, asked, rule, number, frozenset(), segments, arrival=number),
        )


# Workloads


def test_drawn_jobs_are_a_function_of_the_seed_and_lie_in_their_ranges() -> None:
    jobs = draw_jobs(500, (3, 9), (20, 21), rate=4.0, seed=1)
    assert jobs == draw_jobs(500, (3, 9), (20, 21), rate=4.0, seed=1)
    assert jobs != draw_jobs(500, (3, 9), (20, 21), rate=4.0, seed=2)
    assert {job.prompt for job in jobs} == set(range(3, 10))
    assert {job.output for job in jobs} == {20, 21}
    assert all(job.arrival == 0 for job in draw_jobs(5, (1, 1), (1, 1)))


@pytest.mark.parametrize("rate", [0.2, 5.0, 300.0])
def test_poisson_arrivals_have_the_asked_rate_and_memoryless_gaps(rate: float) -> None:
    count = 4000
    jobs = draw_jobs(count, (1, 1), (1, 1), rate=rate, seed=3)
    arrivals = [job.arrival for job in jobs]
    gaps = np.diff([0.0, *arrivals])
    assert (gaps > 0).all()
    # A sum of exponentials: its spread is 1 / √n of its mean.
    assert abs(count / arrivals[-1] / rate - 1) < 4 / count**0.5
    assert gaps.std() * rate == pytest.approx(1, abs=0.1)
    assert (gaps > 1 / rate).mean() == pytest.approx(math.exp(-1), abs=0.03)


# Recorded traces

RECORDED = {
    "azure_llm_2023_code.csv": (5000, 4808, 10),
    "azure_llm_2023_conv.csv": (5000, 374, 44),
    "lengths_arxiv_summarization.csv": (4000, 271, 2423),
    "mooncake_conversation.jsonl": (3000, 6758, 500),
}


@needs_traces
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_traces_are_read(name: str) -> None:
    count, prompt, output = RECORDED[name]
    jobs = read_trace(TRACES / name)
    assert len(jobs) == count
    assert jobs[0] == Job(prompt, output, 0.0)
    assert all(job.prompt >= 1 and job.output >= 1 for job in jobs)
    assert all(sooner.arrival <= later.arrival for sooner, later in itertools.pairwise(jobs))
    assert (jobs[-1].arrival > 0) == (name != "lengths_arxiv_summarization.csv")


@needs_traces
def test_arrivals_are_in_seconds_in_all_traces() -> None:
    # Azure's hour and Mooncake's milliseconds: thousands of requests in minutes.
    for name in ("azure_llm_2023_conv.csv", "azure_llm_2023_code.csv", "mooncake_conversation.jsonl"):
        assert 60 < read_trace(TRACES / name)[-1].arrival < 7200
    fast = read_trace(TRACES / "azure_llm_2023_conv.csv", speed=4.0)
    slow = read_trace(TRACES / "azure_llm_2023_conv.csv")
    assert fast[-1].arrival == pytest.approx(slow[-1].arrival / 4)


@needs_traces
@pytest.mark.parametrize("name", RECORDED)
def test_lengths_are_scaled_and_cut_in_proportion(name: str) -> None:
    whole, cut = read_trace(TRACES / name, scale=0.1), read_trace(TRACES / name, scale=0.1, longest=64)
    for before, after in zip(whole, cut, strict=True):
        assert after.arrival == before.arrival
        if before.prompt + before.output <= 64:
            assert after == before
        else:
            assert 2 <= after.prompt + after.output <= 64
            # Each is rounded down, so the shares differ by less than a token's worth.
            share = 64 / (before.prompt + before.output)
            assert after.prompt == max(1, math.floor(before.prompt * share))
            assert after.output == max(1, math.floor(before.output * share))


def test_a_small_trace_of_each_kind_is_read(tmp_path: Path) -> None:
    azure, mooncake, lengths = tmp_path / "a.csv", tmp_path / "m.jsonl", tmp_path / "l.csv"
    azure.write_text("arrival_s,context_tokens,generated_tokens\n2.5,10,4\n1.0,3,7\n")
    rows = [{"timestamp": 500, "input_length": 10, "output_length": 3, "hash_ids": [1]}]
    mooncake.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths.write_text("prefill_tokens,decode_tokens\n5,6\n")
    assert read_trace(azure) == [Job(3, 7, 1.0), Job(10, 4, 2.5)]
    assert read_trace(str(mooncake)) == [Job(10, 3, 0.5)]
    assert read_trace(lengths) == [Job(5, 6, 0.0)]
    assert read_trace(azure, scale=2.0, speed=0.5) == [Job(6, 14, 2.0), Job(20, 8, 5.0)]
    assert read_trace(lengths, scale=0.01) == [Job(1, 1, 0.0)]
    assert read_trace(azure, longest=7) == [Job(2, 4, 1.0), Job(5, 2, 2.5)]


HEADER = "arrival_s,context_tokens,generated_tokens\n"
BAD = {
    "empty.csv": "",
    "header_only.csv": HEADER,
    "other_columns.csv": "time,tokens\n1,2\n",
    "no_output.csv": "arrival_s,context_tokens\n0,5\n",
    "short_row.csv": HEADER + "0,5\n",
    "words.csv": HEADER + "0,five,5\n",
    "empty_field.csv": HEADER + "0,,5\n",
    "infinite.csv": HEADER + "0,inf,5\n",
    "nan_length.csv": HEADER + "0,nan,5\n",
    "nan_arrival.csv": HEADER + "nan,5,5\n",
    "long_field.csv": HEADER + "0," + "9" * 140_000 + ",5\n",
    "not_json.jsonl": "prompt 5\n",
    "number.jsonl": "5\n",
    "null.jsonl": "null\n",
    "list.jsonl": "[5, 6]\n",
    "half.jsonl": '{"input_length": 3, "output_length": 4}\n{"input_length": 3}\n',
    "null_length.jsonl": '{"input_length": null, "output_length": 4}\n',
    "list_length.jsonl": '{"input_length": [3], "output_length": 4}\n',
    "blank_line.jsonl": '{"input_length": 3, "output_length": 4}\n\n',
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_trace_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(BAD[name])
    with pytest.raises(ValueError, match=name):
        read_trace(tmp_path / name)


def test_files_that_are_missing_or_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.csv").write_bytes(HEADER.encode() + b"\xff\xfe,\x00\n")
    for name in ("bytes.csv", "missing.csv", "missing.jsonl", "."):
        with pytest.raises(ValueError, match="can't be read as a trace"):
            read_trace(tmp_path / name)


# Executors


def test_virtual_time_is_what_the_passes_take() -> None:
    executor = virtual()
    engine = make_engine(executor)
    engine.history = []
    serve(engine, requests(draw_jobs(10, (2, 8), (5, 20))))
    cost = CostModel(nominal((2, 2)))
    assert executor.now() == pytest.approx(sum(cost.predict(each.segment, each.load) for each in engine.history))
    assert [each.number for each in engine.history] == list(range(len(engine.history)))
    for sooner, later in itertools.pairwise(engine.history):
        assert later.started == pytest.approx(sooner.started + sooner.seconds)
    assert engine.stats.own_seconds == 0
    assert engine.stats.executor_seconds == pytest.approx(executor.now())


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.8])
def test_drawn_exits_are_taken_at_the_rate_of_their_thresholds(rate: float) -> None:
    engine = make_engine(virtual())
    serve(engine, requests(draw_jobs(60, (2, 8), (40, 60)), rates=(rate,)))
    checked, early = engine.metrics.checks[0], engine.metrics.exits[1]
    assert checked > 2000
    assert abs(early / checked - rate) <= 4 * (rate * (1 - rate) / checked) ** 0.5
    assert engine.metrics.involuntary_exits == engine.metrics.involuntary_stays == 0


def test_drawn_exits_do_not_depend_on_the_schedule() -> None:
    depths = []
    for seats, policy in ((1, "split"), (6, "drex"), (3, "drex")):
        engine, seen = make_engine(virtual((1, 2, 1)), (1, 2, 1), max_num_seqs=seats, policy=policy), {}
        made = list(requests(draw_jobs(8, (2, 8), (10, 30)), 3))
        serve(engine, made)
        for _, each in made:
            seen[each.request_id] = [record.depth for record in each.records]
        depths.append(seen)
    assert depths[0] == depths[1] == depths[2]
    assert {depth for each in depths[0].values() for depth in each} == {1, 2, 3}


def test_recorded_exits_are_taken_again() -> None:
    recorded = {"r0": [3, 1, 2, 1, 3], "r1": [3, 2]}
    engine = make_engine(virtual((1, 1, 1), exits=RecordedExits(recorded)), (1, 1, 1))
    made = list(requests([Job(4, 5), Job(2, 7)], 3))
    serve(engine, made)
    found = {each.request_id: [record.depth for record in each.records] for _, each in made}
    # The first token of a request runs to the end; a longer output takes the record from the start again.
    assert found == {"r0": [3, 1, 2, 1, 3], "r1": [3, 2, 3, 2, 3, 2, 3]}


# The driver


def test_a_closed_loop_keeps_its_seats_taken_and_no_more() -> None:
    engine = make_engine(virtual(), max_num_seqs=4)
    made = list(requests(draw_jobs(40, (2, 8), (5, 20))))
    counts = []

    def each(emitted: Any) -> None:
        counts.append((len(engine.scheduler.admission.running), engine.unfinished))

    serve(engine, made, each, closed=True)
    running, unfinished = (max(column) for column in zip(*counts, strict=True))
    assert running == unfinished == 4
    assert all(request.finish_reason is FinishReason.LENGTH for _, request in made)
    # While there is more to come, an ended request is replaced before the next pass.
    waited = [request.first_token_at - request.arrived_at for _, request in made if request.first_token_at is not None]
    assert len(waited) == 40
    assert max(waited) < 0.1


def test_arrivals_are_fed_in_as_their_time_comes() -> None:
    executor = virtual()
    engine = make_engine(executor)
    jobs = [Job(3, 4, 0.5), Job(3, 4, 0.5), Job(3, 4, 30.0)]
    made = list(requests(jobs))
    serve(engine, made)
    arrived = [each.arrived_at for _, each in made]
    assert arrived[:2] == [0.5, 0.5]
    # Idle until the third one.
    assert arrived[2] == 30.0
    assert executor.now() > 30.0


def test_open_arrivals_are_never_held_back() -> None:
    engine = make_engine(virtual(), max_num_seqs=2)
    jobs = [Job(3, 30, 1e-6 * (number + 1)) for number in range(12)]
    most = 0

    def each(emitted: Any) -> None:
        nonlocal most
        most = max(most, engine.unfinished)

    serve(engine, requests(jobs), each)
    assert most > 10


def test_open_arrivals_are_not_held_back_by_some_that_came_at_the_very_start() -> None:
    engine = make_engine(virtual(), max_num_seqs=2)
    made = list(requests([*[Job(3, 100)] * 4, Job(3, 4, 0.05)]))
    serve(engine, made)
    assert made[-1][1].arrived_at < 0.1


def test_the_time_of_a_request_runs_from_when_it_came() -> None:
    # The second one comes in the middle of a pass over the first one's prompt; that it is noticed later is no excuse.
    engine = make_engine(virtual())
    made = list(requests([Job(200, 3, 1.0), Job(3, 3, 1.001)]))
    serve(engine, made)
    assert made[1][1].arrived_at == pytest.approx(1.001)


def test_a_second_run_on_the_same_engine_comes_to_an_end() -> None:
    class Impatient(VirtualExecutor):
        waits = 0

        def wait_until(self, moment: float) -> None:
            self.waits += 1
            assert self.waits < 1000, f"waits for {moment} at {self.now()} for ever"
            super().wait_until(moment)

    # (start + arrival) - start is a little less than arrival for some numbers, such as these.
    start, arrival = 2.8183784439970383, 7.558042041572239
    assert (start + arrival) - start < arrival
    executor = Impatient(CostModel(nominal((2, 2))))
    executor.wait_until(start)
    engine = make_engine(executor)
    made = list(requests([Job(3, 3, arrival)]))
    serve(engine, made)
    assert made[0][1].finish_reason is FinishReason.LENGTH


# Record and replay


class Jittery:
    """A virtual machine whose passes take between half and twice as long as predicted, by chance."""

    asynchronous = False

    def __init__(self, inner: VirtualExecutor, seed: int) -> None:
        self.inner, self.draw, self.clock = inner, random.Random(seed), 0.0

    def now(self) -> float:
        self.clock += self.draw.uniform(0.0, 1e-4)  # the engine's own time
        return self.clock

    def wait_until(self, moment: float) -> None:
        self.clock = max(self.clock, moment)

    def submit(self, batch: Pass) -> None:
        self.inner.submit(batch)

    def collect(self) -> PassResult:
        before = self.inner.now()
        result = self.inner.collect()
        self.clock += (self.inner.now() - before) * self.draw.uniform(0.5, 2.0)
        return result


@pytest.mark.parametrize("rate", [None, 20.0])
@pytest.mark.parametrize(
    ("lengths", "changes"),
    [
        ((2, 2), {}),
        ((1, 2, 1), {}),
        ((1, 1, 1, 1), {}),
        ((2, 2), {"policy": "art"}),
        ((2, 2), {"adaptive": True}),
        ((1, 2, 1), {"max_slowdown": 1.2, "max_wait_passes": 12}),
    ],
)
def test_a_recorded_run_makes_the_same_passes_again(
    lengths: tuple[int, ...], changes: dict[str, Any], rate: float | None
) -> None:
    jobs = draw_jobs(14, (2, 30), (10, 40), rate=rate, seed=5)
    targets = {} if "max_slowdown" in changes else {"tpot_ms": 15.0}

    def run(executor: Executor) -> tuple[Engine, list[tuple[Any, ...]]]:
        engine, emitted = make_engine(executor, lengths, **changes), []
        engine.history = []
        serve(engine, requests(jobs, len(lengths), (0.5, 0.4, 0.3), **targets), emitted.append)
        return engine, emitted

    recorder = Recorder(Jittery(virtual(lengths), seed=1))
    first, emitted = run(recorder)
    second, again = run(Replay(recorder))
    assert first.history
    assert second.history == first.history
    assert again == emitted
    assert second.metrics.summary() == first.metrics.summary()
    # Times decide: other jitter makes other passes.
    other, _ = run(Jittery(virtual(lengths), seed=2))
    assert other.history != first.history


# Metrics


def finished(
    number: int,
    arrived: float,
    times: Sequence[float],
    metrics: Metrics,
    reason: FinishReason = FinishReason.LENGTH,
    **targets: float,
) -> None:
    """Tell metrics of a request whose tokens came at these times."""
    params = SamplingParams(max_tokens=max(1, len(times)), **targets)
    each = Request(f"r{number}", (1, 2), params, ExitRule("max_prob", (0.5,)), 0, frozenset(), 2)
    each.arrived_at = arrived
    each.finish_reason = reason
    for token, now in enumerate(times):
        each.tokens.append(5)
        each.records.append(TokenRecord(5, -1.0, 2, 1.0, (), ()))
        each.first_token_at = each.first_token_at if each.first_token_at is not None else now
        if token:
            metrics.gap(each, now - times[token - 1])
    metrics.ended(each, each.finish_reason, times[-1] if times else arrived)


def test_percentiles_are_those_of_numpy() -> None:
    draw, metrics = random.Random(0), Metrics()
    ttft, tpot, gaps, rct = [], [], [], []
    for number in range(200):
        arrived = draw.uniform(0, 100)
        times = list(itertools.accumulate([arrived + draw.uniform(0.1, 2)] + [draw.expovariate(20) for _ in range(9)]))
        finished(number, arrived, times, metrics)
        ttft.append(times[0] - arrived)
        rct.append(times[-1] - arrived)
        tpot.append((times[-1] - times[0]) / 9)
        gaps += np.diff(times).tolist()
    summary = metrics.summary()
    assert (summary["requests"], summary["finished"]) == (200, {"length": 200})
    for name, values in (("ttft_ms", ttft), ("tpot_ms", tpot), ("itl_ms", gaps), ("rct_ms", rct)):
        expected = {f"p{p}": np.percentile(np.array(values) * 1e3, p) for p in (50, 95, 99)}
        assert summary[name] == pytest.approx({"mean": np.mean(values) * 1e3, **expected})


def test_without_data_there_are_no_numbers() -> None:
    assert quantiles([]) == dict.fromkeys(("mean", "p50", "p95", "p99"))
    summary = Metrics().summary()
    assert summary["goodput"] is None
    assert summary["requests"] == 0
    one = Metrics()
    finished(0, 1.0, [3.0], one)
    assert one.summary()["tpot_ms"]["mean"] is None  # one token has no time per token after the first
    assert one.summary()["ttft_ms"]["p99"] == pytest.approx(2000.0)


def test_goodput_is_the_share_of_promises_that_were_kept_in_full() -> None:
    metrics = Metrics()
    on_time = [1.0, 1.1, 1.2, 1.6]  # 1 s to the first token, 0.2 s per token, longest gap 0.4 s
    finished(0, 0.0, on_time, metrics)
    assert metrics.summary()["goodput"] is None
    kept = [
        {"ttft_ms": 1000.0},
        {"tpot_ms": 201.0},
        {"itl_ms": 401.0},
        {"ttft_ms": 1001.0, "tpot_ms": 201.0, "itl_ms": 401.0},
    ]
    broken = [
        {"ttft_ms": 999.0},
        {"tpot_ms": 199.0},
        {"itl_ms": 399.0},
        {"ttft_ms": 1001.0, "tpot_ms": 201.0, "itl_ms": 399.0},
        {"ttft_ms": 1.0, "tpot_ms": 201.0},
    ]
    for number, targets in enumerate([*kept, *broken], 1):
        finished(number, 0.0, on_time, metrics, **targets)
    assert (metrics.promised, metrics.good) == (9, 4)
    assert metrics.summary()["goodput"] == pytest.approx(4 / 9)


def test_a_target_that_is_met_exactly_is_met() -> None:
    metrics = Metrics()
    for number, targets in enumerate(({"ttft_ms": 1000.0}, {"tpot_ms": 250.0}, {"itl_ms": 250.0})):
        finished(number, 0.0, [1.0, 1.25, 1.5], metrics, **targets)
    assert (metrics.promised, metrics.good) == (3, 3)


def test_what_is_trimmed_is_the_oldest() -> None:
    metrics = Metrics()
    for number in range(30):
        finished(number, 0.0, [float(number + 1), number + 1.25], metrics)
        metrics.trim(10)
        assert len(metrics.times("ttft")) <= 20
    assert list(metrics.times("ttft"))[-10:] == [float(number + 1) for number in range(20, 30)]
    assert metrics.summary()["requests"] == 30


def test_requests_that_were_ended_early_count_by_reason_and_not_in_times() -> None:
    metrics = Metrics()
    finished(0, 0.0, [1.0, 2.0], metrics)
    finished(1, 0.0, [], metrics, FinishReason.ABORT, itl_ms=5.0)
    finished(2, 0.0, [500.0, 900.0], metrics, FinishReason.ERROR)
    finished(3, 0.0, [1.0, 2.0], metrics, FinishReason.STOP)
    summary = metrics.summary()
    assert summary["finished"] == {"length": 1, "abort": 1, "error": 1, "stop": 1}
    assert summary["rct_ms"]["p99"] == pytest.approx(2000.0)
    assert metrics.tokens == 6


def test_exits_and_what_was_involuntary_are_counted_from_the_records() -> None:
    metrics, rule = Metrics(), ExitRule("max_prob", (0.5, 0.5))
    each = Request("r", (1, 2), SamplingParams(max_tokens=9), rule, 0, frozenset(), 3)
    yes, no = ([ExitCheck(k, c, 0.5) for k in range(2)] for c in (0.9, 0.1))
    rows = [
        (3, ()),  # a first token
        (1, (yes[0],)),
        (1, (no[0],)),  # pushed out
        (2, (no[0], yes[1])),
        (2, (yes[0], yes[1])),  # kept at the first exit
        (2, (no[0], no[1])),  # pushed out at the second
        (3, (yes[0], yes[1])),  # kept twice, one token
        (3, (no[0], no[1])),
    ]
    for depth, checks in rows:
        each.records.append(TokenRecord(5, -1.0, depth, 1.0, checks, ()))
        each.tokens.append(5)
    each.finish_reason, each.first_token_at = FinishReason.LENGTH, 1.0
    metrics.ended(each, each.finish_reason, 2.0)
    assert metrics.tokens == 8
    assert dict(metrics.exits) == {1: 2, 2: 3, 3: 3}
    assert (metrics.involuntary_exits, metrics.involuntary_stays) == (2, 2)
    assert dict(metrics.checks) == {0: 7, 1: 5}
    assert dict(metrics.reached) == {0: 3, 1: 3}
    assert sorted(metrics.exited_confidences) == [0.1, 0.1, 0.9, 0.9, 0.9]


def test_a_confidence_that_just_reaches_the_threshold_counts_as_reached_and_as_a_reason_to_exit() -> None:
    metrics = Metrics()
    each = Request("r", (1, 2), SamplingParams(max_tokens=9), ExitRule("max_prob", (0.5,)), 0, frozenset(), 2)
    for depth, checks in ((2, ()), (1, (ExitCheck(0, 0.5, 0.5),)), (2, (ExitCheck(0, 0.5, 0.5),))):
        each.take(TokenRecord(5, -1.0, depth, 1.0, checks, ()))
    metrics.ended(each, FinishReason.ABORT, 2.0)
    assert dict(metrics.reached) == {0: 2}
    assert (metrics.involuntary_exits, metrics.involuntary_stays) == (0, 1)


@pytest.mark.parametrize(
    ("rule", "run_ahead"),
    [
        (ExitRule("max_prob", (None, 0.5)), "off"),  # not among the layers that the request names
        (ExitRule("max_prob", (1.5, 0.5)), "off"),  # no confidence reaches it
        (ExitRule("max_prob", (0.5, 0.5)), "lossless"),
    ],
    ids=["not_allowed", "above_one", "lossless"],
)
def test_an_exit_that_the_request_does_not_allow_is_involuntary_however_sure_it_was(
    rule: ExitRule, run_ahead: str
) -> None:
    metrics = Metrics()
    each = Request("r", (1, 2), SamplingParams(max_tokens=9), rule, 0, frozenset(), 3, run_ahead=run_ahead)
    # The check is made from the same verdict, so that it claims that all is well; or there is none.
    for depth, checks in ((3, ()), (1, (ExitCheck(0, 1.0, 0.0),)), (1, ()), (3, ())):
        each.take(TokenRecord(5, -1.0, depth, 1.0, checks, ()))
    metrics.ended(each, FinishReason.ABORT, 2.0)
    assert metrics.involuntary_exits == 2


def test_a_first_token_that_exits_is_involuntary() -> None:
    metrics, rule = Metrics(), ExitRule("max_prob", (0.5,))
    each = Request("r", (1, 2), SamplingParams(max_tokens=9), rule, 0, frozenset(), 2)
    each.take(TokenRecord(5, -1.0, 1, 1.0, (ExitCheck(0, 1.0, 0.5),), ()))
    metrics.ended(each, FinishReason.ABORT, 2.0)
    assert metrics.involuntary_exits == 1


def test_exits_that_a_broken_scheduler_takes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is asked at every exit, and leaves there, whatever its request allows."""

    def everywhere(self: Decisions, segment: int, owners: Any, positions: Any) -> Any:
        return np.zeros(len(owners))

    monkeypatch.setattr(Decisions, "_thresholds", everywhere)
    engine = make_engine(virtual())
    made = [each for _, each in requests(draw_jobs(4, (2, 8), (5, 9)), rates=[-1.0])]
    assert all(each.rule.never for each in made)
    serve(engine, ((0.0, each) for each in made))
    assert engine.metrics.involuntary_exits == engine.metrics.tokens


def test_a_drawn_confidence_that_just_reaches_its_threshold_exits() -> None:
    class Exactly:
        def __call__(self, segment: int, asked: Evaluations) -> Said:
            return Said(asked.thresholds.copy(), np.ones(len(asked), dtype=np.bool_))

    engine = make_engine(virtual(exits=Exactly()))
    made = list(requests(draw_jobs(3, (2, 8), (5, 9))))
    serve(engine, made)
    assert all(record.depth == 1 for _, each in made for record in each.records[1:])
    assert engine.metrics.involuntary_exits == engine.metrics.involuntary_stays == 0


def test_what_metrics_say_of_a_run_is_what_was_emitted() -> None:
    executor = virtual()
    engine = make_engine(executor, max_num_seqs=3)
    made = {each.request_id: each for _, each in requests(draw_jobs(12, (2, 8), (1, 20)))}
    came: dict[str, list[float]] = {name: [] for name in made}

    def note(emitted: Any) -> None:
        name, chunk, _ = emitted
        came[name] += [executor.now()] * len(chunk.tokens)

    serve(engine, ((0.0, each) for each in made.values()), note)
    assert [len(times) for times in came.values()] == [each.max_tokens for each in made.values()]
    summary = engine.metrics.summary()
    gaps = [gap for times in came.values() for gap in np.diff(times)]
    assert summary["itl_ms"] == pytest.approx(quantiles(gaps))
    assert summary["ttft_ms"] == pytest.approx(quantiles([came[n][0] - made[n].arrived_at for n in made]))
    assert summary["rct_ms"] == pytest.approx(quantiles([came[n][-1] - made[n].arrived_at for n in made]))
    assert engine.stats.tokens == engine.metrics.tokens == sum(map(len, came.values()))
    assert engine.stats.passes == engine.scheduler.passes


def test_aborted_requests_and_the_most_slots_ever_held_are_counted() -> None:
    engine, most = make_engine(virtual()), 0
    made = [each for _, each in requests([Job(5, 12)] * 4)]
    for each in made:
        engine.add(each)
    while engine.busy:
        engine.step()
        most = max(most, engine.scheduler.pool.in_use)
        if made[1].num_output == 5 and engine.knows(made[1].request_id):
            engine.abort(made[1].request_id)
    assert dict(engine.metrics.finished) == {"length": 3, "abort": 1}
    assert engine.metrics.tokens == engine.stats.tokens == 3 * 12 + 5
    # All but the last token of each request are held when it ends, in the pass that ends it, at the latest.
    assert engine.scheduler.pool.in_use == 0
    assert most <= engine.stats.peak_slots <= 4 * (5 + 12) * 4
    assert engine.stats.peak_slots > 0


def test_history_has_every_pass_and_what_it_was_chosen_from() -> None:
    engine = make_engine(virtual((1, 2, 1)), (1, 2, 1))
    engine.history = []
    jobs = draw_jobs(12, (2, 8), (5, 20))
    serve(engine, requests(jobs, 3))
    history = engine.history
    assert sum(each.tokens for each in history) == engine.metrics.tokens - 12  # first tokens come from prompts
    assert {each.segment for each in history} == {0, 1, 2}
    assert history[0].prompts
    assert all(each.live[0] == 0 for each in history if each.live)
    for each in history:
        if each.live and each.segment and not each.prompts:
            assert each.load.evaluations == each.live[each.segment]
    assert sum(each.load.rows for each in history) == engine.stats.rows
    prompts = sum(each.prompt for each in jobs[:6])
    assert history[0].load == Load(rows=prompts, spans=6, entries=prompts, evaluations=0)
