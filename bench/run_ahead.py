"""What run-ahead gains: full depth, rebatching, trusted and lossless run-ahead, in turns, while all N decode.

    python bench/run_ahead.py --json run_ahead.json
    python bench/run_ahead.py --shape bundled

By default passes run on random weights of a real shape, and what its exit point says is replayed from the bundled
model's first exit on held-out text: real confidences, and whether each token was the one of full depth. What counts
begins when all N have a token, and ends with the same number of tokens for all policies. Ratios are medians over the
turns, in each of which the policies come right after each other. Behind run-ahead's speed stands what it is of
rebatching's: by the clock, and with the passes of both costed by the pooled times of the run, which takes drift out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
from optimum import VIRTUAL, costed, rate, virtual
from rich.console import Console
from rich.table import Table

from drex.cli.output import output_path
from drex.comparison import machine
from drex.comparison.cell import Cell
from drex.comparison.policies_in_turn import Workload, random_prompts
from drex.comparison.runner import while_all_decode
from drex.comparison.subject import Subject, held_out_prompts, synthetic, trained
from drex.comparison.traced import Traced
from drex.comparison.yardsticks import yardstick
from drex.config import DEFAULTS, EngineConfig
from drex.llm import LLM
from drex.sampling_params import SamplingParams
from drex.sim.executor import ExitSource, RecordedConfidences
from drex.sim.workload import Job
from drex.tuning.corpus import split_held_out, standard_library
from drex.tuning.evaluate import confidences, held_out_blocks

PROMPT, FEWEST = 8, 512
"""Tokens: of a prompt, and of a turn at least, all requests together."""
POLICIES = ("full", "drex", "drex+run-ahead", "drex+lossless+adaptive")
console = Console(width=160)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-160m", help="a shape of drex.sim.shapes, or `bundled`")
    parser.add_argument("--exit-layer", type=int, default=8, help="of the shape's layers")
    parser.add_argument("--threshold", type=float, default=0.3, help="of the shape's exit")
    parser.add_argument("--in-flight", default="1,4,8,16,32,64")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=64, help="of each request; more at few in flight")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--virtual", action="store_true", help=VIRTUAL)
    parser.add_argument(
        "--trace-tokens", type=int, default=16384, help="held-out tokens whose confidences are recorded"
    )
    parser.add_argument("--json", type=output_path)
    options = parser.parse_args()
    if "drex" not in options.policies.split(","):
        parser.error("--policies needs drex, which run-ahead is compared with")
    return options


def recorded(tokens: int) -> RecordedConfidences:
    """The bundled model's first exit on the part of the standard library that training held out."""
    llm = LLM(profile="nominal")
    blocks = held_out_blocks(llm, split_held_out(standard_library(), 0.02)[1], tokens)
    said = confidences(llm, blocks)
    both = (np.concatenate([np.array(each[name][:1]) for each in said], axis=1) for name in ("confidences", "right"))
    certain, right = both
    return RecordedConfidences(certain.astype(np.float64), right.astype(np.bool_))


def measure(subject: Subject, count: int, exits: ExitSource | None, options: argparse.Namespace) -> dict[str, Any]:
    """All policies at one count in flight."""
    tokens = max(options.tokens, FEWEST // count)
    prompts = (
        held_out_prompts(subject, PROMPT)
        if exits is None
        else random_prompts(subject.model.decoder.spec.vocab_size, 64, PROMPT)
    )
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    work = Workload(prompts, [Job(PROMPT, tokens)] * count, params, "closed")
    cells = [Cell(policy, count, subject.engine(policy, count)) for policy in options.policies.split(",")]
    for cell in cells:
        if exits is not None and cell.policy != "full":
            cell.engine.executor = Traced(cell.engine.executor, exits, cell.engine.scheduler.segments)
    if options.virtual:
        for cell in cells:
            cell.engine.executor = virtual(subject, cell, exits)
    speeds: dict[str, list[float]] = {cell.policy: [] for cell in cells}
    for turn in range(options.repeats + 1):
        for cell in cells:
            passes = while_all_decode(cell.engine, work.requests(subject, cell.engine, turn), count)
            # The first turn warms up costs, rates and acceptance.
            if turn:
                cell.history.extend(passes)
                speeds[cell.policy].append(rate(passes))
    plain = next(cell for cell in cells if cell.policy == "drex")
    found, pooled = yardstick([cell for cell in cells if cell.policy in ("full", "drex")]), yardstick(cells)
    assert found is not None
    assert pooled is not None
    return {
        "in_flight": count,
        "tokens": tokens,
        "theta_star": found.optimal,
        "ideal": found.ideal,
        "full": found.full,
        "exit_rates": found.exit_rates,
        "tokens_per_s": {name: statistics.median(each) for name, each in speeds.items()},
        "each": speeds,
        "times_full": {name: _ratio(each, speeds.get("full", [found.full])) for name, each in speeds.items()},
        "times_rebatching": {name: _ratio(each, speeds["drex"]) for name, each in speeds.items() if "+" in name},
        "costed_times_rebatching": {
            cell.policy: costed(cell.history, pooled.cost) / costed(plain.history, pooled.cost)
            for cell in cells
            if "+" in cell.policy
        },
        "drafts": {cell.policy: cell.engine.scheduler.report().run_ahead for cell in cells if "+" in cell.policy},
    }


def _ratio(speeds: list[float], beside: list[float]) -> float:
    """The median of the turns' ratios; one figure beside them serves all."""
    return statistics.median(speed / base for speed, base in zip(speeds, itertools.cycle(beside), strict=False))


def show(title: str, found: list[dict[str, Any]]) -> None:
    """A table: tokens a second, and times full depth's."""
    names = list(found[0]["tokens_per_s"])
    table = Table("N", "exit rates", "θ*", "ideal", *names, "accepted", "calibration error", title=title)
    for each in found:
        full = each["tokens_per_s"].get("full", each["full"])
        drafts = each["drafts"].get("drex+run-ahead") or {}
        verified = drafts.get("verified")
        table.add_row(
            str(each["in_flight"]),
            " ".join(f"{value:.2f}" for value in each["exit_rates"]),
            *(f"{each[key] / full:.2f}" for key in ("theta_star", "ideal")),
            *(_speed(each, name) for name in names),
            f"{drafts['accepted'] / verified:.2f}" if verified else "",
            f"{drafts['calibration_error']:.3f}" if verified else "",
        )
    console.print(table)


def _speed(found: dict[str, Any], name: str) -> str:
    """Tokens a second, times full depth, and times rebatching: by the clock and costed."""
    shown = [f"{found['times_full'][name]:.2f}"]
    if "+" in name:
        shown += [f"{found[key][name]:.3f}" for key in ("times_rebatching", "costed_times_rebatching")]
    return f"{found['tokens_per_s'][name]:.1f} ({', '.join(shown)})"


def main() -> None:
    """Run, print, write."""
    options = arguments()
    counts = [int(count) for count in options.in_flight.split(",")]
    longest = PROMPT + max(options.tokens, FEWEST)
    config = EngineConfig(
        max_model_len=longest,
        max_num_seqs=max(counts),
        max_num_batched_tokens=DEFAULTS.max_num_batched_tokens,
        kv_cache_tokens=max(count * (PROMPT + max(options.tokens, FEWEST // count)) for count in counts),
    )
    bundled = options.shape == "bundled"
    exits = None if bundled else recorded(options.trace_tokens)
    rates, layers = [1 - options.threshold], [options.exit_layer]
    subject = (
        trained(None, None, options.dtype, config)
        if bundled
        else synthetic(options.shape, layers, rates, "recompute", options.dtype, config)
    )
    label = subject.label if bundled else "random weights, confidences and acceptance of the bundled model's first exit"
    found = []
    for count in counts:
        subject.config = replace(config, max_num_seqs=max(counts))
        found.append(measure(subject, count, exits, options))
        console.print(f"{count} in flight done", style="dim")
    show(f"{subject.name} ({label}), tokens/s (times full depth, times rebatching, costed)", found)
    if options.json:
        facts = {name: str(value) for name, value in vars(options).items()}
        report = {"benchmark": "run_ahead", **machine.describe(), "label": label, "options": facts, "runs": found}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
