"""Which heads a pass evaluates, and what becomes of a row when its verdict is in.

Verdicts go into the columns at once, since the next pass is planned from these; the requests' own records are written
when there is time for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from drex.control.memory.placement import Placed, Placement
from drex.control.plan import BoolArray, Evaluations, FloatArray, IntArray, Verdicts
from drex.control.records import Decided
from drex.control.request import Request, TokenRecord
from drex.control.run_ahead.drafts import Drafts
from drex.control.seats import Seats

NOBODY = np.zeros(0, dtype=np.int64)


class Asked(NamedTuple):
    """What a pass evaluates.

    Attributes:
        evaluations: the first `live` of them of live rows, the others of scored ones.
        seats: that they are of; places: where, in the columns by position.
        live: how many.
        unasked: live rows that could have exited here first and are not asked.
        arrived: seats whose first row that is not settled is in the pass, asked or not. Shape (spans at most,).
    """

    evaluations: Evaluations
    seats: IntArray
    places: IntArray
    live: int
    unasked: int
    arrived: IntArray

    def kept(self, keep: BoolArray) -> Asked:
        """Only some of the evaluations, numbered anew. Shape of `keep`: (evaluations,)."""
        live = int(np.count_nonzero(keep[: self.live]))
        return self._replace(
            evaluations=self.evaluations.kept(keep), seats=self.seats[keep], places=self.places[keep], live=live
        )


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
        seats, final, owners = self.seats, segment == self.seats.segments - 1, placed.owners
        rows = (placed.full.positions + 1 >= seats.settled[owners]).nonzero()[0]
        of, positions, places = owners, placed.full.positions, placed.full_places
        if len(rows) < len(of):
            of, positions, places = of[rows], positions[rows], places[rows]
        arrived = of
        if seats.having["drafting"]:
            arrived = of[positions + 1 == seats.settled[of]]
            # Behind an open row others may be decided, and held.
            open_ = seats.depth.take(places) == seats.segments
            if np.count_nonzero(open_) < len(open_):
                rows, of, positions, places = rows[open_], of[open_], positions[open_], places[open_]
        unasked = 0
        if final:
            thresholds = np.empty(len(rows))
            thresholds.fill(np.nan)
        else:
            thresholds = self._thresholds(segment, of, positions)
            barred = np.isnan(thresholds)
            if not checking:
                unasked = int(np.isnan(seats.threshold[:segment, of[~barred]]).all(0).sum())
                barred[:] = True
            if np.count_nonzero(barred):
                asked = ~barred
                rows, of, positions, places = rows[asked], of[asked], positions[asked], places[asked]
                thresholds = thresholds[asked]
        live, draws = len(rows), seats.draws[of].tolist()
        banned: dict[int, tuple[int, ...]] = {}
        if seats.having["fewest"]:
            early = positions + 1 - seats.prompt[of] < seats.fewest[of]
            banned = {number: seats[of[number]].banned for number in early.nonzero()[0].tolist()}
        targets: dict[int, int] = {}
        if seats.having["scored"] and np.count_nonzero(seats.scored[spans]):
            further = self._scored(segment, owners, placed.full.positions)
            targets = {live + i: target for i, (*_, target) in enumerate(further)}
            rows = np.concatenate((rows, np.array([row for row, *_ in further], dtype=np.int64)))
            thresholds = np.concatenate((thresholds, np.array([limit for *_, limit, _ in further])))
            draws += [seats[seat].score_draws for _, seat, *_ in further]
            of, positions, places = owners[rows], placed.full.positions[rows], placed.full_places[rows]
        agreeing = np.zeros((2, len(of)), dtype=np.int64)
        if seats.having["patient"]:
            patient = seats.patient[of]
            agreeing[:, patient] = seats.agreeing[:, of[patient], positions[patient]]
        evaluations = Evaluations(rows, positions, thresholds, draws, agreeing, banned, targets)
        return Asked(evaluations, of, places, live, unasked, arrived)

    def could_exit(self, asked: Asked) -> int:
        """Evaluated live rows that might have exited somewhere."""
        return int((~np.isnan(self.seats.threshold[:, asked.seats[: asked.live]])).any(0).sum())

    def _thresholds(self, segment: int, owners: IntArray, positions: IntArray) -> FloatArray:
        """Of rows that are not settled, at the exit after a segment."""
        seats = self.seats
        thresholds: FloatArray = seats.threshold[segment][owners]
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
        of, positions, final = asked.seats, asked.evaluations.positions, depth == seats.segments
        if seats.having["patient"]:
            seats.agree(of, positions, verdicts.agreeing)
        decided = np.ones(len(of), dtype=np.bool_) if final else exits
        if not final:
            seats.judge(segment, asked.places, verdicts.confidences)
            if seats.having["lossless"]:
                # No exit decides a token of a lossless request; rows of a scored prompt have a rule of their own.
                decided = exits.copy()
                decided[:live] &= ~seats.lossless[of[:live]]
        now, rest = decided, NOBODY
        if seats.having["drafting"]:
            # What stands on nothing open, and has nothing standing on it.
            alone = positions + 1 == seats.reached[0][of]
            alone &= positions + 1 == seats.settled[of]
            alone[live:] = True
            now = decided & alone
            rest = (~now & seats.drafting[of])[:live].nonzero()[0]
        out = self._decided(depth, asked, verdicts, now.nonzero()[0])
        if out.requests:
            self._settle(out, asked.places[out.numbers])
        return out, self._run_ahead(segment, asked, verdicts, decided, rest) if len(rest) else []

    def _settle(self, decided: Decided, places: IntArray) -> None:
        """Rows are decided that stand on nothing open, and that nothing stands on; `places` are theirs."""
        seats, live = self.seats, decided.live
        seats.decide(places, decided.depth)
        if decided.depth < seats.segments:
            self.placement.exited(places, decided.depth)
        if live < len(places):
            seats.measure(places[live:])
        seats.write(places + 1, decided.verdicts.tokens[decided.numbers])
        of, known = decided.seats[:live], decided.positions[:live] + 2
        seats.settle(of, known)
        # Penalties go by what was said so far, in the next pass too.
        for request, token in zip(decided.requests[:live], decided.tokens, strict=False):
            request.say(token)
        changing = known == seats.prompt[of] + 1
        if seats.having["decaying"]:
            changing |= seats.decaying[of]
        if np.count_nonzero(changing):
            for seat in of[changing].tolist():
                seats.look_ahead(seats[seat])

    def record(self, decided: Decided) -> None:
        """Write what was decided into the requests."""
        records, live = decided.records(), decided.live
        for request, record in zip(decided.requests[:live], records, strict=False):
            request.take(record)
        of_prompts = zip(decided.requests[live:], decided.positions[live:].tolist(), records[live:], strict=True)
        for request, position, record in of_prompts:
            request.score(position, record)

    def _run_ahead(
        self, segment: int, asked: Asked, verdicts: Verdicts, decided: BoolArray, rows: IntArray
    ) -> list[tuple[Request, int]]:
        """Take in rows that stand on others, have others standing on them, or are to be gone on from."""
        seats, depth = self.seats, segment + 1
        of, positions = asked.seats, asked.evaluations.positions
        kept = decided[rows]
        records: list[TokenRecord | None] = [None] * len(rows)
        if sure := kept.nonzero()[0].tolist():
            found = self._decided(depth, asked, verdicts, rows[kept]).records()
            for at, record in zip(sure, found, strict=True):
                records[at] = record
        requests: list[Request] = seats.requests[of[rows]].tolist()
        said = verdicts.tokens[rows].tolist(), verdicts.confidences[rows].tolist(), records
        void: set[Request] = set()
        verified: set[Request] = set()
        columns = range(len(rows)), requests, positions[rows].tolist(), *said
        for at, request, position, token, confidence, known in zip(*columns, strict=True):
            if request in void:
                kept[at] = False
                continue
            if position + 1 < len(request.context):
                verified.add(request)
                if self.drafts.verify(request, position, token, known):
                    continue
                void.add(request)
            if known is not None:
                self.drafts.hold(request, token, known)
            else:
                self.drafts.go_on(request, position, token, segment, confidence)
        if sure:
            places = asked.places[rows[kept]]
            seats.decide(places, depth)
            if depth < seats.segments:
                self.placement.exited(places, depth)
        out = []
        for request in dict.fromkeys(requests):
            count = self.drafts.settle(request)
            if count:
                if seats.decaying[request.seat]:
                    seats.look_ahead(request)
                out.append((request, count))
            elif request in verified:
                self.drafts.weigh(request)
        return out

    def _decided(self, depth: int, asked: Asked, verdicts: Verdicts, numbers: IntArray) -> Decided:
        """Some evaluations, with what the columns know of them now."""
        seats, of, positions = self.seats, asked.seats[numbers], asked.evaluations.positions[numbers]
        live = len(numbers) if asked.live == len(asked.seats) else int(numbers.searchsorted(asked.live))
        passed = seats.confidence_at(asked.places[numbers])[:depth]
        if seats.having["lossless"]:
            # No exit decides anything there.
            passed[:, seats.lossless[of[:live]].nonzero()[0]] = np.nan
        requests: list[Request] = seats.requests[of].tolist()
        tokens: list[int] = verdicts.tokens[numbers].tolist()
        bars = seats.bars.take(of, axis=1)
        if seats.having["decaying"]:
            for row in seats.decaying[of[:live]].nonzero()[0].tolist():
                bars[:, row] = requests[row].bars(int(positions[row]) + 1 - len(requests[row].prompt))
        for row in range(live, len(requests)):
            rule, length = requests[row].score_rule, len(requests[row].prompt)
            assert rule is not None
            bars[:, row] = rule.bars(int(positions[row]), length)
        return Decided(verdicts, depth, live, numbers, of, positions, requests, tokens, passed, bars)
