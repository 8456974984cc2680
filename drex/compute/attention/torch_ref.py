"""The reference attention backend: torch's scaled_dot_product_attention, one request at a time.

K/V that lie in one run of cells are read as views, the others are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from drex.compute.kv import KVPool, KVTables
from drex.control.plan import IntArray, Pass

Views = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Reader:
    """One span's part: its rows in the queries, what they see, and its K/V by part.

    `parts` has, for each part, either (keys, values), each a view a plane of shape (1, kv_heads, entries, head_dim),
    where the entries lie in one `run`; or (entries, own) to gather from.
    """

    start: int
    stop: int
    mask: Tensor | None
    parts: tuple[Views | tuple[Tensor, Tensor], ...]
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
        context = batch.context
        lengths, starts, seats = context.lengths.tolist(), context.starts.T.tolist(), context.seats.tolist()
        runs = context.in_run.tolist()
        row = 0
        for span, (size, length) in enumerate(zip(batch.sizes.tolist(), lengths, strict=True)):
            if size:
                parts = (
                    self._runs(starts[span], length)
                    if runs[span]
                    else self._scattered(tables, batch.segment, seats[span], length)
                )
                mask = _mask(batch.visible[row : row + size], length, pool.keys.device)
                self._readers.append(_Reader(row, row + size, mask, parts, runs[span]))
                row += size

    def _runs(self, starts: Sequence[int], length: int) -> tuple[Views, ...]:
        return tuple(_views(self.pool.memory, start, length) for start in starts)

    @staticmethod
    def _scattered(tables: KVTables, segment: int, seat: int, length: int) -> tuple[tuple[Tensor, Tensor], ...]:
        own = ~tables.aliased[segment][seat, :length]
        return tuple((part, own) for part in tables.cells[segment][:, seat, :length].unbind(0))

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
        first, second = reader.parts[part]
        if reader.run:
            return first[plane], second[plane]
        assert isinstance(first, Tensor)
        assert isinstance(second, Tensor)
        slots = torch.where(second, first + plane * self.pool.num_cells, first)
        k = self.pool.keys.flatten(0, 1).index_select(0, slots)
        v = self.pool.values.flatten(0, 1).index_select(0, slots)
        return k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)


def _views(memory: Tensor, start: int, length: int) -> Views:
    """Keys and values in consecutive cells at every plane, each (1, kv_heads, length, head_dim), made in one step.

    memory: (2, planes, cells, kv_heads, head_dim).
    """
    _, planes, _, kv_heads, head_dim = memory.shape
    _, plane, cell, head, _ = memory.stride()
    size, stride = (2 * planes, 1, kv_heads, length, head_dim), (plane, 0, head, cell, 1)
    views = memory.as_strided(size, stride, start * cell).unbind(0)
    return views[:planes], views[planes:]


def _mask(visible: IntArray, entries: int, device: torch.device) -> Tensor | None:
    """Which entries each row sees, (1, 1, rows, entries).

    None where one row sees all of them, or where the rows are all the entries, so that plain causal attention serves.
    """
    rows, first = len(visible), visible[0]
    sees_all = rows == 1 and first == entries
    if sees_all or (rows == entries and first == 1):
        return None
    limits = torch.from_numpy(visible).to(device)
    return (torch.arange(entries, device=device)[None] < limits[:, None])[None, None]
