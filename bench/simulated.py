"""Run-ahead in the simulator: full depth, rebatching, trusted and lossless, on a machine's data sheet.

    python bench/simulated.py --shapes llama-2-13b,qwen2.5-14b --in-flight 1,4,16,64,256 --search 4,16,64

What the exit point says is replayed from the bundled model's first exit on held-out text. With --search, the online
rule is compared with the best of all fixed (flush size, least chance of a draft, cap on open rows). With
--miscalibrated, the chances that drafts are given are off by so much in either direction, and never learnt better.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table
from run_ahead import recorded

from drex.cli.output import output_path
from drex.comparison.cell import Cell
from drex.comparison.policy_names import policy_settings
from drex.comparison.runner import while_all_decode
from drex.comparison.simulate import Scenario
from drex.comparison.versions import versions
from drex.comparison.yardsticks import yardstick
from drex.config import EngineConfig
from drex.control.policy.flush import FlushRule, Waiting
from drex.control.run_ahead.acceptance import Acceptance
from drex.control.scheduler import Scheduler
from drex.sampling_params import SamplingParams
from drex.sim.machines import MACHINES, machine_profile
from drex.sim.shapes import SHAPES
from drex.sim.workload import Job

PROMPT, TOKENS = 16, 256
POLICIES = ("full", "drex", "drex+run-ahead", "drex+lossless")
SHARES = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
CHANCES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 0.85, 1.0)
"""The last one drafts nothing."""
CAPS = (2, 4, 8)
FINALISTS = 8
"""Of the fixed ones: few, so that the best of them is not best by luck."""
REQUESTS = 64
"""That count at least, in as many turns as that takes."""
TRIED = 16384
"""Tokens for which each setting is tried, at most a whole turn of them."""
console = Console(width=160)


class FixedRule(FlushRule):
    """What is searched over: flushes at fixed sizes of the buffers, or when fewer rows than so many are worth starting.

    Rows are, from a fixed chance on. `flush_at` has a size for each exit point.
    """

    flush_at: tuple[float, ...] = (math.inf,)
    fewest, least = 1, 0.0
    deepest_first = True

    def choose(self, waiting: Waiting) -> tuple[int, int] | None:
        """As `FlushRule` does, by these numbers."""
        full = [segment for segment, size in enumerate(self.flush_at, 1) if waiting.live[segment] >= size]
        if full:
            return full[-1], 0
        ready = waiting.ready
        if waiting.chances is not None:
            ready = int((waiting.chances >= self.least).sum())
        if ready >= self.fewest:
            return 0, ready
        held = [segment for segment, count in enumerate(waiting.live) if count]
        if held:
            return held[-1 if self.deepest_first else 0], 0
        return (0, waiting.ready) if waiting.ready else None

    def prepare(self, pass_number: int, context: float) -> None:
        """Nothing has to be solved."""

    @classmethod
    def replacing(cls, scheduler: Scheduler, **settings: Any) -> None:
        """Have a scheduler decide by this."""
        old = scheduler.policy.rule
        rule = cls(old.cost, old.rates, old.prices.kv_fill, len(old.prices.counts) - 1)
        for name, value in settings.items():
            setattr(rule, name, value)
        scheduler.policy.rule = rule


class Miscalibrated(Acceptance):
    """Gives drafts chances that are off."""

    off = 0.0

    def chance(self, exit_index: int, confidence: float) -> float:
        """As learnt, and that much more or less."""
        return min(1.0, max(0.0, super().chance(exit_index, confidence) + self.off))


Fixed = tuple[float, int, float, int]
"""Flush at, fewest, least chance, cap on open rows."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-2-13b,qwen2.5-14b")
    parser.add_argument("--machine", default="h200")
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--in-flight", default="1,4,16,64,256", help="counts for the tables; may be empty")
    parser.add_argument("--search", default="", help="counts in flight to search at, for the first shape")
    parser.add_argument("--searched", default=",".join(POLICIES[2:]), help="policies whose rule is searched against")
    parser.add_argument("--miscalibrated", type=float, help="run trusted run-ahead with chances off by so much, too")
    parser.add_argument("--trace-tokens", type=int, default=16384)
    parser.add_argument("--json", type=output_path)
    return parser.parse_args()


def config_for(count: int) -> EngineConfig:
    """All that are in flight fit."""
    longest = PROMPT + TOKENS
    return EngineConfig(longest, count, 2048, count * longest)


def serve(
    scenario: Scenario,
    name: str,
    count: int,
    fixed: Fixed | None = None,
    off: float = 0.0,
    turns: int = 1,
    tokens: int = TOKENS,
) -> Cell:
    """A policy while all N decode, for some turns after one that warms up; `fixed` takes the place of the rule."""
    config = replace(config_for(count), **policy_settings(name))
    if fixed is not None:
        config = replace(config, max_draft=fixed[3])
    cell = Cell(name, count, scenario.engine(config.policy, config, count))
    scheduler = cell.engine.scheduler
    if fixed is not None:
        FixedRule.replacing(scheduler, flush_at=fixed[:1], fewest=fixed[1], least=fixed[2])
    if off:
        scheduler.drafts.acceptance = acceptance = Miscalibrated(scheduler.segments - 1)
        acceptance.off = off
    jobs = [Job(PROMPT, tokens)] * (count * (1 + turns))
    # Each turn has texts of its own.
    requests = list(scenario.requests(jobs, scheduler.segments, config.run_ahead))
    for turn in range(1 + turns):
        passes = while_all_decode(cell.engine, requests[turn * count :][:count], count)
        cell.history += passes if turn else []
    return cell


def speed(cell: Cell) -> float:
    """Tokens a second."""
    return sum(record.tokens for record in cell.history) / sum(record.seconds for record in cell.history)


def search(scenario: Scenario, count: int, name: str) -> dict[str, Any]:
    """The online rule against the best of the fixed ones: all are tried shortly, and the best of these for long."""
    sizes = sorted({max(1, round(share * count)) for share in SHARES})
    kinds = [(float(size), 1) for size in sizes] + [(math.inf, size) for size in sizes]
    candidates = [(*kind, least, cap) for kind, least, cap in itertools.product(kinds, CHANCES, CAPS)]
    short = min(TOKENS, TRIED // count)
    tried = {each: speed(serve(scenario, name, count, each, tokens=short)) for each in candidates}
    finalists = sorted(tried, key=lambda each: -tried[each])[:FINALISTS]
    turns = max(2, REQUESTS // count)
    found = {each: speed(serve(scenario, name, count, each, turns=turns)) for each in finalists}
    best = max(found, key=lambda each: found[each])
    ours = speed(serve(scenario, name, count, turns=turns))
    at = [None if math.isinf(number) else number for number in best]
    return {"in_flight": count, "policy": name, "rule": ours, "best": found[best], "at": at, "tried": len(tried)}


def main() -> None:
    """Run, print, write."""
    options = arguments()
    source = recorded(options.trace_tokens)
    report: dict[str, Any] = {"benchmark": "simulated", **versions(), "options": {}, "shapes": {}, "search": []}
    report["options"] = {name: str(value) for name, value in vars(options).items()}
    for number, name in enumerate(options.shapes.split(",")):
        shape = SHAPES[name]
        third = shape.layers // 3
        lengths = (third, shape.layers - third)
        costs = machine_profile(MACHINES[options.machine], shape, lengths)
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        limits = (options.threshold,)
        scenario = Scenario(lengths, costs, (0.5,), "recompute", params, confidences=source, thresholds=limits)
        table = Table("N", "full tok/s", "θ*", "ideal", *POLICIES[1:], "accepted", title=f"{name}, {costs.source}")
        rows = []
        for count in map(int, filter(None, options.in_flight.split(","))):
            turns = max(1, REQUESTS // count)
            cells = [serve(scenario, policy, count, turns=turns) for policy in POLICIES]
            found = yardstick(cells[:2])
            assert found is not None
            full, *others = (speed(cell) for cell in cells)
            drafts = cells[2].engine.scheduler.report().run_ahead
            accepted = drafts["accepted"] / max(1, drafts["verified"])
            facts = {"in_flight": count, "full": full, "theta_star": found.optimal, "ideal": found.ideal}
            rows.append({**facts, **dict(zip(POLICIES[1:], others, strict=True)), "drafts": drafts})
            if options.miscalibrated:
                wrong = [
                    speed(serve(scenario, POLICIES[2], count, off=sign * options.miscalibrated, turns=turns))
                    for sign in (-1, 1)
                ]
                rows[-1]["miscalibrated"] = dict(zip(("less", "more"), wrong, strict=True))
                shares = ", ".join(f"{each / others[1]:.3f}" for each in wrong)
                console.print(f"{name}, {count} in flight, chances {options.miscalibrated} less and more: {shares}")
            relative = [value / full if value else math.nan for value in (found.optimal, found.ideal, *others)]
            table.add_row(str(count), f"{full:.0f}", *(f"{value:.2f}" for value in relative), f"{accepted:.2f}")
        report["shapes"][name] = rows
        if rows:
            console.print(table)
        if number == 0 and options.search:
            for count, policy in itertools.product(map(int, options.search.split(",")), options.searched.split(",")):
                searched = search(scenario, count, policy)
                report["search"].append(searched)
                console.print(
                    f"{policy}, {count} in flight: the rule {searched['rule']:.0f} tokens/s, the best fixed one "
                    f"{searched['best']:.0f} (flush at, fewest, least chance, cap: {searched['at']}): "
                    f"{searched['rule'] / searched['best']:.3f}"
                )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
