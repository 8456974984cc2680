"""How close each policy comes to the provable optimum, with all N requests decoding.

    OMP_WAIT_POLICY=passive python bench/optimum.py --in-flight 1,8,32 --exit-rates 0.6 --json optimum.json

N requests with prompts of at most 8 tokens start together; the window that counts begins and ends where nothing waits
in a buffer, with all N decoding. θ*, ideal and full depth are solved from whole-step wall times of the same run.
Policies take turns. Beside each rate stand the same passes costed by the pooled times that θ* is solved from: where
the machine's speed drifts from turn to turn, that tells decisions from drift.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from drex.cli.output import output_path
from drex.comparison import machine
from drex.comparison.cell import Cell
from drex.comparison.runner import take_turns
from drex.comparison.subject import Subject, synthetic, trained
from drex.comparison.yardsticks import Found, accuracy, yardstick
from drex.config import DEFAULTS, EngineConfig, ExitRule
from drex.control.cost.model import CostModel
from drex.control.request import Request
from drex.engine.metrics import PassRecord
from drex.sampling_params import SamplingParams
from drex.sim.executor import ExitSource, VirtualExecutor

PROMPT = 8
VIRTUAL = "no model runs: passes take what this machine's profile says, so that nothing but decisions is compared"
FEWEST = 128
"""Tokens that a turn has at least, all requests together."""
console = Console(width=160)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-160m", help="a shape of drex.sim.shapes, or `bundled`")
    parser.add_argument("--exit-rates", default="0.3,0.6,0.8", help="each a run of its own, with one exit")
    parser.add_argument("--in-flight", default="1,4,8,16,32,64")
    parser.add_argument("--policies", default="full,split,art,consensus,drex")
    parser.add_argument("--kv-fill", default="recompute")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--passes", type=int, default=60, help="output tokens of a request; more at few in flight")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--virtual", action="store_true", help=VIRTUAL)
    parser.add_argument("--json", type=output_path)
    return parser.parse_args()


def window(history: Sequence[PassRecord], in_flight: int) -> list[PassRecord]:
    """The passes between the first and the last moment at which all N are ready and nothing waits."""
    whole = [i for i, record in enumerate(history) if record.ready == in_flight and not sum(record.live)]
    return list(history[whole[0] : whole[-1]]) if len(whole) > 1 else []


def rate(records: Sequence[PassRecord]) -> float:
    """Tokens a second."""
    return sum(record.tokens for record in records) / sum(record.seconds for record in records)


def costed(records: Sequence[PassRecord], cost: CostModel) -> float:
    """Tokens a second if each pass had taken what such passes took in the whole run, of all policies."""
    return sum(record.tokens for record in records) / sum(_predicted(record, cost) for record in records)


def _predicted(record: PassRecord, cost: CostModel) -> float:
    return cost.predict_through(record.load) if record.through else cost.predict(record.segment, record.load)


def requests(subject: Subject, cell: Cell, tokens: int) -> list[tuple[float, Request]]:
    """N requests at once; each repetition draws other exits."""
    turn, segments = len(cell.speeds), cell.engine.scheduler.segments
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    rule = subject.model.exits.rule if segments > 1 else ExitRule("max_prob", ())
    vocab = subject.model.decoder.spec.vocab_size
    return [
        (
            0.0,
            Request(
                request_id=f"{turn}-{number}",
                prompt=tuple(3 + (number * 977 + turn * 101 + i * 31) % (vocab - 3) for i in range(PROMPT)),
                params=params,
                rule=rule,
                seed=1000 * turn + number,
                eos_token_ids=frozenset(),
                num_segments=segments,
                arrival=number,
            ),
        )
        for number in range(cell.in_flight)
    ]


def virtual(subject: Subject, cell: Cell, exits: ExitSource | None = None) -> VirtualExecutor:
    """Runs no model: passes take what the subject's profile with exits says, those of full depth all its segments."""
    profile = subject.profiles[len(subject.model.layout.lengths)]
    if cell.engine.scheduler.segments == 1:
        profile = profile.with_exits(())
    return VirtualExecutor(CostModel(profile), exits)


def measure(subject: Subject, in_flight: int, options: argparse.Namespace) -> dict[str, Any]:
    """All policies at one count in flight."""
    tokens = max(options.passes, FEWEST // in_flight)
    cells = [Cell(policy, in_flight, subject.engine(policy, in_flight)) for policy in options.policies.split(",")]
    if options.virtual:
        for cell in cells:
            cell.engine.executor = virtual(subject, cell)
    windows: dict[str, list[list[PassRecord]]] = {cell.policy: [] for cell in cells}

    def told(cell: Cell) -> None:
        assert cell.engine.history is not None
        windows[cell.policy].append(window(cell.engine.history, in_flight))

    take_turns(cells, lambda cell: requests(subject, cell, tokens), options.repeats + 1, told)
    for cell in cells:
        # The first turn warms up caches, costs and rates.
        windows[cell.policy] = [records for records in windows[cell.policy][1:] if records]
        cell.history = [record for records in windows[cell.policy] for record in records]
    # What `adaptive` leaves unchecked says nothing of the exits.
    found = yardstick([cell for cell in cells if "+" not in cell.policy])
    assert found is not None
    return {"in_flight": in_flight, "tokens": tokens, **_summary(cells, windows, found)}


def _summary(cells: list[Cell], windows: dict[str, list[list[PassRecord]]], found: Found) -> dict[str, Any]:
    policies = {}
    for cell in cells:
        rates = [rate(records) for records in windows[cell.policy]]
        achieved = statistics.median(rates)
        optimal = found.optimal or found.full
        policies[cell.policy] = {
            "tokens_per_s": achieved,
            "each": rates,
            "of_optimum": achieved / optimal,
            "costed_of_optimum": None if cell.policy == "full" else costed(cell.history, found.cost) / optimal,
            "of_full": achieved / found.full,
            "involuntary_exits": cell.metrics.involuntary_exits,
            "involuntary_stays": cell.metrics.involuntary_stays,
            "cost_error": cell.engine.scheduler.report().cost_error,
        }
        if cell.policy == "drex":
            policies[cell.policy] |= accuracy(cell, found)._asdict()
    return {
        "theta_star": found.optimal,
        "ideal": found.ideal,
        "full": found.full,
        "exit_rates": found.exit_rates,
        "policies": policies,
    }


def show(title: str, cells: list[dict[str, Any]]) -> None:
    """A table of one exit rate."""
    names = list(cells[0]["policies"])
    table = Table("N", "θ*", "ideal", "full", *names, "right predictions", "cost error p50 / p90", title=title)
    for cell in cells:
        policies = cell["policies"]
        ours = policies.get("drex", {})
        error = ours.get("cost_error") or {}
        table.add_row(
            str(cell["in_flight"]),
            *(f"{cell[key]:.1f}" for key in ("theta_star", "ideal", "full")),
            *(_rate(policies[name]) for name in names),
            f"{ours['right']}/{ours['decisions']}, {ours['ties']} ties" if ours else "",
            f"{error['p50']:.1%} / {error['p90']:.1%}" if error else "",
        )
    console.print(table)


def _rate(policy: dict[str, Any]) -> str:
    both = [policy["of_optimum"], policy["costed_of_optimum"]]
    return f"{policy['tokens_per_s']:.1f} ({', '.join(f'{share:.3f}' for share in both if share is not None)})"


def main() -> None:
    """Run, print, write."""
    options = arguments()
    counts = [int(count) for count in options.in_flight.split(",")]
    config = EngineConfig(
        max_model_len=PROMPT + max(options.passes, FEWEST),
        max_num_seqs=max(counts),
        max_num_batched_tokens=DEFAULTS.max_num_batched_tokens,
        kv_cache_tokens=max(count * (PROMPT + max(options.passes, FEWEST // count)) for count in counts),
    )
    found: dict[str, Any] = {"benchmark": "optimum", **machine.describe(), "options": vars(options), "runs": []}
    found["options"] = {name: str(value) for name, value in vars(options).items()}
    for exit_rate in options.exit_rates.split(","):
        subject = (
            trained(None, None, options.dtype, config)
            if options.shape == "bundled"
            else synthetic(options.shape, None, [float(exit_rate)], options.kv_fill, options.dtype, config)
        )
        cells = []
        for count in counts:
            subject.config = replace(config, max_num_seqs=max(counts))
            cells.append(measure(subject, count, options))
            console.print(f"{exit_rate}: {count} in flight done", style="dim")
        title = f"{subject.name} ({subject.label}), exit rate {exit_rate}, {options.kv_fill}"
        title += ", tokens/s (share of θ*, costed share)"
        show(title, cells)
        found["runs"].append({"exit_rate": exit_rate, "label": subject.label, "cells": cells})
        if options.shape == "bundled":
            break
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
