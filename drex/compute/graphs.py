"""CUDA graphs: all kernels of a pass in one launch, for each segment and size, both kinds of rows rounded up.

A graph reads its pass from a vector of indices and nothing else, so any grouping of rows replays the same graph. They
share one memory pool and one vector; what a replay gave is overwritten by the next one.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import chain, count, product, takewhile

import torch
from torch import Tensor

log = logging.getLogger(__name__)
WARM_UPS = 2
FEWEST_FILLS, FILL_STEP = 16, 4

Size = tuple[int, int]
"""Rows that run a segment, and rows that only write K/V."""


def row_buckets(most: int) -> tuple[int, ...]:
    """Numbers of rows that graphs are captured for: powers of two up to 8, then in steps of 8 to 64, up to `most`.

    From 32 rows on a bucket is at most a quarter larger than the one before it.
    """
    steps = chain((1, 2, 4), range(8, 64, 8), range(64, 128, 16), range(128, 256, 32), range(256, most, 64))
    return (*(rows for rows in steps if rows < most), most) if most else ()


def fill_buckets(most: int) -> tuple[int, ...]:
    """Numbers of K/V-only rows that graphs are captured for, from none to `most`.

    Such a row takes one product of a layer's four, so that wide steps cost little and graphs stay few.
    """
    steps = takewhile(lambda fills: fills < most, (FEWEST_FILLS * FILL_STEP**n for n in count()))
    return (0, *steps, most) if most else (0,)


class Graphs:
    """Captures and replays.

    Args:
        launch: runs the kernels of a segment for a size over a vector of indices, into what is given.
        most: the size of the largest graph.
        segments: how many there are. The first one has no K/V-only rows.
    """

    def __init__(self, launch: Callable[[int, Size, Tensor, Tensor], None], most: Size, segments: int) -> None:
        self.buckets, self._fills = row_buckets(most[0]), fill_buckets(most[1])
        self.largest = most
        self._launch, self._segments = launch, segments
        self._captured: dict[tuple[int, Size], torch.cuda.CUDAGraph] = {}
        self._over: tuple[Tensor, Tensor] | None = None

    def bucket(self, rows: int, fills: int) -> Size | None:
        """The smallest that holds so many rows of each kind; None if none was captured that does."""
        if not self._captured or rows > self.buckets[-1] or fills > self._fills[-1]:
            return None
        return self.buckets[bisect_left(self.buckets, rows)], self._fills[bisect_left(self._fills, fills)]

    def graphs(self) -> Iterator[tuple[int, Size]]:
        """Segment and size of all that are to be captured, the largest first."""
        for rows, fills in product(reversed(self.buckets), reversed(self._fills)):
            yield from ((segment, (rows, fills)) for segment in range(1 if fills else 0, self._segments))

    @torch.inference_mode()
    def capture(self, vector: Tensor, ends: Tensor) -> None:
        """Capture all; the largest first, so that the others find room in its memory.

        Args:
            vector: of the largest graph's indices, zeros: no rows, so that warming up writes nothing.
            ends: room for its results, whatever they are.
        """
        device = vector.device
        started, before = time.perf_counter(), torch.cuda.mem_get_info(device)[0]
        pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        for segment, size in self.graphs():
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._launch(segment, size, vector, ends)
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=side):
                self._launch(segment, size, vector, ends)
            self._captured[segment, size] = graph
        self._over = vector, ends
        torch.cuda.synchronize(device)
        log.info(
            "captured %d CUDA graphs in %.1f s, %.0f MiB",
            len(self._captured),
            time.perf_counter() - started,
            (before - torch.cuda.mem_get_info(device)[0]) / 2**20,
        )

    def replay(self, segment: int, size: Size, vector: Tensor) -> Tensor:
        """Run a pass whose vector lies on the host, pinned; returns where the results are."""
        assert self._over is not None
        on_device, ends = self._over
        on_device[: len(vector)].copy_(vector, non_blocking=True)
        self._captured[segment, size].replay()
        return ends
