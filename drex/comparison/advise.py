"""Does early exit pay for this model on this machine? What `drex advise` works out.

Exit rates and quality are measured on the user's prompts, teacher-forced under the fill that would be served; costs are
those of a profile. Gains are predictions: θ* over full depth, by requests in flight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drex.config import EarlyExit, per_exit
from drex.config.early_exit_json import Thresholds, spell_thresholds
from drex.control.cost.model import CostModel
from drex.control.policy.yardstick import measure
from drex.llm import LLM
from drex.progress import Progress

WORTH_IT = 1.02
"""A gain below this is within what costs and rates are off."""


@dataclass(frozen=True)
class Outcome:
    """One threshold, at some of the exit points.

    Attributes:
        threshold: at each of them, or one for each.
        exits: layers that they lie after.
        exit_rates: share of the tokens reaching each exit point that leave there.
        agreement: share of tokens whose most likely successor is full depth's.
        loss_ratio: loss over that of full depth.
        gains: θ* over full depth, by requests in flight; None where θ* isn't solved (three exit points and more).
    """

    threshold: Thresholds
    exits: tuple[int, ...]
    exit_rates: tuple[float, ...]
    agreement: float
    loss_ratio: float
    gains: dict[int, float | None]

    @property
    def best_gain(self) -> float:
        return max((gain for gain in self.gains.values() if gain is not None), default=1.0)


@dataclass(frozen=True)
class Advice:
    """What to do, and why.

    Attributes:
        pays: whether any threshold within the tolerance gains anything anywhere.
        text: for people.
        outcomes: all that was looked at.
        recommended: settings, None where full depth is better.
    """

    pays: bool
    text: str
    outcomes: tuple[Outcome, ...]
    recommended: dict[str, Any] | None


def advise(
    llm: LLM,
    texts: Sequence[Sequence[int]],
    thresholds: Sequence[Thresholds],
    in_flight: Sequence[int],
    tolerance: float,
) -> Advice:
    """Measure and recommend.

    Args:
        llm: with exit points and a profile.
        texts: token ids that stand for the traffic, each of at least 2.
        thresholds: to look at, each for all exit points, or one an exit point.
        in_flight: counts of requests.
        tolerance: the largest share by which the loss may grow.
    """
    every = llm.model.exits.layers
    looks = 1 + len(thresholds) + (len(every) if len(every) > 1 else 0)
    with Progress("looking at thresholds", looks * len(texts)) as progress:
        look = _Look(llm, texts, in_flight, progress)
        outcomes = [look.at(threshold, every) for threshold in thresholds]
        if len(every) > 1:
            # Each check costs a head: fewer exit points may be worth more.
            best = _best([outcome for outcome in outcomes if outcome.loss_ratio <= 1 + tolerance])
            if best is not None:
                alone = zip(every, per_exit(best.threshold, len(every)), strict=True)
                outcomes += [look.at(threshold, (layer,)) for layer, threshold in alone]
    return _decide(llm, outcomes, tolerance)


class _Look:
    """Scores the user's texts at a threshold, and predicts what it gains.

    Args:
        llm: with exit points and a profile.
        texts: token ids.
        in_flight: counts of requests.
        progress: told of each text.
    """

    def __init__(self, llm: LLM, texts: Sequence[Sequence[int]], in_flight: Sequence[int], progress: Progress) -> None:
        self._llm, self._texts, self._in_flight, self._progress = llm, texts, in_flight, progress
        self._full = llm.score(texts, each=progress.advance)
        self._loss = sum(scored.loss for scored in self._full) / len(texts)
        self._context = sum(map(len, texts)) / len(texts)

    def at(self, threshold: Thresholds, exits: Sequence[int]) -> Outcome:
        """One threshold at some exit points, by layer."""
        llm = self._llm
        settings = EarlyExit(layers=tuple(exits), thresholds=threshold)
        scored = llm.score(self._texts, early_exit=settings, each=self._progress.advance)
        rates = _exit_rates(exits, [layer for each in scored for layer in each.exit_layers])
        same = [a == b for x, y in zip(self._full, scored, strict=True) for a, b in zip(x.best, y.best, strict=True)]
        kept = [number for number, layer in enumerate(llm.model.exits.layers) if layer in exits]
        cost = CostModel(llm.profile.with_exits(kept))
        gains: dict[int, float | None] = {}
        for count in self._in_flight:
            owed = llm.config.fill_rows
            found = measure(cost, rates, count, self._context, llm.model.exits.kv_fill, most_owed=owed)
            gains[count] = None if found.optimal is None else found.optimal / found.full
        ratio = sum(each.loss for each in scored) / len(scored) / self._loss
        return Outcome(threshold, tuple(exits), rates, sum(same) / len(same), ratio, gains)


def _best(outcomes: Sequence[Outcome]) -> Outcome | None:
    return max(outcomes, key=lambda outcome: outcome.best_gain, default=None)


def _exit_rates(exits: Sequence[int], depths: list[int]) -> tuple[float, ...]:
    """Share of the tokens reaching each exit point that leave there."""
    rates, left = [], len(depths)
    for layer in exits:
        here = depths.count(layer)
        rates.append(here / left if left else 0.0)
        left -= here
    return tuple(rates)


def _decide(llm: LLM, outcomes: list[Outcome], tolerance: float) -> Advice:
    allowed = [outcome for outcome in outcomes if outcome.loss_ratio <= 1 + tolerance]
    if not allowed:
        lowest = min(outcomes, key=lambda outcome: outcome.loss_ratio)
        text = (
            f"No, run full depth: no threshold keeps the loss within {tolerance:.1%} of full depth's. Closest comes "
            f"{spell_thresholds(lowest.threshold)}, {lowest.loss_ratio - 1:+.1%}. The exits would have to be trained "
            "more."
        )
        return Advice(False, text, tuple(outcomes), None)
    best = _best(allowed)
    assert best is not None
    if best.best_gain < WORTH_IT:
        early = 1 - math.prod(1 - rate for rate in best.exit_rates)
        text = (
            f"No, run full depth: at threshold {spell_thresholds(best.threshold)} after {_layers(best)}, {early:.0%} "
            f"of the tokens exit, and the best gain at any count in flight is {best.best_gain - 1:+.1%}. Exit checks "
            "and the K/V of skipped layers cost what is saved."
        )
        return Advice(False, text, tuple(outcomes), None)
    good = [count for count, gain in best.gains.items() if gain is not None and gain >= WORTH_IT]
    bad = [count for count in best.gains if count not in good]
    text = (
        f"Yes: threshold {spell_thresholds(best.threshold)} after {_layers(best)} gains up to "
        f"{best.best_gain - 1:+.0%} (at {', '.join(map(str, good))} in flight), loss {best.loss_ratio - 1:+.2%}, "
        f"{best.agreement:.1%} of the tokens as at full depth."
    )
    if bad:
        text += f" At {', '.join(map(str, bad))} in flight it does not pay: serve with adaptive, or at full depth."
    settings = {
        "exits": list(best.exits),
        "thresholds": list(best.threshold) if isinstance(best.threshold, tuple) else best.threshold,
        "kv_fill": llm.model.exits.kv_fill,
        "policy": "drex",
        "adaptive": bool(bad),
    }
    return Advice(True, text, tuple(outcomes), settings)


def _layers(outcome: Outcome) -> str:
    return f"layer{'s' * (len(outcome.exits) > 1)} {' and '.join(map(str, outcome.exits))}"
