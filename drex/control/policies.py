"""Which segment runs next, given what is ready at each. A policy sees counts, never requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from drex.config import EngineConfig


@dataclass(frozen=True)
class Ready:
    """What could run now.

    Attributes:
        shallow: requests with rows for segment 0 that fit.
        buffered: for each segment, live rows that wait for it (entry 0 is 0).
        urgent: for each segment, requests whose prompt, replay or first token stands before it.
        oldest_age: for each segment, passes that its oldest buffered row has waited.
        decoding: requests that have their first token.
    """

    shallow: int
    buffered: tuple[int, ...]
    urgent: tuple[int, ...]
    oldest_age: tuple[int, ...]
    decoding: int


Policy = Callable[[Ready, EngineConfig], int | None]


def split(ready: Ready, config: EngineConfig) -> int | None:
    """Flush at once: what stands deepest goes first. Returns a segment, or None if nothing is ready."""
    for segment in range(len(ready.buffered) - 1, 0, -1):
        if ready.buffered[segment] or ready.urgent[segment]:
            return segment
    return 0 if ready.shallow else None


def drex(ready: Ready, config: EngineConfig) -> int | None:
    """Flush a buffer that holds a fixed share of the decoding requests, or a row that waited too long.

    Prompts go through at once and take the buffered rows of the segment along. Nothing else ready: flush what there is.
    """
    deepest_first = range(len(ready.buffered) - 1, 0, -1)
    # Every buffer may come due in the same pass, and each flush takes one.
    due = config.max_wait_passes - len(ready.buffered)
    for segment in deepest_first:
        if ready.buffered[segment] and ready.oldest_age[segment] >= due:
            return segment
    for segment in deepest_first:
        if ready.urgent[segment] or 0 < config.flush_share * ready.decoding <= ready.buffered[segment]:
            return segment
    if ready.shallow:
        return 0
    fullest = max(deepest_first, key=lambda segment: ready.buffered[segment], default=0)
    return fullest if fullest and ready.buffered[fullest] else None


POLICIES: dict[str, Policy] = {"drex": drex, "split": split, "full": split}
"""`full` has no exit points, hence one segment: there is nothing to choose."""
