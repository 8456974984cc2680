"""The reference attention backend: torch's scaled_dot_product_attention, one request at a time.

K/V that lie in one run of cells are read as views, the others are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drex.compute.kv import KVPool, KVTables
from drex.control.plan import IntArray, Pass

FOLDED = 8
"""Rows of the longest span whose query heads that share K/V become rows of one product: from half to nine tenths of the
time, and no less for more rows than these."""


class _Reader(NamedTuple):
    """One span: its rows in the queries, what they see, and its K/V by part of the segments that are read alike.

    `folded` says whether query heads that share K/V are rows of one product; the mask is that of these rows then.
    `parts` has, for each part, either the pool's views, where the entries lie in one `run`; or (entries, own) to gather
    from.
    """

    start: int
    stop: int
    mask: Tensor | None
    folded: bool
    parts: list[tuple[Tensor, ...]]
    run: bool


class TorchAttention:
    """Attention of one pass: built once for all its segments, then called once a layer.

    Args:
        pool: K/V memory.
        tables: that have heard of the pass's fresh entries, at all segments.
        batch: the pass; the full rows of its spans lie one after the other in the queries.
        heads, kv_heads: of the decoder.
        shortest: rows; spans of fewer are left to others.
    """

    def __init__(
        self, pool: KVPool, tables: KVTables, batch: Pass, heads: int, kv_heads: int, shortest: int = 1
    ) -> None:
        self._shortest = shortest
        self.pool, self.heads, self.kv_heads, self.group = pool, heads, kv_heads, heads // kv_heads
        # torch's products of one row in 16 bit take 3 to 4 times as long on a CPU as widening K/V and doing it in 32.
        self._widened = self.group == 1 and pool.keys.device.type == "cpu" and pool.keys.dtype.itemsize == 2
        # Who reads each part, counted through all segments, and its number among theirs.
        self._parts: list[tuple[list[_Reader], int]] = []
        segments = batch.parts
        for group in [segments] if _read_alike(segments) else [[each] for each in segments]:
            readers = self._read(tables, group)
            self._parts += [(readers, number) for number in range(sum(len(each.context.starts) for each in group))]

    def _read(self, tables: KVTables, segments: Sequence[Pass]) -> list[_Reader]:
        """The spans of segments that are read alike."""
        batch, out = segments[0], []
        context, sizes = batch.context, batch.sizes
        rows = sizes.cumsum()
        # A single row that sees all entries, as in decoding, needs no mask; the others are looked at one by one.
        alone = sizes == 1
        alone[alone] = batch.visible[rows[alone] - 1] == context.lengths[alone]
        columns = (sizes, rows, context.lengths, context.seats, context.in_run, alone)
        first_cells = np.concatenate([each.context.starts for each in segments])
        for size, stop, length, seat, run, single, starts in zip(
            *(column.tolist() for column in columns), first_cells.T.tolist(), strict=True
        ):
            if size >= self._shortest:
                start = stop - size
                mask = None if single else _mask(batch.visible[start:stop], length, self.pool.keys)
                folded = mask is not None and self.group > 1 and size <= FOLDED
                if mask is not None and folded:
                    mask = mask.repeat(1, 1, self.group, 1)
                parts = (
                    [self.pool.views(first, length) for first in starts]
                    if run
                    else self._scattered(tables, batch.segment, seat, length)
                )
                out.append(_Reader(start, stop, mask, folded, parts, run))
        return out

    @staticmethod
    def _scattered(tables: KVTables, segment: int, seat: int, length: int) -> list[tuple[Tensor, ...]]:
        own = ~tables.aliased[segment][seat, :length]
        return [(part, own) for part in tables.cells[segment][:, seat, :length].unbind(0)]

    def forward(self, part: int, plane: int, queries: Tensor, out: Tensor | None = None) -> Tensor:
        """Attention of one layer.

        Args:
            part, plane: the layer's part, counted through all segments of the pass, and its place there.
            queries: (rows, heads, head_dim).
            out: (rows, heads * head_dim) to write to; rows of spans that are left to others are not written.
        """
        readers, number = self._parts[part]
        rows, _, head_dim = queries.shape
        # The query heads of a group share K/V: for a single row they are its group's queries, and no mask is needed.
        grouped = queries.reshape(rows, 1, self.kv_heads, self.group, head_dim)
        single = grouped.unbind(0)
        if out is None:
            out = queries.new_empty(rows, self.heads * head_dim)
        for reader in readers:
            k, v = self._keys_values(reader, number, plane)
            if reader.folded:
                attended = _folded(grouped[reader.start : reader.stop], k, v, reader.mask)
            elif reader.mask is None and reader.stop - reader.start == 1:
                attended = self._of_one(single[reader.start], k, v)
            else:
                q = queries[reader.start : reader.stop].transpose(0, 1).unsqueeze(0)
                causal = reader.mask is None
                attended = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=reader.mask, is_causal=causal, enable_gqa=self.group > 1
                ).transpose(1, 2)
            out[reader.start : reader.stop] = attended.reshape(-1, self.heads * head_dim)
        return out

    def _of_one(self, query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._widened:
            return F.scaled_dot_product_attention(query.float(), k.float(), v.float()).to(query.dtype)
        return F.scaled_dot_product_attention(query, k, v)

    def _keys_values(self, reader: _Reader, number: int, plane: int) -> tuple[Tensor, Tensor]:
        found = reader.parts[number]
        if reader.run:
            return found[plane], found[self.pool.planes + plane]
        entries, own = found
        slots = torch.where(own, entries + plane * self.pool.num_cells, entries)
        k = self.pool.keys.flatten(0, 1).index_select(0, slots)
        v = self.pool.values.flatten(0, 1).index_select(0, slots)
        return k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)


def _folded(queries: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Shapes: queries (rows, 1, kv_heads, group, head_dim) -> (rows, kv_heads, group, head_dim)."""
    rows, one, kv_heads, group, head_dim = queries.shape
    folded = queries.permute(1, 2, 3, 0, 4).reshape(one, kv_heads, group * rows, head_dim)
    attended = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
    return attended.view(kv_heads, group, rows, head_dim).permute(2, 0, 1, 3)


def _read_alike(segments: Sequence[Pass]) -> bool:
    """Whether a pass's rows see as many entries at all its segments, each part's in one run."""
    first, *others = (each.context for each in segments)
    return not others or all(each.in_run.all() and (each.lengths == first.lengths).all() for each in (first, *others))


def _mask(visible: IntArray, entries: int, like: Tensor) -> Tensor | None:
    """What is added to the scores: 0 where a row sees an entry, else -inf. (1, 1, rows, entries).

    None where the rows are all the entries, so that plain causal attention serves. A mask of truth values would be
    made into this one in every layer.
    """
    if len(visible) == entries and visible[0] == 1:
        return None
    limits = torch.from_numpy(visible).to(like.device)
    hidden = torch.arange(entries, device=like.device)[None] >= limits[:, None]
    return like.new_zeros(1, 1, *hidden.shape).masked_fill_(hidden, -torch.inf)
