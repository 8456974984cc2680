"""The bundled model with its own exits: `drex` beside the best fixed rule, found by replaying what `drex` recorded.

    OMP_WAIT_POLICY=passive python bench/replayed.py --json replayed.json

Full depth and `drex` take turns on held-out prompts while all N decode. Then the exits of these very tokens are
replayed in virtual time, passes taking what such passes took in the run: under `drex`, and under every fixed rule (a
flush size for each buffer, how few requests are worth starting, which buffer is flushed where nothing else is left).
The best of the fixed ones is chosen with all exits known; no rule that serves can be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from typing import Any

from optimum import rate
from rich.console import Console
from rich.table import Table
from simulated import FixedRule

from drex.cli.output import output_path
from drex.comparison import machine
from drex.comparison.cell import Cell
from drex.comparison.policies_in_turn import Workload
from drex.comparison.runner import while_all_decode
from drex.comparison.subject import Subject, held_out_prompts, trained
from drex.comparison.yardsticks import Found, yardstick
from drex.config import DEFAULTS, EngineConfig
from drex.sampling_params import SamplingParams
from drex.sim.executor import RecordedExits, VirtualExecutor
from drex.sim.workload import Job

PROMPT = 8
SHARES = (0.25, 0.5, 0.75, 1.0)
console = Console(width=160)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", default="1,4,8,16,32,64")
    parser.add_argument("--tokens", type=int, default=64, help="of each request; more at few in flight")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=output_path)
    return parser.parse_args()


def fixed_rules(count: int, exits: int) -> list[dict[str, Any]]:
    """All that are tried."""
    sizes = sorted({max(1, round(share * count)) for share in SHARES})
    limits = itertools.product([*sizes, math.inf], repeat=exits)
    return [
        {"flush_at": flush_at, "fewest": fewest, "deepest_first": deepest}
        for flush_at, fewest, deepest in itertools.product(limits, sorted({1, *sizes}), (True, False))
    ]


def replay(
    subject: Subject,
    work: Workload,
    turns: int,
    depths: dict[str, list[int]],
    found: Found,
    rule: dict[str, Any] | None = None,
) -> float:
    """Tokens a second of `drex`, or of a fixed rule, on recorded exits; the first turn only warms up."""
    count = len(work.jobs)
    engine = subject.engine("drex", count)
    engine.executor = VirtualExecutor(found.cost, RecordedExits(depths))
    if rule is not None:
        FixedRule.replacing(engine.scheduler, **rule)
    passes = []
    for turn in range(turns):
        history = while_all_decode(engine, work.requests(subject, engine, turn), count)
        passes += history if turn else []
    return rate(passes)


def measure(subject: Subject, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """At one count in flight."""
    tokens = max(options.tokens, 256 // count)
    prompts = held_out_prompts(subject, PROMPT)
    # Drawn, so that each turn has texts of its own: there are fewer prompts than requests.
    params = SamplingParams(temperature=0.8, ignore_eos=True)
    work, turns = Workload(prompts, [Job(PROMPT, tokens)] * count, params, "closed"), options.repeats + 1
    cells = [Cell(policy, count, subject.engine(policy, count)) for policy in ("full", "drex")]
    depths: dict[str, list[int]] = {}
    speeds: dict[str, list[float]] = {cell.policy: [] for cell in cells}
    for turn, cell in itertools.product(range(turns), cells):
        arrivals = work.requests(subject, cell.engine, turn)
        history = while_all_decode(cell.engine, arrivals, count)
        if cell.policy == "drex":
            depths |= {request.request_id: request.depths[len(request.prompt) - 1 :] for _, request in arrivals}
        # The first turn warms up costs and rates.
        if turn:
            cell.history.extend(history)
            speeds[cell.policy].append(rate(history))
    found = yardstick(cells)
    assert found is not None
    ours = replay(subject, work, turns, depths, found)
    rules = fixed_rules(count, len(found.exit_rates))
    tried = [replay(subject, work, turns, depths, found, rule) for rule in rules]
    best = max(range(len(rules)), key=tried.__getitem__)
    sizes = [None if math.isinf(size) else size for size in rules[best]["flush_at"]]
    return {
        "in_flight": count,
        "tokens": tokens,
        "theta_star": found.optimal,
        "ideal": found.ideal,
        "exit_rates": found.exit_rates,
        "tokens_per_s": {name: statistics.median(each) for name, each in speeds.items()},
        "each": speeds,
        "replayed": {
            "drex": ours,
            "best": tried[best],
            "rule": {**rules[best], "flush_at": sizes},
            "tried": len(rules),
        },
    }


def show(found: list[dict[str, Any]]) -> None:
    """A table."""
    title = "drex-stdlib-10m with its own exits, tokens/s; replayed: recorded exits, pooled costs of the same run"
    columns = (
        "N",
        "exit rates",
        "full",
        "θ*",
        "ideal",
        "drex",
        "drex replayed",
        "best fixed replayed",
        "share",
        "rule",
    )
    table = Table(*columns, title=title)
    for each in found:
        replayed, rule = each["replayed"], each["replayed"]["rule"]
        sizes = ", ".join("never" if size is None else f"{size:.0f}" for size in rule["flush_at"])
        order = "deepest" if rule["deepest_first"] else "shallowest"
        table.add_row(
            str(each["in_flight"]),
            " ".join(f"{value:.2f}" for value in each["exit_rates"]),
            *(f"{value:.0f}" for value in (each["tokens_per_s"]["full"], each["theta_star"], each["ideal"])),
            *(f"{value:.0f}" for value in (each["tokens_per_s"]["drex"], replayed["drex"], replayed["best"])),
            f"{replayed['drex'] / replayed['best']:.3f}",
            f"flush at {sizes}; start from {rule['fewest']}; {order} first ({replayed['tried']} tried)",
        )
    console.print(table)


def main() -> None:
    """Run, print, write."""
    options = arguments()
    counts = [int(count) for count in options.in_flight.split(",")]
    longest = PROMPT + max(options.tokens, 256 // min(counts))
    config = EngineConfig(
        max_model_len=longest,
        max_num_seqs=max(counts),
        max_num_batched_tokens=DEFAULTS.max_num_batched_tokens,
        kv_cache_tokens=max(counts) * longest,
    )
    subject = trained(None, None, "auto", config)
    found = []
    for count in counts:
        found.append(measure(subject, count, options))
        console.print(f"{count} in flight done", style="dim")
    show(found)
    if options.json:
        facts = {name: str(value) for name, value in vars(options).items()}
        report = {"benchmark": "replayed", **machine.describe(), "options": facts, "runs": found}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
