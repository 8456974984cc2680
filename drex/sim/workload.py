"""What is asked of an engine: jobs with lengths and arrival times, from a law or from a recorded trace.

Everything is a function of a seed. A closed loop has no arrival times: as many jobs as may be in flight are.
"""

from __future__ import annotations

import csv
import io
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drex.text_files import read_json_lines, read_text

FIELDS = {
    "arrival": ("arrival_s", "timestamp"),
    "prompt": ("context_tokens", "input_length", "prefill_tokens"),
    "output": ("generated_tokens", "output_length", "decode_tokens"),
}
"""Names of columns in the traces that are known: Azure's, Mooncake's (times in milliseconds), lengths only."""


@dataclass(frozen=True)
class Job:
    """One request to come.

    Attributes:
        prompt: its length in tokens.
        output: tokens wanted.
        arrival: seconds from the start.
    """

    prompt: int
    output: int
    arrival: float = 0.0


def draw_jobs(
    count: int, prompt: tuple[int, int], output: tuple[int, int], *, rate: float | None = None, seed: int = 0
) -> list[Job]:
    """Jobs with lengths uniform over their ranges, arriving all at once, or as a Poisson process.

    Args:
        count: how many.
        prompt, output: shortest and longest, in tokens.
        rate: arrivals a second; None: all at the start.
        seed: of everything.
    """
    draw = random.Random(seed)
    jobs, now = [], 0.0
    for _ in range(count):
        if rate is not None:
            now += draw.expovariate(rate)
        jobs.append(Job(draw.randint(*prompt), draw.randint(*output), now))
    return jobs


def read_trace(path: str | Path, *, scale: float = 1.0, longest: int | None = None, speed: float = 1.0) -> list[Job]:
    """Jobs of a recorded trace (CSV or JSONL).

    Args:
        path: of the file.
        scale: factor on lengths, at least one token staying.
        longest: prompt and output together are cut to this, in proportion.
        speed: factor on the rate of arrivals.

    Raises:
        ValueError: a file that can't be read, or has none of the known columns.
    """
    path = Path(path)
    try:
        table = csv.DictReader(io.StringIO(read_text(path), newline="")) if path.suffix == ".csv" else None
        rows: list[dict[str, Any]] = read_json_lines(path, skip_blank=False) if table is None else list(table)
        if not rows:
            raise ValueError("it has no requests")
        arrival, prompt_name, output_name = (_column(rows[0], what) for what in FIELDS)
        if prompt_name is None or output_name is None:
            known = ", ".join(name for what in ("prompt", "output") for name in FIELDS[what])
            raise ValueError(f"it has none of the columns {known}")
        unit = (1e-3 if arrival == "timestamp" else 1.0) / speed
        jobs = [_job(float(row[prompt_name]) * scale, float(row[output_name]) * scale, longest) for row in rows]
        times = [float(row[arrival]) * unit if arrival else 0.0 for row in rows]
        if not all(math.isfinite(time) and time >= 0 for time in times):
            raise ValueError("a time of arrival is no number from 0 on")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, csv.Error) as error:
        raise ValueError(
            f"{path} can't be read as a trace: {error}; give CSV or JSONL with one request a row"
        ) from error
    return sorted((replace(job, arrival=time) for job, time in zip(jobs, times, strict=True)), key=lambda j: j.arrival)


def _job(prompt: float, output: float, longest: int | None) -> Job:
    """Lengths of at least a token, cut in proportion to what may be longest."""
    lengths = max(1, round(prompt)), max(1, round(output))
    if longest is not None and sum(lengths) > longest:
        share = longest / sum(lengths)
        lengths = max(1, math.floor(lengths[0] * share)), max(1, math.floor(lengths[1] * share))
    return Job(*lengths)


def _column(row: dict[str, Any], what: str) -> str | None:
    return next((name for name in FIELDS[what] if name in row), None)
