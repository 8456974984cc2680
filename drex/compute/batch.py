"""A Pass as tensors: indices only. Rows that run lie first, rows that only write K/V behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drex.control.plan import IntArray, Pass


@dataclass(frozen=True)
class PassTensors:
    """Index vectors of a pass, each contiguous.

    Shapes: tokens (full,) at segment 0, else (0,); arena (full,), fill_arena (fill,); positions (full + fill,);
    cells (parts of all its segments, full + fill); evaluated (evaluations,), into the full rows.
    """

    tokens: Tensor
    arena: Tensor
    fill_arena: Tensor
    positions: Tensor
    cells: Tensor
    evaluated: Tensor

    @classmethod
    def of(cls, batch: Pass, device: torch.device) -> PassTensors:
        """Put a pass's numbers on the device."""
        full, fill, segments = batch.full, batch.fill, batch.parts
        if fill.size:  # then there is one segment
            cells = np.concatenate((full.cells, fill.cells), axis=1)
        else:
            cells = np.concatenate([each.full.cells for each in segments])

        def put(numbers: IntArray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(numbers)).to(device)

        return cls(
            tokens=put(batch.tokens),
            arena=put(full.arena),
            fill_arena=put(fill.arena),
            positions=put(np.concatenate((full.positions, fill.positions)) if fill.size else full.positions),
            cells=put(cells),
            evaluated=put(segments[-1].evaluations.rows),
        )
