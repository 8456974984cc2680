"""Clients below HTTP: upgrades, endless and slow headers, small chunks, requests sent ahead, bodies that never end."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from server_fixtures import until, url
from wire import H2C, LONG, SHORT, chunked, closed, connect, refusal, reply, request

from drex.server.connection import MAX_HEAD_BYTES, MAX_SMALL_CHUNKS
from drex.server.run import Server

CURL = shutil.which("curl")


# Upgrades


def test_a_client_that_offers_http_2_is_served_with_http_1(server: Server, log: Callable[[str], list[Any]]) -> None:
    with connect(server) as raw:
        for headers in (H2C, ("connection: upgrade", "upgrade: websocket"), ()):
            raw.sendall(request(SHORT, *headers))
            status, found = reply(raw)
            assert status == 200
            assert found["usage"]["completion_tokens"] == 3
    until(lambda: log("status") == [200, 200, 200])


@pytest.mark.skipif(CURL is None, reason="there is no curl here")
def test_curl_that_offers_http_2_is_served(base: str) -> None:
    command = [CURL, "-s", "--http2", "-H", "content-type: application/json", "-d", json.dumps(SHORT)]
    done = subprocess.run([*command, f"{base}/v1/completions"], capture_output=True, timeout=30, check=True)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 3


def test_http_2_itself_is_refused_with_a_reason(server: Server) -> None:
    with connect(server) as raw:
        raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        status, said = refusal(reply(raw))
        assert status == 400
        assert "HTTP/1.1" in said
        assert closed(raw)


# Headers


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nhost: x\r\nx-long: ", b"GET /", b"x", chunked() + b"1;"])
def test_what_has_no_end_is_refused_at_64_kib(server: Server, start: bytes) -> None:
    sent = 0
    with connect(server) as raw:
        raw.sendall(start)
        raw.settimeout(0.001)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            sent += raw.send(b"a" * 8192)
            try:
                if raw.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                assert httpx.get(f"{url(server)}/health").status_code == 200
        assert sent <= MAX_HEAD_BYTES + 8 * 8192
        raw.settimeout(20)
        status, said = refusal(reply(raw))
        assert status == 431
        assert str(MAX_HEAD_BYTES) in said
        assert closed(raw)


@pytest.mark.parametrize("header", [b"x-long: " + b"a" * 70_000, b"\r\n".join([b"a: b"] * 16_000)])
def test_headers_that_come_at_once_have_the_same_limit(server: Server, header: bytes) -> None:
    with connect(server) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + header + b"\r\n\r\n")
        assert refusal(reply(raw))[0] == 431
    with connect(server) as raw:
        raw.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 60_000 + b"\r\n\r\n")
        assert reply(raw)[0] == 200


def test_headers_have_a_deadline(fresh: Callable[..., Any], log: Callable[[str], list[Any]]) -> None:
    with fresh(body_timeout=0.5) as server:
        with connect(server) as fast, connect(server) as slow, connect(server) as silent:
            fast.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\nGET /v1/models")
            assert reply(fast)[0] == 200
            for raw in (slow, fast):
                for _ in range(4):
                    raw.sendall(b"GET" if raw is slow else b"a")
                    time.sleep(0.1)
                status, said = refusal(reply(raw))
                assert status == 408
                assert "0.5 s" in said
                assert closed(raw)
            silent.settimeout(0.2)
            with pytest.raises(TimeoutError):  # who has said nothing yet is not late
                silent.recv(1)
        until(lambda: not server.server_state.connections)
    assert log("status").count(408) == 2


def test_a_malformed_request_is_refused_in_openais_form(server: Server, log: Callable[[str], list[Any]]) -> None:
    broken = [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\na b: c\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        chunked() + b"zz\r\n",
        chunked() + b"1\r\n{\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ]
    for sent in broken:
        with connect(server) as raw:
            raw.sendall(sent)
            assert refusal(reply(raw))[0] == 400, sent
            assert closed(raw)
    until(lambda: log("status").count(400) == len(broken))


# Bodies


def test_a_body_in_a_flood_of_small_chunks_is_refused(server: Server) -> None:
    text = json.dumps({**SHORT, "prompt": "a" * 900}).encode()
    with connect(server) as raw:
        pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in text)
        raw.sendall(chunked() + pieces + b"0\r\n\r\n")
        assert reply(raw)[0] == 200
    with connect(server) as raw:
        raw.sendall(chunked() + b"1\r\na\r\n" * (MAX_SMALL_CHUNKS + 10))
        status, said = refusal(reply(raw))
        assert status == 400
        assert "chunks" in said
        assert closed(raw)


@pytest.mark.parametrize("key", ["", "authorization: Bearer k"])
def test_a_body_that_goes_on_after_its_refusal_is_not_read_for_ever(fresh: Callable[..., Any], key: str) -> None:
    with fresh(body_timeout=0.5, max_body_bytes=1000, api_keys=("k",)) as server, connect(server) as raw:
        raw.sendall(chunked(key or "a: b") + b"800\r\n" + b"a" * 0x800 + b"\r\n")
        assert refusal(reply(raw))[0] == (413 if key else 401)
        end = time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                raw.sendall(b"800\r\n" + b"a" * 0x800 + b"\r\n")
                time.sleep(0.02)
        assert time.monotonic() < end


def test_a_body_that_comes_after_its_refusal_leaves_the_connection_usable(fresh: Callable[..., Any]) -> None:
    with fresh(api_keys=("k",)) as server, connect(server) as raw:
        sent = request({**SHORT, "prompt": "a" * 100_000})
        raw.sendall(sent[:90_000])
        assert refusal(reply(raw))[0] == 401
        raw.sendall(sent[90_000:] + request(SHORT, "authorization: Bearer k"))
        assert reply(raw)[0] == 200


def test_a_client_that_goes_while_it_sends_is_noted_as_gone(server: Server, log: Callable[[str], list[Any]]) -> None:
    with connect(server) as raw:
        raw.sendall(request(SHORT)[:-5])
        time.sleep(0.1)
    until(lambda: log("status") == [499])


# Requests sent ahead


def test_requests_that_are_sent_ahead_are_answered_in_turn(server: Server) -> None:
    with connect(server) as raw:
        raw.sendall(b"".join(request({**SHORT, "max_tokens": tokens}) for tokens in (3, 1, 2)) + request({}))
        for tokens in (3, 1, 2):
            assert reply(raw)[1]["usage"]["completion_tokens"] == tokens
        assert refusal(reply(raw))[0] == 400


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ahead", [request(SHORT), request(SHORT)[:20], request({"prompt": "a" * 300_000}), b"\r\n"],
                         ids=["whole", "part", "large", "blank"])  # fmt: skip
def test_a_client_that_goes_is_noticed_whatever_it_sent_ahead(
    server: Server, log: Callable[[str], list[Any]], stream: bool, ahead: bytes
) -> None:
    for headers in ((), H2C, ("connection: close",)):
        with connect(server) as raw:
            raw.sendall(request({**LONG, "stream": stream}, *headers) + ahead)
            until(lambda: server.serving.llm.engine.scheduler.admission.running)
        began = time.monotonic()
        until(lambda: server.serving.unfinished == 0)
        assert time.monotonic() - began < 1
    until(lambda: log("status") == [499] * 3)


def test_who_sends_ahead_without_end_is_cut_off(fresh: Callable[..., Any], log: Callable[[str], list[Any]]) -> None:
    with fresh(max_body_bytes=100_000) as server, connect(server) as raw:
        raw.sendall(request(LONG))
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 10_000_000:
                raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 100)
                sent += 3200
                time.sleep(0.001)
        assert 100_000 < sent < 10_000_000
        until(lambda: server.serving.unfinished == 0)
        until(lambda: log("status") == [499])
