"""`drex simulate`: policies in virtual time, on a machine that is not at hand."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drex.cli.common import (
    EXIT_LAYERS_HELP,
    AdaptiveOption,
    HtmlOption,
    JsonOption,
    MaxSlowdownOption,
    RateOption,
    ThresholdsOption,
    TpotOption,
    TraceOption,
    TraceScaleOption,
    TraceSpeedOption,
    check_above_zero,
    check_at_least,
    check_choice,
    check_share,
    parse_floats,
    parse_ints,
)
from drex.cli.output import OutputFile

if TYPE_CHECKING:
    from drex.config import EngineConfig
    from drex.sim.workload import Job

YOUNG_OBJECTS = 20_000
"""Between two collections of them: a run makes no cycles, and looking for some at every 700 took a tenth of it."""


def simulate(
    shape: Annotated[
        str, typer.Option(help="llama-160m, llama-3.2-1b, llama-3-8b, llama-2-13b or qwen2.5-14b.")
    ] = "llama-2-13b",
    machine: Annotated[str, typer.Option(help="h200, h100, a100, l40s or rtx4090.")] = "h200",
    profile: Annotated[
        Path | None, typer.Option(help="Costs from a file of drex profile --out, instead of a machine.")
    ] = None,
    exits: Annotated[str | None, typer.Option("--exits", help=EXIT_LAYERS_HELP)] = None,
    exit_rates: Annotated[str, typer.Option(help="Share that exits at each exit point.")] = "0.6",
    exit_trace: Annotated[Path | None, typer.Option(help="Recorded exits: what drex generate --json printed.")] = None,
    confidences: Annotated[
        Path | None, typer.Option(help="Recorded confidences, of drex evaluate --confidences; goes with --thresholds.")
    ] = None,
    thresholds: ThresholdsOption = None,
    acceptance: Annotated[
        float, typer.Option(help="Share of the exits' tokens that full depth would say too, where nothing is recorded.")
    ] = 1.0,
    kv_fill: Annotated[str, typer.Option(help="recompute, project, alias or mask.")] = "recompute",
    policies: Annotated[str, typer.Option(help="See drex bench.")] = "full,split,drex",
    in_flight: Annotated[str, typer.Option(help="Requests in flight, each count a run of its own.")] = "8,32,256",
    requests: Annotated[int, typer.Option(help="Of each run.")] = 1000,
    prompt_tokens: Annotated[int, typer.Option(help="Of each request.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="Of each request.")] = 32,
    rate: RateOption = None,
    trace: TraceOption = None,
    trace_scale: TraceScaleOption = 1.0,
    trace_speed: TraceSpeedOption = 1.0,
    tpot_ms: TpotOption = None,
    max_slowdown: MaxSlowdownOption = None,
    adaptive: AdaptiveOption = False,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Rows a pass may have.")] = 2048,
    seed: int = 0,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Simulate scheduling policies: the engine's own control code, over virtual time. No weights, no GPU."""
    from rich.console import Console

    from drex.comparison.policy_names import policy_settings
    from drex.comparison.simulate import Scenario, read_confidences, read_depths, run, segment_lengths
    from drex.comparison.verdict import verdict
    from drex.comparison.versions import versions
    from drex.config import per_exit
    from drex.config.early_exit_json import KV_FILLS
    from drex.profiling.profile_file import load_profile
    from drex.progress import Progress
    from drex.report.html import render
    from drex.report.table import show
    from drex.sampling_params import SamplingParams
    from drex.sim.machines import MACHINES, machine_profile
    from drex.sim.shapes import SHAPES
    from drex.sim.workload import draw_jobs, read_trace

    # Whether early exit pays is in the report.
    logging.getLogger("drex.engine").setLevel(logging.ERROR)
    check_choice("--shape", shape, SHAPES)
    check_choice("--machine", machine.lower(), MACHINES)
    check_choice("--kv-fill", kv_fill, KV_FILLS)
    check_at_least(1, requests=requests, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    check_above_zero(rate=rate, trace_scale=trace_scale, trace_speed=trace_speed)
    check_share(acceptance=acceptance)
    names, counts = policies.split(","), parse_ints(in_flight, "--in-flight", least=1)
    for name in names:
        policy_settings(name)
    size = SHAPES[shape]
    layers = parse_ints(exits, "--exits") if exits else (size.layers // 2,)
    lengths = segment_lengths(layers, size.layers)
    costs = machine_profile(MACHINES[machine.lower()], size, lengths) if profile is None else load_profile(profile)
    if len(costs.segments) != len(lengths):
        raise ValueError(f"the profile has {len(costs.segments)} segments and --exits make {len(lengths)}")
    rates = parse_floats(exit_rates, "--exit-rates")
    if len(rates) != len(layers) or not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"--exit-rates {exit_rates}: give a share in [0, 1) for each exit after {list(layers)}")
    depths = read_depths(exit_trace, [*layers, size.layers]) if exit_trace else ()
    limits = per_exit(parse_floats(thresholds, "--thresholds"), len(layers)) if thresholds else ()
    if (confidences is None) != (thresholds is None):
        raise ValueError("--confidences and --thresholds go together")
    recorded = None if confidences is None else read_confidences(confidences, len(layers))
    params = SamplingParams(temperature=0.0, ignore_eos=True, tpot_ms=tpot_ms)
    scenario = Scenario(lengths, costs, rates, kv_fill, params, depths, recorded, limits, acceptance)
    if trace is not None:
        jobs = read_trace(trace, scale=trace_scale, speed=trace_speed)[:requests]
    else:
        lengths_of = (prompt_tokens, prompt_tokens), (output_tokens, output_tokens)
        jobs = draw_jobs(requests, *lengths_of, rate=rate, seed=seed)
    configs = _configs(jobs, counts, max_num_batched_tokens, max_slowdown, adaptive)
    gc.set_threshold(YOUNG_OBJECTS)
    with OutputFile(json_file, "--json") as data, OutputFile(html_file, "--html") as page:
        with Progress("simulating", len(jobs) * len(names) * len(configs)) as progress:
            found = [run(scenario, names, jobs, config, progress.advance) for config in configs]
        runs = [each for report in found for each in report["runs"]]
        report = {**found[-1], **versions(), "model": shape, "dtype": "16 bit", "runs": runs}
        report["verdict"] = verdict(report)
        show(report, Console())
        if data.wanted:
            data.write(json.dumps(report, indent=1) + "\n")
        if page.wanted:
            page.write(render(report) + "\n")


def _configs(
    jobs: Sequence[Job], counts: Sequence[int], max_num_batched_tokens: int, max_slowdown: float | None, adaptive: bool
) -> list[EngineConfig]:
    """Settings of an engine for each count in flight; it has K/V for as many of the longest job."""
    from drex.config import EngineConfig

    longest = max(job.prompt + job.output for job in jobs)
    return [
        EngineConfig(
            max_model_len=longest,
            max_num_seqs=count,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_tokens=count * longest,
            max_slowdown=max_slowdown,
            adaptive=adaptive,
        )
        for count in counts
    ]
