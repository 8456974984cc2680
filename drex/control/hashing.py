"""Numbers that look random and are a pure function of whole numbers: no generator has a state to share.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood 2014), which passes BigCrush on counters.
"""

from __future__ import annotations

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def mix(*values: int) -> int:
    """A 64-bit hash of whole numbers."""
    state = 0
    for value in values:
        state = (state + GOLDEN + (value & MASK)) & MASK
        for shift, factor in MIX:
            state = ((state ^ (state >> shift)) * factor) & MASK
    return state


def uniform(*values: int) -> float:
    """A number in (0, 1) from whole numbers."""
    return ((mix(*values) >> 12) + 0.5) / 2**52
