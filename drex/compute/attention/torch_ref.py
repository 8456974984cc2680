"""The reference attention backend: torch's scaled_dot_product_attention, one request at a time.

K/V that lie in one run of cells are read as views, the others are gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drex.compute.kv import KVPool, KVTables
from drex.control.plan import IntArray, Pass


class _Reader(NamedTuple):
    """One span: its rows in the queries, what they see, and its K/V by part.

    `parts` has, for each part, either the pool's views, where the entries lie in one `run`; or (entries, own) to gather
    from.
    """

    start: int
    stop: int
    mask: Tensor | None
    parts: list[tuple[Tensor, ...]]
    run: bool


class TorchAttention:
    """Attention of one pass: built once, then called once a layer.

    Args:
        pool: K/V memory.
        tables: that have heard of the pass's fresh entries.
        batch: the pass; the full rows of its spans lie one after the other in the queries.
        heads, kv_heads: of the decoder.
    """

    def __init__(self, pool: KVPool, tables: KVTables, batch: Pass, heads: int, kv_heads: int) -> None:
        self.pool, self.heads, self.kv_heads = pool, heads, kv_heads
        self._readers: list[_Reader] = []
        context, sizes = batch.context, batch.sizes
        rows = sizes.cumsum()
        # A single row that sees all entries, as in decoding, needs no mask; the others are looked at one by one.
        alone = sizes == 1
        alone[alone] = batch.visible[rows[alone] - 1] == context.lengths[alone]
        columns = (sizes, rows, context.lengths, context.seats, context.in_run, alone)
        for size, stop, length, seat, run, single, starts in zip(
            *(column.tolist() for column in columns), context.starts.T.tolist(), strict=True
        ):
            if size:
                start = stop - size
                mask = None if single else _mask(batch.visible[start:stop], length, pool.keys.device)
                parts = (
                    [pool.views(first, length) for first in starts]
                    if run
                    else self._scattered(tables, batch.segment, seat, length)
                )
                self._readers.append(_Reader(start, stop, mask, parts, run))

    @staticmethod
    def _scattered(tables: KVTables, segment: int, seat: int, length: int) -> list[tuple[Tensor, ...]]:
        own = ~tables.aliased[segment][seat, :length]
        return [(part, own) for part in tables.cells[segment][:, seat, :length].unbind(0)]

    def forward(self, part: int, plane: int, queries: Tensor) -> Tensor:
        """Shapes: queries (rows, heads, head_dim) -> (rows, heads * head_dim)."""
        rows, _, head_dim = queries.shape
        # The query heads of a group share K/V: for a single row they are its group's queries, and no mask is needed.
        single = queries.reshape(rows, 1, self.kv_heads, self.heads // self.kv_heads, head_dim).unbind(0)
        out = []
        for reader in self._readers:
            k, v = self._keys_values(reader, part, plane)
            if reader.stop - reader.start == 1 and reader.mask is None:
                attended = F.scaled_dot_product_attention(single[reader.start], k, v)
            else:
                q = queries[reader.start : reader.stop].transpose(0, 1).unsqueeze(0)
                causal = reader.mask is None
                grouped = self.heads != self.kv_heads
                attended = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=reader.mask, is_causal=causal, enable_gqa=grouped
                ).transpose(1, 2)
            out.append(attended.reshape(-1, self.heads * head_dim))
        return torch.cat(out) if out else queries.new_empty(0, self.heads * head_dim)

    def _keys_values(self, reader: _Reader, part: int, plane: int) -> tuple[Tensor, Tensor]:
        found = reader.parts[part]
        if reader.run:
            return found[plane], found[self.pool.planes + plane]
        entries, own = found
        slots = torch.where(own, entries + plane * self.pool.num_cells, entries)
        k = self.pool.keys.flatten(0, 1).index_select(0, slots)
        v = self.pool.values.flatten(0, 1).index_select(0, slots)
        return k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)


def _mask(visible: IntArray, entries: int, device: torch.device) -> Tensor | None:
    """Which entries each row sees, (1, 1, rows, entries).

    None where the rows are all the entries, so that plain causal attention serves.
    """
    if len(visible) == entries and visible[0] == 1:
        return None
    limits = torch.from_numpy(visible).to(device)
    return (torch.arange(entries, device=device)[None] < limits[:, None])[None, None]
