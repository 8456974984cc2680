"""Engines start at once, from an estimate of what passes cost, and learn the rest while they serve."""

from __future__ import annotations

import dataclasses
import itertools
from itertools import islice, pairwise
from types import SimpleNamespace

import pytest
import torch

import drex.profiling.estimate
import drex.profiling.profile_cache
from drex import LLM, EarlyExit
from drex.comparison.simulate import Scenario
from drex.compute.linear import weight_bytes
from drex.config import EngineConfig
from drex.control.cost.model import CostModel
from drex.control.cost.profile import Curve, OwnCost, Profile
from drex.control.cost.roofline import DecoderSizes, Rates, roofline
from drex.control.memory.slots import SlotLayout
from drex.control.scheduler import Scheduler
from drex.engine.engine import Engine
from drex.profiling.estimate import (
    MANY_ROWS,
    MEASURED_BYTES,
    MULTIPLIED_BYTES,
    decoder_sizes,
    estimate,
    some_products,
)
from drex.profiling.profile_cache import MEASURE, MEASURED, obtain
from drex.profiling.profiler import Measured, Profiler, noise
from drex.sampling_params import SamplingParams
from drex.sim.executor import DrawnExits, VirtualExecutor
from drex.sim.workload import draw_jobs

LENGTHS = (4, 4, 4)
SIZES = DecoderSizes(hidden=256, layer_weights=2**20, head_weights=[2**20] * 3, kv_values=512, bytes_per_number=4.0)
START = Profile(roofline(Rates(1e10, 5e10, 0.0, 8e-5, 2e-5), SIZES, LENGTHS), own=OwnCost(1.4e-4, 1e-6))


@pytest.fixture
def llm(models, monkeypatch, tmp_path):
    """An engine whose profiles are kept in a folder of its own; threads are as they were, afterwards."""
    monkeypatch.setenv("DREX_CACHE", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    yield LLM(models["llama"], early_exit=EarlyExit(layers=[2, 4], thresholds=0.4), profile="nominal", max_num_seqs=4)
    torch.set_num_threads(threads)


def started(llm, asked=None, threads=None):
    return obtain(asked, llm.engine.executor.runner, llm.config, llm.model.exits, threads)


# What an engine starts from


def test_an_engine_that_starts_runs_no_pass(llm, monkeypatch):
    def refuse(*_):
        raise AssertionError("a pass was run")

    monkeypatch.setattr(llm.engine.executor.runner, "start", refuse)
    monkeypatch.setattr(llm.engine.executor.runner, "evaluate", refuse)
    found = started(llm)
    assert found.source == "estimated"
    assert len(found.segments) == 3
    assert found.threads == torch.get_num_threads()


def test_an_estimate_grows_with_rows_layers_and_the_vocabulary(models):
    llm = LLM(models["llama"], early_exit=EarlyExit(layers=[1], thresholds=0.4), profile="nominal", dtype="float32")
    found = estimate(llm.engine.executor.runner, 1)
    for cost in found.segments:
        for curve in (cost.rows, cost.head):
            assert all(0 < fewer <= more for fewer, more in pairwise(curve.seconds))
            assert curve.one(4096) > curve.one(1)
    short, long = (cost.rows.one(1) for cost in found.segments)
    assert long == pytest.approx(5 * short)
    layer = llm.model.decoder.layers[0]
    matrices = (layer.qkv, layer.out, layer.gate_up, layer.down)
    sizes = decoder_sizes(llm.engine.executor.runner)
    assert sizes.layer_weights * 4 == sum(weight_bytes(matrix) for matrix in matrices)
    assert sizes.head_weights == [97 * 32, 97 * 32]


def test_an_estimate_repeats_nothing_that_takes_long(llm, monkeypatch):
    """On a clock that ticks a second a look, each of three rates is measured once for every number of threads."""
    looks, products = itertools.count(), []
    monkeypatch.setattr("drex.profiling.estimate.time.perf_counter", lambda: float(next(looks)))
    counted = [lambda rows: products.append(len(rows))]
    monkeypatch.setattr("drex.profiling.estimate.some_products", lambda *_: counted)
    monkeypatch.setattr("drex.profiling.estimate.weight_bytes", lambda _: MEASURED_BYTES)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert estimate(llm.engine.executor.runner).source == "estimated"
    assert products == [1, MANY_ROWS] * 3


def test_the_rate_of_computing_is_measured_on_few_weights(llm, monkeypatch):
    monkeypatch.setattr("drex.profiling.estimate.weight_bytes", lambda _: MULTIPLIED_BYTES // 3)
    layers = llm.model.decoder.layers
    assert len(some_products(llm.model.decoder, MULTIPLIED_BYTES)) == 4
    assert len(some_products(llm.model.decoder, MEASURED_BYTES)) == 2 * len(layers)


def test_the_rates_of_a_gpu_are_those_of_a_copy_and_of_one_large_product(monkeypatch):
    """Both read off a clock that says a tenth of a second for each; no GPU is needed for the arithmetic."""
    monkeypatch.setattr(drex.profiling.estimate, "_median_seconds", lambda action, wait: 0.1)
    device = SimpleNamespace(
        decoder=SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16), synchronize=None
    )
    rates = drex.profiling.estimate._gpu_rates(device)
    assert rates.bandwidth == pytest.approx(2 * 2**27 / 0.1)
    assert rates.compute == pytest.approx(0.5 * 2 * 4096**3 / 0.1)


def test_threads_that_are_named_stay(llm):
    assert started(llm, threads=1).threads == torch.get_num_threads() == 1


def test_a_profile_that_was_kept_is_used(llm, monkeypatch):
    monkeypatch.setattr("drex.profiling.profiler.noise", lambda _: None)
    measured = started(llm, MEASURED)
    assert measured.source != "estimated"
    monkeypatch.setattr(Profiler, "measure", None)
    assert started(llm) == started(llm, MEASURED) == measured


def test_without_a_kept_profile_measured_measures_and_measure_does_so_again(llm, monkeypatch):
    calls, measure = [], Profiler.measure

    def counted(self):
        calls.append(1)
        return measure(self)

    monkeypatch.setattr(Profiler, "measure", counted)
    monkeypatch.setattr(drex.profiling.profile_cache, "measure_own_cost", lambda *_: OwnCost())
    monkeypatch.setattr("drex.profiling.profiler.noise", lambda _: None)
    for asked, count in ((None, 0), (MEASURED, 1), (MEASURED, 1), (None, 1), (MEASURE, 2)):
        started(llm, asked)
        assert len(calls) == count


# What is measured on a busy machine


def with_rows(*seconds):
    """The costs of one segment whose passes take these seconds over 1, 2, 4, … rows."""
    counts = tuple(float(2**k) for k in range(len(seconds)))
    return [dataclasses.replace(START.segments[0], rows=Curve(counts, seconds))]


def test_rounds_that_differ_are_noise():
    assert noise([with_rows(1.0, 2.0, 4.0), with_rows(1.1, 1.9, 4.4)]) is None
    assert "its rounds differ by 67% at the median" in noise([with_rows(1.0, 2.0, 4.0), with_rows(2.0, 4.0, 4.1)])


def test_more_rows_that_are_much_cheaper_are_noise():
    assert noise([with_rows(1.0, 2.0, 1.8, 4.0)] * 2) is None
    assert "at least 35% cheaper than others over fewer rows" in noise([with_rows(1.0, 2.0, 1.0, 4.0)] * 2)


def test_a_noisy_profile_is_used_but_not_kept_and_that_is_said(llm, monkeypatch, caplog):
    monkeypatch.setattr(Profiler, "measure", lambda self: Measured(START, "its rounds differ"))
    monkeypatch.setattr(drex.profiling.profile_cache, "measure_own_cost", lambda *_: OwnCost())
    assert started(llm, MEASURED).segments == START.segments
    assert "used now and not kept: its rounds differ; measure again on a quiet machine" in caplog.text
    assert started(llm).source == "estimated"


# Learning


def throughput(start, true, count, rate, mode):
    """Tokens a second in virtual time after pass 500, where passes take what `true` says and the engine starts from
    `start`."""
    scenario = Scenario(LENGTHS, true, (rate, rate), "recompute", SamplingParams(temperature=0.0, ignore_eos=True))
    config = EngineConfig(200, count, 512, count * 200, run_ahead=mode)
    scheduler = Scheduler(config, SlotLayout(LENGTHS), "recompute", CostModel(start))
    engine = Engine(scheduler, VirtualExecutor(CostModel(true), DrawnExits(0.8)))
    engine.history = []
    requests = (each for _, each in scenario.requests(draw_jobs(9999, (16, 48), (50, 150)), len(LENGTHS), mode))
    while len(engine.history) < 1500:
        for request in islice(requests, count - engine.unfinished):
            engine.add(request)
        engine.step()
    window = engine.history[500:]
    return sum(record.tokens for record in window) / sum(record.seconds for record in window)


def unlike(profile):
    """A machine that the estimate is wrong about: small passes and heads dearer, with steps where there are none."""

    def bent(curve, factors):
        pairs = zip(curve.counts, curve.seconds, strict=True)
        return Curve(curve.counts, tuple(seconds * factors[min(2, int(rows) // 8)] for rows, seconds in pairs))

    segments = [
        dataclasses.replace(
            cost, rows=bent(cost.rows, (1.6, 2.4, 1.3)), head=bent(cost.head, (4.8, 2.0, 2.0)), span=3 * cost.span
        )
        for cost in profile.segments
    ]
    return dataclasses.replace(profile, segments=tuple(segments))


@pytest.mark.parametrize(("count", "rate", "mode"), [(4, 0.6, "off"), (4, 0.6, "trusted"), (16, 0.8, "off")])
def test_after_500_passes_an_estimate_earns_what_a_profile_does(count, rate, mode):
    tuned, untuned = (throughput(start, unlike(START), count, rate, mode) for start in (unlike(START), START))
    assert untuned >= 0.97 * tuned
