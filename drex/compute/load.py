"""From a name to a model: a local folder, a hub id, or the bundled one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from drex.compute.decoder import Decoder
from drex.compute.device import has_fast_bfloat16
from drex.compute.heads import ExitHead
from drex.compute.spec import ModelSpec
from drex.compute.weights import load_decoder, load_exit_head
from drex.config import DTYPES, EarlyExit, ExitPlan, resolve_exits
from drex.config.early_exit_json import read_early_exit
from drex.control.memory.slots import SlotLayout

log = logging.getLogger(__name__)
BUNDLED = "drex-stdlib-10m"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with its exit heads on a device."""

    folder: Path
    decoder: Decoder
    heads: tuple[tuple[ExitHead, tuple[Tensor, Tensor] | None], ...]
    exits: ExitPlan
    layout: SlotLayout


def find_model(model: str | Path | None, files_of_hub: Sequence[str] = HUB_FILES) -> Path:
    """The folder of a model; None is the bundled one.

    Args:
        model: folder or hub id.
        files_of_hub: patterns of the files to fetch, where it is a hub id.

    Raises:
        ValueError: neither a folder nor a hub id that can be fetched.
    """
    if model is None:
        return Path(str(files("drex") / "assets" / BUNDLED))
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"no model at {model}, which is a file: name a Hugging Face model folder or a hub id")
    name = str(model)
    if name.count("/") != 1 or path.is_absolute() or name.startswith("."):
        raise ValueError(f"no model at {name}: name a Hugging Face model folder or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files_of_hub)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"no folder {name}, and the hub did not give it ({reason}): check the name and the network"
        ) from error


def pick_device(device: str) -> torch.device:
    """`auto` takes a CUDA GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        made = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: name one that torch knows, such as cpu or cuda:0") from error
    if made.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: torch sees no CUDA GPU here; use device='cpu'")
    return made


def pick_dtype(dtype: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's, but float32 on a CPU that is slower in 16 bit."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if dtype == "auto" and spec.dtype not in DTYPES[1:]:
        raise ValueError(
            f"config.json names dtype {spec.dtype!r}, which drex does not compute in: name another with dtype "
            f"(--dtype), one of {', '.join(DTYPES[1:])}"
        )
    if dtype == "auto":
        slow = device.type == "cpu" and (spec.dtype == "float16" or not has_fast_bfloat16(device))
        dtype = "float32" if slow else spec.dtype
    made = getattr(torch, dtype)
    assert isinstance(made, torch.dtype)
    return made


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before its weights are read."""

    folder: Path
    spec: ModelSpec
    exits: ExitPlan
    device: torch.device
    dtype: torch.dtype

    @property
    def layout(self) -> SlotLayout:
        """Layers of each segment."""
        edges = (0, *self.exits.layers, self.spec.num_layers)
        return SlotLayout(tuple(b - a for a, b in pairwise(edges)))


def inspect_model(model: str | Path | None, early_exit: EarlyExit | None, dtype: str, device: str) -> ModelFacts:
    """Find a model and resolve its exit points from `early_exit` and its `early_exit.json`.

    Raises:
        ValueError: what is missing, corrupt or not supported, and what to do about it.
    """
    folder = find_model(model)
    spec = ModelSpec.from_folder(folder)
    exits = resolve_exits(early_exit, read_early_exit(folder, spec.num_layers), spec.num_layers)
    on = pick_device(device)
    return ModelFacts(folder, spec, exits, on, pick_dtype(dtype, spec, on))


def request_length(spec: ModelSpec, asked: int | None) -> int:
    """Tokens that a request may have, prompt and output: `max_model_len` resolved.

    Args:
        spec: of the model.
        asked: None is what the checkpoint was made for, or its sliding window where that is shorter.

    Raises:
        ValueError: more than the model has.
    """
    most, window = spec.longest_request, spec.sliding_window
    if asked is None and most < spec.max_length:
        log.warning(
            "max_model_len is %d, and the checkpoint was made for %d tokens: its layers look back no further than that "
            "(sliding_window), which drex does not do",
            most,
            spec.max_length,
        )
    if asked is None:
        return most
    if asked > spec.max_length:
        raise ValueError(f"max_model_len is {asked}: the checkpoint was made for at most {spec.max_length} tokens")
    if asked > most:
        raise ValueError(
            f"max_model_len is {asked}: the model looks back {window} tokens only (sliding_window), which drex does "
            f"not do: set it to at most {window}"
        )
    if asked < 1:
        raise ValueError(f"max_model_len is {asked}: give at least 1")
    return asked


def load_model(facts: ModelFacts) -> LoadedModel:
    """Read the weights, onto the device.

    Raises:
        ValueError: weights that are missing, corrupt or too large for the memory,
            or exits without the probes that their criterion takes.
    """
    folder, spec, on, dtype = facts.folder, facts.spec, facts.device, facts.dtype
    try:
        heads = tuple(load_exit_head(folder, spec, exit_spec, on, dtype) for exit_spec in facts.exits.exits)
        if facts.exits.rule.criterion == "probe" and any(probe is None for _, probe in heads):
            raise ValueError("criterion 'probe' needs exits.N.probe.weight and .bias in the exit weights of every exit")
        decoder = load_decoder(folder, spec, on, dtype)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the GPU has no room for the weights ({error}): use a smaller dtype or model") from error
    return LoadedModel(folder, decoder, heads, facts.exits, facts.layout)
