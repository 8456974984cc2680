"""Serving on a GPU: policies against the optimum, run-ahead, other engines, and how long the device waits."""

from __future__ import annotations

import importlib.util
import statistics
import time
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from drex.comparison import policies_in_turn as bench
from drex.comparison.cell import Cell
from drex.comparison.policies_in_turn import Workload, random_prompts
from drex.comparison.subject import Subject, synthetic
from drex.compute.linear import Linear
from drex.compute.segments import SegmentRunner, Started
from drex.config import EngineConfig
from drex.control.plan import Pass, Verdicts
from drex.sampling_params import SamplingParams
from drex.sim.workload import Job

PROMPT, OUTPUT = 64, 64
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def _subject(shape: str, rate: float, kv_fill: str, most: int) -> Subject:
    length = PROMPT + OUTPUT
    config = EngineConfig(
        max_model_len=length, max_num_seqs=most, max_num_batched_tokens=2048, kv_cache_tokens=most * length
    )
    return synthetic(shape, None, [rate], kv_fill, "auto", config)


def _workload(subject: Subject, count: int) -> Workload:
    prompts = random_prompts(subject.model.decoder.spec.vocab_size, 64, PROMPT)
    # Lengths are spread, so that requests don't end together.
    jobs = [Job(PROMPT, OUTPUT // 2 + number % (OUTPUT // 2)) for number in range(max(8, 2 * count))]
    return Workload(prompts, jobs, GREEDY, "closed")


def _table(shape: str, rate: float, kv_fill: str, policies: list[str], counts: list[int]) -> list[dict[str, Any]]:
    """One row a policy and count, and the whole report with the first."""
    subject = _subject(shape, rate, kv_fill, max(counts))
    report = bench.run(subject, policies, counts, lambda count: _workload(subject, count), 2)
    rows: list[dict[str, Any]] = [
        {
            "shape": shape,
            "label": subject.label,
            "exit rate": rate,
            "fill": kv_fill,
            "in flight": run["in_flight"],
            "policy": run["policy"],
            "tokens/s": run["tokens_per_s"],
            "decode tokens/s": run["decode_tokens_per_s"],
            "of θ*": _share(run["decode_tokens_per_s"], run["theta_star"]),
            "of full": _share(run["decode_tokens_per_s"], run["full"]),
            "of ideal": run["efficiency"],
            "cost error p50": run["cost_error"].get("p50"),
        }
        for run in report["runs"]
    ]
    rows[0]["report"] = report
    return rows


def _share(rate: float | None, of: float | None) -> float | None:
    return rate / of if rate and of else None


def policies(long: bool) -> list[dict[str, Any]]:
    """Full depth, flush at once, and drex. The gain at 1024 in flight is read against that at 256."""
    names = ["full", "split", "drex"]
    if not long:
        return _table("llama-3-8b", 0.8, "project", names, [8, 32, 256, 1024])
    counts = [1, 8, 32, 64, 128, 256, 512, 1024]
    out = [row for rate in (0.6, 0.8) for row in _table("llama-3-8b", rate, "project", names, counts)]
    out += _table("llama-3-8b", 0.8, "recompute", names, counts)
    for shape in ("llama-3.2-1b", "llama-2-13b", "qwen2.5-14b"):
        out += _table(shape, 0.8, "project", names, [32, 256])
    return out


def run_ahead(long: bool) -> list[dict[str, Any]]:
    """Modes of run-ahead. What a draft's chance is comes from random weights here: next to none."""
    names = ["full", "drex", "drex+run-ahead", "drex+lossless+adaptive"]
    return _table("llama-3-8b", 0.8, "recompute", names, [4, 32, 128] if long else [32])


class Watched:
    """A runner whose passes are marked on the device's own clock."""

    def __init__(self, runner: SegmentRunner) -> None:
        self.runner, self.decoder = runner, runner.decoder
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, batch: Pass) -> Started:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        started = self.runner.start(batch)
        end.record()
        self.marks.append((begin, end))
        return started

    def finish(self, started: Started) -> Verdicts:
        return self.runner.finish(started)

    def idle_share(self) -> float:
        """Of the time from the first pass's start to the last one's end."""
        torch.cuda.synchronize()
        gaps = [end.elapsed_time(begin) for (_, end), (begin, _) in zip(self.marks, self.marks[1:], strict=False)]
        return float(sum(max(0.0, gap) for gap in gaps) / self.marks[0][0].elapsed_time(self.marks[-1][1]))


def idle(long: bool) -> list[dict[str, Any]]:
    """Share of the time under load in which the device has nothing to do."""
    out = []
    shapes = ("llama-3.2-1b", "llama-3-8b", "llama-2-13b", "qwen2.5-14b") if long else ("llama-3-8b", "llama-2-13b")
    for shape in shapes:
        subject = _subject(shape, 0.8, "recompute", 128)
        for count in (32, 128):
            cell = Cell("drex", count, subject.engine("drex", count))
            work = _workload(subject, count)
            cell.warm_up(work.requests(subject, cell.engine, -1)[: 2 * count])
            executor: Any = cell.engine.executor
            watched = Watched(executor.runner)
            executor.runner = watched
            cell.run(work.requests(subject, cell.engine, 0))
            out.append(
                {
                    "shape": shape,
                    "in flight": count,
                    "idle share": watched.idle_share(),
                    "limit": {"llama-3-8b": 0.10, "llama-3.2-1b": None}.get(shape, 0.05),
                    "own ms a pass": 1e3 * cell.engine.stats.own_seconds / cell.engine.stats.passes,
                }
            )
    return out


def peers(long: bool) -> list[dict[str, Any]]:
    """Full depth against continuous batching of transformers, in turns, on the same weights; prompts included."""
    out = []
    for shape in ("llama-3.2-1b", "llama-3-8b") if long else ("llama-3-8b",):
        subject = _subject(shape, 0.8, "recompute", 32)
        work = _workload(subject, 32)
        cell = Cell("full", 32, subject.engine("full", 32))
        cell.warm_up(work.requests(subject, cell.engine, -1))
        model = _as_transformers(subject)
        prompts = [list(request.prompt) for _, request in work.requests(subject, cell.engine, 0)]
        theirs = []
        for turn in range(3):
            cell.run(work.requests(subject, cell.engine, turn))
            theirs.append(_continuous_batching(model, prompts, [job.output for job in work.jobs]))
        ours, other = statistics.median(cell.speeds), statistics.median(theirs[1:])
        out.append(
            {
                "shape": shape,
                "in flight": 32,
                "drex tokens/s": ours,
                "transformers tokens/s": other,
                "ratio": ours / other,
                "vLLM": "installed: use bench/engine.py" if importlib.util.find_spec("vllm") else "not installed",
            }
        )
        del model
    return out


def _as_transformers(subject: Subject) -> Any:
    """The same weights, shared, in transformers' model."""
    decoder = subject.model.decoder
    spec = decoder.spec
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(spec.config)  # type: ignore[arg-type]
    heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    state = {"model.embed_tokens.weight": decoder.embedding, "model.norm.weight": decoder.final_norm_weight}
    state["lm_head.weight"] = _weight(decoder.lm_head)
    for number, layer in enumerate(decoder.layers):
        at = f"model.layers.{number}"
        parts = zip("qkv", _weight(layer.qkv).split([heads, kv, kv]), strict=True)
        state |= {f"{at}.self_attn.{name}_proj.weight": part for name, part in parts}
        gate, up = _weight(layer.gate_up).chunk(2)
        state |= {f"{at}.mlp.gate_proj.weight": gate, f"{at}.mlp.up_proj.weight": up}
        state[f"{at}.self_attn.o_proj.weight"] = _weight(layer.out)
        state[f"{at}.mlp.down_proj.weight"] = _weight(layer.down)
        state[f"{at}.input_layernorm.weight"] = layer.attention_norm
        state[f"{at}.post_attention_layernorm.weight"] = layer.mlp_norm
    model.load_state_dict(state, strict=True, assign=True)
    # Rotary frequencies are no part of the state.
    model.model.rotary_emb = type(model.model.rotary_emb)(spec.config, device=decoder.device)
    model.set_attn_implementation("sdpa_paged")
    return model.eval()


def _weight(product: Linear) -> torch.Tensor:
    """As transformers lays it out; on a GPU none is packed."""
    assert isinstance(product, torch.nn.Linear)
    return product.weight


def _continuous_batching(model: Any, prompts: list[list[int]], wanted: list[int]) -> float:
    """Output tokens a second. All requests ask for the mean length: the interface has one for all."""
    length = round(sum(wanted) / len(wanted))
    config = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=-1, pad_token_id=0)
    started = time.perf_counter()
    for begin in range(0, len(prompts), 32):
        model.generate_batch(prompts[begin : begin + 32], generation_config=config, progress_bar=False)
    return length * len(prompts) / (time.perf_counter() - started)
