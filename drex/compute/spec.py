"""ModelSpec: one frozen description of a decoder of the Llama family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

SUPPORTED = {"llama": False, "mistral": False, "qwen2": True, "qwen3": False}
"""Model types, and whether their q, k and v projections always have a bias."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError naming the file if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}): fetch the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: fetch the model again")
    return content


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and variations of a decoder.

    Attributes:
        config: of transformers, for what it computes itself (rotary frequencies).
        max_length: positions the checkpoint was made for.
        sliding_window: tokens a layer may look back, or None.
    """

    config: PretrainedConfig
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_length: int
    sliding_window: int | None
    dtype: str
    eos_token_ids: frozenset[int]

    @classmethod
    def from_folder(cls, folder: Path) -> ModelSpec:
        """Read `config.json` (and the end tokens of `generation_config.json`).

        Raises:
            ValueError: no such model, or one that is not supported, by name.
        """
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is not a model: it has no config.json; name a Hugging Face model folder or hub id"
            )
        raw = read_json(folder / "config.json")
        model_type = raw.get("model_type")
        if model_type not in SUPPORTED:
            raise ValueError(f"model type {model_type!r} is not supported: drex runs {', '.join(SUPPORTED)}")
        if raw.get("quantization_config"):
            raise ValueError("quantised weights are not supported: use the checkpoint in bfloat16, float16 or float32")
        return cls.from_hf(AutoConfig.from_pretrained(folder), _end_tokens(folder, raw))

    @classmethod
    def from_hf(cls, config: PretrainedConfig, eos_token_ids: frozenset[int]) -> ModelSpec:
        """From a transformers config of one of the supported types."""
        rope = getattr(config, "rope_parameters", None) or {}
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rotary scaling {rope_type!r} is not supported: drex has {', '.join(ROPE_TYPES)}")
        if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"activation {config.hidden_act!r} is not supported: drex runs gated SiLU decoders")
        window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            window = None
        heads = config.num_attention_heads
        bias = bool(getattr(config, "attention_bias", False))
        dtype = getattr(config, "dtype", None)
        return cls(
            config=config,
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            eps=config.rms_norm_eps,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=SUPPORTED[config.model_type] or bias,
            out_bias=bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=config.model_type == "qwen3",
            max_length=config.max_position_embeddings,
            sliding_window=window,
            dtype=str(dtype or "float32").removeprefix("torch."),
            eos_token_ids=frozenset(token for token in eos_token_ids if 0 <= token < config.vocab_size),
        )

    @property
    def kv_values_per_slot(self) -> int:
        """Numbers that the K and V of one token at one layer hold."""
        return 2 * self.num_kv_heads * self.head_dim


def _end_tokens(folder: Path, raw: dict[str, Any]) -> frozenset[int]:
    """EOS ids: `generation_config.json` has the last word, since it may list several."""
    path = folder / "generation_config.json"
    recommended = end_tokens(read_json(path)) if path.is_file() else frozenset()
    return recommended or end_tokens(raw)


def end_tokens(content: Mapping[str, Any]) -> frozenset[int]:
    """The EOS ids that a config names, in one number or a list; empty where it names none."""
    ids = content.get("eos_token_id")
    if ids is None:
        return frozenset()
    return frozenset(ids) if isinstance(ids, list) else frozenset([ids])
