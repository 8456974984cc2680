"""Progress: on standard error, a bar on a terminal and a few plain lines elsewhere."""

from __future__ import annotations

import io
import re

import pytest

from drex.progress import Progress, spell


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(units: int, seconds_each: float, show: bool = True) -> list[tuple[float, str]]:
    """Lines that work writes, off a terminal, and when each came."""
    clock, file = [0.0], io.StringIO()
    found: list[tuple[float, str]] = []
    with Progress("scoring", units, show=show, file=file, now=lambda: clock[0]) as progress:
        for number in range(units):
            clock[0] += seconds_each
            before = file.tell()
            progress.advance(status=f"unit {number + 1}")
            file.seek(before)
            found += [(clock[0], line) for line in file.read().splitlines()]
    return found


def test_lines_off_a_terminal_say_share_and_time_left_every_few_seconds() -> None:
    found = lines_of(units=40, seconds_each=0.5)
    assert found == [
        (3.0, "scoring: 15%, 17 s left, unit 6"),
        (8.0, "scoring: 40%, 12 s left, unit 16"),
        (13.0, "scoring: 65%, 7 s left, unit 26"),
        (18.0, "scoring: 90%, 2 s left, unit 36"),
    ]


def test_short_work_and_work_that_is_not_to_be_shown_write_nothing() -> None:
    assert lines_of(units=29, seconds_each=0.1) == []
    assert lines_of(units=40, seconds_each=0.5, show=False) == []


def test_work_that_turns_up_later_lowers_the_share() -> None:
    clock, file = [0.0], io.StringIO()
    with Progress("looking", 10, file=file, now=lambda: clock[0]) as progress:
        progress.grow(10)
        clock[0] = 10.0
        progress.advance(5)
    assert file.getvalue() == "looking: 25%, 30 s left\n"


def test_a_terminal_gets_a_bar_which_goes_when_the_work_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    file = Terminal()
    with Progress("scoring", 4, file=file) as progress:
        progress.advance(status="half of it")
        progress.advance()
        print("a result")
    drawn = file.getvalue()
    assert "scoring" in drawn
    assert "half of it" in drawn
    assert re.search(r"\b50%", drawn)
    assert drawn.endswith("\x1b[2K")
    # Results stay on standard output while a bar is drawn.
    assert capsys.readouterr().out == "a result\n"


def test_a_terminal_that_takes_results_gets_lines_all_the_same() -> None:
    clock, file = [0.0], Terminal()
    with Progress("generating", 2, lines=True, file=file, now=lambda: clock[0]) as progress:
        clock[0] = 60.0
        progress.advance()
    assert file.getvalue() == "generating: 50%, 1 min 0 s left\n"


def test_durations_are_spelled_in_two_units_at_most() -> None:
    assert [spell(seconds) for seconds in (0.4, 59.4, 125, 11_520)] == ["0 s", "59 s", "2 min 5 s", "3 h 12 min"]
