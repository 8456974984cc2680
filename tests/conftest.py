"""Tiny random models, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

torch.set_num_threads(1)

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**COMMON, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "mistral": MistralConfig(**COMMON, sliding_window=None, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**COMMON, use_sliding_window=False),
    "qwen3": Qwen3Config(**COMMON, head_dim=8, tie_word_embeddings=True),
}


def make_model(config: Any, folder: Path, seed: int = 0, **save: Any) -> Path:
    """Write a random model (biases and norms random too, so that each of them matters) as a Hugging Face folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each supported family."""
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(config, root / name) for name, config in CONFIGS.items()}
