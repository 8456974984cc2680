"""Sizes of decoders that benchmarks and the simulator run without their weights. Sources: the models' config.json."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of the Llama family."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    head_dim: int | None = None

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Numbers in one layer's matrices."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        """Numbers in the LM head."""
        return self.hidden * self.vocab

    @property
    def kv_values(self) -> int:
        """Numbers of a token's K and V at one layer."""
        return 2 * self.kv_heads * self.head_size


SHAPES = {
    "llama-160m": Shape(24, 768, 2048, 12, 4, 8192, tied=True),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 128256, tied=True, head_dim=64),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "llama-2-13b": Shape(40, 5120, 13824, 40, 40, 32000),
    "qwen2.5-14b": Shape(48, 5120, 13824, 40, 8, 152064),
}


def shape_named(name: str) -> Shape:
    """One of them. Raises ValueError for an unknown name."""
    if name not in SHAPES:
        raise ValueError(f"shape {name!r}: choose one of {', '.join(SHAPES)}")
    return SHAPES[name]
