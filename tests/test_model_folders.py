"""Model folders as they are found: what is refused, in one line with a remedy, and what is read all the same."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMMON, CONFIGS, make_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config

from drex import EarlyExit, SamplingParams
from drex.compute.load import inspect_model
from drex.llm import LLM

WEIGHTS, CONFIG = "model.safetensors", "config.json"
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
ROPE = {"rope_theta": 500.0}
Change = Callable[[Path], object]


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """A ValueError of one line, which has all of `words` in it."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are checked below)
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert 10 < len(message) < 500
    for word in words:
        assert word in message


def config(*, drop: tuple[str, ...] = (), **changes: Any) -> Change:
    """A change of a folder's config.json: fields set, and fields left out."""

    def change(folder: Path) -> None:
        raw = {**json.loads((folder / CONFIG).read_text()), **changes}
        (folder / CONFIG).write_text(json.dumps({name: raw[name] for name in raw if name not in drop}))

    return change


def weights(edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    """A change of a folder's tensors."""

    def change(folder: Path) -> None:
        save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return change


def added(name: str, tensor: Tensor) -> Change:
    return weights(lambda tensors: {**tensors, name: tensor})


def renamed(rename: Callable[[str], str]) -> Change:
    return weights(lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})


def cast(part: str, dtype: torch.dtype) -> Change:
    """A change that stores the tensors with `part` in their name as another type."""
    return weights(lambda tensors: {n: t.to(dtype) if part in n else t for n, t in tensors.items()})


def moved(name: str, *, files: tuple[str, ...] = (), has_config: bool = True) -> Change:
    """A change that gives the weights another file name, and adds empty JSON files."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / name)
        for file in files:
            (folder / file).write_text("{}")
        if not has_config:
            (folder / CONFIG).unlink()

    return change


def at(factor: object, kind: str = "linear", **more: object) -> Change:
    return config(rope_parameters={"rope_type": kind, **ROPE, "factor": factor, **more})


def default_rope(theta: object) -> Change:
    return config(rope_parameters={"rope_type": "default", "rope_theta": theta})


CONFIG_VALUES: dict[str, tuple[Change, list[str]]] = {
    "dtype auto": (config(dtype="auto"), ["names dtype 'auto'", "--dtype", "bfloat16"]),
    "old dtype auto": (config(drop=("dtype",), torch_dtype="auto"), ["names dtype 'auto'", "--dtype"]),
    "dtype without kernels": (config(dtype="float8_e4m3fn"), ["'float8_e4m3fn'", "--dtype"]),
    "dtype of whole numbers": (config(dtype="int8"), ["'int8'", "--dtype"]),
    "dtype that is none": (config(dtype="nn"), ["'nn'", "--dtype"]),
    "dtype of another type": (config(dtype=5), ["'5'", "--dtype"]),
    "size as text": (config(hidden_size="32"), [CONFIG, "hidden_size is '32'", "from 1 on"]),
    "size as fraction": (config(num_hidden_layers=6.0), ["num_hidden_layers is 6.0", "from 1 on"]),
    "no layers": (config(num_hidden_layers=0), ["num_hidden_layers is 0", "from 1 on"]),
    "fewer than no layers": (config(num_hidden_layers=-1), ["num_hidden_layers is -1", "from 1 on"]),
    "null layers": (config(num_hidden_layers=None), [CONFIG, "num_hidden_layers", "NoneType", "correct it"]),
    "no heads": (config(num_attention_heads=0), ["num_attention_heads is 0", "from 1 on"]),
    "no K/V heads": (config(num_key_value_heads=0), ["num_key_value_heads is 0", "from 1 on"]),
    "K/V heads that don't divide": (config(num_key_value_heads=3), ["4 attention heads", "3 for K/V"]),
    "heads that don't divide": (
        config(num_attention_heads=5),
        ["multiple of the number of attention heads", "correct"],
    ),
    "odd head": (config(head_dim=15), [CONFIG, "even", "correct it"]),
    "no context": (config(max_position_embeddings=0), ["max_position_embeddings is 0", "from 1 on"]),
    "no window": (config(sliding_window=0), ["sliding_window is 0", "from 1 on"]),
    "null epsilon": (config(rms_norm_eps=None), ["rms_norm_eps", "NoneType", "correct it"]),
    "epsilon NaN": (config(rms_norm_eps=float("nan")), ["rms_norm_eps is nan", "from 0 on"]),
    "tie as text": (config(tie_word_embeddings="yes"), ["tie_word_embeddings", "correct it"]),
    "activation of another type": (config(hidden_act=None), ["hidden_act", "correct it"]),
    "labels of another type": (config(id2label=5), [CONFIG, "correct it"]),
    "type of another type": (config(model_type=["llama"]), ["model type ['llama']", "drex runs llama"]),
    "layers of several sizes": (config(per_layer_config={"0": {"intermediate_size": 3}}), ["per_layer_config"]),
    "null theta": (default_rope(None), ["rope_theta", "None", "above 0"]),
    "old null theta": (config(drop=("rope_parameters",), rope_theta=None), ["rope_theta", "None", "above 0"]),
    "theta as text": (default_rope("10000"), ["rope_theta", "'10000'", "above 0"]),
    "theta of nothing": (default_rope(0), ["rope_theta", "above 0"]),
    "null rope type": (config(rope_parameters={"rope_type": None, **ROPE}), ["rotary scaling None", "default, linear"]),
    "rope as text": (config(rope_scaling="linear"), ["rotary settings 'linear'", "an object"]),
    "rope for each type of layer": (
        config(rope_parameters={"full_attention": {"rope_type": "default", **ROPE}}),
        ["each type of layer", "not supported"],
    ),
    "rope on a part of the head": (config(partial_rotary_factor=0.5), ["partial_rotary_factor", "not supported"]),
    "linear without factor": (
        config(rope_parameters={"rope_type": "linear", **ROPE}),
        ["Missing", "factor", "correct"],
    ),
    "yarn without factor": (config(rope_parameters={"rope_type": "yarn", **ROPE}), ["Missing", "factor", "correct"]),
    "llama3 without factors": (at(8.0, "llama3"), ["Missing", "low_freq_factor", "high_freq_factor", "correct"]),
    "null factor": (at(None), ["factor", "None", "above 0"]),
    "llama3 with a null factor": (
        at(8.0, "llama3", low_freq_factor=None, high_freq_factor=4.0),
        ["low_freq_factor", "None", "above 0"],
    ),
    "end token as text": (config(eos_token_id="</s>"), ["eos_token_id", "correct it"]),
    "end token as text of the other file": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        ["generation_config.json", "eos_token_id is '</s>'", "token id"],
    ),
    "nested end tokens": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [[1]]}'),
        ["generation_config.json", "eos_token_id is [[1]]", "token id"],
    ),
}
QUANTISED: dict[str, tuple[Change, list[str]]] = {
    "float8": (cast("proj", torch.float8_e4m3fn), ["F8_E4M3", "bfloat16, float16 or float32"]),
    "int8": (cast("proj", torch.int8), ["I8", "bfloat16, float16 or float32"]),
    "an int8 head": (cast("lm_head", torch.int8), ["lm_head.weight (I8)"]),
    "packed": (cast("down_proj", torch.uint8), ["down_proj.weight (U8)"]),
    "a scale left over": (added("model.layers.0.mlp.up_proj.weight_scale", torch.ones(1)), ["up_proj.weight_scale"]),
    "an inverse scale left over": (
        added("model.layers.5.self_attn.q_proj.weight_scale_inv", torch.ones(1)),
        ["q_proj.weight_scale_inv"],
    ),
    "GPTQ's names": (renamed(lambda name: name.replace("proj.weight", "proj.qweight")), ["proj.qweight"]),
    "compression_config": (config(compression_config={"format": "pack-quantized"}), ["compression_config"]),
    "quantization_config": (config(quantization_config={"quant_method": "fp8"}), ["quantization_config"]),
    "MLX's field": (config(quantization={"bits": 4}), ["quantization"]),
    "AutoGPTQ's file": (lambda folder: (folder / "quantize_config.json").write_text("{}"), ["quantize_config.json"]),
}
NAMES: dict[str, tuple[Change, list[str]]] = {
    "inside a larger model": (
        renamed(lambda name: f"language_model.{name}"),
        ["have language_model.model.layers.0", "save_pretrained"],
    ),
    "compiled": (renamed(lambda name: f"_orig_mod.{name}"), ["have _orig_mod.model.layers.0", "save_pretrained"]),
    "without the outer name": (
        renamed(lambda name: name.removeprefix("model.")),
        ["they have layers.0", "save_pretrained"],
    ),
    "no head": (
        weights(lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"}),
        ["no lm_head.weight", "without a head", "tie_word_embeddings"],
    ),
    "another head": (
        renamed(lambda name: name.replace("lm_head", "score")),
        ["no lm_head.weight", "without a head", "ForCausalLM"],
    ),
    "an adapter not merged": (
        added("model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(2, 2)),
        ["lora_A", "merge it"],
    ),
    "pickled": (moved("pytorch_model.bin"), ["pytorch_model.bin", "pickled", "convert them"]),
    "pickled shards": (moved("pytorch_model-00001-of-00002.bin"), ["pickled", "convert them"]),
    "GGUF": (moved("model-Q4_K_M.gguf"), ["model-Q4_K_M.gguf", "llama.cpp"]),
    "GGUF alone": (moved("x.gguf", has_config=False), ["no config.json", "GGUF", "llama.cpp"]),
    "consolidated": (moved("consolidated.safetensors"), ["consolidated.safetensors", "Hugging Face version"]),
    "consolidated pickle": (moved("consolidated.00.pth"), ["consolidated.00.pth", "Hugging Face version"]),
    "consolidated alone": (
        moved("consolidated.safetensors", files=("params.json",), has_config=False),
        ["no config.json", "Hugging Face version"],
    ),
    "adapter": (moved("adapter_model.safetensors"), ["an adapter's", "merge it"]),
    "adapter alone": (
        moved("adapter_model.safetensors", files=("adapter_config.json",), has_config=False),
        ["no config.json", "an adapter", "merge it"],
    ),
    "another name": (moved("weights.safetensors"), ["weights.safetensors", "call the file model.safetensors"]),
    "another framework": (moved("tf_model.h5"), ["tf_model.h5", "another framework"]),
}
CASES = {**CONFIG_VALUES, **QUANTISED, **NAMES}


@pytest.mark.parametrize("case", CASES)
def test_what_can_not_be_run_is_refused_in_one_line(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    change, words = CASES[case]
    change(folder)
    with refused(*words):
        LLM(folder)


@pytest.mark.parametrize("case", ["float8", "GPTQ's names", "pickled", "quantization_config"])
def test_drex_info_refuses_what_the_engine_refuses(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    from drex.cli.info import describe

    folder = shutil.copytree(models["llama"], tmp_path / "model")
    change, words = CASES[case]
    change(folder)
    with refused(*words):
        describe(inspect_model(folder, None, "float32", "cpu"))


HARMLESS: dict[str, Change] = {
    "null quantisation": config(quantization_config=None, rope_scaling=None),
    "code of its own": config(auto_map={"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "model.Model"}),
    "a dtype with its module": config(dtype="torch.float32"),
    "rotary frequencies": added("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8)),
    "scales of a quantised cache": added("model.layers.0.self_attn.k_scale", torch.ones(1)),
    "whole numbers as theta": default_rope(500),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_changes_nothing_is_accepted(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    HARMLESS[case](folder)
    tokens, expected = (
        LLM(each, dtype="float64").generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
        for each in (folder, models["llama"])
    )
    assert tokens == expected


@pytest.mark.parametrize("dtype", ["auto", "float8_e4m3fn"])
def test_a_dtype_that_is_asked_for_replaces_one_that_can_not_be_had(
    models: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    config(dtype=dtype)(folder)
    assert LLM(folder, dtype="float32").generate([5, 6], GREEDY)[0].outputs[0].token_ids


def test_tensors_that_are_not_used_are_named(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    added("model.layers.0.self_attn.q_proj.bias", torch.ones(64))(folder)
    LLM(folder, dtype="float32")
    assert "1 tensors of the weights were not used, such as model.layers.0.self_attn.q_proj.bias" in caplog.text


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
@pytest.mark.parametrize("stored", ["another head", "the same head", "only the head"])
def test_a_tied_head_in_the_weights_is_read_as_transformers_reads_it(
    models: dict[str, Path],
    tmp_path: Path,
    plain_logprobs: Callable[..., Tensor],
    caplog: pytest.LogCaptureFixture,
    family: str,
    stored: str,
) -> None:
    folder = shutil.copytree(models[family], tmp_path / f"{family}-{stored.replace(' ', '-')}")
    assert json.loads((folder / CONFIG).read_text())["tie_word_embeddings"]
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    other = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(3))
    if stored == "only the head":
        renamed(lambda name: name.replace("model.embed_tokens", "lm_head"))(folder)
    else:
        added("lm_head.weight", other if stored == "another head" else embedding.clone())(folder)
    llm = LLM(folder, dtype="float32")
    tokens = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].tokens
    expected = plain_logprobs(folder, [5, 6, 7, *(token.id for token in tokens)])[2:-1]
    assert [token.id for token in tokens] == expected.argmax(-1).tolist()
    assert [token.logprob for token in tokens] == pytest.approx(expected.amax(-1).tolist(), abs=1e-4)
    assert ("another head" in caplog.text) == (stored == "another head")


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(LlamaConfig(**{**COMMON, "num_hidden_layers": 1}), tmp_path_factory.mktemp("one_layer"))


def test_a_model_of_one_layer_runs_and_has_no_exits(one_layer: Path) -> None:
    assert len(LLM(one_layer, dtype="float32").generate([5, 6], GREEDY)[0].outputs[0].tokens) == 4
    for asked in (EarlyExit(layers=[1], thresholds=0.5), EarlyExit(thresholds=0.5)):
        with refused("one layer", "can't exit early"):
            LLM(one_layer, early_exit=asked)


def test_layers_that_all_attend_to_everything_have_no_window(tmp_path: Path) -> None:
    """Qwen2 names a window for the layers from `max_window_layers` on, which may be none."""
    window = {"sliding_window": 16, "use_sliding_window": True}
    for layers, expected in ((COMMON["num_hidden_layers"], None), (2, 16)):
        Qwen2Config(**COMMON, **window, max_window_layers=layers).save_pretrained(tmp_path / f"{layers}")
        assert inspect_model(tmp_path / f"{layers}", None, "float32", "cpu").spec.sliding_window == expected
    assert CONFIGS["qwen2"].sliding_window is None
