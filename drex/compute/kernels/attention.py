"""Attention of a pass's rows over K/V entries that lie in runs of cells or are found through tables.

Rows of one request come in tiles, so that a read of its K/V serves several rows and all query heads of a K/V head. The
context of a tile is split over programs, which matters when few requests with long contexts decode; a second kernel
joins the parts (flash decoding, Dao et al. 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """Which rows each program takes, and where the K/V of their request lie. Unused tiles have no rows.

    Attributes:
        first, rows: of the pass's full rows. Shape (tiles,).
        seats: of the requests. (tiles,).
        in_run: whether the entries lie in consecutive cells; else the tables tell. (tiles,).
        starts: the first cell, where they do, for each part. (parts, tiles).
        visible: how many entries each row attends to. (full rows,).
    """

    first: Tensor
    rows: Tensor
    seats: Tensor
    in_run: Tensor
    starts: Tensor
    visible: Tensor


class Partial(NamedTuple):
    """Room for what splits of the context give: weighted values (rows, heads, splits, head_dim), maxima and sums."""

    values: Tensor
    peaks: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, rows: int, heads: int, splits: int, head_dim: int, device: torch.device) -> Partial:
        """Room for so many rows."""
        shape = (rows, heads, splits)
        return cls(
            torch.empty(*shape, head_dim, device=device, dtype=torch.float32),
            torch.empty(shape, device=device, dtype=torch.float32),
            torch.empty(shape, device=device, dtype=torch.float32),
        )


def rows_per_tile(heads: int, kv_heads: int, widest: int) -> int:
    """Rows that a tile of at most `widest` queries takes."""
    return max(1, widest // (heads // kv_heads))


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    plane: int,
    part: int,
    table: Tensor,
    aliased: Tensor,
    tiles: Tiles,
    tile_rows: int,
    splits: int,
    partial: Partial | None,
    out: Tensor,
) -> None:
    """Write each row's attention to `out`.

    Args:
        queries: (rows, heads, head_dim), rotated.
        keys, values: the pool, (planes, cells, kv_heads, head_dim).
        plane, part: of the layer.
        table, aliased: of the part, (seats, room) each.
        tiles: of the pass.
        tile_rows: the most rows that a tile has.
        splits: of each context, a power of two; from 2 on `partial` is needed.
        out: (rows, heads * head_dim).
    """
    rows, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    block_m = max(16, triton.next_power_of_2(tile_rows * group))
    wide = queries.element_size() > 2
    block_n = 32 if wide or block_m > 64 else 64
    assert splits == 1 or partial is not None
    to, peaks, sums = (out, out, out) if partial is None or splits == 1 else partial
    _attend[(len(tiles.first), kv_heads, splits)](
        *(queries, keys, values, table, aliased),
        *(tiles.first, tiles.rows, tiles.seats, tiles.in_run, tiles.starts[part], tiles.visible),
        *(to, peaks, sums),
        *(plane, keys.shape[1], table.shape[1]),
        scale=LOG2_E / head_dim**0.5,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        SPLITS=splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        WIDE=wide or queries.device.type == "cpu",
        num_warps=8 if block_m > 64 else 4,
    )
    if splits > 1:
        _join[(rows * heads,)](
            to, peaks, sums, out, SPLITS=splits, HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim)
        )


@triton.jit(do_not_specialize=["plane", "num_cells", "room"])
def _attend(
    queries,
    keys,
    values,
    table,
    aliased,
    tile_first,
    tile_rows,
    tile_seats,
    tile_in_run,
    tile_starts,
    visible,
    out,
    peaks,
    sums,
    plane,
    num_cells,
    room,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(tile_rows + tile)
    if count == 0:
        return
    first, seat = tl.load(tile_first + tile), tl.load(tile_seats + tile).to(tl.int64)
    in_run, start = tl.load(tile_in_run + tile), tl.load(tile_starts + tile)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row, head = first + m // GROUP, kv_head * GROUP + m % GROUP
    mine, wanted = m // GROUP < count, d < HEAD_DIM
    at = (row * HEADS + head).to(tl.int64)
    q = tl.load(queries + at[:, None] * HEAD_DIM + d[None], mask=mine[:, None] & wanted[None], other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    sees = tl.load(visible + row, mask=mine, other=0)
    longest = tl.max(sees)
    chunk = tl.cdiv(tl.cdiv(longest, SPLITS), BLOCK_N) * BLOCK_N
    low = split * chunk
    high = tl.minimum(low + chunk, longest)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    gathered = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    own = plane.to(tl.int64) * num_cells
    for begin in range(low, high, BLOCK_N):
        entry = begin + tl.arange(0, BLOCK_N)
        there = entry < high
        if in_run != 0:
            slot = own + start + entry
        else:
            where = seat * room + entry
            cell = tl.load(table + where, mask=there, other=0).to(tl.int64)
            # An aliased entry names a slot of any plane, an own one its cell.
            slot = cell + tl.where(tl.load(aliased + where, mask=there, other=0) != 0, 0, own)
        lane = ((slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + d[None]
        used = there[:, None] & wanted[None]
        k = tl.load(keys + lane, mask=used, other=0.0)
        v = tl.load(values + lane, mask=used, other=0.0)
        if WIDE:
            k, v = k.to(tl.float32), v.to(tl.float32)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(there[None] & (entry[None] < sees[:, None]), score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        # A row may see nothing of a block that others of its tile see.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - level[:, None])
        fade = tl.exp2(peak - level)
        total = total * fade + tl.sum(weight, 1)
        gathered = gathered * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = higher
    kept = mine[:, None] & wanted[None]
    if SPLITS == 1:
        result = gathered / total[:, None]
        tl.store(out + at[:, None] * HEAD_DIM + d[None], result.to(out.dtype.element_ty), mask=kept)
    else:
        place = at * SPLITS + split
        tl.store(out + place[:, None] * HEAD_DIM + d[None], gathered, mask=kept)
        tl.store(peaks + place, peak, mask=mine)
        tl.store(sums + place, total, mask=mine)


@triton.jit
def _join(
    partial,
    peaks,
    sums,
    out,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    wanted = d < HEAD_DIM
    peak = tl.load(peaks + at * SPLITS + split)
    weight = tl.exp2(peak - tl.max(peak))
    total = tl.sum(weight * tl.load(sums + at * SPLITS + split))
    values = tl.load(partial + (at * SPLITS + split)[:, None] * HEAD_DIM + d[None], mask=wanted[None], other=0.0)
    result = tl.sum(values * weight[:, None], 0) / total
    tl.store(out + at * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=wanted)
