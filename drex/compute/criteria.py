"""Confidence measures: what an exit point knows about a token -> a number in [0, 1]. Definitions: docs/criteria.md.

They are computed on the host from a few numbers a row, which the device has found in the logits and hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from drex.control.hashing import uniform
from drex.control.plan import Evaluations, FloatArray, IntArray


@dataclass(frozen=True)
class Measured:
    """What a head evaluation has found, for all its rows.

    Attributes:
        columns: by name, (rows,) each: `argmax`, `best` (the largest logit) and `log_sum_exp` always; where a row's
            criterion needs it, `second` (the second largest logit), `mean` (the probability-weighted mean of the
            logits), `cosine` (of the hidden states before and after the segment's last layer), `probed` (what the
            learned probe says).
        vocab_size: logits a row.
        segment: that ends here.
        final: whether this is the final head.
    """

    columns: dict[str, FloatArray]
    vocab_size: int
    segment: int
    final: bool


Criterion = Callable[[Measured, IntArray, Evaluations], FloatArray]
"""Takes what was measured, row numbers, and all rows' evaluations; returns (row numbers,) in [0, 1]."""


def max_prob(measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
    """Largest probability (EE-LLM, Chen et al. 2024)."""
    out: FloatArray = np.exp(measured.columns["best"][rows] - measured.columns["log_sum_exp"][rows])
    return out


def margin(measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
    """Largest minus second probability (CALM's softmax measure, Schuster et al. 2022)."""
    second = np.exp(measured.columns["second"][rows] - measured.columns["log_sum_exp"][rows])
    return max_prob(measured, rows, evaluations) - second


def entropy(measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
    """1 - H / log(vocab), H the entropy of the distribution in nats."""
    nats = measured.columns["log_sum_exp"][rows] - measured.columns["mean"][rows]
    return 1 - nats / math.log(measured.vocab_size)


def state(measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
    """Cosine of the hidden state before and after the segment's last layer (CALM's hidden-state saturation)."""
    return measured.columns["cosine"][rows]


def patience(measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
    """Length of the run of agreeing exits, this one included, over the patience k (PABEE, Zhou et al. 2020)."""
    lengths = agreeing_runs(evaluations, measured.columns["argmax"].astype(np.int64))[1, rows]
    out: FloatArray = lengths / np.array([evaluations.draws[row].rule.patience for row in rows.tolist()])
    return out


def probe(measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
    """Learned: softmax(W h + b)[1], trained to tell whether argmax is already the final one (CALM's classifier)."""
    return measured.columns["probed"][rows]


def trace(measured: Measured, rows: IntArray, evaluations: Evaluations) -> FloatArray:
    """Uniform noise by request, position and exit: for benchmarks on random weights, where 1 - threshold exit."""
    draws = [evaluations.draws[row] for row in rows.tolist()]
    seeds, samples = [each.seed for each in draws], [each.sample for each in draws]
    return uniform(seeds, samples, evaluations.positions[rows], measured.segment)


CRITERIA: dict[str, Criterion] = {
    "max_prob": max_prob,
    "margin": margin,
    "entropy": entropy,
    "state": state,
    "patience": patience,
    "probe": probe,
    "trace": trace,
}
AT_THE_END = ("max_prob", "margin", "entropy")
"""Criteria that mean something at the final head too; tokens of the others get their `max_prob` there."""


def agreeing_runs(evaluations: Evaluations, argmax: IntArray) -> IntArray:
    """The argmax of each row, and how many allowed exits in a row had it, this one included. Shape (2, rows)."""
    token, run = evaluations.agreeing
    return np.stack((argmax, np.where((run > 0) & (token == argmax), run, 0) + 1))


def by_criterion(evaluations: Evaluations, *, final: bool) -> dict[str, IntArray]:
    """Which rows have their confidence measured how."""
    names = [draws.rule.criterion for draws in evaluations.draws]
    if final:
        names = [name if name in AT_THE_END else "max_prob" for name in names]
    kinds = set(names)
    if len(kinds) == 1:
        return {names[0]: np.arange(len(names))}
    column = np.array(names)
    return {name: np.flatnonzero(column == name) for name in sorted(kinds)}


def confidences(measured: Measured, evaluations: Evaluations, asked: Mapping[str, IntArray]) -> FloatArray:
    """Confidence of each row under its request's criterion, as `by_criterion` has them. Shape (rows,), in [0, 1]."""
    out = np.empty(len(evaluations))
    for name, rows in asked.items():
        out[rows] = CRITERIA[name](measured, rows, evaluations)
    return out.clip(0, 1)
