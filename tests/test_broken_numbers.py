"""Models whose numbers are NaN or infinite, for some tokens or heads: a request that meets them ends by saying so."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CONFIGS, make_model
from safetensors.torch import load_file, save_file

from drex import LLM, EarlyExit, SamplingParams

BROKEN = 50
"""The token whose embedding is no number."""
GOOD, BAD = [5, 9, 11], [40, BROKEN, 3]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def broken_model(folder, value, tensor="model.embed_tokens.weight", row=BROKEN):
    make_model(CONFIGS["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    weights[tensor][row] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def made(folder, **settings):
    exits = EarlyExit(layers=[2, 4], thresholds=0.4)
    return LLM(folder, **{"early_exit": exits, "dtype": "float32", **settings})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "asked",
    [
        GREEDY,
        SamplingParams(temperature=0.8, seed=1, max_tokens=6, logprobs=2),
        SamplingParams(top_p=0.5, max_tokens=6),
    ],
    ids=["greedy", "logprobs", "top_p"],
)
def test_a_request_that_meets_a_broken_weight_ends_with_an_error_and_alone(tmp_path, value, asked):
    llm = made(broken_model(tmp_path, value))
    expected = llm.generate([GOOD], GREEDY)[0].outputs[0]
    bad, good = (output.outputs[0] for output in llm.generate([BAD, GOOD], [asked, GREEDY]))
    assert (bad.finish_reason, bad.tokens) == ("error", ())
    assert "the logits after layer 6 are NaN or infinite" in bad.error
    assert good.token_ids == expected.token_ids
    assert not llm.engine.busy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_reductions_of_a_gpu_say_so_too(value):
    """In Triton's interpreter where there is no GPU. Single tokens that are ruled out do not make a row broken."""
    pytest.importorskip("triton")
    from drex.compute.kernels.check import FusedReductions

    logits = torch.randn(3, 300)
    logits[1] = value
    logits[2, 7] = -torch.inf
    reductions = FusedReductions()
    columns = reductions.summarise(reductions.prepare(logits), ())
    assert torch.isfinite(columns["log_sum_exp"]).tolist() == [True, False, True]


@pytest.mark.parametrize("run_ahead", ["off", "trusted", "lossless"])
def test_an_exit_head_that_is_broken_ends_the_requests_that_ask_it(tmp_path, run_ahead):
    """The text up to there is given; requests that may not exit are not touched."""
    folder = make_model(CONFIGS["llama"], tmp_path)
    (folder / "early_exit").mkdir()
    norm = torch.full((CONFIGS["llama"].hidden_size,), torch.nan)
    save_file({"exits.2.norm.weight": norm}, folder / "early_exit/heads.safetensors")
    exit_ = {"layer": 2, "head": "norm", "weights": "early_exit/heads.safetensors"}
    facts = {"version": 1, "exits": [exit_], "criterion": "max_prob", "thresholds": [0.4]}
    (folder / "early_exit.json").write_text(json.dumps(facts))
    llm = LLM(folder, dtype="float32", run_ahead=run_ahead)
    off = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, early_exit=EarlyExit.off())
    asked, not_asked = (output.outputs[0] for output in llm.generate([GOOD, GOOD], [GREEDY, off]))
    assert asked.finish_reason == "error"
    assert "the logits after layer 2 are NaN or infinite" in asked.error
    # The first token is never asked at an exit.
    assert asked.token_ids == not_asked.token_ids[:1]
    assert not_asked.finish_reason == "length"


def test_scored_texts_say_so_too(tmp_path):
    llm = made(broken_model(tmp_path, float("nan")))
    with pytest.raises(RuntimeError, match="scoring failed: the logits after layer 6 are NaN or infinite"):
        llm.score([5, BROKEN, 7, 8])
    assert len(llm.score([5, 6, 7, 8])[0].logprobs) == 3


def test_numbers_that_float16_can_not_hold_are_named_with_the_remedy(tmp_path):
    llm = made(broken_model(tmp_path, 1e6), dtype="float16")
    [output] = llm.generate([BAD], GREEDY)
    assert output.outputs[0].finish_reason == "error"
    assert "try bfloat16 or float32" in output.outputs[0].error


def test_a_request_with_a_deadline_ends_so_too(tmp_path):
    llm = made(broken_model(tmp_path, float("nan")))
    params = SamplingParams(temperature=0, max_tokens=6, tpot_ms=1e-3, itl_ms=1e-3, ttft_ms=1e-3, ignore_eos=True)
    reasons = [output.outputs[0].finish_reason for output in llm.generate([BAD, GOOD], params)]
    assert reasons == ["error", "length"]
