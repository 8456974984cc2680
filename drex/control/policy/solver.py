"""Solves the decision process of rebatching: the optimum for one exit point and for two.

With N decoding requests the state is how many of them wait at each exit point; going on, or flushing one buffer, is a
decision of a semi-Markov process with average reward (Puterman, Markov Decision Processes, chapter 11): tokens a
second. Arrays are indexed by a count of requests, 0 … N; times are seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from drex.control.constants import LEAST_EXIT_RATE, MOST_EXIT_RATE, POLICY_ITERATION_ROUNDS
from drex.control.plan import BoolArray, FloatArray, IntArray, ragged


@dataclass(frozen=True)
class OneExit:
    """The optimum with one exit point.

    Attributes:
        rate: θ*, tokens a second.
        flush: whether to flush, by how many wait.
        advantage: Q(flush) - Q(go on) in tokens, by how many wait; infinite where only one is possible.
    """

    rate: float
    flush: BoolArray
    advantage: FloatArray


def solve_one_exit(exit_rate: float, shallow: FloatArray, flush: FloatArray) -> OneExit:
    """θ* and the optimal decisions for one exit point, by policy iteration.

    Every flush empties the buffer, so the empty buffer is where each cycle begins. For a given rate θ the best cycle is
    found in one backward sweep over b (a pass never makes the buffer shorter); its tokens over its seconds is the next
    θ, until the best cycle earns just θ.

    Args:
        exit_rate: share of the rows that exit, in [0, 1); 1 is taken as nearly 1.
        shallow: time of a pass over segment 0, by its rows; (N + 1,).
        flush: mean time of a flush, by the rows that wait; (N + 1,).
    """
    count = len(shallow) - 1
    exit_rate = min(exit_rate, MOST_EXIT_RATE)
    going = _binomials(count, 1.0 - exit_rate)
    rate = 0.0
    for _ in range(POLICY_ITERATION_ROUNDS):
        advantage, tokens, seconds = _sweep(rate, exit_rate, shallow, flush, going)
        better = tokens / seconds
        if better <= rate * (1 + 1e-12):
            break
        rate = better
    choose = advantage > 0
    choose[0] = False
    return OneExit(rate, choose, advantage)


def _sweep(
    rate: float, exit_rate: float, shallow: FloatArray, flush: FloatArray, going: FloatArray
) -> tuple[FloatArray, float, float]:
    """Backward induction of one cycle at a given rate.

    Returns:
        Advantage of flushing, by how many wait; tokens and seconds of the cycle.
    """
    count = len(shallow) - 1
    value, tokens, seconds = np.zeros(count + 1), np.zeros(count + 1), np.zeros(count + 1)
    advantage = np.full(count + 1, np.inf)
    value[count], tokens[count], seconds[count] = count - rate * flush[count], count, flush[count]
    for waiting in range(count - 1, -1, -1):
        ready = count - waiting
        moves = going[ready, : ready + 1]  # how many of the ready rows join the buffer
        moving = 1.0 - moves[0]
        ahead = slice(waiting + 1, count + 1)
        go_tokens = (exit_rate * ready + float(moves[1:] @ tokens[ahead])) / moving
        go_seconds = (float(shallow[ready]) + float(moves[1:] @ seconds[ahead])) / moving
        gain = exit_rate * ready - rate * float(shallow[ready])
        go_value = (gain + float(moves[1:] @ value[ahead])) / moving
        now = waiting - rate * float(flush[waiting])
        advantage[waiting] = now - go_value if waiting else -np.inf
        if waiting and now > go_value:
            value[waiting], tokens[waiting], seconds[waiting] = now, waiting, flush[waiting]
        else:
            value[waiting], tokens[waiting], seconds[waiting] = go_value, go_tokens, go_seconds
    return advantage, float(tokens[0]), float(seconds[0])


@dataclass(frozen=True)
class TwoExits:
    """The optimum with two exit points.

    Attributes:
        rate: θ*, units a second.
        choice: the segment to run, by (waiting at 1, waiting at 2), in units.
        worth: of running each segment, in units, by the same; -inf where nothing waits for it.
        units: that the requests are counted in.
    """

    rate: float
    choice: dict[tuple[int, int], int]
    worth: dict[tuple[int, int], tuple[float, ...]]
    units: int


def solve_two_exits(
    exit_rates: Sequence[float],
    shallow: FloatArray,
    middle: FloatArray,
    deep: FloatArray,
    start: TwoExits | None = None,
) -> TwoExits:
    """θ* and the optimal decisions for two exit points, by policy iteration.

    Args:
        exit_rates: at the two exit points.
        shallow, middle, deep: mean times of passes over segments 0, 1, 2, by live rows, fills included; (N + 1,).
        start: what was solved before, of as many units: it takes fewer rounds from there.
    """
    count = len(shallow) - 1
    one, two = (min(max(rate, LEAST_EXIT_RATE), MOST_EXIT_RATE) for rate in exit_rates)
    states = _States.of(count)
    rows = np.stack((states.ready, states.first, states.second))
    times = np.stack([seconds[waiting] for seconds, waiting in zip((shallow, middle, deep), rows, strict=True)])
    gains = np.where(rows > 0, rows * np.array([[one], [two], [1.0]]), -np.inf)
    moves = np.zeros((3, len(states.ready), len(states.ready)))
    for action, chance in enumerate((1.0 - one, 1.0 - two)):
        state, going, target = states.moves[action]
        moves[action, state, target] = _binomials(count, chance)[rows[action, state], going]
    moves[2, np.arange(len(states.ready)), states.number[states.first, 0]] = 1.0
    named = list(zip(states.first.tolist(), states.second.tolist(), strict=True))
    # Deepest possible first: flush at once. From there on every policy met is unichain; so is what was solved before,
    # since which moves are possible does not depend on the rates.
    begin = np.where(states.second > 0, 2, np.where(states.first > 0, 1, 0))
    if start is not None:
        begin = np.array([start.choice[state] for state in named])
    rate, choice, worth = _policy_iteration(moves, gains, np.where(rows > 0, times, 1.0), begin)
    worths = map(tuple, worth.T.tolist())
    return TwoExits(rate, dict(zip(named, choice.tolist(), strict=True)), dict(zip(named, worths, strict=True)), count)


class _States(NamedTuple):
    """With two exit points: how N requests can stand, and what can become of them.

    Attributes:
        ready, first, second: how many are ready, and wait at each exit point, by state.
        number: of the state, by (waiting at 1, waiting at 2); (N + 1, N + 1).
        moves: of a pass over segment 0, and of one over segment 1: (state, how many of its rows go on, next state).
    """

    ready: IntArray
    first: IntArray
    second: IntArray
    number: IntArray
    moves: tuple[tuple[IntArray, IntArray, IntArray], ...]

    @classmethod
    @cache
    def of(cls, count: int) -> _States:
        """Those of so many requests."""
        number = np.full((count + 1, count + 1), -1)
        first, second = np.nonzero(np.add.outer(np.arange(count + 1), np.arange(count + 1)) <= count)
        number[first, second] = np.arange(len(first))
        ready = count - first - second
        of_ready, of_first = (ragged(np.zeros_like(rows), np.where(rows > 0, rows + 1, 0)) for rows in (ready, first))
        shallow = *of_ready, number[first[of_ready[0]] + of_ready[1], second[of_ready[0]]]
        middle = *of_first, number[0, second[of_first[0]] + of_first[1]]
        return cls(ready, first, second, number, (shallow, middle))


def _policy_iteration(
    moves: FloatArray, gains: FloatArray, times: FloatArray, choice: IntArray
) -> tuple[float, IntArray, FloatArray]:
    """Howard's policy iteration for an average-reward semi-Markov process.

    Shapes: moves (actions, states, states); gains, times (actions, states), gains -inf where not possible; choice
    (states,), to start from.

    Returns:
        The rate, the action by state, and the worth of each action (actions, states).
    """
    size = gains.shape[1]
    each = np.arange(size)
    rate, worth = 0.0, gains
    for _ in range(POLICY_ITERATION_ROUNDS):
        # v + θ t = r + P v with v[0] = 0: θ takes the place of v[0] among the unknowns.
        system = np.eye(size) - moves[choice, each]
        system[:, 0] = times[choice, each]
        solved = np.linalg.solve(system, gains[choice, each])
        rate = float(solved[0])
        values = solved.copy()
        values[0] = 0.0
        worth = gains - rate * times + np.einsum("asn,n->as", moves, values)
        best = worth.argmax(axis=0)
        # Keep what is as good, or ties would be swapped for ever.
        better = worth[best, each] > worth[choice, each] + 1e-9 * max(1.0, abs(float(values.max())))
        if not better.any():
            break
        choice = np.where(better, best, choice)
    return rate, choice, worth


def _binomials(count: int, chance: float) -> FloatArray:
    """How likely it is that k of n happen, by n and k = 0 … count."""
    rows = np.zeros((count + 1, count + 1))
    rows[0, 0] = 1.0
    for n in range(count):
        rows[n + 1] = rows[n] * (1 - chance)
        rows[n + 1, 1:] += rows[n, :-1] * chance
    return rows
