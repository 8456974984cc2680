"""From logits to verdicts: the token of each evaluated row, its log-probability and confidence, and whether it exits.

Confidence and log-probabilities are of the unscaled distribution. The order of what is applied to draw a token is
vLLM's: penalties, logit_bias and banned tokens, temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drex.compute.criteria import Measured, agreeing_runs, by_criterion, confidences
from drex.compute.noise import gumbel
from drex.compute.transfer import Copied
from drex.control.hashing import Hashes, mix
from drex.control.plan import Draws, Evaluations, FloatArray, Verdicts

NEEDS = {"margin": "second", "entropy": "mean", "state": "cosine", "probe": "probed"}
"""What a criterion needs beyond the columns that always are there."""


@dataclass(frozen=True)
class HeadOutput:
    """What a head was given and gave, a row an evaluation.

    Attributes:
        logits: (rows, vocab), unscaled.
        hidden, before: the segment's output and what its last layer was given, (rows, hidden).
        segment: that ends here.
        final: whether this is the final head.
        probe: (weight (2, hidden), bias (2,)) of this exit, if it has one.
    """

    logits: Tensor
    hidden: Tensor
    before: Tensor
    segment: int
    final: bool
    probe: tuple[Tensor, Tensor] | None


class Reductions(Protocol):
    """What reads whole rows of logits: `TorchReductions`, or Triton kernels that read them once."""

    def prepare(self, logits: Tensor) -> Tensor:
        """The logits as the other methods take them, made once a pass."""

    def summarise(self, logits: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """The columns `argmax`, `best` and `log_sum_exp`, and those of `second` and `mean` that are wanted."""

    def draw(self, logits: Tensor, best: Tensor, temperatures: Tensor, keys: Hashes) -> Tensor:
        """Tokens: the argmax of (logit - best) / temperature plus the Gumbel noise of a 64-bit key. Shapes (rows,)."""


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
    """The verdicts of one pass's evaluations, under way: one small copy to the host, and one more for `tops`.

    Args:
        head: its output, which must stay as it is until `verdicts` was called.
        evaluations: in the same order.
        reductions: for the logits.
    """

    def __init__(self, head: HeadOutput, evaluations: Evaluations, reductions: Reductions) -> None:
        self.head, self.evaluations = head, evaluations
        self._logits = reductions.prepare(head.logits)
        columns = _measure(head, self._logits, evaluations, reductions)
        columns |= _draw(self._logits, columns, evaluations, reductions)
        self._names = list(columns)
        self._numbers = Copied(torch.stack([column.double() for column in columns.values()]))

    def verdicts(self) -> Verdicts:
        """Wait for them."""
        columns = dict(zip(self._names, self._numbers.wait(), strict=True))
        head, evaluations = self.head, self.evaluations
        argmax = columns["argmax"].astype(np.int64)
        measured = Measured(columns, head.logits.shape[1], head.segment, head.final)
        certain = confidences(measured, evaluations)
        # NaN, where the row may not exit, is below nothing; and if a penalty or bias changes the argmax, the exit's
        # confidence is not about this token.
        exited = (certain >= evaluations.thresholds) & (columns["adjusted"] == argmax)
        return Verdicts(
            tokens=columns["token"].astype(np.int64),
            logprobs=columns["logit"] - columns["log_sum_exp"],
            confidences=certain,
            exited=exited,
            agreeing=agreeing_runs(evaluations, argmax),
            tops=_tops(self._logits, columns["log_sum_exp"], evaluations),
        )


def wide(logits: Tensor) -> Tensor:
    """At least float32: a copy of 16-bit numbers."""
    return logits.to(wide_dtype(logits))


def wide_dtype(numbers: Tensor) -> torch.dtype:
    """What `wide` makes of them."""
    return torch.promote_types(numbers.dtype, torch.float32)


def _measure(head: HeadOutput, logits: Tensor, evaluations: Evaluations, reductions: Reductions) -> dict[str, Tensor]:
    """The columns that confidences are computed from."""
    wanted = {NEEDS[name] for name in by_criterion(evaluations, final=head.final) if name in NEEDS}
    columns = reductions.summarise(logits, wanted)
    if "cosine" in wanted:
        columns["cosine"] = F.cosine_similarity(wide(head.before), wide(head.hidden), dim=-1)
    if "probed" in wanted:
        assert head.probe is not None
        weight, bias = head.probe
        columns["probed"] = wide(F.linear(head.hidden, weight, bias)).softmax(-1)[:, 1]
    return columns


def _tops(
    logits: Tensor, log_sum_exp: FloatArray, evaluations: Evaluations
) -> dict[int, tuple[tuple[int, float], ...]]:
    """The most likely tokens of rows with their log-probabilities, best first, as many as each asks for."""
    rows, vocab = logits.shape
    # By count: which of equally likely tokens topk takes depends on how many it takes, and must not on other rows.
    wanting: dict[int, list[int]] = {}
    for row, draws in enumerate(evaluations.draws):
        count = draws.params.prompt_logprobs if row in evaluations.targets else draws.params.logprobs
        if count:
            wanting.setdefault(min(count, vocab), []).append(row)
    if not wanting:
        return {}
    found = []
    for count, chosen in wanting.items():
        # The usual case, all rows alike, spares a copy of the logits.
        values, tokens = (logits if len(chosen) == rows else logits[chosen]).topk(count)
        found.append(torch.stack((tokens.double(), values.double()), dim=-1).flatten(0, 1))
    pairs = iter(torch.cat(found).tolist())
    total = log_sum_exp.tolist()
    return {
        row: tuple((int(token), logit - total[row]) for token, logit in islice(pairs, count))
        for count, chosen in wanting.items()
        for row in chosen
    }


def _draw(
    logits: Tensor, columns: dict[str, Tensor], evaluations: Evaluations, reductions: Reductions
) -> dict[str, Tensor]:
    """Columns `token`, `adjusted` (the argmax after penalties, bias and bans) and `logit` (the token's)."""
    argmax, targets, banned = columns["argmax"], evaluations.targets, evaluations.banned
    plain, special = [], []
    for row, draws in enumerate(evaluations.draws):
        params = draws.params
        if row in targets:
            continue
        if params.changes_logits or banned.get(row) or (params.temperature > 0 and params.truncates):
            special.append(row)
        elif params.temperature > 0:
            plain.append(row)
    if not plain and not special and not targets:
        return {"token": argmax, "adjusted": argmax, "logit": columns["best"]}
    token, adjusted = argmax.long(), argmax
    # The usual case, all rows alike, needs no index.
    some = slice(None) if len(plain) == len(evaluations) else plain
    if plain:
        chosen = [evaluations.draws[row] for row in plain]
        keys = _keys(chosen, evaluations.positions[plain].tolist())
        heat = torch.tensor(
            [each.params.temperature for each in chosen], dtype=wide_dtype(logits), device=logits.device
        )
        drawn = reductions.draw(logits[some], columns["best"][some], heat, keys)
        token = token.clone()
        token[some] = drawn.long()
    if special:
        picked, best = _draw_specially(wide(logits[special]), special, evaluations)
        token, adjusted = token.clone(), argmax.long().clone()
        token[special], adjusted[special] = picked, best
    if targets:
        token = token.clone()
        token[list(targets)] = torch.tensor(list(targets.values()), device=logits.device)
    return {"token": token, "adjusted": adjusted, "logit": logits.gather(1, token[:, None])[:, 0]}


def _draw_specially(logits: Tensor, rows: Sequence[int], evaluations: Evaluations) -> tuple[Tensor, Tensor]:
    """Tokens, and the argmax after penalties, bias and bans, of rows of logits, which are changed."""
    chosen, positions = [evaluations.draws[row] for row in rows], evaluations.positions[list(rows)].tolist()
    for row, adjusted, draws, position in zip(rows, logits, chosen, positions, strict=True):
        _adjust(adjusted, draws, position, evaluations.banned.get(row, ()))
    return _sample(logits, chosen, positions), logits.argmax(-1)


def _adjust(logits: Tensor, draws: Draws, position: int, banned: Sequence[int]) -> None:
    """Penalties, bias and bans on one row, in place. logits: (vocab,)."""
    params = draws.params
    history = draws.tokens[: position + 1]
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(history)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        output = torch.tensor(history[draws.prompt_length :], dtype=torch.long, device=logits.device)
        counts = torch.bincount(output, minlength=len(logits)).to(logits.dtype)
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    if banned:
        logits[list(banned)] = -torch.inf


def _sample(logits: Tensor, draws: Sequence[Draws], positions: Sequence[int]) -> Tensor:
    """Draw a token a row: temperature, min_p, top_k, top_p, then the argmax of logits + Gumbel noise."""
    temperature = _column([each.params.temperature for each in draws], logits)[:, None]
    greedy = temperature == 0
    scaled = (logits - logits.amax(-1, keepdim=True)) / torch.where(greedy, 1.0, temperature)
    if any(each.params.min_p > 0 for each in draws):
        min_p = _column([each.params.min_p for each in draws], logits)[:, None]
        floor = scaled.amax(-1, keepdim=True) + min_p.log()
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    if any(each.params.top_k > 0 or each.params.top_p < 1 for each in draws):
        scaled = _truncate(scaled, draws)
    noise = gumbel(_keys(draws, positions), logits.shape[-1], logits.device)
    return torch.where(greedy[:, 0], scaled.argmax(-1), (scaled.double() + noise).argmax(-1))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _keys(draws: Sequence[Draws], positions: Sequence[int]) -> Hashes:
    """Of the noise of each row's token."""
    return mix([each.seed for each in draws], [each.sample for each in draws], positions)


def _truncate(scaled: Tensor, draws: Sequence[Draws]) -> Tensor:
    """top_k, then top_p over what is left. Shapes (rows, vocab) -> (rows, vocab)."""
    vocab = scaled.shape[-1]
    device = scaled.device
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor(
        [min(each.params.top_k, vocab) if each.params.top_k > 0 else vocab for each in draws], device=device
    )
    ordered = ordered.masked_fill(torch.arange(vocab, device=device)[None] >= top_k[:, None], -torch.inf)
    top_p = torch.tensor([each.params.top_p for each in draws], dtype=scaled.dtype, device=device)[:, None]
    probabilities = ordered.softmax(-1)
    # A token stays while the mass before it is under top_p: the one that crosses it is kept.
    before = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -torch.inf)
    return torch.empty_like(scaled).scatter_(1, order, ordered)
