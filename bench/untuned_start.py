"""What it costs to start from an estimate instead of a profile: throughput after the first 500 passes, in virtual time.

    python bench/untuned_start.py
    python bench/untuned_start.py --shape llama-160m --dtype bfloat16

Passes take what a profile that is measured first says (`--measured FILE` takes one that `drex profile --out` wrote).
One engine starts from that profile, the other from the estimate that engines make when they start, and both learn.
Requests of 50 to 150 tokens come as others end. Exits are drawn.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from drex import LLM
from drex.assembly.runner import build_runner
from drex.comparison.simulate import Scenario
from drex.comparison.subject import synthetic
from drex.compute.segments import SegmentRunner
from drex.config import EngineConfig, ExitPlan
from drex.control.cost.model import CostModel
from drex.control.cost.profile import Profile
from drex.control.memory.slots import SlotLayout
from drex.engine.build import build_engine
from drex.profiling.estimate import estimate
from drex.profiling.profile_cache import MEASURED, obtain
from drex.profiling.profile_file import load_profile
from drex.sampling_params import SamplingParams
from drex.sim.executor import DrawnExits, VirtualExecutor
from drex.sim.workload import draw_jobs

PROMPT, OUTPUT = (16, 48), (50, 150)
SKIPPED, COUNTED = 500, 1500
"""Passes that are not counted, and passes that are."""
ACCEPTANCE = 0.8
"""Share of the exit points' tokens that are full depth's, for drafts."""
console = Console()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="Random weights of these sizes, instead of the bundled model.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--in-flight", default="1,4,16,64")
    parser.add_argument("--exit-rates", default="0.3,0.6,0.8")
    parser.add_argument("--measured", type=Path, help="A profile, instead of one that is measured now.")
    parser.add_argument("--estimated", type=Path, help="A profile to start from, instead of the estimate.")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def subject(options: argparse.Namespace) -> tuple[SegmentRunner, EngineConfig, ExitPlan]:
    """The model."""
    if options.shape is None:
        llm = LLM(dtype=options.dtype, profile="nominal")
        executor = llm.engine.executor
        return executor.runner, llm.config, llm.model.exits  # type: ignore[attr-defined]
    config = EngineConfig(1024, 64, 512, 64 * 256)
    found = synthetic(options.shape, None, (0.6,), "recompute", options.dtype, config)
    return build_runner(found.model, found.config, "auto"), found.config, found.model.exits


def throughput(start: Profile, true: Profile, lengths: tuple[int, ...], count: int, rate: float, mode: str) -> float:
    """Tokens a second of virtual time after the first passes.

    Args:
        start: what the engine believes at first.
        true: what passes take.
        lengths: layers of each segment.
        count: requests in flight.
        rate: of exits at each exit point.
        mode: of run-ahead.
    """
    exits = len(lengths) - 1
    scenario = Scenario(lengths, true, (rate,) * exits, "recompute", SamplingParams(temperature=0.0, ignore_eos=True))
    room = PROMPT[1] + OUTPUT[1]
    config = EngineConfig(room, count, 512, count * room, run_ahead=mode)
    executor = VirtualExecutor(CostModel(true), DrawnExits(ACCEPTANCE))
    engine = build_engine(config, SlotLayout(lengths), "recompute", CostModel(start), executor)
    engine.history = []
    jobs = draw_jobs(100_000, PROMPT, OUTPUT)
    requests = (request for _, request in scenario.requests(jobs, len(lengths), mode))
    while len(engine.history) < SKIPPED + COUNTED:
        for request in islice(requests, count - engine.unfinished):
            engine.add(request)
        engine.step()
    window = engine.history[SKIPPED:]
    return sum(record.tokens for record in window) / sum(record.seconds for record in window)


def main() -> None:
    """Measure, simulate, print, write."""
    options = arguments()
    runner, config, exits = subject(options)
    true = load_profile(options.measured) if options.measured else obtain(MEASURED, runner, config, exits, None)
    start = load_profile(options.estimated) if options.estimated else estimate(runner)
    lengths = runner.layout.lengths
    columns = ("N", "exit rate", "run-ahead", "from the profile, tok/s", "from the estimate, tok/s", "ratio")
    table, found = Table(*columns, title=f"virtual time; profile: {true.source}"), []
    for count in map(int, options.in_flight.split(",")):
        for rate in map(float, options.exit_rates.split(",")):
            for mode in ("off", "trusted"):
                tuned, untuned = (throughput(each, true, lengths, count, rate, mode) for each in (true, start))
                found.append({"in_flight": count, "exit_rate": rate, "run_ahead": mode, "ratio": untuned / tuned})
                ratio = f"{untuned / tuned:.3f}"
                table.add_row(str(count), f"{rate:g}", mode, f"{tuned:.1f}", f"{untuned:.1f}", ratio)
    console.print(table)
    worst = min(each["ratio"] for each in found)
    console.print(f"lowest ratio {worst:.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
