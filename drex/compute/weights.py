"""Weights from disk to the device, once, in the served dtype.

Each tensor is read from its own short-lived mapping, so that the peak is the weights plus one tensor, not twice them.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
from torch import Tensor

from drex.compute.decoder import Decoder, LayerWeights
from drex.compute.device import memory_bytes
from drex.compute.heads import ExitHead
from drex.compute.linear import Linear, Products
from drex.compute.spec import ModelSpec
from drex.compute.weight_files import TensorFiles
from drex.config.early_exit_json import ExitSpec

log = logging.getLogger(__name__)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NOT_WEIGHTS = re.compile(r"\.(inv_freq|k_scale|v_scale)$")
"""Names of tensors that are computed anew, or that only a quantised cache would need."""


def load_decoder(folder: Path, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Read a decoder's weights, q, k, v and gate, up fused; raises ValueError where a CPU's memory can't hold them."""
    files = TensorFiles(folder)
    needed, memory = files.numel() * dtype.itemsize / 2**30, memory_bytes() / 2**30
    if device.type == "cpu" and needed > memory:
        raise ValueError(
            f"the weights take {needed:.1f} GiB in {str(dtype).removeprefix('torch.')}, and there are {memory:.1f} GiB "
            "of memory: use a smaller dtype (--dtype) or model"
        )
    hidden, heads, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv = {"q_proj": heads, "k_proj": kv, "v_proj": kv}
    gate_up = {"gate_proj": spec.intermediate_size, "up_proj": spec.intermediate_size}
    # What is packed is read into one buffer. Of packed weights a good part is never touched, and takes no memory as
    # long as it isn't where another weight has been.
    largest = max((heads + 2 * kv) * hidden, 2 * spec.intermediate_size * hidden, spec.vocab_size * hidden)
    products = Products(device, dtype)
    buffer = torch.empty(largest, device=device, dtype=dtype) if products.packs else None

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
        return products.linear(stacked(room(rows, columns), prefix, parts, "weight"), bias)

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
    size = spec.vocab_size, hidden
    # Of a tied pair a file may hold either, as with transformers.
    embedding = one(HEAD if spec.tied and EMBEDDING not in files else EMBEDDING, *size)
    head = one(HEAD, *size, out=room(*size)) if not spec.tied or (HEAD in files and EMBEDDING in files) else embedding
    if spec.tied and head is not embedding:
        if torch.equal(head, embedding):
            head = embedding
        else:
            log.warning("config.json ties the head to the embedding, but the weights have another head, which is used")
    decoder = Decoder(spec, embedding, layers, one("model.norm.weight", hidden), products.linear(head))
    unread = [name for name in files.unread if not NOT_WEIGHTS.search(name)]
    if unread:
        log.warning("%d tensors of the weights were not used, such as %s", len(unread), unread[0])
    return decoder


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
    Products(device, dtype).pack_inside(head)
    if f"{prefix}.probe.weight" not in files:
        return head, None
    weight = torch.empty(2, spec.hidden_size, device=device, dtype=dtype)
    bias = torch.empty(2, device=device, dtype=dtype)
    files.read(f"{prefix}.probe.weight", (2, spec.hidden_size), weight)
    files.read(f"{prefix}.probe.bias", (2,), bias)
    return head, (weight, bias)
