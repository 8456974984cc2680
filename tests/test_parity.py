"""A model that never exits early is the plain model: tokens and log-probabilities are those of transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import COMMON, CONFIGS, make_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from drex import EarlyExit, SamplingParams
from drex.llm import LLM

ATOL = 1e-4
NEVER = EarlyExit(layers=[2, 4], thresholds=2.0)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=20, prompt_logprobs=20)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


def random_ids(count, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(2, COMMON["vocab_size"], (length + 3 * i,), generator=generator).tolist() for i in range(count)
    ]


def assert_same_top(token, expected):
    """The reported top list is that of the reference: numbers within ATOL, in order, and the right tokens."""
    values = torch.tensor([value for _, value in token.top_logprobs])
    torch.testing.assert_close(values, expected.topk(len(values)).values, atol=ATOL, rtol=0)
    torch.testing.assert_close(values, expected[[t for t, _ in token.top_logprobs]], atol=ATOL, rtol=0)


def assert_plain(output, folder, plain_logprobs):
    """An output of GREEDY is what transformers gives, token by token and number by number.

    Each token is compared with the argmax after the tokens before it: by induction, with transformers' greedy text.
    """
    prompt, tokens = output.prompt_token_ids, output.outputs[0].tokens
    expected = plain_logprobs(folder, [*prompt, *(token.id for token in tokens)])
    assert len(tokens) == GREEDY.max_tokens
    assert [token.id for token in tokens] == expected[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert output.prompt_logprobs[0] is None
    assert [token.id for token in output.prompt_logprobs[1:]] == list(prompt[1:])
    for token, row in zip([*output.prompt_logprobs[1:], *tokens], expected[:-1], strict=True):
        assert len(token.top_logprobs) == 20
        assert token.logprob == pytest.approx(float(row[token.id]), abs=ATOL)
        assert token.exit_layer == COMMON["num_hidden_layers"]
        assert_same_top(token, row)


def assert_parity(folder, plain_logprobs, **settings):
    """Serve a few prompts in chunks and side by side, and compare."""
    llm = LLM(folder, dtype="float32", **{"early_exit": NEVER, "max_num_batched_tokens": 5, **settings})
    for output in llm.generate(random_ids(3, 9), GREEDY):
        assert_plain(output, folder, plain_logprobs)


@pytest.mark.parametrize("policy", ["drex", "split", "full"])
@pytest.mark.parametrize("family", CONFIGS)
def test_never_exit_is_the_plain_model_under_chunking_and_preemption(models, plain_logprobs, family, policy):
    llm = LLM(
        models[family],
        early_exit=NEVER,
        dtype="float32",
        policy=policy,
        max_num_batched_tokens=4,
        max_num_seqs=4,
        kv_cache_tokens=45,
    )
    outputs = llm.generate(random_ids(6, 5), GREEDY)
    assert llm.engine.scheduler.admission.preemptions > 0
    for output in outputs:
        assert_plain(output, models[family], plain_logprobs)
    llm.engine.scheduler.check_integrity()
    assert llm.engine.scheduler.pool.in_use == 0


@pytest.mark.parametrize("budget", [1, 3, 512])
@pytest.mark.parametrize("kv_fill", ["recompute", "project", "alias", "mask"])
def test_never_exit_is_the_plain_model_under_every_fill_and_chunk_size(models, plain_logprobs, kv_fill, budget):
    exits = EarlyExit(layers=[1, 2, 5], thresholds=[1.5, 2.0, 9.0], kv_fill=kv_fill)
    assert_parity(models["llama"], plain_logprobs, early_exit=exits, max_num_batched_tokens=budget, kv_cache_tokens=40)


def test_requests_that_opt_out_are_the_plain_model_beside_requests_that_exit(models, plain_logprobs):
    llm = LLM(models["qwen3"], early_exit=EarlyExit(layers=[2, 4], thresholds=0.0), dtype="float32")
    opted_out = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, logprobs=20, prompt_logprobs=20, early_exit=EarlyExit.off()
    )
    outputs = llm.generate(random_ids(4, 6), [opted_out, GREEDY, opted_out, GREEDY])
    for output in outputs[::2]:
        assert_plain(output, models["qwen3"], plain_logprobs)
    for output in outputs[1::2]:
        assert [token.exit_layer for token in output.outputs[0].tokens[1:]] == [2] * 7


@pytest.mark.parametrize("family", CONFIGS)
def test_score_is_teacher_forcing_at_full_depth(models, plain_logprobs, family):
    llm = LLM(
        models[family], early_exit=EarlyExit(layers=[3], thresholds=0.0), dtype="float32", max_num_batched_tokens=5
    )
    sequences = random_ids(3, 12)
    for ids, scored in zip(sequences, llm.score(sequences), strict=True):
        expected = plain_logprobs(models[family], ids)[:-1]
        chosen = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scored.logprobs), chosen, atol=ATOL, rtol=0)
        assert scored.best == expected.argmax(-1).tolist()
        assert scored.loss == pytest.approx(-float(chosen.mean()), abs=ATOL)
        assert set(scored.exit_layers) == {6}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 77.0},
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3},
        {"rope_type": "yarn", "rope_theta": 500.0, **YARN},
        {"rope_type": "yarn", "rope_theta": 500.0, **YARN, "attention_factor": 0.7, "beta_fast": 8.0},
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn-attention-factor"],
)
def test_rotary_scalings(tmp_path, plain_logprobs, rope):
    folder = make_model(LlamaConfig(**COMMON, rope_parameters=rope), tmp_path / "scaled")
    assert_parity(folder, plain_logprobs)
    # The same weights without scaling are another model, or the comparison would show nothing.
    plain = make_model(LlamaConfig(**COMMON), tmp_path / "plain")
    ids = random_ids(1, 20)[0]
    assert (plain_logprobs(folder, ids) - plain_logprobs(plain, ids)).abs().max() > 0.1


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**COMMON, tie_word_embeddings=True),
        LlamaConfig(**COMMON, head_dim=6),
        LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
        LlamaConfig(**{**COMMON, "num_key_value_heads": 1}),
        LlamaConfig(**{**COMMON, "num_key_value_heads": None}),
        LlamaConfig(**COMMON, rms_norm_eps=0.1),
        MistralConfig(**COMMON, sliding_window=None, head_dim=16),
        MistralConfig(**COMMON, sliding_window=64),
        Qwen2Config(**COMMON, tie_word_embeddings=True),
        Qwen2Config(**COMMON, use_sliding_window=False, sliding_window=8),
        Qwen3Config(**COMMON, head_dim=24),
        Qwen3Config(**COMMON, attention_bias=True),
    ],
    ids=[
        "llama-tied",
        "llama-head-dim",
        "llama-biases",
        "llama-one-kv-head",
        "llama-no-grouping",
        "llama-eps",
        "mistral-head-dim",
        "mistral-wide-window",
        "qwen2-tied",
        "qwen2-window-not-used",
        "qwen3-untied",
        "qwen3-bias",
    ],
)
def test_variations_of_the_families(tmp_path, plain_logprobs, config):
    assert_parity(make_model(config, tmp_path), plain_logprobs)


def test_sharded_weights(tmp_path, plain_logprobs):
    folder = make_model(CONFIGS["qwen2"], tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_parity(folder, plain_logprobs)


@pytest.mark.parametrize(
    "scaling",
    [None, {"type": "linear", "factor": 4.0}, {"rope_type": "llama3", **LLAMA3}],
    ids=["none", "type", "llama3"],
)
def test_old_config_files(tmp_path, plain_logprobs, scaling):
    """`rope_theta`, `rope_scaling` and `torch_dtype` at the top level, as before transformers 5."""
    folder = make_model(CONFIGS["llama"], tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"], raw["dtype"]
    raw |= {"rope_theta": 123.0, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(raw))
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 123.0
    assert LLM(folder).model.decoder.spec.dtype == "bfloat16"
    assert_parity(folder, plain_logprobs)


def with_end_tokens(source, folder, in_generation_config, in_config=None):
    shutil.copytree(source, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "eos_token_id": in_config}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if in_generation_config is not ...:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation_config}))
    return folder


def test_end_tokens_come_from_generation_config(models, tmp_path):
    ids = random_ids(1, 7)[0]
    params = SamplingParams(temperature=0, max_tokens=12)
    [whole] = LLM(with_end_tokens(models["llama"], tmp_path / "none", ...)).generate(ids, params)
    greedy = whole.outputs[0].token_ids
    assert len(set(greedy)) > 6, "the checks below need greedy text without early repetition"
    first, second = greedy[3], greedy[5]
    cut = {name: greedy[: greedy.index(token) + 1] for name, token in (("first", first), ("second", second))}
    for name, in_generation, in_config, expected in (
        ("list", [second, first], 0, cut["first"]),
        ("other order", [96, second], first, cut["second"]),
        ("one", second, None, cut["second"]),
        ("config only", ..., [second, first], cut["first"]),
        ("null leaves it to config", None, second, cut["second"]),
    ):
        llm = LLM(with_end_tokens(models["llama"], tmp_path / name, in_generation, in_config))
        done = llm.generate(ids, params)[0].outputs[0]
        assert (done.token_ids, done.finish_reason, done.stop_reason) == (expected, "stop", None), name


@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_is_close(models, plain_logprobs, family):
    """Agreement in 16 bit is loose by nature: the same argmax mostly, and probabilities near those of float32."""
    llm = LLM(models[family], early_exit=NEVER, dtype="bfloat16", max_num_batched_tokens=7)
    sequences = random_ids(4, 30, seed=3)
    expected = [plain_logprobs(models[family], ids)[:-1] for ids in sequences]
    scored = llm.score(sequences)
    best = torch.tensor([best for one in scored for best in one.best])
    assert (best == torch.cat(expected).argmax(-1)).float().mean() > 0.8
    chosen = torch.cat(
        [e.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] for e, ids in zip(expected, sequences, strict=True)]
    )
    error = (torch.tensor([value for one in scored for value in one.logprobs]) - chosen).abs()
    assert error.isfinite().all()
    assert error.mean() < 0.2


def test_bfloat16_checkpoint_served_in_float32(tmp_path, plain_logprobs):
    folder = make_model(CONFIGS["llama"], tmp_path / "float32")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    assert_parity(tmp_path / "bfloat16", plain_logprobs)


def test_float64(models, plain_logprobs):
    llm = LLM(models["qwen2"], early_exit=NEVER, dtype="float64", max_num_batched_tokens=5)
    for output in llm.generate(random_ids(3, 6), GREEDY):
        assert_plain(output, models["qwen2"], plain_logprobs)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (MixtralConfig(), "mixtral"),
        (Qwen3MoeConfig(), "qwen3_moe"),
        (GPT2Config(), "gpt2"),
        (
            LlamaConfig(**COMMON, rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}),
            "dynamic",
        ),
        (LlamaConfig(**COMMON, hidden_act="gelu"), "gelu"),
    ],
    ids=["mixtral", "qwen3_moe", "gpt2", "dynamic-rope", "gelu"],
)
def test_unsupported_models_are_refused_by_name(tmp_path, config, name):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"'{name}' is not supported"):
        LLM(tmp_path)


def test_old_style_dynamic_rope_is_refused(tmp_path):
    LlamaConfig(**COMMON).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 500.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="'dynamic' is not supported"):
        LLM(tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    LlamaConfig(**COMMON).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**raw, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ValueError, match="quantised weights are not supported"):
        LLM(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**COMMON, sliding_window=16),
        Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=16, max_window_layers=2),
    ],
    ids=["mistral", "qwen2"],
)
def test_within_its_sliding_window_a_model_is_the_plain_one_and_it_is_never_served_beyond(
    tmp_path, plain_logprobs, config
):
    folder = make_model(config, tmp_path)
    with pytest.raises(ValueError, match=r"max_model_len is 17: .*sliding_window.*at most 16"):
        LLM(folder, max_model_len=17)
    for length in (None, 16):
        llm = LLM(folder, early_exit=NEVER, dtype="float32", max_model_len=length, max_num_batched_tokens=5)
        assert llm.config.max_model_len == 16
        for output in llm.generate(random_ids(1, 8) * 2, GREEDY):
            assert_plain(output, folder, plain_logprobs)


def test_max_model_len_beyond_the_checkpoint_is_refused(models):
    with pytest.raises(ValueError, match="max_model_len is 65: the checkpoint was made for at most 64"):
        LLM(models["llama"], max_model_len=65)
