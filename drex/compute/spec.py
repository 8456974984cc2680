"""ModelSpec: one frozen description of a decoder of the Llama family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from drex.compute.config_file import check_rope, read_config, read_json

BIASED = ("qwen2",)
"""Model types whose q, k and v projections always have a bias."""


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and variations of a decoder.

    Attributes:
        config: of transformers, for what it computes itself (rotary frequencies).
        max_length: positions the checkpoint was made for.
        sliding_window: tokens a layer may look back, or None.
        dtype: that the checkpoint names, whether or not drex computes in it.
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
        config, raw = read_config(folder)
        dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
        return cls.from_hf(config, _end_tokens(folder, raw), dtype)

    @classmethod
    def from_hf(cls, config: PretrainedConfig, eos_token_ids: frozenset[int], dtype: str = "float32") -> ModelSpec:
        """From a transformers config of one of the supported types; `dtype` is what the checkpoint names.

        Raises:
            ValueError: a variation that drex does not have.
        """
        check_rope(getattr(config, "rope_parameters", None) or {})
        if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"activation {config.hidden_act!r} is not supported: drex runs gated SiLU decoders")
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if heads % kv_heads:
            raise ValueError(f"{heads} attention heads can't share {kv_heads} for K/V: config.json is damaged")
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            config=config,
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            eps=config.rms_norm_eps,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=config.model_type in BIASED or bias,
            out_bias=bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=config.model_type == "qwen3",
            max_length=config.max_position_embeddings,
            sliding_window=_window(config),
            dtype=dtype,
            eos_token_ids=frozenset(token for token in eos_token_ids if 0 <= token < config.vocab_size),
        )

    @property
    def longest_request(self) -> int:
        """Tokens that a request may have: what the checkpoint was made for, within its sliding window."""
        return self.max_length if self.sliding_window is None else min(self.max_length, self.sliding_window)

    @property
    def kv_values_per_slot(self) -> int:
        """Numbers that the K and V of one token at one layer hold."""
        return 2 * self.num_kv_heads * self.head_dim


def _window(config: PretrainedConfig) -> int | None:
    """Tokens that the layers with a sliding window look back, or None where no layer has one."""
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    unused = not getattr(config, "use_sliding_window", True) or (types and "sliding_attention" not in types)
    return None if unused else window


def _end_tokens(folder: Path, raw: dict[str, Any]) -> frozenset[int]:
    """EOS ids: `generation_config.json` has the last word, since it may list several."""
    path = folder / "generation_config.json"
    recommended = end_tokens(read_json(path), path) if path.is_file() else frozenset()
    return recommended or end_tokens(raw, folder / "config.json")


def end_tokens(content: Mapping[str, Any], path: Path) -> frozenset[int]:
    """The EOS ids that a config names, in one number or a list; empty where it names none.

    Args:
        content: the config.
        path: where it was read.

    Raises:
        ValueError: what it names is no token id.
    """
    ids = content.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in listed):
        raise ValueError(f"{path}: eos_token_id is {ids!r}: it must be a token id, or a list of them")
    return frozenset(listed)
