"""What a decoder layer does beside its matrix products and attention: norms, rotary embedding and K/V write, SiLU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MOST = 1024
"""Columns of a program of `gate`."""


def enter(source: Tensor, index: Tensor, weight: Tensor, eps: float, hidden: Tensor, normed: Tensor) -> None:
    """Gather rows and norm them: the first read of a segment.

    Shapes: source (any, width), index (rows,) -> hidden and normed (rows, width).
    """
    rows, width = hidden.shape
    block = triton.next_power_of_2(width)
    _enter[(rows,)](source, index, weight, hidden, normed, eps, WIDTH=width, BLOCK=block, num_warps=_warps(block))


def add_norm(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float, normed: Tensor) -> None:
    """Add `delta` to the first rows of `hidden`, in place, and norm all of them into `normed`.

    Shapes: hidden and normed (rows, width), delta (up to rows, width).
    """
    rows, width = hidden.shape
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        hidden, delta, weight, normed, len(delta), eps, WIDTH=width, BLOCK=block, num_warps=_warps(block)
    )


def leave(hidden: Tensor, delta: Tensor, arena: Tensor, index: Tensor, counts: Tensor) -> None:
    """Add `delta` to `hidden`, in place, and put the full rows into the arena.

    Shapes: hidden and delta (rows, width), index (rows,), arena (any, width).
    """
    rows, width = hidden.shape
    block = triton.next_power_of_2(width)
    _leave[(rows,)](hidden, delta, arena, index, counts, WIDTH=width, BLOCK=block, num_warps=_warps(block))


def rotate_and_write(
    fused: Tensor,
    positions: Tensor,
    cells: Tensor,
    counts: Tensor,
    full: int,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    plane: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Rotate (and, where `norms` of q and k are given, norm) queries and keys; keys and values go to their cells.

    K/V-only rows start at row `full`; of each kind the first `counts` rows are there.
    Shapes: fused (rows, heads + 2 kv_heads, head_dim), positions and cells (rows,), cos and sin (positions,
    head_dim / 2), queries (rows, heads, head_dim), keys and values (planes, cells, kv_heads, head_dim).
    """
    rows, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    weights = norms or (cos, cos)
    _rotate_and_write[(rows, heads + 2 * kv_heads)](
        *(fused, positions, cells, counts, cos, sin, *weights, queries, keys, values),
        *(full, plane, keys.shape[1], eps),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        NORM=norms is not None,
        num_warps=1,
    )


def gate(gate_up: Tensor, out: Tensor) -> None:
    """SiLU(gate) * up. Shapes: gate_up (rows, 2 width) -> out (rows, width)."""
    rows, width = out.shape
    block = min(MOST, triton.next_power_of_2(width))
    _gate[(rows, triton.cdiv(width, block))](gate_up, out, WIDTH=width, BLOCK=block)


def _warps(block: int) -> int:
    return min(8, max(1, block // 512))


@triton.jit
def _normed(x, weight, eps, WIDTH: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x) / WIDTH + eps) * weight


@triton.jit
def _enter(source, index, weight, hidden, normed, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = tl.load(index + row).to(tl.int64)
    x = tl.load(source + place * WIDTH + column, mask=inside, other=0.0)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden + row * WIDTH + column, x, mask=inside)
    out = _normed(x.to(tl.float32), w, eps, WIDTH)
    tl.store(normed + row * WIDTH + column, out.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["added"])
def _add_norm(hidden, delta, weight, normed, added, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(hidden + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if row < added:
        x += tl.load(delta + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(hidden + row * WIDTH + column, x.to(hidden.dtype.element_ty), mask=inside)
        # What is normed is what the next reader of the hidden state sees.
        x = x.to(hidden.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    out = _normed(x, w, eps, WIDTH)
    tl.store(normed + row * WIDTH + column, out.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _leave(hidden, delta, arena, index, counts, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(counts):
        return
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(hidden + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(delta + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    out = x.to(hidden.dtype.element_ty)
    tl.store(hidden + row * WIDTH + column, out, mask=inside)
    place = tl.load(index + row).to(tl.int64)
    tl.store(arena + place * WIDTH + column, out, mask=inside)


@triton.jit
def _either(first, one, other, inside):
    read = tl.where(first, tl.load(one, mask=inside, other=0.0), tl.load(other, mask=inside, other=0.0))
    return read.to(tl.float32)


@triton.jit(do_not_specialize=["full", "plane", "num_cells"])
def _rotate_and_write(
    fused,
    positions,
    cells,
    counts,
    cos,
    sin,
    q_norm,
    k_norm,
    queries,
    keys,
    values,
    full,
    plane,
    num_cells,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    behind = row >= full
    if row - tl.where(behind, full, 0) >= tl.load(counts + behind.to(tl.int32)):
        return
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    source = fused + (row * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF)
    first = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + column, mask=inside, other=0.0).to(tl.float32)
    slot = plane.to(tl.int64) * num_cells + tl.load(cells + row)
    if head < HEADS + KV_HEADS:
        if NORM:
            scale = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / (2 * HALF) + eps)
            low = _either(head < HEADS, q_norm + column, k_norm + column, inside)
            high = _either(head < HEADS, q_norm + HALF + column, k_norm + HALF + column, inside)
            first, second = first * scale * low, second * scale * high
        place = tl.load(positions + row).to(tl.int64) * HALF
        c = tl.load(cos + place + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + place + column, mask=inside, other=0.0).to(tl.float32)
        rotated = first * c - second * s
        second = second * c + first * s
        first = rotated
        if head < HEADS:
            to = queries + (row * HEADS + head) * (2 * HALF)
        else:
            to = keys + (slot * KV_HEADS + head - HEADS) * (2 * HALF)
    else:
        to = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * (2 * HALF)
    tl.store(to + column, first.to(queries.dtype.element_ty), mask=inside)
    tl.store(to + HALF + column, second.to(queries.dtype.element_ty), mask=inside)


@triton.jit
def _gate(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    source = gate_up + row * (2 * WIDTH) + column
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    result = x * tl.sigmoid(x) * up
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=inside)
