"""Which rows of the hidden-state arena are taken, and by which pending position."""

from __future__ import annotations

from collections.abc import Iterable


class ArenaRows:
    """Row numbers of the arena; a position holds one from its first pass until its last.

    Args:
        rows: how many the arena has.
    """

    def __init__(self, rows: int) -> None:
        self.capacity = rows
        self._free = list(range(rows - 1, -1, -1))
        self._held: dict[str, dict[int, int]] = {}

    @property
    def free(self) -> int:
        """Rows nobody holds."""
        return len(self._free)

    def take(self, request_id: str, positions: Iterable[int]) -> None:
        """Give each position a row; the caller has seen that there are enough."""
        held = self._held.setdefault(request_id, {})
        for position in positions:
            assert position not in held
            held[position] = self._free.pop()

    def rows(self, request_id: str, positions: Iterable[int]) -> list[int]:
        """The rows that positions hold."""
        held = self._held[request_id]
        return [held[position] for position in positions]

    def release(self, request_id: str, position: int) -> None:
        """Take back the row of one position."""
        self._free.append(self._held[request_id].pop(position))

    def close(self, request_id: str) -> None:
        """Take back all rows of a request."""
        self._free.extend(self._held.pop(request_id, {}).values())

    def held(self, request_id: str) -> int:
        """How many rows a request holds."""
        return len(self._held.get(request_id, ()))

    def check_integrity(self) -> None:
        """Raise AssertionError unless each row is free or held once."""
        rows = [*self._free, *(row for held in self._held.values() for row in held.values())]
        assert sorted(rows) == list(range(self.capacity)), "an arena row is lost or held twice"
