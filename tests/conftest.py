"""Tiny random models, made on the spot."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, which transformers does.
    os.environ["TRITON_INTERPRET"] = "1"
# Engines check slots, arena rows and requests against each other whenever they fall idle, in every test.
os.environ["DREX_CHECK_INTEGRITY"] = "1"

from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from drex.engine.torch_executor import TorchExecutor
from drex.profiling.profile_cache import obtain
from drex.testing.byte_fallback import byte_fallback_tokenizer
from drex.tuning.corpus import Document, train_tokenizer

torch.set_num_threads(1)
pytest_plugins = ["server_fixtures"]

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


@pytest.fixture(autouse=True, scope="session")
def unmeasured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines in this process start from nominal costs and go by a clock that ticks a millisecond a look.

    So what they decide does not depend on the machine's speed. Those in processes of their own keep what they measure
    in a folder of the tests.
    """
    looks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("drex.llm.obtain", lambda asked, *rest: obtain("nominal" if asked is None else asked, *rest))
        patch.setattr(TorchExecutor, "now", lambda self: next(looks) * 1e-3)
        yield


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """A command that sets up logging in this process keeps no later test from seeing what is logged."""
    loggers = [logging.getLogger(name) for name in (None, "drex", "drex.engine", "uvicorn", "uvicorn.access")]
    before = [(logger.handlers[:], logger.level, logger.propagate, logger.disabled) for logger in loggers]
    yield
    for logger, (handlers, level, propagate, disabled) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate, logger.disabled = handlers, propagate, disabled
        logger.setLevel(level)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each supported family."""
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(config, root / name) for name, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def plain_model() -> Callable[..., Any]:
    """A function (folder, dtype) -> the model as transformers loads it."""

    @functools.cache
    def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    return load


@pytest.fixture(scope="session")
def plain_logprobs(plain_model: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """A function (folder, token ids) -> (tokens, vocab) log-probabilities, as transformers computes them."""

    @torch.inference_mode()
    def logprobs(folder: Path, ids: Sequence[int]) -> torch.Tensor:
        logits: torch.Tensor = plain_model(folder)(torch.tensor([list(ids)])).logits[0]
        return logits.log_softmax(-1)

    return logprobs


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with a few English merges, so that characters outside of ASCII take several tokens."""
    made = train_tokenizer([Document("text", "the cat sat on the mat; the dog sat on the log. " * 20)], vocab_size=270)
    made.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return made


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama with the tokeniser beside it; token 0 ends text."""
    sizes = {**COMMON, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    folder = make_model(LlamaConfig(**sizes), tmp_path_factory.mktemp("text_model"), seed=1)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", name="byte_fallback_tokenizer")
def byte_fallback_tokenizer_fixture() -> PreTrainedTokenizerFast:
    """Made like Llama 2's: words with their leading space, and a token for each byte of what is no word."""
    return byte_fallback_tokenizer(prefix=False)


@pytest.fixture(scope="session")
def byte_fallback_model(
    tmp_path_factory: pytest.TempPathFactory, byte_fallback_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A random Llama with the byte-fallback tokenizer beside it; token 2 ends text."""
    sizes = {**COMMON, "vocab_size": len(byte_fallback_tokenizer), "eos_token_id": 2, "pad_token_id": None}
    folder = make_model(LlamaConfig(**sizes), tmp_path_factory.mktemp("byte_fallback"), seed=2)
    byte_fallback_tokenizer.save_pretrained(folder)
    return folder
