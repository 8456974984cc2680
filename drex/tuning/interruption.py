"""Ctrl-C and SIGTERM as something to be asked about, so that a step of training is never torn."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTED = b"\nstopping after this step, to save it; once more stops at once\n"


class Stopped(KeyboardInterrupt):
    """The user stopped a run that has been saved; says how it goes on. `signal_number` is what stopped it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Interruption:
    """A context in which the first SIGINT or SIGTERM is noted; a second one does what it did before.

    Outside of the main thread, where no signal arrives, nothing is noted.

    Attributes:
        signal_number: what was noted, or None.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()
        # A handler may run in the middle of a write to sys.stderr, which must not be entered twice.
        os.write(2, NOTED)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
