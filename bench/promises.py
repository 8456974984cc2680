"""Whether drex keeps its promises: bounds on slowdown and time per token, adversarial exits, a profile that is wrong.

    OMP_WAIT_POLICY=passive python bench/promises.py --json promises.json

Random weights of a real shape with synthetic exits. Bounds are checked in a closed loop of requests of mixed lengths,
against full depth at as many in flight, policies taking turns. Throughput under stress is measured as in
`bench/optimum.py`, while all N decode.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from optimum import PROMPT, VIRTUAL, rate, requests, virtual, window
from rich.console import Console
from rich.table import Table

from drex.cli.output import output_path
from drex.comparison import machine
from drex.comparison.cell import Cell
from drex.comparison.policies_in_turn import Workload, random_prompts
from drex.comparison.runner import take_turns
from drex.comparison.subject import Subject, synthetic
from drex.comparison.traced import Traced
from drex.comparison.yardsticks import yardstick
from drex.config import DEFAULTS, EngineConfig
from drex.control.plan import Evaluations
from drex.engine.metrics import PassRecord
from drex.sampling_params import SamplingParams
from drex.sim.executor import DrawnExits, ExitSource, Said
from drex.sim.workload import draw_jobs

EXIT_RATE = 0.6
SLOWDOWN = 1.25
PACE = 1.5
PROMPTS, OUTPUTS = (8, 32), (16, 48)
drawn_exits = DrawnExits()
console = Console()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-160m", help="a shape of drex.sim.shapes")
    parser.add_argument("--in-flight", default="4,8,16,32")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--passes", type=int, default=40, help="output tokens of a request under stress")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=("bounds", "stress"))
    parser.add_argument("--virtual", action="store_true", help=VIRTUAL)
    parser.add_argument("--json", type=output_path)
    return parser.parse_args()


# Bounds


def bounds(subject: Subject, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Full depth, drex, and drex under each bound, in turns on the same requests."""
    jobs = draw_jobs(4 * count, PROMPTS, OUTPUTS, seed=count)
    prompts = random_prompts(subject.model.decoder.spec.vocab_size, len(jobs), PROMPTS[1])
    plain = SamplingParams(temperature=0.0, ignore_eos=True)
    base, names = subject.config, ("full", "drex", "max_slowdown", "tpot_ms")
    cells, work = {}, {name: Workload(prompts, jobs, plain, "closed") for name in names}
    for name in names:
        subject.config = replace(base, max_slowdown=SLOWDOWN if name == "max_slowdown" else None)
        cells[name] = Cell(name, count, subject.engine("full" if name == "full" else "drex", count))
    subject.config = base
    if options.virtual:
        for cell in cells.values():
            cell.engine.executor = virtual(subject, cell)
    for name in names:
        cells[name].warm_up(work[name].requests(subject, cells[name].engine, -1)[: 2 * count])
    # The target follows from full depth's own time a token, measured before.
    cells["full"].run(work["full"].requests(subject, cells["full"].engine, 0))
    target = PACE * cells["full"].metrics.summary()["tpot_ms"]["mean"]
    work["tpot_ms"] = replace(work["tpot_ms"], params=replace(plain, tpot_ms=target))
    executor = cells["full"].engine.executor
    cells["full"] = Cell("full", count, subject.engine("full", count))
    cells["full"].engine.executor = executor

    def arrivals(cell: Cell) -> Any:
        return work[cell.policy].requests(subject, cell.engine, len(cell.speeds))

    take_turns(list(cells.values()), arrivals, options.repeats, lambda cell: None)
    tpots = {name: np.array(cell.metrics.times("tpot")) * 1e3 for name, cell in cells.items()}
    return {
        "in_flight": count,
        "tpot_target_ms": target,
        "policies": {
            name: {
                "tokens_per_s": statistics.median(cell.speeds),
                "rct_ms": cell.metrics.summary()["rct_ms"],
                "within_tpot": float((tpots[name] <= target).mean()),
                "late": cell.engine.scheduler.report().late,
                "infeasible": cell.engine.scheduler.report().infeasible,
            }
            for name, cell in cells.items()
        },
    }


def show_bounds(found: Sequence[dict[str, Any]]) -> None:
    """A table, all relative to full depth."""
    names = ("drex", "max_slowdown", "tpot_ms")
    titles = {"drex": "no bound", "max_slowdown": f"max_slowdown {SLOWDOWN}", "tpot_ms": f"tpot_ms {PACE} x full's"}
    table = Table("N", "full tok/s", title="share of full depth's: tokens/s, p99 RCT; share of requests within tpot_ms")
    for name in names:
        table.add_column(titles[name])
    for each in found:
        full = each["policies"]["full"]
        cells = []
        for name in names:
            ours = each["policies"][name]
            speed = ours["tokens_per_s"] / full["tokens_per_s"]
            slowest = ours["rct_ms"]["p99"] / full["rct_ms"]["p99"]
            cells.append(f"{speed:.2f}, {slowest:.2f}, {ours['within_tpot']:.1%}")
        table.add_row(f"{each['in_flight']}", f"{full['tokens_per_s']:.1f}", *cells)
    console.print(table)


# Stress


def all_exit(segment: int, asked: Evaluations) -> Said:
    """Everybody is sure."""
    return drawn_exits(segment, asked)._replace(confidences=np.ones(len(asked)))


def none_exits(segment: int, asked: Evaluations) -> Said:
    """Nobody is sure."""
    return drawn_exits(segment, asked)._replace(confidences=np.zeros(len(asked)))


def alternating(segment: int, asked: Evaluations) -> Said:
    """Every other token is sure."""
    return drawn_exits(segment, asked)._replace(confidences=(asked.positions % 2).astype(np.float64))


def one_never(segment: int, asked: Evaluations) -> Said:
    """One request never exits; the others do as they do."""
    never = np.array([draws.request_id.endswith("-0") for draws in asked.draws], dtype=np.bool_)
    said = drawn_exits(segment, asked)
    return said._replace(confidences=np.where(never, 0.0, said.confidences))


STRESS: dict[str, tuple[ExitSource, float]] = {
    "none of it": (drawn_exits, 1.0),
    "all exit": (all_exit, 1.0),
    "none exits": (none_exits, 1.0),
    "every other token exits": (alternating, 1.0),
    "one request never exits": (one_never, 1.0),
    "profile three times too slow": (drawn_exits, 3.0),
    "profile three times too fast": (drawn_exits, 1 / 3),
}


def stress(subject: Subject, count: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each kind of stress: full depth, drex, and adaptive drex, in turns."""
    out = []
    subject.engine("drex", count)
    subject.engine("full", count)
    honest = dict(subject.profiles)
    for name, (exits, factor) in STRESS.items():
        subject.profiles = {segments: profile.scaled(factor) for segments, profile in honest.items()}
        cells = [Cell("full", count, subject.engine("full", count))]
        for policy in ("drex", "drex+adaptive"):
            engine = subject.engine(policy, count)
            engine.executor = Traced(engine.executor, exits, engine.scheduler.segments)
            cells.append(Cell(policy, count, engine))
        if options.virtual:
            for cell in cells:
                cell.engine.executor = virtual(replace(subject, profiles=honest), cell, exits)
        windows: dict[str, list[list[PassRecord]]] = {cell.policy: [] for cell in cells}

        def told(cell: Cell, windows: dict[str, list[list[PassRecord]]] = windows) -> None:
            assert cell.engine.history is not None
            windows[cell.policy].append(window(cell.engine.history, cell.in_flight))

        take_turns(cells, lambda cell: requests(subject, cell, options.passes), options.repeats + 1, told)
        for cell in cells:
            # The first turn warms up.
            cell.history = [record for records in windows[cell.policy][1:] for record in records]
        # What `adaptive` leaves unchecked says nothing of the exits.
        found = yardstick(cells[:2])
        assert found is not None
        speeds = {cell.policy: rate(cell.history) for cell in cells}
        out.append(
            {"stress": name, "theta_star": found.optimal, "exit_rates": found.exit_rates, "tokens_per_s": speeds}
        )
    subject.profiles = honest
    return out


def show_stress(found: Sequence[dict[str, Any]], count: int) -> None:
    """A table."""
    table = Table(
        "stress", "exit rate", "θ*", "full", "drex", "of θ*", "adaptive", "of full", title=f"{count} in flight"
    )
    for each in found:
        speeds, optimal = each["tokens_per_s"], each["theta_star"]
        table.add_row(
            each["stress"],
            f"{each['exit_rates'][0]:.2f}",
            "" if optimal is None else f"{optimal:.1f}",
            f"{speeds['full']:.1f}",
            f"{speeds['drex']:.1f}",
            "" if optimal is None else f"{speeds['drex'] / optimal:.3f}",
            f"{speeds['drex+adaptive']:.1f}",
            f"{speeds['drex+adaptive'] / speeds['full']:.3f}",
        )
    console.print(table)


def main() -> None:
    """Run, print, write."""
    options = arguments()
    counts = [int(count) for count in options.in_flight.split(",")]
    longest = max(PROMPT + options.passes, PROMPTS[1] + OUTPUTS[1])
    config = EngineConfig(
        max_model_len=longest,
        max_num_seqs=max(counts),
        max_num_batched_tokens=DEFAULTS.max_num_batched_tokens,
        kv_cache_tokens=max(counts) * longest,
    )
    subject = synthetic(options.shape, None, [EXIT_RATE], "recompute", options.dtype, config)
    report: dict[str, Any] = {"benchmark": "promises", **machine.describe(), "label": subject.label}
    report["options"] = {name: str(value) for name, value in vars(options).items()}
    if options.only != "stress":
        report["bounds"] = [bounds(subject, count, options) for count in counts]
        show_bounds(report["bounds"])
    if options.only != "bounds":
        report["stress"] = {}
        for count in counts[1:3]:
            report["stress"][count] = stress(subject, count, options)
            show_stress(report["stress"][count], count)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
