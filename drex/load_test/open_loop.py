"""`drex bench --url` as a function: what is asked of a server, when, and the report of what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drex.comparison.versions import versions
from drex.load_test.load import Target, arrive, characters_per_token, connect, drive, find_model
from drex.load_test.load_report import summarise
from drex.progress import Progress
from drex.sim.workload import Job, draw_jobs, read_trace
from drex.text_files import read_json_lines

PROMPT_TOKENS = (16, 64)


@dataclass(frozen=True)
class Workload:
    """What is asked, and when.

    Args:
        prompts: JSONL with "prompt", or None for Python's standard library.
        trace: arrivals and lengths; None: lengths are drawn, and arrivals come at `rate`.
        trace_scale, trace_speed: factors on the trace's lengths and on its rate.
        requests: of them, or of the trace at most.
        output_tokens: of each, where no trace says otherwise.
        rate: arrivals a second; None: all at once.
        burstiness: 1 is a Poisson process; less comes in bursts.
        seed: of lengths and arrivals.

    Raises:
        ValueError: a value out of range.
    """

    prompts: Path | None
    trace: Path | None
    trace_scale: float
    trace_speed: float
    requests: int
    output_tokens: int
    rate: float | None
    burstiness: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("trace_scale", "trace_speed", "requests", "output_tokens", "rate", "burstiness"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: give a number above 0")

    def jobs(self, longest: int | None) -> list[Job]:
        """Lengths and arrivals, for a server whose requests have at most so many tokens."""
        if self.trace is None:
            lengths = draw_jobs(self.requests, PROMPT_TOKENS, (self.output_tokens, self.output_tokens), seed=self.seed)
            return arrive(lengths, self.rate, self.burstiness, self.seed)
        # Prompts are cut by characters, about so many a token: leave some room.
        most = None if longest is None else int(longest * 0.8)
        return read_trace(self.trace, scale=self.trace_scale, longest=most, speed=self.trace_speed)[: self.requests]


async def run(target: Target, workload: Workload, goodput: Mapping[str, float]) -> dict[str, Any]:
    """Load a server and report; says on standard error how far it is.

    Args:
        target: the server; an empty model is its first one.
        workload: what is asked.
        goodput: targets in milliseconds by kind.

    Raises:
        ValueError: a server that isn't there, or files that can't be read.
    """
    texts = read_texts(workload.prompts)
    async with connect(target) as client:
        first, longest = await find_model(client)
        target = target if target.model else replace(target, model=first)
        width = await characters_per_token(client, target, "\n".join(texts))
        jobs = workload.jobs(longest)
        whole = workload.prompts is not None and workload.trace is None
        with Progress("loading the server", len(jobs)) as progress:
            prompts = _fit(jobs, texts, width, whole=whole)
            outcomes, seconds = await drive(client, target, jobs, prompts, progress.advance)
    return {
        **versions(),
        "endpoint": target.address,
        "model_id": target.model,
        "api": "chat" if target.chat else "completions",
        "num_prompts": len(jobs),
        "request_rate": workload.rate,
        "burstiness": workload.burstiness,
        "trace": None if workload.trace is None else workload.trace.name,
        "goodput_targets_ms": dict(goodput),
        **summarise(outcomes, seconds, goodput),
    }


def _fit(jobs: Sequence[Job], texts: Sequence[str], width: float, *, whole: bool) -> list[str]:
    """A prompt for each job, of about its length in tokens of `width` characters, unless they are to stay whole."""
    fitted = []
    for number, job in enumerate(jobs):
        text, wanted = texts[number % len(texts)], max(1, round(job.prompt * width))
        fitted.append(text if whole else (text * (wanted // len(text) + 1))[:wanted])
    return fitted


def read_texts(path: Path | None) -> list[str]:
    """Prompts of a JSONL file, or functions of the standard library.

    Raises:
        ValueError: a file that can't be read or has no texts.
    """
    if path is None:
        from drex.tuning.corpus import standard_library

        starts = ((document.text, document.text.find("\ndef ") + 1) for document in standard_library())
        return [text[start : start + 2000] for text, start in starts if start and len(text) - start > 200][:256]
    try:
        found = [each["prompt"] for each in read_json_lines(path)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected JSON lines with a "prompt" ({error!r})') from error
    if not found or not all(isinstance(text, str) and text for text in found):
        raise ValueError(f"{path}: give prompts as text, at least one; servers differ in their tokens")
    return found
