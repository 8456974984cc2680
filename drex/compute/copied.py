"""A small tensor on its way to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from drex.control.plan import FloatArray


class Copied:
    """A copy that was started; from a GPU into pinned memory, without waiting.

    Args:
        numbers: float64, of any shape.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if numbers.device.type != "cuda":
            self._host = numbers
            return
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._host.copy_(numbers, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def wait(self) -> FloatArray:
        """The numbers, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        out: FloatArray = self._host.numpy()
        return out
