"""What a benchmark's numbers depend on besides drex: machine, date, versions, threads."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from drex.comparison.versions import versions
from drex.compute.device import device_name, has_fast_bfloat16


def describe() -> dict[str, Any]:
    """Machine, date and versions, for the JSON beside every number."""
    return {
        **versions(),
        "machine": {
            "cpu": device_name(torch.device("cpu")),
            "device": device_name(torch.device("cuda")) if torch.cuda.is_available() else None,
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "fast_bfloat16": has_fast_bfloat16(torch.device("cpu")),
            "system": platform.platform(),
            "load_average": [round(load, 2) for load in os.getloadavg()],
            "environment": {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        },
    }
