"""What a prompt and a conversation may be in Python: as over HTTP, and every other kind is refused by name."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_model_folders import refused

from drex import SamplingParams
from drex.inputs.prompts import plain_messages
from drex.llm import LLM

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
SAID = {"role": "user", "content": "the cat"}


@pytest.fixture(scope="module")
def llm(text_model: Path) -> LLM:
    return LLM(text_model, policy="full", dtype="float64")


WRONG: list[tuple[Any, list[str]]] = [
    (None, ["prompts is None"]),
    (5, ["prompts is an int"]),
    (b"the cat", ["prompts is a bytes"]),
    (bytearray(b"cat"), ["prompts is a bytearray"]),
    ({"prompt": "the cat"}, ["prompts is a dict"]),
    ({"the cat"}, ["prompts is a set"]),
    (np.array([5, 6]), ["prompts is a numpy.ndarray"]),
    (torch.tensor([5, 6]), ["prompts is a torch.Tensor"]),
    ((each for each in ("a", "b")), ["prompts is a generator"]),
    (["a", None], ["prompts[1] is None"]),
    (["a", 5], ["prompts[1] is an int"]),
    (["a", b"b"], ["prompts[1] is a bytes"]),
    ([{"prompt": "a"}], ["prompts[0] is a dict", "'prompt_token_ids'"]),
    (["a", np.array([5])], ["prompts[1] is a numpy.ndarray"]),
    ([0.5], ["prompts[0] is a float"]),
]


@pytest.mark.parametrize(("prompts", "words"), WRONG, ids=lambda value: type(value).__name__)
def test_other_kinds_of_prompts_are_refused_by_name(llm: LLM, prompts: Any, words: list[str]) -> None:
    with refused(*words, "text or a list of token ids"):
        llm.generate(prompts, GREEDY)
    with refused(*words, "text or a list of token ids"):
        llm.stream(prompts, GREEDY)
    assert not llm.engine.busy


@pytest.mark.parametrize(
    "prompt", [None, b"x", {"prompt": "x"}, 5, np.array([5])], ids=lambda value: type(value).__name__
)
def test_other_kinds_are_refused_where_one_prompt_is_checked(llm: LLM, prompt: Any) -> None:
    with refused("the prompt is", "text or a list of token ids"):
        llm.check(prompt)


@pytest.mark.parametrize(
    ("token", "words"), [(np.int64(5), "a numpy.int64"), (5.0, "a float"), ("5", "a str"), ([5], "a list")], ids=str
)
def test_token_ids_of_other_types_are_named(llm: LLM, token: Any, words: str) -> None:
    with refused("token id", words):
        llm.generate([[5, token]], GREEDY)


@pytest.mark.parametrize(
    ("token_ids", "words"),
    [
        ("the cat", ["token_ids is a str"]),
        (["the cat"], ["token_ids[0] is a str", "tokenised first"]),
        (b"the", ["token_ids is a bytes"]),
        (None, ["token_ids is None"]),
        (np.array([[5, 6]]), ["token_ids is a numpy.ndarray"]),
        ([[5, 6], None], ["token_ids[1] is None"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_kinds_of_sequences_to_score_are_refused_by_name(llm: LLM, token_ids: Any, words: list[str]) -> None:
    with refused(*words, "list of token ids"):
        llm.score(token_ids)


def test_every_kind_of_list_is_a_prompt(llm: LLM) -> None:
    [expected] = llm.generate([[5, 6, 7]], GREEDY)
    given: list[Any] = [(5, 6, 7), range(5, 8), deque([5, 6, 7])]
    for output in [*llm.generate(given, GREEDY), *(llm.generate(each, GREEDY)[0] for each in given)]:
        assert output.prompt_token_ids == (5, 6, 7)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert llm.generate([], GREEDY) == []


# Conversations


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def test_content_parts_are_joined_as_over_http(llm: LLM) -> None:
    plain = [{"role": "system", "content": "a\nb"}, SAID]
    given = [{"role": "developer", "content": parts("a", "b")}, {"role": "user", "content": tuple(parts("the cat"))}]
    assert plain_messages(given) == plain
    outputs = [llm.chat(conversation, GREEDY)[0] for conversation in (plain, given)]
    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids
    several = llm.chat([plain, given], GREEDY)
    assert [output.prompt_token_ids for output in several] == [outputs[0].prompt_token_ids] * 2


def test_an_assistant_may_have_said_nothing_and_other_fields_stay(llm: LLM) -> None:
    given = [{**SAID, "name": "Ann"}, {"role": "assistant", "content": None}, SAID]
    assert plain_messages(given) == [{**SAID, "name": "Ann"}, {"role": "assistant", "content": ""}, SAID]
    assert given[1]["content"] is None
    assert llm.chat(given, GREEDY)[0].outputs[0].token_ids


BAD_MESSAGES: list[tuple[Any, list[str]]] = [
    ("the cat", ["messages is a str", '"role"']),
    (None, ["messages is None", '"role"']),
    (SAID, ["messages is a dict", '"role"']),
    ([], ["messages is empty"]),
    ([[]], ["messages is empty"]),
    (["the cat"], ["messages[0] is a str", '"role"']),
    ([[SAID], SAID], ["a conversation is a dict"]),
    ([[SAID], "the cat"], ["a conversation is a str"]),
    ([SAID, None], ["messages[1] is None"]),
    ([{"content": "x"}], ["messages[0]: role is None", "'user'"]),
    ([{"role": 5, "content": "x"}], ["messages[0]: role is 5"]),
    ([{"role": "user"}], ["messages[0]", "role 'user' has no content", "give text"]),
    ([{"role": "user", "content": 5}], ["messages[0]: content is an int", "text parts"]),
    ([{"role": "user", "content": {"type": "text", "text": "x"}}], ["content is a dict", "text parts"]),
    ([{"role": "user", "content": ["x"]}], ["messages[0].content[0] is a str", '"type": "text"']),
    (
        [{"role": "user", "content": [*parts("x"), {"type": "image_url", "image_url": {"url": "x"}}]}],
        ["messages[0].content[1]", "'image_url'", "'text' only"],
    ),
    ([{"role": "user", "content": [{"type": "text"}]}], ["messages[0].content[0]: text is None"]),
    ([{"role": "user", "content": "a\ud800"}], ["half a surrogate pair"]),
    ([{"role": "user", "content": parts("a\ud800")}], ["half a surrogate pair"]),
]


@pytest.mark.parametrize(("messages", "words"), BAD_MESSAGES, ids=lambda value: ascii(value)[:40])
def test_other_kinds_of_messages_are_refused_by_name(llm: LLM, messages: Any, words: list[str]) -> None:
    with refused(*words):
        llm.chat(messages, GREEDY)
    assert not llm.engine.busy


def test_what_a_template_says_stays_in_one_line(text_model: Path) -> None:
    llm = LLM(text_model, policy="full", dtype="float64")
    assert llm.tokenizer is not None
    llm.tokenizer.chat_template = "{{ raise_exception('roles\n must\n alternate') }}"
    with refused("chat template", "roles must alternate"):
        llm.chat([SAID], GREEDY)
