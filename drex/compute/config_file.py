"""`config.json` of a checkpoint: read, checked, and handed to transformers without any code of the folder's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from drex.text_files import read_text

FAMILIES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
"""Model types that drex runs. Taken from here, not from `AutoConfig`, which may ask to run what a folder brings."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
)
ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Of transformers, of compressed-tensors before it was there, of MLX."""
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Of AutoGPTQ, AutoAWQ and ModelOpt."""
PLAIN_DTYPES = "bfloat16, float16 or float32"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError naming the file if it is none."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}): fetch the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: fetch the model again")
    return content


def read_config(folder: Path) -> tuple[PretrainedConfig, dict[str, Any]]:
    """A checkpoint's configuration as transformers has it, and as the file has it.

    Raises:
        ValueError: no such file, a model that is not supported, by name, or a value that no model can have.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a model: it has no config.json; {_instead(folder)}")
    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported: drex runs {', '.join(FAMILIES)}")
    signs = [name for name in QUANTISED if raw.get(name)]
    signs += [name for name in QUANTISED_FILES if (folder / name).is_file()]
    if signs:
        raise ValueError(
            f"quantised weights are not supported ({signs[0]} in {folder}): use the checkpoint in {PLAIN_DTYPES}"
        )
    try:
        _check_sizes(raw)
        # The dtype is ours to read, and code of the folder's is never named to anything that might run it.
        kept = {name: value for name, value in raw.items() if name not in ("dtype", "torch_dtype", "auto_map")}
        config = _build(FAMILIES[model_type], kept)
        check_rope(getattr(config, "rope_parameters", None) or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config, raw


def _instead(folder: Path) -> str:
    """What a folder without config.json seems to be, and what to name instead."""
    names = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in names:
        return "it is an adapter: merge it into its base model (PEFT's merge_and_unload) and save that with its config"
    if any(name.endswith(".gguf") for name in names):
        return "it holds GGUF, which llama.cpp runs: name the checkpoint that it was made of, with safetensors weights"
    if "params.json" in names:
        return "it is in the format of Llama's or Mistral's authors: name the Hugging Face version of the model"
    return "name a Hugging Face model folder or hub id"


def _check_sizes(raw: Mapping[str, Any]) -> None:
    """Raise ValueError for a size that no model can have; null leaves a size to transformers."""
    for name in SIZES:
        value = raw.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} is {value!r}: it must be a whole number from 1 on")
    eps = raw.get("rms_norm_eps")
    if isinstance(eps, float) and not 0 <= eps < math.inf:
        raise ValueError(f"rms_norm_eps is {eps}: it must be a number from 0 on")
    if raw.get("per_layer_config"):
        raise ValueError("layers that differ from each other (per_layer_config) are not supported")
    for name in ("rope_parameters", "rope_scaling"):
        if raw.get(name) is not None:
            check_rope(raw[name])


def check_rope(rope: object) -> None:
    """Raise ValueError for rotary settings that drex does not have, or that hold what is no number."""
    if not isinstance(rope, dict):
        raise ValueError(f"rotary settings {rope!r}: they must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rotary scaling {kind!r} is not supported: drex has {', '.join(ROPE_TYPES)}")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rotary settings for each type of layer are not supported")
    for name in ("rope_theta", *(ROPE_NUMBERS if kind != "default" else ())):
        value = rope.get(name, 1.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"{name} of the rotary settings is {value!r}: it must be a number above 0")
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError("rotation of a part of each head (partial_rotary_factor) is not supported")


def _build(family: type[PretrainedConfig], raw: dict[str, Any]) -> PretrainedConfig:
    try:
        return family.from_dict(raw)
    except Exception as error:  # transformers raises anything at all for a value that it does not expect
        reason = error.__cause__ or error
        text = reason.args[0] if isinstance(reason, KeyError) and reason.args else reason
        said = " ".join(str(text).split())
        raise ValueError(
            f"transformers does not take it ({said[:300]}); correct it, or fetch the model again"
        ) from error
