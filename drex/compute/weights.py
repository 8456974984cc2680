"""Weights from disk to the device, once, in the served dtype.

Each tensor is read from its own short-lived mapping, so that the peak is the weights plus one tensor, not twice them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from drex.checkpoint import ExitSpec
from drex.compute.decoder import Decoder, LayerWeights
from drex.compute.heads import ExitHead
from drex.compute.linear import Linear, can_pack, linear, pack_inside
from drex.compute.spec import ModelSpec, read_json

T = TypeVar("T")
INDEX = "model.safetensors.index.json"


class TensorFiles:
    """The safetensors files of a folder, by tensor name.

    Raises:
        ValueError: no safetensors weights, or a file of the index is missing or corrupt.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        for path in self._paths(folder) if names is None else [folder / name for name in names]:
            for key in _open(path, lambda file: list(file.keys())):
                self._file_of[key] = path

    @staticmethod
    def _paths(folder: Path) -> list[Path]:
        if (folder / INDEX).is_file():
            names = read_json(folder / INDEX).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise ValueError(f"{folder / INDEX} has no weight_map: fetch the model again")
            return [folder / name for name in sorted(set(map(str, names.values())))]
        if (folder / "model.safetensors").is_file():
            return [folder / "model.safetensors"]
        raise ValueError(
            f"{folder} has no model.safetensors: convert the weights, as with save_pretrained of transformers"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def numel(self) -> int:
        """Numbers that all tensors hold together, from the files' headers."""

        def count(file: safe_open) -> int:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118

        return sum(_open(path, count) for path in sorted(set(self._file_of.values())))

    def read(self, name: str, shape: Sequence[int], out: Tensor) -> None:
        """Copy one tensor into `out`, converting its dtype; raises ValueError if it is missing or of another shape."""
        if name not in self._file_of:
            raise ValueError(f"{self.folder}: the weights have no {name}; the checkpoint is incomplete, fetch it again")
        path = self._file_of[name]

        def copy(file: safe_open) -> None:
            tensor = file.get_tensor(name)
            if list(tensor.shape) != list(shape):
                raise ValueError(
                    f"{path}: {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}; "
                    "the files do not belong together"
                )
            out.copy_(tensor)

        _open(path, copy)


def _open(path: Path, use: Callable[[safe_open], T]) -> T:
    try:
        with safe_open(str(path), framework="pt") as file:
            return use(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or corrupt ({error}): fetch the model again") from error


def load_decoder(folder: Path, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Read a decoder's weights, q, k, v and gate, up fused."""
    files = TensorFiles(folder)
    hidden, heads, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv = {"q_proj": heads, "k_proj": kv, "v_proj": kv}
    gate_up = {"gate_proj": spec.intermediate_size, "up_proj": spec.intermediate_size}
    # What is packed is read into one buffer. Of packed weights a good part is never touched, and takes no memory as
    # long as it isn't where another weight has been.
    largest = max((heads + 2 * kv) * hidden, 2 * spec.intermediate_size * hidden, spec.vocab_size * hidden)
    buffer = torch.empty(largest, device=device, dtype=dtype) if can_pack(device, dtype) else None

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device=device, dtype=dtype)

    def room(rows: int, columns: int) -> Tensor:
        return empty(rows, columns) if buffer is None else buffer[: rows * columns].view(rows, columns)

    def one(name: str, *shape: int, out: Tensor | None = None) -> Tensor:
        tensor = empty(*shape) if out is None else out
        files.read(name, shape, tensor)
        return tensor

    def stacked(out: Tensor, prefix: str, parts: dict[str, int], suffix: str) -> Tensor:
        start = 0
        for part, rows in parts.items():
            files.read(f"{prefix}.{part}.{suffix}", (rows, *out.shape[1:]), out[start : start + rows])
            start += rows
        return out

    def product(prefix: str, parts: dict[str, int], columns: int, *, biased: bool = False) -> Linear:
        rows = sum(parts.values())
        bias = stacked(empty(rows), prefix, parts, "bias") if biased else None
        return linear(stacked(room(rows, columns), prefix, parts, "weight"), bias)

    layers = []
    for number in range(spec.num_layers):
        name = f"model.layers.{number}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        layers.append(
            LayerWeights(
                attention_norm=one(f"{name}.input_layernorm.weight", hidden),
                qkv=product(attention, qkv, hidden, biased=spec.qkv_bias),
                q_norm=one(f"{attention}.q_norm.weight", spec.head_dim) if spec.qk_norm else None,
                k_norm=one(f"{attention}.k_norm.weight", spec.head_dim) if spec.qk_norm else None,
                out=product(attention, {"o_proj": hidden}, heads, biased=spec.out_bias),
                mlp_norm=one(f"{name}.post_attention_layernorm.weight", hidden),
                gate_up=product(mlp, gate_up, hidden, biased=spec.mlp_bias),
                down=product(mlp, {"down_proj": hidden}, spec.intermediate_size, biased=spec.mlp_bias),
            )
        )
    embedding = one("model.embed_tokens.weight", spec.vocab_size, hidden)
    size = spec.vocab_size, hidden
    lm_head = linear(embedding if spec.tied else one("lm_head.weight", *size, out=room(*size)))
    return Decoder(spec, embedding, layers, one("model.norm.weight", hidden), lm_head)


def load_exit_head(
    folder: Path, spec: ModelSpec, exit_spec: ExitSpec, device: torch.device, dtype: torch.dtype
) -> tuple[ExitHead, tuple[Tensor, Tensor] | None]:
    """Read one exit head and, where the file has one, its probe (weight (2, hidden), bias (2,))."""
    files = TensorFiles(folder, [exit_spec.weights] if exit_spec.weights else [])
    prefix = f"exits.{exit_spec.layer}"
    head = ExitHead(
        exit_spec.head,
        spec.hidden_size,
        spec.intermediate_size,
        spec.vocab_size,
        spec.eps,
        untied=f"{prefix}.head.weight" in files,
    ).to(device=device, dtype=dtype)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            files.read(f"{prefix}.{name}", parameter.shape, parameter)
    head.requires_grad_(False)
    pack_inside(head)
    if f"{prefix}.probe.weight" not in files:
        return head, None
    weight = torch.empty(2, spec.hidden_size, device=device, dtype=dtype)
    bias = torch.empty(2, device=device, dtype=dtype)
    files.read(f"{prefix}.probe.weight", (2, spec.hidden_size), weight)
    files.read(f"{prefix}.probe.bias", (2,), bias)
    return head, (weight, bias)
