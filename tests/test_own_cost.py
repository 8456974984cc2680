"""What the engine itself takes of a step is measured wherever a pass can be run, and is nothing elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from drex import LLM, EarlyExit
from drex.control.cost.profile import OwnCost
from drex.profiling.own_cost import measure_own_cost, requests_at_once


@pytest.fixture(scope="module")
def llm(models):
    exits = EarlyExit(layers=[2], thresholds=[0.5])
    return LLM(models["llama"], early_exit=exits, max_model_len=32, max_num_seqs=64, profile="nominal")


def measured(llm, **changes):
    config = replace(llm.config, **changes)
    return measure_own_cost(llm.engine.executor.runner, config, llm.model.exits, llm.profile)


@pytest.mark.parametrize("batched", [1, 3, 4, 8, 16, 64])
def test_any_size_of_pass_will_do(llm, batched):
    own = measured(llm, max_num_batched_tokens=batched)
    many = requests_at_once(replace(llm.config, max_num_batched_tokens=batched))
    assert many == min(16, batched // 4)
    assert (own.per_pass > 0) == (many > 0)
    assert own.per_request == 0 or many > 1


def test_where_requests_are_too_long_nothing_is_measured(llm):
    assert measured(llm, max_model_len=11) == OwnCost()


def test_passes_that_fail_tell_nothing(llm, monkeypatch):
    def fail(batch):
        raise MemoryError

    monkeypatch.setattr(llm.engine.executor.runner, "start", fail)
    assert measured(llm) == OwnCost()
