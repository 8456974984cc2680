"""From the streams of an engine to one HTTP reply, whole or as server-sent events; completions and chat fill in theirs.

Every request gets a terminal answer: its reply, an error, or, in a stream that has begun, an error as the last event.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from typing import Any

from fastapi import Request, Response

from drex import __version__
from drex.engine.streams import EngineStoppedError, Event, Stream
from drex.outputs import TokenOutput
from drex.server.errors import ApiError
from drex.server.replies import FinishReason, TokenExit
from drex.server.schema import Generation
from drex.server.serving import Serving
from drex.server.streaming import DONE, EventStream, encode, event, unless_gone
from drex.server.usage import Tally, token_exits

FINGERPRINT = f"drex-{__version__}"


def finish_reason(event: Event) -> FinishReason | None:
    """Why a sample ended with an event; None if it goes on. One that failed has no answer, and never gets here."""
    if event.whole is None:
        return None
    assert event.whole.finish_reason in ("stop", "length")
    return "stop" if event.whole.finish_reason == "stop" else "length"


class Answer(ABC):
    """The answer to one HTTP request.

    Args:
        serving: that serves it.
        body: what was asked.
        stream: of its requests: for each prompt, its samples in a row.
        name: of the model, to answer with.
        http: the request.
    """

    prefix: str
    """Of the reply's id."""
    whole_kind: str
    chunk_kind: str
    """Names of the reply's and of a chunk's form."""

    def __init__(self, serving: Serving, body: Generation, stream: Stream, name: str, http: Request) -> None:
        self.body, self.stream = body, stream
        self.samples = body.n or 1
        self.texts = serving.texts
        self._serving, self._http = serving, http
        prompts = stream.requests[:: self.samples]
        self.tally = Tally(sum(len(one.prompt) for one in prompts), serving.llm.model.decoder.spec.num_layers)
        self._numbers = {request.request_id: number for number, request in enumerate(stream.requests)}
        self._reasons: list[str] = []
        self._head = {
            "id": f"{self.prefix}-{http.state.request_id}",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": FINGERPRINT,
        }

    @abstractmethod
    def choice(self, number: int, event: Event) -> Any:
        """A finished sample, from its last event."""

    @abstractmethod
    def pieces(self, number: int, event: Event) -> Sequence[Any]:
        """What is new of samples, as choices of chunks; empty if nothing is to be said yet."""

    def opening(self) -> Sequence[Any]:
        """Choices of the chunks that a stream begins with."""
        return ()

    def kept(self, tokens: Sequence[TokenOutput]) -> Sequence[TokenOutput]:
        """Those of some tokens that belong to the answer."""
        return tokens

    def exits(self, tokens: Sequence[TokenOutput]) -> list[TokenExit]:
        """Where tokens left, and what each exit point said of them."""
        return token_exits(tokens, self._serving.llm.model.exits.layers)

    async def respond(self) -> Response:
        """The reply; raises ApiError, or ClientGoneError if nobody waits for it."""
        if self.body.stream:
            return EventStream(self._stream(), self._serving.settings.body_timeout)
        return Response(
            encode(await unless_gone(self._http.receive, self._whole())),
            media_type="application/json",
        )

    async def _whole(self) -> dict[str, Any]:
        done: dict[int, Any] = {}
        async with self._answering():
            async for events in self.stream:
                for one in events:
                    number = self._take(one)
                    if one.whole is not None:
                        done[number] = self.choice(number, one)
        choices = [done[number] for number in range(len(self.stream.requests))]
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": self.tally.usage()}

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        options = self.body.stream_options
        continuous = bool(options and options.continuous_usage_stats)
        extra: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        head = {**self._head, "object": self.chunk_kind}
        try:
            async with self._answering():
                opening = self.opening()
                if opening:
                    yield b"".join(event({**head, "choices": [choice], **extra}) for choice in opening)
                async for events in self.stream:
                    said = []
                    for one in events:
                        choices = self.pieces(self._take(one), one)
                        if continuous:
                            extra = {"usage": self.tally.so_far()}
                        said += [event({**head, "choices": [choice], **extra}) for choice in choices]
                    if said:
                        yield b"".join(said)
            last = {**head, "choices": [], "usage": self.tally.usage()}
            yield (event(last) if options and options.include_usage else b"") + DONE
        except ApiError as error:
            self._http.state.log["error"] = error.message
            yield event(error.body()) + DONE

    def _take(self, one: Event) -> int:
        """Count an event; returns the number of its sample. Raises ApiError (500) if its pass failed."""
        if one.whole is not None:
            self._reasons.append(one.whole.finish_reason)
            if one.whole.error is not None:
                raise ApiError(500, f"the request failed while it was computed ({one.whole.error}): try again")
        self.tally.add(self.kept(one.chunk.tokens))
        return self._numbers[one.request.request_id]

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        """The time in which the stream is read: afterwards it is closed, whatever happened.

        Raises:
            ApiError: 504 after the request's time, 503 if the engine ends first.
        """
        seconds = self._serving.settings.request_timeout
        try:
            with closing(self.stream):
                async with asyncio.timeout(seconds):
                    yield
        except TimeoutError as error:
            raise ApiError(504, f"the request was not finished in {seconds:g} s: ask for fewer tokens") from error
        except EngineStoppedError as error:
            raise ApiError(503, str(error)) from error
        finally:
            self._note()

    def _note(self) -> None:
        """What the log says of it."""
        first = self.stream.requests[0]
        usage = self.tally.so_far()
        self._http.state.log.update(
            samples=len(self.stream.requests),
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            finish_reasons=",".join(sorted(set(self._reasons))) or None,
            ttft_ms=None if first.first_token_at is None else round((first.first_token_at - first.arrived_at) * 1e3, 1),
        )
