"""Which heads a pass evaluates, and what becomes of a row when its verdict is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drex.config import ExitRule
from drex.control.drafts import Drafts
from drex.control.placement import Placed, Placement
from drex.control.plan import BoolArray, Evaluations, FloatArray, IntArray, Verdicts
from drex.control.seats import Seats
from drex.request import ExitCheck, Request, TokenRecord


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


class Decisions:
    """Asks heads, and takes in what they say.

    Args:
        seats: of the requests.
        placement: what rows give back that exit.
        drafts: what is not settled.
    """

    def __init__(self, seats: Seats, placement: Placement, drafts: Drafts) -> None:
        self.seats, self.placement, self.drafts = seats, placement, drafts

    def ask(self, segment: int, spans: IntArray, placed: Placed, *, checking: bool) -> Asked:
        """Heads to evaluate at the end of a segment: those of rows not decided yet that may exit there, or end there.

        Args:
            segment: that is run.
            spans: seats of the pass's spans. Shape (spans,).
            placed: its rows.
            checking: whether live rows may exit at all.
        """
        seats, final = self.seats, segment == self.seats.segments - 1
        owners, positions = np.repeat(spans, placed.sizes), placed.full.positions
        asked = (positions >= seats.settled[owners] - 1) & (seats.depth[owners, positions] == seats.segments)
        thresholds, unasked = np.full(len(owners), np.nan), 0
        if not final:
            thresholds = self._thresholds(segment, owners, positions)
            asked &= ~np.isnan(thresholds)
            if not checking:
                unasked, asked = int(asked.sum()), np.zeros_like(asked)
        rows = np.flatnonzero(asked)
        of, thresholds, live = owners[rows], thresholds[rows], len(rows)
        draws = seats.draws[of].tolist()
        banned, targets = {}, {}
        for number in np.flatnonzero(seats.restricted[of]).tolist():
            request = seats[of[number]]
            banned[number] = request.banned(int(positions[rows[number]]) + 1 - len(request.prompt))
        if seats.scored[spans].any():
            further = self._scored(segment, owners, positions)
            targets = {live + i: target for i, (*_, target) in enumerate(further)}
            rows = np.concatenate((rows, np.array([row for row, *_ in further], dtype=np.int64)))
            of = np.concatenate((of, np.array([seat for _, seat, *_ in further], dtype=np.int64)))
            thresholds = np.concatenate((thresholds, np.array([limit for *_, limit, _ in further])))
            draws += [seats[seat].score_draws for _, seat, *_ in further]
        positions = positions[rows]
        agreeing = np.zeros((2, len(of)), dtype=np.int64)
        if seats.patient.any():
            patient = seats.patient[of]
            agreeing[:, patient] = seats.agreeing[:, of[patient], positions[patient]]
        return Asked(Evaluations(rows, positions, thresholds, draws, agreeing, banned, targets), of, live, unasked)

    def _thresholds(self, segment: int, owners: IntArray, positions: IntArray) -> FloatArray:
        """Of rows at the exit after a segment."""
        seats = self.seats
        thresholds: FloatArray = seats.threshold[segment, owners]
        for row in np.flatnonzero(seats.decaying[owners] & (positions >= seats.settled[owners])).tolist():
            request = seats[owners[row]]
            number = int(positions[row]) + 1 - len(request.prompt)
            threshold = request.rule.threshold(segment, number, request.max_tokens)
            thresholds[row] = np.nan if threshold is None else threshold
        return thresholds

    def _scored(self, segment: int, owners: IntArray, positions: IntArray) -> list[tuple[int, int, float, int]]:
        """(full row, seat, threshold, target) of prompt rows whose next token is known and is to be scored."""
        out = []
        final = segment == self.seats.segments - 1
        for row in np.flatnonzero(self.seats.scored[owners]).tolist():
            seat, position = int(owners[row]), int(positions[row])
            request = self.seats[seat]
            rule, length = request.score_rule, len(request.prompt)
            assert rule is not None
            if position < length - 1 and position not in request.prompt_records:
                threshold = None if final else rule.threshold(segment, position, length)
                if final or threshold is not None:
                    out.append((row, seat, np.nan if threshold is None else threshold, request.tokens[position + 1]))
        return out

    def take_in(self, segment: int, asked: Asked, verdicts: Verdicts, exits: BoolArray) -> list[tuple[Request, int]]:
        """Note verdicts in the columns and the requests' records; returns who got tokens, and how many each.

        Args:
            segment: that ended.
            asked: what was evaluated.
            verdicts: in the same order.
            exits: whether the policy lets each row exit. Shape (evaluations,).
        """
        seats, live, depth = self.seats, asked.live, segment + 1
        of, positions = asked.seats, asked.evaluations.positions
        final = depth == seats.segments
        if seats.patient.any():
            seats.agreeing[:, of, positions] = verdicts.agreeing
        decided = np.ones_like(exits) if final else exits & ~seats.lossless[of]
        if not final:
            seats.confidence[segment, of, positions] = verdicts.confidences
        # What stands on nothing open, and has nothing standing on it.
        alone = positions + 1 == seats.reached[0, of]
        alone &= positions + 1 == seats.settled[of]
        alone[live:] = True
        chosen = np.flatnonzero(decided & alone)
        seats.depth[of[chosen], positions[chosen]] = depth
        seats.token[of[chosen], positions[chosen] + 1] = verdicts.tokens[chosen]
        settled = of[chosen[chosen < live]]
        seats.reached[0, settled] += 1
        seats.settled[settled] += 1
        if not final:
            self.placement.exited(of[chosen], positions[chosen], depth)
        records = self._records(depth, asked, verdicts, chosen)
        out = []
        for number, request, record in zip(chosen.tolist(), seats.requests[of[chosen]].tolist(), records, strict=True):
            if number < live:
                request.context.append(record.token_id)
                request.take(record)
                out.append((request, 1))
                if request.rule.schedule != "constant" or request.num_output == 1:
                    seats.look_ahead(request)
            else:
                request.prompt_records[int(positions[number])] = record
                request.depths[int(positions[number])] = depth
        rest = ~(decided & alone)
        rest[live:] = False
        rest &= seats.drafting[of]
        return out + self._run_ahead(segment, asked, verdicts, decided, np.flatnonzero(rest)) if rest.any() else out

    def _run_ahead(
        self, segment: int, asked: Asked, verdicts: Verdicts, decided: BoolArray, rows: IntArray
    ) -> list[tuple[Request, int]]:
        """Take in rows that stand on others, have others standing on them, or are to be gone on from."""
        seats, depth = self.seats, segment + 1
        of, positions = asked.seats, asked.evaluations.positions
        records = self._records(depth, asked, verdicts, rows)
        requests = seats.requests[of[rows]].tolist()
        void: set[Request] = set()
        for number, request, record in zip(rows.tolist(), requests, records, strict=True):
            position, token, sure = int(positions[number]), record.token_id, bool(decided[number])
            if request in void:
                continue
            stands = position + 1 < len(request.context)
            if stands and not self.drafts.verify(request, position, token, record if sure else None):
                void.add(request)
                stands = False
            if not stands and sure:
                self.drafts.hold(request, token, record)
            elif not stands:
                self.drafts.go_on(request, position, token, segment, record.confidence)
            if sure:
                seats.depth[of[number], position] = depth
                if depth < seats.segments:
                    self.placement.exited(of[number : number + 1], positions[number : number + 1], depth)
        out = []
        for request in dict.fromkeys(requests):
            count = self.drafts.settle(request)
            if count:
                seats.look_ahead(request)
                out.append((request, count))
        return out

    def _records(self, depth: int, asked: Asked, verdicts: Verdicts, chosen: IntArray) -> list[TokenRecord]:
        """What is recorded of evaluated rows, given that they are decided after so many segments."""
        of, positions = asked.seats[chosen], asked.evaluations.positions[chosen]
        columns = (
            chosen.tolist(),
            self.seats.requests[of].tolist(),
            positions.tolist(),
            verdicts.tokens[chosen].tolist(),
            verdicts.logprobs[chosen].tolist(),
            verdicts.confidences[chosen].tolist(),
            self.seats.confidence[:depth, of, positions].T.tolist(),
        )
        out, tops = [], verdicts.tops
        for number, request, position, token, logprob, confidence, passed in zip(*columns, strict=True):
            if number >= asked.live:
                checks = _checks(request.score_rule, position, len(request.prompt), passed)
            elif request.run_ahead == "lossless":
                # No exit decides anything there.
                checks = ()
            else:
                checks = _checks(request.rule, position + 1 - len(request.prompt), request.max_tokens, passed)
            out.append(TokenRecord(token, logprob, depth, confidence, checks, tops.get(number, ())))
        return out


def _checks(rule: ExitRule, number: int, most: int, confidences: Sequence[float]) -> tuple[ExitCheck, ...]:
    """What exits said of token `number` of at most so many, with the thresholds in force; NaN: it wasn't asked."""
    return tuple(
        [
            ExitCheck(exit_index, confidence, rule.threshold(exit_index, number, most) or 0.0)
            for exit_index, confidence in enumerate(confidences)
            if confidence == confidence
        ]
    )
