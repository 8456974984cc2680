"""Conversations with the official client: the chat template's tokens, and the same samples as in Python."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from server_fixtures import NAME

from drex import LLM, SamplingParams

MESSAGES: list[Any] = [
    {"role": "system", "content": "the dog"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on the mat"},
]


def test_a_turn_is_what_python_gives(client: openai.OpenAI, llm: LLM) -> None:
    reply = client.chat.completions.create(
        model=NAME, messages=MESSAGES, n=2, seed=4, max_completion_tokens=15, extra_body={"return_exit_layers": True}
    )
    [expected] = llm.chat(MESSAGES, SamplingParams(n=2, seed=4, max_tokens=15))
    assert reply.object == "chat.completion"
    assert reply.usage.prompt_tokens == len(expected.prompt_token_ids)
    for choice, sample in zip(reply.choices, expected.outputs, strict=True):
        assert choice.message.role == "assistant"
        assert choice.message.content == sample.text
        assert choice.finish_reason == sample.finish_reason
        assert [token["id"] for token in choice.tokens] == sample.token_ids
        assert [token["confidence"] for token in choice.tokens] == pytest.approx(
            [token.confidence for token in sample.tokens], abs=1e-5
        )


def test_parts_and_developers_are_text_and_system(client: openai.OpenAI) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "the dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "the cat"}, {"type": "text", "text": "sat"}]},
    ]
    plain: list[Any] = [{"role": "system", "content": "the dog"}, {"role": "user", "content": "the cat\nsat"}]
    asked: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 8}
    found = [client.chat.completions.create(messages=messages, **asked) for messages in (parts, plain)]
    assert found[0].choices[0].message.content == found[1].choices[0].message.content
    assert found[0].usage.prompt_tokens == found[1].usage.prompt_tokens


def test_without_a_limit_there_is_as_much_as_there_is_room_for(client: openai.OpenAI) -> None:
    body = {"ignore_eos": True}
    messages: list[Any] = [{"role": "user", "content": "x" * 900}]
    reply = client.chat.completions.create(model=NAME, messages=messages, temperature=0, extra_body=body)
    assert reply.usage.total_tokens == 1024
    assert reply.choices[0].finish_reason == "length"


def test_a_stream_adds_up_to_the_whole_reply(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "n": 2, "seed": 11, "max_tokens": 20, "stop": "at"}
    whole = client.chat.completions.create(**asked)
    text, ends, roles = ["", ""], {}, []
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        if not chunk.choices:
            assert chunk.usage.completion_tokens == whole.usage.completion_tokens
            continue
        [choice] = chunk.choices
        roles += [choice.index] if choice.delta.role == "assistant" else []
        text[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert roles == [0, 1]
    assert text == [choice.message.content for choice in whole.choices]
    assert [ends[0], ends[1]] == [choice.finish_reason for choice in whole.choices]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, llm: LLM, stream: bool) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "seed": 1, "max_tokens": 10}
    reply: Any = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=stream)
    choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    content = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    [expected] = llm.chat(MESSAGES, SamplingParams(seed=1, max_tokens=10, logprobs=2))
    tokens = expected.outputs[0].tokens
    assert [entry.logprob for entry in content] == pytest.approx([token.logprob for token in tokens], abs=1e-5)
    for entry, token in zip(content, tokens, strict=True):
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            [logprob for _, logprob in token.top_logprobs], abs=1e-5
        )
    end = llm.tokenizer.eos_token.encode() if expected.outputs[0].finish_reason == "stop" else b""
    whole = b"".join(bytes(entry.bytes) for entry in content).removesuffix(end)
    assert whole.decode(errors="replace") == expected.outputs[0].text
    assert any("\ufffd" in entry.token for entry in content), "no token is a part of a character: nothing was tested"


def test_deadlines_and_priority_are_taken(client: openai.OpenAI) -> None:
    body = {"tpot_ms": 500.0, "ttft_ms": 5000, "itl_ms": 900.5, "priority": -3}
    reply = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=5, extra_body=body)
    assert reply.choices[0].message.content is not None


def test_tokenize_and_detokenize(client: openai.OpenAI, base: str, llm: LLM) -> None:
    def post(path: str, body: Any) -> Any:
        return client.post(f"{base}{path}", body=body, cast_to=object)

    found = post("/tokenize", {"prompt": "the cat", "return_token_strs": True})
    assert found["tokens"] == llm.check("the cat")
    assert "".join(found["token_strs"]) == "the cat"
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 1024)
    assert post("/detokenize", {"model": NAME, "tokens": found["tokens"]}) == {"prompt": "the cat"}
    assert post("/tokenize", {"messages": MESSAGES})["tokens"] == llm.inputs.chat_prompt(MESSAGES)
