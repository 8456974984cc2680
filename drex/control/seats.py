"""Columns of what runs: one seat a request, one array a fact, so that a pass is planned without a loop over requests.

A request has no phase: `reached` says how far each segment has come, and what is pending follows from that.

Invariants: `reached` descends along its first axis; all that is here of a seated request follows from its own record
and the passes it has been in, so a request that loses its seat loses nothing that matters.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from drex.control.deadlines import pace
from drex.control.plan import BoolArray, FloatArray, IntArray
from drex.control.request import Request

RARE = ("drafting", "lossless", "decaying", "scored", "patient", "fewest", "paced")
"""Columns that few requests have anything in: whole passes go without a look at them."""


class Seats:
    """The running requests.

    Args:
        seats: how many may run.
        segments: of the model.
        room: positions that a request may reach.

    Attributes:
        requests: None where the seat is empty. Shape (seats,), as all that has no other.
        idle: whether a request sits there that no outstanding pass holds.
        decodes: whether it has a token, and no prompt or replay still to pass the first segment; once it does, it
            does so until it leaves. catching_up: how many have yet to.
        reached: how many positions have come to each segment: known tokens at the first, positions with K/V at all
            segments last. (segments + 1, seats).
        prompt: its length.
        settled: tokens that are certain, the prompt's included; `reached` counts tentative ones too.
        drafting, lossless: whether the request runs ahead of what is settled, and whether no exit decides anything.
        ended: whether the last token ends the text, if it is right.
        chance: how likely what the next row stands on is right.
        claimed_length: positions whose slots are claimed.
        since: the pass at which the live row came to where it waits.
        due: when the next token is due; pace: the target for each. Seconds, infinite where there is none. paced:
            whether there is a target.
        threshold: of the first row that is not settled at each exit; NaN where it may not exit. (segments - 1, seats).
        bars: what the confidence of any row has to reach at each exit, unless `decaying`: whether later rows have
            other thresholds. Infinite where the exit can't be taken. (segments - 1, seats).
        scored: whether prompt rows are measured; patient: whether any of its rules counts agreeing exits.
        measured: whether a prompt row of a scored request has been measured. (seats, room).
        fewest, most: output tokens before which no end comes, and with which the text ends anyway.
        ends: tokens that end the text.
        token: what stands at each position. (seats, room).
        depth: segments that a position executes before its token is decided; all while it isn't. (seats, room).
        confidence: what each exit said of a position; NaN where it wasn't asked. (segments - 1, seats, room).
        agreeing: (token, run length) of the exits that agree on a position, of patient requests. (2, seats, room).
        draws: how tokens are decided.
        having: how many of the running requests have what few have, by the column's name.
    """

    def __init__(self, seats: int, segments: int, room: int) -> None:
        self.segments, self.room = segments, room
        self.requests: npt.NDArray[np.object_] = np.full(seats, None)
        self.idle: BoolArray = np.zeros(seats, dtype=np.bool_)
        self.decodes: BoolArray = np.zeros(seats, dtype=np.bool_)
        self.catching_up = 0
        self.reached: IntArray = np.zeros((segments + 1, seats), dtype=np.int64)
        self.prompt: IntArray = np.zeros(seats, dtype=np.int64)
        self.settled: IntArray = np.zeros(seats, dtype=np.int64)
        self.drafting: BoolArray = np.zeros(seats, dtype=np.bool_)
        self.lossless: BoolArray = np.zeros(seats, dtype=np.bool_)
        self.ended: BoolArray = np.zeros(seats, dtype=np.bool_)
        self.chance: FloatArray = np.ones(seats)
        self.claimed_length: IntArray = np.zeros(seats, dtype=np.int64)
        self.since: IntArray = np.zeros(seats, dtype=np.int64)
        self.due: FloatArray = np.full(seats, np.inf)
        self.pace: FloatArray = np.full(seats, np.inf)
        self.paced: BoolArray = np.zeros(seats, dtype=np.bool_)
        self.threshold: FloatArray = np.full((segments - 1, seats), np.nan)
        self.bars: FloatArray = np.full((segments - 1, seats), np.inf)
        self.decaying: BoolArray = np.zeros(seats, dtype=np.bool_)
        self.scored: BoolArray = np.zeros(seats, dtype=np.bool_)
        self.patient: BoolArray = np.zeros(seats, dtype=np.bool_)
        self.fewest: IntArray = np.zeros(seats, dtype=np.int64)
        self.most: IntArray = np.zeros(seats, dtype=np.int64)
        self.ends: npt.NDArray[np.object_] = np.full(seats, frozenset())
        self.draws: npt.NDArray[np.object_] = np.full(seats, None)
        # What an empty seat holds: each column of one entry a request as it is made.
        columns = [column for column in vars(self).values() if isinstance(column, np.ndarray)]
        self._vacant = [(column, column[..., 0].copy() if column.ndim > 1 else column[0]) for column in columns]
        # Left empty, so that only what is used ever takes memory; `sit` sets what is read of these.
        self.token: IntArray = np.empty((seats, room), dtype=np.int64)
        self.depth: IntArray = np.empty((seats, room), dtype=np.int64)
        self.confidence: FloatArray = np.empty((segments - 1, seats, room))
        self.agreeing: IntArray = np.empty((2, seats, room), dtype=np.int64)
        self.measured: BoolArray = np.empty((seats, room), dtype=np.bool_)
        self.having = dict.fromkeys(RARE, 0)
        self._empty = list(range(seats))

    def __len__(self) -> int:
        return len(self.requests) - len(self._empty)

    def __iter__(self) -> Iterator[Request]:
        return (request for request in self.requests.tolist() if request is not None)

    def __getitem__(self, seat: int) -> Request:
        request = self.requests[seat]
        assert isinstance(request, Request)
        return request

    @property
    def full(self) -> bool:
        """Whether nobody else can sit down."""
        return not self._empty

    @property
    def decoding(self) -> int:
        """Requests that have a token."""
        return int(np.count_nonzero(self.settled > self.prompt)) if self.catching_up else len(self)

    def sit(self, request: Request) -> int:
        """Give a request a seat; it starts from its record, with no K/V."""
        seat = request.seat = heapq.heappop(self._empty)
        self.requests[seat] = request
        self.idle[seat] = True
        self.catching_up += 1
        self.reached[0, seat] = len(request.tokens)
        self.prompt[seat], self.settled[seat] = len(request.prompt), len(request.tokens)
        self.drafting[seat], self.lossless[seat] = request.run_ahead != "off", request.run_ahead == "lossless"
        self.due[seat], self.pace[seat] = request.due, pace(request.params)
        self.paced[seat] = self.pace[seat] < np.inf
        self.decaying[seat] = request.rule.schedule != "constant"
        self.bars[:, seat] = request.bars(1)
        self.scored[seat] = request.score_rule is not None
        self.fewest[seat], self.most[seat] = request.params.min_tokens, request.max_tokens
        self.ends[seat], self.draws[seat] = request.end_token_ids, request.draws
        self.token[seat, : len(request.tokens)] = request.tokens
        end = len(request.prompt) + request.max_tokens
        self.depth[seat, : len(request.depths)] = request.depths
        self.depth[seat, len(request.depths) : end] = self.segments
        self.confidence[:, seat, :end] = np.nan
        rules = (request.rule, request.score_rule)
        self.patient[seat] = any(rule is not None and rule.counts_agreement for rule in rules)
        if self.patient[seat]:
            self.agreeing[1, seat, :end] = 0
        if self.scored[seat]:
            self.measured[seat, : len(request.prompt)] = False
            self.measured[seat, list(request.prompt_records)] = True
        self._count(seat, 1)
        self.look_ahead(request)
        return seat

    def leave(self, request: Request) -> None:
        """Take back the seat."""
        seat = request.seat
        assert seat is not None
        assert self.idle[seat]
        self._count(seat, -1)
        self.catching_up -= not bool(self.decodes[seat])
        for column, vacant in self._vacant:
            column[..., seat] = vacant
        request.seat = None
        heapq.heappush(self._empty, seat)

    # What passes do to them. Nobody else writes to the columns.

    def hold(self, seats: IntArray) -> None:
        """A pass takes spans of requests: none of them is in another one."""
        assert self.idle[seats].all()
        self.idle[seats] = False

    def release(self, seats: IntArray) -> None:
        """The pass that held them is committed."""
        self.idle[seats] = True

    def advance(self, seats: IntArray, first: int, last: int, stops: IntArray) -> None:
        """Rows up to positions have passed the segments from `first` to `last`. Shapes: (spans,)."""
        for segment in range(first, last + 1):
            self.reached[segment + 1][seats] = stops

    def skip(self, segment: int, seats: IntArray) -> None:
        """The next pending position of requests takes no row at a segment."""
        self.reached[segment + 1, seats] += 1

    def arrive(self, seats: IntArray, pass_number: int) -> None:
        """Live rows have come to where they wait now."""
        self.since[seats] = pass_number

    def claim(self, seats: IntArray, stops: IntArray) -> None:
        """The slots of positions before `stops` are claimed. Shapes: (spans,)."""
        self.claimed_length[seats] = np.maximum(self.claimed_length[seats], stops)

    def next_is_due(self, request: Request) -> None:
        """The request's next token has a due time."""
        self.due[request.seat] = request.due

    def judge(self, segment: int, places: IntArray, confidences: FloatArray) -> None:
        """An exit said of positions how sure it is. Shapes: (rows,)."""
        self.confidence[segment].put(places, confidences)

    def agree(self, seats: IntArray, positions: IntArray, agreeing: IntArray) -> None:
        """Exits agree on positions: (token, run length). Shape (2, rows)."""
        self.agreeing[:, seats, positions] = agreeing

    def decide(self, places: IntArray, depth: int) -> None:
        """The tokens after positions are decided, `depth` segments having been executed. Shape (rows,)."""
        self.depth.put(places, depth)

    def measure(self, places: IntArray) -> None:
        """Prompt rows of scored requests are measured. Shape (rows,)."""
        self.measured.put(places, True)

    def settle(self, seats: IntArray, known: IntArray) -> None:
        """Requests have `known` tokens that are certain, and none that is tentative. Shapes: (requests,)."""
        self.reached[0][seats] = self.settled[seats] = known

    def write(self, places: IntArray, tokens: IntArray) -> None:
        """Tokens stand at positions. Shapes: (rows,)."""
        self.token.put(places, tokens)

    def settle_drafts(self, request: Request, count: int) -> None:
        """The first `count` tentative tokens of a request are certain."""
        seat = request.seat
        self.settled[seat] += count
        assert self.settled[seat] <= self.reached[0, seat]

    def draft(self, request: Request, token: int) -> None:
        """A request has one more tentative token."""
        seat = request.seat
        known = int(self.reached[0, seat])
        self.token[seat, known] = token
        self.reached[0, seat] = known + 1

    def end(self, request: Request) -> None:
        """The last token of a request, a tentative one, ends its text, if it is right."""
        self.ended[request.seat] = True

    def weigh(self, request: Request, chance: float) -> None:
        """How likely what the request's next row stands on is right."""
        assert 0.0 <= chance <= 1.0
        self.chance[request.seat] = chance

    def take_back(self, seat: int, keep: int) -> None:
        """A request has no tokens and no K/V beyond its first `keep` positions, all of which are certain to stay."""
        end = int(self.claimed_length[seat])
        self.reached[:, seat] = np.minimum(self.reached[:, seat], keep)
        assert self.settled[seat] <= self.reached[0, seat]
        self.depth[seat, keep:end] = self.segments
        self.confidence[:, seat, keep:end] = np.nan
        self.agreeing[1, seat, keep:end] = 0
        self.claimed_length[seat] = min(end, keep)
        self.ended[seat] = False

    def _count(self, seat: int, change: int) -> None:
        for name in self.having:
            self.having[name] += change * bool(getattr(self, name)[seat])

    def places(self, seats: IntArray, positions: IntArray) -> IntArray:
        """Where positions of requests are in the columns by position, laid out flat. Shape of all: (rows,)."""
        out: IntArray = seats * self.room
        out += positions
        return out

    def confidence_at(self, places: IntArray) -> FloatArray:
        """What each exit said of positions. Shape: (segments - 1, rows)."""
        return self.confidence.reshape(self.segments - 1, self.depth.size).take(places, axis=1)

    def caught_up(self, seats: IntArray) -> None:
        """Prompts or replays have come further: note who decodes now."""
        decode = (self.settled[seats] > self.prompt[seats]) & (self.reached[1][seats] >= self.settled[seats] - 1)
        self.catching_up -= int(np.count_nonzero(decode & ~self.decodes[seats]))
        self.decodes[seats] = decode

    def check_integrity(self) -> None:
        """Raise AssertionError unless what is kept up beside the columns follows from them."""
        assert self.having == {name: np.count_nonzero(getattr(self, name)) for name in self.having}
        decode = (self.settled > self.prompt) & (self.reached[1] >= self.settled - 1)
        assert np.array_equal(self.decodes, decode)
        assert self.catching_up == len(self) - np.count_nonzero(decode)
        assert (self.reached[:-1] >= self.reached[1:]).all(), f"frontiers {self.reached}"
        assert (self.settled <= self.reached[0]).all()
        for column, vacant in self._vacant:
            left = column[..., self._empty].T
            same = (left == vacant) | ((left != left) & (vacant != vacant))  # NaN is not itself
            assert np.all(same), "an empty seat holds something"

    def look_ahead(self, request: Request) -> None:
        """Set the thresholds of the row after the last settled token. A first token never exits early."""
        assert request.seat is not None
        number = int(self.settled[request.seat] - self.prompt[request.seat])
        for exit_index in range(self.segments - 1):
            threshold = request.rule.threshold(exit_index, number, request.max_tokens) if number else None
            self.threshold[exit_index, request.seat] = np.nan if threshold is None else threshold

    def by_urgency(self, seats: IntArray) -> IntArray:
        """Seats in order of priority, then arrival."""
        return np.array(sorted(seats.tolist(), key=lambda seat: urgency(self[seat])), dtype=np.int64)


def urgency(request: Request) -> tuple[int, int]:
    """What requests are sorted by: priority, then arrival."""
    return request.priority, request.arrival
