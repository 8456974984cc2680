"""What crosses between control and compute: an immutable Pass one way, a PassResult the other.

Both are columns: arrays with an element a span, a row or an evaluation, so that neither side loops over rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from drex.config import ExitRule
    from drex.sampling_params import SamplingParams

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
T = TypeVar("T")
FEW = 128
"""Numbers that Python adds up about as fast as numpy does."""


class Rows(NamedTuple):
    """Token positions that execute something in a pass, those of a span side by side, in order of position.

    Attributes:
        positions: in the request. Shape (rows,).
        arena: rows of the hidden-state arena that are read (but by segment 0) and written (but by the last). (rows,).
        cells: where each row's K/V goes, for each part of the segment. (parts, rows).
    """

    positions: IntArray
    arena: IntArray
    cells: IntArray

    @property
    def size(self) -> int:
        return len(self.positions)


class Entries(NamedTuple):
    """K/V entries of requests at a segment.

    Attributes:
        seats, numbers: whose, and which of theirs. Shape (entries,).
        cells: where they are, for each part; slots of an exit layer where they are aliased. (parts, entries).
        aliased: (entries,).
    """

    seats: IntArray
    numbers: IntArray
    cells: IntArray
    aliased: BoolArray


NO_ENTRIES = Entries(
    np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((1, 0), np.int64), np.zeros(0, dtype=np.bool_)
)


class Contexts(NamedTuple):
    """The K/V entries of each span's request at the segment, as they are after the pass, in order of position.

    Attributes:
        seats: of the requests. Shape (spans,).
        lengths: how many entries they have. (spans,).
        in_run: whether the entries of each part lie in consecutive cells. (spans,).
        starts: the first cell, where they do. (parts, spans).
        fresh: of the spans whose entries don't, those that no pass before has told of.
    """

    seats: IntArray
    lengths: IntArray
    in_run: BoolArray
    starts: IntArray
    fresh: Entries


class Draws(NamedTuple):
    """How a request's tokens are decided: what all its evaluations share.

    Attributes:
        request_id: of the request.
        rule: criterion and its settings; a scored prompt may have its own.
        params, seed, sample: sampling settings; a token's noise is a function of (seed, sample, position).
        tokens, prompt_length: the request's tokens so far, for penalties.
    """

    request_id: str
    rule: ExitRule
    params: SamplingParams
    seed: int
    sample: int
    tokens: Sequence[int]
    prompt_length: int


@dataclass(slots=True)
class Evaluations:
    """Heads to evaluate at the end of a pass, and all that decides their tokens; an element an evaluation.

    Nobody changes one: it is not frozen since making a frozen one takes four times as long.

    Attributes:
        rows: indices into the pass's full rows.
        positions: of the rows in their requests.
        thresholds: of the exit; NaN where the row may not exit (the final head).
        draws: of the requests.
        agreeing: (token, run length) of the agreeing exits before, for `patience`. Shape (2, evaluations).
        banned: tokens that may not come, by evaluation.
        targets: tokens whose log-probability is to be reported instead of drawing one, by evaluation.
    """

    rows: IntArray
    positions: IntArray
    thresholds: FloatArray
    draws: Sequence[Draws]
    agreeing: IntArray
    banned: Mapping[int, tuple[int, ...]]
    targets: Mapping[int, int]

    def __len__(self) -> int:
        return len(self.rows)

    def kept(self, keep: BoolArray) -> Evaluations:
        """Only some of the evaluations, numbered anew. Shape of `keep`: (evaluations,)."""
        return Evaluations(
            rows=self.rows[keep],
            positions=self.positions[keep],
            thresholds=self.thresholds[keep],
            draws=[each for each, kept in zip(self.draws, keep.tolist(), strict=True) if kept],
            agreeing=self.agreeing[:, keep],
            banned=renumbered(self.banned, keep),
            targets=renumbered(self.targets, keep),
        )


@dataclass(frozen=True)
class Verdicts:
    """What head evaluations found; an element an evaluation, in the pass's order.

    Attributes:
        tokens, logprobs, confidences: of each.
        exited: whether the row exits here, its own confidence and threshold considered.
        agreeing: the argmax here, and how many allowed exits in a row, this one included, had it. Shape (2, ...).
        tops: (token, log-probability) of the most likely tokens, best first, by evaluation that asked for them.
        finite: False where the head's logits are NaN or infinite, so that nothing else said here means anything.
    """

    tokens: IntArray
    logprobs: FloatArray
    confidences: FloatArray
    exited: BoolArray
    agreeing: IntArray
    tops: Mapping[int, tuple[tuple[int, float], ...]]
    finite: BoolArray

    def __len__(self) -> int:
        return len(self.tokens)

    def kept(self, keep: BoolArray) -> Verdicts:
        """Only some of the verdicts, numbered anew. Shape of `keep`: (evaluations,)."""
        return Verdicts(
            tokens=self.tokens[keep],
            logprobs=self.logprobs[keep],
            confidences=self.confidences[keep],
            exited=self.exited[keep],
            agreeing=self.agreeing[:, keep],
            tops=renumbered(self.tops, keep),
            finite=self.finite[keep],
        )


def renumbered(by_number: Mapping[int, T], keep: BoolArray) -> dict[int, T]:
    """What is known by number, of the numbers that are kept, by what they are when these are counted anew."""
    number = keep.cumsum() - 1
    return {int(number[each]): value for each, value in by_number.items() if keep[each]}


NO_EVALUATIONS = Evaluations(
    np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), (), np.zeros((2, 0), np.int64), {}, {}
)
NOTHING = Verdicts(
    np.zeros(0, np.int64),
    np.zeros(0),
    np.zeros(0),
    np.zeros(0, np.bool_),
    np.zeros((2, 0), np.int64),
    {},
    np.zeros(0, np.bool_),
)
"""Of a pass that evaluates no head."""


@dataclass(slots=True)
class Pass:
    """One execution of one segment over rows of one or more requests, or of several segments at once.

    Nobody changes one, as for `Evaluations`.

    A span is the positions [start, stop) of one request; those of them that are in neither `full` nor `fill` have an
    aliased or absent entry at this segment.

    Attributes:
        number: counts passes from 0.
        segment: that is run.
        starts, stops: of the spans.
        sizes: full rows of the spans.
        full: rows that run the segment.
        visible: how many entries of its span's context each full row attends to, its own included.
        tokens: of the full rows, where the pass runs segment 0; else empty.
        fill: rows that only write K/V, from the hidden state they exited with (`project`).
        context: what the spans' rows read.
        evaluations: of full rows.
        then: the same rows over the next segment, where nothing is to be decided in between; None: that is all.
    """

    number: int
    segment: int
    starts: IntArray
    stops: IntArray
    sizes: IntArray
    full: Rows
    visible: IntArray
    tokens: IntArray
    fill: Rows
    context: Contexts
    evaluations: Evaluations
    then: Pass | None = None

    @property
    def parts(self) -> list[Pass]:
        """A pass for each segment that is run."""
        return [self] if self.then is None else [self, *self.then.parts]

    @property
    def last(self) -> Pass:
        """The pass for the last segment that is run."""
        return self if self.then is None else self.then.last

    @property
    def spans(self) -> int:
        """Requests in it."""
        return len(self.starts)

    @property
    def rows(self) -> int:
        """Rows that run the segment in full, and those that only write K/V."""
        return self.full.size + self.fill.size


@dataclass(frozen=True)
class PassResult:
    """Verdicts of the evaluations, or the error that kept the pass from being executed."""

    verdicts: Verdicts | None
    error: Exception | None = None


def ragged(starts: IntArray, stops: IntArray) -> tuple[IntArray, IntArray]:
    """Ranges side by side: (which range, value), a pair an element."""
    sizes = stops - starts
    if np.count_nonzero(sizes == 1) == len(sizes):
        return np.arange(len(sizes)), starts
    which = np.arange(len(sizes)).repeat(sizes)
    return which, np.arange(len(which)) + (stops - sizes.cumsum())[which]


def total(counts: IntArray) -> int:
    """The sum of counts. Python's own takes half the time that numpy's does of as few as there are in most passes."""
    return sum(counts.tolist()) if len(counts) < FEW else int(counts.sum())
