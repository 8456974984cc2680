"""`POST /v1/chat/completions`: conversations under the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from drex.control.request import Request as EngineRequest
from drex.engine.streams import Event
from drex.inputs.processor import ContextLengthError
from drex.outputs import TokenOutput
from drex.server.answer import Answer, finish_reason
from drex.server.bodies import body_route
from drex.server.errors import ApiError, documented
from drex.server.logprobs import chat_logprobs
from drex.server.replies import ChatChoice, ChatChunkChoice, ChatCompletion, ChatLogprobs
from drex.server.sampling import check_stream_options, sampling_params, wanted_tokens
from drex.server.schema import ChatMessage, ChatRequest, Templating
from drex.server.serving import Serving


def routes(serving: Serving) -> APIRouter:
    """The endpoint, for one server."""
    router = APIRouter(route_class=body_route(serving))

    @router.post("/v1/chat/completions", responses=documented(ChatCompletion, streams=True))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The next turn of a conversation."""
        name = serving.check_model(body.model or None)
        check_stream_options(body)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs: true", "top_logprobs")
        defaults = serving.llm.generation_defaults
        params = sampling_params(body, defaults, _max_tokens(body, serving), body.top_logprobs or None)

        def make() -> list[EngineRequest]:
            messages = conversation(body.messages, serving)
            if serving.settings.log_prompts:
                request.state.log["messages"] = messages
            return serving.llm.inputs.requests(chat_prompt(messages, body, serving), params)

        stream = await serving.submit(params.n, make, list(ChatRequest.model_fields))
        return await ChatAnswer(serving, body, stream, name, request).respond()

    return router


def conversation(messages: Sequence[ChatMessage], serving: Serving) -> list[dict[str, Any]]:
    """Messages as chat templates take them: text parts joined by newlines, `developer` as `system`.

    Raises:
        ApiError: text that is too long, or no text.
    """
    most = serving.llm.config.max_model_len
    if len(messages) > most:
        raise ApiError.of(ContextLengthError(most, f"there are {len(messages)} messages", "send fewer"), ["messages"])
    found: list[dict[str, Any]] = []
    for message in messages:
        content = message.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content or ())
        if content is None and message.role != "assistant":
            raise ApiError(400, f"messages: a message of role {message.role!r} has no content: give text", "messages")
        serving.check_text(text, "messages")
        # Templates know no developer, and may drop without a word what they don't know.
        role = "system" if message.role == "developer" else message.role
        more = {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}
        reasoning = message.reasoning_content if message.reasoning is None else message.reasoning
        if reasoning is not None:
            serving.check_text(reasoning, "messages")
            more |= {"reasoning_content": reasoning, "reasoning": reasoning}  # templates know it by either name
        found.append({"role": role, "content": text, **more})
    return found


def chat_prompt(messages: Sequence[dict[str, Any]], body: Templating, serving: Serving) -> list[int]:
    """Token ids of a conversation, under the chat template as a body asks for it; raises ValueError."""
    return serving.llm.inputs.chat_prompt(
        messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _max_tokens(body: ChatRequest, serving: Serving) -> int:
    """Output tokens wanted; without a wish, what the model recommends, or as many as there is room for."""
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    if field == "max_completion_tokens" and body.max_tokens not in (None, body.max_completion_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
    most = serving.llm.config.max_model_len
    recommended = serving.llm.generation_defaults.settings.get("max_tokens", most)
    return wanted_tokens(body, field, most, int(recommended))


class ChatAnswer(Answer):
    """The answer to a conversation."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: ChatRequest

    def opening(self) -> Sequence[ChatChunkChoice]:
        return [
            {
                "index": number,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            for number in range(self.samples)
        ]

    def choice(self, number: int, event: Event) -> ChatChoice:
        whole = event.whole
        assert whole is not None
        choice: ChatChoice = {
            "index": number,
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": self._logs(whole.tokens),
            "finish_reason": finish_reason(event),
            "stop_reason": whole.stop_reason,
        }
        if self.body.return_exit_layers:
            choice["tokens"] = self.exits(whole.tokens)
        return choice

    def pieces(self, number: int, event: Event) -> Sequence[ChatChunkChoice]:
        chunk, body = event.chunk, self.body
        if not (chunk.text or chunk.finish_reason or body.logprobs or body.return_exit_layers):
            return ()
        piece: ChatChunkChoice = {
            "index": number,
            "delta": {"content": chunk.text} if chunk.text else {},
            "logprobs": self._logs(chunk.tokens),
            "finish_reason": finish_reason(event),
        }
        if body.return_exit_layers:
            piece["tokens"] = self.exits(chunk.tokens)
        if event.whole is not None:
            piece["stop_reason"] = event.whole.stop_reason
        return [piece]

    def _logs(self, tokens: Sequence[TokenOutput]) -> ChatLogprobs | None:
        return chat_logprobs(self.texts, tokens) if self.body.logprobs else None
