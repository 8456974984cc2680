"""CUDA graphs: all kernels of a pass in one launch, for each segment and number of rows, rounded up to a bucket.

A graph reads its pass from a vector of indices and nothing else, so any grouping of rows replays the same graph. They
share one memory pool and one vector; what a replay gave is overwritten by the next one.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

log = logging.getLogger(__name__)
WARM_UPS = 2


def row_buckets(most: int) -> tuple[int, ...]:
    """Numbers of rows that graphs are captured for: powers of two up to 8, then in steps of 8 to 64, up to `most`.

    From 32 rows on a bucket is at most a quarter larger than the one before it.
    """
    steps = chain((1, 2, 4), range(8, 64, 8), range(64, 128, 16), range(128, 256, 32), range(256, most, 64))
    return (*(count for count in steps if count < most), most) if most else ()


class Graphs:
    """Captures and replays.

    Args:
        launch: runs the kernels of a segment for a number of rows over a vector of indices, into what is given.
        most: rows of the largest graph.
        segments: how many there are.
    """

    def __init__(self, launch: Callable[[int, int, Tensor, Tensor], None], most: int, segments: int) -> None:
        self.buckets = row_buckets(most)
        self._launch, self._segments = launch, segments
        self._captured: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._over: tuple[Tensor, Tensor] | None = None

    def bucket(self, rows: int) -> int:
        """The smallest that holds so many rows; 0 if none was captured that does."""
        if not self._captured or not 0 < rows <= self.buckets[-1]:
            return 0
        return self.buckets[bisect_left(self.buckets, rows)]

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
        for rows in reversed(self.buckets):
            for segment in range(self._segments):
                with torch.cuda.stream(side):
                    for _ in range(WARM_UPS):
                        self._launch(segment, rows, vector, ends)
                side.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=side):
                    self._launch(segment, rows, vector, ends)
                self._captured[segment, rows] = graph
        self._over = vector, ends
        torch.cuda.synchronize(device)
        log.info(
            "captured %d CUDA graphs in %.1f s, %.0f MiB",
            len(self._captured),
            time.perf_counter() - started,
            (before - torch.cuda.mem_get_info(device)[0]) / 2**20,
        )

    def replay(self, segment: int, rows: int, vector: Tensor) -> Tensor:
        """Run a pass whose vector lies on the host, pinned; returns where the results are."""
        assert self._over is not None
        on_device, ends = self._over
        on_device[: len(vector)].copy_(vector, non_blocking=True)
        self._captured[segment, rows].replay()
        return ends
