"""Confidence measures: what an exit point knows about a token -> a number in [0, 1]. Definitions: docs/criteria.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drex.control.hashing import uniform
from drex.control.plan import Evaluations, IntArray


@dataclass(frozen=True)
class Measured:
    """What a head evaluation has at hand, for all its rows.

    Attributes:
        logits: (rows, vocab), unscaled, float32 or float64.
        log_sum_exp: (rows,).
        argmax: (rows,).
        hidden, before: the segment's output and what its last layer was given, (rows, hidden).
        segment: that ends here.
        final: whether this is the final head.
        probe: (weight (2, hidden), bias (2,)) of this exit, if it has one.
    """

    logits: Tensor
    log_sum_exp: Tensor
    argmax: Tensor
    hidden: Tensor
    before: Tensor
    segment: int
    final: bool
    probe: tuple[Tensor, Tensor] | None


Criterion = Callable[[Measured, list[int], Evaluations], Tensor]
"""Takes what was measured, row numbers, and all rows' evaluations; returns (row numbers,) in [0, 1]."""


def max_prob(measured: Measured, rows: list[int], evaluations: Evaluations) -> Tensor:
    """Largest probability (EE-LLM, Chen et al. 2024)."""
    best = measured.logits.gather(1, measured.argmax[:, None]).squeeze(1)
    return (best - measured.log_sum_exp).exp()[rows]


def margin(measured: Measured, rows: list[int], evaluations: Evaluations) -> Tensor:
    """Largest minus second probability (CALM's softmax measure, Schuster et al. 2022)."""
    top = (measured.logits[rows].topk(2, dim=-1).values - measured.log_sum_exp[rows, None]).exp()
    return top[:, 0] - top[:, 1]


def entropy(measured: Measured, rows: list[int], evaluations: Evaluations) -> Tensor:
    """1 - H / log(vocab), H the entropy of the distribution in nats."""
    logs = measured.logits[rows] - measured.log_sum_exp[rows, None]
    nats = -(logs.exp() * logs).nan_to_num(0.0).sum(-1)
    return 1 - nats / math.log(logs.shape[-1])


def state(measured: Measured, rows: list[int], evaluations: Evaluations) -> Tensor:
    """Cosine of the hidden state before and after the segment's last layer (CALM's hidden-state saturation)."""
    dtype = measured.logits.dtype
    return F.cosine_similarity(measured.before[rows].to(dtype), measured.hidden[rows].to(dtype), dim=-1)


def patience(measured: Measured, rows: list[int], evaluations: Evaluations) -> Tensor:
    """Length of the run of agreeing exits, this one included, over the patience k (PABEE, Zhou et al. 2020)."""
    lengths = agreeing_runs(evaluations, measured.argmax.cpu().numpy())[1, rows]
    shares = lengths / np.array([evaluations.draws[row].rule.patience for row in rows])
    return torch.from_numpy(shares).to(measured.logits)


def probe(measured: Measured, rows: list[int], evaluations: Evaluations) -> Tensor:
    """Learned: softmax(W h + b)[1], trained to tell whether argmax is already the final one (CALM's classifier)."""
    assert measured.probe is not None
    weight, bias = measured.probe
    return F.linear(measured.hidden[rows], weight, bias).to(measured.logits.dtype).softmax(-1)[:, 1]


def trace(measured: Measured, rows: list[int], evaluations: Evaluations) -> Tensor:
    """Uniform noise by request, position and exit: for benchmarks on random weights, where 1 - threshold exit."""
    draws = [evaluations.draws[row] for row in rows]
    seeds, samples = [each.seed for each in draws], [each.sample for each in draws]
    return torch.from_numpy(uniform(seeds, samples, evaluations.positions[rows], measured.segment)).to(measured.logits)


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


def confidences(measured: Measured, evaluations: Evaluations) -> Tensor:
    """Confidence of each row under its request's criterion. Shape (rows,), clipped to [0, 1]."""
    by_criterion: dict[str, list[int]] = {}
    for row, draws in enumerate(evaluations.draws):
        name = draws.rule.criterion
        by_criterion.setdefault("max_prob" if measured.final and name not in AT_THE_END else name, []).append(row)
    out = torch.empty_like(measured.log_sum_exp)
    for name, rows in by_criterion.items():
        out[rows] = CRITERIA[name](measured, rows, evaluations)
    return out.clamp_(0, 1)
