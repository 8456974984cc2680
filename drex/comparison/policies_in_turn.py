"""`drex bench` as a function: policies in turn over the same prompts, at several counts in flight -> one report."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from drex.comparison import machine
from drex.comparison.busy import OtherLoad
from drex.comparison.cell import Cell
from drex.comparison.quality import edit_similarity, rouge_l, token_agreement
from drex.comparison.runner import summarise, take_turns
from drex.comparison.subject import TRAINED, Subject
from drex.comparison.verdict import verdict
from drex.config import ExitRule
from drex.control.request import Request
from drex.engine.driver import serve
from drex.engine.engine import Engine
from drex.engine.samples import Emitted
from drex.progress import Progress
from drex.sampling_params import SamplingParams
from drex.sim.workload import Job


@dataclass(frozen=True)
class Workload:
    """What every policy is given.

    Attributes:
        prompts: token ids; taken in turn by the jobs, and cut to their lengths.
        jobs: with lengths and arrivals; all arriving at once is a closed loop.
        params: of every request; `max_tokens` is each job's own.
        kind: `closed` or `open`.
    """

    prompts: Sequence[tuple[int, ...]]
    jobs: Sequence[Job]
    params: SamplingParams
    kind: str

    def requests(self, subject: Subject, engine: Engine, turn: int) -> list[tuple[float, Request]]:
        """Fresh requests, the same for every policy; a synthetic trace draws other exits each turn."""
        segments = engine.scheduler.segments
        rule = subject.model.exits.rule if segments > 1 else ExitRule("max_prob", ())
        out = []
        for number, job in enumerate(self.jobs):
            prompt = self.prompts[number % len(self.prompts)][: job.prompt]
            params = replace(self.params, max_tokens=job.output)
            request = Request(
                request_id=f"{turn}/{number}",
                prompt=prompt,
                params=params,
                rule=rule,
                seed=turn * len(self.jobs) + number,
                eos_token_ids=frozenset() if params.ignore_eos else subject.model.decoder.spec.eos_token_ids,
                num_segments=segments,
                arrival=number,
                run_ahead=engine.scheduler.config.run_ahead if segments > 1 else "off",
            )
            out.append((job.arrival, request))
        return out

    def describe(self) -> dict[str, Any]:
        """For the report."""
        lengths = [min(job.prompt, len(prompt)) for job, prompt in zip(self.jobs, itertools.cycle(self.prompts))]
        outputs = [job.output for job in self.jobs]
        targets = {name: getattr(self.params, name) for name in ("ttft_ms", "tpot_ms", "itl_ms")}
        return {
            "kind": self.kind,
            "requests": len(self.jobs),
            "prompt_tokens": [min(lengths), max(lengths)],
            "output_tokens": [min(outputs), max(outputs)],
            "targets": {name: value for name, value in targets.items() if value is not None},
        }


def random_prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random token ids, for random weights."""
    draw = random.Random(seed)
    return [tuple(draw.randrange(vocab_size) for _ in range(length)) for _ in range(count)]


def run(
    subject: Subject,
    policies: Sequence[str],
    in_flight: Sequence[int],
    workload: Callable[[int], Workload],
    repeats: int,
) -> dict[str, Any]:
    """Benchmark policies; says on standard error how far it is.

    Args:
        subject: to run on.
        policies: names.
        in_flight: counts, each a group of cells that take turns.
        workload: what to serve at a count in flight.
        repeats: turns; one more goes before, to warm up.

    Returns:
        The report, ready for JSON.
    """
    works = [(count, workload(count)) for count in in_flight]
    for policy in policies:
        subject.engine(policy, in_flight[0])  # costs are measured here, with a progress of their own
    judged = subject.label == TRAINED and "full" in policies
    turns = repeats + judged
    requests = sum(min(2 * count, len(work.jobs)) + turns * len(work.jobs) for count, work in works)
    load, runs = OtherLoad(), []
    with Progress("benchmarking", len(policies) * requests) as progress:
        for count, work in works:
            runs += _take_turns(subject, policies, count, work, repeats, progress, judged=judged)
    facts = machine.describe()
    facts["machine"]["others_cpu_share"] = load.share()
    plan, spec = subject.model.exits, subject.model.decoder.spec
    report = {
        **facts,
        "label": subject.label,
        "timing": "measured",
        "model": subject.name,
        "dtype": str(subject.model.decoder.dtype).removeprefix("torch."),
        "kv_fill": plan.kv_fill,
        "criterion": plan.rule.criterion,
        "thresholds": plan.rule.thresholds,
        "exit_layers": list(plan.layers),
        "num_layers": spec.num_layers,
        "workload": {**works[0][1].describe(), "repeats": repeats},
        "runs": runs,
    }
    return {**report, "verdict": verdict(report)}


def _take_turns(
    subject: Subject,
    policies: Sequence[str],
    count: int,
    work: Workload,
    repeats: int,
    progress: Progress,
    *,
    judged: bool,
) -> list[dict[str, Any]]:
    """The runs of all policies at one count in flight; `judged` compares their outputs with full depth's."""
    closed = work.kind == "closed"
    cells = [Cell(policy, count, subject.engine(policy, count), closed) for policy in policies]
    for cell in cells:
        cell.warm_up(work.requests(subject, cell.engine, -1)[: 2 * count], progress.advance)

    def told(cell: Cell) -> None:
        progress.advance(0, f"{cell.policy}, {cell.in_flight} in flight: {cell.speeds[-1]:.1f} tokens/s")

    def arrivals(cell: Cell) -> list[tuple[float, Request]]:
        return work.requests(subject, cell.engine, len(cell.speeds))

    take_turns(cells, arrivals, repeats, told, progress.advance)
    summaries = summarise(cells, [*subject.model.exits.layers, subject.model.decoder.spec.num_layers])
    if judged:
        _add_quality(cells, summaries, progress)
    return summaries


def _add_quality(cells: Sequence[Cell], summaries: Sequence[dict[str, Any]], progress: Progress) -> None:
    """Compare the outputs of the last turn with full depth's."""
    full = next(cell for cell in cells if cell.policy == "full")
    reference = full.outputs
    loss_full = _loss(full.engine, full, progress)
    for cell, summary in zip(cells, summaries, strict=True):
        pairs = [(cell.outputs[name], tokens) for name, tokens in reference.items() if name in cell.outputs]
        measures = (("token_agreement", token_agreement), ("edit_similarity", edit_similarity), ("rouge_l", rouge_l))
        summary["quality"] = {
            **{name: sum(measure(a, b) for a, b in pairs) / len(pairs) for name, measure in measures},
            "loss": loss_full if cell is full else _loss(full.engine, cell, progress),
            "loss_full": loss_full,
        }


def _loss(engine: Engine, cell: Cell, progress: Progress) -> float:
    """Nats a token that the full-depth model gives to the outputs of a cell's last turn."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    rule = ExitRule("max_prob", ())
    requests = []
    for number, (name, prompt) in enumerate(cell.prompts.items()):
        text = (*prompt, *cell.outputs[name])
        request = Request(f"score/{number}", text, params, rule, 0, frozenset(), 1, arrival=number, score_rule=rule)
        requests.append((len(prompt), request))
    history, metrics = engine.history, engine.metrics

    def each(emitted: Emitted) -> None:
        if emitted[2] is not None:
            progress.advance()

    serve(engine, [(0.0, request) for _, request in requests], each, closed=True)
    engine.history, engine.metrics = history, metrics
    found = [
        -request.prompt_records[position].logprob
        for start, request in requests
        for position in range(start - 1, len(request.prompt) - 1)
    ]
    return sum(found) / len(found)
