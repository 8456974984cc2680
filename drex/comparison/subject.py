"""What a benchmark runs on: a trained model, or random weights of a real shape with a synthetic exit trace.

All policies share the weights; the one without exits sees them as a single segment. Engines over one layout use the
same K/V pool in turn, so that memory is equal by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import LlamaConfig

from drex.assembly.runner import build_runner
from drex.comparison.policy_names import policy_settings
from drex.comparison.simulate import segment_lengths
from drex.compute.decoder import Decoder, LayerWeights
from drex.compute.device import has_fast_bfloat16
from drex.compute.heads import ExitHead
from drex.compute.linear import Products
from drex.compute.load import LoadedModel, inspect_model, load_model, pick_device, request_length
from drex.compute.segments import SegmentRunner
from drex.compute.spec import ModelSpec
from drex.config import DTYPES, EarlyExit, EngineConfig, ExitPlan, ExitRule
from drex.config.early_exit_json import KV_FILLS, ExitSpec
from drex.control.cost.model import CostModel
from drex.control.cost.profile import Profile
from drex.control.memory.slots import SlotLayout
from drex.engine.build import build_engine
from drex.engine.engine import Engine
from drex.engine.solving import InBackground
from drex.engine.torch_executor import TorchExecutor
from drex.inputs.tokenizer import load_tokenizer
from drex.profiling.profile_cache import MEASURED, obtain
from drex.progress import Progress
from drex.sim.shapes import Shape, shape_named
from drex.text_files import read_json_lines
from drex.tuning.corpus import split_held_out, standard_library

TRAINED = "trained model"
HELD_OUT_SHARE, PROMPT_DOCUMENTS = 0.02, 256
SYNTHETIC = "random weights, synthetic exit trace"


@dataclass
class Subject:
    """A model ready to be benchmarked under any policy.

    Attributes:
        name, label: for people; the label says how far the numbers carry.
        model: with its exits.
        config: of the engines; policy and requests in flight vary.
        profiles: costs, by number of segments, once measured.
    """

    name: str
    label: str
    model: LoadedModel
    config: EngineConfig
    profiles: dict[int, Profile] = field(default_factory=dict)
    _runners: dict[int, SegmentRunner] = field(default_factory=dict)

    def without_exits(self) -> LoadedModel:
        """The same weights in one segment."""
        plan = ExitPlan((), ExitRule("max_prob", ()), self.model.exits.kv_fill)
        return replace(self.model, heads=(), exits=plan, layout=SlotLayout((self.model.decoder.spec.num_layers,)))

    def engine(self, policy: str, in_flight: int) -> Engine:
        """A fresh engine over the shared weights and pool; others over the same layout must be idle.

        Args:
            policy: a name that `policy_settings` knows.
            in_flight: requests.
        """
        model = self.without_exits() if policy == "full" else self.model
        segments = len(model.layout.lengths)
        runner = self._runner(model)
        if segments not in self.profiles:
            # The first layout that is profiled chooses the threads; the others are measured with as many.
            threads = torch.get_num_threads() if self.profiles else None
            self.profiles[segments] = obtain(MEASURED, runner, self.config, model.exits, threads)
        config = replace(self.config, max_num_seqs=in_flight, **policy_settings(policy))
        cost = CostModel(self.profiles[segments])
        executor = TorchExecutor(runner)
        return build_engine(config, model.layout, model.exits.kv_fill, cost, executor, solving=InBackground())

    def _runner(self, model: LoadedModel) -> SegmentRunner:
        segments = len(model.layout.lengths)
        if segments not in self._runners:
            self._runners[segments] = build_runner(model, self.config)
        return self._runners[segments]


def trained(
    model: str | Path | None,
    early_exit: EarlyExit | None,
    dtype: str,
    config: EngineConfig,
    max_model_len: int | None = None,
) -> Subject:
    """A checkpoint with its own exits.

    Args:
        model, early_exit, dtype: as of `LLM`.
        config: of the engines; its `max_model_len` is cut to what the model has.
        max_model_len: tokens of a request that the model must have; None: none.

    Raises:
        ValueError: a model that can't be loaded, or one without exit points.
    """
    facts = inspect_model(model, early_exit, dtype, "auto")
    if max_model_len is not None:
        request_length(facts.spec, max_model_len)
    loaded = load_model(facts)
    if not loaded.exits.exits:
        raise ValueError("the model has no exit points to benchmark: name them, as in --exits 8 --thresholds 0.8")
    length = min(config.max_model_len, loaded.decoder.spec.longest_request)
    return Subject(loaded.folder.name, TRAINED, loaded, replace(config, max_model_len=length))


def synthetic(
    name: str, exits: Sequence[int] | None, exit_rates: Sequence[float], kv_fill: str, dtype: str, config: EngineConfig
) -> Subject:
    """Random weights of a known shape, whose rows exit at given rates whatever the heads say; these run all the same.

    Args:
        name: of the shape.
        exits: layers; None is one exit after half of them.
        exit_rates: share of the rows reaching each exit point that exit there.

    Raises:
        ValueError: an unknown shape, dtype or K/V fill, exits outside of it, or rates that don't fit the exits.
    """
    shape = shape_named(name)
    layers = tuple(exits) if exits else (shape.layers // 2,)
    lengths = segment_lengths(layers, shape.layers)
    for value, choices, what in ((dtype, DTYPES, "dtype"), (kv_fill, KV_FILLS, "kv_fill")):
        if value not in choices:
            raise ValueError(f"{what} {value!r}: choose one of {', '.join(choices)}")
    if len(exit_rates) != len(layers) or not all(0 <= rate < 1 for rate in exit_rates):
        raise ValueError(f"exit rates {list(exit_rates)}: give a share in [0, 1) for each exit after {list(layers)}")
    device = pick_device("auto")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" or has_fast_bfloat16(device) else "float32"
    kind: torch.dtype = getattr(torch, dtype)
    decoder = _random_decoder(shape, config.max_model_len, device, kind)
    heads = tuple((ExitHead("shared", shape.hidden, shape.intermediate, shape.vocab, 1e-5), None) for _ in layers)
    rule = ExitRule("trace", tuple(1.0 - rate for rate in exit_rates))
    plan = ExitPlan(tuple(ExitSpec(layer) for layer in layers), rule, kv_fill)
    return Subject(name, SYNTHETIC, LoadedModel(Path(name), decoder, heads, plan, SlotLayout(lengths)), config)


def _random_decoder(shape: Shape, length: int, device: torch.device, dtype: torch.dtype) -> Decoder:
    products = Products(device, dtype)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=length,
        tie_word_embeddings=shape.tied,
    )
    generator = torch.Generator(device).manual_seed(0)

    def matrix(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype, generator=generator) * 0.02

    def ones() -> torch.Tensor:
        return torch.ones(shape.hidden, device=device, dtype=dtype)

    query, both = shape.heads * shape.head_size, (shape.heads + 2 * shape.kv_heads) * shape.head_size

    def layer() -> LayerWeights:
        return LayerWeights(
            attention_norm=ones(),
            qkv=products.linear(matrix(both, shape.hidden)),
            q_norm=None,
            k_norm=None,
            out=products.linear(matrix(shape.hidden, query)),
            mlp_norm=ones(),
            gate_up=products.linear(matrix(2 * shape.intermediate, shape.hidden)),
            down=products.linear(matrix(shape.hidden, shape.intermediate)),
        )

    layers = []
    with Progress("drawing random weights", shape.layers) as progress:
        for _ in range(shape.layers):
            layers.append(layer())
            progress.advance()
    embedding = matrix(shape.vocab, shape.hidden)
    lm_head = embedding if shape.tied else matrix(shape.vocab, shape.hidden)
    return Decoder(ModelSpec.from_hf(config, frozenset()), embedding, layers, ones(), products.linear(lm_head))


def prompts_in(path: str | Path) -> list[str | list[int]]:
    """Prompts of a JSONL file: objects with `prompt`, text or token ids.

    Raises:
        ValueError: a file that can't be read, or has other prompts, or none.
    """
    try:
        found = [each["prompt"] for each in read_json_lines(path)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected JSON lines with a "prompt" ({error!r})') from error
    for prompt in found:
        ids = isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
        if not prompt or not (isinstance(prompt, str) or ids):
            raise ValueError(f"{path}: a prompt is {str(prompt)[:40]!r}: give text or token ids, at least one")
    if not found:
        raise ValueError(f"{path} has no prompts")
    return found


def read_prompts(path: str | Path, subject: Subject) -> list[tuple[int, ...]]:
    """Token ids of a JSONL file's prompts.

    Raises:
        ValueError: a file that can't be read, or text where the model has no tokeniser.
    """
    tokenizer = load_tokenizer(subject.model.folder) if subject.label == TRAINED else None
    prompts: list[tuple[int, ...]] = []
    for prompt in prompts_in(path):
        if isinstance(prompt, str) and tokenizer is None:
            raise ValueError(f"{path} has text and the model no tokeniser: give prompts as token ids")
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) and tokenizer is not None else prompt
        prompts.append(tuple(int(token) for token in ids))
    return prompts


def held_out_prompts(subject: Subject, longest: int) -> list[tuple[int, ...]]:
    """Starts of functions in the part of the standard library that training held out.

    Raises:
        ValueError: the model has no tokeniser.
    """
    tokenizer = load_tokenizer(subject.model.folder)
    if tokenizer is None:
        raise ValueError("the model has no tokeniser: name --prompts with token ids")
    _, held_out = split_held_out(standard_library(), HELD_OUT_SHARE)
    prompts = []
    for document in held_out[:PROMPT_DOCUMENTS]:
        start = document.text.find("\ndef ") + 1
        prompts.append(tuple(tokenizer(document.text[start : start + 8 * longest])["input_ids"][:longest]))
    return [prompt for prompt in prompts if len(prompt) == longest]
