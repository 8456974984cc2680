"""The K/V slots: cells, tables, runs. No torch in this folder."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drex.control.memory.slots import SlotLayout, SlotPool


@pytest.mark.parametrize(
    ("lengths", "per_cell", "cells"), [((4, 4, 4), 4, 3), ((12, 12), 12, 2), ((3, 9, 28), 1, 40), ((24,), 24, 1)]
)
def test_cells_are_of_one_size_for_all_segments(lengths: tuple[int, ...], per_cell: int, cells: int) -> None:
    layout = SlotLayout(lengths)
    assert layout.layers_per_cell == per_cell
    assert layout.cells_per_token == cells
    assert sum(layout.parts(s) for s in range(len(lengths))) * per_cell == sum(lengths)


def at(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def more(pool: SlotPool, segment: int, seat: int, count: int) -> np.ndarray:
    """Append so many entries to a table; returns their cells, (parts, count)."""
    start = pool.tables[segment].counts[seat]
    return pool.append(segment, np.full(count, seat), np.arange(start, start + count))


def test_a_growing_request_stays_in_one_run_while_others_grow_too() -> None:
    pool = SlotPool(SlotLayout((2, 2)), tokens=40, seats=2, room=20)
    pool.open(0, 20)
    pool.open(1, 20)
    for entry in range(20):
        for segment in (0, 1):
            pool.append(segment, at(0, 1), at(entry, entry))
    for table in pool.tables:
        contexts = table.contexts(at(1, 0))
        assert contexts.lengths.tolist() == [20, 20]
        assert contexts.in_run.all()
        assert not len(contexts.fresh.seats)
        for span, seat in enumerate((1, 0)):
            run = contexts.starts[:, span, None] + np.arange(20)
            assert np.array_equal(run, table.entries(seat)[0])
    assert pool.in_use == pool.capacity


def test_preferred_cells_are_taken_by_others_when_there_are_no_more() -> None:
    pool = SlotPool(SlotLayout((1,)), tokens=10, seats=2, room=10)
    grows, late = 0, 1
    pool.open(grows, 10)
    pool.open(late, 10)
    more(pool, 0, grows, 2)
    assert sorted(more(pool, 0, late, 8)[0].tolist()) == list(range(2, 10))
    pool.close(late)
    assert more(pool, 0, grows, 8)[0].tolist() == list(range(2, 10))
    assert pool.tables[0].contexts(at(grows)).in_run.all()


def test_a_request_whose_next_cell_is_taken_goes_on_elsewhere_and_is_no_run_any_more() -> None:
    pool = SlotPool(SlotLayout((1,)), tokens=6, seats=2, room=6)
    first, second = 0, 1
    pool.open(first, 6)
    pool.open(second, 6)
    more(pool, 0, first, 1)
    assert more(pool, 0, second, 2)[0].tolist() == [1, 2]
    assert more(pool, 0, first, 3)[0].tolist() == [4, 5, 3]
    contexts = pool.tables[0].contexts(at(first))
    assert not contexts.in_run.any()
    assert contexts.fresh.numbers.tolist() == [0, 1, 2, 3]
    assert contexts.fresh.cells.tolist() == [[0, 4, 5, 3]]
    assert not contexts.fresh.aliased.any()
    pool.claim(6)
    pool.check_integrity([first, second])


def test_an_alias_takes_no_slot_and_names_the_exit_layers_slot() -> None:
    pool = SlotPool(SlotLayout((2, 2)), tokens=8, seats=1, room=4)
    pool.open(0, 4)
    cell = more(pool, 0, 0, 1)[0]
    before = pool.in_use
    pool.append_aliases(1, at(0), at(0), cell)
    assert pool.in_use == before == 2
    fresh = pool.tables[1].contexts(at(0)).fresh
    assert fresh.aliased.tolist() == [True]
    # Plane 1 is the second layer of the segment: the one that was executed last.
    assert fresh.cells.tolist() == [[1 * pool.num_cells + int(cell[0])]]
    pool.close(0)
    assert pool.in_use == 0


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_every_cell_is_accounted_for_after_any_opens_appends_and_closes(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    tokens = data.draw(st.integers(4, 30))
    pool = SlotPool(SlotLayout(tuple(lengths)), tokens, seats=4, room=tokens)
    held: dict[int, int] = {}
    rooms: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["open", "append", "append", "append", "close"]))
        free = sorted(set(range(4)) - set(held))
        if action == "open" and free:
            rooms[free[0]] = data.draw(st.integers(1, tokens))
            held[free[0]] = 0
            pool.open(free[0], rooms[free[0]])
        elif action == "close" and held:
            seat = data.draw(st.sampled_from(sorted(held)))
            pool.close(seat)
            pool.claim(-held.pop(seat))
        elif held:
            # Several requests in one call, as in a pass.
            seats = sorted(data.draw(st.sets(st.sampled_from(sorted(held)), min_size=1)))
            segment = data.draw(st.integers(0, len(lengths) - 1))
            count, table = data.draw(st.integers(1, 3)), pool.tables[segment]
            seats = [seat for seat in seats if table.counts[seat] + count <= rooms[seat]]
            if seats and pool.fits(len(seats) * count * lengths[segment]):
                starts = {seat: int(table.counts[seat]) for seat in seats}
                for seat in seats:
                    pool.claim(count * lengths[segment])
                    held[seat] += count * lengths[segment]
                entries = np.concatenate([np.arange(start, start + count) for start in starts.values()])
                cells = pool.append(segment, np.repeat(seats, count), entries)
                for number, (seat, start) in enumerate(starts.items()):
                    got = cells[:, number * count : (number + 1) * count]
                    assert np.array_equal(table.entries(seat)[0][:, start:], got)
        pool.check_integrity(held)
        assert pool.in_use == sum(held.values()) == pool.claimed


def test_entries_that_lie_in_no_run_are_told_of_once_and_again_when_they_were_taken_back() -> None:
    pool = SlotPool(SlotLayout((1,)), tokens=8, seats=3, room=8)
    for seat in range(3):
        pool.open(seat, 8)
    more(pool, 0, 0, 2)
    more(pool, 0, 1, 1)
    more(pool, 0, 0, 3)
    table = pool.tables[0]

    def told() -> list[tuple[int, int]]:
        fresh = table.contexts(at(0)).fresh
        return list(zip(fresh.numbers.tolist(), fresh.cells[0].tolist(), strict=True))

    held = table.entries(0)[0][0].tolist()
    assert not table.in_run[0]
    assert told() == list(enumerate(held))
    assert told() == []
    more(pool, 0, 0, 1)
    assert [number for number, _ in told()] == [5]
    pool.cut(table, 0, 4)
    more(pool, 0, 0, 2)
    again = told()
    assert [number for number, _ in again] == [4, 5]
    assert [cell for _, cell in again] == table.entries(0)[0][0, 4:].tolist()
    pool.close(0)
    pool.open(0, 8)
    assert table.told[0] == 0
