"""What an engine in a thread of its own tells its observer: each pass once, the times of each request, who is left."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from drex.config import EngineConfig, ExitRule
from drex.control.cost.model import CostModel
from drex.control.cost.profile import nominal
from drex.control.memory.slots import SlotLayout
from drex.control.request import Request
from drex.control.scheduler import Scheduler
from drex.engine.async_engine import AsyncEngine
from drex.engine.engine import Engine
from drex.engine.metrics import PassRecord
from drex.engine.streams import Event, Stream, Timing
from drex.sampling_params import SamplingParams
from drex.sim.executor import VirtualExecutor

SECONDS = 20.0
"""That a test may take."""


class Log:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.passes: list[int] = []
        self.emitted_at: dict[str, list[tuple[float | None, float]]] = {}
        self.timings: dict[str, Timing] = {}
        self.gone: list[str] = []

    def passed(self, record: PassRecord) -> None:
        self.passes.append(record.number)

    def emitted(self, event: Event, timing: Timing, now: float) -> None:
        name = event.request.request_id
        self.timings[name] = timing
        self.emitted_at.setdefault(name, []).append((timing.latest, now))

    def aborted(self, request: Request, timing: Timing) -> None:
        self.gone.append(request.request_id)


def made(number: int, outputs: int, segments: int = 2) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True)
    return Request(
        f"r{number}",
        (3,) * 4,
        params,
        ExitRule("trace", (0.5,) * (segments - 1)),
        number,
        frozenset(),
        segments,
        arrival=number,
    )


async def read(stream: Stream) -> int:
    """Read a stream to its end; returns how many tokens came."""
    return sum([len(event.chunk.tokens) async for events in stream for event in events])


def served(log: Log, act: Any, lengths: tuple[int, ...] = (2, 2)) -> Engine:
    """Run a coroutine function of an engine that is observed."""
    cost = CostModel(nominal(lengths))
    config = EngineConfig(8192, 4, 512, 20_000)
    engine = Engine(Scheduler(config, SlotLayout(lengths), "recompute", cost), VirtualExecutor(cost.copy()))

    async def run() -> None:
        serving = AsyncEngine(engine, log)
        serving.start()
        try:
            await asyncio.wait_for(act(serving), SECONDS)
        finally:
            await serving.stop()

    asyncio.run(run())
    return engine


@pytest.mark.parametrize("lengths", [(2, 2), (4,)], ids=["two_segments", "one_segment"])
def test_each_pass_is_heard_of_once_and_each_token_with_the_time_of_the_one_before(lengths: tuple[int, ...]) -> None:
    log, segments = Log(), len(lengths)

    async def act(serving: AsyncEngine) -> None:
        outputs = (1, 12, 7, 1, 20, 3)
        found = await asyncio.gather(*(read(serving.submit([made(i, n, segments)])) for i, n in enumerate(outputs)))
        assert tuple(found) == outputs

    engine = served(log, act, lengths)
    assert log.passes == list(range(engine.scheduler.passes))
    for times in log.emitted_at.values():
        befores, nows = zip(*times, strict=True)
        assert befores == (None, *nows[:-1])
    for timing in log.timings.values():
        # With one segment, some end with the pass in which they begin.
        assert timing.started is not None
        assert timing.latest is not None
        assert timing.arrived <= timing.started < timing.latest
    assert not log.gone


def test_requests_that_have_not_ended_are_counted_until_they_end_or_nobody_waits_for_them() -> None:
    log = Log()

    async def act(serving: AsyncEngine) -> None:
        pair = serving.submit([made(0, 3), made(1, 5)])
        assert serving.unfinished == 2
        assert await read(pair) == 3 + 5
        assert serving.unfinished == 0
        long = serving.submit([made(2, 6000), made(3, 2)])
        assert serving.unfinished == 2
        async for events in long:
            if any(event.whole is not None for event in events):
                break
        assert serving.unfinished == 1
        long.close()
        assert serving.unfinished == 0
        # Once more is of no effect.
        long.close()
        assert serving.unfinished == 0
        assert await serving.ask(lambda engine: engine.unfinished) == 0
        assert not serving._jobs
        assert not serving._unstarted

    served(log, act)
    assert log.gone == ["r2"]
