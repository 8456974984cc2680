"""Run-ahead in the simulator: full depth, rebatching, trusted and lossless, on a machine's data sheet.

    python bench/simulated.py --shapes llama-2-13b,qwen2.5-14b --in-flight 1,4,16,64,256 --search 4,16,64

What the exit point says is replayed from the bundled model's first exit on held-out text. With --search, the online
rule is compared with the best of all fixed (flush size, least chance of a draft, cap on open rows).
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from run_ahead import recorded

from drex.bench import machine
from drex.bench.runner import Cell
from drex.config import EngineConfig, policy_settings
from drex.control.flush import FlushRule, Waiting
from drex.request import SamplingParams
from drex.sim.machines import MACHINES, roofline
from drex.sim.shapes import SHAPES
from drex.sim.simulate import Scenario, run
from drex.sim.workload import Job

PROMPT, TOKENS = 16, 96
POLICIES = ("full", "drex", "drex+run-ahead", "drex+lossless")
SHARES = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
CHANCES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.6)
CAPS = (2, 4, 8)
console = Console(width=160)


class FixedRule(FlushRule):
    """Flushes at a fixed size, and drafts from a fixed chance on: what is searched over."""

    flush_at = 1
    least = 0.0

    def choose(self, waiting: Waiting) -> tuple[int, int] | None:
        """As `FlushRule` does, by two numbers."""
        live = sum(waiting.live)
        ready = waiting.ready
        if waiting.chances is not None:
            ready = int((waiting.chances >= self.least).sum())
        if ready and live < self.flush_at:
            return 0, ready
        if live:
            return max(segment for segment, count in enumerate(waiting.live) if count), 0
        return (0, waiting.ready) if waiting.ready else None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-2-13b,qwen2.5-14b")
    parser.add_argument("--machine", default="h200")
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--in-flight", default="1,4,16,64,256")
    parser.add_argument("--search", default="", help="counts in flight to search at, for the first shape")
    parser.add_argument("--trace-tokens", type=int, default=16384)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def config_for(count: int) -> EngineConfig:
    """All that are in flight fit."""
    longest = PROMPT + TOKENS
    return EngineConfig(longest, count, 2048, count * longest, max(256, 8 * count))


def jobs_for(count: int) -> list[Job]:
    """A closed loop of a few rounds, more at few in flight."""
    return [Job(PROMPT, TOKENS)] * max(24, 4 * count)


def search(scenario: Scenario, count: int, mode: str) -> dict[str, Any]:
    """The online rule against the best of the fixed ones. Decoding rates, tokens a second."""
    settings = policy_settings(f"drex+{mode}")
    jobs = jobs_for(count)

    def rate(cap: int, flush_at: int | None = None, least: float = 0.0) -> float:
        config = replace(config_for(count), **settings, max_draft=cap)
        engine = scenario.engine("drex", config, len(jobs))
        policy = engine.scheduler.policy
        if flush_at is not None:
            rule = FixedRule(policy.rule.cost, policy.rates, scenario.kv_fill, len(policy.rule.counts) - 1)
            rule.flush_at, rule.least = flush_at, least
            policy.rule = rule
        cell = Cell("drex", count, engine)
        cell.run(scenario.requests(jobs, engine.scheduler.segments, config.run_ahead))
        plain = [record for record in cell.history if not record.prompts]
        return sum(record.tokens for record in plain) / sum(record.seconds for record in plain)

    sizes = sorted({max(1, round(share * count)) for share in SHARES})
    tried = {each: rate(each[2], each[0], each[1]) for each in itertools.product(sizes, CHANCES, CAPS)}
    best = max(tried, key=lambda each: tried[each])
    ours = rate(4)
    return {
        "in_flight": count,
        "mode": mode,
        "rule": ours,
        "best": tried[best],
        "at": best,
        "share": ours / tried[best],
    }


def main() -> None:
    """Run, print, write."""
    options = arguments()
    source = recorded(options.trace_tokens)
    report: dict[str, Any] = {"benchmark": "simulated", **machine.versions(), "options": {}, "shapes": {}, "search": []}
    report["options"] = {name: str(value) for name, value in vars(options).items()}
    for number, name in enumerate(options.shapes.split(",")):
        shape = SHAPES[name]
        third = shape.layers // 3
        lengths = (third, shape.layers - third)
        costs = roofline(MACHINES[options.machine], shape, lengths)
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        limits = (options.threshold,)
        scenario = Scenario(lengths, costs, (0.5,), "recompute", params, confidences=source, thresholds=limits)
        table = Table("N", "full tok/s", "θ*", "ideal", *POLICIES[1:], "accepted", title=f"{name}, {costs.source}")
        rows = []
        for count in map(int, options.in_flight.split(",")):
            runs = run(scenario, POLICIES, jobs_for(count), config_for(count))["runs"]
            full = runs[0]["decode_tokens_per_s"]
            drafts = runs[2]["run_ahead"]
            rows.append({"in_flight": count, "runs": runs})
            table.add_row(
                str(count),
                f"{full:.0f}",
                *(f"{runs[1][key] / full:.2f}" if runs[1][key] else "" for key in ("theta_star", "ideal")),
                *(f"{each['decode_tokens_per_s'] / full:.2f}" for each in runs[1:]),
                f"{drafts['accepted'] / max(1, drafts['verified']):.2f}",
            )
        report["shapes"][name] = rows
        console.print(table)
        if number == 0 and options.search:
            for count, mode in itertools.product(map(int, options.search.split(",")), ("run-ahead", "lossless")):
                found = search(scenario, count, mode)
                report["search"].append(found)
                console.print(
                    f"{mode}, {count} in flight: the rule {found['rule']:.0f} tokens/s, the best of the fixed ones "
                    f"{found['best']:.0f} (flush at, least chance, cap: {found['at']}): {found['share']:.3f}"
                )
    if options.json:
        for rows in report["shapes"].values():
            for row in rows:
                for each in row["runs"]:
                    each.pop("occupancy")
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
