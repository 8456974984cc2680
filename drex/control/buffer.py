"""The rebatching buffer: requests whose live row waits at a segment boundary. No states move in or out, only names."""

from __future__ import annotations

from collections.abc import Iterator

from drex.request import Request


class RebatchBuffer:
    """Requests whose live row waits to run one segment; since which pass, they note themselves in `waits_since`.

    Attributes:
        fills: rows that these requests owe at the segment beside their live rows.
    """

    def __init__(self, segment: int) -> None:
        self.segment = segment
        self.fills = 0
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._requests

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def add(self, request: Request) -> None:
        """A live row arrives, or is back from a pass that did other work of its request."""
        assert request.request_id not in self._requests
        self._requests[request.request_id] = request
        self.fills += request.pending(self.segment) - 1

    def discard(self, request: Request) -> None:
        """A live row leaves."""
        del self._requests[request.request_id]
        self.fills -= request.pending(self.segment) - 1

    def oldest_age(self, pass_number: int) -> int:
        """Passes that the longest-waiting row has waited; 0 when empty."""
        return pass_number - min([since(request) for request in self], default=pass_number)

    def oldest_first(self) -> list[Request]:
        """Requests in order of arrival here."""
        return sorted(self, key=since)

    def earliest_due(self) -> float:
        """When the first of the tokens that wait here is due; infinite if none is."""
        return min([request.due for request in self], default=float("inf"))


def since(request: Request) -> int:
    """The pass at which a waiting request joined its buffer."""
    assert request.waits_since is not None
    return request.waits_since[1]
