"""Clients below HTTP: upgrades, endless and slow headers, small chunks, requests sent ahead, bodies that never end."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from server_fixtures import serving, until, url

from drex import LLM
from drex.server.connection import MAX_HEAD_BYTES, MAX_SMALL_CHUNKS
from drex.server.run import Server

SHORT: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
LONG: dict[str, Any] = {**SHORT, "max_tokens": 1000, "n": 4}
"""Takes seconds."""
H2C = (
    "connection: Upgrade, HTTP2-Settings",
    "upgrade: h2c",
    "http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
)
CURL = shutil.which("curl")


def request(body: dict[str, Any], *headers: str) -> bytes:
    """A completion's request, as it goes over the wire."""
    text = json.dumps(body).encode()
    lines = ("POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", *headers)
    return "\r\n".join((*lines, f"content-length: {len(text)}", "", "")).encode() + text


def chunked(*headers: str) -> bytes:
    """The head of a request whose body comes in chunks."""
    lines = ("POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", *headers)
    return "\r\n".join((*lines, "transfer-encoding: chunked", "", "")).encode()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(server.address, timeout=20)


def reply(raw: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the next reply, which must have a Content-Length."""
    file = raw.makefile("rb", buffering=0)  # what comes after it is the next one's
    status = int(file.readline().split()[1])
    headers = {}
    for line in iter(file.readline, b"\r\n"):
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    body = b""
    while len(body) < int(headers["content-length"]):
        piece = file.read(int(headers["content-length"]) - len(body))
        assert piece, "the connection ended in the middle of a reply"
        body += piece
    return status, json.loads(body)


def closed(raw: socket.socket) -> bool:
    """Whether the server ends the connection, now or within the socket's timeout."""
    try:
        return raw.recv(1) == b""
    except ConnectionError:
        return True


def refusal(found: tuple[int, dict[str, Any]]) -> tuple[int, str]:
    """Status and message of an error, which must have OpenAI's form."""
    status, body = found
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status
    return status, body["error"]["message"]


@pytest.fixture
def fresh(make_llm: Callable[..., LLM]) -> Callable[..., Any]:
    """A function settings -> a server of one's own."""
    return lambda **settings: serving(make_llm(max_num_seqs=4), **settings)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], list[Any]]]:
    """A function that gives a field of all lines about requests so far; no line may have a traceback."""
    caplog.set_level(logging.INFO)
    access = "drex.server.access"
    yield lambda name: [line.fields.get(name) for line in caplog.records if line.name == access]
    lines = caplog.get_records("call")
    assert not [line.getMessage() for line in lines if line.levelno >= logging.ERROR and line.name != access]
    assert not [line.exc_text or line.exc_info for line in lines if line.exc_info]


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


# Shutting down


def test_bodies_that_are_still_coming_get_a_503_when_the_server_stops(
    fresh: Callable[..., Any], log: Callable[[str], list[Any]]
) -> None:
    with fresh() as server:
        slow = [connect(server) for _ in range(3)]
        for number, raw in enumerate(slow):
            raw.sendall(request(SHORT)[: -5 * number - 1] if number else chunked() + b"1\r\n{\r\n")
        until(lambda: len(server.serving.bodies) == 3)
        server.stop()
        began = time.monotonic()
        for raw in slow:
            status, said = refusal(reply(raw))
            assert status == 503
            assert "shutting down" in said
            assert closed(raw)
            raw.close()
    assert time.monotonic() - began < 2
    assert log("status") == [503] * 3


def test_to_end_at_once_is_to_tell_everyone(fresh: Callable[..., Any], log: Callable[[str], list[Any]]) -> None:
    with fresh() as server, connect(server) as whole, connect(server) as stream, connect(server) as slow:
        whole.sendall(request(LONG))
        stream.sendall(request({**LONG, "stream": True}))
        slow.sendall(request(SHORT)[:-5])
        until(lambda: server.serving.unfinished == 8)
        server.stop()
        server.stop(at_once=True)
        began = time.monotonic()
        for raw in (whole, slow):
            assert refusal(reply(raw))[0] == 503
        text = stream.makefile("rb").read()
        assert b'"code":503' in text
        assert b"[DONE]" in text
        assert time.monotonic() - began < 2
    assert sorted(log("status")) == [200, 503, 503]


def test_a_client_that_does_not_read_does_not_hold_up_the_end(
    fresh: Callable[..., Any], log: Callable[[str], list[Any]]
) -> None:
    # Megabytes: more than the sockets between them hold.
    asked = {"prompt": [5] * 900, "max_tokens": 4, "ignore_eos": True, "logprobs": 20, "n": 16, "stream": True}
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with fresh(shutdown_timeout=0.5) as server:
            raw.connect(server.address)
            raw.sendall(request({**asked, "echo": True}))
            until(lambda: server.serving.unfinished == 16)
            until(lambda: server.serving.unfinished == 0, 60)
            began = time.monotonic()
        assert time.monotonic() - began < 5
    assert log("status") == [499]
