"""A Pass as one vector of whole numbers, which crosses to the device in one copy and is read there by kernels.

Fields may be longer than what a pass fills: the rest is zeros, and `counts` says how many rows there are of each kind;
K/V-only rows lie behind the room for the others. So a CUDA graph that was captured for more rows runs a pass of fewer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from drex.control.plan import IntArray, Pass

ALIGNMENT = 4
"""Fields start at multiples of so many numbers: kernels are compiled for aligned pointers."""


class Room(NamedTuple):
    """How long the fields are.

    Attributes:
        full, fill: rows that run the segment, and that only write K/V.
        tiles: of attention.
        parts: of the segment.
        evaluated: rows whose head is evaluated.
    """

    full: int
    fill: int
    tiles: int
    parts: int
    evaluated: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the fields, in order."""
        rows = self.full + self.fill
        return {
            "counts": (2,),
            "tokens": (self.full,),
            "positions": (rows,),
            "arena": (rows,),
            "cells": (self.parts, rows),
            "visible": (self.full,),
            "tile_first": (self.tiles,),
            "tile_rows": (self.tiles,),
            "tile_seats": (self.tiles,),
            "tile_in_run": (self.tiles,),
            "tile_starts": (self.parts, self.tiles),
            "evaluated": (self.evaluated,),
        }

    @property
    def size(self) -> int:
        """Numbers that all fields take together."""
        return sum(_padded(shape) for shape in self.shapes().values())

    def views(self, vector: Any) -> dict[str, Any]:
        """The fields of a vector of at least `size` numbers, of torch or numpy."""
        out, start = {}, 0
        for name, shape in self.shapes().items():
            out[name] = vector[start : start + int(np.prod(shape))].reshape(shape)
            start += _padded(shape)
        return out


def _padded(shape: tuple[int, ...]) -> int:
    return -(-int(np.prod(shape)) // ALIGNMENT) * ALIGNMENT


def fill_in(vector: npt.NDArray[np.int32], room: Room, batch: Pass, tile_rows: int) -> None:
    """Write a pass into a vector of zeros.

    Args:
        vector: of `room.size` numbers.
        room: for at least as much as the pass has.
        batch: the pass.
        tile_rows: the most rows that a tile of attention takes.
    """
    field = room.views(vector)
    full, fill = batch.full, batch.fill
    field["counts"][:] = full.size, fill.size
    field["tokens"][: len(batch.tokens)] = batch.tokens
    field["visible"][: full.size] = batch.visible
    for rows, start in ((full, 0), (fill, room.full)):
        stop = start + rows.size
        field["positions"][start:stop] = rows.positions
        field["arena"][start:stop] = rows.arena
        if rows.size:  # else it may have the cells of no part
            field["cells"][:, start:stop] = rows.cells
    span, first, count = tiles(batch.sizes, tile_rows)
    used = len(span)
    field["tile_first"][:used], field["tile_rows"][:used] = first, count
    field["tile_seats"][:used] = batch.context.seats[span]
    field["tile_in_run"][:used] = batch.context.in_run[span]
    field["tile_starts"][:, :used] = batch.context.starts[:, span]
    field["evaluated"][: len(batch.evaluations)] = batch.evaluations.rows


def tiles(sizes: IntArray, most: int) -> tuple[IntArray, IntArray, IntArray]:
    """Rows of spans in tiles of at most so many.

    Returns:
        Of each tile the span, its first row in the pass, and how many rows it has.
    """
    needed = -(-sizes // most)
    span = np.repeat(np.arange(len(sizes)), needed)
    number = np.arange(len(span)) - np.repeat(needed.cumsum() - needed, needed)
    first = (sizes.cumsum() - sizes)[span] + number * most
    return span, first, np.minimum(most, sizes[span] - number * most)


def count_tiles(sizes: IntArray, most: int) -> int:
    """How many tiles they make."""
    return int((-(-sizes // most)).sum())
