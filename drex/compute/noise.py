"""Gumbel noise for sampling, as a pure function of (seed, sample, position, token)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from drex.compute.transfer import put
from drex.control.hashing import GOLDEN, MIX, Hashes


def gumbel(keys: Hashes, vocab_size: int, device: torch.device) -> Tensor:
    """Gumbel noise; adding it to log-probabilities and taking the argmax draws from the distribution.

    Args:
        keys: a 64-bit hash a row.
        vocab_size: columns.

    Returns:
        (rows, vocab_size), float64.
    """
    start = put(torch.from_numpy(keys.view(np.int64)), device)
    state = start[:, None] + torch.arange(1, vocab_size + 1, device=device) * _signed(GOLDEN)
    for shift, factor in MIX:
        state = (state ^ _shift_right(state, shift)) * _signed(factor)
    u = (_shift_right(state, 12).double() + 0.5) / 2**52
    out: Tensor = -torch.log(-torch.log(u))
    return out


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Logical shift of int64."""
    shifted: Tensor = (state >> bits) & (2 ** (64 - bits) - 1)
    return shifted
