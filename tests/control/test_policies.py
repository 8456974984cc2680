"""What each policy decides: by hand-made verdicts and views, and through a scheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers import Machine, make_scheduler, profile, request

from drex.config import EngineConfig
from drex.control.constants import PROBE_EVERY_PASSES, TRIAL_PASSES
from drex.control.cost.model import CostModel, Load
from drex.control.cost.profile import Curve, Profile, SegmentCost
from drex.control.memory.slots import SlotLayout
from drex.control.plan import Pass
from drex.control.policy.base import Checks, Choice, Setting, Split, View
from drex.control.policy.rebatching import Drex
from drex.control.request import Request
from drex.extensions import POLICIES

THRESHOLD = 0.5
BATCHWISE = ("consensus", "majority", "greedy", "latency_only")


def config(policy: str, **changes: Any) -> EngineConfig:
    return EngineConfig(256, 16, 512, 4000, policy=policy, **changes)


def make_policy(name: str, segments: int = 2, made: Profile | None = None, **changes: Any) -> Split:
    cost = CostModel(made or profile("weight_bound", *[1.0] * segments))
    made_policy: Split = POLICIES.make(name, {}, Setting(config(name, **changes), cost, "recompute"))
    return made_policy


def checks(*confidences: float, thresholds: Sequence[float] | None = None) -> Checks:
    said, limits = np.array(confidences), np.array(thresholds or [THRESHOLD] * len(confidences))
    return Checks(said, limits, said >= limits)


def exiting(policy: Split, said: Checks) -> list[bool]:
    return policy.exits(0, said).tolist()


def view(*live: int, **changes: Any) -> View:
    """Rows that wait at segments 1, 2, …; nothing else stands anywhere but what is named."""
    segments = len(live) + 1
    none = [0] * segments
    values: dict[str, Any] = {
        "pass_number": 5,
        "now": 10.0,
        "ready": 0,
        "prompts": False,
        "live": [0, *live],
        "fills": none,
        "urgent": none,
        "oldest_age": none,
        "due": [math.inf] * segments,
        "owed": none,
        "decoding": sum(live),
        "context": 64.0,
    }
    return View(**(values | changes))


# Which rows of a pass exit

MIXED, ALL, NONE = (0.9, 0.1, 0.6, 0.2), (0.9, 0.5, 0.7), (0.1, 0.49)


@pytest.mark.parametrize("name", ["drex", "split"])
def test_each_row_goes_by_its_own_confidence(name: str) -> None:
    policy = make_policy(name)
    assert exiting(policy, checks(*MIXED)) == [True, False, True, False]
    assert exiting(policy, checks(0.5)) == [True]


@pytest.mark.parametrize("name", BATCHWISE)
def test_where_all_agree_the_batch_does_what_each_of_them_would(name: str) -> None:
    assert exiting(make_policy(name), checks(*ALL)) == [True] * 3
    assert exiting(make_policy(name), checks(*NONE)) == [False] * 2


def test_consensus_exits_only_together() -> None:
    assert exiting(make_policy("consensus"), checks(0.9, 0.9, 0.49)) == [False] * 3


def test_one_confident_row_is_enough_for_greedy_and_latency_only() -> None:
    for name in ("greedy", "latency_only"):
        assert exiting(make_policy(name), checks(0.1, 0.5, 0.1, 0.1)) == [True] * 4


@pytest.mark.parametrize(
    ("confidences", "exits"),
    [
        ((0.6, 0.6, 0.0), True),
        ((0.6, 0.0, 0.0), False),
        ((0.49, 0.5, 1.0), True),
        # The median of an even number lies between the two in the middle.
        ((0.0, 0.4, 0.7, 1.0), True),
        ((0.0, 0.4, 0.55, 1.0), False),
    ],
)
def test_majority_goes_by_the_median_confidence(confidences: tuple[float, ...], exits: bool) -> None:
    assert exiting(make_policy("majority"), checks(*confidences)) == [exits] * len(confidences)


def test_majority_measures_each_row_from_its_own_threshold() -> None:
    # Above by 0.1, above by 0.05, below by 0.5.
    found = exiting(make_policy("majority"), checks(0.3, 0.95, 0.2, thresholds=[0.2, 0.9, 0.7]))
    assert found == [True] * 3


@pytest.mark.parametrize("shape", ["weight_bound", "linear", "stepped"])
@pytest.mark.parametrize("rows", [1, 4, 12])
def test_art_rebatches_where_more_than_the_cost_of_it_exit(shape: str, rows: int) -> None:
    cost = CostModel(profile(shape, 0.2, 0.2))
    policy = make_policy("art", made=cost.profile)
    policy.rule.tick(0, rows, 0.0)
    shallow, deep = (cost.predict(segment, Load(rows, rows, 0, rows)) for segment in (0, 1))
    whole = cost.predict(0, Load(rows, rows, 0, 0)) + deep
    share = (shallow + deep - whole) / deep
    assert 0 < share < 1
    for confident in range(rows + 1):
        found = exiting(policy, checks(*[0.9] * confident, *[0.1] * (rows - confident)))
        expected = [True] * confident + [False] * (rows - confident) if confident > share * rows else [False] * rows
        assert found == expected


def test_art_rebatches_at_the_same_share_on_a_machine_that_is_slower_than_its_profile() -> None:
    made, rows = profile("weight_bound", 0.2, 0.2), 12
    slow, slower = make_policy("art", made=made), make_policy("art", made=made)
    for _ in range(200):
        for segment in range(2):
            load = Load(rows, rows, 0, rows)
            slower.rule.cost.observe(segment, load, 3 * CostModel(made).predict(segment, load))
    slow.rule.tick(0, rows, 0.0)
    slower.rule.tick(0, rows, 0.0)
    for confident in range(rows + 1):
        mixed = checks(*[0.9] * confident, *[0.1] * (rows - confident))
        assert exiting(slow, mixed) == exiting(slower, mixed), confident


# Which segment runs next


@pytest.mark.parametrize("name", sorted(set(POLICIES.names()) - {"full"}))
def test_nothing_is_chosen_where_nothing_waits(name: str) -> None:
    assert make_policy(name, 2).choose(view(0)) is None
    assert make_policy(name, 3).choose(view(0, 0)) is None


@pytest.mark.parametrize("name", ["split", *BATCHWISE])
def test_flushing_at_once_runs_what_stands_deepest(name: str) -> None:
    policy = make_policy(name, 3)
    assert policy.choose(view(1, 1, ready=5)) == Choice(2)
    assert policy.choose(view(1, 0, ready=5)) == Choice(1)
    assert policy.choose(view(0, 0, ready=5)) == Choice(0, 5)
    assert policy.choose(view(0, 0, urgent=[0, 1, 0], ready=5)) == Choice(1)
    assert policy.choose(view(0, 0, prompts=True)) == Choice(0, 0)


def test_latency_only_runs_what_is_owed_before_the_next_token() -> None:
    policy = make_policy("latency_only", 3)
    assert policy.choose(view(0, 0, ready=5, owed=[0, 5, 0])) == Choice(1, fills=True)
    assert policy.choose(view(0, 0, owed=[0, 0, 2])) == Choice(2, fills=True)
    # Live rows take the fills of their requests along.
    assert policy.choose(view(3, 0, ready=5, owed=[0, 5, 0])) == Choice(1)


def test_drex_lets_prompts_through_at_once() -> None:
    policy = make_policy("drex")
    assert policy.choose(
        view(
            1,
            urgent=[
                0,
                2,
            ],
            ready=9,
            decoding=10,
        )
    ) == Choice(1)
    assert policy.choose(view(1, prompts=True, ready=9, decoding=10)) == Choice(0, 9)


def test_drex_flushes_what_has_waited_for_long() -> None:
    policy = make_policy("drex", max_wait_passes=20)
    assert policy.choose(view(1, ready=15, decoding=16, oldest_age=[0, 17])) == Choice(0, 15)
    assert policy.choose(view(1, ready=15, decoding=16, oldest_age=[0, 18])) == Choice(1)


def test_drex_flushes_what_would_be_late_after_another_shallow_pass() -> None:
    policy = make_policy("drex")
    cost = policy.rule.cost
    shallow = cost.predict(0, Load(15, 15, 0, 15))
    # As it stands, or with all that the shallow pass may bring.
    least, most = (cost.predict(1, Load(rows, rows, 0, rows)) for rows in (1, 31))
    for ahead, choice in ((shallow + least - 1e-6, Choice(1)), (shallow + most + 1e-6, Choice(0, 15))):
        due = [math.inf, 10.0 + ahead]
        assert policy.choose(view(1, ready=15, decoding=16, context=0.0, due=due)) == choice


@pytest.mark.parametrize("shallow", [0.3, 3.0], ids=["cheap_first_segment", "dear_first_segment"])
def test_drex_reckons_with_the_longest_pass_that_may_come_between_and_all_that_may_join(shallow: float) -> None:
    policy = make_policy("drex", made=profile("linear", shallow, 1.0, 2.0))
    assert isinstance(policy, Drex)
    rule, now, ready, live = policy.rule, 10.0, 6, [0, 3, 5]
    rule.tick(0, 14, 0.0)
    pass_0, flush_1, flush_2 = (float(rule.prices.seconds(s, rows, 0.0)) for s, rows in enumerate((ready, *live[1:])))
    assert (pass_0 > flush_1) == (shallow > 1)
    # Before the deeper buffer runs, either the pass over segment 0 may come, or the flush of the shallower one.
    deep = max(pass_0, flush_1) + rule.prices.seconds_ahead(2, [0, 0, ready + 3 + 5], [0] * 3)
    # The shallower one has the flush of the deeper one before it, which goes first where both are due.
    first = flush_2 + pass_0 + rule.prices.seconds_ahead(1, [0, ready + 3, 5], [0] * 3)
    for segment, ahead in ((2, deep), (1, first)):
        for due, late in ((now + ahead - 1e-6, True), (now + ahead + 1e-6, False)):
            stands = view(*live[1:], ready=ready, decoding=14, context=0.0, due=[due] * 3)
            assert policy._late_next(stands, segment) == late


def test_art_flushes_when_rows_and_age_make_up_for_the_batch() -> None:
    policy = make_policy("art", max_wait_passes=100)
    # 8 · (1 + 20 · 0.05) = 16
    assert policy.choose(view(8, ready=8, decoding=16, oldest_age=[0, 19])) == Choice(0, 8)
    assert policy.choose(view(8, ready=8, decoding=16, oldest_age=[0, 20])) == Choice(1)
    assert policy.choose(view(1, ready=15, decoding=16, oldest_age=[0, 98])) == Choice(1)
    assert policy.choose(view(1, decoding=1)) == Choice(1)


def test_art_goes_on_at_once_with_a_batch_that_it_does_not_split() -> None:
    policy = make_policy("art")
    policy.rule.tick(0, 16, 64.0)
    assert policy.choose(view(4, ready=12, decoding=16)) == Choice(0, 12)
    assert exiting(policy, checks(*[0.1] * 12)) == [False] * 12
    assert policy.choose(view(12, ready=4, decoding=16)) == Choice(1)
    assert policy.choose(view(4, ready=12, decoding=16)) == Choice(0, 12)


# Through a scheduler


@dataclass
class Served:
    """A run to the end."""

    requests: list[Request]
    passes: list[Pass]

    @property
    def involuntary_exits(self) -> int:
        return sum(
            record.depth < each.num_segments and record.checks[-1].confidence < record.checks[-1].threshold
            for each in self.requests
            for record in each.records
        )

    @property
    def involuntary_stays(self) -> int:
        return sum(
            any(check.confidence >= check.threshold and check.exit_index + 1 < record.depth for check in record.checks)
            for each in self.requests
            for record in each.records
        )


def serve(
    policy: str, exit_rate: float, lengths: tuple[int, ...] = (2, 2), fill: str = "recompute", count: int = 6
) -> Served:
    scheduler = make_scheduler(config(policy), SlotLayout(lengths), fill)
    requests = [request(i, 2 + i, 20, len(lengths)) for i in range(count)]
    for each in requests:
        scheduler.add(each, 0.0)
    machine, passes = Machine(exit_rate), []
    while (batch := machine.run(scheduler)) is not None:
        passes.append(batch)
    assert all(len(each.records) == 20 for each in requests)
    return Served(requests, passes)


@pytest.mark.parametrize("lengths", [(2, 2), (1, 2, 1)])
@pytest.mark.parametrize("fill", ["recompute", "alias"])
@pytest.mark.parametrize("policy", ["drex", "split"])
def test_rebatching_neither_pushes_a_row_out_nor_keeps_one(policy: str, fill: str, lengths: tuple[int, ...]) -> None:
    served = serve(policy, 0.5, lengths, fill)
    assert served.involuntary_exits == served.involuntary_stays == 0
    assert {record.depth for each in served.requests for record in each.records} == set(range(1, len(lengths) + 1))


@pytest.mark.parametrize("lengths", [(2, 2), (1, 2, 1)])
@pytest.mark.parametrize("policy", ["art", "consensus"])
def test_art_and_consensus_keep_rows_but_push_none_out(policy: str, lengths: tuple[int, ...]) -> None:
    served = serve(policy, 0.6, lengths)
    assert served.involuntary_exits == 0
    assert served.involuntary_stays > 0


@pytest.mark.parametrize("lengths", [(2, 2), (1, 2, 1)])
@pytest.mark.parametrize("policy", ["majority", "greedy", "latency_only"])
def test_the_other_batchwise_policies_push_rows_out(policy: str, lengths: tuple[int, ...]) -> None:
    served = serve(policy, 0.4, lengths)
    assert served.involuntary_exits > 0
    assert (served.involuntary_stays > 0) == (policy == "majority")


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("policy", sorted(set(POLICIES.names()) - {"full"}))
def test_where_confidences_never_differ_nothing_is_involuntary(policy: str, rate: float) -> None:
    served = serve(policy, rate)
    assert served.involuntary_exits == 0
    assert served.involuntary_stays == 0
    # The first token of each request is never checked.
    assert sum(record.depth == 1 for each in served.requests for record in each.records) == (6 * 19 if rate else 0)


@pytest.mark.parametrize("policy", BATCHWISE)
def test_a_batch_stays_together(policy: str) -> None:
    served = serve(policy, 0.5)
    exited = {
        (each.request_id, len(each.prompt) + number - 1): record.depth == 1
        for each in served.requests
        for number, record in enumerate(each.records)
    }
    decided = 0
    for batch in served.passes:
        asked = batch.evaluations
        names = [draws.request_id for draws in asked.draws]
        rows = [
            (name, position)
            for name, position, threshold in zip(names, asked.positions.tolist(), asked.thresholds, strict=True)
            if not math.isnan(threshold)
        ]
        assert len({exited[row] for row in rows}) <= 1
        decided += len(rows)
    assert decided == 6 * 19


@pytest.mark.parametrize("lengths", [(2, 2), (1, 2, 1)])
@pytest.mark.parametrize("fill", ["recompute", "project"])
def test_latency_only_has_all_rows_deep_before_the_next_shallow_pass(fill: str, lengths: tuple[int, ...]) -> None:
    scheduler = make_scheduler(config("latency_only"), SlotLayout(lengths), fill)
    requests = [request(i, 3, 15 + i, len(lengths)) for i in range(5)]
    for each in requests:
        scheduler.add(each, 0.0)
    machine = Machine(0.4)
    while (batch := scheduler.next(machine.now)) is not None:
        if batch.segment == 0:
            for each in scheduler.admission.running:
                assert len(set(scheduler.seats.reached[1:, each.seat].tolist())) == 1
        machine.finish(scheduler, batch)
    early = sum(record.depth == 1 for each in requests for record in each.records)
    assert 0 < early < sum(len(each.records) for each in requests)


# Adaptive


def with_dear_exit_head(seconds: float = 0.05) -> Profile:
    first, last = profile("weight_bound", 1.0, 1.0).segments
    head = Curve((1.0, 2.0), (seconds, seconds))
    return Profile((SegmentCost(first.rows, head, first.span, first.entry, first.kv_row), last))


def adaptive_run(adaptive: bool, rate: float, made: Profile, count: int = 4) -> tuple[int, list[int], int]:
    """Unchecked tokens, the numbers of decode passes that checked exits once the yardstick was known, and of all."""
    settings = EngineConfig(1024, count, 512, count * 500, adaptive=adaptive)
    scheduler = make_scheduler(settings, SlotLayout((2, 2)), "alias", made)
    for number in range(count):
        scheduler.add(request(number, 4, 400, 2), 0.0)
    machine, checked, shallow = Machine(rate, profile=made), [], 0
    while (batch := machine.run(scheduler)) is not None:
        if batch.segment == 0 and batch.number > 2 * PROBE_EVERY_PASSES:
            shallow += 1
            if len(batch.evaluations):
                checked.append(batch.number)
    return scheduler.unchecked, checked, shallow


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.8])
def test_adaptive_leaves_exits_unchecked_while_they_do_not_pay_but_for_a_probe_now_and_then(rate: float) -> None:
    unchecked, checked, shallow = adaptive_run(True, rate, with_dear_exit_head())
    assert unchecked > 1000
    # Without a probe it could never be noticed that checking would pay.
    assert 4 <= len(checked) <= 3 * shallow / PROBE_EVERY_PASSES


def test_what_is_unchecked_is_unchecked_at_all_exits_and_counted_once() -> None:
    first, *others = profile("weight_bound", 1.0, 1.0, 1.0).segments
    head = Curve((1.0, 2.0), (0.05, 0.05))
    dear = [SegmentCost(each.rows, head, each.span, each.entry, each.kv_row) for each in (first, others[0])]
    made, count = Profile((*dear, others[1])), 4
    scheduler = make_scheduler(
        EngineConfig(1024, count, 512, count * 500, adaptive=True), SlotLayout((2, 2, 2)), "alias", made
    )
    for number in range(count):
        scheduler.add(request(number, 4, 400, 3), 0.0)
    machine = Machine(0.3, profile=made)
    while not scheduler.unchecked:
        machine.run(scheduler)
    for _ in range(20):
        machine.run(scheduler)
    before, passes = scheduler.unchecked, [machine.run(scheduler) for _ in range(4 * 3 * PROBE_EVERY_PASSES)]
    ran = [batch for batch in passes if batch is not None]
    checked = [batch.segment for batch in ran if batch.segment < 2 and len(batch.evaluations)]
    assert 5 <= checked.count(0) <= 3 * 4
    assert checked.count(1) <= checked.count(0)
    through = [batch for batch in ran if batch.then is not None]
    assert len(through) > 0.9 * len(ran)
    assert all([part.segment for part in batch.parts] == [0, 1, 2] for batch in through)
    one_by_one = [batch for batch in ran if batch.segment == 0 and batch.then is None and not len(batch.evaluations)]
    assert scheduler.unchecked - before == sum(batch.spans for batch in (*through, *one_by_one))


@pytest.mark.parametrize("fill", ["recompute", "project", "alias", "mask"])
def test_where_exits_hardly_pay_adaptive_tries_what_full_depth_takes(fill: str) -> None:
    """Passes over all segments at once take half of what these take one by one: that is not known before."""
    made, count = with_dear_exit_head(0.0005), 4
    scheduler = make_scheduler(
        EngineConfig(4096, count, 512, count * 3000, adaptive=True), SlotLayout((2, 2)), fill, made
    )
    for number in range(count):
        scheduler.add(request(number, 4, 2500, 2), 0.0)
    machine = Machine(0.6, profile=made)
    through = []
    for _ in range(2000):
        batch = scheduler.next(machine.now)
        assert batch is not None
        seconds = sum(scheduler.cost.predict(part.segment, Load.of(part)) for part in batch.parts)
        seconds *= 0.5 if batch.then is not None else 1.0
        machine.now += seconds
        scheduler.commit(batch, machine.execute(batch), machine.now)
        scheduler.record(batch)
        scheduler.took(batch, seconds)
        through.append(batch.then is not None)
    first = through.index(True)
    assert all(through[first : first + TRIAL_PASSES])
    assert PROBE_EVERY_PASSES // 2 <= first <= 4 * PROBE_EVERY_PASSES
    assert scheduler.cost.at_once(np.array([4.0])) == pytest.approx([0.5], rel=0.1)
    # Once that is known, nothing else is done.
    assert sum(through[-500:]) > 400


def test_adaptive_checks_everything_where_exits_pay_clearly() -> None:
    unchecked, checked, shallow = adaptive_run(True, 0.95, profile("weight_bound", 1.0, 3.0))
    assert unchecked == 0
    assert len(checked) == shallow


def test_without_adaptive_everything_is_checked_whatever_it_costs() -> None:
    unchecked, checked, shallow = adaptive_run(False, 0.3, with_dear_exit_head())
    assert unchecked == 0
    assert len(checked) == shallow


def test_adaptive_checks_again_when_exits_have_begun_to_pay() -> None:
    made, count = with_dear_exit_head(0.001), 8
    settings = EngineConfig(4096, count, 512, count * 2100, adaptive=True)
    scheduler = make_scheduler(settings, SlotLayout((2, 2)), "alias", made)
    for number in range(count):
        scheduler.add(request(number, 4, 2000, 2), 0.0)
    machine = Machine(0.0, profile=made)
    for _ in range(300):
        machine.run(scheduler)
    assert scheduler.unchecked > 0
    machine.exit_rate = 0.95
    for _ in range(1000):
        machine.run(scheduler)
    before = scheduler.unchecked
    for _ in range(200):
        assert machine.run(scheduler) is not None
    assert scheduler.unchecked == before


def test_every_name_has_a_policy() -> None:
    assert all(issubclass(POLICIES.get(name), Split) for name in POLICIES.names())
