"""The official client gets from the server, token for token, what the Python API gives."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from server_fixtures import NAME, serving, url
from tokenizers.processors import TemplateProcessing

from drex import LLM, EarlyExit, SamplingParams

TEXT = "the cat sat on the mat"
IDS = [5, 6, 7, 8, 9]


def same(llm: LLM, prompt: Any, choice: Any, **settings: Any) -> None:
    """A choice is the Python API's first sample with the same settings."""
    expected = llm.generate(prompt, SamplingParams(**settings))[0].outputs[0]
    assert choice.text == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert [token["id"] for token in choice.tokens] == expected.token_ids
    assert [token["exit_layer"] for token in choice.tokens] == [token.exit_layer for token in expected.tokens]


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.5, "seed": -4, "top_p": 0.7, "presence_penalty": 0.5, "frequency_penalty": -0.5},
    {"temperature": 0, "logit_bias": {9: 3.5, 11: -100}, "ignore_eos": True},
    {"seed": 5, "top_k": 4, "min_p": 0.05, "repetition_penalty": 1.3, "min_tokens": 6},
    {"temperature": 0, "stop": ["a", "zz"], "include_stop_str_in_output": True},
    {"seed": 9, "stop_token_ids": [60, 61, 62, 63, 64, 65], "stop": "e"},
    {"temperature": 0, "early_exit": {"layers": [4], "thresholds": 0.2, "criterion": "margin"}},
    {"temperature": 0, "early_exit": {"enabled": False}},
]
OPENAI = {"temperature", "seed", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "stop"}


def asked(settings: dict[str, Any]) -> dict[str, Any]:
    """The client's arguments: what OpenAI does not know goes into extra_body."""
    known = {name: value for name, value in settings.items() if name in OPENAI}
    extra = {name: value for name, value in settings.items() if name not in OPENAI}
    if "logit_bias" in known:
        known["logit_bias"] = {str(token): bias for token, bias in known["logit_bias"].items()}
    return {"model": NAME, **known, "extra_body": {"return_exit_layers": True, **extra}}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
@pytest.mark.parametrize("prompt", [TEXT, IDS], ids=["text", "ids"])
def test_every_setting_means_what_it_means_in_python(
    client: openai.OpenAI, llm: LLM, settings: dict[str, Any], prompt: Any
) -> None:
    reply = client.completions.create(prompt=prompt, max_tokens=24, **asked(settings))
    python = {**settings, "max_tokens": 24}
    if "early_exit" in settings:
        python["early_exit"] = EarlyExit(**settings["early_exit"])
    same(llm, prompt, reply.choices[0], **python)


def test_the_default_is_sixteen_tokens(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=NAME, prompt=IDS, temperature=0, extra_body={"ignore_eos": True})
    assert reply.usage.completion_tokens == 16
    assert reply.object == "text_completion"
    assert reply.id.startswith("cmpl-")


@pytest.mark.parametrize("prompts", [[TEXT, "the dog"], [IDS, [3, 4]]], ids=["text", "ids"])
def test_lists_of_prompts_with_n_samples_each(client: openai.OpenAI, llm: LLM, prompts: Any) -> None:
    reply = client.completions.create(model=NAME, prompt=prompts, n=3, seed=7, max_tokens=9)
    expected = llm.generate(prompts, SamplingParams(n=3, seed=7, max_tokens=9))
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert [choice.text for choice in reply.choices] == [s.text for output in expected for s in output.outputs]
    assert reply.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in expected)
    assert reply.usage.completion_tokens == sum(len(s.tokens) for output in expected for s in output.outputs)


def test_usage_says_how_deep_the_tokens_went(client: openai.OpenAI, llm: LLM) -> None:
    body = {"return_exit_layers": True, "ignore_eos": True}
    reply = client.completions.create(model=NAME, prompt=TEXT, temperature=0, max_tokens=40, extra_body=body)
    tokens, usage = reply.choices[0].tokens, reply.usage.early_exit
    depths = [token["exit_layer"] for token in tokens]
    assert usage["mean_depth"] == pytest.approx(sum(depths) / 40)
    assert usage["exits"] == {str(depth): depths.count(depth) / 40 for depth in sorted(set(depths))}
    assert len(usage["exits"]) > 1
    early = sorted(token["confidence"] for token in tokens if token["exit_layer"] < 6)
    assert early[0] <= usage["confidence_p5"] <= early[len(early) // 10 + 1]
    full = client.completions.create(model=NAME, prompt=TEXT, max_tokens=4, extra_body={"early_exit": False})
    assert full.usage.early_exit == {"mean_depth": 6.0, "exits": {"6": 1.0}, "confidence_p5": None}


# Log-probabilities


def test_logprobs_of_the_output(client: openai.OpenAI, llm: LLM) -> None:
    reply = client.completions.create(model=NAME, prompt=TEXT, seed=2, max_tokens=12, logprobs=3)
    expected = llm.generate(TEXT, SamplingParams(seed=2, max_tokens=12, logprobs=3))[0].outputs[0]
    log = reply.choices[0].logprobs
    assert log.token_logprobs == pytest.approx([token.logprob for token in expected.tokens], abs=1e-5)
    assert len(log.tokens) == len(log.top_logprobs) == len(log.text_offset) == len(expected.tokens)
    for token, logprob, top in zip(log.tokens, log.token_logprobs, log.top_logprobs, strict=True):
        assert top[token] >= logprob
        assert 1 <= len(top) <= 4
    whole = [token.text for token in expected.tokens]
    assert log.text_offset == [len("".join(whole[:i])) for i in range(len(whole))]


def test_echo_gives_the_prompt_and_its_scores_as_lm_eval_slices_them(client: openai.OpenAI, llm: LLM) -> None:
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    reply = client.completions.create(
        model=NAME, prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1, echo=True
    )
    for prompt, choice, scored in zip(prompts, reply.choices, llm.score(prompts), strict=True):
        log = choice.logprobs
        assert log.token_logprobs[0] is None
        assert log.top_logprobs[0] is None
        assert len(log.tokens) == len(log.token_logprobs) == len(log.top_logprobs) == len(prompt) + 1
        assert log.token_logprobs[1:-1] == pytest.approx(scored.logprobs, abs=1e-5)
        for token, top in zip(log.tokens[1:], log.top_logprobs[1:], strict=True):
            assert token in top
        greedy = [lp == max(top.values()) for lp, top in zip(log.token_logprobs[1:], log.top_logprobs[1:], strict=True)]
        assert greedy[:-1] == [token == best for token, best in zip(prompt[1:], scored.best, strict=True)]
        assert choice.text.startswith(str(llm.tokenizer.decode(prompt)))


def test_echo_scores_the_exits_if_asked_to(client: openai.OpenAI, llm: LLM) -> None:
    prompt = list(range(5, 40))
    body = {"early_exit": {"score": True}}
    echo = {"model": NAME, "prompt": prompt, "max_tokens": 1, "logprobs": 0, "echo": True}
    early = client.completions.create(**echo, extra_body=body).choices[0].logprobs.token_logprobs
    whole = client.completions.create(**echo).choices[0].logprobs.token_logprobs
    assert early[1:-1] == pytest.approx(llm.score(prompt, early_exit=EarlyExit())[0].logprobs, abs=1e-5)
    assert whole[1:-1] == pytest.approx(llm.score(prompt)[0].logprobs, abs=1e-5)
    assert early != whole


def test_echo_alone_generates_nothing(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=NAME, prompt=TEXT, echo=True, max_tokens=0, logprobs=0)
    assert reply.choices[0].text == TEXT
    assert "".join(reply.choices[0].logprobs.tokens) == TEXT
    assert reply.usage.completion_tokens == 0


def test_text_of_characters_that_are_several_tokens(client: openai.OpenAI, llm: LLM) -> None:
    prompt = "für 日本 🙂"
    reply = client.completions.create(model=NAME, prompt=prompt, echo=True, max_tokens=0, logprobs=1)
    log = reply.choices[0].logprobs
    assert reply.choices[0].text == prompt
    assert len(log.tokens) == len(llm.check(prompt)) > len(prompt)
    assert log.text_offset[-1] <= len(prompt)


def test_an_empty_prompt_is_what_the_tokeniser_makes_of_it(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    assert llm.tokenizer is not None
    first = llm.tokenizer.convert_ids_to_tokens(5)
    llm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{first} $A", special_tokens=[(first, 5)])
    [wanted] = llm.generate([[5]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    with serving(llm) as running:
        for prompt, tokens in (("", 1), (["", "the"], 3)):
            body = {"prompt": prompt, "temperature": 0, "max_tokens": 5, "ignore_eos": True}
            reply = httpx.post(f"{url(running)}/v1/completions", json=body, timeout=30)
            assert reply.status_code == 200, reply.text
            assert reply.json()["usage"]["prompt_tokens"] == tokens
            assert reply.json()["choices"][0]["text"] == wanted.outputs[0].text
        for most in (0, 1):
            body = {"prompt": "", "max_tokens": most, "echo": True, "logprobs": 1}
            echoed = httpx.post(f"{url(running)}/v1/completions", json=body, timeout=30).json()["choices"][0]
            assert echoed["logprobs"]["tokens"][0] == first
            assert len(echoed["logprobs"]["token_logprobs"]) == 1 + most


# Streams


@pytest.mark.parametrize("extra", [{}, {"stop": ["at", "the cat"]}, {"logprobs": 2}, {"echo": True, "logprobs": 1}])
def test_a_stream_adds_up_to_the_whole_reply(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    body = {"return_exit_layers": True}
    asked = {"model": NAME, "prompt": [TEXT, "für"], "n": 2, "seed": 5, "max_tokens": 20, "extra_body": body, **extra}
    whole = client.completions.create(**asked)
    text, tokens, ends = [""] * 4, [[] for _ in range(4)], {}  # type: ignore[var-annotated]
    logs: list[list[Any]] = [[] for _ in range(4)]
    for chunk in client.completions.create(**asked, stream=True):
        [choice] = chunk.choices
        assert chunk.object == "text_completion"
        text[choice.index] += choice.text
        tokens[choice.index] += choice.tokens
        if choice.logprobs is not None:
            logs[choice.index] += choice.logprobs.token_logprobs
        if choice.finish_reason:
            assert choice.index not in ends
            ends[choice.index] = choice.finish_reason, choice.stop_reason
    for choice in whole.choices:
        number = choice.index
        assert text[number] == choice.text
        assert [t["id"] for t in tokens[number]] == [t["id"] for t in choice.tokens]
        assert ends[number] == (choice.finish_reason, choice.stop_reason)
        assert logs[number] == pytest.approx(choice.logprobs.token_logprobs if choice.logprobs else [], abs=1e-5)


def test_usage_of_a_stream(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": IDS, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    *first, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == 8
    assert last.usage.early_exit["mean_depth"] > 0
    assert all(chunk.usage is None and chunk.choices for chunk in first)
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        c.usage.completion_tokens for c in client.completions.create(**asked, stream=True, stream_options=options)
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 8
    assert [c.usage for c in client.completions.create(**asked, stream=True)][-1] is None


# Many at once


def prompts_of(count: int) -> list[list[int]]:
    draw = random.Random(count)
    return [[draw.randrange(3, 90) for _ in range(draw.randrange(2, 30))] for _ in range(count)]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_tokens_do_not_depend_on_who_else_is_served(base: str, llm: LLM, streaming: bool) -> None:
    prompts = prompts_of(64)
    settings = [SamplingParams(seed=i, max_tokens=6 + i % 20, temperature=i % 3 / 2) for i in range(64)]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, settings)]

    async def one(client: openai.AsyncOpenAI, number: int) -> list[int]:
        params = settings[number]
        reply: Any = await client.completions.create(
            model=NAME,
            prompt=prompts[number],
            seed=params.seed,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            stream=streaming,
            extra_body={"return_exit_layers": True},
        )
        if not streaming:
            return [token["id"] for token in reply.choices[0].tokens]
        return [token["id"] async for chunk in reply for token in chunk.choices[0].tokens]

    async def all_of_them() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(one(client, number) for number in range(64)))

    assert asyncio.run(all_of_them()) == expected


def test_a_request_chooses_how_it_runs_ahead_and_lossless_is_full_depth(client: openai.OpenAI) -> None:
    def text(**extra: Any) -> str:
        settings = {"temperature": 0.9, "seed": 5, "max_tokens": 24}
        said: str = client.completions.create(model=NAME, prompt=TEXT, extra_body=extra, **settings).choices[0].text
        return said

    assert text(run_ahead="trusted") == text(run_ahead="off")
    assert text(run_ahead="lossless") == text(early_exit=False)
    with pytest.raises(openai.BadRequestError) as refused:
        text(run_ahead="always")
    assert refused.value.param == "run_ahead"
