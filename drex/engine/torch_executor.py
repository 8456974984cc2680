"""The executor that runs passes on the model."""

from __future__ import annotations

import logging
import time

from drex.compute.segments import SegmentRunner
from drex.control.plan import Pass, PassResult

log = logging.getLogger(__name__)


class TorchExecutor:
    """Runs each pass at once, in this thread. A pass that fails gives a result with its error, not an exception."""

    def __init__(self, runner: SegmentRunner) -> None:
        self.runner = runner
        self._results: list[PassResult] = []

    def now(self) -> float:
        return time.perf_counter()

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self.now()))

    def submit(self, batch: Pass) -> None:
        try:
            result = PassResult(self.runner.run(batch))
        except Exception as error:  # whatever it is, the requests of this pass must get an answer
            log.exception("pass %d over segment %d failed", batch.number, batch.segment)
            result = PassResult(None, error)
        self._results.append(result)

    def collect(self) -> PassResult:
        return self._results.pop(0)
