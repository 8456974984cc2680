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

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drex.control.cost import CostModel
from drex.control.outlook import LOAD_MOVED, Outlook
from drex.control.plan import FloatArray
from drex.control.rates import ExitRates
from drex.control.yardstick import MOST_OWED

REFRESH = 16
"""Passes between refreshes of the tables that decisions are read from."""
FEW = 32
"""From so many ready rows on, only multiples of 8 are considered, and all of them."""
EARNING_MEMORY = 128.0
"""Passes over which θ is averaged."""
FADE = math.exp(-1.0 / EARNING_MEMORY)
NOTHING = (0.0, 0.0, 0)
ENOUGH = 64
"""Passes that tell what checking exits earns, after as many that don't: costs and drafts are learnt first."""


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
    """

    def __init__(self, cost: CostModel, rates: ExitRates, kv_fill: str, most: int, most_owed: int = MOST_OWED) -> None:
        self.cost, self.rates, self.kv_fill = cost, rates, kv_fill
        self.counts = np.arange(most + 1, dtype=np.float64)
        # How many of the ready rows may start: any few, or as many as fill a step of the cost.
        self._sizes = np.concatenate((np.arange(FEW), np.arange(FEW, most + 8, 8)))
        self._tokens = self._seconds = 0.0
        # Tokens earned, and those that full depth would have earned meanwhile.
        self._gain = (0.0, 0.0)
        # The same of passes that checked exits, beside full depth all segments at once, and how many: by how many
        # decoded, whether requests ran ahead, and losslessly.
        self._checked: dict[tuple[int, bool, bool], tuple[float, float, int]] = {}
        self._ahead = self._lossless = False
        self._context, self._refreshed = 0.0, -1
        self._decoding = self._told = 0
        self.outlook = Outlook(cost, kv_fill, most_owed)
        self._refresh()

    @property
    def earning(self) -> float:
        """θ, tokens a second: as solved for about the present load, or else the moving average of what was earned.

        Contexts grow between two solutions, so what is taken from one is the gain on full depth, not the rate.
        """
        solved = self.outlook.yardstick
        if solved is not None and solved.optimal is not None and abs(solved.in_flight - self._decoding) <= 1:
            return solved.optimal / solved.full * solved.in_flight / self._one_by_one(solved.in_flight)
        return self.achieved or 0.0

    @property
    def achieved(self) -> float | None:
        """The moving average of tokens a second while decoding; None before any."""
        return self._tokens / self._seconds if self._seconds else None

    @property
    def earning_ahead(self) -> float:
        """θ under run-ahead, which nothing solves for: the moving average of the gain on full depth, at this load.

        Not of the rate, which lags behind requests that come and go. Trusted run-ahead never has to earn less than what
        is solved without; lossless run-ahead may.
        """
        earned, full = self._gain
        gained = earned / full * self._full_rate() if full else 0.0
        return gained if self._lossless else max(self.earning, gained)

    @property
    def promises(self) -> float | None:
        """What checking exits earns at about the present load, tokens a second; None while that isn't known.

        The solved optimum; under run-ahead more, if more was earned; where requests are lossless, which nothing solves
        for, what was earned.
        """
        solved, load = self.outlook.yardstick, self.load
        if not load:
            return None
        # Gains on full depth, not rates: the machine may have been faster.
        tokens, at_full_depth, passes = self._checked.get(self._kind, NOTHING)
        earned = [tokens / at_full_depth * load / self.full_step(load)] if passes >= 2 * ENOUGH and self._ahead else []
        if not self._lossless:
            if solved is None or solved.optimal is None:
                return None
            earned.append(solved.optimal / solved.full * load / self._one_by_one(load))
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
            return full is not None and self._lossless
        return promised < margin * full

    @property
    def full(self) -> float | None:
        """Full depth's tokens a second, all segments at once, at the load that promises are made for."""
        load = self.load
        return load / self.full_step(load) if load else None

    @property
    def load(self) -> int | None:
        """Requests that what is promised goes for: as was solved, or the present ones where nothing has to be."""
        if self._lossless:
            return self._decoding
        return None if self.outlook.yardstick is None else self.outlook.yardstick.in_flight

    def observe(self, tokens: int, seconds: float, *, checked: bool = True) -> None:
        """Count a pass: tokens decided, what it took, and whether exits were checked at the time."""
        fade = FADE
        self._tokens, self._seconds = self._tokens * fade + tokens, self._seconds * fade + seconds
        earned, full = self._gain
        self._gain = earned * fade + tokens, full * fade + seconds * self._full_rate()
        if checked:
            # Beside what passes at once were held for meanwhile: if flushes are dearer than they seem, the machine is
            # held for slower while there are many, and passes segment by segment for dearer than they are later.
            decoding, kind = max(1, self._decoding), self._kind
            at_full_depth = seconds * decoding / self.full_step(decoding)
            earned, full, passes = self._checked.get(kind, NOTHING)
            if passes >= ENOUGH:
                earned, full = earned * fade + tokens, full * fade + at_full_depth
            self._checked[kind] = earned, full, passes + 1

    @property
    def _kind(self) -> tuple[int, bool, bool]:
        """What earns alike: loads of about a size, and requests that run ahead alike."""
        return round(math.log2(max(1, self._decoding))), self._ahead, self._lossless

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
        self._decoding, self._ahead, self._lossless = decoding, ahead, lossless
        self.prepare(pass_number, context)
        if not self._seconds:
            # Nothing was earned yet: full depth is what it takes without exits.
            count = np.array([float(max(1, decoding))])
            seconds = float(self.cost.full_depth(count, context)[0])
            self._tokens, self._seconds = float(count[0]), seconds
            self._gain = self._tokens, self._tokens

    def prepare(self, pass_number: int, context: float) -> None:
        """Refresh what decisions on a pass are read from, if it is time: where that can be done before one is due.

        The outlook hears of it, and when load has moved.
        """
        due, moved = pass_number // REFRESH != self._refreshed, abs(self._decoding - self._told)
        if due:
            self._refreshed, self._context = pass_number // REFRESH, context
            self._refresh()
        if (due or moved > LOAD_MOVED * self._told) and self.rates.known:
            self._told = self._decoding
            # Nothing that lossless requests do is read from it: it is only shown.
            self.outlook.tick(pass_number, self._decoding, self._exits, context, used=not self._lossless)

    def _refresh(self) -> None:
        counts, context, segments = self.counts, self._context, range(self.cost.segments)
        self._exits = self.rates.all()
        self._full, self._at_once = self.cost.full_depth(counts, context), self.cost.at_once(counts)
        self._rows = [self.cost.row_seconds(segment, counts) for segment in segments]
        self._live = [self.cost.live_seconds(segment, counts, context) for segment in segments]
        self._factors = [self.cost.factors(segment, counts) for segment in segments]
        self._shallow = self.seconds(0, counts, 0.0)

    def seconds(self, segment: int, live: FloatArray | float, fills: FloatArray | float) -> FloatArray:
        """Passes over live rows and the fills that they owe, as of the last refresh; numbers or arrays."""
        if self.kv_fill in ("alias", "mask"):
            fills = 0.0
        counts, total = self.counts, np.add(live, fills)
        run = total if self.kv_fill == "recompute" else live
        out = np.interp(run, counts, self._rows[segment]) + np.interp(live, counts, self._live[segment])
        if self.kv_fill == "project":
            out = out + self.cost.profile.segments[segment].kv_row * np.asarray(fills)
        return np.asarray(out * np.interp(total, counts, self._factors[segment]))

    def seconds_ahead(self, segment: int, live: Sequence[int], fills: Sequence[int]) -> float:
        """What a row has ahead of it from a segment on, if it goes through with all that wait on the way."""
        rows, total = 0.0, 0.0
        for deeper in range(segment, len(live)):
            rows += live[deeper]
            total += float(self.seconds(deeper, max(1.0, rows), float(fills[deeper])))
        return total

    def full_step(self, decoding: int) -> float:
        """What a token takes at full depth with so many decoding, all segments at once, as of the last refresh."""
        return self._one_by_one(decoding) * self._at_once.item(min(decoding, len(self._at_once) - 1))

    def _one_by_one(self, decoding: int) -> float:
        return self._full.item(min(decoding, len(self._full) - 1))

    def _full_rate(self) -> float:
        """Tokens a second at full depth at this load, segment by segment, which all gains are measured by."""
        decoding = max(1, self._decoding)
        return decoding / self._one_by_one(decoding)

    def choose(self, waiting: Waiting) -> tuple[int, int] | None:
        """The segment to run, and how many of the ready rows where that is 0; None if nothing waits anywhere.

        As solved, where that is at hand, all ready rows are sure to be of use, and none is lossless; else by the rule.
        """
        if waiting.chances is None and not self._lossless:
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
            worth = self._worth(0, self.counts[sizes], np.zeros(1), self._shallow[sizes], waiting)
            if waiting.chances is not None:
                worth = worth - sizes[1:] + waiting.chances.cumsum()[sizes[1:] - 1]
            best = int(worth.argmax())
            if worth[best] > 0:
                return 0, int(sizes[1 + best])
        held = [segment for segment, live in enumerate(waiting.live) if live]
        for segment in held[:-1]:
            rows, fills = (np.array([0.0, count[segment]]) for count in (waiting.live, waiting.fills))
            if self._worth(segment, rows, fills, self.seconds(segment, rows, fills), waiting)[0] > 0:
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
            flush = self.seconds(deeper, live if whole else max(1.0, held) + live, owed + fills + rows - live)
            seconds = seconds + (flush if whole else flush - flush[0])
        rebatching = waiting.chances is None and not self._lossless
        worth: FloatArray = rows - (self.earning if rebatching else self.earning_ahead) * seconds
        return worth[1:]
