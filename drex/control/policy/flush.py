"""The decision rule: which segment pays now. See docs/scheduling.md for why it comes close to the optimum.

θ is the rate of tokens that the engine earns: a moving average, or the optimum where that is solved. A row that starts
earns one token in the end. Running the shallow segment on n ready rows is worth

    n - θ · [T_0(n) + ΔT_deep(n)]

where ΔT_deep is what these rows will add to flushes that happen anyway. If no n makes that positive, a buffer is
flushed. With several exit points the same comparison is made segment by segment, from the shallowest on. Where the
optimum is solved (one exit point or two, about the present load), its table decides.

Invariants: what was observed takes effect at a refresh, and refreshes happen at recorded pass numbers, so that a run
with the same results and times decides the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drex.control.constants import EACH_SIZE_BELOW, LOAD_MOVED_SHARE, MOST_OWED_ROWS, REFRESH_PASSES, SIZE_STEP
from drex.control.cost.model import CostModel
from drex.control.plan import FloatArray
from drex.control.policy.earnings import Earnings, Running
from drex.control.policy.outlook import Outlook, Solving
from drex.control.policy.prices import Prices
from drex.control.policy.rates import ExitRates


class Waiting(NamedTuple):
    """What stands where: `ready` requests before segment 0; live rows and the fills they owe at each segment (0: 0).

    `chances` are how likely the rows of the ready ones are to be of use, descending; None: all surely are.
    """

    ready: int
    live: Sequence[int]
    fills: Sequence[int]
    chances: FloatArray | None = None


class FlushRule:
    """Decides on counts alone.

    Args:
        cost: of passes.
        rates: of exits.
        kv_fill: what the layers that a token skipped cost later.
        most: rows of a pass that are told apart; beyond, costs are those of so many.
        most_owed: fills that the engine lets be owed.
        solving: where the optimum is computed; None: in place.
    """

    def __init__(
        self,
        cost: CostModel,
        rates: ExitRates,
        kv_fill: str,
        most: int,
        most_owed: int = MOST_OWED_ROWS,
        solving: Solving | None = None,
    ) -> None:
        self.cost, self.rates = cost, rates
        self.prices = Prices(cost, kv_fill, most)
        self.earnings = Earnings(self.prices)
        self.outlook = Outlook(cost, kv_fill, most_owed, solving)
        coarse = np.arange(EACH_SIZE_BELOW, most + SIZE_STEP, SIZE_STEP)
        self._sizes = np.concatenate((np.arange(EACH_SIZE_BELOW), coarse))
        self._context, self._refreshed, self._decoding_told = 0.0, -1, 0
        self._exits = rates.all()

    @property
    def running(self) -> Running:
        """What runs, as of the last decision."""
        return self.earnings.running

    @property
    def earning(self) -> float:
        """θ, tokens a second: as solved for about the present load, or else the moving average of what was earned.

        Contexts grow between two solutions, so what is taken from one is the gain on full depth, not the rate.
        """
        solved = self.outlook.yardstick
        if solved is not None and solved.optimal is not None and abs(solved.in_flight - self.running.decoding) <= 1:
            step = self.prices.step_by_segments(solved.in_flight)
            return solved.optimal / solved.full * solved.in_flight / step
        return self.achieved or 0.0

    @property
    def achieved(self) -> float | None:
        """The moving average of tokens a second while decoding; None before any."""
        return self.earnings.rate

    @property
    def earning_ahead(self) -> float:
        """θ under run-ahead, which nothing solves for: the moving average of the gain on full depth, at this load.

        Trusted run-ahead never has to earn less than what is solved without; lossless run-ahead may.
        """
        gained = self.earnings.gained_rate
        return gained if self.running.lossless else max(self.earning, gained)

    @property
    def promises(self) -> float | None:
        """What checking exits earns at about the present load, tokens a second; None while that isn't known.

        The solved optimum; under run-ahead more, if more was earned; where requests are lossless, which nothing solves
        for, what was earned.
        """
        solved, load, found = self.outlook.yardstick, self.load, self.earnings.checked_gain
        if not load:
            return None
        # Gains on full depth, not rates: the machine may have been faster.
        earned = [] if found is None or not self.running.ahead else [found * load / self.prices.full_step(load)]
        if not self.running.lossless:
            if solved is None or solved.optimal is None:
                return None
            earned.append(solved.optimal / solved.full * load / self.prices.step_by_segments(load))
        return max(earned, default=None)

    @property
    def pays(self) -> bool | None:
        """Whether that is above full depth; None while either isn't known."""
        full, promised = self.full, self.promises
        return None if full is None or promised is None else promised >= full

    def might_not_pay(self, margin: float) -> bool:
        """Whether full depth times a margin would be above what checking exits earns, as far as that is known.

        Where requests are lossless nothing is until it was earned: it might.
        """
        full, promised = self.full, self.promises
        if full is None or promised is None:
            return full is not None and self.running.lossless
        return promised < margin * full

    @property
    def full(self) -> float | None:
        """Full depth's tokens a second, all segments at once, at the load that promises are made for."""
        load = self.load
        return load / self.prices.full_step(load) if load else None

    @property
    def load(self) -> int | None:
        """Requests that what is promised goes for: as was solved, or the present ones where nothing has to be."""
        if self.running.lossless:
            return self.running.decoding
        return None if self.outlook.yardstick is None else self.outlook.yardstick.in_flight

    def observe(self, tokens: int, seconds: float, *, checked: bool = True) -> None:
        """Count a pass: tokens decided, what it took, and whether exits were checked at the time."""
        self.earnings.observe(tokens, seconds, checked=checked)

    def tick(
        self, pass_number: int, decoding: int, context: float, *, ahead: bool = False, lossless: bool = False
    ) -> None:
        """A decision is due.

        Args:
            pass_number: of the pass that is decided on.
            decoding: requests that decode.
            context: mean K/V entries of these.
            ahead, lossless: whether requests run ahead, and whether they do so losslessly.
        """
        self.earnings.running = Running(decoding, ahead, lossless)
        self.prepare(pass_number, context)
        if not self.earnings.begun:
            # Nothing was earned yet: full depth is what it takes without exits.
            count = np.array([float(max(1, decoding))])
            self.earnings.begin(float(count[0]), float(self.cost.full_depth(count, context)[0]))

    def prepare(self, pass_number: int, context: float) -> None:
        """Refresh what decisions on a pass are read from, if it is time: where that can be done before one is due.

        The outlook hears of it, and when load has moved.
        """
        decoding = self.running.decoding
        due, moved = pass_number // REFRESH_PASSES != self._refreshed, abs(decoding - self._decoding_told)
        if due:
            self._refreshed, self._context = pass_number // REFRESH_PASSES, context
            self._exits = self.rates.all()
            self.prices.refresh(context)
        if (due or moved > LOAD_MOVED_SHARE * self._decoding_told) and self.rates.known:
            self._decoding_told = decoding
            # Nothing that lossless requests do is read from it: it is only shown.
            self.outlook.tick(pass_number, decoding, self._exits, context, used=not self.running.lossless)

    def choose(self, waiting: Waiting) -> tuple[int, int] | None:
        """The segment to run, and how many of the ready rows where that is 0; None if nothing waits anywhere.

        As solved, where that is at hand, all ready rows are sure to be of use, and none is lossless; else by the rule.
        """
        if waiting.chances is None and not self.running.lossless:
            chosen = self.outlook.choose(waiting.ready, waiting.live[1:])
            if chosen is not None:
                return chosen, waiting.ready
        return self.by_worth(waiting)

    def by_worth(self, waiting: Waiting) -> tuple[int, int] | None:
        """As `choose`, by the rule alone."""
        if waiting.ready and not any(waiting.live):
            return 0, waiting.ready
        if waiting.ready:
            # The first that is no smaller stands for all of them.
            sizes = np.minimum(self._sizes[: 1 + self._sizes.searchsorted(waiting.ready)], waiting.ready)
            worth = self._worth(0, self.prices.counts[sizes], np.zeros(1), self.prices.shallow[sizes], waiting)
            if waiting.chances is not None:
                worth = worth - sizes[1:] + waiting.chances.cumsum()[sizes[1:] - 1]
            best = int(worth.argmax())
            if worth[best] > 0:
                return 0, int(sizes[1 + best])
        held = [segment for segment, live in enumerate(waiting.live) if live]
        for segment in held[:-1]:
            rows, fills = (np.array([0.0, count[segment]]) for count in (waiting.live, waiting.fills))
            if self._worth(segment, rows, fills, self.prices.seconds(segment, rows, fills), waiting)[0] > 0:
                return segment, 0
        return (held[-1], 0) if held else None

    def _worth(
        self, segment: int, rows: FloatArray, fills: FloatArray, seconds: FloatArray, waiting: Waiting
    ) -> FloatArray:
        """Worth in tokens of running a segment now: one a row, less θ times what the rows take.

        Args:
            segment: to run.
            rows: how many, after a 0 that all is compared with. Shape (1 + sizes,).
            fills: rows that they owe there. (1 + sizes,), or (1,) for all.
            seconds: that the pass takes. (1 + sizes,).
            waiting: what stands where.

        Returns:
            (sizes,).
        """
        live = rows
        for deeper in range(segment + 1, len(waiting.live)):
            live = live * (1.0 - self._exits[deeper - 1])
            held, owed = float(waiting.live[deeper]), float(waiting.fills[deeper])
            # That flush happens anyway: its first row, which pays the fixed cost, is not charged. If nobody else needs
            # the pass it is charged whole.
            whole = not held and any(waiting.live[deeper + 1 :])
            flush = self.prices.seconds(deeper, live if whole else max(1.0, held) + live, owed + fills + rows - live)
            seconds = seconds + (flush if whole else flush - flush[0])
        rebatching = waiting.chances is None and not self.running.lossless
        worth: FloatArray = rows - (self.earning if rebatching else self.earning_ahead) * seconds
        return worth[1:]
