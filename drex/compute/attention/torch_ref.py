"""The reference attention backend: torch's scaled_dot_product_attention, one request at a time.

K/V that lie in one run of cells are read as views, the others are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from drex.compute.kv import KVPool
from drex.control.plan import Context, Run, Scattered, Span


class TorchAttention:
    """Attention of one pass: built from its spans, then called once a layer.

    Args:
        pool: K/V memory.
        spans: of the pass; their full rows lie one after the other in the queries.
        heads, kv_heads: of the decoder.
    """

    def __init__(self, pool: KVPool, spans: Sequence[Span], heads: int, kv_heads: int) -> None:
        self.pool, self.heads, self.kv_heads = pool, heads, kv_heads
        self._spans: list[tuple[int, int, tuple[Context, ...], Tensor | None]] = []
        self._gathers: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        device = pool.keys.device
        start = 0
        for span in spans:
            if not len(span.full):
                continue
            stop = start + len(span.full)
            self._spans.append((start, stop, span.context, _mask(span, device)))
            for part, context in enumerate(span.context):
                if isinstance(context, Scattered):
                    entries = torch.from_numpy(context.entries).to(device)
                    own = torch.from_numpy(~context.aliased).to(device)
                    self._gathers[len(self._spans) - 1, part] = entries, own
            start = stop
        self._rows = start

    def forward(self, part: int, plane: int, queries: Tensor) -> Tensor:
        """Shapes: queries (rows, heads, head_dim) -> (rows, heads * head_dim)."""
        head_dim = queries.shape[-1]
        out = torch.empty_like(queries)
        keys, values = self.pool.keys[plane], self.pool.values[plane]
        slot_size, kv = keys.stride(0), self.kv_heads
        group = self.heads // kv
        for number, (start, stop, contexts, mask) in enumerate(self._spans):
            context = contexts[part]
            rows = stop - start
            if isinstance(context, Run):
                # as_strided makes the (1, kv_heads, entries, head_dim) view in one step: this loop is the hot path.
                size, stride = (1, kv, context.count, head_dim), (0, head_dim, slot_size, 1)
                k = keys.as_strided(size, stride, keys.storage_offset() + context.start * slot_size)
                v = values.as_strided(size, stride, values.storage_offset() + context.start * slot_size)
            else:
                k, v = self._gather(number, part, plane)
            if rows == 1 and mask is None:
                # The query heads of a group share K/V: they are this group's queries, and no mask is needed.
                q = queries[start].view(1, kv, group, head_dim)
                out[start] = F.scaled_dot_product_attention(q, k, v).view(self.heads, head_dim)
                continue
            q = queries[start:stop].transpose(0, 1).unsqueeze(0)
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=group > 1
            )
            out[start:stop] = attended[0].transpose(0, 1)
        return out.view(self._rows, self.heads * head_dim)

    def _gather(self, number: int, part: int, plane: int) -> tuple[Tensor, Tensor]:
        entries, own = self._gathers[number, part]
        slots = torch.where(own, entries + plane * self.pool.num_cells, entries)
        k = self.pool.keys.flatten(0, 1).index_select(0, slots)
        v = self.pool.values.flatten(0, 1).index_select(0, slots)
        return k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)


def _mask(span: Span, device: torch.device) -> Tensor | None:
    """Which entries each row sees, (1, 1, rows, entries).

    None where one row sees all of them, or where the rows are all the entries, so that plain causal attention serves.
    """
    first = span.context[0]
    entries = first.count if isinstance(first, Run) else len(first.entries)
    rows = len(span.full)
    sees_all = rows == 1 and int(span.full.visible[0]) == entries
    if sees_all or (rows == entries and int(span.full.visible[0]) == 1):
        return None
    visible = torch.from_numpy(span.full.visible).to(device)
    return (torch.arange(entries, device=device)[None] < visible[:, None])[None, None]
