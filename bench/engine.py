"""Full-depth speed of drex against other engines, its own overhead, its memory, and the K/V that its fills save.

    python bench/engine.py --json engine.json

Engines take turns (A, B, A, B, …) in one process run, so that a slow moment of the machine meets all of them; ratios
are medians of those within a turn. Throughput is wanted output tokens a second, prompts included in the time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kv_saved
import memory
import torch
import transformers
from peers import DrexEngine, Engine, Outcome, TransformersEngine, VllmEngine, missing_vllm
from report import print_report
from rich.console import Console
from workload import (
    MAX_LENGTH,
    MODELS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    Job,
    PromptFile,
    Subject,
    make_jobs,
    prepare,
    warm_up,
)

from drex.cli.output import output_path
from drex.comparison import machine
from drex.compute.device import has_fast_bfloat16

SLOW_SCALE = 0.2
QUICK_SCALE = 0.1
ANSWER_TOKENS = 64
"""Of a request whose prompt is from a file, where the command line doesn't say."""
KV_REQUESTS, KV_PROMPT, KV_OUTPUT = 16, 96, 160
console = Console(width=None if sys.stdout.isatty() else 110)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default="bundled,llama-160m", help=f"of {', '.join(MODELS)}, or folders of Hugging Face checkpoints"
    )
    parser.add_argument(
        "--prompts", type=Path, help='file of JSON lines with "prompt"; by default random token ids of random lengths'
    )
    parser.add_argument("--requests", type=int, help="with --prompts: how many of these, from the first; default all")
    parser.add_argument("--output-tokens", type=int, help=f"with --prompts: of each request; default {ANSWER_TOKENS}")
    parser.add_argument("--in-flight", default="1,8,32", help="requests served at once")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch, for all engines")
    parser.add_argument(
        "--scale",
        type=float,
        help="factor on the lengths of random prompts and of all outputs; default 1, or "
        f"{SLOW_SCALE} for bfloat16 where the CPU does not have it",
    )
    parser.add_argument("--quick", action="store_true", help=f"one repetition, lengths times {QUICK_SCALE} again")
    parser.add_argument("--json", type=output_path, help="file for all numbers")
    options = parser.parse_args(words)
    for name, known in (("models", MODELS), ("dtypes", ("float32", "bfloat16"))):
        setattr(options, name, getattr(options, name).split(","))
        unknown = [each for each in getattr(options, name) if each not in known]
        if name == "models":
            unknown, known = [each for each in unknown if not Path(each).is_dir()], (*known, "a folder")
        if unknown:
            parser.error(f"--{name}: {', '.join(unknown)} is not one of {', '.join(known)}")
    options.in_flight = [int(count) for count in options.in_flight.split(",")]
    if options.quick:
        options.repeats = 1
    if options.prompts is not None:
        try:
            tokens = ANSWER_TOKENS if options.output_tokens is None else options.output_tokens
            options.prompts = PromptFile.read(options.prompts, options.requests, tokens)
        except ValueError as error:
            parser.error(f"--prompts: {error}")
    elif options.requests is not None or options.output_tokens is not None:
        parser.error("--requests and --output-tokens go with --prompts")
    return options


def length_scale(options: argparse.Namespace, dtype: str) -> float:
    """Factor on prompt and output lengths."""
    scale: float | None = options.scale
    if scale is None:
        slow = dtype == "bfloat16" and not has_fast_bfloat16(torch.device("cpu"))
        scale = SLOW_SCALE if slow else 1.0
    return scale * (QUICK_SCALE if options.quick else 1.0)


def take_turns(engines: list[Engine], jobs: list[Job], in_flight: int, repeats: int) -> dict[str, list[Outcome]]:
    """Warm every engine up, then let them run the same jobs in turn."""
    for engine in engines:
        engine.run(warm_up(jobs, in_flight))
    outcomes: dict[str, list[Outcome]] = {engine.name: [] for engine in engines}
    for number in range(repeats):
        for engine in engines:
            gc.collect()
            outcome = engine.run(jobs)
            assert [len(output) for output in outcome.outputs] == [job.wanted for job in jobs]
            outcomes[engine.name].append(outcome)
            console.print(f"  turn {number + 1}: {engine.name} {outcome.tokens_per_second:.1f} tokens/s", style="dim")
    return outcomes


def compare(subject: Subject, dtype: str, in_flight: int, jobs: list[Job], repeats: int, vllm: bool) -> dict[str, Any]:
    """One cell of the throughput table."""
    longest = max(MAX_LENGTH, *(len(job.prompt) + job.wanted for job in jobs))
    engines: list[Engine] = [
        DrexEngine(subject.folder, dtype, in_flight, longest),
        TransformersEngine(subject.folder, dtype, in_flight),
    ]
    served = VllmEngine.start(subject.folder, dtype, in_flight, longest, jobs) if vllm else None
    if isinstance(served, VllmEngine):
        engines.append(served)
    try:
        outcomes = take_turns(engines, jobs, in_flight, repeats)
    finally:
        if isinstance(served, VllmEngine):
            served.close()
    base = outcomes["drex"]
    return {
        "model": subject.name,
        "kind": subject.kind,
        "dtype": dtype,
        "in_flight": in_flight,
        "requests": len(jobs),
        "prompt_tokens": sum(len(job.prompt) for job in jobs),
        "output_tokens": sum(job.wanted for job in jobs),
        "engines": {
            engine.name: {**summary(outcomes[engine.name], base), "settings": engine.settings} for engine in engines
        },
        "vllm_failed": served if isinstance(served, str) else None,
        "own_time": own_time(base),
    }


def summary(outcomes: list[Outcome], drex: list[Outcome]) -> dict[str, Any]:
    """One engine's throughput; `drex_ratio` is how many times as fast drex is, and `drex_ratios` those of each turn."""
    speeds = [outcome.tokens_per_second for outcome in outcomes]
    ratios = [ours.tokens_per_second / speed for ours, speed in zip(drex, speeds, strict=True)]
    same = [
        a == b
        for ours, theirs in zip(drex, outcomes, strict=True)
        for a, b in zip(ours.outputs, theirs.outputs, strict=True)
    ]
    return {
        "tokens_per_second": statistics.median(speeds),
        "each": speeds,
        "computed_tokens_per_second": statistics.median(o.computed / o.seconds for o in outcomes),
        "drex_ratio": statistics.median(ratios),
        "drex_ratios": ratios,
        "requests_equal_to_drex": sum(same) / len(same),
    }


def own_time(outcomes: list[Outcome]) -> dict[str, float]:
    """drex's time outside of the model: scheduling, bookkeeping, text and sampling, of all its time in passes."""
    own, judge, executor, passes = (
        sum(outcome.own[key] for outcome in outcomes) for key in ("own", "judge", "executor", "passes")
    )
    return {
        "share": (own + judge) / (own + executor),
        "engine_ms_per_pass": 1e3 * own / passes,
        "sampling_ms_per_pass": 1e3 * judge / passes,
        "pass_ms": 1e3 * (own + executor) / passes,
        "passes": passes,
    }


def measure(options: argparse.Namespace, scratch: Path, found: dict[str, Any]) -> None:
    """Fill in `found` as the numbers come."""
    no_vllm = missing_vllm()
    if no_vllm:
        found["skipped"].append({"what": "vllm", "reason": no_vllm})
    for name in options.models:
        try:
            measure_model(options, prepare(name, scratch), found, vllm=not no_vllm)
        except (FileNotFoundError, ValueError) as error:
            found["skipped"].append({"what": name, "reason": str(error)})
    if "bundled" not in options.models:
        found["skipped"].append({"what": "K/V saved by fills", "reason": "the bundled model was not asked for"})


def measure_model(options: argparse.Namespace, subject: Subject, found: dict[str, Any], vllm: bool) -> None:
    """Fill in `found` of one model.

    Raises:
        ValueError: prompts that the model doesn't take.
    """
    for dtype in options.dtypes:
        scale = length_scale(options, dtype)
        asked = options.prompts.jobs(subject.folder, scale) if options.prompts is not None else None
        console.print(f"{subject.name} {dtype}: memory")
        entry = memory.measure(subject.folder, dtype)
        found["memory"].append({"model": subject.name, "kind": subject.kind, "dtype": dtype, **entry})
        for in_flight in options.in_flight:
            console.print(f"{subject.name} {dtype}, {in_flight} in flight, lengths times {scale:g}")
            jobs = asked or make_jobs(subject.vocab_size, in_flight, scale)
            cell = compare(subject, dtype, in_flight, jobs, options.repeats, vllm)
            found["throughput"].append({**cell, "length_scale": scale})
            save(options.json, found)
            if cell["vllm_failed"]:
                where = f"vllm on {subject.name} {dtype}, {in_flight} in flight"
                found["skipped"].append({"what": where, "reason": cell["vllm_failed"]})
    if subject.name == "bundled":
        console.print("bundled: K/V saved by fills")
        output = max(8, round(KV_OUTPUT * (QUICK_SCALE if options.quick else 1)))
        found["kv_saved"] = kv_saved.measure(subject.folder, "float32", KV_REQUESTS, KV_PROMPT, output)


def save(path: Path | None, found: dict[str, Any]) -> None:
    """Keep what is known so far: a long run may be cut short."""
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def prompt_settings(prompts: PromptFile | None) -> dict[str, Any]:
    """What requests are made of; lengths in tokens."""
    if prompts is None:
        return {"prompts": "random token ids", "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS}
    made = f"{len(prompts.prompts)} of {prompts.name}, text under the model's chat template where it has one"
    return {"prompts": made, "output_tokens": prompts.output_tokens}


def main() -> None:
    """Run, print, write."""
    options = arguments()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {
        "benchmark": "engine",
        **machine.describe(),
        "settings": {
            **prompt_settings(options.prompts),
            "repeats": options.repeats,
            "quick": options.quick,
            "sampling": "greedy, end tokens ignored, the same jobs for every engine",
        },
        "skipped": [],
        "throughput": [],
        "memory": [],
        "kv_saved": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        measure(options, Path(scratch), found)
    print_report(found, console)
    save(options.json, found)


if __name__ == "__main__":
    main()
