"""Text as tokens come: characters are never split, and what may become a stop string is held back.

Tokens become text in a window: a few tokens whose text is known (the context, which some decoders need to tell whether
a space belongs before the next word) and the tokens whose text is not (the pending ones). The text of the pending
tokens is what the window's text has beyond the context's. The window moves on when that text ends with a whole
character.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from drex.engine.stop_strings import StopStringMatcher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 6
"""Tokens of the prompt that are context for the first token's text."""
CHARACTER_TOKENS = 4
"""Tokens that one character has at most: UTF-8 takes up to 4 bytes."""
PENDING_TOKENS = 16
"""Tokens that may wait for a whole character. Well-formed text keeps far below; bytes that are no text reach it, and
become replacement characters then."""
REPLACEMENT = "\ufffd"
"""What decoders write in place of bytes that are no character (yet)."""


class Detokenizer:
    """The growing text of one request.

    Args:
        tokenizer: None leaves all text empty.
        prompt: token ids before the text. Bytes at their end may complete a character, which then belongs to the text;
            nothing else of the prompt does.
        stop: stop strings.
        skip_special: leave special tokens out of the text.
        include_stop: keep the stop string in the text.

    Attributes:
        text: all of it so far, cut at a stop string.
        stopped_at: the stop string that was found, or None.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: Sequence[int] = (),
        stop: tuple[str, ...] = (),
        skip_special: bool = True,
        include_stop: bool = False,
    ) -> None:
        self.text = ""
        self.stopped_at: str | None = None
        self._include_stop, self._skip_special = include_stop, skip_special
        self._matcher = StopStringMatcher(stop)
        self._shown = 0
        # The Rust tokenizer decodes in a tenth of the time that its wrapper takes.
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._context, self._pending = self._split_prompt(prompt)
        self._context_text = self._decode(self._context)
        # The prompt's share of the pending text.
        self._prompt_text = self._pending_text() if self._pending else ""

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """Add a token; returns the text that it completes, which is empty inside a character.

        Args:
            token_id: the next token.
            may_stop: False lets a stop string pass that this token completes (`min_tokens` is not reached).
        """
        if self._backend is None:
            return ""
        self._pending.append(token_id)
        piece = self._take(finished=False)
        self._append(piece, may_stop)
        return piece

    def finish(self) -> str:
        """No more tokens will come: returns what an unfinished character leaves (replacement characters)."""
        if self._backend is None or self.stopped_at is not None or not self._pending:
            return ""
        rest = self._take(finished=True)
        self._append(rest, may_stop=False)
        return rest

    def show(self, finished: bool) -> str:
        """Text not shown before and safe to show: without a tail that could still become a stop string."""
        end = len(self.text) - (0 if finished else self._matcher.undecided)
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new

    def _take(self, finished: bool) -> str:
        """The pending tokens' text, if it ends with a whole character or no more is to be waited for."""
        new = self._pending_text()
        if new.endswith(REPLACEMENT) and len(self._pending) < PENDING_TOKENS and not finished:
            return ""
        if not new and len(self._pending) == 1:
            # A token without text (a special one, or beyond the tokenizer's ids) says nothing to what follows either.
            self._pending.clear()
            return ""
        if not new.endswith(REPLACEMENT):
            # Bytes that are no text would spoil what follows: some decoders take a run of bytes as a whole.
            self._context, self._context_text = self._pending, self._decode(self._pending)
        self._pending = []
        known, self._prompt_text = self._prompt_text, ""
        return new[_common_start(new, known) :]

    def _pending_text(self) -> str:
        """Text of the pending tokens, those of the prompt included, behind the context."""
        whole = self._decode(self._context + self._pending)
        if whole.startswith(self._context_text):
            return whole[len(self._context_text) :]
        # The decoder reads the context anew, now that bytes follow: what was said of it stands, and these begin anew.
        return self._decode(self._pending)

    def _split_prompt(self, prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        """The prompt's last tokens, as context and the tokens whose bytes may belong to a character of the text."""
        if self._backend is None or not prompt:
            return [], []
        tail = list(prompt[-CONTEXT_TOKENS:])
        for pending in range(min(CHARACTER_TOKENS, len(tail))):
            end = len(tail) - pending
            for start in range(max(end, 1)):
                if REPLACEMENT not in self._decode(tail[start:end]):
                    return tail[start:end], tail[end:]
        # A prompt that ends in replacement characters, or in bytes that are none. Where several bytes become one
        # character, the run of bytes that some decoders take as a whole begins with a character's first byte.
        tail = list(prompt[-PENDING_TOKENS + CHARACTER_TOKENS :])
        spans = [(start, len(tail) - open_) for open_ in range(CHARACTER_TOKENS) for start in range(len(tail) - open_)]
        start, _ = max(spans, key=lambda span: span[1] - span[0] - len(self._decode(tail[slice(*span)])))
        return [], tail[start:]

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=self._skip_special)) if ids else ""

    def _append(self, piece: str, may_stop: bool) -> None:
        before = len(self.text)
        self.text += piece
        found = self._matcher.feed(piece, may_stop)
        if found is not None:
            end, self.stopped_at = found
            self.text = self.text[: before + end - (0 if self._include_stop else len(self.stopped_at))]


def _common_start(first: str, second: str) -> int:
    """Length of the longest start that two texts share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
