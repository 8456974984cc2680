"""Where rows find K/V: what each row of a pass attends to, and which slots stand in for those of skipped layers."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Machine, make_scheduler, request

from drex.config import EngineConfig
from drex.control.memory.slots import SlotLayout
from drex.control.plan import Pass
from drex.control.scheduler import Scheduler

UNEQUAL = SlotLayout((1, 3, 2))
"""Segments of 1, 3 and 2 parts, so that the first part is not the last."""


def check_visible(scheduler: Scheduler, batch: Pass, fill: str) -> int:
    """Each full row sees just the entries up to its own; returns how many rows see fewer than there are positions."""
    fewer = 0
    for part in batch.parts:
        placed = scheduler.work(batch).placed
        if part.segment != scheduler.work(batch).last:
            continue
        for seat, position, visible in zip(placed.owners, part.full.positions, part.visible, strict=True):
            # What is undecided runs all segments; a request's own record says where the others left.
            depths = scheduler.seats.depth[seat, : position + 1]
            expected = np.count_nonzero(depths > part.segment) if fill == "mask" else position + 1
            assert visible == expected, (part.segment, seat, position)
            fewer += visible < position + 1
    return fewer


@pytest.mark.parametrize("fill", ["recompute", "project", "alias", "mask"])
@pytest.mark.parametrize("rate", [0.3, 0.6])
@pytest.mark.parametrize("chunk", [3, 64])
def test_a_row_sees_the_entries_up_to_its_own_in_replays_too(fill: str, rate: float, chunk: int) -> None:
    config = EngineConfig(64, 4, chunk, kv_cache_tokens=20, max_fill_rows=8)
    scheduler = make_scheduler(config, UNEQUAL, fill)
    for number in range(5):
        scheduler.add(request(number, 4, 14, 3), 0.0)
    machine, fewer = Machine(rate), 0
    while (batch := scheduler.next(machine.now)) is not None:
        fewer += check_visible(scheduler, batch, fill)
        machine.finish(scheduler, batch)
        scheduler.check_integrity()
    assert scheduler.admission.preemptions > 0
    assert (fewer > 0) == (fill == "mask")


def test_an_alias_is_the_slot_of_the_last_layer_that_its_token_executed() -> None:
    scheduler = make_scheduler(EngineConfig(64, 4, 64, kv_cache_tokens=200), UNEQUAL, "alias")
    for number in range(4):
        scheduler.add(request(number, 3, 30, 3), 0.0)
    machine, seen = Machine(0.5), set()
    pool, seats = scheduler.pool, scheduler.seats
    last_plane = (UNEQUAL.layers_per_cell - 1) * pool.num_cells
    for _ in range(60):
        assert machine.run(scheduler) is not None
        for each in scheduler.admission.running:
            for segment in (1, 2):
                slots, aliased = pool.tables[segment].entries(each.seat)
                for position in np.flatnonzero(aliased).tolist():
                    depth = int(seats.depth[each.seat, position])
                    of_exit = pool.tables[depth - 1].entries(each.seat)[0][:, position]
                    assert set(slots[:, position].tolist()) == {last_plane + of_exit[-1]}
                    seen.add((segment, depth))
    assert seen == {(1, 1), (2, 1), (2, 2)}


@pytest.mark.parametrize("fill", ["alias", "mask"])
def test_tokens_that_exit_owe_nothing_deeper_where_fills_take_no_row(fill: str) -> None:
    scheduler = make_scheduler(EngineConfig(64, 4, 64, kv_cache_tokens=200), UNEQUAL, fill)
    requests = [request(number, 3, 12 + number, 3) for number in range(4)]
    for each in requests:
        scheduler.add(each, 0.0)
    # Every check exits at the first exit point, so that after the prompts nothing has to run behind it.
    machine, segments = Machine(1.0), []
    while (batch := machine.run(scheduler)) is not None:
        segments += [batch.segment]
        scheduler.check_integrity()
        for each in scheduler.admission.running:
            if each.num_output > 1:
                assert scheduler.seats.reached[2:, each.seat].tolist() == [each.num_output + 2] * 2
    assert segments == [0, 1, 2, *[0] * 14]
    assert all(each.depths[2:] == [3] + [1] * (each.max_tokens - 1) for each in requests)
