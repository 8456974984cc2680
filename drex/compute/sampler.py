"""From logits to verdicts: the token of each evaluated row, its log-probability and confidence, and whether it exits.

Confidence and log-probabilities are of the unscaled distribution. The order of what is applied to draw a token is
vLLM's: penalties, logit_bias and banned tokens, temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from drex.compute.criteria import Measured, agreeing_run, confidences
from drex.compute.noise import gumbel
from drex.control.hashing import mix
from drex.control.plan import Evaluation, Verdict


def judge(measured: Measured, evaluations: Sequence[Evaluation]) -> tuple[Verdict, ...]:
    """The verdicts on one pass's evaluations, with one copy to the host, and one more if most likely tokens are wanted.

    Args:
        measured: logits and hidden states, a row an evaluation.
        evaluations: in the same order.
    """
    confidence = confidences(measured, evaluations)
    tokens, best = _draw(measured, evaluations)
    logits = measured.logits
    logprob = logits.gather(1, tokens[:, None]).squeeze(1) - measured.log_sum_exp
    numbers = torch.stack(
        (tokens.double(), best.double(), measured.argmax.double(), logprob.double(), confidence.double())
    )
    verdicts = []
    for evaluation, values, top in zip(evaluations, numbers.T.tolist(), _tops(measured, evaluations), strict=True):
        token, adjusted, argmax, log_probability, certain = values
        # A penalty or bias that changes the argmax: the exit's confidence is not about this token.
        agrees = adjusted == argmax
        exited = evaluation.threshold is not None and certain >= evaluation.threshold and agrees
        verdicts.append(
            Verdict(
                token_id=int(token),
                logprob=log_probability,
                confidence=certain,
                exited=exited,
                agreeing=agreeing_run(evaluation, int(argmax)),
                top=top,
            )
        )
    return tuple(verdicts)


def _tops(measured: Measured, evaluations: Sequence[Evaluation]) -> list[tuple[tuple[int, float], ...]]:
    """The most likely tokens of each row with their log-probabilities, best first, as many as it asks for."""
    rows, vocab = measured.logits.shape
    # By count: which of equally likely tokens topk takes depends on how many it takes, and must not on other rows.
    wanting: dict[int, list[int]] = {}
    for row, evaluation in enumerate(evaluations):
        params = evaluation.draws.params
        count = params.prompt_logprobs if evaluation.target is not None else params.logprobs
        if count:
            wanting.setdefault(min(count, vocab), []).append(row)
    tops: list[tuple[tuple[int, float], ...]] = [()] * rows
    if not wanting:
        return tops
    found = []
    for count, chosen in wanting.items():
        # The usual case, all rows alike, spares a copy of the logits.
        logits = measured.logits if len(chosen) == rows else measured.logits[chosen]
        values, tokens = logits.topk(count)
        logprobs = values - measured.log_sum_exp[chosen, None]
        found.append(torch.stack((tokens.double(), logprobs.double()), dim=-1).flatten(0, 1))
    pairs = iter(torch.cat(found).tolist())
    for count, chosen in wanting.items():
        for row in chosen:
            tops[row] = tuple((int(token), logprob) for token, logprob in islice(pairs, count))
    return tops


def _draw(measured: Measured, evaluations: Sequence[Evaluation]) -> tuple[Tensor, Tensor]:
    """Tokens, and the argmax after penalties, bias and bans. Shapes (rows,) each."""
    tokens, best = measured.argmax.clone(), measured.argmax.clone()
    drawn = [
        row
        for row, e in enumerate(evaluations)
        if e.target is None and (e.draws.params.temperature > 0 or e.draws.params.changes_logits or e.banned)
    ]
    if drawn:
        logits = measured.logits[drawn]
        chosen = [evaluations[row] for row in drawn]
        for adjusted, evaluation in zip(logits, chosen, strict=True):
            _adjust(adjusted, evaluation)
        best[drawn] = logits.argmax(-1)
        tokens[drawn] = _sample(logits, chosen)
    for row, evaluation in enumerate(evaluations):
        if evaluation.target is not None:
            tokens[row] = evaluation.target
    return tokens, best


def _adjust(logits: Tensor, evaluation: Evaluation) -> None:
    """Penalties, bias and bans on one row, in place. logits: (vocab,)."""
    params = evaluation.draws.params
    history = evaluation.draws.tokens[: evaluation.position + 1]
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(history)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        output = torch.tensor(history[evaluation.draws.prompt_length :], dtype=torch.long, device=logits.device)
        counts = torch.bincount(output, minlength=len(logits)).to(logits.dtype)
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    if evaluation.banned:
        logits[list(evaluation.banned)] = -torch.inf


def _sample(logits: Tensor, evaluations: Sequence[Evaluation]) -> Tensor:
    """Draw a token a row: temperature, min_p, top_k, top_p, then the argmax of logits + Gumbel noise."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]

    temperature = column([e.draws.params.temperature for e in evaluations])
    greedy = temperature == 0
    # From the maximum down, so that a tiny temperature makes the others -inf and not the best ones inf.
    scaled = (logits - logits.amax(-1, keepdim=True)) / torch.where(greedy, 1.0, temperature)
    if any(e.draws.params.min_p > 0 for e in evaluations):
        min_p = column([e.draws.params.min_p for e in evaluations])
        floor = scaled.amax(-1, keepdim=True) + min_p.log()
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    if any(e.draws.params.top_k > 0 or e.draws.params.top_p < 1 for e in evaluations):
        scaled = _truncate(scaled, evaluations)
    keys = [mix(e.draws.seed, e.draws.sample, e.position) for e in evaluations]
    noise = gumbel(keys, logits.shape[-1], logits.device)
    return torch.where(greedy[:, 0], scaled.argmax(-1), (scaled.double() + noise).argmax(-1))


def _truncate(scaled: Tensor, evaluations: Sequence[Evaluation]) -> Tensor:
    """top_k, then top_p over what is left. Shapes (rows, vocab) -> (rows, vocab)."""
    vocab = scaled.shape[-1]
    device = scaled.device
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor(
        [min(e.draws.params.top_k, vocab) if e.draws.params.top_k > 0 else vocab for e in evaluations], device=device
    )
    ordered = ordered.masked_fill(torch.arange(vocab, device=device)[None] >= top_k[:, None], -torch.inf)
    top_p = torch.tensor([e.draws.params.top_p for e in evaluations], dtype=scaled.dtype, device=device)[:, None]
    probabilities = ordered.softmax(-1)
    # A token stays while the mass before it is under top_p: the one that crosses it is kept.
    before = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -torch.inf)
    return torch.empty_like(scaled).scatter_(1, order, ordered)
