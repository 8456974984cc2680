"""A Pass as tensors: indices only. Rows that run lie first, rows that only write K/V behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drex.control.plan import Evaluation, Pass


@dataclass(frozen=True)
class PassTensors:
    """Index vectors of a pass.

    Shapes: tokens (full,) at segment 0, else (0,); arena (full,), fill_arena (fill,); positions (full + fill,);
    cells (parts, full + fill); evaluated (evaluations,), into the full rows.
    """

    tokens: Tensor
    arena: Tensor
    fill_arena: Tensor
    positions: Tensor
    cells: Tensor
    evaluated: Tensor
    evaluations: tuple[Evaluation, ...]

    @classmethod
    def of(cls, batch: Pass, device: torch.device) -> PassTensors:
        """Put a pass's numbers side by side and on the device."""
        full, fill = [span.full for span in batch.spans], [span.fill for span in batch.spans if len(span.fill)]
        rows = [*full, *fill]
        starts = np.cumsum([0, *(len(part) for part in full)])
        evaluated = [
            int(start) + evaluation.row
            for start, span in zip(starts, batch.spans, strict=False)
            for evaluation in span.evaluations
        ]

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        none = np.empty(0, dtype=np.int64)
        return cls(
            tokens=put(np.concatenate([span.tokens for span in batch.spans])),
            arena=put(np.concatenate([part.arena for part in full])),
            fill_arena=put(np.concatenate([none, *(part.arena for part in fill)])),
            positions=put(np.concatenate([part.positions for part in rows])),
            cells=put(np.concatenate([part.cells for part in rows], axis=1)),
            evaluated=put(np.array(evaluated, dtype=np.int64)),
            evaluations=tuple(e for span in batch.spans for e in span.evaluations),
        )
