"""Reads fields of a report, any of which may be missing."""

from __future__ import annotations

import math
from typing import Any


def dig(value: Any, way: str) -> Any:
    """What stands at `rct_ms.p95` or `time.segments.0`; None where anything on the way is missing."""
    for step in way.split("."):
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def real(value: Any, way: str = "") -> float | None:
    """A finite number found there, or None."""
    found = dig(value, way) if way else value
    good = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if good else None
