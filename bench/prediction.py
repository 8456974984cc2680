"""How well the simulator predicts a real run: the same requests and exits, costs from the profile alone.

    OMP_WAIT_POLICY=passive python bench/prediction.py --json prediction.json

The profile is measured right before each run: a machine whose speed drifts is another one some minutes later.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from drex.cli.output import output_path
from drex.comparison import machine
from drex.comparison.cell import Cell
from drex.comparison.policies_in_turn import Workload, random_prompts
from drex.comparison.subject import Subject, synthetic
from drex.config import DEFAULTS, EngineConfig
from drex.control.cost.model import CostModel
from drex.control.cost.profile import Profile
from drex.engine.build import build_engine
from drex.engine.engine import Engine
from drex.engine.torch_executor import TorchExecutor
from drex.profiling.profile_cache import MEASURE, obtain
from drex.sampling_params import SamplingParams
from drex.sim.executor import VirtualExecutor
from drex.sim.workload import draw_jobs

PROMPTS, OUTPUTS = (8, 32), (16, 48)
console = Console(width=160)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-160m", help="a shape of drex.sim.shapes")
    parser.add_argument("--exit-rate", type=float, default=0.6)
    parser.add_argument("--in-flight", default="1,4,16,32")
    parser.add_argument("--policies", default="full,split,drex")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=output_path)
    return parser.parse_args()


def profiled(subject: Subject, engine: Engine) -> Profile:
    """What passes take now."""
    exits = subject.model.exits if engine.scheduler.segments > 1 else subject.without_exits().exits
    assert isinstance(engine.executor, TorchExecutor)
    return obtain(MEASURE, engine.executor.runner, subject.config, exits, torch.get_num_threads())


def predicted(engine: Engine, profile: Profile, subject: Subject, work: Workload, turns: int) -> float:
    """Tokens a second of the same turns in virtual time, by the settings of an engine that ran."""
    real = engine.scheduler
    executor = VirtualExecutor(CostModel(profile))
    virtual = build_engine(real.config, real.layout, real.kv_fill, CostModel(profile), executor)
    cell = Cell(real.config.policy, real.config.max_num_seqs, virtual)
    for turn in range(turns):
        cell.run(work.requests(subject, cell.engine, turn))
    return statistics.median(cell.speeds[1:])


def main() -> None:
    """Run, print, write."""
    options = arguments()
    counts = [int(count) for count in options.in_flight.split(",")]
    longest = PROMPTS[1] + OUTPUTS[1]
    config = EngineConfig(
        max_model_len=longest,
        max_num_seqs=max(counts),
        max_num_batched_tokens=DEFAULTS.max_num_batched_tokens,
        kv_cache_tokens=max(counts) * longest,
    )
    subject = synthetic(options.shape, None, [options.exit_rate], "recompute", options.dtype, config)
    table = Table("N", "policy", "measured tok/s", "predicted", "off by", title=f"{subject.name}, {subject.label}")
    found: list[dict[str, Any]] = []
    for count in counts:
        jobs = draw_jobs(max(6, 3 * count), PROMPTS, OUTPUTS, seed=count)
        prompts = random_prompts(subject.model.decoder.spec.vocab_size, len(jobs), PROMPTS[1])
        work = Workload(prompts, jobs, SamplingParams(temperature=0.0, ignore_eos=True), "closed")
        for policy in options.policies.split(","):
            cell = Cell(policy, count, subject.engine(policy, count))
            profile = profiled(subject, cell.engine)
            # The first turn warms up.
            for turn in range(options.repeats + 1):
                cell.run(work.requests(subject, cell.engine, turn))
            measured = statistics.median(cell.speeds[1:])
            said = predicted(cell.engine, profile, subject, work, options.repeats + 1)
            found.append({"in_flight": count, "policy": policy, "measured": measured, "predicted": said})
            console.print(f"{policy}, {count} in flight: measured {measured:.1f}, predicted {said:.1f}", style="dim")
            table.add_row(str(count), policy, f"{measured:.1f}", f"{said:.1f}", f"{said / measured - 1:+.1%}")
    console.print(table)
    if options.json:
        report = {"benchmark": "prediction", **machine.describe(), "label": subject.label, "runs": found}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
