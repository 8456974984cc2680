"""What an exit head or the final head was given and gave."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HeadOutput:
    """What a head was given and gave, a row an evaluation.

    Attributes:
        logits: (rows, vocab), unscaled.
        hidden, before: the segment's output and what its last layer was given, (rows, hidden).
        segment: that ends here.
        final: whether this is the final head.
        probe: (weight (2, hidden), bias (2,)) of this exit, if it has one.
    """

    logits: Tensor
    hidden: Tensor
    before: Tensor
    segment: int
    final: bool
    probe: tuple[Tensor, Tensor] | None
