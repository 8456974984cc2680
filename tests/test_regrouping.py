"""Guarantee 4: regrouping moves no tensor data. Rows lie in the arena where the pass before wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drex import LLM, EarlyExit, SamplingParams
from drex.control.plan import Pass, Rows


@pytest.mark.parametrize("fill", ["recompute", "project", "alias", "mask"])
def test_rows_wait_in_the_arena_untouched(models: dict[str, Path], fill: str) -> None:
    llm = LLM(
        models["llama"],
        early_exit=EarlyExit(layers=[2, 4], thresholds=0.35, kv_fill=fill),
        dtype="float64",
        device="cpu",
    )
    runner = llm.engine.executor.runner
    address = runner.arena.data_ptr()
    run = runner.start
    written: dict[tuple[int, int], torch.Tensor] = {}
    waited = 0

    def watched(batch: Pass) -> Any:
        nonlocal waited
        spans = llm.engine.scheduler.work(batch).spans

        def places(part: Rows, owners: np.ndarray) -> dict[tuple[int, int], int]:
            keys = zip(owners.tolist(), part.positions.tolist(), strict=True)
            return dict(zip(keys, part.arena.tolist(), strict=True))

        # A request keeps its seat to the end here, so that seat and position name a row.
        full = places(batch.full, np.repeat(spans, batch.sizes))
        fill = places(batch.fill, np.repeat(spans, batch.stops - batch.starts - batch.sizes)[: batch.fill.size])
        rows = full | fill
        if batch.segment:
            for key, row in rows.items():
                assert torch.equal(runner.arena[row], written[key]), "a waiting row has changed"
                waited += 1
        before = runner.arena.clone()
        result = run(batch)
        others = sorted(set(range(len(before))) - set(rows.values()))
        assert torch.equal(runner.arena[others].nan_to_num(), before[others].nan_to_num())
        for key, row in full.items():
            written[key] = runner.arena[row].clone()
        fills = list(fill.values())
        assert torch.equal(runner.arena[fills], before[fills]), "a fill row keeps its exit state"
        assert runner.arena.data_ptr() == address
        return result

    runner.start = watched  # type: ignore[method-assign]
    prompts = [[3, 4, 5], [6, 7, 8, 9], [10] * 7]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    stats = llm.exit_stats(outputs)
    assert waited > 0
    assert len(stats.exits) > 1
    assert stats.involuntary_exits == stats.involuntary_stays == 0
