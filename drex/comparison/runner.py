"""Runs policies in turn on the same requests, and sums up what happened.

Repetitions are interleaved (A, B, A, B, …), so that a slow moment of the machine meets all of them. The same code runs
on real and on virtual time.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from drex.comparison.cell import Arrivals, Cell, nothing
from drex.comparison.yardsticks import Accuracy, Found, accuracy, yardstick
from drex.control.report import SchedulerReport
from drex.engine.driver import serve
from drex.engine.engine import Engine
from drex.engine.metrics import PassRecord
from drex.engine.samples import Emitted

COUNTED = 0.6
"""Share of the tokens that policies are compared on while all requests decode. The more unevenly requests come along,
the sooner one is done, and the shorter contexts are until then: passes until that moment would compare unlike ones."""
IDLE = 0.5
"""Seconds without a pass that part one turn from the next: the other policies run then."""
POINTS = 240
"""Of the buffers' occupancy over time that a report holds."""


def take_turns(
    cells: Sequence[Cell],
    arrivals: Callable[[Cell], Arrivals],
    repeats: int,
    told: Callable[[Cell], None],
    done: Callable[[], None] = nothing,
) -> None:
    """Run all cells, one after the other, `repeats` times.

    Args:
        cells: to take turns.
        arrivals: returns the requests that a cell serves in its next turn, with their times of arrival.
        repeats: turns of each.
        told: called after each turn.
        done: called after each request.
    """
    for _ in range(repeats):
        for cell in cells:
            cell.run(arrivals(cell), done)
            told(cell)


def while_all_decode(engine: Engine, arrivals: Arrivals, count: int) -> list[PassRecord]:
    """Serve `count` requests that come at once; returns the passes from when all have a token.

    They end before a request is done, and with the last pass through the last layer that brought some of the first
    `COUNTED` of all tokens: what waits at the end has cost something and brought nothing yet. Where no such pass came
    they are all until a request is done.
    """
    arrivals = list(arrivals)
    most = COUNTED * sum(request.max_tokens for _, request in arrivals)
    history: list[PassRecord] = []
    engine.history = history
    started: set[str] = set()
    edges: list[int] = []

    def each(emitted: Emitted) -> None:
        name, _, done = emitted
        started.add(name)
        if (len(started) == count and not edges) or (done is not None and len(edges) == 1):
            edges.append(len(history))

    serve(engine, arrivals, each, closed=True)
    assert len(edges) == 2, "a request ended before all had begun: ask for more tokens"
    window = history[edges[0] : edges[1]]
    brought = list(accumulate(record.tokens for record in window))
    last = engine.scheduler.segments - 1
    ends = [at for at, record in enumerate(window, 1) if record.through or record.segment == last]
    within = [at for at in ends if brought[at - 1] <= most]
    return list(window[: within[-1]]) if within else list(window)


def summarise(cells: Sequence[Cell], layers: Sequence[int]) -> list[dict[str, Any]]:
    """The runs of a report, for cells of one count in flight.

    Args:
        cells: that took turns.
        layers: executed by a token that leaves after each segment.
    """
    found = yardstick(cells)
    return [_summary(cell, found, layers) for cell in cells]


def _summary(cell: Cell, found: Found | None, layers: Sequence[int]) -> dict[str, Any]:
    metrics, counted = cell.metrics, cell.engine.scheduler.report()
    by_layer = Counter({layers[depth - 1]: count for depth, count in metrics.exits.items()})
    if cell.policy == "full":
        by_layer = Counter({layers[-1]: metrics.tokens})
    times = metrics.summary()
    decode = decode_rate(cell.history)
    decided = accuracy(cell, found) if cell.policy == "drex" and found is not None else Accuracy(0, 0, 0)
    confidences = metrics.exited_confidences
    return {
        "policy": cell.policy,
        "in_flight": cell.in_flight,
        "tokens_per_s": statistics.median(cell.speeds),
        "each": cell.speeds,
        "decode_tokens_per_s": decode,
        "full": found.full if found else None,
        "theta_star": found.optimal if found else None,
        "ideal": found.ideal if found else None,
        "efficiency": decode / found.ideal if found and decode else None,
        **{name: times[name] for name in ("rct_ms", "ttft_ms", "tpot_ms", "itl_ms", "goodput")},
        "involuntary_exits": metrics.involuntary_exits,
        "involuntary_stays": metrics.involuntary_stays,
        "unchecked": counted.unchecked,
        "exits": {str(layer): by_layer.get(layer, 0) for layer in layers},
        "mean_depth": sum(layer * count for layer, count in by_layer.items()) / max(1, metrics.tokens),
        "confidence_p5": float(np.percentile(confidences, 5)) if len(confidences) else None,
        "decision_accuracy": decided.right / decided.decisions if decided.decisions else None,
        "decisions": decided.decisions,
        "ties": decided.ties,
        "cost_error": counted.cost_error,
        "slots": {"peak": cell.engine.stats.peak_slots, "capacity": counted.slots},
        "preemptions": counted.preemptions,
        "run_ahead": _run_ahead(cell, counted) if cell.engine.scheduler.config.run_ahead != "off" else None,
        "late": counted.late,
        "infeasible": counted.infeasible,
        "quality": None,
        "time": _time(cell, len(layers)),
        "occupancy": _occupancy(cell.history),
    }


def _run_ahead(cell: Cell, counted: SchedulerReport) -> dict[str, Any]:
    """Drafts, and how many tokens a flush brought: a pass over the last segment, that no prompt took part in."""
    last = cell.engine.scheduler.segments - 1
    flushes = [record.tokens for record in cell.history if record.segment == last and not record.prompts]
    tokens = sum(record.tokens for record in cell.history if not record.prompts and not record.through)
    per_flush = tokens / max(1, len(flushes))
    return {**counted.run_ahead, "tokens_per_flush": per_flush}


def decode_rate(history: Sequence[PassRecord]) -> float | None:
    """Tokens a second over the passes that no prompt took part in; None without such passes."""
    plain = [record for record in history if not record.prompts]
    seconds = sum(record.seconds for record in plain)
    return sum(record.tokens for record in plain) / seconds if seconds else None


def _time(cell: Cell, segments: int) -> dict[str, Any]:
    """Seconds in passes by segment, without the engine's own; and that. A pass over all counts alike for each."""
    spent = [0.0] * segments
    for record in cell.history:
        ran = range(segments) if record.through else (record.segment,)
        for segment in ran:
            spent[segment] += record.seconds / len(ran)
    stats = cell.engine.stats
    whole = stats.own_seconds + stats.executor_seconds
    share = stats.executor_seconds / whole if whole else 1.0
    return {"segments": [seconds * share for seconds in spent], "own": stats.own_seconds}


def _occupancy(history: Sequence[PassRecord]) -> list[list[float]]:
    """(seconds, rows waiting at each exit point) over the first turn, thinned."""
    with_buffers = [record for record in history if len(record.live) > 1]
    turns = [i for i, (a, b) in enumerate(pairwise(with_buffers), 1) if b.started - a.started > 3 * a.seconds + IDLE]
    with_buffers = with_buffers[: turns[0]] if turns else with_buffers
    if not with_buffers:
        return []
    start = with_buffers[0].started
    step = max(1, len(with_buffers) // POINTS)
    return [[record.started - start, *map(float, record.live[1:])] for record in with_buffers[::step]]
