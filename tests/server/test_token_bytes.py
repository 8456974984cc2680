"""The bytes that log-probabilities give are a token's own, also where it is a part of a character."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from drex.outputs import TokenOutput
from drex.server.logprobs import TokenTexts, chat_logprobs

TEXT = "für 日本 🙂 the cat"


@pytest.fixture(params=["byte-level", "byte fallback"])
def any_tokenizer(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, byte_fallback_tokenizer: PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    return tokenizer if request.param == "byte-level" else byte_fallback_tokenizer


def logged(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[list[int] | None]:
    """The bytes that a chat's log-probabilities give of tokens, which are each other's alternatives too."""
    texts = TokenTexts(tokenizer)
    pieces = texts.pieces(ids)
    tokens = [
        TokenOutput(token, piece, -1.0, 6, 1.0, (), ((token, -1.0), (ids[0], -2.0)))
        for token, piece in zip(ids, pieces, strict=True)
    ]
    content = chat_logprobs(texts, tokens)["content"]
    assert all(entry["top_logprobs"][0]["bytes"] == entry["bytes"] for entry in content)
    assert all(entry["top_logprobs"][1]["bytes"] == content[0]["bytes"] for entry in content)
    return [entry["bytes"] for entry in content]


def test_joined_they_are_the_text(any_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = any_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = logged(any_tokenizer, ids)
    assert b"".join(bytes(one or ()) for one in found) == TEXT.encode()
    smile = "🙂".encode()
    at = next(i for i in range(len(found)) if found[i] == [smile[0]])
    assert found[at : at + 4] == [[byte] for byte in smile]


def test_a_token_after_an_unfinished_character_has_its_own_bytes_only(any_tokenizer: PreTrainedTokenizerFast) -> None:
    start = any_tokenizer("🙂", add_special_tokens=False)["input_ids"][-4:-2]
    the = any_tokenizer(" the", add_special_tokens=False)["input_ids"][-1]
    found = logged(any_tokenizer, [*start, the])
    assert found == [[0xF0], [0x9F], list(b" the")]


def test_special_tokens_have_the_bytes_of_their_names(any_tokenizer: PreTrainedTokenizerFast) -> None:
    [found] = logged(any_tokenizer, [any_tokenizer.eos_token_id])
    assert bytes(found or ()).decode() == any_tokenizer.eos_token


def test_without_a_tokeniser_nothing_is_known_of_bytes() -> None:
    assert TokenTexts(None).bytes_of(5, "") is None
