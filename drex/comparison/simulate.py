"""`drex simulate` as a function: the engine and its control code over virtual time, on a machine that is modelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from drex.comparison.cell import Cell
from drex.comparison.policy_names import policy_settings
from drex.comparison.runner import summarise
from drex.comparison.verdict import MODELLED
from drex.config import EngineConfig, ExitRule
from drex.control.cost.model import CostModel
from drex.control.cost.profile import Profile
from drex.control.memory.slots import SlotLayout
from drex.control.request import Request
from drex.engine.build import build_engine
from drex.engine.engine import Engine
from drex.sampling_params import SamplingParams
from drex.sim.executor import DrawnExits, ExitSource, RecordedConfidences, RecordedExits, VirtualExecutor
from drex.sim.workload import Job
from drex.text_files import read_json_lines

LABEL = "simulated: costs of a model of the machine, exits drawn or recorded"


@dataclass(frozen=True)
class Scenario:
    """What is simulated.

    Attributes:
        lengths: layers of each segment.
        profile: costs, with exits and heads.
        exit_rates: at each exit point; ignored where `depths` are given.
        depths: recorded outputs, each the segments that its tokens executed; requests take them in turn.
        confidences: recorded of a text, with `thresholds`; requests start somewhere in it.
        acceptance: share of the exit points' tokens that are full depth's, where nothing says more.
        kv_fill: what fills the layers that a token skipped.
        params: of every request but for `max_tokens`.
    """

    lengths: tuple[int, ...]
    profile: Profile
    exit_rates: tuple[float, ...]
    kv_fill: str
    params: SamplingParams
    depths: Sequence[Sequence[int]] = ()
    confidences: RecordedConfidences | None = None
    thresholds: tuple[float, ...] = ()
    acceptance: float = 1.0

    def engine(self, policy: str, config: EngineConfig, requests: int) -> Engine:
        """A fresh engine in virtual time; `full` runs all layers as one segment."""
        lengths, profile = self.lengths, self.profile
        if policy == "full":
            lengths, profile = (sum(lengths),), profile.with_exits(())
        exits: ExitSource = self.confidences or DrawnExits(self.acceptance)
        if self.depths:
            exits = RecordedExits({f"{n}": self.depths[n % len(self.depths)] for n in range(requests)})
        cost = CostModel(profile)
        return build_engine(config, SlotLayout(lengths), self.kv_fill, cost, VirtualExecutor(cost.copy(), exits))

    def requests(self, jobs: Sequence[Job], segments: int, run_ahead: str = "off") -> Iterator[tuple[float, Request]]:
        """Requests of the jobs, made as they come."""
        thresholds = self.thresholds or tuple(1.0 - rate for rate in self.exit_rates)
        if self.depths:
            thresholds = (0.5,) * (segments - 1)
        rule = ExitRule("trace", thresholds if segments > 1 else ())
        known: dict[int, SamplingParams] = {}
        for number, job in enumerate(jobs):
            params = known.setdefault(job.output, replace(self.params, max_tokens=job.output))
            yield (
                job.arrival,
                Request(
                    request_id=f"{number}",
                    prompt=(0,) * job.prompt,
                    params=params,
                    rule=rule,
                    seed=number,
                    eos_token_ids=frozenset(),
                    num_segments=segments,
                    arrival=number,
                    run_ahead=run_ahead if segments > 1 else "off",
                ),
            )


def run(
    scenario: Scenario,
    policies: Sequence[str],
    jobs: Sequence[Job],
    config: EngineConfig,
    done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Simulate policies on the same jobs; returns a report like that of `drex bench`.

    Args:
        scenario: what is simulated.
        policies: names.
        jobs: that each of them serves.
        config: of the engines, but for what a policy sets.
        done: called after each request.
    """
    layers = list(accumulate(scenario.lengths))
    cells = []
    for policy in policies:
        own = replace(config, **policy_settings(policy))
        engine = scenario.engine(policy, own, len(jobs))
        cell = Cell(policy, config.max_num_seqs, engine, closed=not any(job.arrival for job in jobs))
        cell.run(scenario.requests(jobs, engine.scheduler.segments, own.run_ahead), done)
        cells.append(cell)
    return {
        "machine": {"cpu": scenario.profile.source, "device": scenario.profile.source, "cores": None, "threads": None},
        "label": LABEL,
        "timing": MODELLED,
        "kv_fill": scenario.kv_fill,
        "exit_layers": layers[:-1],
        "num_layers": layers[-1],
        "workload": {
            "kind": "open" if any(job.arrival for job in jobs) else "closed",
            "requests": len(jobs),
            "prompt_tokens": [min(job.prompt for job in jobs), max(job.prompt for job in jobs)],
            "output_tokens": [min(job.output for job in jobs), max(job.output for job in jobs)],
            "exit_rates": list(scenario.exit_rates),
            "repeats": 1,
        },
        "runs": summarise(cells, layers),
    }


def read_depths(path: str | Path, layers: Sequence[int]) -> list[list[int]]:
    """Recorded exits: JSON lines as `drex generate --json` prints them -> segments executed, a list an output.

    Args:
        path: of the file.
        layers: executed after each segment.

    Raises:
        ValueError: a file that can't be read, or exits at other layers.
    """
    number_of = {layer: number + 1 for number, layer in enumerate(layers)}
    found = []
    try:
        for each in read_json_lines(path):
            tokens = each.get("tokens")
            if tokens:
                found.append([number_of[token["exit_layer"]] for token in tokens])
    except (OSError, ValueError, TypeError, AttributeError) as error:
        remedy = "give what drex generate --json prints"
        raise ValueError(f"{path} can't be read as a trace of exits ({error}): {remedy}") from error
    except KeyError as error:
        raise ValueError(f"{path} has exits after layer {error}: the segments end after {list(layers)}") from error
    if not found:
        raise ValueError(f"{path} has no tokens")
    return found


def read_confidences(path: str | Path, exits: int) -> RecordedConfidences:
    """What `drex evaluate --confidences` wrote: JSON lines, a sequence each.

    Raises:
        ValueError: a file that can't be read, or one of a model with another number of exit points.
    """
    try:
        lines = read_json_lines(path)
        confidences = np.concatenate([np.array(line["confidences"], dtype=np.float64) for line in lines], axis=1)
        right = np.concatenate([np.array(line["right"], dtype=np.bool_) for line in lines], axis=1)
    except (OSError, ValueError, TypeError, KeyError) as error:
        remedy = "give what drex evaluate --confidences wrote"
        raise ValueError(f"{path} can't be read as recorded confidences ({error!r}): {remedy}") from error
    if len(confidences) != exits:
        raise ValueError(f"{path} has confidences of {len(confidences)} exit points, and --exits names {exits}")
    return RecordedConfidences(confidences, right)


def segment_lengths(exits: Sequence[int], layers: int) -> tuple[int, ...]:
    """Layers of each segment. Raises ValueError for exits that are not inside the model."""
    edges = [0, *exits, layers]
    if any(stop <= start for start, stop in pairwise(edges)):
        raise ValueError(f"exits after {list(exits)}: name layers between 1 and {layers - 1}, ascending")
    return tuple(stop - start for start, stop in pairwise(edges))
