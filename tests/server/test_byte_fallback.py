"""A server whose tokenizer falls back to bytes, as Llama 2's and Gemma's do, under tokens that are no text."""

from __future__ import annotations

import httpx
import pytest
from server_fixtures import NAME, serving, url

from drex import LLM, EarlyExit
from drex.testing.byte_fallback import FIRST_BYTE

NEWLINE, FIRST, SECOND = FIRST_BYTE + 0x0A, FIRST_BYTE + 0xF0, FIRST_BYTE + 0x9F
"""A newline, and the two bytes that emoji begin with."""


@pytest.fixture(scope="module")
def base(byte_fallback_model):
    llm = LLM(byte_fallback_model, early_exit=EarlyExit(layers=[2], thresholds=0.1), dtype="float32")
    with serving(llm) as server:
        yield url(server)


def post(base, **body):
    body = {"model": NAME, "prompt": [NEWLINE, FIRST], "max_tokens": 50, "temperature": 1, "seed": 3, **body}
    return httpx.post(f"{base}/v1/completions", json=body, timeout=60)


BYTES = {"logit_bias": {str(token): 100 for token in (NEWLINE, FIRST, SECOND)}}


def test_bytes_that_are_no_text_are_answered_and_the_server_goes_on(base):
    reply = post(base, **BYTES)
    assert reply.status_code == 200
    made = reply.json()
    assert made["usage"]["completion_tokens"] == 50
    assert set(made["choices"][0]["text"]) == {"\n", "\ufffd"}
    assert httpx.get(f"{base}/health").status_code == 200


def test_a_stream_of_them_adds_up_to_the_whole(base):
    whole = post(base, **BYTES).json()["choices"][0]["text"]
    body = {"model": NAME, "prompt": [NEWLINE, FIRST], "max_tokens": 50, "temperature": 1, "seed": 3, **BYTES}
    text = ""
    with httpx.stream("POST", f"{base}/v1/completions", json={**body, "stream": True}, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                text += httpx.Response(200, text=line[6:]).json()["choices"][0]["text"]
    assert text == whole


def test_an_echo_of_them_has_log_probabilities(base, byte_fallback_tokenizer):
    prompt = [NEWLINE, FIRST, SECOND, byte_fallback_tokenizer.convert_tokens_to_ids("a"), NEWLINE]
    reply = post(base, prompt=prompt, echo=True, logprobs=2, max_tokens=4, **BYTES)
    assert reply.status_code == 200
    log = reply.json()["choices"][0]["logprobs"]
    assert len(log["tokens"]) == len(log["token_logprobs"]) == len(log["top_logprobs"]) == 9
    assert reply.json()["choices"][0]["text"].startswith("\n\ufffd\ufffda\n")
