"""The reference attention backend against attention computed row by row, in every way that it takes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_case import DEVICE, TOLERANCE, Case, assert_near

from drex.compute.attention.torch_ref import FOLDED, TorchAttention
from drex.compute.kv import KVPool


def attended(case):
    heads = case.queries.shape[1]
    planes, cells, kv_heads, head_dim = case.keys.shape
    spec, layout = SimpleNamespace(num_kv_heads=kv_heads, head_dim=head_dim), SimpleNamespace(layers_per_cell=planes)
    pool = KVPool(spec, layout, cells, DEVICE, case.keys.dtype)
    pool.memory.copy_(torch.stack((case.keys, case.values)))
    tables = SimpleNamespace(cells=[case.table[None].to(DEVICE)], aliased=[case.aliased.to(DEVICE)])
    context = SimpleNamespace(
        lengths=np.array(case.lengths), seats=np.array(case.seats), in_run=case.in_run, starts=np.array([case.starts])
    )
    batch = SimpleNamespace(segment=0, sizes=case.sizes, visible=np.array(case.visible), context=context)
    batch.parts = [batch]
    return TorchAttention(pool, tables, batch, heads, kv_heads).forward(0, case.plane, case.queries)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("latest", [True, False], ids=["latest rows", "rows that see less"])
def test_rows_attend_to_what_they_see(dtype, heads, kv_heads, latest):
    spans = [(1, 1), (40, 1), (33, 1), (9, 2), (70, 3), (20, FOLDED), (50, FOLDED + 1), (12, 12), (30, 16), (5, 0)]
    lengths, sizes = zip(*spans, strict=True)
    case = Case(heads, lengths, sizes, heads, kv_heads, 16, dtype)
    if latest:
        case.visible = [length - size + 1 + row for length, size in spans for row in range(size)]
    else:
        # Each of a span sees more than the one before.
        rng = np.random.default_rng(1)
        chosen = [rng.choice(length, size, replace=False) + 1 for length, size in spans]
        case.visible = [seen for each in chosen for seen in np.sort(each).tolist()]
    assert_near(attended(case), case.expected(), dtype)
