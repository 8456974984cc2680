"""What front ends send beside a request and what can't change its answer is accepted; what can, works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from server_fixtures import NAME, serving, url

from drex import LLM, SamplingParams

CHAT = [{"role": "user", "content": "the cat"}]
HINTS: dict[str, Any] = {
    "prompt_cache_key": "a",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "implicit"},
    "cache_salt": "a",
    "metadata": {"a": "b", "c": 1},
    "store": True,
    "service_tier": "flex",
    "verbosity": "low",
    "safety_identifier": "a",
    "user": "a",
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "x"},
    "model": "",
}


def posted(base: str, path: str, body: dict[str, Any], **how: Any) -> dict[str, Any]:
    """The reply to a body."""
    reply = httpx.post(f"{base}{path}", json=body, timeout=30, **how)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


@pytest.mark.parametrize("hint", HINTS)
def test_hints_change_nothing(base: str, hint: str) -> None:
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": CHAT})):
        plain = {**body, "max_tokens": 4, "seed": 3, "return_exit_layers": True}
        found = [posted(base, path, {**plain, **more}) for more in ({}, {hint: HINTS[hint]})]
        assert found[0]["choices"] == found[1]["choices"]
        assert found[1]["model"] == NAME


def test_hints_on_messages_and_their_parts_change_nothing(base: str) -> None:
    cache = {"cache_control": {"type": "ephemeral"}}
    plain = [*CHAT, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "on"}]
    hinted = [
        {"role": "user", "content": [{"type": "text", "text": "the cat", **cache}]},
        {"role": "assistant", "content": "sat", "reasoning_content": "a cat sits", "refusal": None, "annotations": []},
        {"role": "user", "content": "on", **cache},
    ]
    found = [posted(base, "/tokenize", {"messages": messages, "model": ""})["tokens"] for messages in (plain, hinted)]
    assert found[0] == found[1]
    assert posted(base, "/v1/chat/completions", {"messages": hinted, "max_tokens": 2})["choices"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_minus_one_token_is_no_limit(base: str, field: str) -> None:
    messages = [{"role": "user", "content": "x" * 990}]
    chat = posted(base, "/v1/chat/completions", {"messages": messages, field: -1, "ignore_eos": True})
    assert chat["usage"]["total_tokens"] == 1024
    if field == "max_tokens":
        whole = posted(base, "/v1/completions", {"prompt": [5] * 1000, field: -1, "ignore_eos": True})
        assert whole["usage"]["completion_tokens"] == 24


def test_a_seed_of_minus_one_is_no_seed(base: str, llm: LLM) -> None:
    body = {"prompt": "x", "max_tokens": 12, "temperature": 2, "seed": -1, "ignore_eos": True}
    assert len({posted(base, "/v1/completions", body)["choices"][0]["text"] for _ in range(4)}) > 1
    settings = SamplingParams(seed=-1, temperature=2.0, max_tokens=12, ignore_eos=True)
    assert settings.seed is None
    assert len({tuple(llm.generate([5], settings)[0].outputs[0].token_ids) for _ in range(4)}) > 1
    assert SamplingParams(seed=-2).seed == -2


# What the chat template is told

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content is defined %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and enable_thinking is false %}"
    "[no thinking]{% endif %}{% endif %}{{ more|default('') }}"
)


@pytest.fixture(scope="module")
def templated(make_llm: Callable[..., LLM]) -> Iterator[str]:
    """The address of a server whose template has variables."""
    llm = make_llm()
    assert llm.tokenizer is not None
    llm.tokenizer.chat_template = TEMPLATE
    with serving(llm) as running:
        yield url(running)


ENDED = [*CHAT, {"role": "assistant", "content": "sat "}]
RENDERED: list[tuple[list[Any], dict[str, Any], str]] = [
    (CHAT, {}, "[user]the cat[end]\n[assistant]"),
    (CHAT, {"chat_template_kwargs": {}}, "[user]the cat[end]\n[assistant]"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": False}}, "[user]the cat[end]\n[assistant][no thinking]"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": True}}, "[user]the cat[end]\n[assistant]"),
    (CHAT, {"chat_template_kwargs": {"more": "!", "unknown": [1]}}, "[user]the cat[end]\n[assistant]!"),
    (CHAT, {"add_generation_prompt": True}, "[user]the cat[end]\n[assistant]"),
    (CHAT, {"add_generation_prompt": False}, "[user]the cat[end]\n"),
    (ENDED, {"continue_final_message": True}, "[user]the cat[end]\n[assistant]sat "),
    (ENDED, {"continue_final_message": True, "add_generation_prompt": False}, "[user]the cat[end]\n[assistant]sat "),
    (ENDED, {"continue_final_message": False}, "[user]the cat[end]\n[assistant]sat [end]\n[assistant]"),
    ([*CHAT, {"role": "assistant", "content": "sat", "reasoning_content": "hm"}], {"add_generation_prompt": False},
     "[user]the cat[end]\n[assistant](hm)sat[end]\n"),
    ([*CHAT, {"role": "assistant", "content": "sat", "reasoning": "hm"}], {"add_generation_prompt": False},
     "[user]the cat[end]\n[assistant](hm)sat[end]\n"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "how", "text"), RENDERED, ids=lambda value: str(value)[:60])
def test_the_template_is_told_what_was_asked(
    templated: str, llm: LLM, messages: list[Any], how: dict[str, Any], text: str
) -> None:
    base = templated
    ids = llm.tokenizer(text)["input_ids"]
    assert posted(base, "/tokenize", {"messages": messages, **how})["tokens"] == ids
    wanted = llm.generate([ids], SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].text
    chat = posted(base, "/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 6, **how})
    assert chat["usage"]["prompt_tokens"] == len(ids)
    assert chat["choices"][0]["message"]["content"] == wanted


def test_python_tells_the_template_the_same(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    llm.tokenizer.chat_template = TEMPLATE
    greedy = SamplingParams(temperature=0, max_tokens=1)
    for messages, how, text in RENDERED[:10]:
        assert list(llm.chat(messages, greedy, **how)[0].prompt_token_ids) == llm.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("messages", "how", "param"),
    [
        (ENDED, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ([*CHAT, {"role": "assistant", "content": ""}], {"continue_final_message": True}, "continue_final_message"),
        ([*CHAT, {"role": "assistant"}], {"continue_final_message": True}, "continue_final_message"),
        *(
            (CHAT, {"chat_template_kwargs": {name: "x"}}, "chat_template_kwargs")
            for name in (
                "chat_template",
                "tokenize",
                "messages",
                "conversation",
                "add_generation_prompt",
                "tools",
                "self",
            )
        ),
        (CHAT, {"chat_template_kwargs": []}, "chat_template_kwargs"),
        (CHAT, {"continue_final_message": 1}, "continue_final_message"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_a_template_does_not_take_is_refused_by_name(
    base: str, messages: list[Any], how: dict[str, Any], param: str
) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        reply = httpx.post(f"{base}{path}", json={"messages": messages, **how}, timeout=30)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == param
