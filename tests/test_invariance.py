"""Guarantee 2: what a request gets depends on nothing but itself. The engine against the plain reference.

Tokens and exit layers are equal, K/V contents too, under schedules that hypothesis chooses: arrivals, cancellations,
policies, chunk sizes, sampling, passes that overlap, and pools down to exactly one maximal request. Several threads'
calls and interruptions are drawn in test_shared_engine.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, CONFIGS, make_model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference import Reference, RefToken, Rule
from safetensors.torch import save_file

from drex import LLM, EarlyExit, SamplingParams
from drex.config.early_exit_json import EXIT_WEIGHTS_FILE, EarlyExitFile, ExitSpec, write_early_exit
from drex.control.cost.profile import Profile, nominal
from drex.control.request import Request
from drex.outputs import CompletionOutput

KV = list[list[tuple[torch.Tensor, torch.Tensor] | None]]
FILLS = ("recompute", "project", "alias", "mask")
CRITERIA = ("max_prob", "margin", "entropy", "state", "patience", "probe", "trace")
EXITS = ((2, 4), (1, 4), (3,))
# Where random models of this size have their confidences: about half of the checks exit.
TYPICAL = {"max_prob": 0.35, "margin": 0.15, "entropy": 0.3, "state": 0.85, "patience": 1.0, "probe": 0.5, "trace": 0.5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, ...], Path]:
    """The tiny Llama with exits at several places: the first `shared`, the others `norm`, each with a probe."""
    out = {}
    for exits in EXITS:
        folder = make_model(CONFIGS["llama"], tmp_path_factory.mktemp("model"))
        generator = torch.Generator().manual_seed(1)
        hidden = CONFIGS["llama"].hidden_size
        weights = {}
        for layer in exits:
            weights[f"exits.{layer}.probe.weight"] = torch.randn(2, hidden, generator=generator) * 0.3
            weights[f"exits.{layer}.probe.bias"] = torch.randn(2, generator=generator) * 0.1
            if layer != exits[0]:
                weights[f"exits.{layer}.norm.weight"] = 1 + 0.2 * torch.randn(hidden, generator=generator)
        (folder / EXIT_WEIGHTS_FILE).parent.mkdir()
        save_file(weights, folder / EXIT_WEIGHTS_FILE)
        specs = tuple(ExitSpec(e, "shared" if e == exits[0] else "norm", EXIT_WEIGHTS_FILE) for e in exits)
        write_early_exit(folder, EarlyExitFile(specs, "max_prob", (0.4,) * len(exits)))
        out[exits] = folder
    return out


@dataclass
class Ask:
    """One request of a schedule; `cancelled` is the step at which its user leaves, if he does."""

    prompt: list[int]
    params: SamplingParams
    thresholds: tuple[float | None, ...]
    arrival: int
    cancelled: int | None
    schedule: str


@dataclass
class Schedule:
    """A workload and the machine that it meets."""

    exits: tuple[int, ...]
    asks: list[Ask]
    policy: str
    chunk: int
    seqs: int
    spare_tokens: int
    fill_rows: int
    wait: int
    cost_factor: float
    slowdown: float | None
    max_draft: int
    overlapping: bool
    inspect_at: int = field(default=10**9)


@st.composite
def asks(draw: st.DrawFn, exits: tuple[int, ...], typical: float, modes: tuple[str | None, ...]) -> Ask:
    sampled = draw(st.booleans())
    penalised = draw(st.integers(0, 3)) == 0
    max_tokens = draw(st.integers(1, 10))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.3, 1.0, 1.7])) if sampled else 0.0,
        top_k=draw(st.sampled_from([0, 0, 5])) if sampled else 0,
        top_p=draw(st.sampled_from([1.0, 0.7])) if sampled else 1.0,
        min_p=draw(st.sampled_from([0.0, 0.05])) if sampled else 0.0,
        repetition_penalty=1.3 if penalised else 1.0,
        presence_penalty=draw(st.sampled_from([0.0, 0.8])) if penalised else 0.0,
        frequency_penalty=draw(st.sampled_from([0.0, 0.4])) if penalised else 0.0,
        logit_bias={5: 2.0, 1: -3.0} if penalised else None,
        seed=draw(st.integers(0, 2**62)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(3, max_tokens))),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=[7] if draw(st.integers(0, 4)) == 0 else None,
        priority=draw(st.integers(0, 1)),
        tpot_ms=draw(st.sampled_from([None, None, 0.01, 1e6])),
        run_ahead=draw(st.sampled_from(modes)),
    )
    level = st.sampled_from([typical, typical * 0.7, typical * 1.2, 0.0, 2.0, None])
    return Ask(
        prompt=draw(st.lists(st.integers(2, 96), min_size=1, max_size=8)),
        params=params,
        thresholds=tuple(draw(level) for _ in exits),
        arrival=draw(st.integers(0, 20)),
        cancelled=draw(st.one_of(st.none(), st.none(), st.integers(1, 40))),
        schedule=draw(st.sampled_from(["constant", "constant", "calm_paper", "calm_code"])),
    )


@st.composite
def schedules(draw: st.DrawFn, criterion: str, fill: str) -> Schedule:
    exits = draw(st.sampled_from(EXITS))
    modes = (None, "off", "trusted", *(("lossless",) if fill == "recompute" else ()))
    return Schedule(
        exits=exits,
        asks=draw(st.lists(asks(exits, TYPICAL[criterion], modes), min_size=1, max_size=5)),
        policy=draw(st.sampled_from(["drex", "drex", "split"])),
        chunk=draw(st.sampled_from([1, 2, 5, 64])),
        seqs=draw(st.integers(1, 5)),
        spare_tokens=draw(st.sampled_from([0, 0, 3, 20, 200])),
        fill_rows=draw(st.sampled_from([1, 3, 64])),
        wait=draw(st.sampled_from([3, 6, 30])),
        cost_factor=draw(st.sampled_from([0.01, 1.0, 100.0])),
        slowdown=draw(st.sampled_from([None, None, 1.0, 2.0])),
        max_draft=draw(st.sampled_from([1, 4, 9])),
        overlapping=draw(st.booleans()),
        inspect_at=draw(st.integers(3, 60)),
    )


def made_up_profile(schedule: Schedule) -> Profile:
    """Costs that have nothing to do with the machine, so that the rule flushes at odd moments."""
    bounds = [0, *schedule.exits, COMMON["num_hidden_layers"]]
    return nominal([stop - start for start, stop in pairwise(bounds)]).scaled(schedule.cost_factor)


def early_exit(ask: Ask, exits: tuple[int, ...], criterion: str) -> EarlyExit:
    allowed = [layer for layer, t in zip(exits, ask.thresholds, strict=True) if t is not None]
    if not allowed:
        return EarlyExit.off()
    thresholds = [t for t in ask.thresholds if t is not None]
    return EarlyExit(layers=allowed, thresholds=thresholds, criterion=criterion, schedule=ask.schedule, patience=2)


class Expected:
    """What the reference says of each request of a schedule, worked out once: tokens, and K/V by layer and position."""

    def __init__(self, reference: Reference, schedule: Schedule, criterion: str) -> None:
        self.reference, self.schedule, self.criterion = reference, schedule, criterion
        self._known: dict[int, tuple[list[RefToken], KV]] = {}

    def __getitem__(self, number: int) -> tuple[list[RefToken], KV]:
        if number not in self._known:
            ask, exits = self.schedule.asks[number], self.schedule.exits
            criterion = self.criterion if any(t is not None for t in ask.thresholds) else "max_prob"
            # Under the lossless mode, exits decide nothing.
            thresholds = [None] * len(exits) if ask.params.run_ahead == "lossless" else ask.thresholds
            rule = Rule(criterion, dict(zip(exits, thresholds, strict=True)), 2, ask.schedule)
            assert ask.params.seed is not None
            tokens = self.reference.generate(ask.prompt, ask.params, rule, ask.params.seed, 0)
            self._known[number] = tokens, self.reference.kv
        return self._known[number]


def run_schedule(llm: LLM, schedule: Schedule, criterion: str, wanted: Expected) -> dict[int, CompletionOutput]:
    """Play a schedule on the engine; returns finished samples by the number of their request."""
    number_of: dict[str, int] = {}
    done: dict[int, CompletionOutput] = {}
    step = 0
    while len(number_of) < len(schedule.asks) or llm.engine.busy:
        for number, ask in enumerate(schedule.asks):
            if ask.arrival == step:
                own_exits = early_exit(ask, schedule.exits, criterion)
                (request,) = llm.inputs.requests(ask.prompt, replace(ask.params, early_exit=own_exits))
                number_of[request.request_id] = number
                llm.engine.add(request)
        for request_id, number in number_of.items():
            if schedule.asks[number].cancelled == step:
                llm.engine.abort(request_id)
        for request_id, _, whole in llm.engine.step():
            if whole is not None:
                done[number_of[request_id]] = whole
        llm.engine.scheduler.check_integrity()
        if step == schedule.inspect_at:
            for request in llm.engine.scheduler.admission.running:
                check_kv(llm, request, wanted[number_of[request.request_id]][1])
        step += 1
        assert step < 5000, "the engine is stuck"
    return done


def check_kv(llm: LLM, request: Request, kv: KV) -> None:
    """The K/V that a running request holds is what the reference has at the same layers and positions."""
    scheduler, runner = llm.engine.scheduler, llm.engine.executor.runner
    runner.synchronize()
    seats = scheduler.seats
    first_layer = 0
    for segment, length in enumerate(scheduler.layout.lengths):
        cells, aliased = scheduler.pool.tables[segment].entries(request.seat)
        for offset in range(length):
            part, plane = divmod(offset, scheduler.layout.layers_per_cell)
            slots = np.where(aliased, cells[part], cells[part] + plane * scheduler.pool.num_cells)
            held = runner.pool.keys.flatten(0, 1)[torch.from_numpy(slots)]
            # What is tentative may be wrong, and a pass that is under way has entries that are not counted yet.
            certain = min(seats.reached[segment + 1, request.seat], seats.settled[request.seat])
            entries = kv[first_layer + offset][:certain]
            wanted = [entry[0] for entry in entries if entry is not None]
            tentative = seats.reached[0, request.seat] > seats.settled[request.seat]
            assert len(held) == len(wanted) or tentative or not seats.idle[request.seat]
            if wanted:
                torch.testing.assert_close(held[: len(wanted)], torch.stack(wanted), atol=1e-9, rtol=1e-9)
        first_layer += length


def check_sample(whole: CompletionOutput, wanted: list[RefToken], exits: tuple[int, ...]) -> None:
    assert whole.token_ids == [token.token for token in wanted]
    assert [token.exit_layer for token in whole.tokens] == [token.exit_layer for token in wanted]
    for got, want in zip(whole.tokens, wanted, strict=True):
        assert got.confidence == pytest.approx(want.confidence, abs=1e-9)
        assert got.logprob == pytest.approx(want.logprob, abs=1e-9)
        assert [exits[check.exit_index] for check in got.checks] == [check[0] for check in want.checks]
        for check, (_, confidence, threshold) in zip(got.checks, want.checks, strict=True):
            assert (check.confidence, check.threshold) == pytest.approx((confidence, threshold), abs=1e-9)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("fill", FILLS)
def test_engine_equals_reference_under_any_schedule(
    folders: dict[tuple[int, ...], Path], fill: str, criterion: str
) -> None:
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],
    )
    @given(schedules(criterion, fill))
    def check(schedule: Schedule) -> None:
        largest = max(len(ask.prompt) + ask.params.max_tokens - 1 for ask in schedule.asks)
        wanted = Expected(Reference(folders[schedule.exits], schedule.exits, fill), schedule, criterion)
        llm = LLM(
            folders[schedule.exits],
            early_exit=EarlyExit(kv_fill=fill),
            dtype="float64",
            policy=schedule.policy,
            max_num_batched_tokens=schedule.chunk,
            max_num_seqs=schedule.seqs,
            kv_cache_tokens=max(2, largest + schedule.spare_tokens),
            max_fill_rows=schedule.fill_rows,
            max_wait_passes=schedule.wait,
            max_slowdown=schedule.slowdown,
            max_draft=schedule.max_draft,
            profile=made_up_profile(schedule),
        )
        # As on a GPU: the next pass is planned before the last one is recorded.
        llm.engine.executor.asynchronous = schedule.overlapping
        done = run_schedule(llm, schedule, criterion, wanted)
        assert llm.engine.scheduler.pool.in_use == 0
        for number, ask in enumerate(schedule.asks):
            if number in done:
                check_sample(done[number], wanted[number][0], schedule.exits)
            else:
                assert ask.cancelled is not None

    check()
