"""K/V memory: one pool of slots for all layers, addressed by the cells of `drex.control.slots`."""

from __future__ import annotations

import torch
from torch import Tensor

from drex.compute.spec import ModelSpec
from drex.control.slots import SlotLayout


class KVPool:
    """Keys and values of all slots.

    Slot number = plane * cells + cell, plane being a layer's place in its part; `keys` and `values` have shape
    (planes, cells, kv_heads, head_dim).
    """

    def __init__(
        self, spec: ModelSpec, layout: SlotLayout, num_cells: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (layout.layers_per_cell, num_cells, spec.num_kv_heads, spec.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.num_cells = num_cells

    def write(self, plane: int, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store rows' K/V. Shapes: cells (rows,), keys and values (rows, kv_heads, head_dim)."""
        self.keys[plane].index_copy_(0, cells, keys)
        self.values[plane].index_copy_(0, cells, values)
