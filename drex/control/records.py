"""Records of tokens that a pass decided, made column by column: one is made for every token that is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from drex.control.plan import FloatArray, IntArray, Verdicts
from drex.control.request import Request, TokenRecord
from drex.outputs import ExitCheck

# As the classes' own `_make`, without a call of a Python function for each.
_record: Callable[[Iterable[Any]], TokenRecord] = partial(tuple.__new__, TokenRecord)
_check: Callable[[Iterable[Any]], ExitCheck] = partial(tuple.__new__, ExitCheck)


class Decided(NamedTuple):
    """Rows with a verdict, and all that their records are made of.

    Attributes:
        verdicts: of the pass; depth: segments executed.
        live: rows that decide tokens, the first of all; the others are of scored prompts.
        numbers, seats, positions: which of the evaluations, and where in the requests. Shape (rows,).
        requests, tokens: theirs.
        passed: what the exit points so far said of each, NaN where they weren't asked or decide nothing.
            (exit points passed, rows).
        bars: what confidences have to reach. (exit points, rows).
    """

    verdicts: Verdicts
    depth: int
    live: int
    numbers: IntArray
    seats: IntArray
    positions: IntArray
    requests: list[Request]
    tokens: list[int]
    passed: FloatArray
    bars: FloatArray

    def records(self) -> list[TokenRecord]:
        """Of each row, given that it is decided at that depth."""
        if not self.requests:
            return []
        verdicts, numbers = self.verdicts, self.numbers
        tops: Iterable[tuple[tuple[int, float], ...]] = repeat(())
        if verdicts.tops:
            tops = [verdicts.tops.get(number, ()) for number in numbers.tolist()]
        columns = (
            self.tokens,
            verdicts.logprobs[numbers].tolist(),
            repeat(self.depth),
            verdicts.confidences[numbers].tolist(),
            self._checks(),
            tops,
        )
        return list(map(_record, zip(*columns, strict=False)))

    def _checks(self) -> Iterable[tuple[ExitCheck, ...]]:
        """The exit checks of each row, with the thresholds in force."""
        if not len(self.passed):
            return repeat(())
        by_exit = [
            map(_check, zip(repeat(exit_index), *columns, strict=False))
            for exit_index, columns in enumerate(zip(self.passed.tolist(), self.bars.tolist(), strict=False))
        ]
        checks = zip(*by_exit, strict=True)
        if not np.count_nonzero(np.isnan(self.passed)):
            return checks
        return [tuple([each for each in row if each.confidence == each.confidence]) for row in checks]
