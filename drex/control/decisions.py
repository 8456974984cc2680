"""Which heads a pass evaluates, and what becomes of a row when its verdict is in.

Verdicts go into the columns at once, since the next pass is planned from these; the requests' own records are written
when there is time for it.
"""

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
        unasked: live rows that could have exited here first and are not asked.
    """

    evaluations: Evaluations
    seats: IntArray
    live: int
    unasked: int

    def kept(self, keep: BoolArray) -> Asked:
        """Only some of the evaluations, numbered anew. Shape of `keep`: (evaluations,)."""
        live = int(np.count_nonzero(keep[: self.live]))
        return Asked(self.evaluations.kept(keep), self.seats[keep], live, self.unasked)


class Decided(NamedTuple):
    """Rows with a verdict, and all that their records are made of.

    Attributes:
        asked, verdicts: of the pass; depth: segments executed.
        numbers, positions: which of the evaluations, and where in the requests. Shape (rows,).
        requests: theirs.
        passed: what the exit points so far said of each, NaN where they weren't asked. (rows, exit points passed).
    """

    asked: Asked
    verdicts: Verdicts
    depth: int
    numbers: IntArray
    positions: IntArray
    requests: list[Request]
    passed: FloatArray


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
        owners = placed.owners
        rows = (placed.full.positions >= seats.settled[owners] - 1).nonzero()[0]
        of, positions = owners[rows], placed.full.positions[rows]
        if seats.having["drafting"]:
            # Behind an open row others may be decided, and held.
            open_ = seats.depth[of, positions] == seats.segments
            rows, of, positions = rows[open_], of[open_], positions[open_]
        unasked, thresholds = 0, np.empty(len(rows))
        if final:
            thresholds.fill(np.nan)
        else:
            thresholds = self._thresholds(segment, of, positions)
            allowed = ~np.isnan(thresholds)
            if not checking:
                unasked = int(np.isnan(seats.threshold[:segment, of[allowed]]).all(0).sum())
                allowed[:] = False
            rows, of, positions, thresholds = rows[allowed], of[allowed], positions[allowed], thresholds[allowed]
        live, draws = len(rows), seats.draws[of].tolist()
        banned: dict[int, tuple[int, ...]] = {}
        if seats.having["fewest"]:
            early = positions + 1 - seats.prompt[of] < seats.fewest[of]
            banned = {number: seats[of[number]].banned for number in early.nonzero()[0].tolist()}
        targets: dict[int, int] = {}
        if seats.having["scored"] and seats.scored[spans].any():
            further = self._scored(segment, owners, placed.full.positions)
            targets = {live + i: target for i, (*_, target) in enumerate(further)}
            rows = np.concatenate((rows, np.array([row for row, *_ in further], dtype=np.int64)))
            of = np.concatenate((of, np.array([seat for _, seat, *_ in further], dtype=np.int64)))
            thresholds = np.concatenate((thresholds, np.array([limit for *_, limit, _ in further])))
            draws += [seats[seat].score_draws for _, seat, *_ in further]
            positions = placed.full.positions[rows]
        agreeing = np.zeros((2, len(of)), dtype=np.int64)
        if seats.having["patient"]:
            patient = seats.patient[of]
            agreeing[:, patient] = seats.agreeing[:, of[patient], positions[patient]]
        return Asked(Evaluations(rows, positions, thresholds, draws, agreeing, banned, targets), of, live, unasked)

    def could_exit(self, asked: Asked) -> int:
        """Evaluated live rows that might have exited somewhere."""
        return int((~np.isnan(self.seats.threshold[:, asked.seats[: asked.live]])).any(0).sum())

    def _thresholds(self, segment: int, owners: IntArray, positions: IntArray) -> FloatArray:
        """Of rows that are not settled, at the exit after a segment."""
        seats = self.seats
        thresholds: FloatArray = seats.threshold[segment, owners]
        if not seats.having["decaying"]:
            return thresholds
        for row in (seats.decaying[owners] & (positions >= seats.settled[owners])).nonzero()[0].tolist():
            request = seats[owners[row]]
            number = int(positions[row]) + 1 - len(request.prompt)
            threshold = request.rule.threshold(segment, number, request.max_tokens)
            thresholds[row] = np.nan if threshold is None else threshold
        return thresholds

    def _scored(self, segment: int, owners: IntArray, positions: IntArray) -> list[tuple[int, int, float, int]]:
        """(full row, seat, threshold, target) of prompt rows whose next token is known and is to be scored."""
        out = []
        seats, final = self.seats, segment == self.seats.segments - 1
        unmeasured = seats.scored[owners] & (positions < seats.prompt[owners] - 1) & ~seats.measured[owners, positions]
        for row in np.flatnonzero(unmeasured).tolist():
            seat, position = int(owners[row]), int(positions[row])
            request = seats[seat]
            rule, length = request.score_rule, len(request.prompt)
            assert rule is not None
            threshold = None if final else rule.threshold(segment, position, length)
            if final or threshold is not None:
                out.append((row, seat, np.nan if threshold is None else threshold, request.prompt[position + 1]))
        return out

    def take_in(
        self, segment: int, asked: Asked, verdicts: Verdicts, exits: BoolArray
    ) -> tuple[Decided, list[tuple[Request, int]]]:
        """Note verdicts in the columns.

        Args:
            segment: that ended.
            asked: what was evaluated.
            verdicts: in the same order.
            exits: whether the policy lets each row exit. Shape (evaluations,).

        Returns:
            What is still to be recorded, a token a row and none of a request twice; and who got tokens that are
            recorded, and how many each.
        """
        seats, live, depth = self.seats, asked.live, segment + 1
        of, positions = asked.seats, asked.evaluations.positions
        final = depth == seats.segments
        if seats.having["patient"]:
            seats.agreeing[:, of, positions] = verdicts.agreeing
        decided = np.ones_like(exits) if final else exits.copy()
        if not final:
            # No exit decides a token of a lossless request; rows of a scored prompt have a rule of their own.
            decided[:live] &= ~seats.lossless[of[:live]]
        if not final:
            seats.confidence[segment, of, positions] = verdicts.confidences
        # What stands on nothing open, and has nothing standing on it.
        alone = positions + 1 == seats.reached[0, of]
        alone &= positions + 1 == seats.settled[of]
        alone[live:] = True
        chosen = np.flatnonzero(decided & alone)
        seats.depth[of[chosen], positions[chosen]] = depth
        seats.token[of[chosen], positions[chosen] + 1] = verdicts.tokens[chosen]
        measured = chosen[chosen >= live]
        seats.measured[of[measured], positions[measured]] = True
        settled = of[chosen[chosen < live]]
        seats.reached[0, settled] += 1
        seats.settled[settled] += 1
        if not final:
            self.placement.exited(of[chosen], positions[chosen], depth)
        out = self._decided(depth, asked, verdicts, chosen)
        # Penalties go by what was said so far, in the next pass too.
        for request, token in zip(out.requests, verdicts.tokens[chosen[: len(settled)]].tolist(), strict=False):
            request.context.append(token)
        for seat in settled[seats.decaying[settled] | (seats.settled[settled] == seats.prompt[settled] + 1)].tolist():
            seats.look_ahead(seats[seat])
        rest = ~(decided & alone)
        rest[live:] = False
        rest &= seats.drafting[of]
        return out, self._run_ahead(segment, asked, verdicts, decided, rest.nonzero()[0]) if rest.any() else []

    def record(self, decided: Decided) -> None:
        """Write what was decided into the requests."""
        columns = decided.numbers.tolist(), decided.requests, decided.positions.tolist(), self._records(decided)
        for number, request, position, record in zip(*columns, strict=True):
            if number < decided.asked.live:
                request.take(record)
            else:
                request.prompt_records[position] = record
                request.depths[position] = decided.depth

    def _run_ahead(
        self, segment: int, asked: Asked, verdicts: Verdicts, decided: BoolArray, rows: IntArray
    ) -> list[tuple[Request, int]]:
        """Take in rows that stand on others, have others standing on them, or are to be gone on from."""
        seats, depth = self.seats, segment + 1
        of, positions = asked.seats, asked.evaluations.positions
        sure = rows[decided[rows]]
        records = dict(zip(sure.tolist(), self._records(self._decided(depth, asked, verdicts, sure)), strict=True))
        requests: list[Request] = seats.requests[of[rows]].tolist()
        said = verdicts.tokens[rows].tolist(), verdicts.confidences[rows].tolist()
        void: set[Request] = set()
        verified: set[Request] = set()
        gone: list[int] = []
        columns = rows.tolist(), requests, positions[rows].tolist(), *said
        for number, request, position, token, confidence in zip(*columns, strict=True):
            if request in void:
                continue
            record = records.get(number)
            stands = position + 1 < len(request.context)
            if stands:
                verified.add(request)
                if not self.drafts.verify(request, position, token, record):
                    void.add(request)
                    stands = False
            if not stands and record is not None:
                self.drafts.hold(request, token, record)
            elif not stands:
                self.drafts.go_on(request, position, token, segment, confidence)
            if record is not None:
                gone.append(number)
        seats.depth[of[gone], positions[gone]] = depth
        if depth < seats.segments:
            self.placement.exited(of[gone], positions[gone], depth)
        out = []
        for request in dict.fromkeys(requests):
            count = self.drafts.settle(request)
            if count:
                seats.look_ahead(request)
                out.append((request, count))
            elif request in verified:
                self.drafts.weigh(request)
        return out

    def _decided(self, depth: int, asked: Asked, verdicts: Verdicts, numbers: IntArray) -> Decided:
        """Some evaluations, with what the columns know of them now."""
        of, positions = asked.seats[numbers], asked.evaluations.positions[numbers]
        passed = self.seats.confidence[:depth, of, positions].T
        return Decided(asked, verdicts, depth, numbers, positions, self.seats.requests[of].tolist(), passed)

    @staticmethod
    def _records(decided: Decided) -> list[TokenRecord]:
        """Of each row, given that it is decided at that depth."""
        asked, verdicts, numbers, depth = decided.asked, decided.verdicts, decided.numbers, decided.depth
        columns = (
            numbers.tolist(),
            decided.requests,
            decided.positions.tolist(),
            verdicts.tokens[numbers].tolist(),
            verdicts.logprobs[numbers].tolist(),
            verdicts.confidences[numbers].tolist(),
            decided.passed.tolist(),
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
    """The exit checks of one token, with the thresholds in force.

    Args:
        rule: the request's.
        number: of the token among the request's outputs, from 0.
        most: outputs that the request may have.
        confidences: of each exit point that the row has passed; NaN where it was not asked.
    """
    return tuple(
        [
            ExitCheck(exit_index, confidence, rule.bar(exit_index, number, most))
            for exit_index, confidence in enumerate(confidences)
            if confidence == confidence
        ]
    )
