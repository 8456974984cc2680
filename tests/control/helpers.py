"""Requests, a machine and costs, all made up. No torch in this folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from drex.config import EngineConfig, ExitRule
from drex.control.cost.model import CostModel, Load
from drex.control.cost.profile import Curve, Profile, SegmentCost, nominal
from drex.control.memory.slots import SlotLayout
from drex.control.plan import Evaluations, Pass, PassResult, Verdicts
from drex.control.request import Request
from drex.control.scheduler import Scheduler
from drex.control.standing import Standing
from drex.sampling_params import SamplingParams

EOS = 3
COUNTS = tuple(float(2**k) for k in range(13))


def request(
    number: int,
    prompt: int,
    max_tokens: int,
    segments: int,
    priority: int = 0,
    eos: frozenset[int] = frozenset(),
    **targets: float | None,
) -> Request:
    """A request whose rows exit at confidence 0.5; targets are those of SamplingParams, in milliseconds."""
    rule = ExitRule("max_prob", (0.5,) * (segments - 1))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, priority=priority, **targets)
    return Request(
        f"r{number}",
        tuple(range(2, 2 + prompt)),
        params,
        rule,
        0,
        eos,
        segments,
        arrival=number,
    )


def make_scheduler(config: EngineConfig, layout: SlotLayout, fill: str, profile: Profile | None = None) -> Scheduler:
    return Scheduler(config, layout, fill, CostModel(profile or nominal(layout.lengths)))


@dataclass
class Machine:
    """Answers passes: each check exits with a probability that is a function of request position and segment only.

    Its clock goes by `profile`, or by the nominal costs.
    """

    exit_rate: float
    now: float = 0.0
    profile: Profile | None = None

    def run(self, scheduler: Scheduler) -> Pass | None:
        """Plan, execute and commit one pass; None where there was none to run."""
        batch = scheduler.next(self.now)
        if batch is not None:
            self.finish(scheduler, batch)
        return batch

    def finish(self, scheduler: Scheduler, batch: Pass, result: PassResult | None = None) -> list[Request]:
        cost = CostModel(self.profile or nominal(scheduler.layout.lengths))
        seconds = sum(cost.predict(part.segment, Load.of(part)) for part in batch.parts)
        self.now += seconds
        scheduler.commit(batch, result or self.execute(batch), self.now)
        touched = scheduler.record(batch)
        scheduler.took(batch, seconds)
        return touched

    def execute(self, batch: Pass) -> PassResult:
        last = batch.parts[-1]
        exits = self.exits(last.evaluations, last.segment)
        return PassResult(made_up(last.evaluations, np.where(exits, 0.75, 0.25), exits))

    def exits(self, asked: Evaluations, segment: int) -> np.ndarray:
        where = zip(asked.draws, asked.positions.tolist(), strict=True)
        drawn = np.array([random.Random(f"{d.request_id}/{p}/{segment}").random() for d, p in where])
        return ~np.isnan(asked.thresholds) & (drawn < self.exit_rate)


def made_up(asked: Evaluations, confidences: np.ndarray, exits: np.ndarray) -> Verdicts:
    """Verdicts with these confidences and exits; every token is 5."""
    fives = np.full(len(asked), 5)
    agreeing = np.stack((fives, np.ones_like(fives)))
    return Verdicts(fives, np.full(len(asked), -1.0), confidences, exits, agreeing, {}, np.ones(len(asked), dtype=bool))


def drawn(*facts: Any) -> float:
    return random.Random("/".join(map(str, facts))).random()


class Speaker(Machine):
    """Heads that say tokens: the last one what is right; the exits that too, or something else.

    What is said depends on the request, the position and the segment, so that the outcome is known beforehand.
    """

    wrong = 0.4

    def confidence(self, name: str, position: int, segment: int) -> float:
        return drawn("sure", name, position, segment)

    def token(self, name: str, position: int, segment: int, segments: int) -> int:
        right = 4 + int(40 * drawn("token", name, position))
        if segment == segments - 1 or drawn("right", name, position, segment) >= self.wrong:
            return EOS if drawn("end", name, position) < 0.02 else right
        return 4 + int(40 * drawn("wrong", name, position, segment))

    def execute(self, batch: Pass) -> PassResult:
        last = batch.parts[-1]
        asked, segment = last.evaluations, last.segment
        where = [(d.request_id, p) for d, p in zip(asked.draws, asked.positions.tolist(), strict=True)]
        sure = np.array([self.confidence(*each, segment) for each in where])
        exits = sure >= asked.thresholds
        said = made_up(asked, sure, exits)
        tokens = np.array([self.token(*each, segment, self.segments) for each in where], dtype=np.int64)
        return PassResult(said.__class__(tokens, said.logprobs, sure, exits, said.agreeing, {}, said.finite))

    def expected(self, each: Request, lossless: bool) -> list[int]:
        """What the request's tokens are to be, by the plain definition of early exit, or of full depth."""
        out: list[int] = []
        while len(out) < each.max_tokens and EOS not in out:
            position = len(each.prompt) - 1 + len(out)
            last = self.segments - 1
            # The first token never exits early.
            exits = range(0 if lossless or not out else last)
            depth = next((s for s in exits if self.confidence(each.request_id, position, s) >= 0.5), last)
            out.append(self.token(each.request_id, position, depth, self.segments))
        return out

    segments = 2


def asked(
    number: int, prompt: int, max_tokens: int, segments: int, mode: str, eos: frozenset[int] = frozenset({EOS})
) -> Request:
    each = request(number, prompt, max_tokens, segments, eos=eos)
    each.run_ahead = mode
    return each


def names(batch: Pass, scheduler: Scheduler) -> list[str]:
    """The requests of an outstanding pass."""
    return [scheduler.seats[seat].request_id for seat in scheduler.work(batch).spans.tolist()]


def drain(scheduler: Scheduler, machine: Machine, *, check_every_pass: bool = True) -> dict[str, int]:
    """Run until nothing is left. Returns the longest wait of a buffered row, in passes, by request."""
    waits: dict[str, int] = {}
    for _ in range(100_000):
        batch = scheduler.next(machine.now)
        if batch is None:
            return waits
        for segment, buffer in enumerate(Standing.of(scheduler.seats).buffers):
            for seat in buffer.tolist():
                name = scheduler.seats[seat].request_id
                waits[name] = max(waits.get(name, 0), batch.number - int(scheduler.seats.since[seat]))
            assert segment or not len(buffer)
        machine.finish(scheduler, batch)
        if check_every_pass:
            scheduler.check_integrity()
    raise AssertionError("the scheduler does not come to an end")


# Shapes of costs. `layers` scales a segment; its head is left as it is.


def weight_bound(layers: float = 1.0) -> SegmentCost:
    """A GPU's: reading weights takes 5 ms whatever comes, up to some 170 rows."""
    rows = Curve(COUNTS, tuple(layers * (max(5e-3, 3e-5 * n) + 3e-6 * n) for n in COUNTS))
    return SegmentCost(rows, Curve(COUNTS, tuple(1e-3 + 1e-5 * n for n in COUNTS)), 0.0, 0.0, layers * 3e-6)


def linear(layers: float = 1.0) -> SegmentCost:
    """A CPU's: each row costs a tenth of the first one, each request and K/V entry something."""
    rows = Curve(COUNTS, tuple(layers * (17e-3 + 1.8e-3 * n) for n in COUNTS))
    return SegmentCost(rows, Curve(COUNTS, tuple(1e-3 + 1e-4 * n for n in COUNTS)), 3e-4, 1e-7, layers * 1.8e-4)


def stepped(layers: float = 1.0) -> SegmentCost:
    """Graph buckets: passes are as slow as the next multiple of 16 rows."""
    counts = tuple(float(n + more) for n in range(16, 1024, 16) for more in (0, 1))
    seconds = tuple(layers * (4e-3 + 8e-4 * -(-n // 16)) for n in counts)
    return SegmentCost(Curve(counts, seconds), Curve((1.0, 256.0), (5e-4, 2e-3)), 0.0, 1e-8, layers * 1e-5)


SHAPES: dict[str, Callable[[float], SegmentCost]] = {
    "weight_bound": weight_bound,
    "linear": linear,
    "stepped": stepped,
}


def profile(shape: str, *layers: float) -> Profile:
    """A profile with segments of one shape and these sizes."""
    return Profile(tuple(SHAPES[shape](each) for each in layers), source=shape)
