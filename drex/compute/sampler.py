"""From logits to verdicts: the token of each evaluated row, its log-probability and confidence, and whether it exits.

Confidence and log-probabilities are of the unscaled distribution. The order of what is applied to draw a token is
vLLM's: penalties, logit_bias and banned tokens, temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from drex.compute.criteria import Measured, agreeing_runs, confidences
from drex.compute.noise import gumbel
from drex.control.hashing import mix
from drex.control.plan import Draws, Evaluations, Verdicts


def judge(measured: Measured, evaluations: Evaluations) -> Verdicts:
    """The verdicts on one pass's evaluations, with one copy to the host, and one more if most likely tokens are wanted.

    Args:
        measured: logits and hidden states, a row an evaluation.
        evaluations: in the same order.
    """
    confidence = confidences(measured, evaluations)
    tokens, best = _draw(measured, evaluations)
    logprob = measured.logits.gather(1, tokens[:, None]).squeeze(1) - measured.log_sum_exp
    numbers = torch.stack(
        (tokens.double(), best.double(), measured.argmax.double(), logprob.double(), confidence.double())
    )
    token, adjusted, argmax, logprobs, certain = numbers.cpu().numpy()
    # NaN, where the row may not exit, is below nothing; and if a penalty or bias changes the argmax, the exit's
    # confidence is not about this token.
    exited = (certain >= evaluations.thresholds) & (adjusted == argmax)
    agreeing = agreeing_runs(evaluations, argmax.astype(np.int64))
    return Verdicts(token.astype(np.int64), logprobs, certain, exited, agreeing, _tops(measured, evaluations))


def _tops(measured: Measured, evaluations: Evaluations) -> dict[int, tuple[tuple[int, float], ...]]:
    """The most likely tokens of rows with their log-probabilities, best first, as many as each asks for."""
    rows, vocab = measured.logits.shape
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
        logits = measured.logits if len(chosen) == rows else measured.logits[chosen]
        values, tokens = logits.topk(count)
        logprobs = values - measured.log_sum_exp[chosen, None]
        found.append(torch.stack((tokens.double(), logprobs.double()), dim=-1).flatten(0, 1))
    pairs = iter(torch.cat(found).tolist())
    return {
        row: tuple((int(token), logprob) for token, logprob in islice(pairs, count))
        for count, chosen in wanting.items()
        for row in chosen
    }


def _draw(measured: Measured, evaluations: Evaluations) -> tuple[Tensor, Tensor]:
    """Tokens, and the argmax after penalties, bias and bans. Shapes (rows,) each."""
    tokens, best = measured.argmax.clone(), measured.argmax.clone()
    targets, banned = evaluations.targets, evaluations.banned
    drawn = [
        row
        for row, draws in enumerate(evaluations.draws)
        if (draws.params.temperature > 0 or draws.params.changes_logits or banned.get(row)) and row not in targets
    ]
    if drawn:
        logits = measured.logits[drawn]
        chosen, positions = [evaluations.draws[row] for row in drawn], evaluations.positions[drawn].tolist()
        for row, adjusted, draws, position in zip(drawn, logits, chosen, positions, strict=True):
            _adjust(adjusted, draws, position, banned.get(row, ()))
        best[drawn] = logits.argmax(-1)
        tokens[drawn] = _sample(logits, chosen, positions)
    for row, target in targets.items():
        tokens[row] = target
    return tokens, best


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

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]

    temperature = column([each.params.temperature for each in draws])
    greedy = temperature == 0
    # From the maximum down, so that a tiny temperature makes the others -inf and not the best ones inf.
    scaled = (logits - logits.amax(-1, keepdim=True)) / torch.where(greedy, 1.0, temperature)
    if any(each.params.min_p > 0 for each in draws):
        min_p = column([each.params.min_p for each in draws])
        floor = scaled.amax(-1, keepdim=True) + min_p.log()
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    if any(each.params.top_k > 0 or each.params.top_p < 1 for each in draws):
        scaled = _truncate(scaled, draws)
    keys = mix([each.seed for each in draws], [each.sample for each in draws], positions)
    noise = gumbel(keys, logits.shape[-1], logits.device)
    return torch.where(greedy[:, 0], scaled.argmax(-1), (scaled.double() + noise).argmax(-1))


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
