"""Solves the decision process of rebatching: the optimum for one exit point and for two.

With N decoding requests the state is how many of them wait at each exit point; going on, or flushing one buffer, is a
decision of a semi-Markov process with average reward (Puterman, Markov Decision Processes, chapter 11): tokens a
second. Arrays are indexed by a count of requests, 0 … N; times are seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock

import numpy as np
from threadpoolctl import ThreadpoolController

from drex.control.plan import BoolArray, FloatArray, IntArray

ROUNDS = 50
FEWEST, NEARLY_ALL = 1e-9, 1 - 1e-9
"""Exit rates are taken to lie between these: at 0 and 1 some states lead nowhere."""
_SOLVING = Lock()


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
    exit_rate = min(exit_rate, NEARLY_ALL)
    going = _binomials(count, 1.0 - exit_rate)
    rate = 0.0
    for _ in range(ROUNDS):
        advantage, tokens, seconds = _sweep(rate, exit_rate, shallow, flush, going)
        better = tokens / seconds
        if better <= rate * (1 + 1e-12):
            break
        rate = better
    choose = advantage > 0
    choose[0] = False
    return OneExit(rate, choose, advantage)


def _sweep(
    rate: float, exit_rate: float, shallow: FloatArray, flush: FloatArray, going: list[FloatArray]
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
        moves = going[ready]  # how many of the ready rows join the buffer
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


def solve_two_exits(exit_rates: Sequence[float], shallow: FloatArray, middle: FloatArray, deep: FloatArray) -> TwoExits:
    """θ* and the optimal decisions for two exit points, by policy iteration.

    Args:
        exit_rates: at the two exit points.
        shallow, middle, deep: mean times of passes over segments 0, 1, 2, by live rows, fills included; (N + 1,).
    """
    count = len(shallow) - 1
    exit_rates = [min(max(rate, FEWEST), NEARLY_ALL) for rate in exit_rates]
    states = [(i, j) for i in range(count + 1) for j in range(count + 1 - i)]
    number = {state: n for n, state in enumerate(states)}
    first, second = (_binomials(count, 1.0 - rate) for rate in exit_rates)
    size = len(states)
    moves = np.zeros((3, size, size))
    gains = np.full((3, size), -np.inf)
    times = np.ones((3, size))
    for state, n in number.items():
        i, j = state
        ready = count - i - j
        if ready:
            targets = [number[i + k, j] for k in range(ready + 1)]
            moves[0, n, targets] = first[ready]
            gains[0, n], times[0, n] = exit_rates[0] * ready, shallow[ready]
        if i:
            targets = [number[0, j + k] for k in range(i + 1)]
            moves[1, n, targets] = second[i]
            gains[1, n], times[1, n] = exit_rates[1] * i, middle[i]
        if j:
            moves[2, n, number[i, 0]] = 1.0
            gains[2, n], times[2, n] = j, deep[j]
    rate, choice, worth = _policy_iteration(moves, gains, times)
    return TwoExits(
        rate,
        {state: int(choice[n]) for state, n in number.items()},
        {state: tuple(worth[:, n].tolist()) for state, n in number.items()},
        count,
    )


def _solve(system: FloatArray, right: FloatArray) -> FloatArray:
    """Linear equations, on one core: so few are solved no faster on several, which passes need meanwhile.

    OpenBLAS has one number of threads for the whole process, hence the lock: two that overlapped would restore each
    other's.
    """
    with _SOLVING, _openblas().limit(limits=1):
        return np.asarray(np.linalg.solve(system, right), dtype=np.float64)


@cache
def _openblas() -> ThreadpoolController:
    return ThreadpoolController().select(internal_api="openblas")


def _policy_iteration(moves: FloatArray, gains: FloatArray, times: FloatArray) -> tuple[float, IntArray, FloatArray]:
    """Howard's policy iteration for an average-reward semi-Markov process.

    Shapes: moves (actions, states, states); gains, times (actions, states), gains -inf where not possible.

    Returns:
        The rate, the action by state, and the worth of each action (actions, states).
    """
    size = gains.shape[1]
    # Deepest possible first: flush at once. From there on every policy met is unichain.
    choice: IntArray = np.array([max(a for a in range(len(gains)) if gains[a, n] > -np.inf) for n in range(size)])
    each = np.arange(size)
    rate, worth = 0.0, gains
    for _ in range(ROUNDS):
        # v + θ t = r + P v with v[0] = 0: θ takes the place of v[0] among the unknowns.
        system = np.eye(size) - moves[choice, each]
        system[:, 0] = times[choice, each]
        solved = _solve(system, gains[choice, each])
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


def _binomials(count: int, chance: float) -> list[FloatArray]:
    """Distributions of how many of n happen, for n = 0 … count."""
    rows = [np.ones(1)]
    for _ in range(count):
        last = rows[-1]
        rows.append(np.append(last, 0.0) * (1 - chance) + np.insert(last, 0, 0.0) * chance)
    return rows
