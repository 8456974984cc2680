"""From logits to verdicts: the token of each evaluated row, its log-probability and confidence, and whether it exits.

Confidence and log-probabilities are of the unscaled distribution. All that the device is to find is asked of it at
once; what it found comes to the host in one small copy, and one more where likely alternatives are to be reported.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drex.compute.criteria import Asked, Measured, agreeing_runs, by_criterion, confidences
from drex.compute.drawing import Reductions, draw, wide
from drex.compute.head_output import HeadOutput
from drex.compute.noise import gumbel
from drex.compute.transfer import Copied, put
from drex.control.hashing import Hashes
from drex.control.plan import Evaluations, FloatArray, Verdicts


class TorchReductions:
    """In torch, one reduction after the other."""

    def prepare(self, logits: Tensor) -> Tensor:
        return wide(logits)

    def summarise(self, logits: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        argmax, log_sum_exp = logits.argmax(-1), logits.logsumexp(-1)
        columns = {"argmax": argmax, "best": logits.gather(1, argmax[:, None])[:, 0], "log_sum_exp": log_sum_exp}
        if "second" in wanted:
            columns["second"] = logits.topk(2, dim=-1).values[:, 1]
        if "mean" in wanted:
            columns["mean"] = ((logits - log_sum_exp[:, None]).exp() * logits).nan_to_num(0.0).sum(-1)
        return columns

    def draw(self, logits: Tensor, best: Tensor, temperatures: Tensor, keys: Hashes) -> Tensor:
        # From the maximum down, so that a tiny temperature makes the others -inf and not the best ones inf.
        scaled = (logits - best[:, None]) / temperatures[:, None]
        return (scaled.double() + gumbel(keys, logits.shape[1], logits.device)).argmax(-1)


class Judgement:
    """The verdicts of one pass's evaluations, under way.

    Args:
        head: its output.
        evaluations: in the same order.
        reductions: for the logits.
    """

    def __init__(self, head: HeadOutput, evaluations: Evaluations, reductions: Reductions) -> None:
        self.evaluations = evaluations
        self._segment, self._final, self._vocab_size = head.segment, head.final, head.logits.shape[1]
        self._asked = by_criterion(evaluations, final=head.final)
        logits = reductions.prepare(head.logits)
        columns = _measure(head, logits, self._asked, reductions)
        columns |= draw(logits, columns, evaluations, reductions)
        self._names = list(columns)
        self._numbers = Copied(torch.stack([column.double() for column in columns.values()]))
        self._tops = Tops(logits, evaluations)

    def verdicts(self) -> Verdicts:
        """Wait for them."""
        columns = dict(zip(self._names, self._numbers.wait(), strict=True))
        evaluations, argmax = self.evaluations, columns["argmax"].astype(np.int64)
        measured = Measured(columns, self._vocab_size, self._segment, self._final)
        certain = confidences(measured, evaluations, self._asked)
        # NaN, where the row may not exit, is below nothing; and if a penalty or bias changes the argmax, the exit's
        # confidence is not about this token.
        exited = (certain >= evaluations.thresholds) & (columns["adjusted"] == argmax)
        return Verdicts(
            tokens=columns["token"].astype(np.int64),
            logprobs=columns["logit"] - columns["log_sum_exp"],
            confidences=certain,
            exited=exited,
            agreeing=agreeing_runs(evaluations, argmax),
            tops=self._tops.wait(columns["log_sum_exp"]),
            finite=np.isfinite(columns["log_sum_exp"]),
        )


def _measure(head: HeadOutput, logits: Tensor, asked: Asked, reductions: Reductions) -> dict[str, Tensor]:
    """The columns that confidences are computed from."""
    wanted = frozenset[str]().union(*(criterion.needs for criterion, _ in asked))
    columns = reductions.summarise(logits, wanted)
    if "cosine" in wanted:
        columns["cosine"] = F.cosine_similarity(wide(head.before), wide(head.hidden), dim=-1)
    if "probed" in wanted:
        assert head.probe is not None
        weight, bias = head.probe
        columns["probed"] = wide(F.linear(head.hidden, weight, bias)).softmax(-1)[:, 1]
    for criterion, _ in asked:
        further = criterion.columns(head, logits)
        assert not columns.keys() & further.keys(), f"{criterion} names a column that is taken"
        columns |= further
    return columns


class Tops:
    """The most likely tokens of rows, as many as each asks for, under way.

    Args:
        logits: (rows, vocab).
        evaluations: a row each.
    """

    def __init__(self, logits: Tensor, evaluations: Evaluations) -> None:
        counts = [draws.params.logprobs for draws in evaluations.draws]
        for row in evaluations.targets:
            counts[row] = evaluations.draws[row].params.prompt_logprobs
        # By count: which of equally likely tokens topk takes depends on how many it takes, and must not on other rows.
        self._rows: dict[int, list[int]] = {}
        if any(counts):
            for row, count in enumerate(counts):
                if count:
                    self._rows.setdefault(min(count, logits.shape[1]), []).append(row)
            self._found = Copied(torch.cat([self._start(logits, *each) for each in self._rows.items()]))

    @staticmethod
    def _start(logits: Tensor, count: int, rows: list[int]) -> Tensor:
        """Tokens and their logits, side by side, row after row."""
        # The usual case, all rows alike, spares a copy of the logits.
        of = logits if len(rows) == len(logits) else logits.index_select(0, put(torch.tensor(rows), logits.device))
        values, tokens = of.topk(count)
        return torch.stack((tokens.double(), values.double()), dim=-1).flatten(0, 1)

    def wait(self, log_sum_exp: FloatArray) -> dict[int, tuple[tuple[int, float], ...]]:
        """(token, log-probability), best first, by row that asked; log_sum_exp: of all rows' logits."""
        out: dict[int, tuple[tuple[int, float], ...]] = {}
        if not self._rows:
            return out
        start, found = 0, self._found.wait()
        for count, rows in self._rows.items():
            stop = start + count * len(rows)
            pairs = found[start:stop].reshape(len(rows), count, 2)
            tokens, logprobs = pairs[..., 0].astype(np.int64), pairs[..., 1] - log_sum_exp[rows][:, None]
            for row, *columns in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                out[row] = tuple(zip(*columns, strict=True))
            start = stop
        return out
