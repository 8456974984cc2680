"""Layers of a segment on a CPU: the C++ kernels around the matrix products."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drex.compute.attention.torch_ref import TorchAttention
from drex.compute.batch import PassTensors
from drex.compute.decoder import LayerWeights
from drex.compute.kv import KVTables
from drex.compute.native import _kernels
from drex.compute.native.operations import add_norm, address, gate, is_bfloat16, rotate_and_write
from drex.compute.reference import Ends, Machinery
from drex.control.plan import Pass

LONGEST_SPAN = 64
"""Rows of a request up to which these kernels compute attention; longer ones are as fast by torch's products."""


class NativeLayers:
    """Computes passes on a CPU, in float32 or bfloat16.

    Args:
        machinery: the decoder, its K/V memory and the arena that passes read and write.
    """

    buckets = ()

    def __init__(self, machinery: Machinery) -> None:
        self.machinery = machinery

    def capture(self) -> None:
        """There is nothing to prepare."""

    def run(self, batch: Pass) -> Ends:
        """Execute a pass, all its segments, but for the verdicts; rows that wait for a deeper one go to the arena."""
        machinery, last = self.machinery, batch.parts[-1]
        tensors = PassTensors.of(batch, machinery.decoder.device)
        for each in batch.parts:
            machinery.tables.hear(each.segment, each.context.fresh)
        before, hidden = self._layers(batch, tensors)
        asked = len(last.evaluations) > 0
        return Ends(before, hidden, machinery.logits(last.segment, hidden) if asked else hidden.new_empty(0, 0))

    def _layers(self, batch: Pass, tensors: PassTensors) -> tuple[Tensor, Tensor]:
        """The input and the output of the pass's last layer, of the evaluated rows: (evaluations, hidden) each."""
        machinery, decoder = self.machinery, self.machinery.decoder
        planes, layers = machinery.layout.layers_per_cell, decoder.layers
        source, index = (decoder.embedding, tensors.tokens) if batch.segment == 0 else (machinery.arena, tensors.arena)
        full, last = len(index), batch.parts[-1].segment
        if len(tensors.fill_arena):
            index = torch.cat((index, tensors.fill_arena))
        # Rows that only write K/V lie behind the others.
        hidden = source.index_select(0, index)
        normed = torch.empty_like(hidden)
        attention = NativeAttention(machinery, batch)
        first = machinery.first_layer(batch.segment)
        stop = machinery.first_layer(last) + machinery.layout.lengths[last]
        delta: Tensor | None = None
        for number in range(first, stop):
            layer = layers[number]
            # A segment has no part in common with another, so that parts can be counted through.
            part, plane = divmod(number - first, planes)
            add_norm(hidden, delta, layer.attention_norm, decoder.spec.eps, normed)
            queries = self._project(layer, normed, full, tensors, part, plane)
            attended = attention.run(part, plane, queries)
            if number == stop - 1:
                break
            delta = self._mlp(layer, hidden[:full], attended, normed[:full])
            if full < len(hidden):
                delta = F.pad(delta, (0, 0, 0, len(hidden) - full))
        evaluated = tensors.evaluated
        before = hidden.index_select(0, evaluated)
        if machinery.is_final(last):  # nobody reads the other rows any more
            after = before.clone()
            added = self._mlp(layer, after, attended.index_select(0, evaluated), torch.empty_like(after))
            return before, after.add_(added)
        hidden = hidden[:full]
        hidden.add_(self._mlp(layer, hidden, attended, normed[:full]))
        machinery.arena.index_copy_(0, tensors.arena, hidden)
        return before, hidden.index_select(0, evaluated)

    def _project(
        self, layer: LayerWeights, normed: Tensor, full: int, tensors: PassTensors, part: int, plane: int
    ) -> Tensor:
        """Write K/V of all rows; returns the queries of the first `full`: (full, heads, head_dim)."""
        machinery = self.machinery
        spec, pool = machinery.decoder.spec, machinery.pool
        queries = normed.new_empty(full, spec.num_heads, spec.head_dim)
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        rotate_and_write(
            layer.qkv(normed),
            tensors.positions,
            tensors.cells[part],
            machinery.cos,
            machinery.sin,
            norms,
            spec.eps,
            queries,
            pool.keys[plane],
            pool.values[plane],
        )
        return queries

    def _mlp(self, layer: LayerWeights, hidden: Tensor, attended: Tensor, normed: Tensor) -> Tensor:
        """Add the output projection to hidden states, in place; returns what the MLP adds to them."""
        add_norm(hidden, layer.out(attended), layer.mlp_norm, self.machinery.decoder.spec.eps, normed)
        return layer.down(gate(layer.gate_up(normed)))


class _Spans:
    """The spans of one of a pass's segments, as the kernels read them.

    Args:
        batch: the segment of the pass.
        tables: where its entries lie.
    """

    def __init__(self, batch: Pass, tables: KVTables) -> None:
        context, segment = batch.context, batch.segment
        first_rows = batch.sizes.cumsum() - batch.sizes
        # One vector of whole numbers, which these addresses point into.
        self._numbers = np.concatenate((first_rows, batch.sizes, context.seats, batch.visible, context.starts.ravel()))
        self._in_run, self._tables = np.ascontiguousarray(context.in_run), tables
        count, base = len(batch.sizes), self._numbers.ctypes.data
        self.count, self.room = count, tables.cells[segment].shape[2]
        self.first_rows, self.sizes, self.seats, self.visible = (base + 8 * number * count for number in range(4))
        starts = self.visible + 8 * len(batch.visible)
        self.starts = [starts + 8 * number * count for number in range(len(context.starts))]
        self.cells = [address(part) for part in tables.cells[segment]]
        self.in_run, self.aliased = self._in_run.ctypes.data, address(tables.aliased[segment])


class NativeAttention:
    """Attention of all layers of one pass.

    Args:
        machinery: its K/V tables must know the entries that the pass writes.
        batch: the pass.
    """

    def __init__(self, machinery: Machinery, batch: Pass) -> None:
        self._machinery = machinery
        spec = machinery.decoder.spec
        # Who reads each part, counted through all segments, and its number among theirs.
        self._parts: list[tuple[_Spans, int]] = []
        for each in batch.parts:
            spans = _Spans(each, machinery.tables)
            self._parts += [(spans, number) for number in range(len(spans.starts))]
        self._long: TorchAttention | None = None
        if len(batch.sizes) and batch.sizes.max() > LONGEST_SPAN:
            self._long = TorchAttention(
                machinery.pool, machinery.tables, batch, spec.num_heads, spec.num_kv_heads, shortest=LONGEST_SPAN + 1
            )

    def run(self, part: int, plane: int, queries: Tensor) -> Tensor:
        """Attention of one layer over the K/V of each row's request.

        Args:
            part, plane: the layer's part, counted through all segments of the pass, and its place there.
            queries: (rows, heads, head_dim).

        Returns:
            (rows, heads * head_dim).
        """
        rows, heads, head_dim = queries.shape
        out = queries.new_empty(rows, heads * head_dim)
        pool = self._machinery.pool
        spans, number = self._parts[part]
        _kernels.attend(
            is_bfloat16(queries),
            address(queries),
            address(pool.keys),
            address(pool.values),
            address(out),
            spans.first_rows,
            spans.sizes,
            spans.visible,
            spans.starts[number],
            spans.seats,
            spans.in_run,
            spans.aliased,
            spans.cells[number],
            spans.count,
            LONGEST_SPAN,
            heads,
            pool.keys.shape[2],
            head_dim,
            plane,
            pool.num_cells,
            spans.room,
            1 / math.sqrt(head_dim),
        )
        if self._long is not None:
            self._long.forward(part, plane, queries, out)
        return out
