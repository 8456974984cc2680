"""The recipe of a training run: `TrainConfig`, the sizes, schedule and losses that `drex train` works by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from drex.config.early_exit_json import HEAD_KINDS
from drex.tuning.losses import exit_loss_weights

SIZES = (
    *("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "sequence_length"),
    *("batch_tokens", "micro_batch_tokens"),
)


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. Sizes in tokens; learning rates are peaks of a warm-up and cosine schedule down to a fiftieth."""

    exits: tuple[int, ...] = (4, 8)
    exit_head: str = "norm"
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 12
    num_heads: int = 4
    num_kv_heads: int = 2
    sequence_length: int = 512
    tokens: int = 12_000_000
    batch_tokens: int = 8192
    micro_batch_tokens: int = 1024
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    weight_decay: float = 0.05
    warmup_share: float = 0.02
    exit_loss: str = "ee_llm"
    exit_weights: tuple[float, ...] | None = None
    rotate_exits: bool = True
    held_out_share: float = 0.02
    held_out_tokens: int = 131_072
    autocast: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        for name in ("muon_lr", "adam_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number from 0 on")
        if self.hidden_size % (2 * self.num_heads) or self.num_heads % self.num_kv_heads:
            raise ValueError(
                "hidden_size must be a multiple of twice num_heads, and num_heads one of num_kv_heads "
                f"(got {self.hidden_size}, {self.num_heads}, {self.num_kv_heads})"
            )
        if not self.exits or list(self.exits) != sorted(set(self.exits)) or self.exits[0] < 1:
            raise ValueError(f"exits {self.exits}: name at least one layer count, ascending, from 1 on")
        if self.exits[-1] >= self.num_layers:
            raise ValueError(f"exit after layer {self.exits[-1]}: the model has {self.num_layers}, so exits end before")
        if self.exit_head not in HEAD_KINDS:
            raise ValueError(f"exit head {self.exit_head!r}: choose one of {', '.join(HEAD_KINDS)}")
        exit_loss_weights(self.exit_loss, self.exits, self.num_layers, self.exit_weights)
        if self.batch_tokens % self.micro_batch_tokens or self.micro_batch_tokens % self.sequence_length:
            raise ValueError(
                "batch_tokens must be a multiple of micro_batch_tokens, and that one of sequence_length "
                f"(got {self.batch_tokens}, {self.micro_batch_tokens}, {self.sequence_length})"
            )
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens {self.tokens}: train on at least one batch of {self.batch_tokens}")

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens
