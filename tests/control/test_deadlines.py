"""Targets of requests and of the engine, in virtual time that goes by the profile the scheduler knows."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from helpers import SHAPES, Machine, make_scheduler, names, profile, request

from drex.config import EngineConfig
from drex.control.constants import LEAST_PROMPT_ROWS
from drex.control.cost.model import CostModel
from drex.control.cost.profile import Curve, Profile, SegmentCost
from drex.control.deadlines import Deadlines, pace
from drex.control.memory.slots import SlotLayout
from drex.control.plan import Evaluations
from drex.control.request import Request
from drex.control.scheduler import Scheduler
from drex.sampling_params import SamplingParams

EPSILON = 1e-9


@dataclass
class Served:
    """A run to the end: when each request's tokens came."""

    scheduler: Scheduler
    requests: list[Request]
    times: dict[str, list[float]]

    def gaps(self) -> list[float]:
        return [later - sooner for times in self.times.values() for sooner, later in itertools.pairwise(times)]

    def late(self, tpot: float) -> int:
        """Tokens that came after their share of a target, in seconds from the first token on."""
        return sum(t > times[0] + k * tpot + EPSILON for times in self.times.values() for k, t in enumerate(times))

    def after_first(self) -> dict[str, float]:
        return {name: times[-1] - times[0] for name, times in self.times.items()}


def serve(
    made: Profile,
    requests: list[Request],
    exit_rate: float,
    lengths: tuple[int, ...] | None = None,
    fill: str = "recompute",
    machine: type[Machine] = Machine,
    **changes: Any,
) -> Served:
    sizes = {"max_num_seqs": len(requests), "max_num_batched_tokens": 512, "kv_cache_tokens": 8000}
    config = EngineConfig(1024, **(sizes | {"max_wait_passes": 64} | changes))
    scheduler = make_scheduler(config, SlotLayout(lengths or (2,) * len(made.segments)), fill, made)
    for each in requests:
        scheduler.add(each, 0.0)
    runs, times = machine(exit_rate, profile=made), {each.request_id: [] for each in requests}
    while (batch := scheduler.next(runs.now)) is not None:
        for each in runs.finish(scheduler, batch):
            times[each.request_id].append(runs.now)
    assert all(len(times[each.request_id]) == each.max_tokens for each in requests)
    return Served(scheduler, requests, times)


def several(count: int, segments: int, outputs: int = 60, **targets: float | None) -> list[Request]:
    return [request(number, 4, outputs, segments, **targets) for number in range(count)]


def full_step(made: Profile, count: int) -> float:
    return float(CostModel(made).full_depth(np.array([float(count)]), 64.0)[0])


# Due times


def test_tokens_are_due_at_the_first_one_and_a_target_for_each_after_it() -> None:
    deadlines, each = Deadlines(None), request(0, 3, 8, 2, tpot_ms=100.0)
    assert each.due == math.inf
    for number, now in enumerate((5.0, 5.3, 5.35)):
        deadlines.emitted(each, number + 1, now, 0.01)
        assert each.due == pytest.approx(5.0 + 0.1 * (number + 1))
    # The second was due at 5.1 and the third at 5.2.
    assert each.first_token_at == 5.0
    assert deadlines.late == 2


def test_a_gap_is_due_after_the_token_before_and_the_nearest_of_several_targets_counts() -> None:
    deadlines = Deadlines(2.0)
    each = request(0, 3, 8, 2, tpot_ms=100.0, itl_ms=70.0)
    deadlines.emitted(each, 1, 1.0, 0.03)
    assert each.due == pytest.approx(1.06)  # 2 · 0.03
    deadlines.emitted(each, 2, 1.05, 0.5)
    assert each.due == pytest.approx(1.12)  # 1.05 + 0.07
    deadlines.emitted(each, 3, 1.29, 0.5)
    assert each.due == pytest.approx(1.3)  # 1 + 3 · 0.1
    assert deadlines.late == 1


def test_the_bound_on_slowdown_adds_up_over_tokens() -> None:
    deadlines, each = Deadlines(1.5), request(0, 3, 8, 2)
    for number, (now, step, due) in enumerate(((1.0, 0.1, 1.15), (1.01, 0.2, 1.45), (1.02, 0.1, 1.6)), 1):
        deadlines.emitted(each, number, now, step)
        assert each.due == pytest.approx(due)


def test_without_targets_nothing_is_due() -> None:
    deadlines, each = Deadlines(None), request(0, 3, 8, 2)
    deadlines.emitted(each, 1, 1e6, 0.1)
    deadlines.buffered(np.array([each.due]), 1e7, 1e3)
    assert (each.due, deadlines.late, deadlines.infeasible) == (math.inf, 0, 0)


def test_a_row_that_could_not_be_in_time_when_it_was_buffered_is_counted() -> None:
    deadlines, each = Deadlines(None), request(0, 3, 8, 2, itl_ms=50.0)
    deadlines.emitted(each, 1, 1.0, 0.1)
    deadlines.buffered(np.array([each.due, math.inf]), 1.02, 0.02)
    assert deadlines.infeasible == 0
    deadlines.buffered(np.array([each.due, math.inf]), 1.02, 0.04)
    assert deadlines.infeasible == 1


def test_the_pace_of_a_request_is_the_smallest_of_its_targets_per_token() -> None:
    assert pace(SamplingParams()) == pace(SamplingParams(ttft_ms=1.0)) == math.inf
    assert pace(SamplingParams(tpot_ms=80.0)) == pytest.approx(0.08)
    assert pace(SamplingParams(itl_ms=60.0, tpot_ms=90.0)) == pytest.approx(0.06)


# Targets of requests, met


@pytest.mark.parametrize(("segments", "slack"), [(2, 2.0), (3, 2.0), (2, 1.5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_targets_that_can_be_met_are_met(shape: str, segments: int, slack: float) -> None:
    made = profile(shape, *[1.0] * segments)
    for count, rate in ((8, 0.3), (8, 0.6), (16, 0.3), (16, 0.9)):
        tpot = slack * full_step(made, count)
        bound = serve(made, several(count, segments, tpot_ms=1e3 * tpot), rate)
        assert bound.scheduler.deadlines.infeasible == 0
        assert bound.late(tpot) == bound.scheduler.deadlines.late == 0, (count, rate)


@pytest.mark.parametrize("shape", ["weight_bound", "stepped"])
def test_without_targets_some_of_these_tokens_would_be_late(shape: str) -> None:
    made = profile(shape, 1.0, 1.0)
    for count, rate in ((8, 0.6), (16, 0.6), (16, 0.9)):
        assert serve(made, several(count, 2), rate).late(2.0 * full_step(made, count)) > 0


def test_the_smallest_run_whose_target_could_be_met() -> None:
    # What joins the buffer in the last shallow pass before a flush makes the flush longer, too.
    made = profile("linear", 1.0, 1.0)
    found = serve(made, several(2, 2, tpot_ms=1500.0 * full_step(made, 2)), 0.3)
    assert found.scheduler.deadlines.infeasible == 0
    assert found.scheduler.deadlines.late == 0


@pytest.mark.parametrize(
    ("shape", "segments", "slack", "count", "rate"),
    [
        ("weight_bound", 2, 2.0, 8, 0.6),
        ("weight_bound", 2, 2.0, 16, 0.9),
        ("weight_bound", 3, 3.0, 8, 0.9),
        ("weight_bound", 3, 3.0, 16, 0.6),
        ("stepped", 2, 2.0, 8, 0.6),
        ("stepped", 2, 2.0, 16, 0.3),
        ("linear", 2, 2.0, 8, 0.3),
    ],
)
def test_single_gaps_are_bounded(shape: str, segments: int, slack: float, count: int, rate: float) -> None:
    made = profile(shape, *[1.0] * segments)
    itl = slack * full_step(made, count)
    free = serve(made, several(count, segments), rate)
    bound = serve(made, several(count, segments, itl_ms=1e3 * itl), rate)
    assert max(free.gaps()) > itl
    assert bound.scheduler.deadlines.infeasible == 0
    assert max(bound.gaps()) <= itl + EPSILON
    assert bound.scheduler.deadlines.late == 0


@pytest.mark.parametrize("segments", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_where_nearly_all_exit_gaps_are_bounded_if_what_is_owed_is(shape: str, segments: int) -> None:
    made, count = profile(shape, *[1.0] * segments), 16
    itl = segments * full_step(made, count)
    bound = serve(made, several(count, segments, itl_ms=1e3 * itl), 0.9, max_fill_rows=count)
    assert bound.scheduler.deadlines.infeasible == bound.scheduler.deadlines.late == 0
    assert max(bound.gaps()) <= itl + EPSILON


def test_a_target_of_one_request_is_met_among_others_without() -> None:
    made, count = profile("weight_bound", 1.0, 1.0), 16
    itl = 2.0 * full_step(made, count)

    def longest(served: Served, name: str) -> float:
        return max(later - sooner for sooner, later in itertools.pairwise(served.times[name]))

    free = serve(made, several(count, 2), 0.9)
    worst = max(range(count), key=lambda number: longest(free, f"r{number}"))
    requests = several(count, 2)
    requests[worst] = request(worst, 4, 60, 2, itl_ms=1e3 * itl)
    assert longest(serve(made, requests, 0.9), f"r{worst}") <= itl + EPSILON < longest(free, f"r{worst}")


@pytest.mark.parametrize("shape", SHAPES)
def test_what_cannot_be_met_is_counted_and_served_all_the_same(shape: str) -> None:
    made = profile(shape, 1.0, 1.0)
    hopeless = 0.5 * full_step(made, 1)
    found = serve(made, several(6, 2, outputs=20, tpot_ms=1e3 * hopeless), 0.3)
    deadlines = found.scheduler.deadlines
    assert deadlines.infeasible > 0
    assert deadlines.late == found.late(hopeless) > 0
    # As many rows were buffered as did not exit, and each of them is counted at most once.
    deep = sum(record.depth == 2 for each in found.requests for record in each.records[1:])
    assert deadlines.infeasible <= deep


# The engine's bound on slowdown


def whole(made: Profile) -> Profile:
    """The same layers with no exit points between them."""
    parts = made.segments
    rows = Curve(parts[0].rows.counts, tuple(map(sum, zip(*(part.rows.seconds for part in parts), strict=True))))
    span, entry = (sum(getattr(part, name) for part in parts) for name in ("span", "entry"))
    return Profile((SegmentCost(rows, parts[-1].head, span, entry, 0.0),))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("segments", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bound_on_slowdown_holds_for_each_request_against_full_depth(
    shape: str, segments: int, alike: bool
) -> None:
    made, slowdown = profile(shape, *[1.0] * segments), 1.25
    for count, rate in ((4, 0.3), (12, 0.3), (12, 0.6)):
        outputs = [40 if alike else 20 + 5 * number for number in range(count)]

        def fresh(depth: int, outputs: list[int] = outputs) -> list[Request]:
            return [request(number, 4, each, depth) for number, each in enumerate(outputs)]

        full = serve(whole(made), fresh(1), rate, (2 * segments,), policy="full").after_first()
        bound = serve(made, fresh(segments), rate, max_slowdown=slowdown).after_first()
        assert all(bound[name] <= slowdown * full[name] + EPSILON for name in full), (count, rate)


class OneIsNeverSure(Machine):
    """The first request never exits; the others do as they do."""

    def exits(self, asked: Evaluations, segment: int) -> np.ndarray:
        others = np.array([draws.request_id != "r0" for draws in asked.draws], dtype=np.bool_)
        return super().exits(asked, segment) & others


@pytest.mark.parametrize("shape", ["weight_bound", "stepped"])
def test_without_the_bound_one_request_would_pay_for_the_others(shape: str) -> None:
    made, slowdown = profile(shape, 1.0, 1.0), 1.25
    full = serve(whole(made), several(12, 1), 0.0, (4,), policy="full").after_first()["r0"]
    free, bound = (
        serve(made, several(12, 2), 0.9, machine=OneIsNeverSure, max_slowdown=limit).after_first()["r0"]
        for limit in (None, slowdown)
    )
    assert bound <= slowdown * full + EPSILON
    assert free > slowdown * full


@pytest.mark.parametrize("mode", ["off", "trusted"])
def test_due_times_and_counts_are_those_of_the_requests_that_run_now(mode: str) -> None:
    """Whoever loses a seat and comes again keeps what is due; whoever has ended leaves nothing in its seat."""
    made = profile("linear", 1.0, 1.0)
    config = EngineConfig(64, 4, 16, kv_cache_tokens=24)
    scheduler = make_scheduler(config, SlotLayout((2, 2)), "recompute", made)
    targets = [{"itl_ms": 400.0}, {}, {"tpot_ms": 250.0}, {"tpot_ms": 90.0, "itl_ms": 70.0}, {}, {"itl_ms": 150.0}]
    for number, each in enumerate(targets):
        scheduler.add(replace(request(number, 4, 6 + 2 * number, 2, **each), run_ahead=mode), 0.0)
    machine, seats, empty = Machine(0.5, profile=made), scheduler.seats, False
    for _ in range(2000):
        batch = machine.run(scheduler)
        running = list(seats)
        assert seats.due.min() == min((each.due for each in running), default=math.inf)
        for each in running:
            if each.num_output and each.params.tpot_ms == 250.0:
                assert each.first_token_at is not None
                assert each.due == pytest.approx(each.first_token_at + each.num_output * 0.25)
        assert seats.pace.min() == min((pace(each.params) for each in running), default=math.inf)
        assert seats.decoding == sum(each.num_output > 0 for each in running)
        empty |= 0 < len(running) < 4 and math.isinf(seats.due.min())
        if batch is None:
            break
    assert scheduler.admission.preemptions > 0
    assert empty, "requests with targets never left others behind"


# Prompts beside running requests


def chunks(most: int, tpot_ms: float | None) -> tuple[list[int], Served]:
    """Rows of a long prompt in each shallow pass, beside one running request with a target."""
    made = profile("linear", 1.0, 1.0)
    config = EngineConfig(4096, 4, most, kv_cache_tokens=8000)
    scheduler = make_scheduler(config, SlotLayout((2, 2)), "recompute", made)
    running, coming = request(0, 4, 100, 2, tpot_ms=tpot_ms), request(1, 600, 3, 2)
    scheduler.add(running, 0.0)
    machine, found = Machine(0.5, profile=made), []
    for _ in range(20):
        machine.run(scheduler)
    scheduler.add(coming, machine.now)
    while not coming.num_output:
        batch = scheduler.next(machine.now)
        assert batch is not None
        sizes = dict(zip(names(batch, scheduler), (batch.stops - batch.starts).tolist(), strict=True))
        if batch.segment == 0 and coming.request_id in sizes:
            found.append(sizes[coming.request_id])
        machine.finish(scheduler, batch)
    assert sum(found) == 600
    return found, Served(scheduler, [running, coming], {})


def test_without_targets_prompts_fill_the_pass() -> None:
    found, _ = chunks(512, None)
    assert len(found) == 2


@pytest.mark.parametrize("most", [512, 100, 64, 24, 17])
def test_prompts_are_cut_short_while_a_token_is_nearly_due_but_not_below_a_floor(most: int) -> None:
    found, _ = chunks(most, 60.0)
    beside, last = found[:-1], found[-1]
    assert min(beside) < min(most, 64)
    assert min(beside) >= min(LEAST_PROMPT_ROWS, most - 1)
    assert last > 0


def test_the_looser_the_target_the_longer_the_chunks() -> None:
    passes = [len(chunks(512, tpot_ms)[0]) for tpot_ms in (60.0, 100.0, 150.0, 300.0)]
    assert passes == sorted(set(passes), reverse=True)
    assert passes[-1] == 2


# Admission


def admitted(requests: list[Request], **changes: Any) -> list[str]:
    """Names in the order in which first tokens came, one request in flight at a time."""
    found = serve(profile("linear", 1.0, 1.0), requests, 0.5, **{"max_num_seqs": 1} | changes)
    return sorted(found.times, key=lambda name: found.times[name][0])


def test_smaller_priorities_are_admitted_first_and_equal_ones_as_they_came() -> None:
    priorities = [1, 0, 2, 0, -1, 1]
    requests = [request(number, 3, 4, 2, priority) for number, priority in enumerate(priorities)]
    assert admitted(requests) == ["r4", "r1", "r3", "r0", "r5", "r2"]


@pytest.mark.parametrize("fits", [1, 3, 5])
def test_no_more_are_admitted_than_leave_targets_within_reach(fits: int) -> None:
    made = profile("linear", 1.0, 1.0)
    tpot = 0.5 * (full_step(made, fits) + full_step(made, fits + 1))
    config = EngineConfig(1024, 16, 512, 8000)
    scheduler = make_scheduler(config, SlotLayout((2, 2)), "recompute", made)
    for each in several(12, 2, outputs=30, tpot_ms=1e3 * tpot):
        scheduler.add(each, 0.0)
    machine, most = Machine(0.5, profile=made), 0
    while machine.run(scheduler) is not None:
        most = max(most, len(scheduler.admission.running))
    assert most == fits


def test_targets_out_of_reach_hold_nobody_back() -> None:
    made = profile("linear", 1.0, 1.0)
    config = EngineConfig(1024, 16, 512, 8000)
    scheduler = make_scheduler(config, SlotLayout((2, 2)), "recompute", made)
    for each in several(12, 2, tpot_ms=1e3 * 0.9 * full_step(made, 1)):
        scheduler.add(each, 0.0)
    Machine(0.5, profile=made).run(scheduler)
    assert len(scheduler.admission.running) == 12
