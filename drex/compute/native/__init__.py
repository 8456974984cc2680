"""Kernels in C++ for a CPU, compiled when drex is installed: what lies between the matrix products of a pass.

They are optional: without a compiler, or where OpenMP is not GCC's, drex computes the same in torch, more slowly.
"""

from __future__ import annotations

import torch  # brings the OpenMP runtime that the kernels take their threads from

try:
    from drex.compute.native import _kernels
except ImportError as error:
    missing: str | None = str(error)
    instruction_set = ""
else:
    missing = None
    instruction_set = _kernels.instruction_set

DTYPES = (torch.float32, torch.bfloat16)
"""Types of the numbers that the C++ kernels read and write; inside they compute in float32."""


def fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the C++ kernels are installed, and take tensors of this device and dtype."""
    return missing is None and device.type == "cpu" and dtype in DTYPES
