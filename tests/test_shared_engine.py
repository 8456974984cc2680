"""One LLM that several threads call, and calls that are interrupted anywhere: the others get what is theirs."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

import pytest
from test_asynchronous import told

import drex
from drex import LLM, EarlyExit, SamplingParams
from drex.engine.async_engine import AsyncEngine
from drex.engine.client import EngineReservedError
from drex.engine.streams import EngineStoppedError

PROMPTS = [[5, 9, 11], [40, 3], [7, 7, 7, 7, 8], [23]]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, max_tokens=15, seed=4, n=2),
    SamplingParams(temperature=0.7, max_tokens=9, seed=1, presence_penalty=0.4),
    SamplingParams(temperature=1.0, max_tokens=14, seed=8, top_p=0.8),
]
SOURCE = str(Path(drex.__file__).parent)
BOTH = pytest.mark.parametrize("overlapping", [False, True], ids=["one_by_one", "overlapping"])


@pytest.fixture(params=["byte_level", "byte_fallback"])
def folder(request, text_model, byte_fallback_model):
    """A random model, with a tokenizer of either kind."""
    return {"byte_level": text_model, "byte_fallback": byte_fallback_model}[request.param]


def made(folder, *, overlapping=False, **settings):
    exits = EarlyExit(layers=[2, 4], thresholds=0.4)
    llm = LLM(folder, **{"early_exit": exits, "dtype": "float64", "max_num_seqs": 4, **settings})
    llm.engine.executor.asynchronous = overlapping
    return llm


# Threads


@BOTH
@pytest.mark.parametrize("kv_cache_tokens", [40, 200])
def test_calls_of_several_threads_each_get_what_they_get_alone(folder, overlapping, kv_cache_tokens):
    alone, shared = (made(folder, overlapping=overlapping, kv_cache_tokens=n) for n in (200, kv_cache_tokens))
    expected = [told(alone.generate([prompt], [params])) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    scored = alone.score(PROMPTS[2], early_exit=EarlyExit())[0].exit_layers
    wrong, ready = [], threading.Barrier(5)

    def generate(number):
        ready.wait(30)
        for _ in range(3):
            got = told(shared.generate([PROMPTS[number]], [PARAMS[number]]))
            if got != expected[number]:
                wrong.append((number, got))
        chunks = list(shared.stream([PROMPTS[number]], PARAMS[number]))
        for index, (_, _, tokens) in enumerate(expected[number][0]):
            streamed = [
                (token.id, token.exit_layer) for chunk in chunks if chunk.index == index for token in chunk.tokens
            ]
            if streamed != tokens:
                wrong.append((number, index, streamed))

    def score():
        ready.wait(30)
        for _ in range(5):
            if shared.score(PROMPTS[2], early_exit=EarlyExit())[0].exit_layers != scored:
                wrong.append("scored")

    threads = [threading.Thread(target=generate, args=(number,), daemon=True) for number in range(4)]
    threads.append(threading.Thread(target=score, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert not shared.engine.busy
    shared.engine.scheduler.check_integrity()


def test_an_engine_that_serves_an_event_loop_refuses_other_callers(folder):
    llm = made(folder)

    class Nobody:
        def passed(self, record): ...
        def emitted(self, event, timing, now): ...
        def aborted(self, request, timing): ...

    async def serve():
        engine = AsyncEngine(llm.engine, Nobody())
        engine.start()
        with pytest.raises(EngineReservedError, match=r"this engine serves an AsyncEngine .*: send requests there"):
            llm.generate([PROMPTS[0]], PARAMS[0])
        with pytest.raises(RuntimeError, match="the engine is in use"):
            AsyncEngine(llm.engine, Nobody()).start()
        await engine.stop()

    expected = told(llm.generate([PROMPTS[0]], PARAMS[0]))
    asyncio.run(serve())
    assert told(llm.generate([PROMPTS[0]], PARAMS[0])) == expected
    stream = llm.stream([PROMPTS[0]], PARAMS[0])
    next(stream)
    with pytest.raises(RuntimeError, match="the engine is in use"):
        asyncio.run(serve())


@pytest.mark.parametrize("busy", [False, True])
def test_a_loop_that_is_closed_without_stop_ends_the_engines_thread(folder, busy, monkeypatch):
    monkeypatch.setattr("drex.engine.async_engine.LOOP_CHECK_SECONDS", 0.05)
    llm = made(folder)

    class Nobody:
        def passed(self, record): ...
        def emitted(self, event, timing, now): ...
        def aborted(self, request, timing): ...

    engine = AsyncEngine(llm.engine, Nobody())
    expected = told(llm.generate([PROMPTS[0]], PARAMS[0]))

    async def leave():
        engine.start()
        if busy:
            engine.submit(llm.inputs.requests([5, 6], SamplingParams(max_tokens=40, ignore_eos=True)))
            await asyncio.sleep(0)

    async def come_back():
        with pytest.raises(EngineStoppedError, match=r"the event loop .* has been closed"):
            engine.submit(llm.inputs.requests([5, 6], PARAMS[0]))
        with pytest.raises(EngineStoppedError, match=r"the event loop .* has been closed"):
            await engine.ask(lambda _: None)
        await engine.stop()

    asyncio.run(leave())
    engine._thread.join(20)
    assert not engine._thread.is_alive()
    asyncio.run(come_back())
    assert told(llm.generate([PROMPTS[0]], PARAMS[0])) == expected
    llm.engine.scheduler.check_integrity()


# Interruptions


class Interruption:
    """Raises KeyboardInterrupt at one of the lines that drex runs, as a signal would.

    Args:
        at: number of the line, from 1; None only counts.

    Attributes:
        lines: how many were run.
    """

    def __init__(self, at=None):
        self.at, self.lines, self.where = at, 0, ""

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)

    def _call(self, frame, event, _):
        return self._line if frame.f_code.co_filename.startswith(SOURCE) else None

    def _line(self, frame, event, _):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


@BOTH
@pytest.mark.parametrize("part", range(3))
def test_an_interruption_at_any_line_leaves_an_engine_that_serves(folder, overlapping, part):
    """Another stream that is open beside the interrupted call goes on to its end, or is told that it was ended."""
    llm = made(folder, overlapping=overlapping, kv_cache_tokens=60)
    expected = told(llm.generate(PROMPTS, PARAMS))
    beside = [token for _, _, tokens in told(llm.generate([PROMPTS[1]], PARAMS[1]))[0] for token in tokens]
    with Interruption() as counting:
        assert told(llm.generate(PROMPTS, PARAMS)) == expected
    parts, points = 3, 36
    for at in range(1 + part, counting.lines, counting.lines // points * parts):
        stream = llm.stream([PROMPTS[1]], PARAMS[1])
        chunks = [next(stream)]
        with pytest.raises(KeyboardInterrupt), Interruption(at) as interruption:
            llm.generate(PROMPTS, PARAMS)
        chunks += stream
        ends = {chunk.index: chunk for chunk in chunks if chunk.finish_reason is not None}
        assert sorted(ends) == [0, 1], interruption.where
        if all(chunk.error is None for chunk in ends.values()):
            got = [
                (token.id, token.exit_layer)
                for index in (0, 1)
                for chunk in chunks
                if chunk.index == index
                for token in chunk.tokens
            ]
            assert got == beside, interruption.where
        assert told(llm.generate(PROMPTS, PARAMS)) == expected, interruption.where
        assert not llm.engine.busy, interruption.where
        llm.engine.scheduler.check_integrity()
