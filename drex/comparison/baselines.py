"""Policies that exist to be compared with: the paper's heuristic, and those that decide for a whole batch.

A batch is the decode rows of one pass.
"""

from __future__ import annotations

import math

import numpy as np

from drex.control.plan import BoolArray
from drex.control.policy.base import Checks, Choice, Setting, Split, View


class Consensus(Split):
    """All rows of the batch are confident: all exit; else all stay."""

    def exits(self, segment: int, checks: Checks) -> BoolArray:
        return np.full_like(checks.exited, checks.exited.all())


class Majority(Split):
    """The median confidence reaches the threshold: all exit; else all stay."""

    def exits(self, segment: int, checks: Checks) -> BoolArray:
        return np.full_like(checks.exited, np.median(checks.confidences - checks.thresholds) >= 0)


class Greedy(Split):
    """Any row is confident: all exit; else all stay."""

    def exits(self, segment: int, checks: Checks) -> BoolArray:
        return np.full_like(checks.exited, checks.exited.any())


class LatencyOnly(Greedy):
    """Any row is confident: all tokens are emitted early, and all rows run deep all the same, before the next token."""

    def choose(self, view: View) -> Choice | None:
        deeper = super().choose(view)
        owing = [segment for segment, rows in enumerate(view.owed) if rows]
        return Choice(owing[0], fills=True) if owing and (deeper is None or deeper.segment == 0) else deeper


class Art(Split):
    """The paper's adaptive rebatching threshold: arXiv 2512.15705, with the age rule of its authors' code.

    Rebatch iff more than (c / t_d) of the batch exit, c = t_s + t_d - t_f; else all go on. Flush a buffer when
    its rows · (1 + age · age_factor) reach the batch.

    Args:
        setting: what it decides for.
        age_factor: share of a row that a buffer counts for more with each pass that its oldest row has waited.
    """

    def __init__(self, setting: Setting, *, age_factor: float = 0.05) -> None:
        super().__init__(setting)
        if not 0 <= age_factor < math.inf:
            raise ValueError(f"age_factor {age_factor!r}: give a number from 0 on")
        self._age_factor = age_factor
        self._go_on: set[int] = set()

    def choose(self, view: View) -> Choice | None:
        self.rule.tick(view.pass_number, view.decoding, view.context)
        for segment in range(len(view.live) - 1, 0, -1):
            grown = view.live[segment] * (1 + view.oldest_age[segment] * self._age_factor)
            full = view.live[segment] and grown >= view.decoding
            stale = view.oldest_age[segment] >= self.config.max_wait_passes - len(view.live)
            if segment in self._go_on or view.urgent[segment] or full or (view.live[segment] and stale):
                self._go_on.discard(segment)
                if view.live[segment] or view.urgent[segment]:
                    return Choice(segment)
        if view.ready or view.prompts:
            return Choice(0, view.ready)
        return super().choose(view)

    def exits(self, segment: int, checks: Checks) -> BoolArray:
        rows = float(len(checks.exited))
        deeper = range(segment + 1, self.rule.cost.segments)
        shallow = float(self.rule.prices.seconds(segment, rows, 0.0))
        deep = sum(float(self.rule.prices.seconds(s, rows, 0.0)) for s in deeper)
        # A full pass is one over all layers from here on, without the exit head.
        whole = shallow + deep - self.rule.cost.head_seconds(segment, rows)
        if checks.exited.sum() > (shallow + deep - whole) / deep * rows:
            return checks.exited
        self._go_on.add(segment + 1)
        return np.zeros_like(checks.exited)
