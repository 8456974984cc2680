"""One decoder for the Llama family: what a layer computes for a set of rows. Variations are flags of the spec.

Rows of different requests lie side by side; only attention knows which row belongs to whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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
        normed = self.norm(hidden, layer.attention_norm)
        if self._narrow(len(hidden)):
            fused = _columns(layer.qkv, normed.t(), layer.qkv_bias).t().contiguous()
        else:
            fused = F.linear(normed, layer.qkv, layer.qkv_bias)
        qk, v = fused.view(len(hidden), -1, spec.head_dim).split([heads + kv, kv], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk.split([heads, kv], dim=1)
            return _rotate(self.norm(q, layer.q_norm), cos, sin), _rotate(self.norm(k, layer.k_norm), cos, sin), v
        q, k = _rotate(qk, cos, sin).split([heads, kv], dim=1)
        return q, k, v

    def finish_layer(self, layer: LayerWeights, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP, with residuals. Shapes: attended (rows, heads * head_dim) -> (rows, hidden)."""
        if self._narrow(len(hidden)):
            hidden = hidden + _columns(layer.out, attended.t(), layer.out_bias).t()
            normed = self.norm(hidden, layer.mlp_norm)
            gate, up = _columns(layer.gate_up, normed.t(), layer.gate_up_bias).chunk(2, dim=0)
            return hidden + _columns(layer.down, F.silu(gate).mul_(up), layer.down_bias).t()
        hidden = hidden + F.linear(attended, layer.out, layer.out_bias)
        normed = self.norm(hidden, layer.mlp_norm)
        gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate).mul_(up), layer.down, layer.down_bias)

    def _narrow(self, rows: int) -> bool:
        """Whether W x^T is to be computed instead of x W^T, which is the same.

        MKL's float32 product is up to twice as fast that way round for a handful of rows, and slower beyond.
        """
        suits = self.dtype == torch.float32 and self.device.type == "cpu"
        return suits and 4 <= rows <= 48 and rows * self.spec.hidden_size >= 4096


def _rotary_frequencies(spec: ModelSpec) -> tuple[Tensor, float]:
    """Inverse frequencies (head_dim / 2,) and the factor on cos and sin, under the checkpoint's rotary scaling."""
    rope = spec.config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind != "default":
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](spec.config, device=torch.device("cpu"))
        return inv_freq.float(), float(scaling)
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    return 1.0 / rope["rope_theta"] ** exponents, 1.0


def _columns(weight: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """weight @ columns + bias. Shapes: (out, in), (in, rows), (out,) -> (out, rows)."""
    return weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of transformers. x: (rows, heads, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
