"""How far some work is and how long it still takes, on standard error; results on standard output stay alone.

A bar on a terminal; elsewhere a plain line every few seconds, once the work has taken longer than anybody waits gladly.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

FIRST_LINE_SECONDS = 3.0
"""Work that is done sooner writes no line."""
LINE_SECONDS = 5.0
"""Between two lines."""


class Progress:
    """Shows the share of some work that is done, and the time left; a context that begins and ends showing it.

    Args:
        text: what is done, as in `scoring`.
        total: units of work; `grow` adds more that turn up later.
        show: False shows nothing.
        lines: write lines on a terminal too, because results are written to it meanwhile.
        file: where to; None is standard error. A terminal gets a bar, anything else lines.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        text: str,
        total: float,
        *,
        show: bool = True,
        lines: bool = False,
        file: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._text, self._total, self._done, self._show, self._now = text, total, 0.0, show, now
        self._lines = lines
        self._file = sys.stderr if file is None else file
        self._began, self._said = now(), -float("inf")
        self._status = ""
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Progress:
        console = Console(file=self._file)
        if self._show and not self._lines and self._file.isatty() and not console.is_dumb_terminal:
            columns = (
                *(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()),
                *(TextColumn("{task.fields[status]}"), TimeRemainingColumn()),
            )
            # What is printed meanwhile is a result: it goes to standard output, wherever that leads.
            self._bar = Bar(*columns, console=console, transient=True, redirect_stdout=False)
            self._task = self._bar.add_task(self._text, total=self._total, status="")
            self._bar.start()
        self._began = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def grow(self, units: float) -> None:
        """Add units of work to be done."""
        self._total += units
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    def advance(self, units: float = 1.0, status: str = "") -> None:
        """Note units of work as done.

        Args:
            units: of work.
            status: a few words on it, shown from now on; empty leaves what was shown.
        """
        self._done += units
        self._status = status or self._status
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, status=self._status)
        elif self._show:
            self._line()

    def _line(self) -> None:
        now = self._now()
        if now - self._began < FIRST_LINE_SECONDS or now - self._said < LINE_SECONDS:
            return
        if not 0 < self._done < self._total:
            return
        self._said = now
        left = (now - self._began) * (self._total - self._done) / self._done
        said = f", {self._status}" if self._status else ""
        self._file.write(f"{self._text}: {self._done / self._total:.0%}, {spell(left)} left{said}\n")
        self._file.flush()


def spell(seconds: float) -> str:
    """A duration in words: 8 s, 2 min 5 s, 3 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
