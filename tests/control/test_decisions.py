"""What heads are asked and what is kept of it: each token's own thresholds, nothing of what was taken back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import Machine, Speaker, asked, drawn, make_scheduler

from drex.config import EngineConfig, ExitRule
from drex.control.memory.slots import SlotLayout
from drex.control.plan import Pass, PassResult
from drex.control.policy.base import Setting
from drex.control.policy.rebatching import Drex
from drex.control.request import Request
from drex.control.scheduler import Scheduler
from drex.outputs import FinishReason

LENGTHS = (1, 3, 2)
MODES = ["off", "trusted", "lossless", "trusted", "off"]


def make(fill: str = "recompute", **changes: Any) -> Scheduler:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "kv_cache_tokens": 400} | changes
    return make_scheduler(EngineConfig(64, **settings), SlotLayout(LENGTHS), fill)


def ended(
    scheduler: Scheduler, machine: Machine, requests: list[Request], look: Callable[[Pass], None] | None = None
) -> None:
    """Serve requests to their end; `look` is called with each pass that is planned."""
    for each in requests:
        scheduler.add(each, 0.0)
    for _ in range(5000):
        batch = scheduler.next(machine.now)
        if batch is None:
            break
        if look is not None:
            look(batch)
        machine.finish(scheduler, batch)
        scheduler.check_integrity()
    assert all(each.finish_reason is not None for each in requests)


@pytest.mark.parametrize("schedule", ["calm_paper", "calm_code"])
def test_each_row_is_asked_with_the_threshold_of_its_own_token_tentative_ones_too(schedule: str) -> None:
    """Thresholds that decay differ from one token to the next."""
    scheduler, tentative = make(), Counter[str]()
    requests = [asked(i, 2 + i, 9 + 4 * i, 3, mode, frozenset()) for i, mode in enumerate(MODES)]
    for each in requests:
        each.rule = ExitRule("max_prob", (0.55, 0.45), schedule)
    by_name = {each.request_id: each for each in requests}

    def look(batch: Pass) -> None:
        if batch.segment + 1 == len(LENGTHS):
            return
        said = batch.evaluations
        for draws, position, threshold in zip(said.draws, said.positions.tolist(), said.thresholds, strict=True):
            each = by_name[draws.request_id]
            number = position + 1 - len(each.prompt)
            assert number > 0, "a first token is asked for an early exit"
            assert threshold == each.rule.threshold(batch.segment, number, each.max_tokens)
            tentative[each.run_ahead] += number > each.num_output

    machine = Speaker(0.0)
    machine.segments = 3
    ended(scheduler, machine, requests, look)
    assert tentative["trusted"] > 5
    assert tentative["lossless"] > 5
    for each in requests:
        for number, record in enumerate(each.records):
            for check in record.checks:
                assert check.threshold == each.rule.threshold(check.exit_index, number, each.max_tokens)


def test_each_row_of_a_scored_prompt_is_asked_with_the_threshold_of_its_own_place() -> None:
    scheduler, seen = make(), 0
    scores = ExitRule("max_prob", (0.55, 0.45), "calm_paper")
    prompts = (9, 14, 5)
    requests = [replace(asked(i, prompt, 3, 3, "off"), score_rule=scores) for i, prompt in enumerate(prompts)]
    by_name = {each.request_id: each for each in requests}

    def look(batch: Pass) -> None:
        nonlocal seen
        said = batch.evaluations
        for number, target in said.targets.items():
            each, position = by_name[said.draws[number].request_id], int(said.positions[number])
            assert target == each.prompt[position + 1]
            if batch.segment + 1 < len(LENGTHS):
                assert said.thresholds[number] == scores.threshold(batch.segment, position, len(each.prompt))
                seen += 1

    machine = Machine(0.5)
    ended(scheduler, machine, requests, look)
    assert seen > 20
    for each in requests:
        assert sorted(each.prompt_records) == list(range(len(each.prompt) - 1))
        for position, record in each.prompt_records.items():
            assert [check.exit_index for check in record.checks] == list(range(min(record.depth, 2)))
            for check in record.checks:
                assert check.threshold == scores.threshold(check.exit_index, position, len(each.prompt))


@pytest.mark.parametrize("fill", ["recompute", "project", "alias", "mask"])
def test_a_scored_prompt_row_is_asked_until_it_is_measured_and_never_again(fill: str) -> None:
    """A replay after preemption, too, runs it at the depth that was measured."""
    scheduler, again = make(fill, kv_cache_tokens=22, max_num_batched_tokens=5), 0
    scores = ExitRule("max_prob", (0.5, 0.5))
    requests = [replace(asked(i, 10 - i, 9, 3, "off", frozenset()), score_rule=scores) for i in range(4)]
    by_name = {each.request_id: each for each in requests}

    def look(batch: Pass) -> None:
        nonlocal again
        said = batch.evaluations
        for number in said.targets:
            assert int(said.positions[number]) not in by_name[said.draws[number].request_id].prompt_records
        if batch.segment == 0:
            spans = scheduler.work(batch).spans.tolist()
            replays = [scheduler.seats[seat].prompt_records for seat in spans]
            again += sum(int(start) in records for start, records in zip(batch.starts, replays, strict=True))
        for each in scheduler.admission.running:
            for position, record in each.prompt_records.items():
                assert each.depths[position] == scheduler.seats.depth[each.seat, position] == record.depth

    ended(scheduler, Machine(0.5), requests, look)
    assert scheduler.admission.preemptions > 0
    assert again > 0, "no measured row ran again"


class Unchecked(Drex):
    """Checks no exit: all segments at once, or in passes of their own all the same."""

    at_once = True
    resting = property(lambda self: True)  # type: ignore[assignment]
    _probes_next = property(lambda self: not self.at_once)  # type: ignore[assignment]

    def checks_exits(self, segment: int) -> bool:
        return False


@pytest.mark.parametrize("at_once", [True, False])
def test_tokens_that_are_not_asked_anywhere_are_counted_once_each(at_once: bool) -> None:
    """First tokens, and tokens of a request whose rule allows no exit, would not be asked anyway."""
    scheduler, through = make(), set()
    scheduler.results.policy = Unchecked(Setting(scheduler.config, scheduler.cost, "recompute"))
    scheduler.policy.at_once = at_once
    requests = [asked(i, 2 + i, 6 + i, 3, "off", frozenset()) for i in range(4)]
    requests[1].rule = ExitRule("max_prob", (None, 0.5))
    requests[2].rule = ExitRule("max_prob", (None, None))
    ended(scheduler, Machine(0.5), requests, lambda batch: through.add(batch.then is not None))
    assert through == {at_once}
    assert all(record.depth == 3 for each in requests for record in each.records)
    assert scheduler.unchecked == (6 - 1) + (7 - 1) + (9 - 1)


def test_nothing_of_a_row_that_was_taken_back_is_left_when_it_runs_again() -> None:
    """Neither which exits have agreed on it, nor what they said: some rows run again with no exit asked."""

    class Fitful(Drex):
        resting = property(lambda self: self._asked % 5 < 2)  # type: ignore[assignment]

    # Two seats, so that a request sits where another has sat.
    scheduler, unasked = make(max_num_seqs=2), {}
    scheduler.results.policy = Fitful(Setting(scheduler.config, scheduler.cost, "recompute"))
    requests = [asked(i, 2 + i, 30, 3, "trusted", frozenset()) for i in range(4)]
    for each in requests:
        each.rule = ExitRule("patience", (0.6, 0.5))
    asked_before = set()

    def look(batch: Pass) -> None:
        last = batch.parts[-1]
        said = last.evaluations
        if batch.segment == 0:
            assert not said.agreeing[1].any(), "an exit has agreed with the first one before it was asked"
        for draws, position in zip(said.draws, said.positions.tolist(), strict=True):
            row = draws.request_id, position
            unasked[row] = batch.then is not None and row in asked_before
            if last.segment < 2:
                asked_before.add(row)

    machine = Speaker(0.0)
    machine.segments = 3
    ended(scheduler, machine, requests, look)
    assert scheduler.drafts.rolled_back > 20
    assert sum(unasked.values()) > 0
    for each in requests:
        for number, record in enumerate(each.records):
            if unasked[each.request_id, len(each.prompt) + number - 1]:
                assert record.depth == 3
                assert record.checks == ()


def test_exits_that_agree_on_a_scored_prompt_row_are_counted_though_tokens_go_by_another_measure() -> None:
    scheduler, runs = make(), set()
    each = replace(asked(0, 20, 3, 3, "off", frozenset()), score_rule=ExitRule("patience", (0.5, 0.5)))

    def look(batch: Pass) -> None:
        said = batch.evaluations
        runs.update((batch.segment, int(said.agreeing[1, number])) for number in said.targets)

    ended(scheduler, Machine(0.3), [each], look)
    # As many exits as have been asked before; here each of them says the same.
    assert {(0, 0), (1, 1), (2, 1)} == runs


class BreaksFirst(Machine):
    """The logits of the first request are NaN from its second token on."""

    def execute(self, batch: Pass) -> PassResult:
        verdicts = super().execute(batch).verdicts
        assert verdicts is not None
        said = batch.parts[-1].evaluations
        where = zip(said.draws, said.positions.tolist(), strict=True)
        good = [draws.request_id != "r0" or position < draws.prompt_length for draws, position in where]
        return PassResult(replace(verdicts, finite=np.array(good, dtype=np.bool_)))


@pytest.mark.parametrize("mode", ["off", "trusted"])
def test_a_request_whose_logits_are_broken_ends_beside_scored_prompts_that_go_on(mode: str) -> None:
    scheduler, beside = make(max_num_batched_tokens=4), 0
    broken = asked(0, 2, 30, 3, mode, frozenset())
    scores = ExitRule("max_prob", (0.5, 0.5))
    others = [replace(asked(i, 25, 4, 3, mode, frozenset()), score_rule=scores) for i in (1, 2)]

    def look(batch: Pass) -> None:
        nonlocal beside
        said = batch.parts[-1].evaluations
        beside += len(said.targets) > 0 and any(draws.request_id == "r0" for draws in said.draws)

    ended(scheduler, BreaksFirst(0.5), [broken, *others], look)
    assert beside > 0
    assert broken.finish_reason is FinishReason.ERROR
    for each in others:
        assert each.finish_reason is FinishReason.LENGTH
        assert sorted(each.prompt_records) == list(range(24))
        for position, record in each.prompt_records.items():
            exits = (exit_index for exit_index in range(2) if drawn(each.request_id, position, exit_index) < 0.5)
            assert record.depth == next(exits, 2) + 1
        assert [record.token_id for record in each.records] == [5] * 4
