"""K/V memory: one pool of slots for all layers, addressed by the cells of `control.memory.slots`, and its tables."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from drex.compute.spec import ModelSpec
from drex.compute.transfer import put
from drex.control.memory.slots import SlotLayout
from drex.control.plan import Entries


class KVPool:
    """Keys and values of all slots.

    Slot number = plane * cells + cell, plane being a layer's place in its part; `keys` and `values` have shape
    (planes, cells, kv_heads, head_dim).
    """

    def __init__(
        self, spec: ModelSpec, layout: SlotLayout, num_cells: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (layout.layers_per_cell, num_cells, spec.num_kv_heads, spec.head_dim)
        self.memory = torch.empty(2, *shape, device=device, dtype=dtype)
        self.keys, self.values = self.memory
        self.planes, self.num_cells = layout.layers_per_cell, num_cells
        self._view_shape = (2 * self.planes, 1, spec.num_kv_heads, spec.head_dim)
        self._view_strides = self.memory.stride()

    def views(self, start: int, length: int) -> tuple[Tensor, ...]:
        """Keys at every plane, then values, of consecutive cells, each (1, kv_heads, length, head_dim)."""
        views, one, heads, head_dim = self._view_shape
        _, plane, cell, head, _ = self._view_strides
        # In one step: there are two views a request and layer.
        size, strides = (views, one, heads, length, head_dim), (plane, 0, head, cell, 1)
        return self.memory.as_strided(size, strides, start * cell).unbind(0)

    def write(self, plane: int, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store rows' K/V. Shapes: cells (rows,), keys and values (rows, kv_heads, head_dim)."""
        self.keys[plane].index_copy_(0, cells, keys)
        self.values[plane].index_copy_(0, cells, values)


class KVTables:
    """Where the entries of requests lie that lie in no run: what passes have told, by seat.

    Shapes, one tensor a segment: cells (parts, seats, room), slots where aliased (seats, room).
    """

    def __init__(self, layout: SlotLayout, seats: int, room: int, device: torch.device) -> None:
        # Zeros, since pages that nobody writes then take no memory.
        self.cells = [
            torch.zeros(layout.parts(segment), seats, room, device=device, dtype=torch.int32)
            for segment in range(len(layout.lengths))
        ]
        self.aliased = [torch.zeros(seats, room, device=device, dtype=torch.bool) for _ in layout.lengths]

    def hear(self, segment: int, fresh: Entries) -> None:
        """Take in entries."""
        if not len(fresh.seats):
            return
        cells, aliased = self.cells[segment], self.aliased[segment]
        told = np.vstack((fresh.seats, fresh.numbers, fresh.aliased, fresh.cells))
        seats, numbers, aliases, *parts = put(torch.from_numpy(told), cells.device)
        aliased[seats, numbers] = aliases.bool()
        for part, where in zip(cells, parts, strict=True):
            part[seats, numbers] = where.to(cells.dtype)
