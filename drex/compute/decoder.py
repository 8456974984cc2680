"""One decoder for the Llama family: what a layer computes for a set of rows. Variations are flags of the spec.

Rows of different requests lie side by side; only attention knows which row belongs to whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from drex.compute.linear import Linear, weight_bytes
from drex.compute.spec import ModelSpec


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Shapes: qkv hidden -> (heads + 2 kv_heads) head_dim, gate_up hidden -> 2 intermediate."""

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear

    @property
    def weight_bytes(self) -> int:
        """Bytes of all of it."""
        products = sum(weight_bytes(product) for product in (self.qkv, self.out, self.gate_up, self.down))
        norms = (self.attention_norm, self.q_norm, self.k_norm, self.mlp_norm)
        return products + sum(norm.nbytes for norm in norms if norm is not None)


class Decoder:
    """Weights and the arithmetic of embedding, layers and final norm.

    Args:
        spec: sizes.
        embedding: (vocab, hidden).
        layers: in order.
        final_norm: (hidden,).
        lm_head: hidden -> vocab; where tied with the embedding itself, or with it packed.
    """

    def __init__(
        self, spec: ModelSpec, embedding: Tensor, layers: Sequence[LayerWeights], final_norm: Tensor, lm_head: Linear
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
        """Bytes of all weights as they lie in memory; a tied head counts once, but where it is packed."""
        layers = sum(layer.weight_bytes for layer in self.layers)
        shared = isinstance(self.lm_head, nn.Linear) and self.lm_head.weight.data_ptr() == self.embedding.data_ptr()
        head = 0 if shared else weight_bytes(self.lm_head)
        return layers + self.embedding.nbytes + self.final_norm_weight.nbytes + head

    def rotary_table(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) for positions 0 … length - 1, each (length, head_dim / 2), as transformers computes them."""
        inv_freq, scaling = _rotary_frequencies(self.spec)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * inv_freq[None]
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        return cos.to(self.device, self.dtype), sin.to(self.device, self.dtype)

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
        heads, kv = spec.num_heads, spec.num_kv_heads
        fused = layer.qkv(self.norm(hidden, layer.attention_norm))
        qk, v = fused.view(len(hidden), -1, spec.head_dim).split([heads + kv, kv], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk.split([heads, kv], dim=1)
            return _rotate(self.norm(q, layer.q_norm), cos, sin), _rotate(self.norm(k, layer.k_norm), cos, sin), v
        q, k = _rotate(qk, cos, sin).split([heads, kv], dim=1)
        return q, k, v

    def finish_layer(self, layer: LayerWeights, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP, with residuals. Shapes: attended (rows, heads * head_dim) -> (rows, hidden)."""
        hidden = hidden + layer.out(attended)
        gate, up = layer.gate_up(self.norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
        return hidden + layer.down(F.silu(gate).mul_(up))


def _rotary_frequencies(spec: ModelSpec) -> tuple[Tensor, float]:
    """Inverse frequencies (head_dim / 2,) and the factor on cos and sin, under the checkpoint's rotary scaling."""
    rope = spec.config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind != "default":
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](spec.config, device=torch.device("cpu"))
        return inv_freq.float(), float(scaling)
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    return 1.0 / rope["rope_theta"] ** exponents, 1.0


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of transformers. x: (rows, heads, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
