"""While an engine serves, the garbage collector passes over what was there before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from drex import LLM, SamplingParams
from drex.engine.heap import settled_heap


class Ring:
    """Garbage that only the collector can take."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    # An engine of another module's tests may be serving in a thread.
    gc.unfreeze()
    yield
    assert gc.get_freeze_count() == 0


def test_what_was_there_is_left_alone_until_the_end_and_what_is_made_within_is_collected() -> None:
    before = Ring()
    kept = weakref.ref(before)
    with settled_heap():
        made = weakref.ref(Ring())
        del before
        gc.collect()
        assert made() is None
        assert kept() is not None
    gc.collect()
    assert kept() is None


def test_a_heap_that_is_frozen_already_stays_frozen() -> None:
    with settled_heap():
        with settled_heap():
            pass
        assert gc.get_freeze_count() > 0


def test_a_stream_that_is_closed_early_gives_the_heap_back() -> None:
    llm = LLM(profile="nominal")
    stream = llm.stream("import os\n", SamplingParams(temperature=0, max_tokens=8))
    next(stream)
    assert gc.get_freeze_count() > 0
    stream.close()
