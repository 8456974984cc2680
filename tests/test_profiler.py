"""What the profiler's made-up passes find: caches and memory as serving leaves them."""

from __future__ import annotations

import pytest
import torch

from drex import EarlyExit
from drex.assembly.runner import build_runner
from drex.compute.load import inspect_model, load_model
from drex.config import EngineConfig
from drex.profiling.profiler import Profiler

CONFIG = EngineConfig(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16, kv_cache_tokens=4 * 64)


@pytest.fixture
def profiler(models):
    exits = EarlyExit(layers=(2, 4), thresholds=(0.5, 0.5), kv_fill="project")
    model = load_model(inspect_model(models["llama"], exits, "float32", "cpu"))
    return Profiler(build_runner(model, CONFIG), CONFIG, model.exits.rule, model.exits.kv_fill)


def test_each_evaluation_of_a_head_comes_after_layers(profiler, monkeypatch):
    calls, runner = [], profiler.runner
    for name in ("run", "evaluate"):
        method = getattr(runner, name)
        monkeypatch.setattr(runner, name, lambda *args, name=name, method=method: calls.append(name) or method(*args))
    profiler.head_seconds(1, 3)
    assert len(calls) >= 6
    assert calls == ["run", "evaluate"] * (len(calls) // 2)


def test_passes_read_no_memory_that_was_never_written(profiler, monkeypatch):
    runner, read = profiler.runner, []
    runner.pool.memory.fill_(torch.nan)
    run = runner.run

    def check(batch):
        for part in batch.context.starts:
            for start, length in zip(part.tolist(), batch.context.lengths.tolist(), strict=True):
                read.append(bool(runner.pool.memory[:, :, start : start + length].isnan().any()))
        return run(batch)

    monkeypatch.setattr(runner, "run", check)
    profiler.measure()
    assert read
    assert not any(read)
