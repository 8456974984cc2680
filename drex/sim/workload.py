"""What is asked of an engine: jobs with lengths and arrival times, from a law or from a recorded trace.

Everything is a function of a seed. A closed loop has no arrival times: as many jobs as may be in flight are.
"""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        with path.open(encoding="utf-8", newline="") as file:
            rows: list[dict[str, Any]] = (
                list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a trace ({error}): give CSV or JSONL") from error
    if not rows:
        raise ValueError(f"{path} has no requests")
    arrival, prompt_name, output_name = (_column(rows[0], what) for what in ("arrival", "prompt", "output"))
    if prompt_name is None or output_name is None:
        known = ", ".join(name for what in ("prompt", "output") for name in FIELDS[what])
        raise ValueError(f"{path} has none of the columns {known}")
    unit = 1e-3 if arrival == "timestamp" else 1.0
    jobs = []
    for row in rows:
        prompt, output = (max(1, round(float(row[name]) * scale)) for name in (prompt_name, output_name))
        if longest is not None and prompt + output > longest:
            share = longest / (prompt + output)
            prompt, output = max(1, math.floor(prompt * share)), max(1, math.floor(output * share))
        jobs.append(Job(prompt, output, float(row[arrival]) * unit / speed if arrival else 0.0))
    return sorted(jobs, key=lambda job: job.arrival)


def _column(row: dict[str, Any], what: str) -> str | None:
    return next((name for name in FIELDS[what] if name in row), None)
