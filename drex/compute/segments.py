"""Runs passes: a segment's layers over their rows, the head at its end, and what is made of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from drex.compute import native
from drex.compute.decoder import Decoder
from drex.compute.drawing import Reductions
from drex.compute.head_output import HeadOutput
from drex.compute.heads import ExitHead
from drex.compute.kv import KVPool, KVTables
from drex.compute.reference import Layers, Machinery, Probe, ReferenceLayers
from drex.compute.sampler import Judgement, TorchReductions
from drex.compute.transfer import Mark
from drex.control.memory.slots import SlotLayout
from drex.control.plan import NOTHING, Evaluations, Pass, Verdicts

log = logging.getLogger(__name__)
KERNELS = ("auto", "torch", "native", "triton")
GRAPH_ROWS = 512
"""Rows of the largest pass that replays a CUDA graph: beyond, launching takes less time than running."""
GRAPH_FILLS = 256
"""Rows that only write K/V, of such a pass: each step beyond would be as many graphs again."""
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Started(Protocol):
    """A pass that is under way: a `Judgement`, or an `Unjudged`."""

    def verdicts(self) -> Verdicts:
        """Wait for it, and for nothing else; to be called before another pass is started."""


class Unjudged:
    """A pass that evaluates no head, under way."""

    def __init__(self, device: torch.device) -> None:
        self._end = Mark(device)

    def verdicts(self) -> Verdicts:
        """None, once it is done."""
        self._end.wait()
        return NOTHING


class SegmentRunner:
    """Executes passes, one at a time.

    Args:
        decoder: the model.
        heads: an exit head and its probe, or None, for each exit point.
        layout: of the segments.
        num_cells: of the K/V pool.
        arena_rows: hidden states that can wait between segments.
        seats: requests that run.
        max_length: positions a request may reach.
        kernels: `torch`; `triton`; `native`, in C++ for a CPU; or `auto`: Triton's on a GPU, and on a CPU the native
            ones where they are installed.
        largest_graph: up to so many rows, and rows that only write K/V, passes replay CUDA graphs where there is a
            GPU; None for no graphs.

    Attributes:
        kernels: `torch`, `native` or `triton`.

    Raises:
        ValueError: kernels that can't be had.
    """

    def __init__(
        self,
        decoder: Decoder,
        heads: Sequence[tuple[ExitHead, Probe | None]],
        layout: SlotLayout,
        num_cells: int,
        arena_rows: int,
        seats: int,
        max_length: int,
        kernels: str = "auto",
        largest_graph: tuple[int, int] | None = None,
    ) -> None:
        self.decoder, self.heads, self.layout = decoder, list(heads), layout
        spec, device, dtype = decoder.spec, decoder.device, decoder.dtype
        self.pool = KVPool(spec, layout, num_cells, device, dtype)
        self.arena = torch.empty(arena_rows, spec.hidden_size, device=device, dtype=dtype)
        tables = KVTables(layout, seats, max_length, device)
        cos, sin = decoder.rotary_table(max_length)
        self._machinery = Machinery(decoder, self.heads, layout, self.pool, tables, self.arena, cos, sin)
        self.kernels = pick_kernels(kernels, decoder)
        self._layers, self._reductions = _backend(self._machinery, self.kernels, largest_graph)

    def capture(self) -> None:
        """Capture CUDA graphs, if passes are to replay any."""
        self._layers.capture()

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of rows that passes are rounded up to, ascending; none where they run as they are."""
        return self._layers.buckets

    @torch.inference_mode()
    def start(self, batch: Pass) -> Started:
        """Execute a pass; on a GPU without waiting for it. Returns what its verdicts come from."""
        ends, last = self._layers.run(batch), batch.parts[-1]
        if not len(last.evaluations):
            return Unjudged(self.decoder.device)
        return self._judge(last.segment, ends.logits, ends.hidden, ends.before, last.evaluations)

    @torch.inference_mode()
    def finish(self, started: Started) -> Verdicts:
        """Wait for the verdicts of a pass that was started, before another one is."""
        return started.verdicts()

    def run(self, batch: Pass) -> Verdicts:
        """Execute a pass; returns the verdicts of its evaluations."""
        return self.finish(self.start(batch))

    @torch.inference_mode()
    def evaluate(self, segment: int, before: Tensor, hidden: Tensor, evaluations: Evaluations) -> Verdicts:
        """The verdicts of the head at the end of a segment.

        Args:
            segment: that ends there.
            before, hidden: what its last layer was given, and its output, a row an evaluation.
            evaluations: in the same order.
        """
        if not len(evaluations):
            return NOTHING
        logits = self._machinery.logits(segment, hidden)
        return self._judge(segment, logits, hidden, before, evaluations).verdicts()

    def _judge(
        self, segment: int, logits: Tensor, hidden: Tensor, before: Tensor, evaluations: Evaluations
    ) -> Judgement:
        final = self._machinery.is_final(segment)
        probe = None if final else self.heads[segment][1]
        return Judgement(HeadOutput(logits, hidden, before, segment, final, probe), evaluations, self._reductions)

    def synchronize(self) -> None:
        """Wait until all that was started is done."""
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)


def pick_kernels(asked: str, decoder: Decoder) -> str:
    """`torch`, `native` or `triton`.

    Raises:
        ValueError: unknown ones, or those that are missing here or don't take the decoder's dtype or device.
    """
    if asked not in KERNELS:
        raise ValueError(f"kernels {asked!r}: choose one of {', '.join(KERNELS)}")
    device, dtype = decoder.device, decoder.dtype
    fits, native_fits = dtype in TRITON_DTYPES, native.fits(device, dtype)
    if asked == "auto":
        if fits and device.type == "cuda":
            return "triton"
        if native.missing is not None and device.type == "cpu" and dtype in native.DTYPES:
            log.warning(
                "the C++ kernels are not installed, so that a CPU is up to half as fast (%s): install a C++ compiler, "
                "then drex again",
                native.missing,
            )
        return "native" if native_fits else "torch"
    if asked == "native" and native.missing is not None:
        raise ValueError(
            f"kernels 'native' are not installed ({native.missing}): install drex again where there is a C++ compiler"
        )
    if asked == "native" and not native_fits:
        raise ValueError("kernels 'native' compute on a CPU, in float32 or bfloat16: use kernels='torch'")
    if asked == "triton" and not fits:
        raise ValueError("Triton's kernels have no float64: use kernels='torch', or another dtype")
    return asked


def _backend(machinery: Machinery, kernels: str, largest_graph: tuple[int, int] | None) -> tuple[Layers, Reductions]:
    if kernels == "torch":
        return ReferenceLayers(machinery), TorchReductions()
    if kernels == "native":
        from drex.compute.native.layers import NativeLayers
        from drex.compute.native.reductions import NativeReductions

        return NativeLayers(machinery), NativeReductions()
    try:
        from drex.compute.fused import FusedLayers
        from drex.compute.kernels.check import FusedReductions
    except ImportError as error:
        raise ValueError("kernels 'triton' need Triton, which torch brings on Linux: pip install triton") from error
    on_gpu = machinery.decoder.device.type == "cuda"
    return FusedLayers(machinery, largest_graph if on_gpu else None), FusedReductions()
