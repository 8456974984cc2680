"""A Pass as tensors: indices only. Rows that run lie first, rows that only write K/V behind them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from drex.control.plan import Evaluation, Pass


@dataclass(frozen=True)
class PassTensors:
    """Index vectors of a pass.

    Shapes: tokens (full,) at segment 0, else (0,); arena (full,), fill_arena (fill,); positions (full + fill,);
    cells (full + fill,) for each part; evaluated (evaluations,), into the full rows.
    """

    tokens: Tensor
    arena: Tensor
    fill_arena: Tensor
    positions: Tensor
    cells: list[Tensor]
    evaluated: Tensor
    evaluations: tuple[Evaluation, ...]

    @classmethod
    def of(cls, batch: Pass, device: torch.device) -> PassTensors:
        """Put a pass's numbers side by side and on the device."""
        spans = batch.spans
        full, fill = [span.full for span in spans], [span.fill for span in spans if span.fill.size]
        rows = [*full, *fill]
        evaluated: list[int] = []
        start = 0
        for span in spans:
            evaluated.extend([start + evaluation.row for evaluation in span.evaluations])
            start += span.full.size

        def put(parts: Iterable[Sequence[int]]) -> Tensor:
            return torch.from_numpy(np.array(list(chain.from_iterable(parts)), dtype=np.int64)).to(device)

        return cls(
            tokens=put(span.tokens for span in spans),
            arena=put(part.arena for part in full),
            fill_arena=put(part.arena for part in fill),
            positions=put(part.positions for part in rows),
            cells=[put(part.cells[number] for part in rows if part.size) for number in range(len(spans[0].context))],
            evaluated=put([evaluated]),
            evaluations=tuple(chain.from_iterable(span.evaluations for span in spans)),
        )
