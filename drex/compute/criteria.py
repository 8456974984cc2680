"""Confidence measures: what an exit point knows about a token -> a number in [0, 1]. Definitions: docs/criteria.md.

They are computed on the host from a few numbers a row, which the device has found in the logits and hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from drex.config import ExitRule
from drex.control.plan import Evaluations, FloatArray, IntArray

if TYPE_CHECKING:  # rules are made where torch is not installed
    from torch import Tensor

    from drex.compute.head_output import HeadOutput


@dataclass(frozen=True)
class Measured:
    """What a head evaluation has found, for all its rows.

    Attributes:
        columns: by name, (rows,) each: `argmax`, `best` (the largest logit) and `log_sum_exp` always; where a row's
            criterion needs it, `second` (the second largest logit), `mean` (the probability-weighted mean of the
            logits), `cosine` (of the hidden states before and after the segment's last layer), `probed` (what the
            learned probe says); and what the criterion's own `columns` returned.
        vocab_size: logits a row.
        segment: that ends here.
        final: whether this is the final head.
    """

    columns: dict[str, FloatArray]
    vocab_size: int
    segment: int
    final: bool


class Criterion:
    """A confidence measure. Subclasses are frozen dataclasses whose fields are the parameters that users may set.

    Attributes:
        needs: columns of `Measured` beyond the three that are always there, of `drex.extensions.MEASURED`; and
            `agreeing`, for those that count agreeing exits with `agreeing_runs`.
        at_the_end: whether it means something at the final head too; where not, tokens get their `max_prob` there.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    at_the_end: ClassVar[bool] = False

    def columns(self, head: HeadOutput, logits: Tensor) -> dict[str, Tensor]:
        """Further columns of `Measured`, computed on the device: (rows,) each, under names that no other has.

        Args:
            head: what the head was given and gave.
            logits: (rows, vocab), in at least float32 unless kernels read them as they are.
        """
        return {}

    def confidence(self, measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
        """Confidence of some rows, to be clipped to [0, 1]. Shape (rows,).

        Args:
            measured: of all evaluated rows.
            rows: numbers of those whose confidence is wanted.
            evaluations: of all evaluated rows.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class MaxProb(Criterion):
    """Largest probability (EE-LLM, Chen et al. 2024)."""

    at_the_end = True

    def confidence(self, measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
        out: FloatArray = np.exp(measured.columns["best"][rows] - measured.columns["log_sum_exp"][rows])
        return out


@dataclass(frozen=True)
class Margin(MaxProb):
    """Largest minus second probability (CALM's softmax measure, Schuster et al. 2022)."""

    needs = frozenset({"second"})

    def confidence(self, measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
        second = np.exp(measured.columns["second"][rows] - measured.columns["log_sum_exp"][rows])
        return super().confidence(measured, rows, evaluations) - second


@dataclass(frozen=True)
class Entropy(Criterion):
    """1 - H / log(vocab), H the entropy of the distribution in nats."""

    needs = frozenset({"mean"})
    at_the_end = True

    def confidence(self, measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
        nats = measured.columns["log_sum_exp"][rows] - measured.columns["mean"][rows]
        return 1 - nats / math.log(measured.vocab_size)


@dataclass(frozen=True)
class State(Criterion):
    """Cosine of the hidden state before and after the segment's last layer (CALM's hidden-state saturation)."""

    needs = frozenset({"cosine"})

    def confidence(self, measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
        return measured.columns["cosine"][rows]


@dataclass(frozen=True)
class Patience(Criterion):
    """Length of the run of agreeing exits, this one included, over the patience k (PABEE, Zhou et al. 2020).

    Args:
        patience: agreeing exits in a row that make confidence 1.
    """

    patience: int = 2

    needs = frozenset({"agreeing"})

    def __post_init__(self) -> None:
        if not isinstance(self.patience, int) or isinstance(self.patience, bool) or self.patience < 1:
            raise ValueError(f"patience {self.patience!r}: give at least 1 agreeing exit")

    def confidence(self, measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
        lengths = agreeing_runs(evaluations, measured.columns["argmax"].astype(np.int64))[1, rows]
        out: FloatArray = lengths / self.patience
        return out


@dataclass(frozen=True)
class Probe(Criterion):
    """Learned: softmax(W h + b)[1], trained to tell whether argmax is already the final one (CALM's classifier)."""

    needs = frozenset({"probed"})

    def confidence(self, measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
        return measured.columns["probed"][rows]


def agreeing_runs(evaluations: Evaluations, argmax: IntArray) -> IntArray:
    """The argmax of each row, and how many allowed exits in a row had it, this one included. Shape (2, rows)."""
    token, run = evaluations.agreeing
    return np.stack((argmax, np.where((run > 0) & (token == argmax), run, 0) + 1))


AT_THE_END = MaxProb()
"""What is measured at the final head for criteria that mean nothing there."""
Asked = Sequence[tuple[Criterion, IntArray]]
"""Criteria, and the numbers of the rows that each measures."""


def by_criterion(evaluations: Evaluations, *, final: bool) -> Asked:
    """Which rows have their confidence measured how."""
    rules = [draws.rule for draws in evaluations.draws]
    keys = [rule.criterion_key for rule in rules]
    kinds = sorted(set(keys))
    if len(kinds) == 1:
        return [(_measure(rules[0], final=final), np.arange(len(keys)))]
    column = np.array(keys)
    return [(_measure(rules[keys.index(key)], final=final), np.flatnonzero(column == key)) for key in kinds]


def _measure(rule: ExitRule, *, final: bool) -> Criterion:
    measure: Criterion = rule.measure
    return AT_THE_END if final and not measure.at_the_end else measure


def confidences(measured: Measured, evaluations: Evaluations, asked: Asked) -> FloatArray:
    """Confidence of each row under its request's criterion, as `by_criterion` has them. Shape (rows,), in [0, 1]."""
    if len(asked) == 1:
        return asked[0][0].confidence(measured, asked[0][1], evaluations).clip(0, 1)
    out = np.empty(len(evaluations))
    for criterion, rows in asked:
        out[rows] = criterion.confidence(measured, rows, evaluations)
    return out.clip(0, 1)
