"""The figures of docs/scheduling.md and docs/run-ahead.md.

    python bench/figures.py --modelled
    python bench/figures.py --optimum opt3.json opt6.json opt8.json --run-ahead llama.json bundled.json
    python bench/figures.py --simulated simulated.json

--modelled needs no measurement: exits after half of Llama-2-13B, with costs of the H200's data sheet. The others draw
what bench/optimum.py, bench/run_ahead.py and bench/simulated.py wrote with --json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from picture import Panel, lines, over_counts, picture
from rich.console import Console
from simulated import PROMPT, TOKENS, serve, speed

from drex.comparison.simulate import Scenario
from drex.comparison.yardsticks import yardstick
from drex.control.constants import OWED_MOST_FILLS, SOLVE_DELAY_PASSES
from drex.control.cost.model import CostModel
from drex.control.plan import FloatArray
from drex.control.policy.flush import FlushRule, Waiting
from drex.control.policy.rates import ExitRates
from drex.control.policy.yardstick import mean_pass_seconds, measure
from drex.report.charts import Axis
from drex.sampling_params import SamplingParams
from drex.sim.machines import MACHINES, machine_profile
from drex.sim.shapes import SHAPES

OVER_FULL = "tokens/s, times full depth"
EXIT_RATE, EXIT_RATES = 0.8, (0.3, 0.6, 0.8)
BUFFERS, COUNTS = (8, 32, 128), tuple(2**power for power in range(9))
CONTEXT = 128.0
"""K/V entries of a request where the decision process is solved."""
FEWEST = 16384
"""Tokens of each simulated policy, at least."""
MANY = 1_000_000
Figure = tuple[str, str, str, Sequence[Panel], Sequence[str]]
"""File, title, what is drawn in which unit, panels, and where the numbers are from."""
console = Console(width=160)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modelled", action="store_true", help="draw what needs no measurement; takes minutes")
    parser.add_argument("--optimum", type=Path, nargs="+", help="JSON of bench/optimum.py, a panel an exit rate")
    parser.add_argument("--run-ahead", type=Path, nargs="+", help="JSON of bench/run_ahead.py, a panel each")
    parser.add_argument("--simulated", type=Path, nargs="+", help="JSON of bench/simulated.py, a panel a shape")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    return parser.parse_args()


def scenario(exit_rate: float) -> Scenario:
    """Exits after half of Llama-2-13B's layers on an H200, by the data sheet."""
    shape = SHAPES["llama-2-13b"]
    half = shape.layers // 2
    lengths = (half, shape.layers - half)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    return Scenario(lengths, machine_profile(MACHINES["h200"], shape, lengths), (exit_rate,), "recompute", params)


@lru_cache(maxsize=4096)
def binomial(count: int, chance: float) -> FloatArray:
    """How likely each number of successes is."""
    return np.array([math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(count + 1)])


def earned(shallow: FloatArray, flush: FloatArray, starts: Sequence[int]) -> float:
    """Tokens a second, exactly, of a rule: how many ready rows start, by how many wait; 0 flushes the buffer.

    Mean tokens and seconds up to the next flush, from a full buffer back to the empty one, where each cycle begins.
    """
    count = len(shallow) - 1
    tokens, seconds = np.zeros(count + 1), np.zeros(count + 1)
    for waiting in range(count, -1, -1):
        rows = starts[waiting]
        if rows == 0:
            tokens[waiting], seconds[waiting] = waiting, flush[waiting]
            continue
        moves = binomial(rows, 1 - EXIT_RATE)
        ahead = slice(waiting + 1, waiting + rows + 1)
        tokens[waiting] = (EXIT_RATE * rows + moves[1:] @ tokens[ahead]) / (1 - moves[0])
        seconds[waiting] = (shallow[rows] + moves[1:] @ seconds[ahead]) / (1 - moves[0])
    return float(tokens[0] / seconds[0])


def rule_starts(cost: CostModel, count: int) -> list[int]:
    """What the online rule decides, by how many wait, once it knows the exit rate and θ*; fills are the mean ones."""
    rates = ExitRates(1)
    rates.observe(0, MANY, round(EXIT_RATE * MANY))
    rule = FlushRule(cost, rates, "recompute", 2 * count + 2048, OWED_MOST_FILLS)
    for pass_number in (0, SOLVE_DELAY_PASSES):
        rule.tick(pass_number, count, CONTEXT)
    owed = EXIT_RATE / (1 - EXIT_RATE)
    states = (Waiting(count - waiting, [0, waiting], [0, round(waiting * owed)]) for waiting in range(count + 1))
    return [chosen[1] for chosen in map(rule.by_worth, states) if chosen is not None]


def decision(count: int) -> Panel:
    """Fixed flush sizes, the optimum and the online rule in the decision process, solved exactly."""
    cost, counts = CostModel(scenario(EXIT_RATE).profile), np.arange(count + 1.0)
    found = measure(cost, (EXIT_RATE,), count, CONTEXT, "recompute", most_owed=OWED_MOST_FILLS)
    shallow, flush = (
        mean_pass_seconds(cost, s, (EXIT_RATE,), counts, CONTEXT, "recompute", OWED_MOST_FILLS) for s in (0, 1)
    )

    def of_full(rate: float | None) -> list[float]:
        assert rate is not None
        return [rate / found.full]

    def fixed(size: int) -> list[float]:
        starts = [count - waiting if waiting < size else 0 for waiting in range(count + 1)]
        return of_full(earned(shallow, flush, starts))

    starts = rule_starts(cost, count)
    at, rule = starts.index(0), of_full(earned(shallow, flush, starts))
    bounds = {"ideal": of_full(found.ideal), "theta_star": of_full(found.optimal), "full": [1.0]}
    rows: list[tuple[float, dict[str, list[float]]]] = [(b, {"fixed": fixed(b)}) for b in range(1, count + 1)]
    rows += [(1, {**bounds, "split": fixed(1)}), (count, bounds), (at, {"drex": rule})]
    heading = f"N = {count}: θ* {bounds['theta_star'][0]:.3f}, drex {rule[0]:.3f} (b = {at})"
    return Panel(heading, Axis.over("flush size b, rows", counts.tolist(), whole=True), lines(rows))


def policies(exit_rate: float) -> Panel:
    """Policies over counts in flight, in the simulator: the engine's own control code over virtual time."""
    rows = []
    for count in COUNTS:
        turns = math.ceil(FEWEST / (count * TOKENS))
        names = ("full", "split", "art", "drex")
        cells = [serve(scenario(exit_rate), name, count, turns=turns) for name in names]
        found = yardstick(cells)
        assert found is not None
        assert found.optimal is not None
        bounds = {"ideal": [found.ideal / found.full], "theta_star": [found.optimal / found.full]}
        rows.append((float(count), bounds | {cell.policy: [speed(cell) / found.full] for cell in cells}))
        console.print(f"exit rate {exit_rate}: {count} in flight done", style="dim")
    return over_counts(f"exit rate {exit_rate:g}", rows)


def shares(reports: Sequence[dict[str, Any]], costed: bool) -> list[Panel]:
    """Share of θ* by policy: as it was earned, or of the same passes at the mean times of such passes."""
    panels = []
    for run in sorted((run for report in reports for run in report["runs"]), key=lambda run: float(run["exit_rate"])):
        rows = []
        for cell in run["cells"]:
            values = {"theta_star": [1.0]}
            for name, said in cell["policies"].items():
                rates = (said["tokens_per_s"], *said["each"])
                found = [said["costed_of_optimum"]] if costed else [rate / cell["theta_star"] for rate in rates]
                values |= {name: found} if None not in found else {}
            rows.append((float(cell["in_flight"]), values))
        panels.append(over_counts(f"exit rate {run['exit_rate']}" + (", passes at mean times" if costed else ""), rows))
    return panels


def ahead_simulated(report: dict[str, Any]) -> list[Panel]:
    """Rebatching and run-ahead in the simulator."""
    names = ("ideal", "theta_star", "drex", "drex+run-ahead", "drex+lossless")
    panels = []
    for shape, cells in report["shapes"].items():
        relative = [{"full": [1.0], **{name: [cell[name] / cell["full"]] for name in names}} for cell in cells]
        rows = [(float(cell["in_flight"]), values) for cell, values in zip(cells, relative, strict=True)]
        panels.append(over_counts(shape, rows))
    return panels


def ahead_panel(report: dict[str, Any]) -> Panel:
    """Rebatching and run-ahead, a shape."""
    rows = []
    for cell in report["runs"]:
        turns, full = cell["each"], cell["tokens_per_s"].get("full", cell["full"])
        whole = turns.get("full", [full] * len(next(iter(turns.values()))))
        values = {
            name: [ratio, *(rate / base for rate, base in zip(turns[name], whole, strict=True))]
            for name, ratio in cell["times_full"].items()
        }
        values |= {name: [cell[name] / full] for name in ("theta_star", "ideal") if cell[name] is not None}
        rows.append((float(cell["in_flight"]), values))
    return over_counts(f"{report['options']['shape']}: {report['label'].partition(',')[0]}", rows)


def facts(reports: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """Measured or modelled, and where the numbers are from."""
    first = reports[0]
    virtual, at = first["options"].get("virtual") == "True", first["machine"]
    how = (
        "No model runs: passes take what the profile of this machine says." if virtual else "Wall time of whole steps."
    )
    where = f"{at['cpu']}, {at['cores']} cores, torch {first['versions']['torch']}, {first['date'][:10]}"
    return "modelled" if virtual else "measured", [f"{how} Upright bars span the turns.", where]


def modelled() -> Iterator[Figure]:
    """What needs no measurement."""
    sheet = "Costs of the H200's data sheet, not measured. Llama-2-13B, 16 bit, exit after 20 of 40 layers, exact K/V."
    note = f"Exit rate {EXIT_RATE:g}, {CONTEXT:.0f} K/V entries a request; solved exactly."
    yield "decision.svg", "When to flush", OVER_FULL, [decision(count) for count in BUFFERS], (sheet, note)
    note = f"Simulated with prompts of {PROMPT} tokens, outputs of {TOKENS}, all N decoding; θ* and ideal solved."
    panels = [policies(rate) for rate in EXIT_RATES]
    yield "policies.svg", "Policies against the optimum", OVER_FULL, panels, (sheet, note)


def optimum(reports: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """From bench/optimum.py; what was measured also without the machine's drift from turn to turn."""
    kind, where = facts(reports)
    what = f"{reports[0]['options']['shape']}, {reports[0]['runs'][0]['label']}."
    panels = shares(reports, False) + (shares(reports, True) if kind == "measured" else [])
    title = f"Policies against the optimum, {kind}"
    yield f"optimum-{kind}.svg", title, "tokens/s, share of θ*", panels, (what, *where)


def simulated(reports: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """From bench/simulated.py."""
    sheet = "Costs of the H200's data sheet, not measured. Exit after a third of the layers, exact K/V, threshold .3;"
    note = "confidences, and which tokens are right, replayed from the bundled model's first exit on held-out code."
    panels = [panel for report in reports for panel in ahead_simulated(report)]
    yield "run-ahead-simulated.svg", "Run-ahead, simulated", OVER_FULL, panels, (sheet, note)


def run_ahead(reports: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """From bench/run_ahead.py."""
    kind, where = facts(reports)
    labels = [f"{report['options']['shape']}: {report['label']}." for report in reports]
    panels = [ahead_panel(report) for report in reports]
    yield f"run-ahead-{kind}.svg", f"Run-ahead, {kind}", OVER_FULL, panels, (*labels, *where)


def main() -> None:
    """Draw what was asked for."""
    options = arguments()
    figures: list[Figure] = [*modelled()] if options.modelled else []
    for draw, files in ((optimum, options.optimum), (run_ahead, options.run_ahead), (simulated, options.simulated)):
        if files:
            figures += draw([json.loads(file.read_text(encoding="utf-8")) for file in files])
    options.out.mkdir(parents=True, exist_ok=True)
    for name, title, unit, panels, source in figures:
        (options.out / name).write_text(picture(title, unit, panels, source), encoding="utf-8")
        for panel in panels:
            for one in panel.series:
                said = " ".join(f"{point.x:g}: {point.y:.3f}" for point in one.points)
                console.print(f"{name}, {panel.heading}, {one.label}: {said}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
