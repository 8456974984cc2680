"""The offline façade: a model, an engine around it, and the calls that users know from vLLM."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from drex.assembly.runner import build_runner, fit, out_of_memory_refused
from drex.compute.load import LoadedModel, inspect_model, load_model
from drex.config import DEFAULTS, EarlyExit, EngineOptions, check_lossless
from drex.control.cost.model import CostModel
from drex.control.cost.profile import Profile
from drex.control.request import Request
from drex.engine.build import build_engine
from drex.engine.client import EngineClient
from drex.engine.engine import Engine
from drex.engine.solving import InBackground
from drex.engine.torch_executor import TorchExecutor
from drex.inputs.generation_config import GenerationDefaults, read_generation_defaults
from drex.inputs.processor import InputProcessor, spread
from drex.inputs.prompts import Message, Prompt, list_conversations, list_prompts, list_token_ids
from drex.inputs.tokenizer import load_tokenizer
from drex.outputs import Chunk, CompletionOutput, ExitStats, RequestOutput, Scored
from drex.profiling.profile_cache import obtain
from drex.progress import Progress
from drex.sampling_params import SamplingParams

log = logging.getLogger(__name__)


class LLM:
    """An early-exit language model, ready to generate. Several threads may call it: they share passes.

    Args:
        model: Hugging Face folder or hub id; None is the bundled demonstration model.
        early_exit: exits, thresholds, criterion and K/V fill; None is what the model's `early_exit.json` says,
            or full depth where it has none; `EarlyExit.off()` is full depth.
        dtype: `auto` (the checkpoint's; float32 on a CPU that is slower in 16 bit), `float32`, `bfloat16`, `float16`
            or `float64`.
        device: `auto`, or a torch device.
        policy: `drex` (rebatching), `split` (flush at once), `full` (no exits), or one of `drex.register_policy`.
        policy_parameters: of the policy, by name.
        max_model_len: tokens a request may have, prompt and output; None is what the checkpoint was made for, or its
            sliding window where that is shorter.
        max_num_seqs: requests in flight.
        max_num_batched_tokens: rows a pass may have; longer prompts are chunked.
        kv_cache_tokens: tokens for which there is K/V memory; None is enough for `max_num_seqs` requests of
            `max_model_len`, within `gpu_memory_utilization` on a GPU and 1 GiB on a CPU, or more where one request
            takes more, which is logged.
        max_fill_rows, max_wait_passes, max_slowdown, adaptive: of the rebatching, see `EngineConfig`.
        run_ahead: `trusted` (requests draft on while they wait; the same tokens as early exit), `off`, or `lossless`,
            which gives the full-depth model's own tokens, thresholds steering speed only; it needs `recompute`.
        max_draft: rows of a request that no exit is sure of and that it may go on from, under run-ahead.
        gpu_memory_utilization: share of a GPU's memory that drex may take, all together; the K/V pool gets what the
            largest pass leaves. None is 0.9, unless `kv_cache_tokens` is given.
        kernels: `torch`, `triton`, or `auto`: Triton's on a GPU.
        enforce_eager: replay no CUDA graphs.
        profile: what passes cost here, to begin with; it is learnt while serving. None is the profile that `drex
            profile` left for this model and machine, or else an estimate from the model's sizes; `measured` measures
            where none was left, in some seconds; `measure` measures in any case; `nominal` is a made-up machine; or a
            `Profile`, or the file of one.
        threads: of the CPU; None is what the profile or estimate found best, or OMP_NUM_THREADS where that is set.
        tokenizer: folder or hub id, where it is not beside the model.
        generation_config: where the sampling defaults of requests without settings of their own come from: `auto` (the
            model's `generation_config.json`, if it has one), `none`, or a folder with such a file.

    Raises:
        ValueError: bad settings or a model that can't be loaded, with what to do about it.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        early_exit: EarlyExit | None = None,
        dtype: str = "auto",
        device: str = "auto",
        policy: str = DEFAULTS.policy,
        policy_parameters: Mapping[str, Any] | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = DEFAULTS.max_num_seqs,
        max_num_batched_tokens: int = DEFAULTS.max_num_batched_tokens,
        kv_cache_tokens: int | None = None,
        max_fill_rows: int | None = None,
        max_wait_passes: int = DEFAULTS.max_wait_passes,
        max_slowdown: float | None = None,
        adaptive: bool = DEFAULTS.adaptive,
        run_ahead: str = DEFAULTS.run_ahead,
        max_draft: int = DEFAULTS.max_draft,
        gpu_memory_utilization: float | None = None,
        kernels: str = "auto",
        enforce_eager: bool = False,
        profile: Profile | str | Path | None = None,
        threads: int | None = None,
        tokenizer: str | Path | None = None,
        generation_config: str | Path = "auto",
    ) -> None:
        asked = EngineOptions(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_tokens=kv_cache_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            max_fill_rows=max_fill_rows,
            max_wait_passes=max_wait_passes,
            max_slowdown=max_slowdown,
            adaptive=adaptive,
            run_ahead=run_ahead,
            max_draft=max_draft,
            policy=policy,
            policy_parameters=policy_parameters or {},
        )
        exits = EarlyExit.off() if policy == "full" else early_exit
        facts = inspect_model(model, exits, dtype, device)
        self.generation_defaults: GenerationDefaults = read_generation_defaults(generation_config, facts.folder)
        self.generation_defaults.announce(log)
        self.model: LoadedModel = load_model(facts)
        check_lossless(run_ahead, self.model.exits.kv_fill)
        self.config = fit(asked, self.model)
        self.tokenizer = load_tokenizer(self.model.folder if tokenizer is None else tokenizer)
        runner = build_runner(self.model, self.config, kernels, enforce_eager=enforce_eager)
        self.profile = obtain(profile, runner, self.config, self.model.exits, threads)
        with out_of_memory_refused(self.config, self.model.decoder.device):
            self.engine = build_engine(
                self.config,
                self.model.layout,
                self.model.exits.kv_fill,
                CostModel(self.profile),
                TorchExecutor(runner),
                tokenizer=self.tokenizer,
                solving=InBackground(),
            )
        ends = self.generation_defaults.eos_token_ids
        self.inputs = InputProcessor(self.model, self.config, self.tokenizer, self.engine.check_fits, ends)
        self._client = EngineClient(self.engine)

    # Generation

    def get_default_sampling_params(self) -> SamplingParams:
        """The settings of a request that has none of its own: `SamplingParams()` with the model's recommendations."""
        return SamplingParams(**self.generation_defaults.settings)  # type: ignore[arg-type]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for one or many prompts, served together; the outputs are in the order of the prompts.

        Args:
            prompts: text or token ids, one or a list.
            sampling_params: for all, or one a prompt; None is `get_default_sampling_params()`.
            use_tqdm: show progress on standard error, for more than one prompt; the name is vLLM's.

        Raises:
            ValueError: a prompt or setting that can't be served; nothing is generated then.
        """
        listed = list_prompts(prompts)
        groups = self._groups(listed, sampling_params)
        done = self._run([request for group in groups for request in group], progress=use_tqdm and len(listed) > 1)
        return [self._output(prompt, group, done) for prompt, group in zip(listed, groups, strict=True)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate the next turn of one or many conversations, each a list of {"role", "content"}.

        A content is text, or a list of {"type": "text", "text"}, as over HTTP. The keywords are those of
        `InputProcessor.chat_prompt`.

        Raises:
            ValueError: no chat template, or messages or settings that it does not take.
        """
        prompts = [
            self.inputs.chat_prompt(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in list_conversations(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Chunk]:
        """Generate for one or many prompts, served together, a chunk at a time as tokens come.

        Leaving the iterator early aborts what is unfinished.

        Raises:
            ValueError: a prompt or setting that can't be served; nothing is generated then.
        """
        groups = self._groups(list_prompts(prompts), sampling_params)
        return self._stream({r.request_id: (number, r) for number, group in enumerate(groups) for r in group})

    def _groups(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[list[Request]]:
        """The samples of each prompt."""
        each = spread(self.get_default_sampling_params() if params is None else params, len(prompts))
        return [self.inputs.requests(prompt, one) for prompt, one in zip(prompts, each, strict=True)]

    def _stream(self, left: dict[str, tuple[int, Request]]) -> Iterator[Chunk]:
        numbers = {request_id: number for request_id, (number, _) in left.items()}
        for request_id, chunk, _ in self._client.serve([request for _, request in left.values()]):
            yield replace(chunk, prompt_index=numbers[request_id])

    def check(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> list[int]:
        """The token ids of a prompt that can be served; raises ValueError, naming the remedy, for one that can't."""
        return list(self.inputs.requests(prompt, sampling_params or self.get_default_sampling_params())[0].prompt)

    def score(
        self,
        token_ids: Sequence[int] | Sequence[Sequence[int]],
        *,
        early_exit: EarlyExit | None = None,
        use_tqdm: bool = True,
        each: Callable[[], None] | None = None,
    ) -> list[Scored]:
        """Teacher-forced log-probabilities of one or many token sequences.

        Args:
            token_ids: one sequence or a list of them, each of at least 2 tokens.
            early_exit: None scores at full depth; otherwise every position exits where its own confidence reaches the
                threshold, under the fill that is served. `EarlyExit()` takes the engine's settings.
            use_tqdm: show progress on standard error, for more than one sequence.
            each: called after every sequence, instead of showing progress.

        Raises:
            ValueError: a sequence that is too short, too long, or has a token id outside of the vocabulary.
        """
        requests = [self.inputs.scoring(ids, early_exit) for ids in list_token_ids(token_ids)]
        show = use_tqdm and len(requests) > 1
        done = self._run(requests, progress=show, text="scoring", each=each)
        return [self._scored(request, done[request.request_id]) for request in requests]

    def _scored(self, request: Request, whole: CompletionOutput) -> Scored:
        if whole.error is not None:
            raise RuntimeError(f"scoring failed: {whole.error}")
        tokens = self.engine.prompt_tokens(request)
        return Scored(
            logprobs=[token.logprob for token in tokens],
            exit_layers=[token.exit_layer for token in tokens],
            confidences=[token.confidence for token in tokens],
            best=[token.top_logprobs[0][0] for token in tokens],
        )

    def _run(
        self,
        requests: list[Request],
        *,
        progress: bool,
        text: str = "generating",
        each: Callable[[], None] | None = None,
    ) -> dict[str, CompletionOutput]:
        """Serve requests to the end; on any interruption those that are left are aborted."""
        done: dict[str, CompletionOutput] = {}
        with Progress(text, len(requests), show=progress and each is None) as shown:
            told = each or shown.advance
            for request_id, _, whole in self._client.serve(requests):
                if whole is not None:
                    done[request_id] = whole
                    told()
        return done

    def _output(self, prompt: Prompt, group: list[Request], done: dict[str, CompletionOutput]) -> RequestOutput:
        first = group[0]
        wanted = first.score_rule is not None and len(first.prompt_records) == len(first.prompt) - 1
        return RequestOutput(
            request_id=first.request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=first.prompt,
            outputs=tuple(done[request.request_id] for request in group),
            prompt_logprobs=(None, *self.engine.prompt_tokens(first)) if wanted else None,
        )

    def metrics(self) -> dict[str, Any]:
        """What the engine has measured since it started; see `Engine.report`."""
        return self._client.ask(Engine.report)

    def exit_stats(self, outputs: Sequence[RequestOutput]) -> ExitStats:
        """Exits, involuntary exits and stays of everything in `outputs`."""
        tokens = (token for output in outputs for sample in output.outputs for token in sample.tokens)
        return ExitStats.of(tokens, self.model.decoder.spec.num_layers)
