"""Large and hostile bodies: refused at the first error, in bounded time and memory, and nobody waits meanwhile."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError
from server_fixtures import until

from drex.server import bodies
from drex.server.bodies import LARGE_BODY, MAX_MEMBERS, parse_body
from drex.server.errors import ApiError
from drex.server.run import Server
from drex.server.schema import MAX_PROMPTS, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

MODELS = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
JSON = {"content-type": "application/json"}
MOST_ERRORS = 100
"""That a refusal may be chosen from: about one for each field."""


def lists(schema: Any) -> Iterator[dict[str, Any]]:
    """All lists in a schema of pydantic's."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "set", "tuple", "frozenset", "generator"):
            yield schema
        for part in schema.values():
            yield from lists(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            yield from lists(part)


@pytest.mark.parametrize("model", MODELS)
def test_every_list_ends_at_its_first_error_or_is_short(model: Any) -> None:
    found = list(lists(TypeAdapter(model).core_schema))
    assert found
    for one in found:
        assert one.get("fail_fast") or one.get("max_length", MOST_ERRORS) < MOST_ERRORS, one


HOSTILE: list[tuple[Any, str, str]] = [
    (CompletionRequest, "prompt", '["a",' + '"a",' * 50_000 + "1]"),
    (CompletionRequest, "prompt", "[" + "[]," * 50_000 + "[]]"),
    (CompletionRequest, "prompt", "[" + "1," * 50_000 + '"a"]'),
    (CompletionRequest, "prompt", "[" + "[1]," * 50_000 + "[-1]]"),
    (CompletionRequest, "stop", "[" + "1," * 50_000 + "1]"),
    (CompletionRequest, "stop_token_ids", "[" + '"a",' * 50_000 + "1]"),
    (CompletionRequest, "early_exit", '{"layers":[' + '"a",' * 50_000 + '"a"]}'),
    (CompletionRequest, "early_exit", '{"thresholds":[' + '"a",' * 50_000 + '"a"]}'),
    (CompletionRequest, "tools", "[" + "1," * 50_000 + "1]"),
    (CompletionRequest, "logit_bias", "{" + ",".join(f'"x{i}":1' for i in range(MAX_MEMBERS)) + "}"),
    (ChatRequest, "messages", "[" + "{}," * 50_000 + "{}]"),
    (ChatRequest, "messages", "[" + "1," * 50_000 + "1]"),
    (ChatRequest, "messages", '[{"role":"user","content":[' + "{}," * 50_000 + "{}]}]"),
    (TokenizeRequest, "messages", "[" + "{}," * 50_000 + "{}]"),
    (DetokenizeRequest, "tokens", "[" + '"a",' * 50_000 + '"a"]'),
]


@pytest.mark.parametrize(("model", "field", "value"), HOSTILE, ids=lambda value: str(value)[:16])
def test_the_errors_of_a_body_do_not_grow_with_it(model: Any, field: str, value: str) -> None:
    body = f'{{"{field}":{value}}}'.encode()
    with pytest.raises(ApiError) as refused:
        parse_body(body, model)
    assert refused.value.status == 400
    assert refused.value.param == field
    if field != "logit_bias":  # as many errors as members
        with pytest.raises(ValidationError) as caught:
            model.model_validate(json.loads(body))
        assert caught.value.error_count() < MOST_ERRORS


@pytest.mark.parametrize("start", ["", '"logit_bias":', '"response_format":', '"metadata":', '"early_exit":'])
def test_objects_have_a_bounded_number_of_members(base: str, start: str) -> None:
    members = ",".join(f'"x{i}":1' for i in range(MAX_MEMBERS + 1))
    body = '{"prompt":"a",' + (f"{start}{{{members}}}" if start else members) + "}"
    reply = httpx.post(f"{base}/v1/completions", content=body, headers=JSON)
    assert reply.status_code == 400
    assert f"at most {MAX_MEMBERS}" in reply.json()["error"]["message"]


def test_four_megabytes_of_errors_are_refused_at_once(base: str) -> None:
    # Once 11 s and 2.7 GB, and a half a minute and 6 GB.
    for value in ('"a",' * 1_048_000 + "1", "[]," * 1_390_000 + "[]", "[1]," * 1_000_000 + "[1]"):
        reply = httpx.post(f"{base}/v1/completions", content=f'{{"prompt":[{value}]}}', headers=JSON, timeout=60)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "prompt"
        assert f"at most {MAX_PROMPTS} prompts" in reply.json()["error"]["message"]
        assert reply.elapsed.total_seconds() < 5


def test_where_the_error_is_in_a_long_list_is_told() -> None:
    messages = [{"role": "user", "content": "x"}] * 5000
    body = json.dumps({"messages": [*messages, {"role": "king", "content": "x"}]}).encode()
    with pytest.raises(ApiError, match=r"^messages\.5000\.role is "):
        parse_body(body, ChatRequest)


@pytest.mark.parametrize("path", PATHS)
def test_the_server_answers_while_a_large_body_is_read(base: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def slow(body: bytes, model: Any) -> Any:
        if len(body) > LARGE_BODY:
            reading.set()
            assert go_on.wait(20)
        return parse_body(body, model)

    monkeypatch.setattr(bodies, "parse_body", slow)
    replies: list[httpx.Response] = []
    sent = {"content": b'{"nonsense": "' + b"a" * LARGE_BODY + b'"}', "headers": JSON, "timeout": 30}
    ask = threading.Thread(target=lambda: replies.append(httpx.post(f"{base}{path}", **sent)))
    ask.start()
    try:
        assert reading.wait(20)
        assert httpx.get(f"{base}/health", timeout=10).status_code == 200
        short = httpx.post(f"{base}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=10)
        assert short.status_code == 200
    finally:
        go_on.set()
        ask.join(30)
    assert replies[0].status_code == 400


def test_what_looks_at_all_of_a_body_does_so_beside_the_event_loop(
    server: Server, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    check = server.serving.check_text

    def noted(text: str, field: str) -> None:
        threads.append(threading.current_thread().name)
        check(text, field)

    monkeypatch.setattr(server.serving, "check_text", noted)
    chat = [{"role": "user", "content": "x"}]
    for path, body in (
        ("/v1/completions", {"prompt": ["x", "y"], "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": chat, "max_tokens": 1}),
        ("/tokenize", {"messages": chat}),
    ):
        assert httpx.post(f"{base}{path}", json=body, timeout=30).status_code == 200
    assert len(threads) == 4
    assert all(name.startswith("drex-intake") for name in threads)


def test_more_messages_than_tokens_are_refused(base: str) -> None:
    body = {"messages": [{"role": "user", "content": ""}] * 1025}
    for path in ("/v1/chat/completions", "/tokenize"):
        reply = httpx.post(f"{base}{path}", json=body, timeout=30)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "messages"
        assert "1025 messages" in reply.json()["error"]["message"]


def test_a_large_body_is_served_as_a_small_one_is(server: Server, base: str) -> None:
    body: dict[str, Any] = {"prompt": [[5, 6, 7]] * 4, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    small = httpx.post(f"{base}/v1/completions", json=body, timeout=30).json()
    padding = b" " * LARGE_BODY
    large = httpx.post(f"{base}/v1/completions", content=padding + json.dumps(body).encode(), headers=JSON).json()
    assert small["choices"] == large["choices"]
    until(lambda: server.serving.unfinished == 0)


def test_garbage_is_collected_again_after_a_body() -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError, match="Expecting"):
        parse_body(b"[" * 10, CompletionRequest)
    assert gc.isenabled()
