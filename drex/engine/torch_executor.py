"""The executor that runs passes on the model."""

from __future__ import annotations

import logging
import time
from collections import deque

from drex.compute.segments import SegmentRunner, Started
from drex.control.plan import Pass, PassResult

log = logging.getLogger(__name__)


class TorchExecutor:
    """Runs passes: on a CPU at once, in this thread; on a GPU beside it.

    A pass that fails gives a result with its error, not an exception.
    """

    def __init__(self, runner: SegmentRunner) -> None:
        self.runner = runner
        self.asynchronous = runner.decoder.device.type == "cuda"
        self._started: deque[tuple[Pass, Started | Exception]] = deque()

    def now(self) -> float:
        return time.perf_counter()

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self.now()))

    def submit(self, batch: Pass) -> None:
        try:
            self._started.append((batch, self.runner.start(batch)))
        except Exception as error:  # whatever it is, the requests of this pass must get an answer
            self._started.append((batch, error))

    def collect(self) -> PassResult:
        batch, started = self._started.popleft()
        try:
            if isinstance(started, Exception):
                raise started
            return PassResult(self.runner.finish(started))
        except Exception as error:
            log.exception("pass %d over segment %d failed", batch.number, batch.segment)
            return PassResult(None, error)

    def abandon(self) -> None:
        self._started.clear()
        self.runner.synchronize()
