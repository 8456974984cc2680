"""Text as tokens come, for byte-level tokenizers and for those that fall back to bytes."""

from __future__ import annotations

import random

import pytest

from drex import LLM, EarlyExit, SamplingParams
from drex.engine.detokenizer import Detokenizer
from drex.engine.stop_strings import StopStringMatcher

REPLACEMENT = "\ufffd"
TEXTS = ["a the cat", "é", "\n\n🙂\t東京 the", "naïve 👩‍👩‍👧 cat", "\x00\x7f\x80", "\U0001d518\U0001d52b", "a\ufffdb"]


def byte_ids(data):
    """The byte tokens of the tokenizer that falls back to bytes."""
    return [3 + byte for byte in data]


def word_ids(tokenizer, *words):
    return [tokenizer.convert_tokens_to_ids(word) for word in words]


def pieces(detokenizer, ids):
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@pytest.fixture(params=["byte_level", "byte_fallback"])
def either(request, tokenizer, byte_fallback_tokenizer):
    return {"byte_level": tokenizer, "byte_fallback": byte_fallback_tokenizer}[request.param]


# Bytes that are no character


def test_bytes_that_end_a_run_of_good_ones_begin_anew(byte_fallback_tokenizer):
    """The decoder reads a run of bytes as a whole, and takes back the newline that was text already."""
    ids = [*byte_ids(b"\n\xf0\x9f"), *word_ids(byte_fallback_tokenizer, "a")]
    detokenizer = Detokenizer(byte_fallback_tokenizer)
    assert pieces(detokenizer, ids) == ["\n", "", "", 2 * REPLACEMENT + "a", ""]
    assert detokenizer.text == "\n" + 2 * REPLACEMENT + "a"


def test_characters_behind_bytes_that_are_none_come_whole(byte_fallback_tokenizer):
    ids = [*byte_ids(b"\n\xf0"), *word_ids(byte_fallback_tokenizer, "▁cat"), *byte_ids("🙂東".encode())]
    detokenizer = Detokenizer(byte_fallback_tokenizer)
    assert pieces(detokenizer, ids) == ["\n", "", REPLACEMENT + " cat", *["", "", "", "🙂", "", "", "東"], ""]


@pytest.mark.parametrize("skip_special", [True, False])
def test_any_tokens_become_text_in_pieces_that_make_it_up(either, skip_special):
    rng = random.Random(0)
    for _ in range(400):
        prompt = [rng.randrange(len(either)) for _ in range(rng.randrange(8))]
        # Ids beyond the tokenizer's are no text.
        ids = [rng.randrange(len(either) + 3) for _ in range(rng.randrange(1, 60))]
        detokenizer = Detokenizer(either, prompt, skip_special=skip_special)
        assert "".join(pieces(detokenizer, ids)) == detokenizer.text


def test_text_comes_within_bounds_where_no_character_ever_ends(byte_fallback_tokenizer):
    detokenizer = Detokenizer(byte_fallback_tokenizer)
    made = [detokenizer.push(token) for token in byte_ids(b"\xf0" * 100)]
    assert max(len(piece) for piece in made) <= 16
    assert sum(len(piece) for piece in made) > 80
    assert detokenizer.push(word_ids(byte_fallback_tokenizer, "▁cat")[0]).endswith(" cat")


# After a prompt


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "the cat", "x = 1  # \ufffd", "\ufffd\ufffd\ufffd\ufffd", "東京", "a\n"])
def test_text_is_what_comes_after_the_prompt(either, prompt, text):
    prompt_ids = either(prompt, add_special_tokens=False)["input_ids"]
    ids = either(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(either, prompt_ids)
    pieces(detokenizer, ids)
    assert detokenizer.text == text


@pytest.mark.parametrize("known", [1, 2, 3])
@pytest.mark.parametrize("before", ["", "the cat ", "a\n", "\ufffd", "東京"])
def test_bytes_at_the_end_of_a_prompt_complete_a_character(either, before, known):
    start = either(before, add_special_tokens=False)["input_ids"]
    ids = either("🙂 a", add_special_tokens=False)["input_ids"]
    # Both write a character that no word has as its four bytes.
    assert REPLACEMENT in either.decode(ids[:known])
    detokenizer = Detokenizer(either, [*start, *ids[:known]])
    pieces(detokenizer, ids[known:])
    assert detokenizer.text == "🙂 a"


def test_a_prompt_that_never_becomes_a_character_leaves_nothing_of_itself(either):
    start = either("🙂", add_special_tokens=False)["input_ids"][:2]
    ids = either("a!", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(either, start)
    pieces(detokenizer, ids)
    assert detokenizer.text == "a!"


def test_the_bundled_model_does_not_repeat_a_prompt_that_ends_in_a_replacement_character():
    llm = LLM()
    prompt = "x = 1  # \ufffd"
    [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8, stop=["x = 1", "#"]))
    sample = output.outputs[0]
    assert not sample.text.startswith((" ", REPLACEMENT))
    assert sample.text == llm.tokenizer.decode(sample.token_ids, skip_special_tokens=True).split("#")[0]


# Text that can't be made


class Broken:
    """A tokenizer's backend that can't decode one token."""

    def __init__(self, backend, token):
        self._backend, self._token = backend, token

    def decode(self, ids, skip_special_tokens):
        if self._token in ids:
            raise OverflowError("no such token")
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)


def test_a_request_whose_text_can_not_be_made_ends_alone(text_model, tokenizer, monkeypatch):
    llm = LLM(text_model, early_exit=EarlyExit(layers=[2], thresholds=0.1), dtype="float64")
    bad, good = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    always = [SamplingParams(temperature=0, max_tokens=6, logit_bias={token: 100}) for token in (bad, good)]
    expected = llm.generate(["the", "the"], always)[1].outputs[0]
    backend = Broken(tokenizer.backend_tokenizer, bad)
    monkeypatch.setattr(type(llm.tokenizer), "backend_tokenizer", property(lambda self: backend))
    broken, whole = (output.outputs[0] for output in llm.generate(["the", "the"], always))
    assert (broken.finish_reason, broken.text, broken.tokens) == ("error", "", ())
    assert broken.error == "no text can be made of its tokens: OverflowError: no such token"
    assert (whole.finish_reason, whole.text, whole.token_ids) == ("length", expected.text, expected.token_ids)
    assert not llm.engine.busy


# The token that ends the text


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_is_part_of_the_text_only_if_asked_for(text_model, tokenizer, include):
    llm = LLM(text_model, early_exit=EarlyExit.off(), dtype="float64")
    stop = tokenizer.convert_tokens_to_ids("a")
    params = SamplingParams(
        temperature=0, max_tokens=6, logit_bias={stop: 100}, stop_token_ids=[stop], include_stop_str_in_output=include
    )
    sample = llm.generate("the", params)[0].outputs[0]
    assert (sample.token_ids, sample.stop_reason) == ([stop], stop)
    assert sample.text == "".join(token.text for token in sample.tokens) == ("a" if include else "")


# Stop strings


def test_long_stop_strings_are_looked_at_only_where_the_text_resembles_them():
    class Counting(StopStringMatcher):
        looks = 0

        def _next_state(self, number, state, character):
            self.looks += 1
            return super()._next_state(number, state, character)

    stops = [chr(65 + number) + "a" * 999 for number in range(26)]
    matcher = Counting(stops)
    assert matcher.feed("the cat sat on the mat; " * 1000) is None
    assert (matcher.looks, matcher.undecided) == (0, 0)
    assert matcher.feed("B" + "a" * 500) is None
    assert (matcher.looks, matcher.undecided) == (501, 501)
    assert matcher.feed("a" * 499) == (499, stops[1])


def test_a_text_that_nearly_is_a_stop_string_again_and_again_costs_a_bounded_number_of_steps():
    class Counting(StopStringMatcher):
        steps = 0

        def _failure(self, number, length):
            self.steps += 1
            return super()._failure(number, length)

    matcher = Counting(["a" * 999 + "b"])
    assert matcher.feed("a" * 20_000) is None
    assert matcher.steps <= 20_000
    assert matcher.feed("b") == (1, "a" * 999 + "b")
