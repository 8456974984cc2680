"""`POST /tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Response

from drex.errors import SettingError
from drex.server.bodies import body_route
from drex.server.chat import chat_prompt, conversation
from drex.server.errors import ApiError, documented
from drex.server.replies import Text, Tokens
from drex.server.schema import DetokenizeRequest, TokenizeRequest
from drex.server.serving import Serving
from drex.server.streaming import encode


def routes(serving: Serving) -> APIRouter:
    """The endpoints, for one server."""
    router = APIRouter(route_class=body_route(serving))
    llm = serving.llm

    @router.post("/tokenize", responses=documented(Tokens))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a prompt, or of messages under the chat template."""
        serving.check_model(body.model or None)
        ids = await serving.prepare(_tokenization(serving, body), list(TokenizeRequest.model_fields))
        found: Tokens = {
            "count": len(ids),
            "max_model_len": llm.config.max_model_len,
            "tokens": ids,
            "token_strs": [serving.texts.alone(token) for token in ids] if body.return_token_strs else None,
        }
        return Response(encode(found), media_type="application/json")

    @router.post("/detokenize", responses=documented(Text))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        serving.check_model(body.model or None)
        tokenizer = llm.tokenizer
        if tokenizer is None:
            raise ApiError(400, "the model has no tokeniser: there is no text")
        last = llm.model.decoder.spec.vocab_size - 1

        def work() -> str:
            outside = next((token for token in body.tokens if token > last), None)
            if outside is not None:
                raise SettingError("tokens", f"tokens has id {outside}: the vocabulary has ids 0..{last}")
            return str(tokenizer.decode(body.tokens))

        found: Text = {"prompt": await serving.prepare(work, ("tokens",))}
        return Response(encode(found), media_type="application/json")

    return router


def _tokenization(serving: Serving, body: TokenizeRequest) -> Callable[[], list[int]]:
    """What is to be run beside the event loop; raises ApiError (400) for a body that asks for nothing or for both."""
    tokenizer, prompt = serving.llm.tokenizer, body.prompt
    if (prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", "prompt")
    if prompt is None:
        messages = body.messages or ()
        return lambda: chat_prompt(conversation(messages, serving), body, serving)
    if tokenizer is None:
        raise ApiError(400, "the model has no tokeniser: there is nothing to tokenise with")
    serving.check_text(prompt, "prompt")
    special = body.add_special_tokens is not False
    return lambda: list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
