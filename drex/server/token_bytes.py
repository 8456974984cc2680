"""The bytes of single tokens, which may be a part of a character: no text can show those."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
"""A byte for which a tokeniser with byte fallback has no other token."""
SPACE = "▁"
"""Stands for a space in the vocabularies of such tokenisers."""
LAST_BYTE = 0xFF


class TokenBytes:
    """Finds the bytes of tokens in the vocabulary.

    Args:
        tokenizer: a fast one; None: nothing is known of any token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._kinds = set() if tokenizer is None else set(_decoders(tokenizer))

    def of(self, token_id: int, text: str) -> bytes | None:
        """The bytes of a token, or None where neither the vocabulary nor the text has them.

        Args:
            token_id: of the token.
            text: that it brought to the answer, or that it is by itself.
        """
        if self._tokenizer is None:
            return None
        entry = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(entry, str):  # ids that the model has and the tokeniser has not
            return text.encode()
        if "ByteLevel" in self._kinds and all(character in BYTES for character in entry):
            return bytes(BYTES[character] for character in entry)
        if "ByteFallback" in self._kinds and (byte := BYTE_TOKEN.match(entry)):
            return bytes([int(byte[1], 16)])
        if "\ufffd" not in text:
            return text.encode()
        # The text also has what stood open before this token; the entry has only what is its own.
        return entry.replace(SPACE, " ").encode() if self._kinds & {"ByteFallback", "ByteLevel"} else None


def _decoders(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Names of the steps by which a tokeniser makes text of tokens."""
    decoder: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is not None:
        state = json.loads(decoder.__getstate__())
        yield state["type"]
        yield from (step["type"] for step in state.get("decoders", ()))


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, as GPT-2 numbered them.

    Printable bytes stand for themselves; the others are the characters from 256 on, in ascending order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), LAST_BYTE + 1)]
    others = [byte for byte in range(LAST_BYTE + 1) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(LAST_BYTE + 1 + number): byte for number, byte in enumerate(others)},
    }


BYTES = _byte_characters()
