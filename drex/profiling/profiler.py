"""Measures what passes take on the machine at hand, and fits the profile that decisions are read from.

Made-up passes run through the real segment runner, over K/V slots that nobody uses yet, and find the caches as they do
while serving. Times are means over rounds of medians of repetitions, in seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from drex.compute.device import device_name
from drex.compute.segments import SegmentRunner
from drex.config import EngineConfig, ExitRule
from drex.control.cost.profile import Curve, Profile, SegmentCost, mean_cost
from drex.control.plan import NO_ENTRIES, Contexts, Draws, Evaluations, IntArray, Pass, Rows, ragged
from drex.progress import Progress
from drex.sampling_params import SamplingParams

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
ROUNDS = 2
"""All is measured so often, and averaged: a slow moment of the machine then meets no point twice."""
REPEATS = (3, 5)
POINT_SECONDS = 0.03
"""Repetitions of one measurement stop at the larger number, or at the smaller one once they took this long."""
LONG_SECONDS = 0.3
"""What takes so long on a CPU needs no run that warms up. (On a GPU it may have been compiled.)"""
MOST_SCATTER = 0.25
"""Share of their mean by which rounds may differ at the median point."""
MOST_DIP = 0.25
"""Share by which a tenth of the passes may be cheaper than others over fewer rows, since kernels differ by width."""
CONTEXT = 48
LONG_CONTEXT = 8
"""How many times as long the contexts are that tell what an entry costs."""
TINY = 1e-7


class Measured(NamedTuple):
    """A profile that was measured.

    Attributes:
        profile: the means of all rounds.
        noise: why it should not be kept, in words; None if it can be.
    """

    profile: Profile
    noise: str | None


def noise(rounds: Sequence[Sequence[SegmentCost]]) -> str | None:
    """What rounds of measurements say of how steady the machine was, in words; None if it was steady enough.

    Args:
        rounds: costs of all segments, a list a round.
    """
    scatters, dips = [], []
    for costs in zip(*rounds, strict=True):
        seconds = np.array([cost.rows.seconds for cost in costs])
        mean = seconds.mean(0)
        scatters.append(np.ptp(seconds, axis=0) / mean)
        # How far each point lies below the dearest one of fewer rows.
        dips.append(1 - mean / np.maximum.accumulate(mean))
    scatter, dip = np.median(np.concatenate(scatters)), np.quantile(np.concatenate(dips), 0.9)
    if scatter > MOST_SCATTER:
        return f"its rounds differ by {scatter:.0%} at the median"
    if dip > MOST_DIP:
        return f"a tenth of the passes came out at least {dip:.0%} cheaper than others over fewer rows"
    return None


class Profiler:
    """Runs made-up passes.

    Args:
        runner: of the model; its K/V slots are overwritten.
        config: for the largest passes.
        rule: of the exits, for what a check costs.
        kv_fill: `project` also has its K/V-only rows measured.
    """

    def __init__(self, runner: SegmentRunner, config: EngineConfig, rule: ExitRule, kv_fill: str) -> None:
        self.runner, self.config, self.kv_fill = runner, config, kv_fill
        self.layout = runner.layout
        params = SamplingParams(temperature=0.0)
        self._draws = Draws("", rule, params, 0, 0, (0,) * config.max_model_len, 0)

    def measure(self) -> Measured:
        """Measure all segments, with the number of threads that torch has now."""
        most = self.config.max_num_batched_tokens
        largest = min(most, 2 * self.config.max_num_seqs + self.config.fill_rows)
        # Passes that replay graphs take as long as the next larger graph.
        buckets = self.runner.buckets
        counts = [*buckets, *(count for count in GRID if not buckets or count > buckets[-1])]
        grid = [count for count in counts if count < largest] + [largest]
        segments = range(len(self.layout.lengths))
        self._write_entries(largest)
        with Progress("measuring this machine", ROUNDS * len(segments) * len(grid)) as bar:
            rounds = [[self._segment(segment, grid, bar.advance) for segment in segments] for _ in range(ROUNDS)]
        threads = torch.get_num_threads() if self._on_cpu else None
        costs = tuple(map(mean_cost, zip(*rounds, strict=True)))
        return Measured(Profile(costs, threads, device_name(self.runner.decoder.device)), noise(rounds))

    @property
    def _on_cpu(self) -> bool:
        return self.runner.decoder.device.type == "cpu"

    def try_largest(self) -> None:
        """Run the passes that need the most memory: all rows that one may have, and all heads that one may evaluate."""
        for segment in range(len(self.layout.lengths)):
            self.runner.run(self._prompt(segment, min(self.config.max_num_batched_tokens, self._room(segment))))
            ask = self._evaluations(np.arange(self.config.max_num_seqs))
            hidden = self.hidden(len(ask))
            self.runner.evaluate(segment, hidden, hidden, ask)

    def full_depth_seconds(self, rows: int) -> float:
        """One token for each of so many requests, through all segments, exit heads left out."""
        last = len(self.layout.lengths) - 1
        passes = [self.decode_pass(s, rows, self._context(s, rows), rows if s == last else 0) for s in range(last + 1)]
        return self._time(lambda: [self.runner.run(each) for each in passes])

    def _segment(self, segment: int, grid: list[int], advance: Callable[[], None]) -> SegmentCost:
        widest = min(self.config.max_num_seqs, self._room(segment))
        live = [count for count in grid if count < widest] + [widest]
        head = {count: self.head_seconds(segment, count) for count in live}
        entry = self._entry(segment, min(8, widest))
        # The last segment runs its last layer for evaluated rows only, so there all are, and the head is taken off.
        final = segment == len(self.layout.lengths) - 1
        apart, together = {}, {}
        for count in grid:
            if count in head:
                context = self._context(segment, count)
                seconds = self.time_pass(self.decode_pass(segment, count, context, count if final else 0))
                apart[count] = seconds - (head[count] if final else 0.0) - entry * count * context
            if count <= self._room(segment):
                seconds = self.time_pass(self._prompt(segment, count))
                together[count] = seconds - head[1] - entry * count
            advance()
        further = [(apart[n] - together[n]) / (n - 1) for n in live if n > 1 and n in together]
        span = max(0.0, statistics.median(further)) if further else 0.0
        rows = {n: seconds for n, seconds in together.items() if n > widest}
        rows.update({n: seconds - span * (n - 1) for n, seconds in apart.items()})
        return SegmentCost(
            _curve(_stepped(rows, self.runner.buckets)), _curve(head), span, entry, self._kv_row(segment, widest)
        )

    def head_seconds(self, segment: int, rows: int) -> float:
        """Evaluations of so many rows, after layers whose weights have taken the head's place in the caches."""
        ask, hidden = self._evaluations(np.arange(rows)), self.hidden(rows)
        layers = self.decode_pass(segment, 1, self._context(segment, 1), 0)
        return self._time(
            lambda: self.runner.evaluate(segment, hidden, hidden, ask), before=lambda: self.runner.run(layers)
        )

    def hidden(self, rows: int) -> torch.Tensor:
        decoder = self.runner.decoder
        return torch.zeros(rows, decoder.spec.hidden_size, device=decoder.device, dtype=decoder.dtype)

    def _entry(self, segment: int, rows: int) -> float:
        """A K/V entry that attention reads."""
        short = self._context(segment, rows)
        long = min(short * LONG_CONTEXT, self._room(segment) // rows, self.config.max_model_len)
        if long <= short:
            return 0.0
        near, far = (self.time_pass(self.decode_pass(segment, rows, context, 1)) for context in (short, long))
        return max(0.0, (far - near) / (rows * (long - short)))

    def _kv_row(self, segment: int, rows: int) -> float:
        """A row that only writes K/V."""
        if self.kv_fill != "project" or segment == 0:
            return 0.0
        rows = min(rows, 16, self._room(segment) // (2 * CONTEXT)) or 1
        context = self._context(segment, 2 * rows)
        plain, more = (self.time_pass(self.decode_pass(segment, rows, context, 1, fills)) for fills in (0, rows))
        return max(0.0, (more - plain) / rows)

    # Made-up passes

    def _write_entries(self, largest: int) -> None:
        """Write the K/V that is going to be read, for passes of up to so many rows.

        Memory of a CPU that was never written is one page of zeros, which no cache ever misses.
        """
        used = max(largest, CONTEXT * max(self.config.max_num_seqs, 8 * LONG_CONTEXT))
        for segment in range(len(self.layout.lengths)):
            room = self._room(segment)
            for start in range(0, self.layout.parts(segment) * room, room):
                self.runner.pool.memory[:, :, start : start + min(used, room)] = 0

    def _room(self, segment: int) -> int:
        """Positions that fit into the pool at a segment."""
        return self.runner.pool.num_cells // self.layout.parts(segment)

    def _context(self, segment: int, rows: int) -> int:
        return max(1, min(CONTEXT, self._room(segment) // rows, self.config.max_model_len))

    def decode_pass(self, segment: int, rows: int, context: int, asked: int, fills: int = 0) -> Pass:
        """Rows of as many requests, the first `asked` of them evaluated, the first `fills` with a K/V-only row."""
        stops = np.full(rows, context)
        return self._pass(segment, stops - 1, stops, np.arange(rows) * context, np.arange(asked), fills)

    def _prompt(self, segment: int, rows: int) -> Pass:
        """Rows of one request from its start; in chunks of the longest request where there are more rows than that."""
        longest = self.config.max_model_len
        stops = np.array([longest] * (rows // longest) + ([rows % longest] if rows % longest else []))
        return self._pass(segment, np.zeros_like(stops), stops, stops.cumsum() - stops, np.array([rows - 1]), 0)

    def _pass(
        self, segment: int, starts: IntArray, stops: IntArray, cells: IntArray, asked: IntArray, fills: int
    ) -> Pass:
        """Spans [start, stop) of requests whose cells start at `cells` of each part; `asked` of their rows."""
        span, positions = ragged(starts, stops)
        parts = np.arange(self.layout.parts(segment))[:, None] * self._room(segment)
        arena = np.arange(len(positions) + fills) % max(1, len(self.runner.arena))
        where = parts + cells[span] + positions
        return Pass(
            number=0,
            segment=segment,
            starts=starts,
            stops=stops,
            sizes=stops - starts,
            full=Rows(positions, arena[: len(positions)], where),
            visible=positions + 1,
            tokens=np.zeros(len(positions) if segment == 0 else 0, dtype=np.int64),
            fill=Rows(positions[:fills], arena[len(positions) :], where[:, :fills]),
            context=Contexts(np.zeros_like(stops), stops, np.ones(len(stops), np.bool_), parts + cells, NO_ENTRIES),
            evaluations=self._evaluations(asked),
        )

    def _evaluations(self, rows: IntArray) -> Evaluations:
        count = len(rows)
        agreeing = np.zeros((2, count), dtype=np.int64)
        return Evaluations(rows, np.zeros_like(rows), np.ones(count), [self._draws] * count, agreeing, {}, {})

    # Time

    def time_pass(self, batch: Pass) -> float:
        return self._time(lambda: self.runner.run(batch))

    def _time(self, action: Callable[[], object], before: Callable[[], object] | None = None) -> float:
        def once() -> float:
            if before is not None:
                before()
            return self._once(action)

        first = once()
        times = [first] if first > LONG_SECONDS and self._on_cpu else []
        least, most = REPEATS
        while len(times) < most and (len(times) < least or sum(times) < POINT_SECONDS):
            times.append(once())
        return statistics.median(times)

    def _once(self, action: Callable[[], object]) -> float:
        self.runner.synchronize()
        started = time.perf_counter()
        action()
        self.runner.synchronize()
        return time.perf_counter() - started


def choose_threads(profiler: Profiler, limit: int) -> int:
    """The number of CPU threads with the best full-depth speed over 1, 8 and 32 requests; sets it."""
    candidates = sorted({1, max(1, limit // 2), limit})
    counts = [count for count in (1, 8, 32) if count <= profiler.config.max_num_seqs]
    scores = {}
    for threads in candidates:
        torch.set_num_threads(threads)
        scores[threads] = statistics.geometric_mean([profiler.full_depth_seconds(count) for count in counts])
    best = min(scores, key=lambda threads: scores[threads])
    torch.set_num_threads(best)
    return best


def _stepped(points: dict[int, float], buckets: Sequence[int]) -> dict[int, float]:
    """Between two buckets passes take as long as at the larger one."""
    known = [count for count in buckets if count in points]
    return {**points, **{smaller + 1: points[larger] for smaller, larger in pairwise(known)}}


def _curve(points: dict[int, float]) -> Curve:
    counts = sorted(points)
    return Curve(tuple(map(float, counts)), tuple(max(TINY, points[count]) for count in counts))
