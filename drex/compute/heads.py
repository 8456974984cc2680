"""Exit heads: what turns the hidden state at an exit point into logits.

Owns the parameters that an exit point has beyond the decoder's own. Training and serving use this one module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drex.config.early_exit_json import HEAD_KINDS


class GatedMLP(nn.Module):
    """Residual SwiGLU with its own norm: h + down(silu(gate(n)) * up(n)), n = norm(h)."""

    def __init__(self, hidden_size: int, intermediate_size: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        out: Tensor = hidden + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return out


class ExitHead(nn.Module):
    """One exit point's head.

    | kind     | logits                                                  | own parameters            |
    |----------|---------------------------------------------------------|---------------------------|
    | `shared` | lm_head(final_norm(h)), as LayerSkip                    | none                      |
    | `norm`   | lm_head(norm(h))                                        | norm                      |
    | `linear` | head(final_norm(h))                                     | head                      |
    | `mlp`    | head(norm(h + mlp(h))), as EE-Tuning                    | mlp, norm, head (if untied) |

    Args:
        kind: one of HEAD_KINDS.
        hidden_size, intermediate_size, vocab_size: the decoder's.
        eps: of every norm.
        untied: whether an `mlp` head owns its vocabulary matrix; `linear` always does.
    """

    def __init__(
        self, kind: str, hidden_size: int, intermediate_size: int, vocab_size: int, eps: float, untied: bool = False
    ) -> None:
        super().__init__()
        if kind not in HEAD_KINDS:
            raise ValueError(f"unknown exit head {kind!r}: choose one of {', '.join(HEAD_KINDS)}")
        self.kind = kind
        self.mlp = GatedMLP(hidden_size, intermediate_size, eps) if kind == "mlp" else None
        self.norm = nn.RMSNorm(hidden_size, eps=eps) if kind in ("norm", "mlp") else None
        owns_head = kind == "linear" or (kind == "mlp" and untied)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False) if owns_head else None

    def features(self, hidden: Tensor, final_norm: Callable[[Tensor], Tensor]) -> Tensor:
        """What the vocabulary matrix multiplies. Shapes: (..., hidden) -> (..., hidden)."""
        if self.mlp is not None:
            hidden = self.mlp(hidden)
        norm = self.norm if self.norm is not None else final_norm
        out: Tensor = norm(hidden)
        return out

    def forward(self, hidden: Tensor, final_norm: Callable[[Tensor], Tensor], lm_head: Tensor) -> Tensor:
        """Logits, in training. Shapes: hidden (..., hidden), lm_head (vocab, hidden) -> (..., vocab)."""
        weight = self.head.weight if self.head is not None else lm_head
        return F.linear(self.features(hidden, final_norm), weight)

    @torch.no_grad()
    def start_from(self, final_norm: Tensor, lm_head: Tensor) -> None:
        """Copy the decoder's final norm and vocabulary matrix into what this head owns, as EE-Tuning does."""
        if self.norm is not None:
            self.norm.weight.copy_(final_norm)
        if self.head is not None:
            self.head.weight.copy_(lm_head)
        if self.mlp is not None:
            nn.init.zeros_(self.mlp.down_proj.weight)
