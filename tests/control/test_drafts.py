"""Run-ahead in the control plane: drafts, verification, roll-back, and what the rule makes of chances."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from helpers import EOS, Machine, Speaker, asked, drain, made_up, make_scheduler, profile, request
from hypothesis import given, settings
from hypothesis import strategies as st

from drex.comparison.policy_names import policy_settings
from drex.comparison.simulate import Scenario, run
from drex.config import EngineConfig
from drex.control.cost.model import CostModel
from drex.control.memory.slots import SlotLayout
from drex.control.plan import Pass, PassResult
from drex.control.policy.base import Choice, Setting, Split, View
from drex.control.policy.flush import FlushRule, Waiting
from drex.control.policy.rates import ExitRates
from drex.control.policy.rebatching import Drex
from drex.control.request import Ahead, Request
from drex.control.run_ahead.acceptance import Acceptance, Compounding, isotonic
from drex.control.scheduler import Scheduler
from drex.outputs import FinishReason
from drex.sim.machines import MACHINES, machine_profile
from drex.sim.shapes import SHAPES
from drex.sim.workload import Job


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.sampled_from([(2, 2), (1, 3, 2), (1, 1, 1, 1)]),
    fill=st.sampled_from(["recompute", "project", "alias", "mask"]),
    policy=st.sampled_from(["drex", "drex", "split"]),
    wrong=st.sampled_from([0.0, 0.4, 1.0]),
    sizes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 16), st.sampled_from(["off", "trusted", "trusted", "lossless"])),
        min_size=1,
        max_size=7,
    ),
    spare=st.sampled_from([0, 5, 100]),
    chunk=st.sampled_from([1, 4, 64]),
    fill_rows=st.sampled_from([1, 8, 64]),
    most=st.sampled_from([1, 4, 9]),
    aborted=st.sets(st.integers(0, 6), max_size=2),
    abort_at=st.integers(1, 25),
)
def test_tokens_are_those_of_early_exit_or_of_full_depth_and_nothing_leaks(
    lengths: tuple[int, ...],
    fill: str,
    policy: str,
    wrong: float,
    sizes: list[tuple[int, int, str]],
    spare: int,
    chunk: int,
    fill_rows: int,
    most: int,
    aborted: set[int],
    abort_at: int,
) -> None:
    tokens = max(2, max(prompt + out - 1 for prompt, out, _ in sizes) + spare)
    config = EngineConfig(64, 4, chunk, tokens, fill_rows, max_wait_passes=12, policy=policy, max_draft=most)
    scheduler = make_scheduler(config, SlotLayout(lengths), fill)
    modes = [mode if mode != "lossless" or fill == "recompute" else "trusted" for *_, mode in sizes]
    requests = [asked(i, p, o, len(lengths), modes[i]) for i, (p, o, _) in enumerate(sizes)]
    for each in requests:
        scheduler.add(each, 0.0)
    machine = Speaker(0.0)
    machine.segments, machine.wrong = len(lengths), wrong
    for _ in range(abort_at):
        machine.run(scheduler)
        scheduler.check_integrity()
    for number in aborted & set(range(len(requests))):
        if requests[number].finish_reason is None:
            scheduler.finish(requests[number].request_id, FinishReason.ABORT)
    waits = drain(scheduler, machine)
    assert all(waited <= 12 for waited in waits.values())
    assert scheduler.pool.in_use == scheduler.pool.claimed == 0
    for each, mode in zip(requests, modes, strict=True):
        expected = machine.expected(each, mode == "lossless")
        output = each.tokens[len(each.prompt) :]
        assert output == [record.token_id for record in each.records]
        if each.finish_reason is FinishReason.ABORT:
            assert output == expected[: len(output)]
        else:
            assert output == expected
        if mode == "lossless":
            assert all(record.depth == len(lengths) and not record.checks for record in each.records)


def checked_run(scheduler: Scheduler, machine: Speaker) -> Pass | None:
    batch = machine.run(scheduler)
    scheduler.check_integrity()
    return batch


class Fitful(Drex):
    """Rests now and then."""

    @property
    def resting(self) -> bool:
        return self._asked % 9 < 5


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.sampled_from([(2, 2), (1, 3, 2), (1, 1, 1, 1)]),
    fill=st.sampled_from(["recompute", "project", "alias", "mask"]),
    sizes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 24), st.sampled_from(["off", "trusted", "lossless"])),
        min_size=1,
        max_size=7,
    ),
    spare=st.sampled_from([0, 5, 100]),
    chunk=st.sampled_from([1, 4, 64]),
)
def test_whenever_exits_are_left_unchecked_tokens_are_those_of_their_depth_and_nothing_leaks(
    lengths: tuple[int, ...], fill: str, sizes: list[tuple[int, int, str]], spare: int, chunk: int
) -> None:
    tokens = max(2, max(prompt + out - 1 for prompt, out, _ in sizes) + spare)
    config = EngineConfig(64, 4, chunk, tokens, 8, max_wait_passes=12)
    scheduler = make_scheduler(config, SlotLayout(lengths), fill)
    scheduler.results.policy = Fitful(Setting(config, scheduler.cost, fill))
    modes = [mode if mode != "lossless" or fill == "recompute" else "trusted" for *_, mode in sizes]
    requests = [asked(i, p, o, len(lengths), modes[i]) for i, (p, o, _) in enumerate(sizes)]
    for each in requests:
        scheduler.add(each, 0.0)
    machine = Speaker(0.0)
    machine.segments = len(lengths)
    through = Counter(batch.then is not None for batch in iter(lambda: checked_run(scheduler, machine), None))
    # All begin unchecked, with their prompts.
    assert through[True] > 0 or chunk == 1
    assert scheduler.pool.in_use == scheduler.pool.claimed == 0
    assert scheduler.unchecked > 0 or max(out for _, out, _ in sizes) < 12
    for each, mode in zip(requests, modes, strict=True):
        name, first = each.request_id, len(each.prompt) - 1
        assert [record.token_id for record in each.records] == [
            machine.token(name, first + number, record.depth - 1, len(lengths))
            for number, record in enumerate(each.records)
        ]
        if mode == "lossless":
            assert each.tokens[len(each.prompt) :] == machine.expected(each, True)


def test_open_rows_are_capped() -> None:
    scheduler = make_scheduler(EngineConfig(128, 2, 64, 400, max_wait_passes=100), SlotLayout((2, 2)), "recompute")
    scheduler.drafts.most = 3
    each = asked(0, 4, 60, 2, "lossless")
    scheduler.add(each, 0.0)
    machine, seen = Speaker(0.0), set()
    while machine.run(scheduler) is not None:
        seen.add(sum(entry.record is None for entry in each.ahead))
    assert max(seen) == 3


def test_what_is_taken_back_is_what_went_ahead_and_was_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(EngineConfig(128, 4, 64, 400, max_wait_passes=100), SlotLayout((2, 2)), "recompute")
    drafts, counts = scheduler.drafts, Counter[str]()
    append, settle = drafts._append, drafts.settle

    def counted_append(each: Request, token: int, entry: Ahead) -> None:
        counts["open" if entry.record is None else "held"] += 1
        append(each, token, entry)

    def counted_settle(each: Request) -> int:
        count = settle(each)
        counts["settled"] += count
        return count

    monkeypatch.setattr(drafts, "_append", counted_append)
    monkeypatch.setattr(drafts, "settle", counted_settle)
    for number in range(4):
        scheduler.add(asked(number, 4, 40, 2, "trusted", frozenset()), 0.0)
    drain(scheduler, Speaker(0.0))
    assert counts["held"] > 10
    assert drafts.drafted == counts["open"]
    assert drafts.rolled_back == counts["open"] + counts["held"] - counts["settled"] > 10


class ShallowFirst(Split):
    """Runs ahead as far as it goes, then what stands deepest."""

    def choose(self, view: View) -> Choice | None:
        return Choice(0, view.ready) if view.ready or view.prompts else super().choose(view)


class Scripted(Machine):
    """Says (token, confidence) by position and segment; what is not in the script is token 9, for sure."""

    def __init__(self, script: dict[tuple[int, int], tuple[int, float]]) -> None:
        super().__init__(0.0)
        self.script = script

    def execute(self, batch: Pass) -> PassResult:
        last = batch.parts[-1]
        positions = last.evaluations.positions.tolist()
        said = [self.script.get((position, last.segment), (9, 0.9)) for position in positions]
        tokens, sure = (np.array(column) for column in zip(*said, strict=True)) if said else (positions, np.zeros(0))
        verdicts = made_up(last.evaluations, sure, sure >= last.evaluations.thresholds)
        return PassResult(replace(verdicts, tokens=np.array(tokens, dtype=np.int64)))


def test_a_text_goes_on_when_the_end_that_it_ran_ahead_to_was_taken_back() -> None:
    scheduler = make_scheduler(EngineConfig(64, 2, 64, kv_cache_tokens=80), SlotLayout((1, 1, 1)), "recompute")
    scheduler.results.policy = ShallowFirst(Setting(scheduler.config, scheduler.cost, "recompute"))
    each = asked(0, 2, 6, 3, "trusted")
    scheduler.add(each, 0.0)
    # The row at 2 is not sure of 11, behind which the text ends for sure. The next exit would rather end it at once,
    # not being sure either, so that nothing is taken in place of what it takes back. The last head says 12.
    script = {(2, 0): (11, 0.4), (3, 0): (EOS, 0.9), (2, 1): (EOS, 0.4), (2, 2): (12, 0.9)}
    machine = Scripted(script)
    while (batch := machine.run(scheduler)) is not None:
        scheduler.check_integrity()
        if (3, 0) in script and batch.segment == 0 and batch.full.positions.tolist() == [3]:
            # When the row runs again, it stands on another token.
            del script[3, 0]
    assert scheduler.drafts.rolled_back == 2
    assert each.tokens[2:] == [9, 12, 9, 9, 9, 9]
    assert each.finish_reason is FinishReason.LENGTH


def test_no_row_runs_behind_a_held_token_that_would_end_the_text() -> None:
    """Be it an end token, or the last that the request may have."""
    scheduler = make_scheduler(EngineConfig(64, 4, 64, kv_cache_tokens=400), SlotLayout((2, 2)), "recompute")
    scheduler.results.policy = ShallowFirst(Setting(scheduler.config, scheduler.cost, "recompute"))
    for number in range(12):
        scheduler.add(asked(number, 3, 6 + number, 2, "trusted", frozenset(range(EOS, 9))), 0.0)
    machine, ahead = Speaker(0.0), Counter[str]()
    while (batch := scheduler.next(machine.now)) is not None:
        for each in (scheduler.seats[seat] for seat in scheduler.work(batch).spans.tolist()):
            number = len(each.context) - len(each.prompt)
            if batch.segment == 0 and number:
                assert number < each.max_tokens
                assert not each.ends(each.context[-1], number)
        machine.finish(scheduler, batch)
        for each in (each for each in scheduler.admission.running if each.ahead):
            number = len(each.context) - len(each.prompt)
            end, most = each.ends(each.context[-1], number), number == each.max_tokens
            ahead.update({"end": end, "most": most})
            # Where an exit is not sure of it, it is of no use.
            assert each.ahead[-1].record is not None or not (end or most)
    assert ahead["end"] > 0
    assert ahead["most"] > 0


# Acceptance


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 10)), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_isotonic_values_never_fall_and_keep_the_weighted_sum(pairs: list[tuple[float, float]]) -> None:
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    found = isotonic(values, weights)
    assert (np.diff(found) >= -1e-12).all()
    assert (found * weights).sum() == pytest.approx((values * weights).sum())
    # What rises already stays as it is.
    assert np.allclose(isotonic(np.sort(values), weights), np.sort(values))


def test_acceptance_is_learnt_by_confidence_and_rises_with_it() -> None:
    acceptance, draw = Acceptance(1), random.Random(0)
    for _ in range(3000):
        confidence = draw.random()
        acceptance.observe(0, confidence, draw.random() < confidence**2)
    chances = [acceptance.chance(0, c / 20) for c in range(21)]
    assert chances == sorted(chances)
    assert acceptance.chance(0, 0.3) == pytest.approx(0.09, abs=0.06)
    assert acceptance.chance(0, 0.95) == pytest.approx(0.9, abs=0.08)
    report = acceptance.report()
    assert report["verified"] == 3000
    assert report["calibration_error"] < 0.05
    bins = report["calibration"]
    assert [each["confidence"] for each in bins] == [(number + 0.5) / 16 for number in range(16)]
    assert sum(each["verified"] for each in bins) == 3000
    assert sum(each["accepted"] for each in bins) == report["accepted"]
    off = sum(abs(each["accepted"] - each["expected"]) for each in bins)
    assert off / 3000 == pytest.approx(report["calibration_error"])


def test_counts_begin_again_and_what_was_learnt_stays() -> None:
    acceptance = Acceptance(1)
    for _ in range(200):
        acceptance.observe(0, 0.9, False)
    before = acceptance.chance(0, 0.9)
    acceptance.count_afresh()
    assert acceptance.report()["verified"] == 0
    assert acceptance.report()["calibration"] == []
    assert acceptance.chance(0, 0.9) == before


def test_acceptance_forgets() -> None:
    acceptance = Acceptance(1)
    for right in [True] * 3000 + [False] * 3000:
        acceptance.observe(0, 0.9, right)
    assert acceptance.chance(0, 0.9) < 0.1


def test_what_becomes_of_rows_on_several_tokens_makes_up_for_chances_that_are_wrong() -> None:
    compounding, draw = Compounding(4), random.Random(1)
    assert [compounding.chance(count, 0.3) for count in range(5)] == [1.0] + [0.3] * 4
    # Each of their tokens is right half the time, and is given .7.
    for _ in range(4000):
        count = draw.randint(1, 3)
        compounding.observe(count, 0.7**count, draw.random() < 0.5**count)
    for count in range(1, 4):
        assert compounding.chance(count, 0.7**count) == pytest.approx(0.5**count, abs=0.05)
    # Nobody stood on four.
    assert compounding.chance(4, 0.5) == 0.5
    for _ in range(4000):
        compounding.observe(1, 0.5, True)
    assert compounding.chance(1, 0.6) == 1.0


@pytest.mark.parametrize("second", [11, 12], ids=["agrees", "differs"])
def test_a_tentative_token_counts_as_accepted_once_when_it_is_decided(second: int) -> None:
    """An exit that is not sure either decides nothing; where it says something else, that is what is verified."""
    scheduler = make_scheduler(EngineConfig(64, 2, 64, kv_cache_tokens=80), SlotLayout((1, 1, 1)), "recompute")
    scheduler.results.policy = ShallowFirst(Setting(scheduler.config, scheduler.cost, "recompute"))
    each, observed = asked(0, 2, 4, 3, "trusted"), []
    observe = scheduler.drafts.acceptance.observe

    def told(exit_index: int, confidence: float, right: bool) -> None:
        observed.append((exit_index, confidence, right))
        observe(exit_index, confidence, right)

    scheduler.drafts.acceptance.observe = told  # type: ignore[method-assign]
    scheduler.add(each, 0.0)
    drain(scheduler, Scripted({(2, 0): (11, 0.3), (2, 1): (second, 0.4), (2, 2): (second, 0.9)}))
    assert each.tokens[2:] == [9, second, 9, 9]
    assert observed == ([(0, 0.3, True)] if second == 11 else [(1, 0.4, True)])
    report = scheduler.drafts.report()
    assert (report["verified"], report["accepted"]) == (1, 1)
    assert report["drafted"] == (1 if second == 11 else 2)


@pytest.mark.parametrize("mode", ["trusted", "lossless"])
def test_rows_that_stand_on_others_are_as_often_right_as_they_are_said_to_be(mode: str) -> None:
    scheduler = make_scheduler(EngineConfig(1024, 4, 64, 8000, max_wait_passes=100), SlotLayout((2, 2)), "recompute")
    machine = Speaker(0.0)
    for number in range(12):
        scheduler.add(asked(number, 4, 600, 2, mode, eos=frozenset()), 0.0)
    said: list[tuple[float, bool]] = []
    observe = scheduler.drafts.compounding.observe

    def told(open_rows: int, product: float, right: bool) -> None:
        said.append((scheduler.drafts.compounding.chance(open_rows, product), right))
        observe(open_rows, product, right)

    scheduler.drafts.compounding.observe = told  # type: ignore[method-assign]
    drain(scheduler, machine)
    chances, right = np.array(said[len(said) // 2 :]).T
    assert len(chances) > 500
    assert 0.1 < right.mean() < 0.9
    assert chances.mean() == pytest.approx(right.mean(), abs=0.04)


# The rule


def test_rows_are_started_from_the_surest_down_to_where_they_do_not_pay() -> None:
    cost = CostModel(profile("linear", 1.0, 1.0))
    rule = FlushRule(cost, ExitRates(1), "recompute", 200)
    rule.tick(0, 8, 0.0, ahead=True)
    live, fills = [0, 4], [0, 0]
    started = [rule.choose(Waiting(8, live, fills, np.array([1.0] * n + [0.01] * (8 - n)))) for n in (8, 6)]
    assert started == [(0, 8), (0, 6)]
    # Where next to nothing is sure, the buffer is flushed.
    assert rule.choose(Waiting(8, live, fills, np.full(8, 0.01))) == (1, 0)


def speed(policy: str, count: int, acceptance: float, rounds: int = 4) -> float:
    lengths = (13, 27)
    scenario = Scenario(
        lengths,
        machine_profile(MACHINES["h200"], SHAPES["llama-2-13b"], lengths),
        (0.4,),
        "recompute",
        request(0, 1, 1, 2).params,
        acceptance=acceptance,
    )
    jobs = [Job(8, 60)] * (rounds * count)
    config = EngineConfig(80, count, 512, count * 80, max(256, 4 * count), **policy_settings("drex"))
    (found,) = run(scenario, [policy], jobs, config)["runs"]
    rate: float = found["decode_tokens_per_s"]
    return rate


@pytest.mark.parametrize("count", [4, 16])
def test_run_ahead_gains_where_drafts_are_accepted(count: int) -> None:
    assert speed("drex+run-ahead", count, 0.8) > 1.08 * speed("drex", count, 0.8)


@pytest.mark.parametrize("count", [4, 16, 64])
def test_with_nothing_accepted_run_ahead_falls_back_to_rebatching(count: int) -> None:
    # Long enough that what it takes to learn that does not show.
    rounds = max(8, 160 // count)
    assert speed("drex+run-ahead", count, 0.0, rounds) > 0.98 * speed("drex", count, 0.0, rounds)
