"""A run on a real model can be played again: the same control code, its recorded times and results, the same passes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from drex import LLM, EarlyExit, SamplingParams
from drex.control.cost.model import CostModel
from drex.engine.build import build_engine
from drex.engine.driver import serve
from drex.engine.torch_executor import TorchExecutor
from drex.sim.executor import RecordedSolving, Recorder, Replay, ReplayedSolving


@pytest.mark.parametrize("run_ahead", ["off", "trusted", "lossless"])
def test_the_steps_of_a_real_run_are_reproduced(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, run_ahead: str
) -> None:
    # The machine's own clock, which other tests do without.
    monkeypatch.setattr(TorchExecutor, "now", lambda self: time.perf_counter())
    exits = EarlyExit(layers=[2, 4], thresholds=0.35)
    llm = LLM(models["llama"], early_exit=exits, dtype="float32", max_num_seqs=6, run_ahead=run_ahead, max_slowdown=3.0)
    params = [SamplingParams(seed=i, max_tokens=12 + i, tpot_ms=50.0 if i % 3 == 0 else None) for i in range(14)]

    def arrivals() -> list[tuple[float, Any]]:
        made = [llm.inputs.requests([3 + i, 5, 7 + i], each)[0] for i, each in enumerate(params)]
        for number, request in enumerate(made):
            request.request_id, request.arrival = f"{number}", number
        return [(0.002 * number, request) for number, request in enumerate(made)]

    outlook = llm.engine.scheduler.policy.rule.outlook
    outlook.solving = solving = RecordedSolving(outlook.solving)
    recorder = Recorder(llm.engine.executor)
    llm.engine.executor = recorder
    llm.engine.history = []
    real = arrivals()
    serve(llm.engine, real)

    again = build_engine(
        llm.config,
        llm.model.layout,
        llm.model.exits.kv_fill,
        CostModel(llm.profile),
        Replay(recorder),
        tokenizer=llm.tokenizer,
        solving=ReplayedSolving(solving),
    )
    again.history = []
    replayed = arrivals()
    serve(again, replayed)
    assert again.history == llm.engine.history
    assert len(again.history) > 30
    assert solving.passes
    for (_, one), (_, other) in zip(real, replayed, strict=True):
        assert one.records == other.records
