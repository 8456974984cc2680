"""What deciding costs: planning a pass, committing and recording it, and solving for the optimum.

    python bench/scheduling.py --json scheduling.json

The simulator's engine on H200 / Llama-2-13B costs (data sheet): its control code is the real one, in real time, while
passes take none. The optimum is solved with the engine idle, as a user's spare core would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from drex.cli.output import output_path
from drex.comparison.simulate import Scenario, segment_lengths
from drex.comparison.versions import versions
from drex.config import EngineConfig
from drex.control.constants import TWO_EXITS_UNITS
from drex.control.cost.model import CostModel
from drex.control.policy.yardstick import measure
from drex.engine.driver import serve
from drex.sampling_params import SamplingParams
from drex.sim.machines import MACHINES, machine_profile
from drex.sim.shapes import SHAPES
from drex.sim.workload import draw_jobs

SHAPE, MACHINE, RATE, CONTEXT = "llama-2-13b", "h200", 0.6, 128.0
PROMPT, OUTPUT = 32, 200
STEPS = ("next", "commit", "record", "took")
console = Console()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", default="16,64,256")
    parser.add_argument("--run-ahead", choices=("off", "trusted", "lossless"), default="off")
    parser.add_argument("--json", type=output_path)
    return parser.parse_args()


def scenario(*exits: int) -> Scenario:
    """The shape with exits after these layers."""
    size = SHAPES[SHAPE]
    lengths = segment_lengths(exits, size.layers)
    costs = machine_profile(MACHINES[MACHINE], size, lengths)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    return Scenario(lengths, costs, (RATE,) * len(exits), "recompute", params)


def timed(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """The same, with the seconds of each call noted."""

    def wrapper(*args: Any) -> Any:
        start = time.perf_counter()
        out = function(*args)
        into.append(time.perf_counter() - start)
        return out

    return wrapper


def passes(count: int, run_ahead: str) -> dict[str, float]:
    """Median seconds of each step of a pass, from when all have settled in."""
    what = scenario(SHAPES[SHAPE].layers // 2)
    room = PROMPT + OUTPUT
    config = EngineConfig(
        max_model_len=room,
        max_num_seqs=count,
        max_num_batched_tokens=2048,
        kv_cache_tokens=count * room,
        run_ahead=run_ahead,
    )
    jobs = draw_jobs(3 * count, (PROMPT, PROMPT), (OUTPUT, OUTPUT))
    engine = what.engine("drex", config, len(jobs))
    found: dict[str, list[float]] = {name: [] for name in STEPS}
    for name, into in found.items():
        setattr(engine.scheduler, name, timed(getattr(engine.scheduler, name), into))
    serve(engine, what.requests(jobs, 2, run_ahead), closed=True)
    return {name: statistics.median(each[len(each) // 4 :]) for name, each in found.items()}


def solving(in_flight: int, exits: int) -> float:
    """Median seconds of solving for θ*."""
    layers = SHAPES[SHAPE].layers
    what = scenario(*(layers * number // (exits + 1) for number in range(1, exits + 1)))
    cost, taken = CostModel(what.profile), []
    for _ in range(5):
        start = time.perf_counter()
        measure(cost, what.exit_rates, in_flight, CONTEXT, "recompute", grain=TWO_EXITS_UNITS)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    """Run, print, write."""
    options = arguments()
    counts = [int(count) for count in options.in_flight.split(",")]
    table = Table("N", *STEPS, title=f"milliseconds a pass, medians; run-ahead {options.run_ahead}")
    found = []
    for count in counts:
        found.append({"in_flight": count, **passes(count, options.run_ahead)})
        table.add_row(str(count), *(f"{found[-1][name] * 1e3:.3f}" for name in STEPS))
    console.print(table)
    solver = Table("N", "exit points", "ms", title="solving for θ*")
    solved = []
    for in_flight, exits in ((64, 1), (256, 1), (1024, 1), (64, 2), (256, 2)):
        solved.append({"in_flight": in_flight, "exits": exits, "seconds": solving(in_flight, exits)})
        solver.add_row(str(in_flight), str(exits), f"{solved[-1]['seconds'] * 1e3:.0f}")
    console.print(solver)
    if options.json:
        report = {"benchmark": "scheduling", "versions": versions(), "passes": found, "solving": solved}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
