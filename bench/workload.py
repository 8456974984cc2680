"""The models that the engine benchmark runs, and what they are asked to do. Everything is a function of a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from drex.compute.load import find_model
from drex.compute.spec import ModelSpec

PROMPT_TOKENS = (16, 128)
OUTPUT_TOKENS = (16, 240)
MAX_LENGTH = PROMPT_TOKENS[1] + OUTPUT_TOKENS[1]
REQUESTS_PER_SLOT = {1: 3}
"""Requests a run has, as a multiple of those in flight; 2 where it isn't listed."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama-160m": {
        "vocab_size": 8192,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
"""Shapes that are filled with random weights; `tiny` is for trying the script out."""
MODELS = ("bundled", *SHAPES)


@dataclass(frozen=True)
class Subject:
    """A model to measure. `kind` says how far its numbers carry: `trained model` or `random weights`."""

    name: str
    kind: str
    folder: Path
    vocab_size: int


@dataclass(frozen=True)
class Job:
    """One request: a prompt and how many tokens are wanted."""

    prompt: list[int]
    wanted: int


def prepare(name: str, scratch: Path) -> Subject:
    """Find a model, or write one with random weights below `scratch`.

    Raises:
        FileNotFoundError: the bundled model is not in this checkout.
    """
    if name == "bundled":
        folder = find_model(None)
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"{folder} has no model.safetensors: the bundled model is not in this checkout")
        return Subject(name, "trained model", folder, ModelSpec.from_folder(folder).vocab_size)
    config = LlamaConfig(
        **SHAPES[name],
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    folder = scratch / name
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return Subject(name, "random weights", folder, SHAPES[name]["vocab_size"])


def make_jobs(vocab_size: int, in_flight: int, scale: float, seed: int = 0) -> list[Job]:
    """Random token ids; prompt and output lengths uniform over their ranges, both times `scale`."""
    draw = random.Random(seed)
    count = in_flight * REQUESTS_PER_SLOT.get(in_flight, 2)

    def length(bounds: tuple[int, int]) -> int:
        return max(2, round(draw.randint(*bounds) * scale))

    return [
        Job([draw.randrange(3, vocab_size) for _ in range(length(PROMPT_TOKENS))], length(OUTPUT_TOKENS))
        for _ in range(count)
    ]


def warm_up(jobs: list[Job], in_flight: int) -> list[Job]:
    """A short version: as many requests as fit at once, a few tokens each."""
    return [Job(job.prompt, min(job.wanted, 4)) for job in jobs[:in_flight]]
