"""Small tensors between host and device. The host waits for none but those that it asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from drex.control.plan import FloatArray


def put(numbers: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on a device: to a GPU through pinned memory, without waiting; on a CPU it is the same one."""
    if device.type != "cuda":
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)


class Mark:
    """A place in what a device was given to do."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait until the device is done with what it was given before; other streams are not waited for."""
        if self._event is not None:
            self._event.synchronize()


class Copied:
    """A copy to the host that was started; from a GPU into pinned memory.

    Args:
        numbers: float64, of any shape.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._host = numbers
        if numbers.device.type == "cuda":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
        self._there = Mark(numbers.device)

    def wait(self) -> FloatArray:
        """The numbers, once they are there."""
        self._there.wait()
        out: FloatArray = self._host.numpy()
        return out
