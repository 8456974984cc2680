"""Numbers that look random and are a pure function of whole numbers: no generator has a state to share.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood 2014), which passes BigCrush on counters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from drex.control.plan import FloatArray

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
Hashes = npt.NDArray[np.uint64]


def mix(*columns: int | Sequence[int] | npt.NDArray[np.int64]) -> Hashes:
    """64-bit hashes of whole numbers: of the first of each column, of the second of each, and so on.

    A single number stands for a column of the same.
    """
    # At least one dimension, since numpy warns of single numbers that wrap around.
    state = np.zeros(1, dtype=np.uint64)
    for column in columns:
        state = state + np.uint64(GOLDEN) + _unsigned(column)
        for shift, factor in MIX:
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return state


def uniform(*columns: int | Sequence[int] | npt.NDArray[np.int64]) -> FloatArray:
    """Numbers in (0, 1) from whole numbers, as many as the columns are long."""
    out: FloatArray = ((mix(*columns) >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52
    return out


def _unsigned(column: int | Sequence[int] | npt.NDArray[np.int64]) -> Hashes:
    """Whole numbers of any size and sign, modulo 2^64."""
    if isinstance(column, np.ndarray):
        return column.astype(np.uint64)
    if isinstance(column, int):
        return np.array([column & MASK], dtype=np.uint64)
    return np.array([value & MASK for value in column], dtype=np.uint64)
