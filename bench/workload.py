"""The models that the engine benchmark runs, and what they are asked to do. Everything is a function of a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from drex.comparison.subject import prompts_in
from drex.compute.load import find_model
from drex.compute.spec import ModelSpec
from drex.inputs.tokenizer import load_tokenizer

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


@dataclass(frozen=True)
class PromptFile:
    """Prompts that are read from a file, each of them one request, however many are in flight.

    Attributes:
        name: of the file.
        prompts: text or token ids.
        output_tokens: wanted of each request.
    """

    name: str
    prompts: list[str | list[int]]
    output_tokens: int

    @classmethod
    def read(cls, path: Path, requests: int | None, output_tokens: int) -> PromptFile:
        """The first `requests` prompts of a file of JSON lines with "prompt"; None is all.

        Raises:
            ValueError: another kind of file, one with fewer prompts, or no output tokens.
        """
        if output_tokens < 1:
            raise ValueError("ask for 1 output token at least")
        prompts = prompts_in(path)
        if requests is not None and not 0 < requests <= len(prompts):
            raise ValueError(f"{path} has {len(prompts)} prompts: ask for 1 to {len(prompts)}")
        return cls(path.name, prompts[:requests], output_tokens)

    def jobs(self, folder: Path, scale: float) -> list[Job]:
        """The requests, outputs times `scale`; text is what a user says where the model has a chat template.

        Raises:
            ValueError: text, and no tokenizer in the model's `folder`.
        """
        tokenizer = load_tokenizer(folder)

        def token_ids(text: str) -> list[int]:
            if tokenizer is None:
                raise ValueError(f"{self.name} has text, and the model no tokenizer")
            if not tokenizer.chat_template:
                return list(tokenizer(text)["input_ids"])
            said = [{"role": "user", "content": text}]
            return list(tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False))

        wanted = _scaled(self.output_tokens, scale)
        return [Job(token_ids(prompt) if isinstance(prompt, str) else prompt, wanted) for prompt in self.prompts]


def prepare(name: str, scratch: Path) -> Subject:
    """Find a model by its name or folder, or write one with random weights below `scratch`.

    Raises:
        FileNotFoundError: the bundled model is not in this checkout.
        ValueError: a folder with no model that drex can load, or one whose requests have to be too short.
    """
    if name == "bundled":
        folder = find_model(None)
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"{folder} has no model.safetensors: the bundled model is not in this checkout")
        return Subject(name, "trained model", folder, ModelSpec.from_folder(folder).vocab_size)
    if name not in SHAPES:
        folder = Path(name).resolve()
        spec = ModelSpec.from_folder(folder)
        if spec.longest_request < MAX_LENGTH:
            raise ValueError(f"its requests have at most {spec.longest_request} tokens, those here up to {MAX_LENGTH}")
        return Subject(folder.name, "trained model", folder, spec.vocab_size)
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
        return _scaled(draw.randint(*bounds), scale)

    return [
        Job([draw.randrange(3, vocab_size) for _ in range(length(PROMPT_TOKENS))], length(OUTPUT_TOKENS))
        for _ in range(count)
    ]


def _scaled(tokens: int, scale: float) -> int:
    return max(2, round(tokens * scale))


def warm_up(jobs: list[Job], in_flight: int) -> list[Job]:
    """A short version: as many requests as fit at once, a few tokens each."""
    return [Job(job.prompt, min(job.wanted, 4)) for job in jobs[:in_flight]]
