"""The yardstick against brute force, value iteration, and sums written out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from helpers import SHAPES, profile
from hypothesis import given, settings
from hypothesis import strategies as st
from markov import (
    Floats,
    best_by_brute_force,
    best_by_value_iteration,
    earned,
    process,
)

from drex.control.constants import TWO_EXITS_MOST_REQUESTS
from drex.control.cost.model import CostModel
from drex.control.plan import FloatArray
from drex.control.policy.solver import solve_one_exit, solve_two_exits
from drex.control.policy.yardstick import mean_pass_seconds, measure

CONTEXT = 64.0
FILLS = ("recompute", "project", "alias", "mask")
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def increasing(size: int) -> st.SearchStrategy[Floats]:
    """Seconds of passes: positive, never falling with the rows, level and steep places among them."""
    steps = st.lists(st.sampled_from([0.0, 0.01, 0.3, 5.0]), min_size=size, max_size=size)
    return st.builds(lambda first, more: first + np.cumsum(more), st.sampled_from([0.05, 1.0, 20.0]), steps)


def pass_times(cost: CostModel, exit_rates: Sequence[float], count: int, fill: str = "recompute") -> list[Floats]:
    counts = np.arange(count + 1.0)
    return [mean_pass_seconds(cost, segment, exit_rates, counts, CONTEXT, fill) for segment in range(cost.segments)]


# One exit point


@quick
@given(data=st.data(), count=st.integers(1, 8), rate=st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.77, 0.95, 0.999]))
def test_one_exit_is_as_good_as_the_best_of_all_policies(data: st.DataObject, count: int, rate: float) -> None:
    times = [data.draw(increasing(count + 1)) for _ in range(2)]
    found = solve_one_exit(rate, *times)
    assert found.rate == pytest.approx(best_by_brute_force(process([rate], times)), rel=1e-8)


@pytest.mark.parametrize("count", [64, 256])
@pytest.mark.parametrize("rate", [0.3, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_exit_equals_value_iteration(shape: str, rate: float, count: int) -> None:
    times = pass_times(CostModel(profile(shape, 1.0, 1.0)), [rate], count)
    found = solve_one_exit(rate, *times)
    assert found.rate == pytest.approx(best_by_value_iteration(process([rate], times)), rel=1e-7)


@pytest.mark.parametrize("count", [3, 64, 256])
@pytest.mark.parametrize("rate", [0.3, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_decisions_with_one_exit_earn_its_rate(shape: str, rate: float, count: int) -> None:
    times = pass_times(CostModel(profile(shape, 1.0, 1.0)), [rate], count)
    found = solve_one_exit(rate, *times)
    achieved, _ = earned([rate], times, lambda state: (int(found.flush[state[0]]), count - state[0]))
    assert found.rate == pytest.approx(achieved, rel=1e-9)


@quick
@given(data=st.data(), count=st.integers(1, 12), rate=st.sampled_from([0.0, 1e-6, 0.3, 0.8, 0.99]))
def test_flushing_is_chosen_where_its_advantage_is_positive_and_the_advantage_is_that_of_the_values(
    data: st.DataObject, count: int, rate: float
) -> None:
    shallow, flush = (data.draw(increasing(count + 1)) for _ in range(2))
    found = solve_one_exit(rate, shallow, flush)
    assert found.flush.shape == found.advantage.shape == (count + 1,)
    between = slice(1, count)
    assert (found.flush[between] == (found.advantage[between] > 0)).all()
    # Nothing to flush, and nothing else to do.
    assert (found.flush[0], found.flush[count]) == (False, True)
    assert (found.advantage[0], found.advantage[count]) == (-math.inf, math.inf)
    what = process([rate], [shallow, flush])
    _, values = earned([rate], [shallow, flush], lambda state: (int(found.flush[state[0]]), count - state[0]))
    worth = what.tokens - found.rate * what.seconds + what.moves @ values
    for waiting in range(1, count):
        go_on, flushed = worth[what.owner == waiting]
        # A chance of staying where one is makes going on worth less by what it would gain from not doing so again.
        stays = rate ** (count - waiting)
        gone = (go_on - stays * values[waiting]) / (1 - stays)
        assert found.advantage[waiting] == pytest.approx(flushed - gone, rel=1e-6, abs=1e-6 * count)


def test_without_exits_each_round_is_one_pass_over_each_segment() -> None:
    shallow, flush = np.array([0.0, 2.0, 3.0, 4.0]), np.array([0.0, 1.0, 1.0, 1.0])
    assert solve_one_exit(0.0, shallow, flush).rate == pytest.approx(3 / 5)
    assert solve_one_exit(1e-12, shallow, flush).rate == pytest.approx(3 / 5)


def test_if_all_rows_exit_the_deep_segment_is_hardly_run() -> None:
    shallow, flush = np.array([0.0, 2.0, 3.0, 4.0]), np.array([0.0, 1.0, 1.0, 1.0])
    found = solve_one_exit(1.0, shallow, flush)
    assert found.rate == pytest.approx(3 / 4, rel=1e-5)
    assert found.flush.tolist() == [False, True, True, True]


@pytest.mark.parametrize("rate", [0.0, 1e-9, 0.4, 0.9, 1.0])
def test_one_request_alone_flushes_whenever_it_waits(rate: float) -> None:
    found = solve_one_exit(rate, np.array([0.0, 2.0]), np.array([0.0, 3.0]))
    assert found.rate == pytest.approx(1 / (2 + 3 * (1 - rate)), rel=1e-5)
    assert found.flush.tolist() == [False, True]


# Two exit points


@settings(quick, max_examples=40)
@given(
    data=st.data(),
    count=st.integers(1, 3),
    rates=st.tuples(*[st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.99])] * 2),
)
def test_two_exits_are_as_good_as_the_best_of_all_policies(
    data: st.DataObject, count: int, rates: tuple[float, float]
) -> None:
    times = [data.draw(increasing(count + 1)) for _ in range(3)]
    found = solve_two_exits(rates, *times)
    assert found.units == count
    assert found.rate == pytest.approx(best_by_brute_force(process(rates, times)), rel=1e-6)


@pytest.mark.parametrize("rates", [(0.3, 0.3), (0.6, 0.3), (0.4, 0.7), (0.001, 0.5), (0.5, 0.97)])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_exits_equal_value_iteration_and_their_decisions_earn_that(shape: str, rates: tuple[float, float]) -> None:
    times = pass_times(CostModel(profile(shape, 0.3, 0.6, 1.0)), rates, 12)
    found = solve_two_exits(rates, *times)
    assert found.rate == pytest.approx(best_by_value_iteration(process(rates, times)), rel=1e-7)
    achieved, _ = earned(rates, times, lambda state: (found.choice[state[0], state[1]], 12 - sum(state)))
    assert found.rate == pytest.approx(achieved, rel=1e-9)


def test_the_worth_of_each_segment_is_that_of_the_values() -> None:
    count, rates = 7, (0.4, 0.6)
    cost = CostModel(profile("weight_bound", 0.3, 0.6, 1.0))
    found = measure(cost, rates, count, CONTEXT, "recompute")
    assert found.two_exits is not None
    what = process(rates, times := pass_times(cost, rates, count))
    choice = found.two_exits.choice
    _, values = earned(rates, times, lambda state: (choice[state[0], state[1]], count - sum(state)))
    expected = what.tokens - found.two_exits.rate * what.seconds + what.moves @ values
    for number, state in enumerate(what.states):
        worth = found.worth(state)
        assert worth is not None
        of = dict(zip(what.segment[what.owner == number].tolist(), expected[what.owner == number], strict=True))
        assert worth == pytest.approx([of.get(segment, -math.inf) for segment in range(3)], abs=1e-9 * count)
        assert worth[choice[state[0], state[1]]] == pytest.approx(max(worth))


def test_the_worth_with_one_exit_is_its_advantage_and_in_units_there_is_none() -> None:
    one = measure(CostModel(profile("linear", 1.0, 1.0)), (0.4,), 5, CONTEXT, "recompute")
    assert one.one_exit is not None
    assert one.worth((3,)) == (0.0, one.one_exit.advantage[3])
    cost = CostModel(profile("linear", 1.0, 1.0, 1.0))
    assert measure(cost, (0.4, 0.4), 12, CONTEXT, "recompute", grain=6).worth((3, 3)) is None


def test_two_exits_without_a_first_one_are_one_exit() -> None:
    shallow, middle, deep = pass_times(CostModel(profile("weight_bound", 0.5, 0.5, 1.0)), (0.0, 0.6), 10)
    # Where nothing exits at the first exit point nothing is gained by waiting there.
    one = solve_one_exit(0.6, shallow + middle, deep)
    assert solve_two_exits((0.0, 0.6), shallow, middle, deep).rate == pytest.approx(one.rate, rel=1e-6)


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.5), (0.5, 1.0), (1.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("count", [1, 5, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_exits_that_are_always_or_never_taken_are_solved(shape: str, count: int, rates: tuple[float, float]) -> None:
    # With steps it can pay to leave a row in a buffer for ever, if nothing else ever comes there.
    cost = CostModel(profile(shape, 0.5, 0.5, 1.0))
    found = measure(cost, rates, count, CONTEXT, "alias")
    assert found.optimal is not None
    shallow, middle, deep = (float(each[count]) for each in pass_times(cost, rates, count, "alias"))
    one_round = shallow + (1 - rates[0]) * (middle + (1 - rates[1]) * deep)
    if rates in ((0.0, 0.0), (1.0, 1.0), (1.0, 0.0)):
        assert found.optimal >= count / one_round * (1 - 1e-4)
    assert 0 < found.optimal <= found.ideal * (1 + 1e-4)


# Mean seconds of a pass


def sum_of_geometrics(requests: int, rate: float, upto: int) -> Floats:
    """How likely so many exits are in all, before each of the requests did not exit once: convolved one by one."""
    one = (1 - rate) * rate ** np.arange(upto + 1)
    out = np.eye(1, upto + 1)[0]
    for _ in range(requests):
        out = np.convolve(out, one)[: upto + 1]
    return out


@pytest.mark.parametrize("fill", ["recompute", "project"])
@pytest.mark.parametrize("rates", [(0.3,), (0.8,), (0.3, 0.5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_flush_takes_its_expectation_over_the_sum_of_geometrics(
    shape: str, rates: tuple[float, ...], fill: str
) -> None:
    cost = CostModel(profile(shape, *[1.0] * (len(rates) + 1)))
    live = np.array([0.0, 1.0, 2.0, 7.0, 20.0])
    fills = np.arange(400.0)
    for segment in range(1, cost.segments):
        earlier = 1 - math.prod(1 - rate for rate in rates[:segment])
        found = mean_pass_seconds(cost, segment, rates, live, CONTEXT, fill)
        assert found[0] == 0
        for rows, seconds in zip(live[1:], found[1:], strict=True):
            each = cost.decode(segment, np.full_like(fills, rows), fills, CONTEXT, runs=fill == "recompute")
            chances = sum_of_geometrics(int(rows), earlier, len(fills) - 1)
            assert chances.sum() == pytest.approx(1, abs=1e-6)
            assert seconds == pytest.approx(float(each @ chances), rel=1e-4)


@pytest.mark.parametrize("fill", ["recompute", "project"])
@pytest.mark.parametrize("rate", [0.99999, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_where_all_exit_tokens_cost_a_shallow_pass_and_a_share_of_a_pass_that_fills(
    shape: str, rate: float, fill: str
) -> None:
    cost, count, owed = CostModel(profile(shape, 1.0, 1.0)), 64, 100
    shallow = cost.decode(0, np.array([64.0]), np.zeros(1), CONTEXT, runs=True)[0]
    deep = cost.decode(1, np.zeros(1), np.array([100.0]), CONTEXT, runs=fill == "recompute")[0]
    found = measure(cost, (rate,), count, CONTEXT, fill, most_owed=owed)
    assert found.optimal == pytest.approx(1 / (shallow / count + deep / owed), rel=2e-3)
    assert found.ideal >= found.optimal * (1 - 1e-6)


@pytest.mark.parametrize("fill", ["recompute", "project"])
@pytest.mark.parametrize("rate", [0.6, 0.97])
def test_what_is_owed_beyond_the_bound_runs_in_passes_of_so_many(rate: float, fill: str) -> None:
    cost, runs, bound, upto = CostModel(profile("stepped", 1.0, 1.0)), fill == "recompute", 10, 3000
    fills = np.arange(float(upto + 1))
    before = np.maximum(0.0, fills - bound)
    alone = cost.decode(1, np.zeros(1), np.array([float(bound)]), CONTEXT, runs=runs)[0]
    for live in (1, 5, 12):
        each = cost.decode(1, np.full_like(fills, live), fills - before, CONTEXT, runs=runs) + before / bound * alone
        expected = float(each @ sum_of_geometrics(live, rate, upto))
        found = mean_pass_seconds(cost, 1, (rate,), np.array([float(live)]), CONTEXT, fill, bound)
        assert found[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("fill", ["recompute", "project"])
def test_two_exits_that_all_take_are_solved_too(fill: str) -> None:
    cost = CostModel(profile("weight_bound", 1.0, 1.0, 1.0))
    found = measure(cost, (1.0, 1.0), 8, CONTEXT, fill)
    assert found.optimal is not None
    assert 0 < found.optimal <= found.ideal * (1 + 1e-6)


def test_the_expectation_is_that_of_a_simulation() -> None:
    cost, rate, live, draws = CostModel(profile("stepped", 1.0, 1.0)), 0.7, 6, 20_000
    random_ = random.Random(1)

    def exits_before_staying() -> int:
        count = 0
        while random_.random() < rate:
            count += 1
        return count

    fills = np.array([float(sum(exits_before_staying() for _ in range(live))) for _ in range(draws)])
    drawn = cost.decode(1, np.full(draws, float(live)), fills, CONTEXT, runs=True)
    found = mean_pass_seconds(cost, 1, [rate], np.array([float(live)]), CONTEXT, "recompute")[0]
    assert abs(found - drawn.mean()) < 4 * drawn.std() / draws**0.5


@pytest.mark.parametrize("fill", ["alias", "mask"])
def test_aliased_and_masked_tokens_cost_nothing(fill: str) -> None:
    cost, counts = CostModel(profile("linear", 1.0, 1.0, 1.0)), np.arange(9.0)
    for segment in range(3):
        found = mean_pass_seconds(cost, segment, (0.7, 0.4), counts, CONTEXT, fill)
        alone = cost.decode(segment, counts[1:], np.zeros(8), CONTEXT, runs=True)
        assert found[0] == 0
        np.testing.assert_array_equal(found[1:], alone)


@pytest.mark.parametrize("shape", SHAPES)
def test_fills_cost_more_the_more_they_compute(shape: str) -> None:
    cost, counts = CostModel(profile(shape, 1.0, 1.0)), np.arange(1.0, 65.0)
    recompute, project, alias = (
        mean_pass_seconds(cost, 1, (0.8,), counts, CONTEXT, fill) for fill in ("recompute", "project", "alias")
    )
    assert (recompute >= alias).all()
    assert (project >= alias).all()
    assert (project > alias).any()
    assert (recompute > alias).any()


@pytest.mark.parametrize("fill", FILLS)
def test_no_exits_owe_no_fills(fill: str) -> None:
    cost, counts = CostModel(profile("linear", 1.0, 1.0)), np.arange(9.0)
    found = mean_pass_seconds(cost, 1, (0.0,), counts, CONTEXT, fill)
    np.testing.assert_allclose(found[1:], cost.decode(1, counts[1:], np.zeros(8), CONTEXT, runs=True))


def test_however_many_exit_the_work_of_an_expectation_is_bounded() -> None:
    class Watched(CostModel):
        most = 0

        def decode(
            self, segment: int, live: FloatArray, fills: FloatArray, context: float, *, runs: bool
        ) -> FloatArray:
            self.most = max(self.most, fills.size)
            return super().decode(segment, live, fills, context, runs=runs)

    cost = Watched(profile("weight_bound", 1.0, 1.0))
    mean_pass_seconds(cost, 1, (0.9999,), np.arange(5.0), CONTEXT, "recompute")
    # At 1 - 1e-6, where the share is capped, it would be a hundred times what it is here, for each of N counts.
    assert cost.most <= 20_000


# All of it together


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("rates", [(0.0,), (0.3,), (0.9,), (0.3, 0.3), (0.6, 0.2), (0.2, 0.9)])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_schedule_beats_the_optimum_and_the_optimum_not_the_ideal(
    shape: str, rates: tuple[float, ...], fill: str
) -> None:
    cost = CostModel(profile(shape, *[1.0] * (len(rates) + 1)))
    for count in (1, 2, 9):
        found = measure(cost, rates, count, CONTEXT, fill)
        assert found.optimal is not None
        assert found.ideal >= found.optimal * (1 - 1e-9)
        times = pass_times(cost, rates, count, fill)
        for threshold in range(1, count + 1):

            def flush_from(state: tuple[int, ...], threshold: int = threshold, count: int = count) -> tuple[int, int]:
                for segment in range(len(state), 0, -1):
                    if state[segment - 1] >= threshold:
                        return segment, 0
                if sum(state) < count:
                    return 0, count - sum(state)
                return max(range(1, len(state) + 1), key=lambda segment: state[segment - 1]), 0

            assert found.optimal >= earned(rates, times, flush_from)[0] * (1 - 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_depth_takes_everyone_one_token_further_with_no_exit_head(shape: str) -> None:
    cost = CostModel(profile(shape, 1.0, 1.0))
    for count in (1, 5, 100):
        found = measure(cost, (0.6,), count, CONTEXT, "recompute")
        step = float(cost.full_depth(np.array([float(count)]), CONTEXT)[0])
        assert found.in_flight == count
        assert found.full == pytest.approx(count / step)


def test_without_exit_points_there_is_nothing_to_choose() -> None:
    found = measure(CostModel(profile("linear", 1.0)), (), 8, CONTEXT, "recompute")
    assert found.optimal == found.full
    assert found.one_exit is None
    assert found.two_exits is None
    assert found.ideal == pytest.approx(found.full)


def test_three_exit_points_have_an_ideal_and_no_optimum() -> None:
    found = measure(CostModel(profile("linear", 1.0, 1.0, 1.0, 1.0)), (0.3, 0.3, 0.3), 8, CONTEXT, "recompute")
    assert found.optimal is None
    assert found.ideal > found.full > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_two_exits_counted_in_units_have_nearly_the_same_optimum(shape: str) -> None:
    cost, rates = CostModel(profile(shape, 0.5, 0.5, 1.0)), (0.4, 0.5)
    exact = measure(cost, rates, 48, CONTEXT, "recompute", grain=TWO_EXITS_MOST_REQUESTS)
    coarse = measure(cost, rates, 48, CONTEXT, "recompute", grain=32)
    assert exact.two_exits is not None
    assert coarse.two_exits is not None
    assert exact.two_exits.units == 48
    assert coarse.two_exits.units == 32
    assert coarse.optimal == pytest.approx(exact.optimal, rel=0.01)


def test_better_exits_and_cheaper_fills_never_make_it_slower() -> None:
    cost = CostModel(profile("weight_bound", 1.0, 1.0))
    rates = [measure(cost, (rate,), 32, CONTEXT, "alias").optimal for rate in (0.0, 0.2, 0.5, 0.8, 0.95)]
    assert rates == sorted(rates)  # type: ignore[type-var]
    by_fill = [measure(cost, (0.8,), 200, CONTEXT, fill).optimal for fill in ("recompute", "alias")]
    assert by_fill == sorted(by_fill)  # type: ignore[type-var]
