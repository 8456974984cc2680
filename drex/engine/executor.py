"""Executors run passes and own time. The engine talks to them through this protocol only."""

from __future__ import annotations

from typing import Protocol

from drex.control.plan import Pass, PassResult


class Executor(Protocol):
    """Runs passes in the order in which they were submitted.

    Attributes:
        asynchronous: whether a pass runs beside this thread from `submit` on.
    """

    asynchronous: bool

    def now(self) -> float:
        """The time, in seconds from some start."""

    def wait_until(self, moment: float) -> None:
        """Let time pass; nothing is under way."""

    def submit(self, batch: Pass) -> None:
        """Start a pass."""

    def collect(self) -> PassResult:
        """Wait for the oldest pass that was submitted and not yet collected."""

    def abandon(self) -> None:
        """Forget the passes that were submitted and not yet collected; nothing runs any more when this returns."""
