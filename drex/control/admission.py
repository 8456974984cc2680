"""Who runs and who waits: requests come, are admitted in order of urgency, lose their seats for others, and end.

Capacity. Nothing is reserved, but admitted work is *claimed*: all slots that a request's known tokens may still take.
A row enters segment 0 only if its slots at every layer can be claimed, so every pass over a deeper segment fits.
When no pass is possible, the latest-arrived request of the lowest priority loses its K/V and is admitted again later;
it then replays its tokens at the depths that were recorded. Since a request that could not fit alone was refused, the
one that is never preempted (the oldest of the highest priority) always gets on.
"""

from __future__ import annotations

import bisect

from drex.config import EngineConfig
from drex.control.memory.placement import Placement
from drex.control.policy.flush import FlushRule
from drex.control.request import Request
from drex.control.seats import Seats, urgency
from drex.errors import SettingError
from drex.outputs import FinishReason


class Admission:
    """Owns the requests that have not ended.

    Args:
        config: for what fits.
        seats: of those that run.
        placement: what they hold.
        rule: how long a step takes, for those that have targets.

    Attributes:
        waiting: most urgent first.
        preemptions: how often a request has lost its K/V.
    """

    def __init__(self, config: EngineConfig, seats: Seats, placement: Placement, rule: FlushRule) -> None:
        self.config, self.seats, self.placement, self.rule = config, seats, placement, rule
        self.waiting: list[Request] = []
        self.preemptions = 0
        self._requests: dict[str, Request] = {}
        self._aborting: list[Request] = []

    @property
    def running(self) -> list[Request]:
        """Requests that have a seat, most urgent first."""
        return sorted(self.seats, key=urgency)

    def check_fits(self, request: Request) -> None:
        """Raise ValueError for a request that could never be served, alone in the pool."""
        # The last token is never run, so it needs no K/V.
        length = len(request.prompt) + request.max_tokens - 1
        asked = f"prompt ({len(request.prompt)}) and max_tokens ({request.max_tokens})"
        if length * self.placement.slots_per_token > self.placement.pool.capacity:
            raise SettingError(
                "prompt",
                f"{asked} need K/V for {length} tokens and the pool holds {self.config.kv_cache_tokens}: "
                f"shorten one of them, or raise kv_cache_tokens",
            )
        if length > self.config.max_model_len:
            raise SettingError(
                "prompt",
                f"{asked} are more than the {self.config.max_model_len} tokens that a request may have: "
                f"shorten one of them, or raise max_model_len",
            )

    def add(self, request: Request, now: float) -> None:
        """Queue a request. Raises ValueError for one that could never fit."""
        self.check_fits(request)
        assert request.request_id not in self._requests
        request.arrive(now)
        self._requests[request.request_id] = request
        bisect.insort(self.waiting, request, key=urgency)

    def finish(self, request_id: str, reason: FinishReason, error: str | None = None) -> None:
        """End a request and free all it holds; if it is in an outstanding pass, at the next `finish_aborted`.

        Args:
            request_id: of a request that has not ended.
            reason: why it ends.
            error: what went wrong, for `FinishReason.ERROR`.
        """
        request = self._requests[request_id]
        if request.seat is not None and not self.seats.idle[request.seat]:
            request.ask_to_abort(reason, error)
            self._aborting.append(request)
            return
        assert request.finish_reason is None
        request.end(reason, error)
        del self._requests[request_id]
        if request.seat is None:
            self.waiting.remove(request)
        else:
            self._drop(request)

    def finish_aborted(self) -> list[Request]:
        """End those that were to end while a pass held them, and that none holds now; returns them."""
        if not self._aborting:
            return []
        freed = [each for each in self._aborting if each.seat is None or self.seats.idle[each.seat]]
        self._aborting = [each for each in self._aborting if each not in freed]
        # The pass may have ended some.
        left = [each for each in freed if each.finish_reason is None]
        for request in left:
            assert request.abort_asked is not None
            self.finish(request.request_id, request.abort_asked, request.error)
        return left

    def admit(self) -> None:
        """Seat those that wait, as far as they fit, and as long as that makes nobody late who need not be."""
        while self.waiting and not self.seats.full:
            request = self.waiting[0]
            # Room for everyone's next token beside it: else it would be preempted before it got anywhere.
            spare = len(self.seats) * self.placement.slots_per_token
            fits = self.placement.pool.fits(self.placement.slots_needed(request) + spare)
            if not fits or self._would_be_late():
                return
            self.waiting.pop(0)
            self.seats.sit(request)
            self.placement.open(request)

    def preempt(self) -> bool:
        """Send the last of the running requests back to the queue; False if that would be the only one.

        What is known of the requests must be in their records.
        """
        candidates = [request for request in self.running[1:] if self.seats.idle[request.seat]]
        if not candidates:
            return False
        request = candidates[-1]
        self._drop(request)
        request.forget_drafts()
        bisect.insort(self.waiting, request, key=urgency)
        self.preemptions += 1
        return True

    def _drop(self, request: Request) -> None:
        """Take a running request off the machine."""
        self.placement.close(request)
        self.seats.leave(request)

    def _would_be_late(self) -> bool:
        """Whether one more request would push running ones past targets that can be met at all."""
        tightest = float(self.seats.pace.min())
        return self.rule.prices.full_step(1) <= tightest < self.rule.prices.full_step(len(self.seats) + 1)
