"""Layers of a segment in plain torch: on a CPU, and what other ways to compute them are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from drex.compute.attention.torch_ref import TorchAttention
from drex.compute.batch import PassTensors
from drex.compute.decoder import Decoder
from drex.compute.heads import ExitHead
from drex.compute.kv import KVPool, KVTables
from drex.compute.linear import Linear
from drex.control.memory.slots import SlotLayout
from drex.control.plan import Pass

Probe = tuple[Tensor, Tensor]


class Machinery(NamedTuple):
    """What passes run on.

    Attributes:
        decoder: the model.
        heads: an exit head and its probe, or None, for each exit point.
        layout: of the segments.
        pool, tables: K/V memory, and where entries lie in it.
        arena: hidden states that wait between segments, (rows, hidden).
        cos, sin: rotary tables, (positions, head_dim / 2).
    """

    decoder: Decoder
    heads: Sequence[tuple[ExitHead, Probe | None]]
    layout: SlotLayout
    pool: KVPool
    tables: KVTables
    arena: Tensor
    cos: Tensor
    sin: Tensor

    def first_layer(self, segment: int) -> int:
        """Index of a segment's first layer."""
        return [0, *accumulate(self.layout.lengths)][segment]

    def is_final(self, segment: int) -> bool:
        """Whether the final head is at its end."""
        return segment == len(self.layout.lengths) - 1

    def logits(self, segment: int, hidden: Tensor) -> Tensor:
        """Of the head at a segment's end. Shapes: (rows, hidden) -> (rows, vocab)."""
        return self.vocabulary(segment)(self.features(segment, hidden))

    def features(self, segment: int, hidden: Tensor) -> Tensor:
        """What the head multiplies with its vocabulary matrix. Shapes: (rows, hidden) -> (rows, hidden)."""
        norm = self.decoder.final_norm
        return norm(hidden) if self.is_final(segment) else self.heads[segment][0].features(hidden, norm)

    def vocabulary(self, segment: int) -> Linear:
        """The head's product with its vocabulary matrix, hidden -> vocab."""
        own = None if self.is_final(segment) else self.heads[segment][0].head
        return self.decoder.lm_head if own is None else own


class Ends(NamedTuple):
    """What a segment gives for the evaluated rows: what its last layer was given, its output, and the head's logits."""

    before: Tensor
    hidden: Tensor
    logits: Tensor


class Layers(Protocol):
    """A way to compute segments."""

    def run(self, batch: Pass) -> Ends:
        """Execute a pass, all its segments, but for the verdicts. What waits for a deeper one goes to the arena."""

    def capture(self) -> None:
        """Prepare what can be prepared, once the K/V memory is there."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of rows that passes are rounded up to, ascending; none where they run as they are."""


class ReferenceLayers:
    """In torch, layer by layer."""

    buckets = ()

    def __init__(self, machinery: Machinery) -> None:
        self.machinery = machinery
        self._cos, self._sin = machinery.cos.unsqueeze(1), machinery.sin.unsqueeze(1)

    def run(self, batch: Pass) -> Ends:
        """As of `Layers`."""
        machinery, last = self.machinery, batch.parts[-1]
        tensors = PassTensors.of(batch, machinery.decoder.device)
        for each in batch.parts:
            machinery.tables.hear(each.segment, each.context.fresh)
        before, hidden = self._layers(batch, tensors)
        if not machinery.is_final(last.segment):
            machinery.arena.index_copy_(0, tensors.arena, hidden)
            before, hidden = before.index_select(0, tensors.evaluated), hidden.index_select(0, tensors.evaluated)
        asked = len(last.evaluations) > 0
        return Ends(before, hidden, machinery.logits(last.segment, hidden) if asked else hidden.new_empty(0, 0))

    def capture(self) -> None:
        """There is nothing to prepare."""

    def _layers(self, batch: Pass, tensors: PassTensors) -> tuple[Tensor, Tensor]:
        """What the last layer was given, and its output; at the end of the final segment of evaluated rows only."""
        machinery, decoder = self.machinery, self.machinery.decoder
        spec, planes = decoder.spec, machinery.layout.layers_per_cell
        if batch.segment == 0:
            hidden = F.embedding(tensors.tokens, decoder.embedding)
        else:
            hidden = machinery.arena.index_select(0, tensors.arena)
        fill = machinery.arena.index_select(0, tensors.fill_arena) if len(tensors.fill_arena) else None
        full = len(hidden)
        before = hidden
        cos, sin = self._cos.index_select(0, tensors.positions), self._sin.index_select(0, tensors.positions)
        first, last = machinery.first_layer(batch.segment), batch.parts[-1].segment
        stop = machinery.first_layer(last) + machinery.layout.lengths[last]
        attention = TorchAttention(machinery.pool, machinery.tables, batch, spec.num_heads, spec.num_kv_heads)
        for number in range(first, stop):
            layer = decoder.layers[number]
            # A segment has no part in common with another, so that parts can be counted through.
            part, plane = divmod(number - first, planes)
            rows = hidden if fill is None else torch.cat((hidden, fill))
            queries, keys, values = decoder.project_qkv(layer, rows, cos, sin)
            machinery.pool.write(plane, tensors.cells[part], keys, values)
            attended = attention.forward(part, plane, queries[:full])
            if number == spec.num_layers - 1:
                hidden, attended = (
                    hidden.index_select(0, tensors.evaluated),
                    attended.index_select(0, tensors.evaluated),
                )
            before, hidden = hidden, decoder.finish_layer(layer, hidden, attended)
        return before, hidden
