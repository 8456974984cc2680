"""The rebatching buffer: live rows that wait at a segment boundary, as indices and arrival times only."""

from __future__ import annotations


class RebatchBuffer:
    """Requests whose live row waits to run one segment, oldest first, with the pass number at which each came."""

    def __init__(self) -> None:
        self._since: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._since

    def add(self, request_id: str, pass_number: int) -> None:
        """A live row arrives."""
        assert request_id not in self._since
        self._since[request_id] = pass_number

    def discard(self, request_id: str) -> None:
        """A live row leaves, if it is here: flushed, or its request ended or was preempted."""
        self._since.pop(request_id, None)

    def oldest_age(self, pass_number: int) -> int:
        """Passes that the longest-waiting row has waited; 0 when empty."""
        first = next(iter(self._since.values()), pass_number)
        return pass_number - first

    def oldest_first(self) -> list[str]:
        """Request ids in order of arrival."""
        return list(self._since)
