"""Text as tokens come: characters are never split, and what may become a stop string is held back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 6


class Detokenizer:
    """The growing text of one request.

    Attributes:
        text: all of it so far, cut at a stop string.
        stopped_at: the stop string that was found, or None.

    Args:
        tokenizer: a fast one, or None: then all text is empty.
        prompt: token ids before the text: some tokenisers drop a leading space where nothing comes before it.
        stop: stop strings.
        skip_special: leave special tokens out of the text.
        include_stop: keep the stop string in the text.
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
        self._stop, self._include_stop, self._skip_special = stop, include_stop, skip_special
        self._tokenizer = tokenizer
        self._backend: Any = None if tokenizer is None else tokenizer.backend_tokenizer
        self._prefix = list(prompt[-CONTEXT_TOKENS:])
        self._stream = None if tokenizer is None else _stream(self._prefix, skip_special)
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """Add a token; returns the text it completes, which is empty inside a character.

        Without `may_stop` (min_tokens is not reached) a stop string that it completes does not count.
        """
        if self._stream is None:
            return ""
        self._ids.append(token_id)
        piece: str = self._stream.step(self._backend, token_id) or ""
        self._append(piece, may_stop)
        return piece

    def finish(self) -> str:
        """No more tokens: returns what an unfinished character leaves (replacement characters)."""
        if self._tokenizer is None or self.stopped_at is not None:
            return ""
        before = self._decode(self._prefix)
        whole = self._decode(self._prefix + self._ids)
        rest = whole[len(before) + len(self.text) :] if whole.startswith(before + self.text) else ""
        self._append(rest, may_stop=False)
        return rest

    def _decode(self, ids: list[int]) -> str:
        assert self._tokenizer is not None
        text = self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)
        assert isinstance(text, str)
        return text

    def show(self, finished: bool) -> str:
        """Text not shown before and safe to show: without a tail that could still become a stop string."""
        if self._stream is None:
            return ""
        end = len(self.text)
        if self._stop and not finished:
            end -= max(self._overlap(stop) for stop in self._stop)
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new

    def _append(self, piece: str, may_stop: bool) -> None:
        before = len(self.text)
        self.text += piece
        if not may_stop:
            return
        found = [(self.text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._stop]
        found = [(at, stop) for at, stop in found if at >= 0]
        if found:
            at, stop = min(found)
            self.stopped_at = stop
            self.text = self.text[: at + len(stop)] if self._include_stop else self.text[:at]

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text that a stop string starts with."""
        return next((n for n in range(min(len(stop) - 1, len(self.text)), 0, -1) if self.text.endswith(stop[:n])), 0)


def _stream(prefix: list[int], skip_special: bool) -> Any:
    from tokenizers.decoders import DecodeStream  # the simulator has no text, and runs without tokenizers

    return DecodeStream(ids=prefix, skip_special_tokens=skip_special)
