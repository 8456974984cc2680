"""From what was recorded of a request to what its user gets: tokens with their text, and the reason for the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from drex.control.request import Request, TokenRecord
from drex.engine.detokenizer import Detokenizer
from drex.outputs import Chunk, CompletionOutput, FinishReason, TokenOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Emitted = tuple[str, Chunk, CompletionOutput | None]
"""Request id, what is new, and the whole sample once it is finished."""


class Sample:
    """A request on its way out.

    Args:
        request: the request.
        tokenizer: makes text; None leaves it empty.
        layers: layers executed by the end of each segment.

    Attributes:
        tokens: those that became text.
        last_at: when the last of them did, in seconds of the executor's clock.
    """

    def __init__(self, request: Request, tokenizer: PreTrainedTokenizerBase | None, layers: Sequence[int]) -> None:
        params = request.params
        self.request = request
        self.tokens: list[TokenOutput] = []
        self.last_at = 0.0
        self._layers = layers
        self._detokenizer = Detokenizer(
            tokenizer,
            request.prompt,
            params.stop_strings,
            params.skip_special_tokens,
            params.include_stop_str_in_output,
        )

    def take_records(self) -> Chunk:
        """Make text of what was recorded since the last call.

        The chunk's `finish_reason` is set if the request has ended, by a stop string too, or if no text can be made.
        """
        request = self.request
        try:
            fresh = self._push_records()
            reason = request.finish_reason if self._detokenizer.stopped_at is None else FinishReason.STOP
            if reason is not None:
                rest = self._detokenizer.finish()
                if rest and fresh:
                    fresh[-1] = fresh[-1]._replace(text=fresh[-1].text + rest)
            text = self._detokenizer.show(reason is not None)
        except Exception as error:  # a tokenizer is a program of the model's author: it may raise anything
            log.exception("no text can be made of request %s", request.request_id)
            request.fail(f"no text can be made of its tokens: {type(error).__name__}: {error}")
            fresh, reason, text = [], FinishReason.ERROR, ""
        self.tokens.extend(fresh)
        return Chunk(request.sample, text, tuple(fresh), reason, request.error)

    def whole(self, reason: FinishReason) -> CompletionOutput:
        """All of it, once it has ended."""
        return _whole(self.request, reason, self._detokenizer.text, self.tokens)

    def end_with_error(self, error: str) -> Emitted:
        """The end of the request, with what it had got, for a reason that lies outside of it."""
        return ended_with_error(self.request, error, self._detokenizer.text, self.tokens)

    def _push_records(self) -> list[TokenOutput]:
        """The new records as tokens with their text, up to a stop string."""
        request, fresh = self.request, []
        params = request.params
        for number, record in enumerate(request.records[len(self.tokens) :], len(self.tokens) + 1):
            # As a stop string, the token that ends the text is no part of it, unless that is asked for.
            hidden = not params.include_stop_str_in_output and request.ends(record.token_id, number)
            text = "" if hidden else self._detokenizer.push(record.token_id, number >= params.min_tokens)
            fresh.append(token_output(record, text, self._layers))
            if self._detokenizer.stopped_at is not None:
                # Under run-ahead several tokens come at once: what comes behind a stop string doesn't count.
                request.cut(number, self._detokenizer.stopped_at)
                break
        return fresh


def token_output(record: TokenRecord, text: str, layers: Sequence[int]) -> TokenOutput:
    """A record in the user's terms: layers instead of segments."""
    return TokenOutput(
        id=record.token_id,
        text=text,
        logprob=record.logprob,
        exit_layer=layers[record.depth - 1],
        confidence=record.confidence,
        checks=record.checks,
        top_logprobs=record.top,
    )


def ended_with_error(request: Request, error: str, text: str = "", tokens: Sequence[TokenOutput] = ()) -> Emitted:
    """The end of a request that something else than its own pass ended.

    Args:
        request: the request.
        error: what happened.
        text: what it had got before.
        tokens: likewise.
    """
    request.end(FinishReason.ERROR, error)
    chunk = Chunk(request.sample, "", (), FinishReason.ERROR, error)
    return request.request_id, chunk, _whole(request, FinishReason.ERROR, text, tokens)


def _whole(request: Request, reason: FinishReason, text: str, tokens: Sequence[TokenOutput]) -> CompletionOutput:
    return CompletionOutput(
        index=request.sample,
        text=text,
        tokens=tuple(tokens),
        finish_reason=reason,
        stop_reason=request.stop_reason,
        error=request.error,
    )
