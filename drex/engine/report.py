"""What an engine has measured, as one dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drex.control.scheduler import Scheduler
from drex.control.standing import Standing
from drex.engine.metrics import Metrics


def engine_report(scheduler: Scheduler, metrics: Metrics, layers: Sequence[int]) -> dict[str, Any]:
    """Times, exits, rates, costs and slots, as `Engine.report` describes them.

    Args:
        scheduler: the engine's.
        metrics: the engine's.
        layers: layers executed by the end of each segment.
    """
    rule, found = scheduler.policy.rule, scheduler.policy.rule.outlook.yardstick
    waiting = Standing.of(scheduler.seats).buffers[1:]
    return {
        **metrics.summary(),
        "running": len(scheduler.seats),
        "waiting": len(scheduler.admission.waiting),
        "buffered": [len(buffer) for buffer in waiting],
        "achieved": rule.achieved,
        "theta_star": found.optimal if found else None,
        "ideal": found.ideal if found else None,
        "full": rule.full,
        "exit_rates": rule.rates.all(),
        "exits": {layers[depth - 1]: count for depth, count in sorted(metrics.exits.items())},
        "involuntary_exits": metrics.involuntary_exits,
        "involuntary_stays": metrics.involuntary_stays,
        "unchecked": scheduler.unchecked,
        "run_ahead": scheduler.drafts.report(),
        "late": scheduler.deadlines.late,
        "infeasible": scheduler.deadlines.infeasible,
        "preemptions": scheduler.admission.preemptions,
        "cost_error": scheduler.cost.error_quantiles(),
        "slots_in_use": scheduler.pool.in_use,
        "slots": scheduler.pool.capacity,
    }
