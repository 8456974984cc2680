"""CPU time that other processes took while something was measured: what makes its times too long, and scatter."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path

STAT = Path("/proc/stat")
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""user, nice, system, irq, softirq and steal of a line of /proc/stat; what guests took is in user."""


class OtherLoad:
    """Watches the cores that this process may run on, from when it is made.

    Args:
        stat: the kernel's counters, in the form of Linux's /proc/stat.
    """

    def __init__(self, stat: Path = STAT) -> None:
        self._stat, self._cores = stat, os.sched_getaffinity(0)
        self._began, self._busy, self._own = time.perf_counter(), busy_seconds(stat, self._cores), _own_seconds()

    def share(self) -> float | None:
        """Share of the cores' time since then that others took, from 0 to 1; None where the kernel doesn't say."""
        busy = busy_seconds(self._stat, self._cores)
        if busy is None or self._busy is None:
            return None
        took, own = busy - self._busy, _own_seconds() - self._own
        if took < own / 2:  # counters that leave out this process say nothing of others
            return None
        return min(1.0, max(0.0, took - own) / ((time.perf_counter() - self._began) * len(self._cores)))


def busy_seconds(stat: Path, cores: Collection[int]) -> float | None:
    """Seconds that some cores have worked since the machine started; None where the file doesn't say.

    Args:
        stat: in the form of /proc/stat.
        cores: their numbers.
    """
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
        found = {words[0]: words[1:] for words in lines if words}
        ticks = sum(int(found[f"cpu{core}"][field]) for core in cores for field in BUSY_FIELDS)
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    took = os.times()
    return took.user + took.system + took.children_user + took.children_system
