"""How likely a tentative token is right, by the confidence of the exit head that said it: learnt while serving.

For each exit point, shares of accepted tokens by confidence: from a prior, forgetting, and never falling as confidence
rises (pool-adjacent-violators, Barlow et al. 1972).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from drex.control.constants import ACCEPTANCE_FADE, ACCEPTANCE_FIT_TOKENS, ACCEPTANCE_PRIOR_TOKENS, CONFIDENCE_BINS
from drex.control.request import Ahead


class Acceptance:
    """Shares of tentative tokens that turned out right.

    Args:
        exits: how many exit points there are.
    """

    def __init__(self, exits: int) -> None:
        # Lists, since numpy takes longer for as few numbers as these.
        centres = [_centre(number) for number in range(CONFIDENCE_BINS)]
        self._seen = [[ACCEPTANCE_PRIOR_TOKENS] * CONFIDENCE_BINS for _ in range(exits)]
        self._right = [[centre * ACCEPTANCE_PRIOR_TOKENS for centre in centres] for _ in range(exits)]
        self._chances = [centres] * exits
        self._since_fit = [0] * exits
        # Since the start, for reports: the chances that tokens were given, how many there were, and right ones.
        self._totals = [[[0.0] * CONFIDENCE_BINS for _ in range(exits)] for _ in range(3)]

    def chance(self, exit_index: int, confidence: float) -> float:
        """How likely a token that an exit head said with this confidence is right."""
        return self._chances[exit_index][_bin(confidence)]

    def of_all(self, ahead: Iterable[Ahead]) -> tuple[int, float]:
        """How many of a request's tokens are open, and the product of their chances."""
        count, product, chances = 0, 1.0, self._chances
        for entry in ahead:
            if entry.record is None:
                count += 1
                product *= chances[entry.exit_index][_bin(entry.confidence)]
        return count, product

    def observe(self, exit_index: int, confidence: float, right: bool) -> None:
        """A tentative token was verified."""
        number = _bin(confidence)
        given, verified, accepted = self._totals
        given[exit_index][number] += self._chances[exit_index][number]
        verified[exit_index][number] += 1.0
        accepted[exit_index][number] += right
        seen = self._seen[exit_index] = [weight * ACCEPTANCE_FADE for weight in self._seen[exit_index]]
        hits = self._right[exit_index] = [weight * ACCEPTANCE_FADE for weight in self._right[exit_index]]
        seen[number] += 1.0
        hits[number] += right
        self._since_fit[exit_index] += 1
        if self._since_fit[exit_index] == ACCEPTANCE_FIT_TOKENS:
            self._since_fit[exit_index] = 0
            shares = [hit / weight for hit, weight in zip(hits, seen, strict=True)]
            self._chances[exit_index] = isotonic(shares, seen)

    def count_afresh(self) -> None:
        """Reports are of what comes from now on; what was learnt stays."""
        self._totals = [[[0.0] * CONFIDENCE_BINS for _ in each] for each in self._totals]

    def report(self) -> dict[str, Any]:
        """Tokens verified and accepted, also by confidence, and the mean error of the chances that they were given.

        `calibration` has tokens by confidence: verified, accepted, and the sum of the chances that they were given.
        """
        said, seen, right = np.array(self._totals).sum(1)
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
        self._right, self._expected = [ACCEPTANCE_PRIOR_TOKENS] * (most + 1), [ACCEPTANCE_PRIOR_TOKENS] * (most + 1)

    def chance(self, open_rows: int, product: float) -> float:
        """Of a row that stands on so many tokens, whose chances have this product; 1 on none."""
        return min(1.0, product * self._right[open_rows] / self._expected[open_rows]) if open_rows else 1.0

    def observe(self, open_rows: int, product: float, right: bool) -> None:
        """It is known what became of a row."""
        self._right[open_rows] = self._right[open_rows] * ACCEPTANCE_FADE + right
        self._expected[open_rows] = self._expected[open_rows] * ACCEPTANCE_FADE + product


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing values nearest to these in weighted squares."""
    # Of blocks of equal values: the value, its weight, and how many there are.
    means: list[float] = []
    totals: list[float] = []
    sizes: list[int] = []
    for value, weight in zip(values, weights, strict=True):
        mean, total, size = value, weight, 1
        while means and means[-1] > mean:
            more = totals.pop()
            mean = (mean * total + means.pop() * more) / (total + more)
            total, size = total + more, size + sizes.pop()
        means.append(mean)
        totals.append(total)
        sizes.append(size)
    return [mean for mean, size in zip(means, sizes, strict=True) for _ in range(size)]


def _centre(number: int) -> float:
    return (number + 0.5) / CONFIDENCE_BINS


def _bin(confidence: float) -> int:
    number = int(confidence * CONFIDENCE_BINS)
    return number if 0 <= number < CONFIDENCE_BINS else 0 if number < 0 else CONFIDENCE_BINS - 1
