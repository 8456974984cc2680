"""The criterion `trace`: noise in place of a confidence, for comparisons on random weights."""

from __future__ import annotations

from dataclasses import dataclass

from drex.compute.criteria import Criterion, Measured
from drex.control.hashing import uniform
from drex.control.plan import Evaluations, FloatArray, IntArray


@dataclass(frozen=True)
class Trace(Criterion):
    """Uniform noise by request, position and exit, so that a share of 1 - threshold of the rows exit."""

    def confidence(self, measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
        draws = [evaluations.draws[row] for row in rows.tolist()]
        seeds, samples = [each.seed for each in draws], [each.sample for each in draws]
        return uniform(seeds, samples, evaluations.positions[rows], measured.segment)
