"""The policy `drex`: rebatching by the rule of `flush`, within age and deadlines."""

from __future__ import annotations

import math

from drex.control.constants import PROBE_EVERY_PASSES, PROBE_PASSES, SURE_GAIN, TRIAL_PASSES
from drex.control.policy.base import Choice, Setting, Split, View
from drex.control.policy.flush import Waiting


class Drex(Split):
    """Rebatch by the marginal-rate rule; flush what is due by age or deadline, and with whatever must run anyway."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._asked = self._went_through = 0
        self._interval, self._trying = PROBE_PASSES, 0
        self._probes = self._ahead = False

    def checks_exits(self, segment: int) -> bool:
        if segment == 0:
            self._probes = self._probes_next
            self._asked += 1
            # One probe alone earns less than always checking would: under run-ahead buffers fill first.
            self.checking = not self.resting
        # What is checked before the first exit point is checked at the others too.
        return self._probes or not self.resting

    @property
    def _probes_next(self) -> bool:
        return (self._asked + 1) % PROBE_EVERY_PASSES == 0

    @property
    def resting(self) -> bool:
        probing = self._ahead and self._asked % (PROBE_EVERY_PASSES * PROBE_PASSES) < PROBE_PASSES
        return self.config.adaptive and not probing and self.rule.pays is False

    def choose(self, view: View) -> Choice | None:
        self._ahead = view.ahead
        self.rule.tick(view.pass_number, view.decoding, view.context, ahead=view.ahead, lossless=view.lossless)
        if self.resting:
            choice = super().choose(view)
            return choice if choice is None or self._probes_next else self._through(choice)
        segments = len(view.live)
        # Every buffer may come due in the same pass, and each flush takes one.
        by_age = self.config.max_wait_passes - segments
        for segment in range(segments - 1, 0, -1):
            if view.live[segment] and (view.oldest_age[segment] >= by_age or self._late_next(view, segment)):
                return Choice(segment)
        # Prompts go through at once and take the buffered rows of the segment along: the weights are read once.
        for segment in range(segments - 1, 0, -1):
            if view.urgent[segment]:
                return Choice(segment)
        if view.prompts:
            return Choice(0, view.ready)
        chosen = self.rule.choose(Waiting(view.ready, view.live, view.fills, view.chances))
        if chosen is None:
            return None
        choice = Choice(*chosen)
        if not self.config.adaptive or any(view.live):
            return choice
        if not self._trying:
            if self._asked - self._went_through < self._interval or not self.rule.might_not_pay(SURE_GAIN):
                return choice
            self._interval, self._trying = min(2 * self._interval, PROBE_EVERY_PASSES * PROBE_PASSES), TRIAL_PASSES
        if any(view.owed):
            return Choice(max(range(len(view.owed)), key=lambda segment: view.owed[segment]), fills=True)
        self._trying -= 1
        return self._through(choice)

    def _through(self, choice: Choice) -> Choice:
        """All segments at once, if it begins at the first."""
        if choice.segment:
            return choice
        self._went_through = self._asked
        return choice._replace(through=True)

    def _late_next(self, view: View, segment: int) -> bool:
        """Whether the buffer's first due token could be late if another pass came before its flush.

        That pass may be the one over segment 0 or a flush of a shallower buffer; all its rows could join this one.
        Deeper buffers that are due as well go first.
        """
        due = view.due[segment]
        if due == math.inf:
            return False
        held = [s for s in range(1, len(view.live)) if s != segment and view.live[s]]
        flushes = {s: float(self.rule.prices.seconds(s, view.live[s], view.owed[s])) for s in held}
        first = sum(seconds for s, seconds in flushes.items() if s > segment)
        between = [seconds for s, seconds in flushes.items() if s < segment]
        joined = list(view.live)
        if view.ready:
            between.append(float(self.rule.prices.seconds(0, view.ready, 0.0)))
        joined[segment] += view.ready + sum(view.live[:segment])
        ahead = self.rule.prices.seconds_ahead(segment, joined, view.owed)
        return view.now + first + max(between, default=0.0) + ahead > due
