"""The reductions of `drex.compute.sampler` by C++ kernels, each in one read of the logits."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from drex.compute.native import operations
from drex.control.hashing import Hashes

COLUMNS = ("argmax", "best", "second", "log_sum_exp", "mean")
"""What the kernel finds in a row of logits, in this order."""


class NativeReductions:
    """As of `drex.compute.drawing.Reductions`."""

    def prepare(self, logits: Tensor) -> Tensor:
        """The logits as they are: the kernels widen what they read."""
        return logits.contiguous()

    def summarise(self, logits: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """All columns, whatever is wanted. Shapes: logits (rows, vocab), columns (rows,), float64."""
        return dict(zip(COLUMNS, operations.summarise(logits, len(COLUMNS)).unbind(0), strict=True))

    def draw(self, logits: Tensor, best: Tensor, temperatures: Tensor, keys: Hashes) -> Tensor:
        """Tokens. Shapes: logits (rows, vocab), best, temperatures and keys (rows,)."""
        return operations.draw(logits, best.float(), temperatures.float(), torch.from_numpy(keys.view(np.int64)))
