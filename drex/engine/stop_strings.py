"""Finds the first stop string in a text that grows, at a cost that depends on the new characters only."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Searches one growing text for the first occurrence of any stop string (Knuth-Morris-Pratt, one state a string).

    A stop string's state is the length of the longest end of the text that the string starts with. States other than 0
    are kept, and failure tables are filled only as far as a match has come, so that long stop strings cost nothing
    until the text begins to look like them.

    Args:
        stops: non-empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._starting: dict[str, list[int]] = {}
        for number, stop in enumerate(stops):
            self._starting.setdefault(stop[0], []).append(number)
        self._stops = tuple(stops)
        self._failures: list[list[int]] = [[0, 0] for _ in stops]
        self._states: dict[int, int] = {}

    def feed(self, piece: str, may_stop: bool = True) -> tuple[int, str] | None:
        """Take in the text's next characters; the characters behind a match are ignored.

        Args:
            piece: new text.
            may_stop: False lets stop strings that are completed in `piece` pass.

        Returns:
            How many characters of `piece` there are up to the end of the stop string that is completed first, and that
            string, the longest where several end there; None if no stop string is completed.
        """
        if not self._starting:
            return None
        for at, character in enumerate(piece, 1):
            if not self._states and character not in self._starting:
                continue
            found = self._advance(character)
            if found and may_stop:
                return at, max(found, key=len)
        return None

    @property
    def undecided(self) -> int:
        """Characters at the end of the text that could still become a stop string."""
        return max(self._states.values(), default=0)

    def _advance(self, character: str) -> list[str]:
        """The stop strings that one more character completes."""
        found, states = [], {}
        for number in self._states.keys() | self._starting.get(character, ()):
            stop = self._stops[number]
            state = self._next_state(number, self._states.get(number, 0), character)
            if state == len(stop):
                found.append(stop)
                state = self._failure(number, state)
            if state:
                states[number] = state
        self._states = states
        return found

    def _next_state(self, number: int, state: int, character: str) -> int:
        stop = self._stops[number]
        while state and stop[state] != character:
            state = self._failure(number, state)
        return state + 1 if stop[state] == character else 0

    def _failure(self, number: int, length: int) -> int:
        """Length of the longest proper end of a stop string's first `length` characters that it also starts with."""
        stop, table = self._stops[number], self._failures[number]
        while len(table) <= length:
            character, state = stop[len(table) - 1], table[-1]
            while state and stop[state] != character:
                state = table[state]
            table.append(state + 1 if stop[state] == character else 0)
        return table[length]
