"""How far the output of a policy is from full depth's: by tokens, and by what the full-depth model thinks of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def token_agreement(ours: Sequence[int], full: Sequence[int]) -> float:
    """Share of positions with the same token, of the longer output."""
    longer = max(len(ours), len(full))
    return sum(a == b for a, b in zip(ours, full, strict=False)) / longer if longer else 1.0


def edit_similarity(ours: Sequence[int], full: Sequence[int]) -> float:
    """1 - Levenshtein distance over the longer length, on tokens."""
    longer = max(len(ours), len(full))
    if not longer:
        return 1.0
    row = np.arange(len(full) + 1)
    other = np.asarray(full)
    for i, token in enumerate(ours, 1):
        changed = np.minimum(row[1:] + 1, row[:-1] + (other != token))
        # Insertions run along the row: the least of what is to the left, one more a step.
        steps = np.arange(len(full) + 1)
        row = np.minimum.accumulate(np.concatenate(([i], changed)) - steps) + steps
    return 1.0 - float(row[-1]) / longer


def rouge_l(ours: Sequence[int], full: Sequence[int]) -> float:
    """F1 of the longest common subsequence, on tokens (Lin 2004)."""
    if not ours or not full:
        return float(len(ours) == len(full))
    row = np.zeros(len(full) + 1, dtype=np.int64)
    other = np.asarray(full)
    for token in ours:
        matched = np.where(other == token, row[:-1] + 1, 0)
        row = np.maximum.accumulate(np.maximum(row, np.concatenate(([0], matched))))
    common = float(row[-1])
    return 2 * common / (len(ours) + len(full))
