"""What can't be served is refused with OpenAI's error body, naming the field; nothing is ignored in silence."""

from __future__ import annotations

import inspect
import json
import socket
from typing import Any

import httpx
import openai
import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions
from server_fixtures import NAME, until

from drex.server.run import Server
from drex.server.schema import ChatRequest, CompletionRequest

BIG = 10**40
CHAT = [{"role": "user", "content": "x"}]
TOO_LONG = "context_length_exceeded"


@pytest.fixture(autouse=True)
def unharmed(server: Server):
    """Whatever was sent, nothing is left of it, and the engine goes on."""
    yield
    until(lambda: server.serving.unfinished == 0)
    assert server.serving.engine.failure is None


def refused(
    base: str, path: str, body: Any, status: int = 400, code: int | str | None = None, **how: Any
) -> dict[str, Any]:
    """The error of a request, which must have OpenAI's form; its code is the status unless another is expected."""
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    headers = {"content-type": "application/json", **how.pop("headers", {})}
    reply = httpx.post(f"{base}{path}", **sent, headers=headers, timeout=30, **how)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == (code or status)
    assert 5 < len(error["message"]) <= 501
    assert "Traceback" not in error["message"]
    return error


OUT_OF_RANGE: list[tuple[str, list[Any]]] = [
    ("temperature", [-0.1, 2.1, "1", [], BIG, True]),
    ("top_p", [0, 1.1, -1, "x"]),
    ("n", [0, -1, 129, 1.5, "2", BIG]),
    ("max_tokens", [0, -2, 1025, BIG, 2.5, "16"]),
    ("logprobs", [21, -1, BIG, "2"]),
    ("presence_penalty", [2.5, -3]),
    ("frequency_penalty", [2.5, -3]),
    ("repetition_penalty", [0, 3]),
    ("top_k", [-2, 1.5]),
    ("min_p", [-0.1, 1.1]),
    ("min_tokens", [17, -1]),
    ("seed", [BIG, 1.5, "1"]),
    ("priority", [BIG, 0.5]),
    ("stop", ["", [""], [1], {}, ["x"] * 33, "x" * 1001]),
    ("stop_token_ids", [[-1], ["x"], 5, [270]]),
    ("logit_bias", [{"x": 1}, {"-1": 1}, {"999": 1}, {"5": 101}, {"5": "x"}, [], {str(i): 1 for i in range(301)}]),
    ("tpot_ms", [0, -5, "x"]),
    ("stream", ["yes", 1]),
    ("stream_options", [{}, {"x": 1}]),
    ("echo", ["x", 1]),
    ("user", [1]),
    ("model", [1]),
    ("best_of", [2, 0]),
    (
        "early_exit",
        [
            True,
            "off",
            {"thresholds": "x"},
            {"layers": [3]},
            {"x": 1},
            {"kv_fill": "mask"},
            {"patience": 0},
            {"thresholds": [0.1, 0.2, 0.3]},
            {"criterion": "probe"},
        ],
    ),
    ("prompt", [None, "", [], [[]], [1, "x"], ["x", ""], [-1], {}, 5, "x" * 100_000, [5] * 1024, [5, 270]]),
    ("safety_identifier", [1]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in OUT_OF_RANGE for value in values],
                         ids=lambda value: str(value)[:20])  # fmt: skip
def test_values_out_of_range_name_the_field(base: str, field: str, value: Any) -> None:
    code = TOO_LONG if field == "prompt" and isinstance(value, str | list) and len(value) > 1000 else None
    error = refused(base, "/v1/completions", {"prompt": "x", field: value}, code=code)
    assert error["param"] == field
    assert field in error["message"]
    assert error["type"] == "invalid_request_error"


UNSUPPORTED: list[tuple[str, Any, list[Any]]] = [
    ("tools", [{"type": "function"}], [None, []]),
    ("tool_choice", "required", [None, "none", "auto"]),
    ("response_format", {"type": "json_object"}, [None, {"type": "text"}]),
    ("functions", [{}], [None, []]),
    ("use_beam_search", True, [None, False]),
    ("suffix", "x", [None, ""]),
    ("length_penalty", 1.2, [None, 1.0, 1]),
    ("prompt_logprobs", 1, [None]),
    ("guided_json", {}, [None]),
    ("modalities", ["audio"], [None, ["text"]]),
    ("reasoning_effort", "high", [None, "none"]),
    ("bad_words", ["x"], [None, []]),
    ("request_id", "x", [None]),
    ("moderation", {}, [None]),
    ("return_token_ids", True, [None, False]),
    ("kv_transfer_params", {}, [None]),
]


@pytest.mark.parametrize(("field", "asked", "nothing"), UNSUPPORTED, ids=lambda value: str(value)[:20])
def test_what_is_not_supported_is_refused_and_what_asks_for_nothing_is_not(
    base: str, field: str, asked: Any, nothing: list[Any]
) -> None:
    for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": CHAT})):
        error = refused(base, f"/v1/{path}", {**body, field: asked})
        assert error["param"] == field
        assert error["message"].startswith(f"{field} is not supported: ")
        for value in nothing:
            reply = httpx.post(f"{base}/v1/{path}", json={**body, "max_tokens": 1, field: value})
            assert reply.status_code == 200, reply.text


def test_every_field_of_the_official_client_is_known() -> None:
    # Of those that shape the request itself, not how it is sent.
    sending = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    for create, model in ((ChatCompletions.create, ChatRequest), (Completions.create, CompletionRequest)):
        assert set(inspect.signature(create).parameters) - sending <= set(model.model_fields)


def test_asking_for_no_alternatives_needs_no_logprobs(base: str) -> None:
    body = {"messages": CHAT, "max_tokens": 1, "logprobs": False, "top_logprobs": 0}
    reply = httpx.post(f"{base}/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["logprobs"] is None


def test_null_is_as_if_it_were_not_there(base: str) -> None:
    schema = httpx.get(f"{base}/openapi.json").json()["components"]["schemas"]
    for path, name, body in (
        ("completions", "CompletionRequest", {"prompt": "x", "max_tokens": 1}),
        ("chat/completions", "ChatRequest", {"messages": CHAT, "max_completion_tokens": 1}),
    ):
        nulls = dict.fromkeys(schema[name]["properties"]) | body
        assert httpx.post(f"{base}/v1/{path}", json=nulls).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages"),
        ({"messages": CHAT, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": CHAT, "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"messages": CHAT, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": CHAT, "echo": True}, "echo"),
        ({"messages": CHAT, "nonsense": None}, "nonsense"),
        ({}, "messages"),
    ],
)
def test_bad_conversations(base: str, body: Any, param: str) -> None:
    assert refused(base, "/v1/chat/completions", body)["param"] == param


def test_prompt_and_output_together_are_clamped(client: openai.OpenAI) -> None:
    body = {"ignore_eos": True}
    reply = client.completions.create(model=NAME, prompt=[5] * 1000, max_tokens=500, extra_body=body)
    assert reply.usage.total_tokens == 1024


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe\xfa",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "seed": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        b'{"prompt": "x", "\\ud800": 1}',
        b'{"prompt": "x"} trailing',
        b"\x00" * 1000,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_bodies_that_are_no_json_object(base: str, body: bytes) -> None:
    refused(base, "/v1/completions", body)
    refused(base, "/v1/chat/completions", body)


def test_bodies_have_to_say_that_they_are_json(base: str) -> None:
    # A page elsewhere can make a browser send anything but this content type without asking first.
    body = json.dumps({"prompt": "x"}).encode()
    error = refused(base, "/v1/completions", body, headers={"content-type": "text/plain"})
    assert "application/json" in error["message"]


def test_a_body_of_50_megabytes_is_too_large(base: str) -> None:
    refused(base, "/v1/completions", b'{"prompt": "' + b"x" * 50_000_000 + b'"}', 413)

    def chunked():
        for _ in range(50):
            yield b"x" * 1_000_000

    reply = httpx.post(
        f"{base}/v1/completions", content=chunked(), headers={"content-type": "application/json"}, timeout=30
    )
    assert reply.status_code == 413


def test_no_http_at_all(server: Server) -> None:
    with socket.create_connection(server.address, timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01 this is not http\r\n\r\n")
        assert b" 400 " in raw.recv(4096)


def test_unknown_models_and_paths(base: str, client: openai.OpenAI) -> None:
    error = refused(base, "/v1/completions", {"prompt": "x", "model": "gpt-9"}, 404)
    assert error["param"] == "model"
    assert NAME in error["message"]
    refused(base, "/v1/nothing", {}, 404)
    assert httpx.get(f"{base}/v1/completions").status_code == 405
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_the_client_raises_its_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="x", temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nothing", prompt="x", stream=True)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": CHAT}, "prompt"),
        ("/tokenize", {"prompt": "x" * 100_000}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/detokenize", {"tokens": [270]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
def test_bad_tokens_and_text(base: str, path: str, body: Any, param: str) -> None:
    code = TOO_LONG if len(json.dumps(body)) > 1000 else None
    assert refused(base, path, json.dumps(body).encode(), code=code)["param"] == param


WORDS: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"messages": []}, "messages has 0 entries: give at least 1"),
    ("messages", {"messages": "x"}, 'messages is "x": give a list'),
    ("messages", {}, "messages is missing: give it"),
    ("messages", {"messages": ["x"]}, 'messages.0 is "x": give an object'),
    (
        "messages",
        {"messages": [{"role": "king", "content": "x"}]},
        "messages.0.role is \"king\": give 'system', 'developer', 'user', 'assistant' or 'tool'",
    ),
    ("messages", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content: give a string, or a list of"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.type is not supported: drex reads text only; leave all other parts out",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content.0.text is missing: give it",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "colour": 1}]}]},
        "messages.0.content.0.colour is not a field that is known here: leave it out",
    ),
    (
        "messages",
        {"messages": [*CHAT, {"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages.1.tool_calls is not supported: drex calls no functions; leave it out",
    ),
    (
        "messages",
        {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "x"}}]},
        "messages.0.audio is not supported: drex reads and writes text only; leave it out",
    ),
    (
        "response_format",
        {"messages": CHAT, "response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format is not supported: drex can't force a form on its answers; leave it out, and ask for the form",
    ),
    (
        "stream_options",
        {"messages": CHAT, "stream": True, "stream_options": {"x": 1}},
        "stream_options.x is not a field",
    ),
    (
        "stream_options",
        {"messages": CHAT, "stream": True, "stream_options": {"include_usage": "yes"}},
        'stream_options.include_usage is "yes": give true or false',
    ),
    (
        "early_exit",
        {"messages": CHAT, "early_exit": True},
        "early_exit: give an object with early-exit settings, or false",
    ),
    (
        "early_exit",
        {"messages": CHAT, "early_exit": {"thresholds": "x"}},
        "early_exit.thresholds: give one number, or one for each of its exits",
    ),
    ("early_exit", {"messages": CHAT, "early_exit": {"patience": 0}}, "early_exit.patience is 0: give at least 1"),
    ("logit_bias", {"messages": CHAT, "logit_bias": {"5": 101}}, "logit_bias.5 is 101: give at most 100"),
    ("logit_bias", {"messages": CHAT, "logit_bias": {"x": 1}}, 'logit_bias.x is "x": give a token id'),
    # A token named like a field of another engine is no such field.
    ("logit_bias", {"messages": CHAT, "logit_bias": {"audio": 1}}, 'logit_bias.audio is "audio": give a token id'),
    ("temperature", {"messages": CHAT, "temperature": "hot"}, 'temperature is "hot": give a number'),
    ("temperature", {"messages": CHAT, "temperature": BIG}, "temperature is 1000"),
    ("n", {"messages": CHAT, "n": 1.5}, "n is 1.5: give a whole number"),
    ("user", {"messages": CHAT, "user": 1}, "user is 1: give a string"),
    ("stop", {"messages": CHAT, "stop": ["x", ""]}, "stop: give a non-empty string of at most 1000 characters, or up"),
    (
        "chat_template",
        {"messages": CHAT, "chat_template": "x"},
        "chat_template is not supported: start the server with",
    ),
    ("x", {"messages": CHAT, "x": 1}, "x is not a field that is known here: leave it out"),
]


@pytest.mark.parametrize(("param", "body", "words"), WORDS, ids=lambda value: str(value)[:40])
def test_refusals_say_what_came_where_and_what_to_give_instead(
    base: str, param: str, body: dict[str, Any], words: str
) -> None:
    error = refused(base, "/v1/chat/completions", body)
    assert error["param"] == param
    assert error["message"].startswith(words)
    assert "Input should" not in error["message"]


def test_a_field_is_explained_as_its_own_endpoint_has_it(base: str) -> None:
    said = [
        refused(base, path, body)["message"]
        for path, body in (
            ("/v1/completions", {"prompt": "x", "echo": "yes"}),
            ("/v1/chat/completions", {"messages": CHAT, "echo": True}),
            ("/tokenize", {"prompt": "x", "add_special_tokens": "no"}),
            ("/v1/completions", {"prompt": "x", "add_special_tokens": False}),
        )
    ]
    assert said[0] == 'echo is "yes": give true or false'
    assert said[1].startswith("echo is not supported: use /v1/completions")
    assert said[2] == 'add_special_tokens is "no": give true or false'
    assert said[3].startswith("add_special_tokens is not supported: give the prompt as token ids")


@pytest.mark.parametrize(
    ("path", "body", "param", "found"),
    [
        ("/v1/completions", {"prompt": [5] * 1500}, "prompt", "1500 tokens"),
        ("/v1/completions", {"prompt": "x" * 100_000}, "prompt", "100000 characters"),
        ("/v1/completions", {"prompt": [5] * 1500, "stream": True}, "prompt", "1500 tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 1020}]}, "messages", " tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 99_999}]}, "messages", "99999"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 99_999}]}, "messages", "99999"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_clients_recognise_a_prompt_that_is_too_long(base: str, path: str, body: Any, param: str, found: str) -> None:
    error = refused(base, path, body, code=TOO_LONG)
    assert error["param"] == param
    assert error["message"].startswith("This model's maximum context length is 1024 tokens")
    assert found in error["message"]
    assert "shorten" in error["message"]


def test_asking_for_too_many_tokens_is_not_a_prompt_that_is_too_long(base: str) -> None:
    error = refused(base, "/v1/completions", {"prompt": "x", "max_tokens": 1025})
    assert error["param"] == "max_tokens"
    assert "maximum context length" not in error["message"]
