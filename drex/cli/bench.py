"""`drex bench`: policies against each other, the optimum and full depth; or a server under load, with --url."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    check_above_zero,
    check_at_least,
    early_exit_from,
    parse_floats,
    parse_ints,
)
from drex.cli.output import OutputFile
from drex.load_test.load import Target

if TYPE_CHECKING:
    from drex.comparison.policies_in_turn import Workload
    from drex.comparison.subject import Subject
    from drex.load_test.open_loop import Workload as Asked

LONGEST_PROMPT = 64
LOAD_REQUESTS = 200
ONLY_URL = ("api_key", "chat", "ignore_eos", "burstiness", "goodput")
ONLY_POLICIES = (
    *("policies", "in_flight", "shape", "exit_rates", "exits", "thresholds", "criterion", "kv_fill", "dtype"),
    "max_model_len",
    *("tpot_ms", "max_slowdown", "adaptive", "repeats", "html_file"),
)
"""Options that mean something with --url, and without."""
ONLY_SHAPE, ONLY_MODEL = ("exit_rates",), ("model", "thresholds", "criterion")
"""Options that mean something with --shape, and without."""


def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder or hub id; none: the bundled model.")] = None,
    policies: Annotated[
        str,
        typer.Option(
            help="Of drex, split, full, art, consensus, majority, greedy, latency_only; drex+run-ahead, drex+lossless, "
            "drex+adaptive."
        ),
    ] = "full,split,drex,drex+run-ahead",
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
    _check_given(context, "--url", ONLY_URL, ONLY_POLICIES, given=url is not None)
    _check_given(context, "--shape", ONLY_SHAPE, ONLY_MODEL, given=shape is not None)
    check_at_least(1, requests=requests, output_tokens=output_tokens, repeats=repeats)
    check_above_zero(rate=rate, trace_scale=trace_scale, trace_speed=trace_speed, tpot_ms=tpot_ms)
    if url is not None:
        from drex.load_test.open_loop import Workload as Asked

        count = LOAD_REQUESTS if requests is None else requests
        asked = Asked(prompts, trace, trace_scale, trace_speed, count, output_tokens, rate, burstiness, seed)
        _load(Target(url, model or "", api_key, chat, ignore_eos), asked, goodput or [], json_file)
        return
    from drex.comparison.policy_names import policy_settings
    from drex.config import DEFAULTS, EngineConfig

    names, counts = policies.split(","), parse_ints(in_flight, "--in-flight", least=1)
    for name in names:
        policy_settings(name)
    offer = _Offer(prompts, requests, output_tokens, rate, trace, trace_scale, trace_speed, tpot_ms, seed)
    offer.check(tokens_only=shape is not None)
    from rich.console import Console

    from drex.comparison.policies_in_turn import run
    from drex.comparison.subject import synthetic, trained
    from drex.report.html import render
    from drex.report.table import show

    # Whether early exit pays is in the report.
    logging.getLogger("drex.engine").setLevel(logging.ERROR)
    longest = LONGEST_PROMPT + output_tokens if max_model_len is None else max_model_len
    config = EngineConfig(
        max_model_len=longest,
        max_num_seqs=max(counts),
        max_num_batched_tokens=DEFAULTS.max_num_batched_tokens,
        kv_cache_tokens=max(counts) * longest,
        max_slowdown=max_slowdown,
        adaptive=adaptive,
    )
    with OutputFile(json_file, "--json") as data, OutputFile(html_file, "--html") as page:
        if shape is not None:
            rates = parse_floats(exit_rates or "0.6", "--exit-rates")
            layers = None if exits is None else parse_ints(exits, "--exits")
            subject = synthetic(shape, layers, rates, kv_fill or "recompute", dtype, config)
        else:
            settings = early_exit_from(exits, thresholds, criterion, kv_fill, False)
            subject = trained(model, settings, dtype, config, max_model_len)
        report = run(subject, names, counts, offer.workloads(subject), repeats)
        show(report, Console())
        if data.wanted:
            data.write(json.dumps(report, indent=1) + "\n")
        if page.wanted:
            page.write(render(report) + "\n")


def _check_given(
    context: typer.Context, mode: str, only_with: Sequence[str], only_without: Sequence[str], *, given: bool
) -> None:
    """Raise ValueError for an option that would be ignored.

    Args:
        context: typer's context, which knows the options that were given.
        mode: the option that decides what others mean something.
        only_with, only_without: parameters that mean something with it, and without it.
        given: whether it was.
    """
    for name in only_without if given else only_with:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "MODEL" if name == "model" else "--" + name.removesuffix("_file").replace("_", "-")
            raise ValueError(f"{option} goes {'without' if given else 'with'} {mode}: leave it out")


def _load(target: Target, asked: Asked, goodput: list[str], json_file: Path | None) -> None:
    """Load a server, show and write the report."""
    import asyncio

    from rich.console import Console

    from drex.load_test.load_report import parse_goodput, show
    from drex.load_test.open_loop import run

    targets = parse_goodput(goodput)
    with OutputFile(json_file, "--json") as data:
        report = asyncio.run(run(target, asked, targets))
        show(report, Console())
        if data.wanted:
            data.write(json.dumps(report, indent=1) + "\n")


@dataclass(frozen=True)
class _Offer:
    """The workload that every policy serves, from the options of the same names."""

    prompts: Path | None
    requests: int | None
    output_tokens: int
    rate: float | None
    trace: Path | None
    trace_scale: float
    trace_speed: float
    tpot_ms: float | None
    seed: int

    def check(self, *, tokens_only: bool) -> None:
        """Raise ValueError for files that can't be read, before a model is loaded for them.

        Args:
            tokens_only: there will be no tokeniser for prompts that are text.
        """
        from drex.comparison.subject import prompts_in
        from drex.sim.workload import read_trace

        if self.prompts is not None:
            found = prompts_in(self.prompts)
            if tokens_only and any(isinstance(prompt, str) for prompt in found):
                raise ValueError(f"{self.prompts} has text and --shape no tokeniser: give prompts as token ids")
        if self.trace is not None:
            read_trace(self.trace, scale=self.trace_scale, speed=self.trace_speed)

    def workloads(self, subject: Subject) -> Callable[[int], Workload]:
        """What to serve on a subject, at a count in flight."""
        from drex.comparison.policies_in_turn import Workload, random_prompts
        from drex.comparison.subject import SYNTHETIC, held_out_prompts, read_prompts
        from drex.sampling_params import SamplingParams
        from drex.sim.workload import draw_jobs, read_trace

        whole, tokens = subject.config.max_model_len, self.output_tokens
        longest = whole - tokens
        if longest < 1:
            raise ValueError(f"--output-tokens {tokens}: the model takes {whole} tokens, prompt and output together")
        if self.prompts is not None:
            texts = [ids[:longest] for ids in read_prompts(self.prompts, subject)]
        elif subject.label == SYNTHETIC:
            texts = random_prompts(subject.model.decoder.spec.vocab_size, 256, longest, self.seed)
        else:
            texts = held_out_prompts(subject, longest)
        params = SamplingParams(temperature=0.0, ignore_eos=True, tpot_ms=self.tpot_ms)

        def make(count: int) -> Workload:
            if self.trace is not None:
                jobs = read_trace(self.trace, scale=self.trace_scale, longest=whole, speed=self.trace_speed)
                return Workload(texts, jobs[: self.requests or 64], params, "open")
            wanted = self.requests or max(8, 4 * count)
            lengths = (min(16, longest), longest), (tokens, tokens)
            jobs = draw_jobs(wanted, *lengths, rate=self.rate, seed=self.seed)
            return Workload(texts, jobs, params, "closed" if self.rate is None else "open")

        return make
