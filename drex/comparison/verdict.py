"""Sentences about a report of `drex bench` or `drex simulate`: does early exit pay, and can its times be trusted?

Like the rest of the report, anything may be missing but a run's policy, in_flight and tokens_per_s.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from drex.comparison.fields import dig, real

SERVED = ("drex+run-ahead", "drex")
"""Policies that the verdict is about, the first that ran; `drex serve` runs the first unless told otherwise."""
CLEAR = 0.02
"""A gain below this is none, however well the turns agree."""
CLEAR_ALONE = 0.05
"""A gain or loss below this is none where there is a single turn, or a mean alone: turns may differ as much."""
BUSY_SHARE = 0.1
"""Share of the cores' time that other processes take, from which on measured times are not to be trusted."""
MODELLED = "modelled"


@dataclass(frozen=True)
class Comparison:
    """The served policy against full depth at one count in flight; `pays` is None where turns differ too much."""

    in_flight: int
    factor: float
    pays: bool | None


def verdict(report: dict[str, Any]) -> str:
    """Say in one sentence whether early exit paid, where, and how much."""
    runs = report.get("runs") or ()
    policies = {str(run["policy"]) for run in runs}
    name = next((policy for policy in SERVED if policy in policies), None)
    by_policy = {
        policy: {run["in_flight"]: run for run in runs if run["policy"] == policy} for policy in (name, "full")
    }
    both = sorted(by_policy[name].keys() & by_policy["full"].keys()) if name else []
    if name is None or not both:
        needs = " and ".join(policy for policy in (name or SERVED[0], "full") if policy not in policies)
        return (
            f"No verdict on early exit: that takes the policies {name or SERVED[0]} and full, and {needs} did not run."
        )
    modelled = report.get("timing") == MODELLED
    rate = dig(report, "workload.kind") != "open"
    found = [_compare(by_policy[name][count], by_policy["full"][count], rate, modelled) for count in both]
    agreement = real(by_policy[name][both[-1]], "quality.token_agreement")
    same = "" if agreement is None else f"; {agreement:.0%} of its tokens are full depth's"
    where = "In the model of the machine, " if modelled else "On a busy machine, " if doubts(report) else ""
    said = _sentence(name, found, "times as fast as full depth")
    return (where + (said[0].lower() + said[1:] if where else said)) + same + "."


def _compare(ours: dict[str, Any], full: dict[str, Any], rate: bool, modelled: bool) -> Comparison:
    """Compare two runs at one count in flight.

    Args:
        ours, full: the figures of the served policy, and of full depth.
        rate: compare tokens a second, turn by turn; else how soon requests are done, for arrivals set the rate then.
        modelled: times are modelled, and a single turn is all there is to know.
    """
    if rate:
        each = list(zip(ours.get("each") or (), full.get("each") or (), strict=False))
        factors = [a / b for a, b in each] or [ours["tokens_per_s"] / full["tokens_per_s"]]
    else:
        took, full_took = real(ours, "rct_ms.mean"), real(full, "rct_ms.mean")
        factors = [full_took / took] if took and full_took else [1.0]
    factor, alone = statistics.median(factors), len(factors) == 1 and not modelled
    margin = CLEAR_ALONE if alone else CLEAR
    pays: bool | None = None
    if min(factors) > 1 and factor >= 1 + margin:
        pays = True
    elif max(factors) < (1 - margin if alone else 1 + margin):
        pays = False
    return Comparison(ours["in_flight"], factor, pays)


def _sentence(name: str, found: Sequence[Comparison], unit: str) -> str:
    pays = [one for one in found if one.pays]
    not_ = [one for one in found if one.pays is False]
    open_ = [one for one in found if one.pays is None]
    if pays and len(pays) == len(found):
        return f"Early exit pays: {name} is {_factors(pays)} {unit} at {_counts(pays)} in flight"
    untold = f"; at {_counts(open_)} turns differ too much to tell ({_factors(open_)})" if open_ else ""
    if pays:
        never = f", not at {_counts(not_)} ({_factors(not_)})" if not_ else ""
        head = f"Early exit pays at {_counts(pays)} in flight, where {name} is {_factors(pays)} {unit}"
        return head + never + untold
    if not_:
        return f"Early exit does not pay: {name} is {_factors(not_)} {unit} at {_counts(not_)} in flight{untold}"
    head = "Turns differ too much to tell whether early exit pays"
    return f"{head}: {name} is {_factors(open_)} {unit} at {_counts(open_)} in flight, so raise --repeats"


def _factors(found: Iterable[Comparison]) -> str:
    return listed(f"{one.factor:.2f}" for one in found)


def _counts(found: Iterable[Comparison]) -> str:
    return listed(f"{one.in_flight:g}" for one in found)


def listed(words: Iterable[str]) -> str:
    """Words as a sentence lists them: 1, 8 and 32."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def doubts(report: dict[str, Any]) -> str | None:
    """Say why the times of a report are not to be trusted, or None where nothing speaks against them."""
    share = real(report, "machine.others_cpu_share")
    if share is None or share < BUSY_SHARE:
        return None
    cores = dig(report, "machine.cores")
    of = f" of its {cores} cores" if isinstance(cores, int) and cores > 1 else ""
    return (
        f"The machine was busy: other processes took {share:.0%}{of} meanwhile, so times are too long and differ from "
        "turn to turn; measure again when it is idle."
    )
