"""Exit rates, estimated while serving."""

from __future__ import annotations

import math

PRIOR_RATE, PRIOR_WEIGHT = 0.5, 8.0
"""Before anything was seen, as if this share of so many rows had exited."""
MEMORY = 500.0
"""Rows over which exit rates are remembered: older ones fade by a factor e each so many."""
KNOWN = 128.0
"""Rows at an exit point, the prior's included, from which on exit rates are more than a prior."""


class ExitRates:
    """Share of the rows at each exit point that exit there: a moving average from a prior."""

    def __init__(self, exits: int) -> None:
        self._exited = [PRIOR_RATE * PRIOR_WEIGHT] * exits
        self._seen = [PRIOR_WEIGHT] * exits

    def observe(self, exit_index: int, rows: int, exited: int) -> None:
        """Count the rows of a pass."""
        fade = math.exp(-rows / MEMORY)
        self._seen[exit_index] = self._seen[exit_index] * fade + rows
        self._exited[exit_index] = self._exited[exit_index] * fade + exited

    def __getitem__(self, exit_index: int) -> float:
        return self._exited[exit_index] / self._seen[exit_index]

    @property
    def known(self) -> bool:
        """Whether so many were seen that it is worth solving anything with them. Requests may not use all exits."""
        return max(self._seen, default=KNOWN) >= KNOWN

    def all(self) -> tuple[float, ...]:
        """At each exit point."""
        return tuple(exited / seen for exited, seen in zip(self._exited, self._seen, strict=True))
