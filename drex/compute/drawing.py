"""Draws the tokens of evaluated rows from their logits.

The order of what is applied is vLLM's: penalties, logit_bias and banned tokens, temperature, min_p, top_k, top_p. What
the host adds goes to the device through `put`, so that nothing here waits for the layers before it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from drex.compute.noise import gumbel
from drex.compute.transfer import put
from drex.control.hashing import Hashes, mix
from drex.control.plan import Draws, Evaluations, FloatArray, IntArray


class Reductions(Protocol):
    """What reads whole rows of logits: `TorchReductions`, or Triton kernels that read them once."""

    def prepare(self, logits: Tensor) -> Tensor:
        """The logits as the other methods take them, made once a pass."""

    def summarise(self, logits: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """The columns `argmax`, `best` and `log_sum_exp`, and those of `second` and `mean` that are wanted."""

    def draw(self, logits: Tensor, best: Tensor, temperatures: Tensor, keys: Hashes) -> Tensor:
        """Tokens: the argmax of (logit - best) / temperature plus the Gumbel noise of a 64-bit key. Shapes (rows,)."""


def wide_dtype(numbers: Tensor) -> torch.dtype:
    """What numbers are computed with: their own dtype, but at least float32."""
    return torch.promote_types(numbers.dtype, torch.float32)


def wide(numbers: Tensor) -> Tensor:
    """At least float32: a copy of 16-bit numbers."""
    return numbers.to(wide_dtype(numbers))


def draw(
    logits: Tensor, columns: Mapping[str, Tensor], evaluations: Evaluations, reductions: Reductions
) -> dict[str, Tensor]:
    """Decide tokens.

    Args:
        logits: (rows, vocab), prepared.
        columns: `argmax` and `best` of each row.
        evaluations: a row each.
        reductions: for rows that noise alone decides.

    Returns:
        Columns `token`, `adjusted` (the argmax after penalties, bias and bans) and `logit` (the token's).
    """
    argmax, targets, device = columns["argmax"], evaluations.targets, logits.device
    plain, special = _apart(evaluations)
    if not plain and not special and not targets:
        return {"token": argmax, "adjusted": argmax, "logit": columns["best"]}
    token, adjusted = (argmax.to(torch.long, copy=True) for _ in range(2))
    if plain:
        chosen = [evaluations.draws[row] for row in plain]
        # The usual case, all rows alike, needs no index.
        some = slice(None) if len(plain) == len(token) else put(torch.tensor(plain), device)
        keys = _keys(chosen, evaluations.positions[plain])
        heat = _column([each.params.temperature for each in chosen], logits)
        token[some] = reductions.draw(logits[some], columns["best"][some], heat, keys)
    if special:
        some = put(torch.tensor(special), device)
        token[some], adjusted[some] = _draw_specially(wide(logits.index_select(0, some)), special, evaluations)
    if targets:
        where, wanted = put(torch.tensor([list(targets), list(targets.values())]), device)
        token[where] = wanted
    return {"token": token, "adjusted": adjusted, "logit": logits.gather(1, token[:, None])[:, 0]}


def _apart(evaluations: Evaluations) -> tuple[list[int], list[int]]:
    """Rows that noise alone decides, and those whose logits are changed or cut off; the others are greedy, or told."""
    params = [each.params for each in evaluations.draws]
    plain = [row for row, each in enumerate(params) if each.temperature > 0]
    special = [row for row, each in enumerate(params) if each.reshapes]
    if evaluations.banned:
        special = sorted({*special, *(row for row, tokens in evaluations.banned.items() if tokens)})
    if evaluations.targets:
        special = [row for row in special if row not in evaluations.targets]
    if special or evaluations.targets:
        others = {*special, *evaluations.targets}
        plain = [row for row in plain if row not in others]
    return plain, special


def _draw_specially(logits: Tensor, rows: Sequence[int], evaluations: Evaluations) -> tuple[Tensor, Tensor]:
    """Tokens, and the argmax after penalties, bias and bans, of rows of logits, which are changed."""
    draws, positions = [evaluations.draws[row] for row in rows], evaluations.positions[rows]
    _penalise(logits, draws, positions)
    flat, vocab = logits.view(-1), logits.shape[1]
    biases = {row: each.params.logit_bias for row, each in enumerate(draws) if each.params.logit_bias}
    if biases:
        at = put(torch.from_numpy(_flat(biases, vocab)), logits.device)
        flat[at] += _column([value for bias in biases.values() for value in bias.values()], logits)
    banned = {number: evaluations.banned[row] for number, row in enumerate(rows) if evaluations.banned.get(row)}
    if banned:
        flat.index_fill_(0, put(torch.from_numpy(_flat(banned, vocab)), logits.device), -torch.inf)
    argmax = logits.argmax(-1)
    if not any(each.params.temperature for each in draws):
        return argmax, argmax
    return _sample(logits, draws, positions), argmax


def _penalise(logits: Tensor, draws: Sequence[Draws], positions: IntArray) -> None:
    """Repetition, presence and frequency penalties, in place. Shapes: logits (rows, vocab), the others (rows,)."""
    flat, vocab, params = logits.view(-1), logits.shape[1], [each.params for each in draws]
    seen, output = {}, {}
    for row, (each, position) in enumerate(zip(draws, positions.tolist(), strict=True)):
        if params[row].repetition_penalty != 1.0:
            seen[row] = each.tokens[: position + 1]
        if params[row].presence_penalty or params[row].frequency_penalty:
            output[row] = each.tokens[each.prompt_length : position + 1]
    if seen:
        places = np.unique(_flat(seen, vocab))
        at, penalty = put(torch.from_numpy(places), flat.device), [each.repetition_penalty for each in params]
        values, strength = flat[at], _spread(penalty, places, logits)
        flat[at] = torch.where(values > 0, values / strength, values * strength)
    if output:
        places, counts = np.unique(_flat(output, vocab), return_counts=True)
        frequency = _spread([each.frequency_penalty for each in params], places, logits)
        presence = _spread([each.presence_penalty for each in params], places, logits)
        flat[put(torch.from_numpy(places), flat.device)] -= frequency * _column(counts, logits) + presence


def _sample(logits: Tensor, draws: Sequence[Draws], positions: IntArray) -> Tensor:
    """Draw a token a row: temperature, min_p, top_k, top_p, then the argmax of logits + Gumbel noise."""
    temperatures = [each.params.temperature for each in draws]
    heat = _column([temperature or 1.0 for temperature in temperatures], logits)[:, None]
    scaled = (logits - logits.amax(-1, keepdim=True)) / heat
    if any(each.params.min_p > 0 for each in draws):
        min_p = _column([each.params.min_p for each in draws], logits)[:, None]
        floor = scaled.amax(-1, keepdim=True) + min_p.log()
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    if any(each.params.top_k > 0 or each.params.top_p < 1 for each in draws):
        scaled = _truncate(scaled, draws)
    noise = gumbel(_keys(draws, positions), logits.shape[-1], logits.device)
    drawn = (scaled.double() + noise).argmax(-1)
    if all(temperatures):
        return drawn
    greedy = put(torch.tensor([temperature == 0 for temperature in temperatures]), logits.device)
    return torch.where(greedy, scaled.argmax(-1), drawn)


def _truncate(scaled: Tensor, draws: Sequence[Draws]) -> Tensor:
    """top_k, then top_p over what is left. Shapes (rows, vocab) -> (rows, vocab)."""
    vocab, device = scaled.shape[-1], scaled.device
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    kept = [min(each.params.top_k, vocab) if each.params.top_k > 0 else vocab for each in draws]
    top_k = put(torch.tensor(kept), device)[:, None]
    ordered = ordered.masked_fill(torch.arange(vocab, device=device)[None] >= top_k, -torch.inf)
    top_p = _column([each.params.top_p for each in draws], scaled)[:, None]
    probabilities = ordered.softmax(-1)
    # A token stays while the mass before it is under top_p: the one that crosses it is kept.
    before = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -torch.inf)
    return torch.empty_like(scaled).scatter_(1, order, ordered)


def _keys(draws: Sequence[Draws], positions: IntArray) -> Hashes:
    """Of the noise of each row's token."""
    return mix([each.seed for each in draws], [each.sample for each in draws], positions)


def _column(values: Sequence[float] | FloatArray | IntArray, logits: Tensor) -> Tensor:
    """Numbers beside logits, in what those are computed with."""
    return put(torch.as_tensor(values, dtype=wide_dtype(logits)), logits.device)


def _spread(values: Sequence[float], places: IntArray, logits: Tensor) -> Tensor:
    """Of places in flat logits, the number of their row."""
    return _column(np.array(values)[places // logits.shape[1]], logits)


def _flat(tokens: Mapping[int, Collection[int]], vocab: int) -> IntArray:
    """Where tokens of rows are in flat logits, row after row."""
    sizes = [len(some) for some in tokens.values()]
    every = np.fromiter(chain.from_iterable(tokens.values()), np.int64, sum(sizes))
    return every + vocab * np.repeat(np.fromiter(tokens, np.int64, len(tokens)), sizes)
