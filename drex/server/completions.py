"""`POST /v1/completions`: prompts as text or token ids, one or many, each with n samples."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from drex.control.request import Request as EngineRequest
from drex.engine.streams import Event, Stream
from drex.inputs.prompts import Prompt
from drex.outputs import TokenOutput
from drex.server.answer import Answer, finish_reason
from drex.server.bodies import body_route
from drex.server.errors import ApiError, documented
from drex.server.logprobs import CompletionLog, joined
from drex.server.replies import Completion, CompletionChoice, CompletionLogprobs
from drex.server.sampling import check_stream_options, sampling_params, scores_exits, wanted_tokens
from drex.server.schema import CompletionRequest
from drex.server.serving import Serving

DEFAULT_MAX_TOKENS = 16


def routes(serving: Serving) -> APIRouter:
    """The endpoint, for one server."""
    router = APIRouter(route_class=body_route(serving))

    @router.post("/v1/completions", responses=documented(Completion, streams=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete prompts."""
        name = serving.check_model(body.model or None)
        prompts = _prompts(body)
        asked = _max_tokens(body, serving)
        logs = body.logprobs if body.echo else None
        params = sampling_params(body, serving.llm.generation_defaults, max(1, asked), body.logprobs, logs)

        def make() -> list[EngineRequest]:
            _check_prompts(prompts, serving)
            exits = scores_exits(body)
            return [one for prompt in prompts for one in serving.llm.inputs.requests(prompt, params, score_exits=exits)]

        if serving.settings.log_prompts:
            request.state.log["prompt"] = prompts
        stream = await serving.submit(len(prompts) * params.n, make, list(CompletionRequest.model_fields))
        return await CompletionAnswer(serving, body, stream, name, request, prompts).respond()

    return router


def _prompts(body: CompletionRequest) -> list[Prompt]:
    """The prompts of a body, one by one; text may be empty, since a tokeniser may begin it with a token of its own."""
    given = body.prompt
    single = isinstance(given, str) or (given and isinstance(given[0], int))
    prompts: list[Prompt] = [given] if single else list(given)  # type: ignore[list-item, arg-type]
    if not prompts:
        raise ApiError(400, "prompt is empty: give at least one token", "prompt")
    return prompts


def _check_prompts(prompts: Sequence[Prompt], serving: Serving) -> None:
    """Raise ApiError (400) for text that is too long, or not valid Unicode."""
    for prompt in prompts:
        if isinstance(prompt, str):
            serving.check_text(prompt, "prompt")


def _max_tokens(body: CompletionRequest, serving: Serving) -> int:
    """Output tokens wanted, 0 if only the prompt is; raises ApiError (400) for fields that don't go together."""
    check_stream_options(body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of is not supported: leave it out, or give what n is", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0: give at least 1, or echo the prompt", "max_tokens")
    return wanted_tokens(body, "max_tokens", serving.llm.config.max_model_len, DEFAULT_MAX_TOKENS, least=0)


class CompletionAnswer(Answer):
    """The answer to a completion; `prompts` as they were given, for echoes."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        serving: Serving,
        body: CompletionRequest,
        stream: Stream,
        name: str,
        http: Request,
        prompts: Sequence[Prompt],
    ) -> None:
        super().__init__(serving, body, stream, name, http)
        self._echo, self._logs = bool(body.echo), body.logprobs is not None
        self._scoring_only = body.max_tokens == 0
        self._prompts = prompts
        self._output = serving.llm.engine.token_output
        self._open: dict[int, CompletionLog] = {}
        self._scored: set[int] = set()
        self._held: list[tuple[int, Event]] = []

    def kept(self, tokens: Sequence[TokenOutput]) -> Sequence[TokenOutput]:
        return () if self._scoring_only else tokens

    def choice(self, number: int, event: Event) -> CompletionChoice:
        assert event.whole is not None
        return self._choice(number, event, event.whole.text, event.whole.tokens)

    def pieces(self, number: int, event: Event) -> Sequence[CompletionChoice]:
        if not (self._echo and self._logs):
            return self._piece(number, event)
        # Only a prompt's first sample is scored, and its first token ends that: the other samples wait for it.
        prompt, sample = divmod(number, self.samples)
        self._held.append((number, event))
        if sample == 0:
            self._scored.add(prompt)
        if prompt not in self._scored:
            return ()
        ready = [held for held in self._held if held[0] // self.samples in self._scored]
        self._held = [held for held in self._held if held[0] // self.samples not in self._scored]
        return [choice for held in ready for choice in self._piece(*held)]

    def _piece(self, number: int, event: Event) -> Sequence[CompletionChoice]:
        chunk = event.chunk
        quiet = not (chunk.text or chunk.finish_reason or self._logs or self.body.return_exit_layers)
        if quiet and not (self._echo and number not in self._open):
            return ()
        return [self._choice(number, event, chunk.text, chunk.tokens)]

    def _choice(self, number: int, event: Event, text: str, tokens: Sequence[TokenOutput]) -> CompletionChoice:
        """What is new of a sample; its first piece has the echo before it."""
        tokens = self.kept(tokens)
        if self._scoring_only:
            text = ""
        echo, logs = "", self._open.get(number)
        before: CompletionLogprobs | None = None
        if logs is None:
            echo = self._echoed(event.request, number) if self._echo else ""
            logs = self._open[number] = CompletionLog(self.texts)
            if self._echo and self._logs:
                before = self._scores(number, logs)
        found = logs.output(tokens) if self._logs else None
        choice: CompletionChoice = {
            "index": number,
            "text": echo + text,
            "logprobs": joined(before, found) if before is not None and found is not None else found,
            "finish_reason": finish_reason(event),
            "stop_reason": None if event.whole is None else event.whole.stop_reason,
        }
        if self.body.return_exit_layers:
            choice["tokens"] = self.exits(tokens)
        return choice

    def _echoed(self, request: EngineRequest, number: int) -> str:
        prompt = self._prompts[number // self.samples]
        return prompt if isinstance(prompt, str) else "".join(self.texts.pieces(request.prompt))

    def _scores(self, number: int, log: CompletionLog) -> CompletionLogprobs:
        """The log-probabilities of a sample's prompt, which are those of its prompt's first sample."""
        scored = self.stream.requests[number - number % self.samples]
        records = [scored.prompt_records[position] for position in range(len(scored.prompt) - 1)]
        return log.prompt(scored.prompt, [self._output(record, "") for record in records])
