"""Runs a segment over the rows of a pass, evaluates the head at its end, and owns the hidden-state arena."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from drex.compute.attention.torch_ref import TorchAttention
from drex.compute.batch import PassTensors
from drex.compute.criteria import Measured
from drex.compute.decoder import Decoder
from drex.compute.heads import ExitHead
from drex.compute.kv import KVPool
from drex.compute.sampler import judge
from drex.control.plan import NOTHING, Evaluations, Pass, Verdicts
from drex.control.slots import SlotLayout

Probe = tuple[Tensor, Tensor]


class SegmentRunner:
    """Executes passes.

    Args:
        decoder: the model.
        heads: an exit head and its probe, or None, for each exit point.
        layout: of the segments.
        num_cells: of the K/V pool.
        arena_rows: hidden states that can wait between segments.
        max_length: positions a request may reach.
    """

    def __init__(
        self,
        decoder: Decoder,
        heads: Sequence[tuple[ExitHead, Probe | None]],
        layout: SlotLayout,
        num_cells: int,
        arena_rows: int,
        max_length: int,
    ) -> None:
        self.decoder, self.heads, self.layout = decoder, list(heads), layout
        spec, device, dtype = decoder.spec, decoder.device, decoder.dtype
        self.pool = KVPool(spec, layout, num_cells, device, dtype)
        self.arena = torch.empty(arena_rows, spec.hidden_size, device=device, dtype=dtype)
        self._cos, self._sin = (table.unsqueeze(1) for table in decoder.rotary_table(max_length))
        self._first_layers = [sum(layout.lengths[:segment]) for segment in range(len(layout.lengths))]

    @torch.inference_mode()
    def run(self, batch: Pass) -> Verdicts:
        """Execute a pass; returns the verdicts of its evaluations."""
        tensors = PassTensors.of(batch, self.decoder.device)
        final = batch.segment == len(self.layout.lengths) - 1
        before, hidden = self._layers(batch, tensors, final)
        if not final:
            self.arena.index_copy_(0, tensors.arena, hidden)
            before, hidden = before.index_select(0, tensors.evaluated), hidden.index_select(0, tensors.evaluated)
        return self.evaluate(batch.segment, before, hidden, batch.evaluations)

    def _layers(self, batch: Pass, tensors: PassTensors, final: bool) -> tuple[Tensor, Tensor]:
        """What the segment's last layer was given, and its output; in the final segment of evaluated rows only."""
        decoder, spec = self.decoder, self.decoder.spec
        if batch.segment == 0:
            hidden = F.embedding(tensors.tokens, decoder.embedding)
        else:
            hidden = self.arena.index_select(0, tensors.arena)
        fill = self.arena.index_select(0, tensors.fill_arena) if len(tensors.fill_arena) else None
        full = len(hidden)
        before = hidden
        cos, sin = self._cos.index_select(0, tensors.positions), self._sin.index_select(0, tensors.positions)
        attention = TorchAttention(self.pool, batch, spec.num_heads, spec.num_kv_heads)
        first, length = self._first_layers[batch.segment], self.layout.lengths[batch.segment]
        for number in range(length):
            layer = decoder.layers[first + number]
            part, plane = divmod(number, self.layout.layers_per_cell)
            rows = hidden if fill is None else torch.cat((hidden, fill))
            queries, keys, values = decoder.project_qkv(layer, rows, cos, sin)
            self.pool.write(plane, tensors.cells[part], keys, values)
            attended = attention.forward(part, plane, queries[:full])
            if final and number == length - 1:
                hidden, attended = (
                    hidden.index_select(0, tensors.evaluated),
                    attended.index_select(0, tensors.evaluated),
                )
            before, hidden = hidden, decoder.finish_layer(layer, hidden, attended)
        return before, hidden

    @torch.inference_mode()
    def evaluate(self, segment: int, before: Tensor, hidden: Tensor, evaluations: Evaluations) -> Verdicts:
        """The verdicts of the head at the end of a segment.

        Args:
            segment: that ends there.
            before, hidden: what its last layer was given, and its output, a row an evaluation.
            evaluations: in the same order.
        """
        final = segment == len(self.layout.lengths) - 1
        if not len(evaluations):
            return NOTHING
        return judge(self._measure(segment, final, before, hidden), evaluations)

    def _measure(self, segment: int, final: bool, before: Tensor, hidden: Tensor) -> Measured:
        decoder = self.decoder
        probe = None
        if final:
            logits = F.linear(decoder.final_norm(hidden), decoder.lm_head)
        else:
            head, probe = self.heads[segment]
            logits = head(hidden, decoder.final_norm, decoder.lm_head)
        if logits.dtype != torch.float64:
            logits = logits.float()
        return Measured(logits, logits.logsumexp(-1), logits.argmax(-1), hidden, before, segment, final, probe)
