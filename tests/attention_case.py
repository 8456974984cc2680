"""Attention over made-up contexts: what it should be, computed row by row in float64."""

from __future__ import annotations

import numpy as np
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def numbers(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_near(found, expected, dtype):
    """Relative to the largest number."""
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= TOLERANCE[dtype], float(error)


class Case:
    """Requests with contexts in runs, scattered, and with aliased entries; some rows of each attend."""

    def __init__(self, seed, lengths, sizes, heads, kv_heads, head_dim, dtype):
        rng = np.random.default_rng(seed)
        planes, self.plane = 2, 1
        cells = sum(lengths) + 7
        self.keys = numbers(planes, cells, kv_heads, head_dim, dtype=dtype, seed=seed)
        self.values = numbers(planes, cells, kv_heads, head_dim, dtype=dtype, seed=seed + 1)
        rows = sum(sizes)
        self.queries = numbers(rows, heads, head_dim, dtype=dtype, seed=seed + 2)
        seats, room = len(lengths) + 1, max(lengths) + 3
        self.table = torch.full((seats, room), cells - 1, dtype=torch.int32)
        self.aliased = torch.zeros(seats, room, dtype=torch.bool)
        free, start = rng.permutation(cells), 0
        self.in_run = rng.random(len(lengths)) < 0.4
        self.starts, self.seats, self.slots, visible = [], [], [], []
        for number, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
            seat = seats - 1 - number
            own = free[start : start + length].astype(np.int64)
            start += length
            if self.in_run[number]:
                own = int(rng.integers(0, cells - length + 1)) + np.arange(length)
            skipped = (rng.random(length) < 0.3) & ~self.in_run[number]
            slots = np.where(skipped, own, own + self.plane * cells)
            self.table[seat, :length] = torch.from_numpy(own.astype(np.int32))
            self.aliased[seat, :length] = torch.from_numpy(skipped)
            self.starts.append(int(own[0]))
            self.seats.append(seat)
            self.slots.append(torch.from_numpy(slots).to(DEVICE))
            # Some entries before a row may be absent, so what it sees need not be its position.
            visible.extend(sorted(rng.integers(1, length + 1, size=size).tolist()))
        self.visible, self.lengths, self.sizes = visible, lengths, np.array(sizes)

    def expected(self):
        rows = []
        keys, values = (each.flatten(0, 1).double() for each in (self.keys, self.values))
        group = self.queries.shape[1] // self.keys.shape[2]
        row = 0
        for slots, size in zip(self.slots, self.sizes.tolist(), strict=True):
            k, v = (each[slots].repeat_interleave(group, 1) for each in (keys, values))
            for _ in range(size):
                seen = self.visible[row]
                scores = torch.einsum("hd,ehd->he", self.queries[row].double(), k[:seen]) / k.shape[-1] ** 0.5
                rows.append(torch.einsum("he,ehd->hd", scores.softmax(-1), v[:seen]).flatten())
                row += 1
        return torch.stack(rows)
