"""`drex bench`: policies against each other, the optimum and full depth; or a server under load, with --url."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drex.bench.load import Target
from drex.cli.common import (
    EXIT_LAYERS_HELP,
    AdaptiveOption,
    CriterionOption,
    DtypeOption,
    HtmlOption,
    JsonOption,
    KvFillOption,
    MaxModelLenOption,
    MaxSlowdownOption,
    RateOption,
    ThresholdsOption,
    TpotOption,
    TraceOption,
    TraceScaleOption,
    TraceSpeedOption,
    early_exit_from,
    parse_floats,
    parse_ints,
)

if TYPE_CHECKING:
    from drex.bench.bench import Workload
    from drex.bench.open_loop import Workload as Asked
    from drex.bench.subject import Subject

LONGEST_PROMPT = 64
LOAD_REQUESTS = 200
ONLY_URL = ("api_key", "chat", "ignore_eos", "burstiness", "goodput")
ONLY_POLICIES = (
    *("policies", "in_flight", "shape", "exit_rates", "exits", "thresholds", "criterion", "kv_fill", "dtype"),
    "max_model_len",
    *("tpot_ms", "max_slowdown", "adaptive", "repeats", "html_file"),
)
"""Options that mean something with --url, and without."""


def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder or hub id; none: the bundled model.")] = None,
    policies: Annotated[
        str,
        typer.Option(
            help="Of drex, split, full, art, consensus, majority, greedy, latency_only; drex+run-ahead, drex+lossless, "
            "drex+adaptive."
        ),
    ] = "full,split,drex",
    in_flight: Annotated[str, typer.Option(help="Requests in flight, each count a round of its own.")] = "1,8,32",
    shape: Annotated[str | None, typer.Option(help="Random weights of this shape instead of a model.")] = None,
    exit_rates: Annotated[
        str | None, typer.Option(help="With --shape: share that exits at each exit point, by a synthetic trace.")
    ] = None,
    exits: Annotated[str | None, typer.Option("--exits", help=EXIT_LAYERS_HELP)] = None,
    thresholds: ThresholdsOption = None,
    criterion: CriterionOption = None,
    kv_fill: KvFillOption = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL with "prompt"; by default held-out standard-library code.')
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Of a turn; by default four a seat, at least eight.")] = None,
    output_tokens: Annotated[int, typer.Option(help="Of each request.")] = 48,
    rate: RateOption = None,
    trace: TraceOption = None,
    trace_scale: TraceScaleOption = 1.0,
    trace_speed: TraceSpeedOption = 1.0,
    tpot_ms: TpotOption = None,
    max_slowdown: MaxSlowdownOption = None,
    adaptive: AdaptiveOption = False,
    repeats: Annotated[int, typer.Option(help="Interleaved turns of each policy.")] = 3,
    seed: int = 0,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
    url: Annotated[
        str | None, typer.Option(help="Load an OpenAI-compatible server instead; MODEL is the name to ask it for.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="With --url: of the server.", envvar="OPENAI_API_KEY")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="With --url: chat completions.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="With --url: go on after the end token.")] = False,
    burstiness: Annotated[float, typer.Option(help="With --url: of arrivals; 1 is Poisson, less comes in bursts.")] = 1,
    goodput: Annotated[
        list[str] | None, typer.Option(help="With --url: target in ms, as in ttft:500, tpot:100 or e2el:2000.")
    ] = None,
) -> None:
    """Benchmark scheduling policies at equal requests in flight and equal K/V memory, or a server with --url."""
    _check_given(context, url is not None)
    if url is not None:
        from drex.bench.open_loop import Workload as Asked

        count = LOAD_REQUESTS if requests is None else requests
        asked = Asked(prompts, trace, trace_scale, trace_speed, count, output_tokens, rate, burstiness, seed)
        _load(Target(url, model or "", api_key, chat, ignore_eos), asked, goodput or [], json_file)
        return
    from drex.config import EngineConfig, policy_settings
    from drex.sim.shapes import shape_named

    names, counts = policies.split(","), parse_ints(in_flight, "--in-flight")
    for name in names:
        policy_settings(name)
    if shape is None and exit_rates is not None:
        raise ValueError("--exit-rates goes with --shape: a trained model has its own exits")
    if shape is not None:
        shape_named(shape)
    from rich.console import Console

    from drex.bench.bench import run
    from drex.bench.html import render
    from drex.bench.runner import Cell
    from drex.bench.subject import synthetic, trained
    from drex.bench.table import show

    # Whether early exit pays is in the report.
    logging.getLogger("drex.engine").setLevel(logging.ERROR)
    longest = LONGEST_PROMPT + output_tokens if max_model_len is None else max_model_len
    config = EngineConfig(
        max_model_len=longest,
        max_num_seqs=max(counts),
        kv_cache_tokens=max(counts) * longest,
        max_slowdown=max_slowdown,
        adaptive=adaptive,
    )
    if shape is not None:
        rates = parse_floats(exit_rates or "0.6", "--exit-rates")
        layers = None if exits is None else parse_ints(exits, "--exits")
        subject = synthetic(shape, layers, rates, kv_fill or "recompute", dtype, config)
    else:
        settings = early_exit_from(exits, thresholds, criterion, kv_fill, False)
        subject = trained(model, settings, dtype, config, max_model_len)
    make = _workloads(subject, prompts, requests, output_tokens, rate, trace, trace_scale, trace_speed, tpot_ms, seed)
    err = Console(stderr=True)

    def told(cell: Cell) -> None:
        if sys.stderr.isatty():
            err.print(f"{cell.policy}, {cell.in_flight} in flight: {cell.speeds[-1]:.1f} tokens/s", style="dim")

    report = run(subject, names, counts, make, repeats, told=told)
    show(report, Console())
    for path, text in ((json_file, json.dumps(report, indent=1)), (html_file, render(report) if html_file else "")):
        if path is not None:
            path.write_text(text + "\n", encoding="utf-8")
            typer.echo(f"wrote {path}", err=True)


def _check_given(context: typer.Context, with_url: bool) -> None:
    """Raise ValueError for an option that would be ignored."""
    for name in ONLY_POLICIES if with_url else ONLY_URL:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.removesuffix("_file").replace("_", "-")
            raise ValueError(f"{option} goes {'without' if with_url else 'with'} --url: leave it out")


def _load(target: Target, asked: Asked, goodput: list[str], json_file: Path | None) -> None:
    """Load a server, show and write the report."""
    import asyncio

    from rich.console import Console

    from drex.bench.load_report import parse_goodput, show
    from drex.bench.open_loop import run

    targets = parse_goodput(goodput)
    with Console(stderr=True).status("loading the server") as status:
        report = asyncio.run(run(target, asked, targets, lambda done: status.update(f"{done} requests done")))
    show(report, Console())
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"wrote {json_file}", err=True)


def _workloads(
    subject: Subject,
    prompts: Path | None,
    requests: int | None,
    output_tokens: int,
    rate: float | None,
    trace: Path | None,
    trace_scale: float,
    trace_speed: float,
    tpot_ms: float | None,
    seed: int,
) -> Callable[[int], Workload]:
    """What to serve at a count in flight."""
    from drex.bench.bench import Workload, random_prompts
    from drex.bench.subject import SYNTHETIC, held_out_prompts, read_prompts
    from drex.request import SamplingParams
    from drex.sim.workload import draw_jobs, read_trace

    whole = subject.config.max_model_len
    longest = whole - output_tokens
    if longest < 1:
        raise ValueError(f"--output-tokens {output_tokens}: the model takes {whole} tokens, prompt and output together")
    if prompts is not None:
        texts = [ids[:longest] for ids in read_prompts(prompts, subject)]
    elif subject.label == SYNTHETIC:
        texts = random_prompts(subject.model.decoder.spec.vocab_size, 256, longest, seed)
    else:
        texts = held_out_prompts(subject, longest)
    params = SamplingParams(temperature=0.0, ignore_eos=True, tpot_ms=tpot_ms)

    def make(count: int) -> Workload:
        if trace is not None:
            jobs = read_trace(trace, scale=trace_scale, longest=whole, speed=trace_speed)[: requests or 64]
        else:
            wanted = requests or max(8, 4 * count)
            jobs = draw_jobs(wanted, (min(16, longest), longest), (output_tokens, output_tokens), rate=rate, seed=seed)
        return Workload(texts, jobs, params, "closed" if rate is None and trace is None else "open")

    return make
