"""Layers of a segment through Triton kernels around the matrix products, eagerly or as CUDA graphs.

A pass is one vector of indices (`drex.compute.indices`): regrouping changes the vector, never a kernel or a graph.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from drex.compute.decoder import LayerWeights
from drex.compute.graphs import Graphs, Size
from drex.compute.indices import Room, count_tiles, fill_in
from drex.compute.kernels.attention import Partial, Tiles, attend, rows_per_tile
from drex.compute.kernels.layer import add_norm, enter, gate, leave, rotate_and_write
from drex.compute.reference import Ends, Machinery
from drex.control.plan import Pass

DECODE_TILE, PROMPT_TILE = 16, 64
"""Queries (rows times query heads that share K/V) that a program of attention takes."""
LONG_SPAN = 32
"""From so many rows a request on, in the mean, attention goes in wide tiles."""
PROGRAMS = 264
"""Programs that attention is split into at least, as far as contexts can be: two for each multiprocessor of an H100."""
MOST_SPLITS = 32


class FusedLayers:
    """Computes passes on one GPU (or, for tests, in Triton's interpreter).

    Args:
        machinery: what passes run on.
        largest_graph: the most rows of each kind of a pass that replays a CUDA graph; None for no graphs.
    """

    def __init__(self, machinery: Machinery, largest_graph: Size | None = None) -> None:
        self.machinery = machinery
        spec = machinery.decoder.spec
        self._tile, self._wide_tile = (
            rows_per_tile(spec.num_heads, spec.num_kv_heads, most) for most in (DECODE_TILE, PROMPT_TILE)
        )
        segments = len(machinery.layout.lengths)
        self.graphs = Graphs(self._for_graph, largest_graph, segments) if largest_graph is not None else None

    @property
    def buckets(self) -> tuple[int, ...]:
        """As of `Layers`."""
        return self.graphs.buckets if self.graphs is not None else ()

    def run(self, batch: Pass) -> Ends:
        """As of `Layers`."""
        for each in batch.parts:
            ends = self._segment(each)
        return ends

    def _segment(self, batch: Pass) -> Ends:
        """One of a pass's segments. Logits there are where something is evaluated."""
        machinery, segment = self.machinery, batch.segment
        machinery.tables.hear(segment, batch.context.fresh)
        parts = machinery.layout.parts(segment)
        size = None if self.graphs is None else self.graphs.bucket(batch.full.size, batch.fill.size)
        if size is not None:
            assert self.graphs is not None
            vector = self._pack(_graph_room(size, parts), batch, self._tile)
            ends = self.graphs.replay(segment, size, vector)
        else:
            wide = batch.full.size >= LONG_SPAN * max(1, int(np.count_nonzero(batch.sizes)))
            tile_rows = self._wide_tile if wide else self._tile
            tiles = count_tiles(batch.sizes, tile_rows)
            room = Room(batch.full.size, batch.fill.size, tiles, parts, len(batch.evaluations))
            vector = self._pack(room, batch, tile_rows).to(machinery.decoder.device, non_blocking=True)
            ends = self._ends(room.evaluated)
            self._launch(segment, room, vector, tile_rows, ends)
        asked = len(batch.evaluations)
        before, hidden = ends[:, :asked]
        return Ends(before, hidden, machinery.logits(segment, hidden) if asked else hidden[:, :0])

    def _ends(self, rows: int) -> Tensor:
        """Room for what the segment's last layer was given and gave, of evaluated rows: (2, rows, hidden)."""
        decoder = self.machinery.decoder
        return decoder.embedding.new_empty(2, rows, decoder.spec.hidden_size)

    def _pack(self, room: Room, batch: Pass, tile_rows: int) -> Tensor:
        """On the host, in memory that a GPU can fetch from without waiting."""
        pinned = self.machinery.decoder.device.type == "cuda"
        vector = torch.zeros(room.size, dtype=torch.int32, pin_memory=pinned)
        fill_in(vector.numpy(), room, batch, tile_rows)
        return vector

    def capture(self) -> None:
        """Capture the graphs, if there are to be any."""
        if self.graphs is None:
            return
        layout, most = self.machinery.layout, self.graphs.largest
        numbers = max(_graph_room(most, layout.parts(segment)).size for segment in range(len(layout.lengths)))
        vector = torch.zeros(numbers, dtype=torch.int32, device=self.machinery.decoder.device)
        self.graphs.capture(vector, self._ends(most[0]))

    def _for_graph(self, segment: int, size: Size, vector: Tensor, ends: Tensor) -> None:
        """What a graph of a size does."""
        room = _graph_room(size, self.machinery.layout.parts(segment))
        self._launch(segment, room, vector, self._tile, ends[:, : room.evaluated])

    def _launch(self, segment: int, room: Room, vector: Tensor, tile_rows: int, ends: Tensor) -> None:
        """All kernels of a pass, over its vector on the device; `ends` is filled for the evaluated rows."""
        machinery, decoder = self.machinery, self.machinery.decoder
        spec, layers = decoder.spec, decoder.layers
        field = room.views(vector)
        first, length = machinery.first_layer(segment), machinery.layout.lengths[segment]
        full, rows = room.full, room.full + room.fill
        hidden = decoder.embedding.new_empty(rows, spec.hidden_size)
        normed = torch.empty_like(hidden)
        source, index = (decoder.embedding, field["tokens"]) if segment == 0 else (machinery.arena, field["arena"])
        enter(source, index, layers[first].attention_norm, spec.eps, hidden, normed)
        attention = _Attention(machinery, segment, room, field, tile_rows)
        for number in range(length):
            layer = layers[first + number]
            attended = attention.run(number, layer, normed)
            if number < length - 1:
                delta = self._mlp(layer, hidden[:full], attended, normed[:full])
                add_norm(hidden, delta, layers[first + number + 1].attention_norm, spec.eps, normed)
        before, after = ends
        evaluated = field["evaluated"]
        torch.index_select(hidden, 0, evaluated, out=before)
        if machinery.is_final(segment):  # where nobody reads the other rows any more
            after.copy_(before)
            after += self._mlp(layer, after, attended.index_select(0, evaluated), normed[: room.evaluated])
            return
        delta = self._mlp(layer, hidden[:full], attended, normed[:full])
        leave(hidden[:full], delta, machinery.arena, field["arena"], field["counts"])
        torch.index_select(hidden, 0, evaluated, out=after)

    def _mlp(self, layer: LayerWeights, hidden: Tensor, attended: Tensor, normed: Tensor) -> Tensor:
        """Output projection, its residual added in place, and what the MLP adds to that. `normed` is overwritten."""
        eps = self.machinery.decoder.spec.eps
        add_norm(hidden, layer.out(attended), layer.mlp_norm, eps, normed)
        gate_up = layer.gate_up(normed)
        gated = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        gate(gate_up, gated)
        return layer.down(gated)


def _graph_room(size: Size, parts: int) -> Room:
    """A tile takes rows of one request, so there are never more than rows."""
    rows, fills = size
    return Room(full=rows, fill=fills, tiles=rows, parts=parts, evaluated=rows)


class _Attention:
    """Attention of all layers of one pass."""

    def __init__(
        self, machinery: Machinery, segment: int, room: Room, field: dict[str, Tensor], tile_rows: int
    ) -> None:
        self.machinery, self.segment = machinery, segment
        self.room, self.field, self.tile_rows = room, field, tile_rows
        spec = machinery.decoder.spec
        wanted = PROGRAMS // max(1, room.tiles * spec.num_kv_heads)
        self.splits = 1 << max(0, min(MOST_SPLITS, wanted).bit_length() - 1)
        device = machinery.decoder.device
        self.partial = (
            Partial.empty(room.full, spec.num_heads, self.splits, spec.head_dim, device) if self.splits > 1 else None
        )
        self.tiles = Tiles(
            first=field["tile_first"],
            rows=field["tile_rows"],
            seats=field["tile_seats"],
            in_run=field["tile_in_run"],
            starts=field["tile_starts"],
            visible=field["visible"],
        )

    def run(self, number: int, layer: LayerWeights, normed: Tensor) -> Tensor:
        """Of one layer of the segment; K/V of all rows is written. Returns (full rows, heads * head_dim)."""
        machinery, field, full = self.machinery, self.field, self.room.full
        spec, pool = machinery.decoder.spec, machinery.pool
        part, plane = divmod(number, machinery.layout.layers_per_cell)
        queries = normed.new_empty(len(normed), spec.num_heads, spec.head_dim)
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        rotate_and_write(
            layer.qkv(normed),
            field["positions"],
            field["cells"][part],
            field["counts"],
            full,
            machinery.cos,
            machinery.sin,
            norms,
            spec.eps,
            plane,
            queries,
            pool.keys,
            pool.values,
        )
        attended = normed.new_empty(full, spec.num_heads * spec.head_dim)
        if full:
            attend(
                queries[:full],
                pool.keys,
                pool.values,
                plane,
                part,
                machinery.tables.cells[self.segment][part],
                machinery.tables.aliased[self.segment],
                self.tiles,
                self.tile_rows,
                self.splits,
                self.partial,
                attended,
            )
        return attended
