"""Which heads a pass evaluates, and what becomes of a row when its verdict is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drex.config import ExitRule
from drex.control.placement import Placed
from drex.control.plan import BoolArray, Evaluations, IntArray, Verdicts
from drex.control.seats import Seats
from drex.request import ExitCheck, TokenRecord


class Asked(NamedTuple):
    """What a pass evaluates.

    Attributes:
        evaluations: the first `live` of them of live rows, the others of scored ones.
        seats: that they are of.
        live: how many.
        unasked: live rows that could have exited and are not asked.
    """

    evaluations: Evaluations
    seats: IntArray
    live: int
    unasked: int


def ask(seats: Seats, segment: int, spans: IntArray, stops: IntArray, placed: Placed, *, checking: bool) -> Asked:
    """Heads to evaluate at the end of a segment: those of rows not decided yet that may exit there, or end there.

    Args:
        seats: of the requests.
        segment: that is run.
        spans, stops: seats of the pass's spans, and where they stop. Shape (spans,) each.
        placed: its rows.
        checking: whether live rows may exit at all.
    """
    final, unasked = segment == seats.segments - 1, 0
    asked = stops == seats.reached[0, spans]
    thresholds = np.full(len(spans), np.nan)
    if not final:
        thresholds = seats.threshold[segment, spans]
        asked &= ~np.isnan(thresholds)
        if not checking:
            unasked, asked = int(asked.sum()), np.zeros_like(asked)
    # The live row is the last one of its span, and it runs.
    rows, of, thresholds = (placed.sizes.cumsum() - 1)[asked], spans[asked], thresholds[asked]
    live, banned, targets = len(of), {}, {}
    draws = [request.draws for request in seats.requests[of].tolist()]
    for number in np.flatnonzero(seats.restricted[of]).tolist():
        banned[number] = seats[of[number]].banned()
    if seats.scored[spans].any():
        further = _scored(seats, segment, np.repeat(spans, placed.sizes), placed.full.positions, final)
        targets = {live + i: target for i, (*_, target) in enumerate(further)}
        rows = np.concatenate((rows, np.array([row for row, *_ in further], dtype=np.int64)))
        of = np.concatenate((of, np.array([seat for _, seat, *_ in further], dtype=np.int64)))
        thresholds = np.concatenate((thresholds, np.array([limit for *_, limit, _ in further])))
        draws += [seats[seat].score_draws for _, seat, *_ in further]
    positions = placed.full.positions[rows]
    agreeing = np.zeros((2, len(of)), dtype=np.int64)
    if seats.patient.any():
        patient = seats.patient[of]
        agreeing[:, patient] = seats.agreeing[:, of[patient], positions[patient]]
    return Asked(Evaluations(rows, positions, thresholds, draws, agreeing, banned, targets), of, live, unasked)


def _scored(
    seats: Seats, segment: int, rows: IntArray, positions: IntArray, final: bool
) -> list[tuple[int, int, float, int]]:
    """(full row, seat, threshold, target) of prompt rows whose next token is known and is to be scored.

    rows, positions: seats and positions of all full rows.
    """
    out = []
    for row in np.flatnonzero(seats.scored[rows]).tolist():
        seat, position = int(rows[row]), int(positions[row])
        request = seats[seat]
        rule, length = request.score_rule, len(request.prompt)
        assert rule is not None
        if position < length - 1 and position not in request.prompt_records:
            threshold = None if final else rule.threshold(segment, position, length)
            if final or threshold is not None:
                out.append((row, seat, np.nan if threshold is None else threshold, request.tokens[position + 1]))
    return out


def record(seats: Seats, segment: int, asked: Asked, verdicts: Verdicts, exits: BoolArray) -> BoolArray:
    """Note verdicts, and which rows exit, in the columns and the requests' records; returns which rows are decided.

    A live row's token is appended; a scored row's was known.

    Args:
        seats: of the requests.
        segment: that ended.
        asked: what was evaluated.
        verdicts: in the same order.
        exits: whether the policy lets each row exit. Shape (evaluations,).
    """
    of, positions = asked.seats, asked.evaluations.positions
    if seats.patient.any():
        seats.agreeing[:, of, positions] = verdicts.agreeing
    decided = exits.copy()
    if segment == seats.segments - 1:
        decided[:] = True
    else:
        seats.confidence[segment, of, positions] = verdicts.confidences
    chosen = np.flatnonzero(decided)
    of, positions, depth = of[chosen], positions[chosen], segment + 1
    seats.depth[of, positions] = depth
    seats.token[of, positions + 1] = verdicts.tokens[chosen]
    seats.reached[0, of[chosen < asked.live]] += 1
    columns = (
        chosen.tolist(),
        seats.requests[of].tolist(),
        positions.tolist(),
        verdicts.tokens[chosen].tolist(),
        verdicts.logprobs[chosen].tolist(),
        verdicts.confidences[chosen].tolist(),
        seats.confidence[:depth, of, positions].T.tolist(),
    )
    tops = verdicts.tops
    for number, request, position, token, logprob, confidence, passed in zip(*columns, strict=True):
        top = tops.get(number, ())
        if number < asked.live:
            checks = _checks(request.rule, request.num_output, request.max_tokens, passed)
            request.records.append(TokenRecord(token, logprob, depth, confidence, checks, top))
            request.depths.append(depth)
            request.tokens.append(token)
            if request.rule.schedule != "constant" or request.num_output == 1:
                seats.look_ahead(request)
        else:
            assert request.score_rule is not None
            checks = _checks(request.score_rule, position, len(request.prompt), passed)
            request.prompt_records[position] = TokenRecord(token, logprob, depth, confidence, checks, top)
            request.depths[position] = depth
    return decided


def _checks(rule: ExitRule, number: int, most: int, confidences: Sequence[float]) -> tuple[ExitCheck, ...]:
    """What exits said of token `number` of at most so many, with the thresholds in force; NaN: it wasn't asked."""
    return tuple(
        [
            ExitCheck(exit_index, confidence, rule.threshold(exit_index, number, most) or 0.0)
            for exit_index, confidence in enumerate(confidences)
            if confidence == confidence
        ]
    )
