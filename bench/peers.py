"""The engines that are compared, behind one call: jobs in, tokens and seconds out.

All serve at most `in_flight` requests at once, greedily, and nobody stops before the wanted number of tokens.
"""

from __future__ import annotations

import importlib.util
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from workload import Job, warm_up

from drex import LLM, SamplingParams
from drex.compute import segments
from drex.compute.sampler import Judgement
from drex.control.plan import Verdicts

VLLM_REST_SECONDS = 1.5
"""Pause after a run of vLLM: its worker spins for a second before it sleeps, and would take a core from who is next."""


@dataclass(frozen=True)
class Outcome:
    """One timed run.

    Attributes:
        seconds: from the first request in to the last token out, prompts included.
        outputs: the wanted tokens, a list a job.
        computed: output tokens computed, wanted or not: a static batch goes on until its longest row is done.
        own: drex only: seconds and passes, see `DrexEngine`.
    """

    seconds: float
    outputs: list[list[int]]
    computed: int
    own: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Wanted tokens only."""
        return sum(map(len, self.outputs)) / self.seconds


class Engine(Protocol):
    """An engine that is loaded and ready."""

    name: str
    settings: dict[str, Any]

    def run(self, jobs: list[Job]) -> Outcome:
        """Serve all jobs."""


class DrexEngine:
    """drex at full depth.

    `Outcome.own` has seconds: `own` (scheduling, bookkeeping, text), `executor`, and `judge` (sampling) within that.
    """

    name = "drex"

    def __init__(self, folder: Path, dtype: str, in_flight: int, max_length: int) -> None:
        self.llm = LLM(
            folder,
            policy="full",
            dtype=dtype,
            max_model_len=max_length,
            max_num_seqs=in_flight,
            profile="nominal",
            threads=torch.get_num_threads(),
        )
        config = self.llm.config
        self.settings = {
            "policy": config.policy,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "kv_cache_tokens": config.kv_cache_tokens,
            "text": "decoded while it runs" if self.llm.tokenizer is not None else "none: the model has no tokeniser",
        }

    def run(self, jobs: list[Job]) -> Outcome:
        params = [SamplingParams(temperature=0, max_tokens=job.wanted, ignore_eos=True) for job in jobs]
        stats, judged = self.llm.engine.stats, 0.0
        before = (stats.own_seconds, stats.executor_seconds, stats.passes)

        class Timed(Judgement):
            """Notes how long it takes."""

            def __init__(self, *args: Any) -> None:
                began = time.perf_counter()
                super().__init__(*args)
                self._note(began)

            def verdicts(self) -> Verdicts:
                began = time.perf_counter()
                found = super().verdicts()
                self._note(began)
                return found

            def _note(self, began: float) -> None:
                nonlocal judged
                judged += time.perf_counter() - began

        with mock.patch.object(segments, "Judgement", Timed):
            started = time.perf_counter()
            done = self.llm.generate([job.prompt for job in jobs], params, use_tqdm=False)
            seconds = time.perf_counter() - started
        outputs = [output.outputs[0].token_ids for output in done]
        own = {
            "own": stats.own_seconds - before[0],
            "executor": stats.executor_seconds - before[1],
            "passes": stats.passes - before[2],
            "judge": judged,
        }
        return Outcome(seconds, outputs, sum(map(len, outputs)), own)


class TransformersEngine:
    """`generate` of transformers: static batches in order of arrival, left-padded, until the longest row is done."""

    name = "transformers"

    def __init__(self, folder: Path, dtype: str, in_flight: int) -> None:
        self.in_flight = in_flight
        self.model: Any = AutoModelForCausalLM.from_pretrained(  # in eval mode
            folder, dtype=getattr(torch, dtype), trust_remote_code=False
        )
        # What the checkpoint says would end rows early; generate() falls back to it for every field that is None.
        self.model.generation_config = GenerationConfig(pad_token_id=0)
        self.settings = {
            "batching": "static, left-padded",
            "attention": self.model.config._attn_implementation,
            "cache": "generate's default",
            "inference_mode": True,
        }

    def run(self, jobs: list[Job]) -> Outcome:
        outputs: list[list[int]] = []
        computed = 0
        started = time.perf_counter()
        for first in range(0, len(jobs), self.in_flight):
            batch = jobs[first : first + self.in_flight]
            rows = self._generate(batch)
            computed += len(batch) * len(rows[0])
            outputs.extend(row[: job.wanted] for row, job in zip(rows, batch, strict=True))
        return Outcome(time.perf_counter() - started, outputs, computed)

    @torch.inference_mode()
    def _generate(self, batch: list[Job]) -> list[list[int]]:
        width = max(len(job.prompt) for job in batch)
        ids = torch.tensor([[0] * (width - len(job.prompt)) + job.prompt for job in batch])
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
        longest = max(job.wanted for job in batch)
        out = self.model.generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False)
        assert out.shape == (len(batch), width + longest), "transformers stopped early"
        rows: list[list[int]] = out[:, width:].tolist()
        return rows


class VllmEngine:
    """vLLM's CPU build, its core and its worker in processes of their own; compiled, without prefix caching.

    Its settings are those of the environment (`VLLM_...`), else those of `_environment`, else its own.
    """

    name = "vllm"

    def __init__(self, folder: Path, dtype: str, in_flight: int, max_length: int) -> None:
        vllm = _import_vllm()
        self.params = vllm.SamplingParams
        # vLLM sets variables for processes that it starts; those of other measurements are not to inherit them.
        with mock.patch.dict(os.environ, _environment()):
            self.settings = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
            self.llm = vllm.LLM(
                str(folder),
                dtype=dtype,
                max_model_len=max_length,
                max_num_seqs=in_flight,
                # Repetitions have the same prompts: with prefix caching all but the first would skip them.
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
            )

    @classmethod
    def start(cls, folder: Path, dtype: str, in_flight: int, max_length: int, jobs: list[Job]) -> VllmEngine | str:
        """An engine that has served once, or why there is none (its kernels don't take every shape)."""
        engine: VllmEngine | None = None
        try:
            engine = cls(folder, dtype, in_flight, max_length)
            engine.run(warm_up(jobs, in_flight))
        except Exception as error:  # whatever it is, the other engines are still to be compared
            if engine is not None:
                engine.close()
            return f"{type(error).__name__}: {error}"
        return engine

    def run(self, jobs: list[Job]) -> Outcome:
        params = [self.params(temperature=0, max_tokens=job.wanted, ignore_eos=True, detokenize=False) for job in jobs]
        prompts = [{"prompt_token_ids": job.prompt} for job in jobs]
        started = time.perf_counter()
        done = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        time.sleep(VLLM_REST_SECONDS)
        outputs = [list(output.outputs[0].token_ids) for output in done]
        return Outcome(seconds, outputs, sum(map(len, outputs)))

    def close(self) -> None:
        """End vLLM's processes."""
        self.llm.llm_engine.engine_core.shutdown()


def _environment() -> dict[str, str]:
    """What vLLM is told where the environment says nothing: 1 GiB of K/V memory, and as many threads as torch has here.

    Of its own accord it leaves one core to its scheduler, and would compute on one of two.
    """
    cores = sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]
    told = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    return {name: os.environ.get(name, value) for name, value in told.items()}


def _import_vllm() -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read at import
    return importlib.import_module("vllm")


def missing_vllm() -> str | None:
    """Why vLLM is not compared, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not importable here (bench/vllm_cpu.sh makes an environment that has it)"
    try:
        _import_vllm()
    except Exception as error:  # a half-installed vLLM fails in many ways, and none of them should end the benchmark
        return f"vllm can't be imported: {type(error).__name__}: {error}"
    return None
