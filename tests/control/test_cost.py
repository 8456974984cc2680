"""The cost model: curves, profiles on disk, and corrections learnt from passes."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import SHAPES, Machine, make_scheduler, profile, request
from hypothesis import given, settings
from hypothesis import strategies as st

from drex.config import EngineConfig
from drex.control.cost.model import CostModel, Load
from drex.control.cost.profile import Curve, OwnCost, Profile, SegmentCost, mean_cost, nominal
from drex.control.memory.slots import SlotLayout
from drex.profiling.profile_file import load_profile

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)

BOUND = 60
"""Observations of one size of pass after which a threefold error is under 5 %: log(3) · 0.935^n < log(1.05) from 47."""


def decode_load(rows: int, context: int = 64) -> Load:
    return Load(rows=rows, spans=rows, entries=rows * context, evaluations=rows)


# Curves


def test_a_curve_is_linear_between_its_points_and_goes_on_with_its_last_slope() -> None:
    curve = Curve((2.0, 4.0, 8.0), (1.0, 2.0, 10.0))
    at = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0, 18.0])
    np.testing.assert_allclose(curve.at(at), [0.0, 1.0, 1.0, 1.5, 2.0, 6.0, 10.0, 12.0, 30.0])
    assert curve.at(np.array([[3.0, 6.0]])).shape == (1, 2)


def test_a_curve_never_falls_beyond_its_last_point() -> None:
    np.testing.assert_allclose(Curve((1.0, 2.0), (3.0, 2.5)).at(np.array([1.0, 2.0, 50.0])), [3.0, 2.5, 2.5])


def test_a_curve_of_one_point_is_level_below_it_and_in_proportion_beyond() -> None:
    np.testing.assert_allclose(Curve((4.0,), (2.0,)).at(np.array([0.0, 1.0, 4.0, 8.0])), [0.0, 2.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("counts", "seconds"),
    [
        ((), ()),
        ((1.0, 2.0), (1.0,)),
        ((1.0,), (1.0, 2.0)),
        ((2.0, 1.0), (1.0, 2.0)),
        ((1.0, 1.0), (1.0, 2.0)),
        ((0.0, 1.0), (1.0, 2.0)),
        ((-1.0, 1.0), (1.0, 2.0)),
    ],
)
def test_a_curve_with_other_counts_is_refused(counts: tuple[float, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="cost curve"):
        Curve(counts, seconds)


@quick
@given(
    steps=st.lists(st.tuples(st.floats(0.1, 1e3), st.floats(1e-9, 1e3)), min_size=1, max_size=5),
    count=st.integers(0, 4000),
)
def test_one_count_is_looked_up_as_many_are(steps: list[tuple[float, float]], count: int) -> None:
    curve = Curve(tuple(np.cumsum([s for s, _ in steps]).tolist()), tuple(t for _, t in steps))
    for at in (float(count), *curve.counts):
        assert curve.one(at) == pytest.approx(float(curve.at(np.array([at]))[0]), rel=1e-9)


# Profiles


curves = st.builds(
    lambda steps: Curve(tuple(np.cumsum([s for s, _ in steps]).tolist()), tuple(t for _, t in steps)),
    st.lists(st.tuples(st.floats(0.1, 1e3), st.floats(1e-9, 1e3)), min_size=1, max_size=5),
)
seconds = st.floats(0.0, 1.0)
profiles = st.builds(
    Profile,
    st.lists(st.builds(SegmentCost, curves, curves, seconds, seconds, seconds), min_size=1, max_size=4).map(tuple),
    st.none() | st.integers(1, 64),
    st.text(max_size=8),
    st.builds(OwnCost, seconds, seconds),
)


@quick
@given(made=profiles)
def test_a_profile_comes_back_from_json_as_it_was(made: Profile) -> None:
    assert Profile.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def broken(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(nominal((2, 2)).to_dict()))
    data["segments"][1].update(changes)
    return data


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "profile",
        3,
        {},
        {"segments": None},
        {"segments": 3},
        {"segments": [None]},
        {"segments": ["rows"]},
        {"segments": [{}]},
        broken(rows=None),
        broken(rows={"counts": [1.0]}),
        broken(rows={"counts": 1.0, "seconds": 2.0}),
        broken(rows={"counts": [1.0, "many"], "seconds": [1.0, 2.0]}),
        broken(rows={"counts": [2.0, 1.0], "seconds": [1.0, 2.0]}),
        broken(head={"counts": [], "seconds": []}),
        broken(span=None),
        broken(entry="little"),
        broken(kv_row=[1.0]),
        broken(kv_row=10**400),
        nominal((2, 2)).to_dict() | {"own": {"per_pass": -1.0}},
        nominal((2, 2)).to_dict() | {"own": {"per_request": math.nan}},
        nominal((2, 2)).to_dict() | {"own": 3},
    ],
)
def test_what_is_no_profile_is_refused(data: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Profile.from_dict(data)


def test_a_profile_is_read_from_its_file_and_other_files_are_refused_by_name(tmp_path: Path) -> None:
    made = profile("stepped", 1.0, 2.0)
    (tmp_path / "good.json").write_text(json.dumps(made.to_dict()))
    assert load_profile(tmp_path / "good.json") == made
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    for name in ("bad.json", "bytes.json", "missing.json"):
        with pytest.raises(ValueError, match=f"{name} can't be read as a profile"):
            load_profile(tmp_path / name)


def test_the_mean_of_a_cost_and_thrice_it_is_twice_it() -> None:
    made = profile("stepped", 1.0)
    (once,), (twice,), (thrice,) = (made.scaled(factor).segments for factor in (1.0, 2.0, 3.0))
    assert mean_cost([once, thrice]) == twice


def test_the_engines_own_time_comes_once_a_pass_and_is_part_of_every_prediction() -> None:
    made = profile("linear", 1.0, 2.0, 1.0)
    plain, cost = CostModel(made), CostModel(replace(made, own=OwnCost(0.25, 0.5)))
    load = decode_load(3)
    assert [cost.predict(s, load) - plain.predict(s, load) for s in range(3)] == pytest.approx([1.75] * 3)
    parts = [(segment, load) for segment in range(3)]
    assert cost.predict_parts(parts) - plain.predict_parts(parts) == pytest.approx(1.75)
    one, live = made.with_exits((1,)), np.array([3.0])
    assert CostModel(replace(one, own=OwnCost(0.25, 0.5))).profile.with_exits(()).own == OwnCost(0.25, 0.5)
    each = cost.decode(1, live, np.zeros(1), 64.0, runs=True) - plain.decode(1, live, np.zeros(1), 64.0, runs=True)
    assert float(each[0]) == pytest.approx(1.75)


def test_a_scaled_profile_predicts_in_proportion() -> None:
    made = replace(profile("linear", 1.0, 2.0), own=OwnCost(0.1, 0.2))
    load = Load(rows=9, spans=3, entries=200, evaluations=3, kv_rows=5)
    for segment in range(2):
        once, thrice = (CostModel(each).predict(segment, load) for each in (made, made.scaled(3.0)))
        assert thrice == pytest.approx(3 * once)


# Predictions


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_what_predict_says_of_its_load(shape: str, runs: bool) -> None:
    cost, context = CostModel(profile(shape, 1.0, 0.5)), 70
    live, fills = np.array([1.0, 3.0, 16.0, 17.0, 100.0]), np.array([0.0, 7.0, 1.0, 33.0, 500.0])
    for segment in range(2):
        found = cost.decode(segment, live, fills, float(context), runs=runs)
        for rows, owed, taken in zip(live.astype(int), fills.astype(int), found, strict=True):
            load = Load(
                rows=int(rows + owed if runs else rows),
                spans=int(rows),
                entries=int(rows) * context,
                evaluations=int(rows),
                kv_rows=0 if runs else int(owed),
            )
            assert taken == pytest.approx(cost.predict(segment, load))


def test_decode_follows_the_corrections() -> None:
    cost = CostModel(profile("weight_bound", 1.0, 1.0))
    live, none = np.array([1.0, 4.0, 32.0]), np.zeros(3)
    before = cost.decode(1, live, none, 64.0, runs=True)
    for rows in (1, 4, 32):
        for _ in range(BOUND):
            cost.observe(1, decode_load(rows), 2.0 * float(before[live == rows][0]))
    np.testing.assert_allclose(cost.decode(1, live, none, 64.0, runs=True), 2 * before, rtol=0.05)
    np.testing.assert_allclose(cost.decode(1, live, none, 64.0, runs=False), 2 * before, rtol=0.05)


def test_full_depth_is_all_layers_and_the_final_head_without_exit_heads() -> None:
    made, rows, context = profile("linear", 0.5, 1.0, 2.0), np.array([1.0, 8.0, 70.0]), 64.0
    passes = CostModel(made).full_depth(rows, context)
    expected = np.zeros(3)
    for segment in made.segments:
        expected += segment.rows.at(rows) + segment.span * (rows - 1) + segment.entry * rows * context
    expected += made.segments[-1].head.at(rows)
    np.testing.assert_allclose(passes, expected)


def test_dear_exit_heads_do_not_show_in_full_depth_and_a_dear_final_head_does() -> None:
    made, rows = profile("weight_bound", 1.0, 1.0), np.array([8.0])
    first, last = made.segments
    dear = Curve((1.0,), (100.0,))
    exit_dear = Profile((SegmentCost(first.rows, dear, 0.0, 0.0, 0.0), last))
    final_dear = Profile((first, SegmentCost(last.rows, dear, 0.0, 0.0, 0.0)))
    plain = float(CostModel(made).full_depth(rows, 0.0)[0])
    assert float(CostModel(exit_dear).full_depth(rows, 0.0)[0]) == pytest.approx(plain)
    assert float(CostModel(final_dear).full_depth(rows, 0.0)[0]) > 100.0


@quick
@given(
    made=profiles,
    sizes=st.tuples(*[st.integers(0, 3000)] * 5),
    seen=st.lists(st.tuples(st.integers(1, 3000), st.just(0.0) | st.floats(1e-9, 1e3)), max_size=5),
)
def test_predictions_are_positive_and_finite(
    made: Profile, sizes: tuple[int, int, int, int, int], seen: list[tuple[int, float]]
) -> None:
    cost = CostModel(made)
    for rows, took in seen:
        cost.observe(0, decode_load(rows), took)
    assert 0 < cost.predict(0, Load(*sizes)) < math.inf


# Learning


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
@pytest.mark.parametrize("rows", [1, 3, 6, 64, 700])
def test_a_threefold_error_is_under_5_percent_after_a_bounded_number_of_passes(rows: int, factor: float) -> None:
    made, load = profile("linear", 1.0, 1.0), decode_load(rows)
    truth, cost = CostModel(made.scaled(factor)), CostModel(made)
    for _ in range(BOUND):
        cost.observe(1, load, truth.predict(1, load))
    assert cost.predict(1, load) == pytest.approx(truth.predict(1, load), rel=0.05)
    # Other sizes go along with the nearest one known, and other segments most of the way, until they are seen.
    for other in (1, 1000):
        assert cost.predict(1, decode_load(other)) == pytest.approx(truth.predict(1, decode_load(other)), rel=0.05)
    assert cost.predict(0, load) == pytest.approx(truth.predict(0, load), rel=0.35)
    for _ in range(10 * BOUND):
        for segment, right in enumerate((CostModel(made), truth)):
            cost.observe(segment, load, right.predict(segment, load))
    assert cost.predict(0, load) == pytest.approx(CostModel(made).predict(0, load), rel=0.05)
    assert cost.predict(1, load) == pytest.approx(truth.predict(1, load), rel=0.05)


@pytest.mark.parametrize("factor", [1.3, 1 / 1.3])
def test_a_machine_that_changes_while_passes_run_all_segments_does_not_make_these_dear(factor: float) -> None:
    made, load = profile("weight_bound", 1.0, 1.0), decode_load(8)
    cost = CostModel(made)

    def run(passes: int, speed: float) -> None:
        truth = CostModel(made.scaled(speed))
        for number in range(passes):
            if number % 64 == 0:
                for segment in range(2):
                    cost.observe(segment, load, truth.predict(segment, load))
            together = sum(truth.predict(segment, load) for segment in range(2))
            cost.observe_through(load, 0.9 * together)

    run(64, 1.0)
    before = float(cost.at_once(np.array([8.0]))[0])
    run(200, factor)
    again = cost.copy()
    assert float(cost.at_once(np.array([8.0]))[0]) == pytest.approx(before, rel=0.08)
    assert (
        again.predict(0, load)
        == cost.predict(0, load)
        == pytest.approx(factor * CostModel(made).predict(0, load), rel=0.08)
    )


def test_a_pass_over_all_segments_right_after_others_teaches_nothing() -> None:
    made, load = profile("weight_bound", 1.0, 1.0), decode_load(8)
    cost = CostModel(made)
    together = cost.predict_through(load)
    for seconds, known in ((2.0, 1.0), (0.8, 0.8), (0.8, 0.8)):
        cost.observe_through(load, seconds * together)
        assert float(cost.at_once(np.array([8.0]))[0]) == pytest.approx(known)


@pytest.mark.parametrize("factor", [1.4, 1 / 1.4])
def test_when_the_machine_changes_passes_that_are_rare_follow_those_that_are_frequent(factor: float) -> None:
    made, cost = profile("weight_bound", 1.0, 1.0), CostModel(profile("weight_bound", 1.0, 1.0))
    before, after = CostModel(made.scaled(1.2)), CostModel(made.scaled(1.2 * factor))
    for truth, rows in [(before, rows) for rows in (4, 64) * BOUND] + [(after, 64)] * BOUND:
        for segment in range(2):
            cost.observe(segment, decode_load(rows), truth.predict(segment, decode_load(rows)))
    for segment in range(2):
        for rows in (4, 64):
            load = decode_load(rows)
            assert cost.predict(segment, load) == pytest.approx(after.predict(segment, load), rel=0.05)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_threefold_error_is_under_5_percent_at_all_sizes_after_passes_of_many(factor: float, seed: int) -> None:
    made, draw = profile("weight_bound", 1.0, 1.0), random.Random(seed)
    truth, cost = CostModel(made.scaled(factor)), CostModel(made)
    for _ in range(1200):
        load = decode_load(round(2 ** draw.uniform(0, 6.5)))
        cost.observe(0, load, truth.predict(0, load) * draw.uniform(0.95, 1.05))
    for rows in range(1, 100):
        assert cost.predict(0, decode_load(rows)) == pytest.approx(truth.predict(0, decode_load(rows)), rel=0.05)


def test_what_one_size_teaches_makes_no_other_size_worse_than_it_was() -> None:
    made = profile("weight_bound", 1.0, 1.0)
    truth, cost = CostModel(made.scaled(3.0)), CostModel(made)
    # One pass of two rows, then many of three.
    cost.observe(0, decode_load(2), truth.predict(0, decode_load(2)))
    for _ in range(500):
        cost.observe(0, decode_load(3), truth.predict(0, decode_load(3)))
    for rows in (3, 4, 6, 50):
        assert cost.predict(0, decode_load(rows)) <= truth.predict(0, decode_load(rows)) * 1.05


@pytest.mark.parametrize("off", [1.1, 1 / 1.1])
def test_a_size_that_the_profile_has_wrong_is_right_to_2_percent_after_40_passes(off: float) -> None:
    made, noise = profile("weight_bound", 1.0, 1.0), random.Random(1)
    truth, cost = CostModel(made), CostModel(made)
    for _ in range(40):
        for rows, factor in ((8, 1.0), (64, off)):
            load = decode_load(rows)
            cost.observe(0, load, truth.predict(0, load) * factor * noise.uniform(0.95, 1.05))
    for rows, factor in ((8, 1.0), (64, off)):
        expected = truth.predict(0, decode_load(rows)) * factor
        assert cost.predict(0, decode_load(rows)) == pytest.approx(expected, rel=0.02)


def test_between_sizes_corrections_go_from_one_to_the_other_without_a_step() -> None:
    made = profile("weight_bound", 1.0, 1.0)
    bare, cost = CostModel(made), CostModel(made)
    passes = [(rows, decode_load(rows)) for rows in (8, 32) for _ in range(9)]
    cost.fit([(0, load, bare.predict(0, load) * (1.0 if rows == 8 else 1.3)) for rows, load in passes])
    rows = np.arange(8.0, 33.0)
    ratios = cost.factors(0, rows) / bare.factors(0, rows)
    assert ratios[[0, -1]] == pytest.approx([1.0, 1.3])
    # Halfway by the logarithm.
    assert ratios[8] == pytest.approx(math.sqrt(1.3))
    assert 1 <= (ratios[1:] / ratios[:-1]).min() <= (ratios[1:] / ratios[:-1]).max() < 1.03
    assert cost.factors(0, np.array([2.0, 100.0])) == pytest.approx([1.0, 1.3])


def test_one_pause_of_the_machine_hardly_shows() -> None:
    cost, load = CostModel(profile("linear", 1.0, 1.0)), decode_load(8)
    before = cost.predict(0, load)
    cost.observe(0, load, 1000 * before)
    assert before < cost.predict(0, load) < 1.1 * before


def test_a_pass_that_took_no_time_is_taken_in() -> None:
    cost, load = CostModel(profile("linear", 1.0, 1.0)), decode_load(8)
    before = cost.predict(0, load)
    cost.observe(0, load, 0.0)
    assert 0.9 * before < cost.predict(0, load) < before


def test_a_correct_model_stays_as_it_is() -> None:
    cost = CostModel(profile("stepped", 1.0, 1.0))
    for rows in range(1, 200):
        before = cost.predict(0, decode_load(rows))
        cost.observe(0, decode_load(rows), before)
        assert cost.predict(0, decode_load(rows)) == pytest.approx(before, rel=1e-9)


def test_a_fit_takes_the_medians_of_what_passes_took() -> None:
    made = profile("linear", 1.0, 1.0)
    cost, truth = CostModel(made), CostModel(made.scaled(2.0))
    cost.observe(1, decode_load(8), 100.0)
    passes = []
    for rows in (2, 8, 32):
        took = truth.predict(0, decode_load(rows))
        passes += [(0, decode_load(rows), took * off) for off in (0.9, 1.0, 1.0, 1.1, 50.0)]
    cost.fit(passes)
    for rows in (1, 2, 5, 8, 32, 100):
        assert cost.predict(0, decode_load(rows)) == pytest.approx(truth.predict(0, decode_load(rows)))
    # What was learnt before is replaced, of all segments.
    assert cost.predict(1, decode_load(8)) == CostModel(made).predict(1, decode_load(8))


def test_error_quantiles_are_of_the_predictions_made_before_each_pass() -> None:
    cost, load, errors = CostModel(profile("linear", 1.0, 1.0)), decode_load(8), []
    assert cost.error_quantiles() == {}
    draw = random.Random(0)
    for _ in range(50):
        took = cost.predict(0, load) * draw.uniform(0.5, 2.0)
        errors.append(abs(cost.predict(0, load) - took) / took)
        cost.observe(0, load, took)
    found = cost.error_quantiles()
    assert found == pytest.approx({"p50": float(np.quantile(errors, 0.5)), "p90": float(np.quantile(errors, 0.9))})


def test_old_errors_are_forgotten() -> None:
    cost, load = CostModel(profile("linear", 1.0, 1.0)), decode_load(8)
    for _ in range(20):
        cost.observe(0, load, 100.0)
    assert cost.error_quantiles()["p90"] > 0.1
    for _ in range(5000):
        cost.observe(0, load, cost.predict(0, load))
    assert cost.error_quantiles()["p90"] == pytest.approx(0.0, abs=1e-12)


def test_a_copy_predicts_the_same_and_learns_for_itself() -> None:
    cost, load = CostModel(profile("linear", 1.0, 1.0)), decode_load(8)
    cost.observe(0, load, 3 * cost.predict(0, load))
    copy = cost.copy()
    known = cost.predict(0, load)
    assert copy.predict(0, load) == known
    copy.observe(0, load, 3 * known)
    copy.observe(1, load, 3 * known)
    assert cost.predict(0, load) == known
    cost.observe(0, load, known / 3)
    assert cost.predict(0, load) < known < copy.predict(0, load)
    assert cost.predict(1, load) == CostModel(cost.profile).predict(1, load)


# Loads


def test_the_load_of_a_pass_counts_what_it_has_to_do() -> None:
    scheduler = make_scheduler(EngineConfig(64, 4, 64, kv_cache_tokens=100), SlotLayout((2, 2)), "project")
    for number, prompt in enumerate((3, 4)):
        scheduler.add(request(number, prompt, 30, 2), 0.0)
    machine, seen = Machine(0.6), []
    while (batch := machine.run(scheduler)) is not None:
        seen.append((batch, Load.of(batch)))
    assert seen[0][1] == Load(rows=7, spans=2, entries=7, evaluations=0)
    assert seen[1][1] == Load(rows=7, spans=2, entries=7, evaluations=2)
    for batch, load in seen[2:]:
        assert load.rows + load.kv_rows == batch.rows
        assert load.spans == load.rows == load.evaluations
        assert load.entries == batch.stops.sum()
    assert any(load.kv_rows for _, load in seen)


def test_nominal_costs_are_bound_by_reading_weights_and_grow_with_the_layers() -> None:
    cost = CostModel(nominal((2, 4)))
    one, eight = (cost.predict(0, decode_load(rows)) for rows in (1, 8))
    assert one < eight < 2 * one
    assert cost.predict(1, decode_load(1)) > one
