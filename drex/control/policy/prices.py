"""What passes cost, as tables that decisions are read from: looked up many times, refreshed now and then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from drex.control.cost.model import CostModel
from drex.control.plan import FloatArray


class Prices:
    """Seconds of passes by their rows, as of the last refresh.

    Args:
        cost: of passes; it goes on learning, which shows at the next refresh.
        kv_fill: what the layers that a token skipped cost later.
        most: rows of a pass that are told apart; beyond, costs are those of so many.

    Attributes:
        counts: of rows, 0 … most. (most + 1,).
        shallow: seconds of a pass over segment 0, by its live rows. (most + 1,).
    """

    def __init__(self, cost: CostModel, kv_fill: str, most: int) -> None:
        self.cost, self.kv_fill = cost, kv_fill
        self.counts = np.arange(most + 1, dtype=np.float64)
        self.refresh(0.0)

    def refresh(self, context: float) -> None:
        """Read the cost model again, for requests with a mean of `context` K/V entries."""
        counts, segments = self.counts, range(self.cost.segments)
        self._full, self._at_once = self.cost.full_depth(counts, context), self.cost.at_once(counts)
        self._rows = [self.cost.row_seconds(segment, counts) for segment in segments]
        self._live = [self.cost.live_seconds(segment, counts, context) for segment in segments]
        self._factors = [self.cost.factors(segment, counts) for segment in segments]
        self.shallow = self.seconds(0, counts, 0.0)

    def seconds(self, segment: int, live: FloatArray | float, fills: FloatArray | float) -> FloatArray:
        """Passes over live rows and the fills that they owe, numbers or arrays."""
        if self.kv_fill in ("alias", "mask"):
            fills = 0.0
        counts, total = self.counts, np.add(live, fills)
        run = total if self.kv_fill == "recompute" else live
        out = np.interp(run, counts, self._rows[segment]) + np.interp(live, counts, self._live[segment])
        if self.kv_fill == "project":
            out = out + self.cost.profile.segments[segment].kv_row * np.asarray(fills)
        return np.asarray(out * np.interp(total, counts, self._factors[segment]))

    def seconds_ahead(self, segment: int, live: Sequence[int], fills: Sequence[int]) -> float:
        """What a row has ahead of it from a segment on, if it goes through with all that wait on the way."""
        rows, total = 0.0, 0.0
        for deeper in range(segment, len(live)):
            rows += live[deeper]
            total += float(self.seconds(deeper, max(1.0, rows), float(fills[deeper])))
        return total

    def full_step(self, decoding: int) -> float:
        """Seconds of a token at full depth with `decoding` requests, all segments at once."""
        return self.step_by_segments(decoding) * self._at_once.item(min(decoding, len(self._at_once) - 1))

    def step_by_segments(self, decoding: int) -> float:
        """Seconds of a token at full depth with `decoding` requests, one segment after the other."""
        return self._full.item(min(decoding, len(self._full) - 1))
