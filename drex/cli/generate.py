"""`drex generate`: text from one or many prompts, coloured by exit depth on a terminal, or as JSON lines."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from drex.cli.common import (
    CriterionOption,
    CriterionParametersOption,
    DeviceOption,
    DtypeOption,
    ExitsOption,
    GenerationConfigOption,
    KvFillOption,
    MaxModelLenOption,
    ModelOption,
    PolicyOption,
    PolicyParametersOption,
    RunAheadOption,
    ThresholdsOption,
    early_exit_from,
    parse_parameters,
)
from drex.cli.writers import Job, JsonWriter, TextWriter
from drex.config import DEFAULTS
from drex.outputs import ExitStats
from drex.progress import Progress
from drex.sampling_params import SamplingParams
from drex.text_files import decode, read_lines, read_text


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or none reads standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read one prompt from a text file.")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help='Read many prompts: one object a line, its "prompt" text or token ids.')
    ] = None,
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy, and the default where the model recommends none.")
    ] = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    generation_config: GenerationConfigOption = "auto",
    seed: Annotated[int | None, typer.Option(help="Of the sampling noise; -1: another each time.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given several times.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    exits: ExitsOption = None,
    thresholds: ThresholdsOption = None,
    criterion: CriterionOption = None,
    criterion_parameters: CriterionParametersOption = None,
    kv_fill: KvFillOption = None,
    full_depth: Annotated[bool, typer.Option("--full-depth", help="No early exit.")] = False,
    policy: PolicyOption = DEFAULTS.policy,
    policy_parameters: PolicyParametersOption = None,
    run_ahead: RunAheadOption = DEFAULTS.run_ahead,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests in flight.")] = DEFAULTS.max_num_seqs,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line and prompt.")] = False,
) -> None:
    """Generate text with early exit; by default with the bundled model."""
    named = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    named = {name: value for name, value in named.items() if value is not None}
    own = SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=seed, stop=stop, ignore_eos=ignore_eos)
    params = replace(own, **named)  # type: ignore[arg-type]
    early_exit = early_exit_from(exits, thresholds, criterion, kv_fill, full_depth, criterion_parameters)
    jobs = _read_jobs(prompt, file, jsonl)
    from drex.llm import LLM

    llm = LLM(
        model,
        early_exit=early_exit,
        dtype=dtype,
        device=device,
        policy=policy,
        policy_parameters=parse_parameters(policy_parameters, "--policy-parameters"),
        run_ahead=run_ahead,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        generation_config=generation_config,
    )
    recommended = llm.generation_defaults.sampling
    if recommended.keys() - named.keys():
        sys.stderr.write(f"drex: {llm.generation_defaults.describe(but=('max_tokens', *named))}\n")
        params = replace(own, **{**recommended, **named})  # type: ignore[arg-type]
    layers = llm.model.decoder.spec.num_layers
    for job in jobs:
        if job.error is None:
            try:
                job.prompt_tokens = len(llm.check(job.prompt, params))
            except ValueError as error:
                job.error = str(error)
    started = time.perf_counter()
    writer = JsonWriter(layers) if as_json else TextWriter(llm.model.exits.layers, single=len(jobs) == 1)
    # Text that is seen as it comes needs no progress beside it.
    on_terminal = sys.stdout.isatty()
    tokens = params.max_tokens * sum(job.error is None for job in jobs)
    with Progress("generating", tokens, show=as_json or not on_terminal, lines=on_terminal) as progress:
        _serve(llm, jobs, params, writer, progress)
    if not as_json:
        _summary(jobs, time.perf_counter() - started, layers)
    if any(job.error is not None for job in jobs):
        raise typer.Exit(2)


def _serve(
    llm: Any, jobs: list[Job], params: SamplingParams, writer: JsonWriter | TextWriter, progress: Progress
) -> None:
    """Run what can be served; everything is written in the order of the prompts."""
    good = [job for job in jobs if job.error is None]
    ahead = iter(jobs)
    current = next(ahead, None)
    started = time.perf_counter()
    for chunk in llm.stream([job.prompt for job in good], params) if good else ():
        job = good[chunk.prompt_index]
        job.text += chunk.text
        job.tokens.extend(chunk.tokens)
        job.finish_reason, job.error = chunk.finish_reason, chunk.error
        job.seconds = time.perf_counter() - started
        never = params.max_tokens - len(job.tokens) if job.finish_reason else 0
        progress.advance(len(chunk.tokens) + never)
        if current is not None and job is current:
            writer.progress(job)
        while current is not None and (current.error is not None or current.finish_reason is not None):
            writer.finish(current)
            current = next(ahead, None)
    while current is not None:
        writer.finish(current)
        current = next(ahead, None)


def _read_jobs(prompt: str | None, file: Path | None, jsonl: Path | None) -> list[Job]:
    if sum(source is not None for source in (prompt, file, jsonl)) > 1:
        raise ValueError("several prompts: give a prompt, --file or --jsonl, one of them")
    try:
        if jsonl is not None:
            return _read_jsonl(jsonl)
        if file is not None:
            return [Job(read_text(file))]
    except OSError as error:
        raise ValueError(f"cannot read {jsonl or file} ({error.strerror}): name a file that is there") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{jsonl or file} is not UTF-8 text ({error.reason}): convert it") from error
    if prompt is not None and prompt != "-":
        return [Job(prompt)]
    if sys.stdin.isatty() and prompt is None:
        raise ValueError('no prompt: give one, as in drex generate "def main():", or --file, --jsonl or standard input')
    return [Job(_standard_input())]


def _standard_input() -> str:
    try:
        return decode(sys.stdin.buffer.read())
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text ({error.reason}): convert it") from error


def _read_jsonl(path: Path) -> list[Job]:
    jobs = []
    for number, line in read_lines(path):
        try:
            jobs.append(Job(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            jobs.append(Job("", error=f'{path}, line {number}: expected an object with a "prompt"'))
            continue
        if not isinstance(jobs[-1].prompt, str | list):
            jobs[-1].error = f'{path}, line {number}: "prompt" must be text or a list of token ids'
    if not jobs:
        raise ValueError(f"{path} holds no prompts: put one JSON object with a prompt on each line")
    return jobs


def _summary(jobs: list[Job], seconds: float, num_layers: int) -> None:
    tokens = [token for job in jobs for token in job.tokens]
    stats = ExitStats.of(tokens, num_layers)
    if not stats.tokens:
        return
    shares = ", ".join(
        f"{count / stats.tokens:.0%} {'at full depth' if layer == num_layers else f'after layer {layer}'}"
        for layer, count in stats.exits.items()
    )
    sys.stderr.write(
        f"\n{stats.tokens} tokens, {stats.tokens / seconds:.1f} tokens/s, mean depth {stats.mean_depth:.1f} of "
        f"{num_layers} layers ({shares}), involuntary exits {stats.involuntary_exits}\n"
    )
