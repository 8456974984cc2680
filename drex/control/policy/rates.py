"""Exit rates, estimated while serving."""

from __future__ import annotations

import math

from drex.control.constants import EXIT_RATE_KNOWN_ROWS, EXIT_RATE_MEMORY_ROWS, EXIT_RATE_PRIOR, EXIT_RATE_PRIOR_ROWS


class ExitRates:
    """Share of the rows at each exit point that exit there: a moving average from a prior."""

    def __init__(self, exits: int) -> None:
        self._exited = [EXIT_RATE_PRIOR * EXIT_RATE_PRIOR_ROWS] * exits
        self._seen = [EXIT_RATE_PRIOR_ROWS] * exits

    def observe(self, exit_index: int, rows: int, exited: int) -> None:
        """Count the rows of a pass."""
        fade = math.exp(-rows / EXIT_RATE_MEMORY_ROWS)
        self._seen[exit_index] = self._seen[exit_index] * fade + rows
        self._exited[exit_index] = self._exited[exit_index] * fade + exited

    def __getitem__(self, exit_index: int) -> float:
        return self._exited[exit_index] / self._seen[exit_index]

    @property
    def known(self) -> bool:
        """Whether so many were seen that it is worth solving anything with them. Requests may not use all exits."""
        return max(self._seen, default=EXIT_RATE_KNOWN_ROWS) >= EXIT_RATE_KNOWN_ROWS

    def all(self) -> tuple[float, ...]:
        """At each exit point."""
        return tuple(exited / seen for exited, seen in zip(self._exited, self._seen, strict=True))
