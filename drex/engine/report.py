"""What an engine has measured, as one dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from drex.control.report import SchedulerReport
from drex.engine.metrics import Metrics


def engine_report(scheduler: SchedulerReport, metrics: Metrics, layers: Sequence[int]) -> dict[str, Any]:
    """Times, exits, rates, costs and slots, as `Engine.report` describes them.

    Args:
        scheduler: what the engine's scheduler reports.
        metrics: the engine's.
        layers: layers executed by the end of each segment.
    """
    return {
        **metrics.summary(),
        **asdict(scheduler),
        "exits": {layers[depth - 1]: count for depth, count in sorted(metrics.exits.items())},
        "involuntary_exits": metrics.involuntary_exits,
        "involuntary_stays": metrics.involuntary_stays,
    }
