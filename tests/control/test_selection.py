"""Which rows go first where a pass has no room for all: those that waited longest, the surest, the most urgent."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import make_scheduler, request

from drex.config import EngineConfig
from drex.control.memory.slots import SlotLayout
from drex.control.policy.base import Choice
from drex.control.scheduler import Scheduler
from drex.control.standing import Standing

PRIORITIES = (1, 1, 2, 0, 1, 0)
NOBODY = np.zeros(0, dtype=np.int64)


@pytest.fixture
def scheduler() -> Scheduler:
    """Six requests in the seats of their numbers, and passes of three rows."""
    made = make_scheduler(EngineConfig(64, 6, 3, kv_cache_tokens=200), SlotLayout((2, 2)), "recompute")
    for number, priority in enumerate(PRIORITIES):
        made.add(request(number, 4, 8, 2, priority), 0.0)
        made.admission.admit()
    assert [made.seats[seat].arrival for seat in range(6)] == list(range(6))
    return made


def standing(rows: int = 1, ready: int = 0, waiting: int = 0, urgent: int = 0) -> Standing:
    """The first so many requests are ready, the first so many wait at segment 1, the last so many are prompts."""
    pending = np.full((2, 6), rows)
    decoding = np.arange(6) < 6 - urgent
    prompts = np.arange(6 - urgent, 6)
    return Standing(pending, decoding, np.arange(ready), [NOBODY, np.arange(waiting)], [prompts, NOBODY], [0, 0])


def picked(scheduler: Scheduler, choice: Choice, stand: Standing) -> list[tuple[int, int]]:
    """Seats, and how many of their rows."""
    seats, counts = scheduler.selection.pick(choice, stand, 0.0)
    return list(zip(seats.tolist(), counts.tolist(), strict=True))


def test_the_rows_that_have_waited_longest_are_flushed_first(scheduler: Scheduler) -> None:
    scheduler.seats.since[:] = [5, 3, 9, 1, 7, 2]
    assert picked(scheduler, Choice(1), standing(waiting=6)) == [(3, 1), (5, 1), (1, 1)]
    # With the fills that their requests owe, as far as there is room.
    assert picked(scheduler, Choice(1), standing(2, waiting=6)) == [(3, 2), (5, 1)]
    assert sorted(picked(scheduler, Choice(1), standing(waiting=3))) == [(0, 1), (1, 1), (2, 1)]


def test_rows_that_only_owe_fills_come_behind_those_that_wait(scheduler: Scheduler) -> None:
    stand = standing(waiting=2)
    assert picked(scheduler, Choice(1, fills=True), stand)[:2] == [(0, 1), (1, 1)]
    stand.pending[1] = [1, 1, 0, 1, 0, 2]
    # Whoever owes most goes first.
    assert picked(scheduler, Choice(1, fills=True), stand) == [(0, 1), (1, 1), (5, 1)]
    # Nobody goes twice.
    stand.pending[1] = [1, 0, 0, 1, 0, 0]
    assert picked(scheduler, Choice(1, fills=True), standing(waiting=1)._replace(pending=stand.pending)) == [
        (0, 1),
        (3, 1),
    ]


def test_the_surest_rows_are_started_first_and_of_those_the_first_that_are_due(scheduler: Scheduler) -> None:
    scheduler.seats.chance[:] = [0.2, 1.0, 0.9, 1.0, 1.0, 0.1]
    scheduler.seats.due[:] = [1.0, 9.0, 2.0, 5.0, np.inf, 3.0]
    assert picked(scheduler, Choice(0, ready=6), standing(ready=6)) == [(3, 1), (1, 1), (4, 1)]
    assert picked(scheduler, Choice(0, ready=2), standing(ready=6)) == [(3, 1), (1, 1)]
    scheduler.seats.chance[:] = 1.0
    assert picked(scheduler, Choice(0, ready=2), standing(ready=6)) == [(0, 1), (2, 1)]


def test_prompts_go_by_priority_and_then_as_they_came(scheduler: Scheduler) -> None:
    assert picked(scheduler, Choice(0), standing(2, urgent=6)) == [(3, 2), (5, 1)]
    assert picked(scheduler, Choice(0), standing(urgent=3)) == [(3, 1), (5, 1), (4, 1)]


def test_decode_rows_and_prompts_share_the_rows_of_a_pass(scheduler: Scheduler) -> None:
    stand = standing(ready=2, urgent=2)
    stand.pending[0, 4:] = 4
    assert picked(scheduler, Choice(0, ready=2), stand) == [(0, 1), (1, 1), (5, 1)]


@pytest.mark.parametrize("left", [3, 4, 9])
def test_decode_rows_and_prompts_share_the_arena_rows_and_slots_that_are_left(left: int) -> None:
    made = make_scheduler(EngineConfig(64, 6, 64, kv_cache_tokens=60), SlotLayout((2, 2)), "recompute")
    for number in range(4):
        made.add(request(number, 4, 8, 2), 0.0)
        made.admission.admit()
    stand = standing(ready=2, urgent=3)
    stand.pending[0, 3:] = 4
    made.arena.free = left
    expected = [(0, 1), (1, 1), (3, min(4, left - 2))]
    stand.urgent[0] = np.array([3])
    assert picked(made, Choice(0, ready=2), stand) == expected
    # The prompt's slots are claimed already; of the decode rows only as many go as there are slots for.
    made.pool.claimed = made.pool.capacity - 4
    made.seats.reached[1, :2] = made.seats.claimed_length[:2] = 5
    assert picked(made, Choice(0, ready=2), stand) == [(0, 1), (3, min(4, left - 1))]
