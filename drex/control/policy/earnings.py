"""What passes have earned: moving averages of tokens over seconds, and of the gain on full depth."""

from __future__ import annotations

import math
from typing import NamedTuple

from drex.control.constants import EARNINGS_FADE, EARNINGS_KNOWN_PASSES
from drex.control.policy.prices import Prices


class Running(NamedTuple):
    """What runs now: requests that decode, whether any runs ahead, and whether any does so losslessly."""

    decoding: int = 0
    ahead: bool = False
    lossless: bool = False

    @property
    def kind(self) -> tuple[int, bool, bool]:
        """What earns alike: loads of about a size, and requests that run ahead alike."""
        return round(math.log2(max(1, self.decoding))), self.ahead, self.lossless


class _Checked(NamedTuple):
    """Of passes that checked exits: tokens, what full depth would have earned all at once meanwhile, and how many."""

    tokens: float = 0.0
    at_full_depth: float = 0.0
    passes: int = 0


class Earnings:
    """Counts what passes bring.

    Args:
        prices: full depth's, which gains are measured by.

    Attributes:
        running: what passes are counted for; whoever decides keeps it up.
    """

    def __init__(self, prices: Prices) -> None:
        self._prices = prices
        self.running = Running()
        self._tokens = self._seconds = 0.0
        # Tokens earned, and those that full depth would have earned meanwhile, segment by segment.
        self._gain = (0.0, 0.0)
        self._checked: dict[tuple[int, bool, bool], _Checked] = {}

    @property
    def begun(self) -> bool:
        """Whether there is anything to average."""
        return self._seconds > 0

    def begin(self, tokens: float, seconds: float) -> None:
        """Take full depth's earnings for a start."""
        self._tokens, self._seconds = tokens, seconds
        self._gain = tokens, tokens

    def observe(self, tokens: int, seconds: float, *, checked: bool) -> None:
        """Count a pass: tokens decided, what it took, and whether exits were checked at the time."""
        self._tokens, self._seconds = self._tokens * EARNINGS_FADE + tokens, self._seconds * EARNINGS_FADE + seconds
        earned, full = self._gain
        self._gain = earned * EARNINGS_FADE + tokens, full * EARNINGS_FADE + seconds * self._full_rate
        if checked:
            # Beside what passes at once were held for meanwhile: if flushes are dearer than they seem, the machine is
            # held for slower while there are many, and passes segment by segment for dearer than they are later.
            decoding, kind = max(1, self.running.decoding), self.running.kind
            at_full_depth = seconds * decoding / self._prices.full_step(decoding)
            before = self._checked.get(kind, _Checked())
            earned, full = before.tokens, before.at_full_depth
            if before.passes >= EARNINGS_KNOWN_PASSES:
                earned, full = earned * EARNINGS_FADE + tokens, full * EARNINGS_FADE + at_full_depth
            self._checked[kind] = _Checked(earned, full, before.passes + 1)

    @property
    def rate(self) -> float | None:
        """The moving average of tokens a second while decoding; None before any."""
        return self._tokens / self._seconds if self._seconds else None

    @property
    def gained_rate(self) -> float:
        """The moving average of the gain on full depth, at this load's full depth: tokens a second; 0 before any.

        Unlike `rate` it does not lag behind requests that come and go.
        """
        earned, full = self._gain
        return earned / full * self._full_rate if full else 0.0

    @property
    def checked_gain(self) -> float | None:
        """What was earned while exits were checked, over full depth all at once; None before enough passes.

        Of loads and run-ahead like those that run.
        """
        found = self._checked.get(self.running.kind)
        return (
            found.tokens / found.at_full_depth
            if found is not None and found.passes >= 2 * EARNINGS_KNOWN_PASSES
            else None
        )

    @property
    def _full_rate(self) -> float:
        """Tokens a second at full depth at this load, segment by segment, which all gains are measured by."""
        decoding = max(1, self.running.decoding)
        return decoding / self._prices.step_by_segments(decoding)
