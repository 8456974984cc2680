"""The exit check behind the head's matrix product: one read of the logits gives all that a verdict is made of.

Two kernels: the vocabulary is split over programs, which matters when few rows are checked, and a second one joins the
parts. Drawing a token takes the row's noise from its key as `drex.compute.noise` does, number for number.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from drex.compute.transfer import put
from drex.control.hashing import GOLDEN, MIX, Hashes

COLUMNS = ("argmax", "best", "second", "log_sum_exp", "mean")
"""What is found in a row of logits."""
BLOCK = 2048
FEWEST_PROGRAMS = 264
"""Two for each multiprocessor of a large GPU: with fewer rows than that the vocabulary is split."""
_GOLDEN = tl.constexpr(GOLDEN)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = (tl.constexpr(shift) for shift, _ in MIX)
_FACTOR_1, _FACTOR_2, _FACTOR_3 = (tl.constexpr(factor) for _, factor in MIX)


class FusedReductions:
    """The reductions of `drex.compute.sampler`, each in one read of the logits."""

    def prepare(self, logits: Tensor) -> Tensor:
        """As they are: kernels widen what they read."""
        return logits

    def summarise(self, logits: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """All columns, whatever is wanted. Shapes: logits (rows, vocab), columns (rows,), float64."""
        rows, vocab = logits.shape
        splits = _splits(rows, vocab)
        parts = torch.empty(rows, splits, 4, device=logits.device, dtype=torch.float32)
        where = torch.empty(rows, splits, device=logits.device, dtype=torch.int32)
        out = torch.empty(rows, len(COLUMNS), device=logits.device, dtype=torch.float64)
        block = min(BLOCK, triton.next_power_of_2(vocab))
        _summarise[(rows, splits)](logits, parts, where, vocab, SPLITS=splits, BLOCK=block)
        _conclude[(rows,)](parts, where, out, SPLITS=splits, COLUMNS=len(COLUMNS))
        return dict(zip(COLUMNS, out.unbind(1), strict=True))

    def draw(self, logits: Tensor, best: Tensor, temperatures: Tensor, keys: Hashes) -> Tensor:
        """Tokens. Shapes: logits (rows, vocab), best and temperatures (rows,)."""
        rows, vocab = logits.shape
        splits = _splits(rows, vocab)
        parts = torch.empty(rows, splits, device=logits.device, dtype=torch.float64)
        where = torch.empty(rows, splits, device=logits.device, dtype=torch.int32)
        tokens = torch.empty(rows, device=logits.device, dtype=torch.int64)
        hashes = put(torch.from_numpy(keys.view(np.int64)), logits.device)
        block = min(BLOCK, triton.next_power_of_2(vocab))
        grid = (rows, splits)
        _draw[grid](logits, best.float(), temperatures, hashes, parts, where, vocab, SPLITS=splits, BLOCK=block)
        _pick[(rows,)](parts, where, tokens, SPLITS=splits)
        return tokens


def _splits(rows: int, vocab: int) -> int:
    wanted = triton.next_power_of_2(max(1, FEWEST_PROGRAMS // max(1, rows)))
    return int(min(wanted, triton.next_power_of_2(triton.cdiv(vocab, BLOCK)), 64))


@triton.jit
def _span(vocab, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    chunk = tl.cdiv(tl.cdiv(vocab, SPLITS), BLOCK) * BLOCK
    low = split * chunk
    return low, tl.minimum(low + chunk, vocab)


@triton.jit
def _summarise(logits, parts, where, vocab, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    low, high = _span(vocab, split, SPLITS, BLOCK)
    best, second, total, weighted = float("-inf"), float("-inf"), 0.0, 0.0
    argmax = 0
    for begin in range(low, high, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < high
        x = tl.load(logits + row * vocab + column, mask=inside, other=float("-inf")).to(tl.float32)
        top = tl.max(x)
        at = tl.min(tl.where(x == top, column, vocab))
        runner_up = tl.max(tl.where(column == at, float("-inf"), x))
        second = tl.maximum(tl.minimum(best, top), tl.maximum(second, runner_up))
        argmax = tl.where(top > best, at, argmax)
        higher = tl.maximum(best, top)
        fade, e = tl.exp(best - higher), tl.exp(x - higher)
        total = total * fade + tl.sum(e)
        weighted = weighted * fade + tl.sum(e * tl.where(inside, x, 0.0))
        best = higher
    place = row * SPLITS + split
    tl.store(where + place, argmax)
    tl.store(parts + place * 4, best)
    tl.store(parts + place * 4 + 1, second)
    tl.store(parts + place * 4 + 2, total)
    tl.store(parts + place * 4 + 3, weighted)


@triton.jit
def _conclude(parts, where, out, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = row * SPLITS + tl.arange(0, SPLITS)
    best, second = tl.load(parts + place * 4), tl.load(parts + place * 4 + 1)
    top = tl.max(best)
    at = tl.min(tl.where(best == top, tl.arange(0, SPLITS), SPLITS))
    others = tl.max(tl.where(tl.arange(0, SPLITS) == at, float("-inf"), best))
    fade = tl.exp(best - top)
    total = tl.sum(tl.load(parts + place * 4 + 2) * fade)
    weighted = tl.sum(tl.load(parts + place * 4 + 3) * fade)
    tl.store(out + row * COLUMNS, tl.load(where + row * SPLITS + at).to(tl.float64))
    tl.store(out + row * COLUMNS + 1, top.to(tl.float64))
    tl.store(out + row * COLUMNS + 2, tl.maximum(others, tl.max(second)).to(tl.float64))
    tl.store(out + row * COLUMNS + 3, (tl.log(total) + top).to(tl.float64))
    tl.store(out + row * COLUMNS + 4, (weighted / total).to(tl.float64))


@triton.jit
def _gumbel(key, column):
    state = key + (column + 1).to(tl.uint64) * _GOLDEN
    state = (state ^ (state >> _SHIFT_1)) * _FACTOR_1
    state = (state ^ (state >> _SHIFT_2)) * _FACTOR_2
    state = (state ^ (state >> _SHIFT_3)) * _FACTOR_3
    u = ((state >> 12).to(tl.float64) + 0.5) / 4503599627370496.0
    return -tl.log(-tl.log(u))


@triton.jit
def _draw(logits, peaks, temperatures, keys, parts, where, vocab, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    low, high = _span(vocab, split, SPLITS, BLOCK)
    peak, temperature = tl.load(peaks + row), tl.load(temperatures + row)
    key = tl.load(keys + row).to(tl.uint64, bitcast=True)
    best = tl.full((), float("-inf"), tl.float64)
    argmax = 0
    for begin in range(low, high, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < high
        x = tl.load(logits + row * vocab + column, mask=inside, other=float("-inf")).to(tl.float32)
        value = tl.div_rn(x - peak, temperature).to(tl.float64) + _gumbel(key, column)
        top = tl.max(value)
        at = tl.min(tl.where(value == top, column, vocab))
        argmax = tl.where(top > best, at, argmax)
        best = tl.maximum(best, top)
    tl.store(parts + row * SPLITS + split, best)
    tl.store(where + row * SPLITS + split, argmax)


@triton.jit
def _pick(parts, where, tokens, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    values = tl.load(parts + row * SPLITS + split)
    at = tl.min(tl.where(values == tl.max(values), split, SPLITS))
    tl.store(tokens + row, tl.load(where + row * SPLITS + at).to(tl.int64))
