"""A server that is told to stop: everyone who waits gets an answer, nobody holds up the end, nothing fails."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

from server_fixtures import until
from wire import LONG, SHORT, chunked, closed, connect, refusal, reply, request


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
