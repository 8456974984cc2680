"""Corrections of a cost model by size of the pass, learnt while serving.

Invariant: what is said of a size only moves by what was observed about it, or nearby.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from drex.control.constants import CORRECTION_WEIGHT
from drex.control.plan import FloatArray


class Corrections:
    """Logarithms of measured / predicted: learnt at powers of two, and on straight lines between these.

    Args:
        doubt: observations that what is assumed at first counts as.
        known: to start from, by the logarithm of the size.
    """

    def __init__(self, doubt: float, known: Mapping[int, float] | None = None) -> None:
        self.doubt = doubt
        self._sizes = sorted(known or ())
        self._values = [] if known is None else [known[size] for size in self._sizes]
        self._seen = [0.0] * len(self._sizes)

    def copy(self) -> Corrections:
        """One that knows the same and learns for itself."""
        other = Corrections(self.doubt)
        other._sizes, other._values, other._seen = list(self._sizes), list(self._values), list(self._seen)
        return other

    def at(self, rows: FloatArray | float) -> FloatArray:
        """By rows of the pass, numbers or arrays; 0 until something is known."""
        if not self._sizes:
            return np.zeros(np.shape(rows))
        return np.asarray(np.interp(np.log2(np.maximum(1.0, rows)), self._sizes, self._values))

    def at_one(self, rows: int) -> float:
        """As `at`, of one number: numpy takes many times as long for that."""
        sizes, values = self._sizes, self._values
        if not sizes:
            return 0.0
        size = _logarithm(rows)
        after = bisect_left(sizes, size)
        if after == len(sizes):
            return values[-1]
        if after == 0 or sizes[after] == size:
            return values[after]
        slope = (values[after] - values[after - 1]) / (sizes[after] - sizes[after - 1])
        return slope * (size - sizes[after - 1]) + values[after - 1]

    def seen(self, rows: int) -> float:
        """Observations about that size."""
        return sum(self._seen[self._sizes.index(size)] for size, _ in _around(rows) if size in self._sizes)

    def learn(self, rows: int, off: float) -> None:
        """A pass of so many rows was off by so much, corrections included.

        The first observations count alike, and so does what was assumed before; later ones count as
        `CORRECTION_WEIGHT`.
        """
        for size, share in _around(rows):
            place = bisect_left(self._sizes, size)
            if place == len(self._sizes) or self._sizes[place] != size:
                assumed = self.at_one(2**size)
                self._sizes.insert(place, size)
                self._values.insert(place, assumed)
                self._seen.insert(place, 0.0)
            self._seen[place] += share
            self._values[place] += share * max(CORRECTION_WEIGHT, 1.0 / (self._seen[place] + self.doubt)) * off


@lru_cache(maxsize=4096)
def _logarithm(rows: int) -> float:
    """Of base 2, as numpy rounds it; 0 of less than a row."""
    return float(np.log2(max(1.0, rows)))


@lru_cache(maxsize=4096)
def _around(rows: int) -> list[tuple[int, float]]:
    """The powers of two around a size, as logarithms, and what share of it is theirs."""
    size = math.log2(max(1, rows))
    below = math.floor(size)
    return [(at, share) for at, share in ((below, 1 - (size - below)), (below + 1, size - below)) if share]
