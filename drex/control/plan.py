"""What crosses between control and compute: a frozen Pass one way, a PassResult the other."""

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


@dataclass(frozen=True)
class Run:
    """K/V entries that lie in consecutive cells, in order of position."""

    start: int
    count: int


@dataclass(frozen=True)
class Scattered:
    """K/V entries anywhere: cells in order of position, or, where `aliased`, slots of the exit layer."""

    entries: IntArray
    aliased: BoolArray


Context = Run | Scattered


@dataclass(frozen=True)
class Rows:
    """Token positions that execute something in a pass.

    Shapes: positions, arena, visible (rows,); cells (parts, rows).

    Attributes:
        positions: in the request, ascending.
        arena: rows of the hidden-state arena that are read (but by segment 0) and written (but by the last).
        cells: where each row's K/V goes, a line for each part of the segment.
        visible: how many entries of the span's context each row attends to, its own included.
    """

    positions: IntArray
    arena: IntArray
    cells: IntArray
    visible: IntArray

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Evaluation:
    """One head evaluation: which row, and all that decides its token.

    Attributes:
        row: index into the span's full rows.
        position: of the row; the noise of its token is a function of (seed, sample, position).
        threshold: of the exit; None where the row may not exit (the final head).
        rule: criterion and its settings.
        agreeing: (token, run length) of the agreeing exits before, for `patience`.
        params, seed, sample: sampling settings.
        tokens, prompt_length: the request's tokens up to and including this row's, for penalties.
        banned: tokens that may not come.
        target: report this token's log-probability instead of drawing one.
    """

    row: int
    position: int
    threshold: float | None
    rule: ExitRule
    agreeing: tuple[int, int]
    params: SamplingParams
    seed: int
    sample: int
    tokens: Sequence[int]
    prompt_length: int
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


@dataclass(frozen=True)
class Span:
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
    tokens: IntArray
    full: Rows
    fill: Rows
    context: tuple[Context, ...]
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True)
class Pass:
    """One execution of one segment over rows of one or more requests. `number` counts passes from 0."""

    number: int
    segment: int
    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        """Rows that run the segment in full, and those that only write K/V."""
        return sum(len(span.full) + len(span.fill) for span in self.spans)


@dataclass(frozen=True)
class PassResult:
    """Verdicts of each span's evaluations, in the pass's order; `error` where the pass could not be executed."""

    verdicts: tuple[tuple[Verdict, ...], ...]
    error: Exception | None = None
