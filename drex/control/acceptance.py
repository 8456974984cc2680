"""How likely a tentative token is right, by the confidence of the exit head that said it: learnt while serving.

For each exit point, shares of accepted tokens by confidence: from a prior, forgetting, and never falling as confidence
rises (pool-adjacent-violators, Barlow et al. 1972).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from drex.control.plan import FloatArray

BINS = 16
PRIOR_WEIGHT = 4.0
"""As if so many tokens of each bin had been accepted in the share that its confidence says."""
MEMORY = 1000.0
"""Tokens over which it is learnt: older ones fade by a factor e each so many."""
FIT_EVERY = 8
"""Tokens of an exit point after which its chances follow what was learnt."""


class Acceptance:
    """Shares of tentative tokens that turned out right.

    Args:
        exits: how many exit points there are.
    """

    def __init__(self, exits: int) -> None:
        centres = (np.arange(BINS) + 0.5) / BINS
        self._seen: FloatArray = np.full((exits, BINS), PRIOR_WEIGHT)
        self._right: FloatArray = np.tile(centres * PRIOR_WEIGHT, (exits, 1))
        self._chances: list[list[float]] = [centres.tolist()] * exits
        self._since_fit = [0] * exits
        # Since the start, for reports: tokens, right ones, and the chances that were given them.
        self._totals: FloatArray = np.zeros((3, exits, BINS))

    def chance(self, exit_index: int, confidence: float) -> float:
        """How likely a token that an exit head said with this confidence is right."""
        found: float = self._chances[exit_index][_bin(confidence)]
        return found

    def observe(self, exit_index: int, confidence: float, right: bool) -> None:
        """A tentative token was verified."""
        number = _bin(confidence)
        self._totals[:, exit_index, number] += 1.0, right, self.chance(exit_index, confidence)
        fade = math.exp(-1.0 / MEMORY)
        seen, hits = self._seen[exit_index], self._right[exit_index]
        seen *= fade
        hits *= fade
        seen[number] += 1.0
        hits[number] += right
        self._since_fit[exit_index] += 1
        if self._since_fit[exit_index] == FIT_EVERY:
            self._since_fit[exit_index] = 0
            self._chances[exit_index] = isotonic(hits / seen, seen).tolist()

    def count_afresh(self) -> None:
        """Reports are of what comes from now on; what was learnt stays."""
        self._totals[:] = 0.0

    def report(self) -> dict[str, Any]:
        """Tokens verified and accepted, also by confidence, and the mean error of the chances that they were given.

        `calibration` has tokens by confidence: verified, accepted, and the sum of the chances that they were given.
        """
        seen, right, said = self._totals.sum(1)
        verified = float(seen.sum())
        found = np.flatnonzero(seen).tolist()
        error = float(np.abs(right - said).sum() / verified) if verified else None
        return {
            "verified": int(verified),
            "accepted": int(right.sum()),
            "acceptance_by_confidence": {f"{_centre(i):.2f}": float(right[i] / seen[i]) for i in found},
            "calibration": [
                {
                    "confidence": _centre(i),
                    "verified": int(seen[i]),
                    "accepted": int(right[i]),
                    "expected": float(said[i]),
                }
                for i in found
            ],
            "calibration_error": error,
        }


class Compounding:
    """How likely a row is right that stands on several tentative tokens, given the product of their chances.

    Errors of these chances compound in the product, and tokens of one text don't fail independently. So what became of
    such rows is learnt apart, by the number of tokens: the share that was right, over the product's mean.

    Args:
        most: tokens that a row may stand on.
    """

    def __init__(self, most: int) -> None:
        self._right, self._expected = [PRIOR_WEIGHT] * (most + 1), [PRIOR_WEIGHT] * (most + 1)

    def chance(self, open_rows: int, product: float) -> float:
        """Of a row that stands on so many tokens, whose chances have this product; 1 on none."""
        return min(1.0, product * self._right[open_rows] / self._expected[open_rows]) if open_rows else 1.0

    def observe(self, open_rows: int, product: float, right: bool) -> None:
        """It is known what became of a row."""
        fade = math.exp(-1.0 / MEMORY)
        self._right[open_rows] = self._right[open_rows] * fade + right
        self._expected[open_rows] = self._expected[open_rows] * fade + product


def isotonic(values: FloatArray, weights: FloatArray) -> FloatArray:
    """The non-decreasing values nearest to these in weighted squares."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, total, size = value, weight, 1
        while blocks and blocks[-1][0] > mean:
            before, more, count = blocks.pop()
            mean = (mean * total + before * more) / (total + more)
            total, size = total + more, size + count
        blocks.append((mean, total, size))
    return np.repeat([mean for mean, _, _ in blocks], [size for *_, size in blocks])


def _centre(number: int) -> float:
    return (number + 0.5) / BINS


def _bin(confidence: float) -> int:
    return min(BINS - 1, max(0, int(confidence * BINS)))
