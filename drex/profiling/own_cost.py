"""Measures what the engine itself takes of a step: planning, taking in, bookkeeping."""

from __future__ import annotations

import statistics
import time

from drex.compute.segments import SegmentRunner
from drex.config import EngineConfig, ExitPlan
from drex.control.cost.model import CostModel
from drex.control.cost.profile import OwnCost, Profile
from drex.control.plan import Pass, PassResult
from drex.control.request import Request
from drex.engine.build import build_engine
from drex.engine.engine import Engine
from drex.engine.executor import Executor
from drex.engine.solving import InBackground
from drex.engine.torch_executor import TorchExecutor
from drex.sampling_params import SamplingParams

PROMPT, TOKENS = 4, 8
MANY = 16
"""Requests that tell what one more takes."""


class _Timed:
    """Passes everything on to an executor.

    Attributes:
        batch: the last pass; None if it failed.
        seconds: that the executor took for it.
    """

    def __init__(self, inner: Executor) -> None:
        self.inner, self.asynchronous = inner, inner.asynchronous
        self.batch: Pass | None = None
        self.seconds = 0.0

    def now(self) -> float:
        return self.inner.now()

    def wait_until(self, moment: float) -> None:
        self.inner.wait_until(moment)

    def submit(self, batch: Pass) -> None:
        started = time.perf_counter()
        self.inner.submit(batch)
        self.batch, self.seconds = batch, time.perf_counter() - started

    def collect(self) -> PassResult:
        started = time.perf_counter()
        result = self.inner.collect()
        self.seconds += time.perf_counter() - started
        if result.verdicts is None:
            self.batch = None
        return result

    def abandon(self) -> None:
        self.inner.abandon()


def measure_own_cost(runner: SegmentRunner, config: EngineConfig, exits: ExitPlan, profile: Profile) -> OwnCost:
    """Serve a few short requests. Where passes run beside the engine its time is hidden: nothing is measured there.

    Args:
        runner: of the model; its K/V is overwritten.
        config: of the engine, `kv_cache_tokens` resolved.
        exits: of the model.
        profile: of the passes.
    """
    executor, many = _Timed(TorchExecutor(runner)), requests_at_once(config)
    if executor.asynchronous or not many:
        return OwnCost()
    engine = build_engine(config, runner.layout, exits.kv_fill, CostModel(profile), executor, solving=InBackground())
    # Many first, which warms up.
    together, alone = (_seconds(engine, executor, exits, count) for count in (many, 1))
    if together is None or alone is None:
        return OwnCost()
    per_request = max(0.0, (together - alone) / (many - 1)) if many > 1 else 0.0
    return OwnCost(max(0.0, alone - per_request), per_request)


def requests_at_once(config: EngineConfig) -> int:
    """How many requests are served for it: as many as fit, whose rows fit into one pass; 0 where not even one does."""
    if config.max_model_len < PROMPT + TOKENS:
        return 0
    fit = config.kv_cache_tokens // (PROMPT + TOKENS), config.max_num_batched_tokens // PROMPT
    return min(MANY, config.max_num_seqs, *fit)


def _seconds(engine: Engine, executor: _Timed, exits: ExitPlan, count: int) -> float | None:
    """Of the engine in a step over one row of each of so many requests: the median. None if there was no such step."""
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    for number in range(count):
        engine.add(
            Request(
                request_id=f"{count}-{number}",
                prompt=tuple(range(PROMPT)),
                params=params,
                rule=exits.rule,
                seed=number,
                eos_token_ids=frozenset(),
                num_segments=engine.scheduler.segments,
                arrival=number,
            )
        )
    seconds = []
    while engine.busy:
        started = time.perf_counter()
        engine.step()
        whole, batch = time.perf_counter() - started, executor.batch
        if batch is not None and batch.spans == batch.rows == count:
            seconds.append(whole - executor.seconds)
    return statistics.median(seconds) if seconds else None
