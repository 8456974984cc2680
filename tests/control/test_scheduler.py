"""The scheduler with made-up verdicts in place of a model. No torch in this folder."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import Machine, drain, make_scheduler, names, request
from hypothesis import given, settings
from hypothesis import strategies as st

from drex.config import EngineConfig
from drex.control.cost.profile import Curve, Profile, SegmentCost
from drex.control.memory.slots import SlotLayout
from drex.control.plan import PassResult
from drex.control.standing import Standing
from drex.extensions import POLICIES
from drex.outputs import FinishReason


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.sampled_from([(2, 2), (1, 3, 2), (4, 4, 4), (5,)]),
    fill=st.sampled_from(["recompute", "project", "alias", "mask"]),
    policy=st.sampled_from(sorted(set(POLICIES.names()) - {"full"})),
    rate=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1)), min_size=1, max_size=8),
    spare=st.sampled_from([0, 5, 100]),
    chunk=st.sampled_from([1, 4, 64]),
    fill_rows=st.sampled_from([1, 8, 64]),
    aborted=st.sets(st.integers(0, 7), max_size=2),
)
def test_everything_ends_and_nothing_stays_behind(
    lengths: tuple[int, ...],
    fill: str,
    policy: str,
    rate: float,
    sizes: list[tuple[int, int, int]],
    spare: int,
    chunk: int,
    fill_rows: int,
    aborted: set[int],
) -> None:
    tokens = max(2, max(prompt + out - 1 for prompt, out, _ in sizes) + spare)
    config = EngineConfig(64, 4, chunk, tokens, fill_rows, max_wait_passes=12, policy=policy)
    scheduler = make_scheduler(config, SlotLayout(lengths), fill)
    requests = [request(i, p, o, len(lengths), priority) for i, (p, o, priority) in enumerate(sizes)]
    for each in requests:
        scheduler.add(each, 0.0)
    machine = Machine(rate)
    for _ in range(3):
        machine.run(scheduler)
    for number in aborted & set(range(len(requests))):
        if requests[number].finish_reason is None:
            scheduler.finish(requests[number].request_id, FinishReason.ABORT)
    drain(scheduler, machine)
    assert scheduler.pool.in_use == scheduler.pool.claimed == 0
    for number, each in enumerate(requests):
        assert each.finish_reason in (FinishReason.LENGTH, FinishReason.ABORT)
        if each.finish_reason is FinishReason.LENGTH:
            assert each.num_output == sizes[number][1]


def longest_wait(rate: float, wait: int, lengths: tuple[int, ...] = (1, 1), slowdown: float | None = None) -> int:
    """Passes that the longest waiting row waits, where a flush takes as long as 200 passes over the first segment."""
    counts = (1.0, 4096.0)
    deep = SegmentCost(Curve(counts, (0.2, 0.2)), Curve(counts, (0.0, 0.0)), 0.0, 0.0, 0.0)
    shallow = replace(deep, rows=Curve(counts, (1e-3, 1e-3)))
    config = EngineConfig(256, 12, 512, 12 * 200, 1 << 20, max_wait_passes=wait, max_slowdown=slowdown)
    profile = Profile((shallow, *[deep] * (len(lengths) - 1)), source="dear flushes")
    scheduler = make_scheduler(config, SlotLayout(lengths), "recompute", profile)
    for i in range(12):
        scheduler.add(request(i, 3, 120, len(lengths)), 0.0)
    return max(drain(scheduler, Machine(rate, profile=profile), check_every_pass=False).values())


@pytest.mark.parametrize("wait", [5, 9, 20])
@pytest.mark.parametrize("rate", [0.5, 0.97])
def test_no_row_waits_longer_than_max_wait_passes(rate: float, wait: int) -> None:
    assert longest_wait(rate, wait) <= wait


def test_no_row_waits_longer_between_two_exit_points_or_under_a_bound_on_slowdown() -> None:
    assert longest_wait(0.9, 9, (1, 1, 1)) <= 9
    assert longest_wait(0.97, 9, slowdown=1.1) <= 9


def test_rows_would_wait_longer_than_any_tested_bound_if_there_were_none() -> None:
    assert longest_wait(0.97, 10_000) > 20


def test_a_full_pool_preempts_the_latest_of_the_lowest_priority_and_never_the_first() -> None:
    config = EngineConfig(64, 4, 64, kv_cache_tokens=14)
    scheduler = make_scheduler(config, SlotLayout((2, 2)), "recompute")
    low, high, late = request(0, 4, 8, 2, priority=1), request(1, 4, 8, 2, priority=0), request(2, 2, 8, 2, priority=1)
    for each in (low, high, late):
        scheduler.add(each, 0.0)
    machine, dropped, was_running = Machine(0.5), [], []
    while (batch := scheduler.next(machine.now)) is not None:
        now = [r.request_id for r in scheduler.admission.running]
        dropped += [name for name in was_running if name not in now]
        machine.finish(scheduler, batch)
        was_running = [r.request_id for r in scheduler.admission.running]
    assert scheduler.admission.preemptions == len(dropped) > 0
    assert high.request_id not in dropped
    assert dropped[0] == late.request_id
    assert all(len(each.records) == 8 for each in (low, high, late))


def test_a_request_that_could_never_fit_is_refused_by_name_of_the_remedy() -> None:
    scheduler = make_scheduler(EngineConfig(64, 4, 64, kv_cache_tokens=10), SlotLayout((2, 2)), "recompute")
    with pytest.raises(ValueError, match="raise kv_cache_tokens"):
        scheduler.add(request(0, 6, 6, 2), 0.0)
    scheduler.add(request(1, 6, 5, 2), 0.0)  # the last token is never run, so 10 tokens of K/V are just enough
    drain(scheduler, Machine(0.5))


def test_the_longest_request_that_may_be_is_served_and_the_next_longer_one_refused() -> None:
    scheduler = make_scheduler(EngineConfig(10, 4, 64, kv_cache_tokens=40), SlotLayout((2, 2)), "recompute")
    with pytest.raises(ValueError, match="raise max_model_len"):
        scheduler.add(request(0, 6, 6, 2), 0.0)
    longest = request(1, 6, 5, 2)  # the last token is never run
    scheduler.add(longest, 0.0)
    drain(scheduler, Machine(0.5))
    assert longest.num_output == 5


@pytest.mark.parametrize(("prompt", "fits"), [(5, True), (6, False)])
def test_a_request_is_admitted_where_everyones_next_token_fits_beside_it(prompt: int, fits: bool) -> None:
    scheduler = make_scheduler(EngineConfig(64, 4, 64, kv_cache_tokens=10), SlotLayout((2, 2)), "recompute")
    for each in (request(0, 4, 6, 2), request(1, prompt, 2, 2)):
        scheduler.add(each, 0.0)
        scheduler.admission.admit()
    assert len(scheduler.admission.running) == (2 if fits else 1)


def test_a_request_that_loses_its_kv_before_its_last_token_is_recorded_keeps_that_token() -> None:
    """Where passes overlap, the next one is planned before what the last one decided is written."""
    scheduler = make_scheduler(EngineConfig(64, 4, 64, kv_cache_tokens=15), SlotLayout((2, 2)), "recompute")
    requests = [request(number, 4, 11, 2) for number in range(3)]
    for each in requests:
        scheduler.add(each, 0.0)
    machine, unwritten = Machine(0.5), 0
    batch = scheduler.next(machine.now)
    for _ in range(500):
        if batch is None:
            break
        machine.now += 1e-3
        scheduler.commit(batch, machine.execute(batch), machine.now)
        before, running = scheduler.admission.preemptions, list(scheduler.seats)
        known = {each: len(each.records) for each in running}
        following = scheduler.next(machine.now)
        lost = [each for each in running if each.seat is None and each.finish_reason is None]
        assert len(lost) == scheduler.admission.preemptions - before
        unwritten += sum(len(each.records) > known[each] for each in lost)
        scheduler.record(batch)
        scheduler.took(batch, 1e-3)
        assert all(each.context == each.tokens for each in requests)
        batch = following
    assert unwritten > 0, "whoever was preempted had nothing to be written"
    assert all(each.num_output == 11 for each in requests)


def test_outstanding_rows_are_neither_selected_again_nor_freed_by_an_abort() -> None:
    scheduler = make_scheduler(EngineConfig(64, 4, 64, kv_cache_tokens=40), SlotLayout((2, 2)), "recompute")
    first, second = request(0, 3, 5, 2), request(1, 3, 5, 2)
    scheduler.add(first, 0.0)
    batch = scheduler.next(0.0)
    assert batch is not None
    scheduler.finish(first.request_id, FinishReason.ABORT)
    assert scheduler.pool.in_use == 3 * 2
    scheduler.add(second, 0.0)
    beside = scheduler.next(0.0)
    assert beside is not None
    assert names(beside, scheduler) == [second.request_id]
    machine = Machine(0.5)
    assert machine.finish(scheduler, batch) == [first]
    assert first.finish_reason is FinishReason.ABORT
    machine.finish(scheduler, beside)
    drain(scheduler, machine)
    assert scheduler.pool.in_use == 0


def test_a_failed_pass_ends_its_requests_and_no_others() -> None:
    scheduler = make_scheduler(EngineConfig(64, 1, 64, kv_cache_tokens=40), SlotLayout((2, 2)), "recompute")
    first, second = request(0, 3, 5, 2), request(1, 3, 5, 2)
    scheduler.add(first, 0.0)
    scheduler.add(second, 0.0)
    batch = scheduler.next(0.0)
    assert batch is not None
    assert Machine(0.5).finish(scheduler, batch, PassResult(None, RuntimeError("broken"))) == [first]
    assert first.finish_reason is FinishReason.ERROR
    drain(scheduler, Machine(0.5))
    assert second.finish_reason is FinishReason.LENGTH


def test_who_was_to_be_aborted_when_a_pass_failed_is_aborted() -> None:
    scheduler = make_scheduler(EngineConfig(64, 2, 64, kv_cache_tokens=40), SlotLayout((2, 2)), "recompute")
    first, second = request(0, 3, 5, 2), request(1, 3, 5, 2)
    scheduler.add(first, 0.0)
    scheduler.add(second, 0.0)
    batch = scheduler.next(0.0)
    assert batch is not None
    scheduler.finish(first.request_id, FinishReason.ABORT)
    assert set(Machine(0.5).finish(scheduler, batch, PassResult(None, RuntimeError("broken")))) == {first, second}
    assert (first.finish_reason, first.error) == (FinishReason.ABORT, None)
    assert (second.finish_reason, second.error) == (FinishReason.ERROR, "RuntimeError: broken")
    assert scheduler.pool.in_use == 0


@pytest.mark.parametrize(("fewest", "outputs"), [(0, 1), (1, 1), (4, 4), (9, 9)])
def test_an_end_token_ends_the_text_from_the_fewest_tokens_on(fewest: int, outputs: int) -> None:
    scheduler = make_scheduler(EngineConfig(64, 4, 64, kv_cache_tokens=80), SlotLayout((2, 2)), "recompute")
    each = request(0, 3, 9, 2, eos=frozenset({5}), min_tokens=fewest)  # every token is 5
    scheduler.add(each, 0.0)
    drain(scheduler, Machine(0.5))
    assert each.num_output == outputs
    assert each.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_what_is_owed_at_a_segment_is_what_is_decided_and_has_no_keys_and_values_there(rate: float) -> None:
    scheduler = make_scheduler(EngineConfig(64, 4, 64, kv_cache_tokens=400), SlotLayout((1, 3, 2)), "recompute")
    for number in range(6):
        scheduler.add(request(number, 3 + number, 20, 3), 0.0)
    machine, seats, owing = Machine(rate), scheduler.seats, 0
    while machine.run(scheduler) is not None:
        found = Standing.of(seats)
        for segment in (1, 2):
            decoding = [
                each for each in seats if each.num_output and seats.reached[1, each.seat] >= len(each.tokens) - 1
            ]
            behind = {
                each.seat: sum(
                    position < len(each.tokens) - 1
                    for position in range(seats.reached[segment + 1, each.seat], seats.reached[segment, each.seat])
                )
                for each in decoding
            }
            assert found.owed[segment] == sum(behind.values())
            assert found.fills(segment) == sum(behind[seat] for seat in found.buffers[segment].tolist())
            owing += found.owed[segment] > found.fills(segment) > 0
    assert owing > 0


@pytest.mark.parametrize(("bound", "largest"), [(6, 8), (7, 8), (8, 12)])
def test_owed_fills_are_bounded(bound: int, largest: int) -> None:
    config = EngineConfig(64, 4, 64, kv_cache_tokens=200, max_fill_rows=bound)
    scheduler = make_scheduler(config, SlotLayout((2, 2)), "recompute")
    for i in range(4):
        scheduler.add(request(i, 2, 40, 2), 0.0)
    machine, most = Machine(1.0), 0
    while machine.run(scheduler):
        frontiers = scheduler.seats.reached[1:]
        owed = sum(
            int(frontiers[0, r.seat] - frontiers[1, r.seat]) for r in scheduler.admission.running if r.num_output
        )
        most = max(most, owed)
    # Each pass over segment 0 brings a row a request; what is just at the bound may stay.
    assert most == largest


@pytest.mark.parametrize("mode", ["off", "trusted"])
def test_a_row_has_waited_since_it_came_to_where_it_waits_whatever_else_of_its_request_runs(mode: str) -> None:
    config = EngineConfig(64, 4, 64, kv_cache_tokens=400, max_fill_rows=3)
    scheduler = make_scheduler(config, SlotLayout((1, 3, 2)), "recompute")
    for number in range(6):
        scheduler.add(replace(request(number, 3, 30, 3), run_ahead=mode), 0.0)
    machine, seats = Machine(0.7), scheduler.seats
    known: dict[str, tuple[tuple[int, int], int]] = {}
    while machine.run(scheduler) is not None:
        for each in seats:
            if not each.num_output:
                continue
            # How many tokens are settled, and how many segments the row behind them has passed.
            settled = len(each.tokens)
            stands = settled, int((seats.reached[1:, each.seat] >= settled).sum())
            if known.get(each.request_id, (None,))[0] != stands:
                known[each.request_id] = stands, scheduler.passes
            assert seats.since[each.seat] == known[each.request_id][1]


@pytest.mark.parametrize(
    ("requests", "given", "rows"), [(4, None, 256), (64, None, 512), (256, None, 2048), (64, 6, 6)]
)
def test_more_fills_may_be_owed_the_more_requests_there_are(requests: int, given: int | None, rows: int) -> None:
    config = EngineConfig(64, requests, 32, 64 * requests, max_fill_rows=given)
    assert config.fill_rows == rows
    assert config.arena_rows == 32 + requests + rows


@pytest.mark.parametrize("fill", ["alias", "mask"])
def test_aliased_and_masked_tokens_take_slots_where_they_were_executed_and_nowhere_else(fill: str) -> None:
    layout = SlotLayout((2, 3))
    scheduler = make_scheduler(EngineConfig(64, 4, 64, kv_cache_tokens=200), layout, fill)
    each = request(0, 4, 30, 2)
    scheduler.add(each, 0.0)
    machine, seen = Machine(0.7), 0
    while machine.run(scheduler):
        if each.finish_reason is None and each.num_output:
            shallow, deep = scheduler.seats.reached[1:, each.seat].tolist()
            executed = sum(sum(layout.lengths[:depth]) for depth in each.depths[:deep])
            live = shallow - deep
            assert scheduler.pool.in_use == executed + live * layout.lengths[0]
            seen += any(depth == 1 for depth in each.depths)
    assert seen
