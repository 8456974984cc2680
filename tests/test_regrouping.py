"""Guarantee 4: regrouping moves no tensor data. Rows lie in the arena where the pass before wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drex import LLM, EarlyExit, SamplingParams
from drex.control.plan import Pass


@pytest.mark.parametrize("fill", ["recompute", "project", "alias", "mask"])
def test_rows_wait_in_the_arena_untouched(models: dict[str, Path], fill: str) -> None:
    llm = LLM(
        models["llama"],
        early_exit=EarlyExit(layers=[2, 4], thresholds=0.35, kv_fill=fill),
        dtype="float64",
        device="cpu",
    )
    runner = llm._runner
    address = runner.arena.data_ptr()
    run = runner.run
    written: dict[tuple[str, int], torch.Tensor] = {}
    waited = 0

    def watched(batch: Pass) -> Any:
        nonlocal waited
        rows = {
            (span.request_id, int(p)): int(row)
            for span in batch.spans
            for part in (span.full, span.fill)
            for p, row in zip(part.positions, part.arena, strict=True)
        }
        if batch.segment:
            for key, row in rows.items():
                assert torch.equal(runner.arena[row], written[key]), "a waiting row has changed"
                waited += 1
        before = runner.arena.clone()
        result = run(batch)
        others = sorted(set(range(len(before))) - set(rows.values()))
        assert torch.equal(runner.arena[others].nan_to_num(), before[others].nan_to_num())
        for span in batch.spans:
            for p, row in zip(span.full.positions, span.full.arena, strict=True):
                written[span.request_id, int(p)] = runner.arena[int(row)].clone()
            fills = list(span.fill.arena)
            assert torch.equal(runner.arena[fills], before[fills]), "a fill row keeps its exit state"
        assert runner.arena.data_ptr() == address
        return result

    runner.run = watched  # type: ignore[method-assign]
    prompts = [[3, 4, 5], [6, 7, 8, 9], [10] * 7]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    stats = llm.exit_stats(outputs)
    assert waited > 0
    assert len(stats.exits) > 1
    assert stats.involuntary_exits == stats.involuntary_stays == 0
