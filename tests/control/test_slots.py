"""The K/V slots: cells, tables, runs. No torch in this folder."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drex.control.plan import Run, Scattered
from drex.control.slots import SlotLayout, SlotPool


@pytest.mark.parametrize(
    ("lengths", "per_cell", "cells"), [((4, 4, 4), 4, 3), ((12, 12), 12, 2), ((3, 9, 28), 1, 40), ((24,), 24, 1)]
)
def test_cells_are_of_one_size_for_all_segments(lengths: tuple[int, ...], per_cell: int, cells: int) -> None:
    layout = SlotLayout(lengths)
    assert layout.layers_per_cell == per_cell
    assert layout.cells_per_token == cells
    assert sum(layout.parts(s) for s in range(len(lengths))) * per_cell == sum(lengths)


def test_a_growing_request_stays_in_one_run_while_others_grow_too() -> None:
    pool = SlotPool(SlotLayout((2, 2)), tokens=40)
    first, second = pool.open("a", 20), pool.open("b", 20)
    for _ in range(20):
        for tables in (first, second):
            for table in tables:
                pool.extend(table, 1)
    for tables in (first, second):
        for table in tables:
            assert all(isinstance(context, Run) and context.length == 20 for context in table.context())
    assert pool.in_use == pool.capacity


def test_preferred_cells_are_taken_by_others_when_there_are_no_more() -> None:
    pool = SlotPool(SlotLayout((1,)), tokens=10)
    (grows,), (late,) = pool.open("grows", 10), pool.open("late", 10)
    pool.extend(grows, 2)
    cells = pool.extend(late, 8)
    assert sorted(cells[0]) == list(range(2, 10))
    pool.close("late")
    assert list(pool.extend(grows, 8)[0]) == list(range(2, 10))
    assert isinstance(grows.context()[0], Run)


def test_an_alias_takes_no_slot_and_names_the_exit_layers_slot() -> None:
    pool = SlotPool(SlotLayout((2, 2)), tokens=8)
    shallow, deep = pool.open("a", 4)
    cell = pool.extend(shallow, 1)[0][0]
    before = pool.in_use
    deep.append_alias(pool.slot(cell))
    assert pool.in_use == before == 2
    (context,) = deep.context()
    assert isinstance(context, Scattered)
    assert context.aliased.tolist() == [True]
    # Plane 1 is the second layer of the segment: the one that was executed last.
    assert context.entries.tolist() == [1 * pool.num_cells + cell]
    pool.close("a")
    assert pool.in_use == 0


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_every_cell_is_accounted_for_after_any_opens_extends_and_closes(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    layout = SlotLayout(tuple(lengths))
    tokens = data.draw(st.integers(4, 30))
    pool = SlotPool(layout, tokens)
    tables: dict[str, tuple] = {}
    held: dict[str, int] = {}
    rooms: dict[str, int] = {}
    for step in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["open", "extend", "extend", "extend", "close"]))
        if action == "open":
            name = f"r{step}"
            rooms[name] = data.draw(st.integers(1, tokens))
            tables[name], held[name] = pool.open(name, rooms[name]), 0
        elif tables:
            name = data.draw(st.sampled_from(sorted(tables)))
            if action == "close":
                pool.close(name)
                pool.claim(-held.pop(name))
                del tables[name]
            else:
                segment = data.draw(st.integers(0, len(lengths) - 1))
                table = tables[name][segment]
                count = data.draw(st.integers(1, 3))
                if table.count + count <= rooms[name] and pool.fits(count * lengths[segment]):
                    pool.claim(count * lengths[segment])
                    held[name] += count * lengths[segment]
                    cells = pool.extend(table, count)
                    assert np.array_equal(table.cells[:, table.count - count : table.count], cells)
        pool.check_integrity(tables)
        assert pool.in_use == sum(held.values()) == pool.claimed
