"""One decoder for the Llama family: what a layer computes for a set of rows. Variations are flags of the spec.

Rows of different requests lie side by side; only attention knows which row belongs to whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from drex.compute.spec import ModelSpec


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Shapes: qkv ((heads + 2 kv_heads) head_dim, hidden), gate_up (2 intermediate, hidden)."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [tensor for tensor in vars(self).values() if tensor is not None]


class Decoder:
    """Weights and the arithmetic of embedding, layers and final norm.

    Args:
        spec: sizes.
        embedding: (vocab, hidden).
        layers: in order.
        final_norm: (hidden,).
        lm_head: (vocab, hidden); the embedding itself where tied.
    """

    def __init__(
        self, spec: ModelSpec, embedding: Tensor, layers: Sequence[LayerWeights], final_norm: Tensor, lm_head: Tensor
    ) -> None:
        self.spec, self.embedding, self.layers = spec, embedding, list(layers)
        self.final_norm_weight, self.lm_head = final_norm, lm_head

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; a tied head counts once."""
        tensors = {id(t): t for layer in self.layers for t in layer.tensors()}
        tensors.update({id(t): t for t in (self.embedding, self.final_norm_weight, self.lm_head)})
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def rotary_table(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) for positions 0 … length - 1, each (length, head_dim / 2), as transformers computes them."""
        rotary = LlamaRotaryEmbedding(config=self.spec.config)  # type: ignore[arg-type]
        inv_freq = rotary.inv_freq.float().to(self.device)
        angles = torch.arange(length, device=self.device, dtype=torch.float32)[:, None] * inv_freq[None]
        scaling = float(rotary.attention_scaling)
        return (angles.cos() * scaling).to(self.dtype), (angles.sin() * scaling).to(self.dtype)

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Root-mean-square norm over the last dimension."""
        return F.rms_norm(hidden, (weight.shape[0],), weight, self.spec.eps)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm before the LM head."""
        return self.norm(hidden, self.final_norm_weight)

    def project_qkv(
        self, layer: LayerWeights, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values of rows.

        Shapes: hidden (rows, hidden), cos and sin (rows, 1, head_dim / 2) -> q (rows, heads, head_dim),
        k and v (rows, kv_heads, head_dim).
        """
        spec = self.spec
        fused = F.linear(self.norm(hidden, layer.attention_norm), layer.qkv, layer.qkv_bias)
        q, k, v = fused.view(len(hidden), -1, spec.head_dim).split(
            [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self.norm(q, layer.q_norm), self.norm(k, layer.k_norm)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def finish_layer(self, layer: LayerWeights, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP, with residuals. Shapes: attended (rows, heads * head_dim) -> (rows, hidden)."""
        hidden = hidden + F.linear(attended, layer.out, layer.out_bias)
        fused = F.linear(self.norm(hidden, layer.mlp_norm), layer.gate_up, layer.gate_up_bias)
        gate, up = fused.chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate).mul_(up), layer.down, layer.down_bias)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of transformers. x: (rows, heads, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
