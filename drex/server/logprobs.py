"""Log-probabilities as OpenAI's two endpoints give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from drex.engine.detokenizer import Detokenizer
from drex.outputs import TokenOutput
from drex.server.replies import ChatLogprobs, CompletionLogprobs, TopLogprob
from drex.server.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST = -9999.0
"""JSON has no infinity."""


class TokenTexts:
    """Texts and bytes of single tokens; texts are each looked up once.

    Args:
        tokenizer: None: all are empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer)
        self._known: dict[int, str] = {}

    def alone(self, token_id: int) -> str:
        """What a token is by itself; a replacement character where it ends inside of one."""
        if self._tokenizer is None:
            return ""
        if token_id not in self._known:
            self._known[token_id] = str(self._tokenizer.decode([token_id]))
        return self._known[token_id]

    def of(self, token: TokenOutput) -> str:
        """What a token brought to its text; where that is nothing, what it is by itself."""
        return token.text or self.alone(token.id)

    def bytes_of(self, token_id: int, text: str) -> list[int] | None:
        """The bytes of a token that has a text, its own alone where it is a part of a character; None if not known."""
        found = self._bytes.of(token_id, text)
        return None if found is None else list(found)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """What each of some tokens brings to their text; joined, they are that text."""
        detokenizer = Detokenizer(self._tokenizer, skip_special=False)
        found = [detokenizer.push(token_id) for token_id in token_ids]
        if found:
            found[-1] += detokenizer.finish()
        return found


class CompletionLog:
    """Writes the log-probabilities of one sample, a piece at a time.

    Args:
        texts: of tokens.
        offset: where in the text the next token begins.
    """

    def __init__(self, texts: TokenTexts, offset: int = 0) -> None:
        self._texts, self._offset = texts, offset

    def prompt(self, token_ids: Sequence[int], scored: Iterable[TokenOutput]) -> CompletionLogprobs:
        """Of an echoed prompt; `scored` are its tokens but for the first, which nothing predicts."""
        pieces = self._texts.pieces(token_ids)
        tokens = [token._replace(text=piece) for token, piece in zip(scored, pieces[1:], strict=True)]
        first: CompletionLogprobs = {
            "tokens": [pieces[0] or self._texts.alone(token_ids[0])],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [self._offset],
        }
        self._offset += len(pieces[0])
        return joined(first, self.output(tokens))

    def output(self, tokens: Iterable[TokenOutput]) -> CompletionLogprobs:
        """Of tokens that were generated."""
        log: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text = self._texts.of(token)
            # Tokens of one text share an entry, which is the most likely one's; the token itself always has one.
            top: dict[str, float] = {}
            for token_id, logprob in token.top_logprobs:
                top.setdefault(text if token_id == token.id else self._texts.alone(token_id), max(logprob, LEAST))
            top.setdefault(text, max(token.logprob, LEAST))
            log["tokens"].append(text)
            log["token_logprobs"].append(max(token.logprob, LEAST))
            log["top_logprobs"].append(top)
            log["text_offset"].append(self._offset)
            self._offset += len(token.text)
        return log


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Two pieces as one."""
    return {
        "tokens": first["tokens"] + second["tokens"],
        "token_logprobs": first["token_logprobs"] + second["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + second["top_logprobs"],
        "text_offset": first["text_offset"] + second["text_offset"],
    }


def chat_logprobs(texts: TokenTexts, tokens: Iterable[TokenOutput]) -> ChatLogprobs:
    """Of the tokens of a message."""
    return {
        "content": [
            {
                **_entry(texts, token.id, texts.of(token), token.logprob),
                "top_logprobs": [
                    _entry(texts, other, texts.of(token) if other == token.id else texts.alone(other), logprob)
                    for other, logprob in token.top_logprobs
                ],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _entry(texts: TokenTexts, token_id: int, text: str, logprob: float) -> TopLogprob:
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": texts.bytes_of(token_id, text)}
