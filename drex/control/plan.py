"""What crosses between control and compute: an immutable Pass one way, a PassResult the other.

Sequences of row numbers are lists or ranges: most have one element, and become one index vector a pass in compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from drex.config import ExitRule
    from drex.request import SamplingParams

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Run(NamedTuple):
    """K/V entries that lie in consecutive cells, in order of position."""

    start: int
    length: int


class Scattered(NamedTuple):
    """K/V entries anywhere: cells in order of position, or, where `aliased`, slots of the exit layer."""

    entries: IntArray
    aliased: BoolArray

    @property
    def length(self) -> int:
        return len(self.entries)


Context = Run | Scattered


class Rows(NamedTuple):
    """Token positions that execute something in a pass; all sequences have one element a row.

    Attributes:
        positions: in the request, ascending.
        arena: rows of the hidden-state arena that are read (but by segment 0) and written (but by the last).
        cells: where each row's K/V goes, for each part of the segment.
        visible: how many entries of the span's context each row attends to, its own included.
    """

    positions: Sequence[int]
    arena: Sequence[int]
    cells: tuple[Sequence[int], ...]
    visible: Sequence[int]

    @property
    def size(self) -> int:
        return len(self.positions)


class Draws(NamedTuple):
    """How a request's tokens are decided: what all its evaluations share.

    Attributes:
        rule: criterion and its settings; a scored prompt may have its own.
        params, seed, sample: sampling settings; a token's noise is a function of (seed, sample, position).
        tokens, prompt_length: the request's tokens so far, for penalties.
    """

    rule: ExitRule
    params: SamplingParams
    seed: int
    sample: int
    tokens: Sequence[int]
    prompt_length: int


class Evaluation(NamedTuple):
    """One head evaluation: which row, and all that decides its token.

    Attributes:
        row: index into the span's full rows.
        position: of the row in the request.
        threshold: of the exit; None where the row may not exit (the final head).
        draws: of its request.
        agreeing: (token, run length) of the agreeing exits before, for `patience`.
        banned: tokens that may not come.
        target: report this token's log-probability instead of drawing one.
    """

    row: int
    position: int
    threshold: float | None
    draws: Draws
    agreeing: tuple[int, int]
    banned: tuple[int, ...] = ()
    target: int | None = None


class Verdict(NamedTuple):
    """What a head evaluation found.

    `agreeing` is the argmax here and how many allowed exits in a row, this one included, had it.
    """

    token_id: int
    logprob: float
    confidence: float
    exited: bool
    agreeing: tuple[int, int]
    top: tuple[tuple[int, float], ...]


class Span(NamedTuple):
    """The positions [start, stop) of one request in one pass; the frontier moves to `stop`.

    Positions in the span that are in neither `full` nor `fill` have an aliased or absent entry at this segment.

    Attributes:
        tokens: of the full rows, where the pass runs segment 0; else empty.
        full: rows that run the segment.
        fill: rows that only write K/V, from the hidden state they exited with (`project`).
        context: the request's entries at this segment as they are after the pass, one for each part.
        evaluations: of full rows.
    """

    request_id: str
    start: int
    stop: int
    tokens: Sequence[int]
    full: Rows
    fill: Rows
    context: tuple[Context, ...]
    evaluations: Sequence[Evaluation]


@dataclass(frozen=True)
class Pass:
    """One execution of one segment over rows of one or more requests. `number` counts passes from 0."""

    number: int
    segment: int
    spans: Sequence[Span]

    @property
    def rows(self) -> int:
        """Rows that run the segment in full, and those that only write K/V."""
        return sum(span.full.size + span.fill.size for span in self.spans)


@dataclass(frozen=True)
class PassResult:
    """Verdicts of each span's evaluations, in the pass's order; `error` where the pass could not be executed."""

    verdicts: Sequence[Sequence[Verdict]]
    error: Exception | None = None
