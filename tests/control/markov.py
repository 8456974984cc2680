"""Average-reward semi-Markov decision processes, small and slow: what the yardstick is checked against.

Written from the definition, with nothing of drex.control.policy.yardstick. With N decoding requests the state is how
many of them wait at each exit point, all others being ready; running a segment takes what its rows take, decides as
many tokens as rows exit (at the last segment: all), and the others wait at the next exit point.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
State = tuple[int, ...]


@dataclass(frozen=True)
class Process:
    """States, the empty buffers first, and what can be done in them: everything but `states` has a row an action.

    Attributes:
        states: how many wait at each exit point.
        owner: the number of the state that an action belongs to.
        segment: that it runs.
        tokens, seconds: means.
        moves: how likely each state comes next; (actions, states).
    """

    states: list[State]
    owner: Ints
    segment: Ints
    tokens: Floats
    seconds: Floats
    moves: Floats


def process(exit_rates: Sequence[float], times: Sequence[Floats]) -> Process:
    """All that can be done: run segment 0 on all that are ready, or flush any buffer.

    Args:
        exit_rates: at each exit point.
        times: seconds of a pass over each segment, by its live rows; (N + 1,).
    """
    return _build(exit_rates, times, lambda state: _possible(state, len(times[0]) - 1))


def earned(
    exit_rates: Sequence[float], times: Sequence[Floats], decide: Callable[[State], tuple[int, int]]
) -> tuple[float, Floats]:
    """Tokens a second of a stationary policy, and its relative values by state.

    Args:
        exit_rates, times: as for `process`.
        decide: state -> segment, and how many of the ready rows where that is 0.
    """
    chain = _build(exit_rates, times, lambda state: [decide(state)])
    solved = _solve(chain.moves, chain.tokens, chain.seconds)
    return float(solved[0]), np.concatenate(([0.0], solved[1:]))


def best_by_brute_force(what: Process) -> float:
    """The rate of the best of all stationary policies, each of them evaluated."""
    actions = [np.flatnonzero(what.owner == n) for n in range(len(what.states))]
    policies = np.array(list(itertools.product(*actions)))
    return float(_solve(what.moves[policies], what.tokens[policies], what.seconds[policies])[:, 0].max())


def best_by_value_iteration(what: Process, tolerance: float = 1e-8) -> float:
    """The optimal rate, bounded from both sides, by relative value iteration on a discrete-time chain.

    The data transformation of Schweitzer (1971) has the same rate: a step of it takes one unit of time, earns
    tokens / seconds, and moves by δ (P - 1) / seconds, with δ so small that these are chances (Puterman, 11.4).
    """
    stays = what.moves[np.arange(len(what.owner)), what.owner]
    delta = 0.999 * float((what.seconds / np.maximum(1e-12, 1 - stays)).min())
    step = delta / what.seconds
    gains = what.tokens / what.seconds
    starts = np.flatnonzero(np.diff(what.owner, prepend=-1))
    values = np.zeros(len(what.states))
    for _ in range(200_000):
        worth = gains * delta + step * (what.moves @ values - values[what.owner])
        growth = np.maximum.reduceat(worth, starts)
        values = values + growth
        values -= values[0]
        if growth.max() - growth.min() <= tolerance * growth.max():
            return float(growth.max() + growth.min()) / 2 / delta
    raise AssertionError("value iteration does not converge")


def _solve(moves: Floats, tokens: Floats, seconds: Floats) -> Floats:
    """v + θ t = r + P v with v of the first state 0; θ stands in its place. Leading axes are policies."""
    system = np.eye(moves.shape[-1]) - moves
    system[..., 0] = seconds
    out: Floats = np.linalg.solve(system, tokens[..., None])[..., 0]
    return out


def _possible(state: State, count: int) -> Iterator[tuple[int, int]]:
    if sum(state) < count:
        yield 0, count - sum(state)
    for exit_point, waiting in enumerate(state):
        if waiting:
            yield exit_point + 1, waiting


def _build(
    exit_rates: Sequence[float], times: Sequence[Floats], options: Callable[[State], Iterator[tuple[int, int]] | list]
) -> Process:
    count, exits = len(times[0]) - 1, len(exit_rates)
    states = [s for s in itertools.product(range(count + 1), repeat=exits) if sum(s) <= count]
    number = {state: n for n, state in enumerate(states)}
    found = [(n, *option) for n, state in enumerate(states) for option in options(state)]
    moves = np.zeros((len(found), len(states)))
    tokens, seconds = np.zeros(len(found)), np.zeros(len(found))
    for row, (owner, segment, rows) in enumerate(found):
        waits = list(states[owner])
        rows = rows if segment == 0 else waits[segment - 1]
        seconds[row] = times[segment][rows]
        if segment:
            waits[segment - 1] = 0
        if segment == exits:
            tokens[row] = rows
            moves[row, number[tuple(waits)]] = 1.0
            continue
        tokens[row] = exit_rates[segment] * rows
        for going, chance in enumerate(binomial(rows, 1 - exit_rates[segment])):
            moves[row, number[(*waits[:segment], waits[segment] + going, *waits[segment + 1 :])]] = chance
    owners, segments, _ = (np.array(column) for column in zip(*found, strict=True))
    return Process(states, owners, segments, tokens, seconds, moves)


@functools.lru_cache(maxsize=4096)
def binomial(count: int, chance: float) -> Floats:
    """How likely each number of successes is."""
    return np.array([math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(count + 1)])
