"""Keys, limits, disconnects, failures and draining: every request gets an answer, and what is abandoned is freed."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from server_fixtures import NAME, serving, until, url
from starlette.routing import Mount

from drex import LLM
from drex.server.app import create_app
from drex.server.middleware import guarded
from drex.server.monitor import MAX_WATCHERS
from drex.server.run import Server
from drex.server.serving import Serving
from drex.server.settings import ServerSettings, read_keys

LONG: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 1000, "ignore_eos": True}
"""Takes seconds."""


def post(address: str, **how: Any) -> httpx.Response:
    """A request that may take its time."""
    return httpx.post(address, **how, timeout=60)


def head(length: int) -> bytes:
    """Of a request, for clients that misbehave below HTTP."""
    lines = (
        b"POST /v1/completions HTTP/1.1",
        b"host: x",
        b"content-type: application/json",
        b"content-length: %d" % length,
    )
    return b"\r\n".join(lines) + b"\r\n\r\n"


# Keys


@pytest.fixture(scope="module")
def locked(make_llm: Callable[..., LLM]) -> Iterator[str]:
    with serving(make_llm(), api_keys=("first", "second-ü")) as server:
        yield url(server)


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": "first"}, {"authorization": "Basic first"},
     {"authorization": "Bearer"}, {"authorization": "Bearer firs"}, {"x-api-key": "first"}],
)  # fmt: skip
def test_without_a_key_guarded_paths_are_closed(locked: str, headers: dict[str, str]) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        reply = post(f"{locked}{path}", json={"prompt": "x"}, headers=headers)
        assert reply.status_code == 401
        assert reply.json()["error"]["type"] == "authentication_error"
        assert reply.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{locked}/v1/models", headers=headers).status_code == 401


def test_with_any_of_the_keys_they_are_open(locked: str) -> None:
    for key in ("first", "second-ü"):
        headers = {b"authorization": f"bearer {key}".encode()}
        assert httpx.get(f"{locked}/v1/models", headers=headers).status_code == 200
    with openai.OpenAI(base_url=f"{locked}/v1", api_key="first", max_retries=0) as client:
        assert client.completions.create(model=NAME, prompt="x", max_tokens=1).choices
    with (
        openai.OpenAI(base_url=f"{locked}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_health_and_metrics_stay_open(locked: str) -> None:
    for path in ("/health", "/metrics", "/version", "/"):
        assert httpx.get(f"{locked}{path}").status_code == 200


def test_whatever_runs_the_model_is_guarded(llm: LLM) -> None:
    app = create_app(Serving(llm, ServerSettings((NAME,))))
    paths = {path for path, operations in app.openapi()["paths"].items() if "post" in operations}
    assert paths
    assert all(guarded(path) for path in paths)
    assert not any(isinstance(route, Mount) and guarded(route.path) for route in app.routes)


def test_keys_come_from_options_a_file_and_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\ntwo\n")
    monkeypatch.setenv("DREX_API_KEY", "three, one")
    assert read_keys(["zero"], file) == ("zero", "one", "two", "three")
    monkeypatch.setenv("DREX_API_KEY", "")
    with pytest.raises(ValueError, match="empty"):
        read_keys([], None)
    monkeypatch.delenv("DREX_API_KEY")
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="no keys"):
        read_keys([], file)
    with pytest.raises(ValueError, match="can't be read"):
        read_keys([], tmp_path / "missing")


# Limits


def test_with_a_full_queue_clients_are_told_to_come_again(fresh: Callable[..., Any]) -> None:
    with fresh(max_queue=2) as server:
        address, replies = url(server), []

        def ask() -> None:
            replies.append(post(f"{address}/v1/completions", json={**LONG, "max_tokens": 250}))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: server.serving.unfinished == 6)
        refused = post(f"{address}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        for thread in threads:
            thread.join()
        assert [reply.status_code for reply in replies] == [200] * 6
        assert post(f"{address}/v1/completions", json={"prompt": "x"}).status_code == 200
        never = post(f"{address}/v1/completions", json={"prompt": ["x"] * 7})
        assert never.status_code == 400
        assert "at most 6" in never.json()["error"]["message"]


def test_requests_and_bodies_have_their_time(fresh: Callable[..., Any]) -> None:
    with fresh(request_timeout=0.3, body_timeout=0.3) as server:
        address = url(server)
        late = post(f"{address}/v1/completions", json=LONG)
        assert late.status_code == 504
        assert "0.3 s" in late.json()["error"]["message"]
        text = post(f"{address}/v1/completions", json={**LONG, "stream": True}).text
        *_, error, done = [line for line in text.splitlines() if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == 504
        assert done == "data: [DONE]"
        until(lambda: server.serving.unfinished == 0)
        with socket.create_connection(server.address, timeout=10) as slow:
            slow.sendall(head(9) + b"{")
            assert b" 408 " in slow.recv(4096)
        assert httpx.get(f"{address}/health").status_code == 200


# Clients that go


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_what_it_held_at_once(server: Server, stream: bool) -> None:
    body = json.dumps({**LONG, "n": 3, "stream": stream}).encode()
    aborted = _metric(url(server), 'request_success_total{finished_reason="abort"')
    with socket.create_connection(server.address) as raw:
        raw.sendall(head(len(body)) + body)
        until(lambda: server.serving.llm.engine.scheduler.admission.running)
        # As after kill -9: what was not read makes the kernel reset the connection.
    began = time.monotonic()
    until(lambda: server.serving.unfinished == 0)
    until(lambda: server.serving.llm.engine.scheduler.pool.in_use == 0)
    assert time.monotonic() - began < 1
    until(lambda: _metric(url(server), 'request_success_total{finished_reason="abort"') == aborted + 3)


def test_a_client_that_does_not_read_holds_up_nobody(server: Server, client: openai.OpenAI) -> None:
    asked = {**LONG, "max_tokens": 300, "n": 4, "stream": True, "return_exit_layers": True, "logprobs": 5}
    body = json.dumps(asked).encode()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(server.address)
        raw.sendall(head(len(body)) + body)
        until(lambda: server.serving.unfinished == 4)
        assert client.completions.create(model=NAME, prompt="x", max_tokens=4).choices
        until(lambda: server.serving.unfinished == 0, 60)
        assert server.serving.llm.engine.scheduler.pool.in_use == 0


def test_a_client_that_never_reads_is_cut_off(fresh: Callable[..., Any]) -> None:
    with fresh(body_timeout=0.5) as server, socket.socket() as raw:
        # Megabytes at once: more than the sockets between them hold.
        asked = {"prompt": [5] * 900, "max_tokens": 4, "echo": True, "logprobs": 20, "n": 16, "stream": True}
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(server.address)
        body = json.dumps(asked).encode()
        raw.sendall(head(len(body)) + body)
        until(lambda: server.serving.unfinished == 16)
        until(lambda: not server.server_state.connections, 60)
        assert server.serving.unfinished == 0
        assert b"[DONE]" not in raw.recv(4096)


# Failures


def test_a_pass_that_fails_is_an_error_for_those_in_it_and_nobody_else(
    fresh: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh() as server:
        runner = server.serving.llm.engine.executor.runner
        whole = runner.start

        def failing(batch: Any) -> Any:
            if 13 in batch.tokens:
                raise MemoryError("no memory")
            return whole(batch)

        monkeypatch.setattr(runner, "start", failing)
        bad = {"prompt": [13, 5], "max_tokens": 5}
        reply = post(f"{url(server)}/v1/completions", json=bad)
        assert reply.status_code == 500
        assert "no memory" in reply.json()["error"]["message"]
        text = post(f"{url(server)}/v1/completions", json={**bad, "stream": True}).text
        assert json.loads(text.splitlines()[0].removeprefix("data: "))["error"]["code"] == 500
        good = {"prompt": [5, 6], "logit_bias": {"13": -100}}
        assert post(f"{url(server)}/v1/completions", json=good).status_code == 200


def test_if_the_engine_dies_everyone_hears_of_it_and_the_server_ends(
    fresh: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh() as server:
        address, replies = url(server), {}
        bodies = {"whole": LONG, "stream": {**LONG, "stream": True}, "waits": {**LONG, "n": 8}}
        threads = [
            threading.Thread(target=lambda name: replies.update(
                {name: post(f"{address}/v1/completions", json=bodies[name])}), args=(name,))
            for name in bodies
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        until(lambda: server.serving.unfinished == 10)

        def broken(*_: Any) -> Any:
            raise AssertionError("an invariant does not hold")

        monkeypatch.setattr(server.serving.llm.engine.scheduler, "next", broken)
        for thread in threads:
            thread.join(30)
        assert replies["whole"].status_code == replies["waits"].status_code == 503
        assert '"code":503' in replies["stream"].text.splitlines()[-4]
        assert isinstance(server.serving.engine.failure, AssertionError)
        until(lambda: server.should_exit)


def test_a_handler_that_fails_is_a_500_that_tells_nothing(
    fresh: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh() as server:
        monkeypatch.setattr(server.serving, "check_model", lambda name: 1 / 0)
        reply = post(f"{url(server)}/v1/completions", json={"prompt": "x"})
        assert reply.status_code == 500
        assert "ZeroDivision" not in reply.text
        assert reply.json()["error"]["type"] == "server_error"


# Shutting down


def test_draining_finishes_what_is_open_and_lets_nothing_in(fresh: Callable[..., Any]) -> None:
    with fresh() as server:
        address, replies = url(server), []
        ask = threading.Thread(
            target=lambda: replies.append(post(f"{address}/v1/completions", json={**LONG, "max_tokens": 400}))
        )
        with httpx.Client() as other:
            assert other.get(f"{address}/health").status_code == 200
            ask.start()
            until(lambda: server.serving.unfinished)
            server.stop()
            for path in ("/health", "/v1/completions"):
                reply = other.get(f"{address}{path}") if path == "/health" else other.post(
                    f"{address}{path}", json={"prompt": "x"})  # fmt: skip
                assert reply.status_code == 503
                assert "retry-after" in reply.headers
        ask.join()
        assert replies[0].json()["usage"]["completion_tokens"] == 400


def test_what_is_not_finished_in_time_ends_with_an_error(fresh: Callable[..., Any]) -> None:
    with fresh(shutdown_timeout=0.2) as server:
        address, replies = url(server), []
        asked = {**LONG, "n": 8}
        ask = threading.Thread(target=lambda: replies.append(post(f"{address}/v1/completions", json=asked)))
        ask.start()
        until(lambda: server.serving.unfinished == 8)
        server.stop()
        ask.join(10)
        assert replies[0].status_code == 503


# What operators see


def test_request_ids_are_the_clients_if_they_are_sensible(base: str) -> None:
    for given, kept in (("abc-1.2_3", True), ("x" * 129, False), ("a b", False), ("", False)):
        reply = post(f"{base}/v1/completions", json={"prompt": "x"}, headers={"x-request-id": given})
        assert (reply.headers["x-request-id"] == given) == kept
        assert reply.json()["id"] == "cmpl-" + reply.headers["x-request-id"]


def test_as_many_may_watch_as_there_is_room_for(server: Server) -> None:
    with httpx.Client(base_url=url(server), limits=httpx.Limits(max_connections=100)) as watcher:
        streams = [watcher.send(watcher.build_request("GET", "/live"), stream=True) for _ in range(MAX_WATCHERS)]
        events = [stream.iter_lines() for stream in streams]
        for lines in events:
            assert next(lines).startswith("data: {")
        assert _watch(url(server)) == 429
        for stream in streams:
            stream.close()
    until(lambda: _watch(url(server)) == 200)


def _watch(address: str) -> int:
    """The status of one more watcher, who leaves at once."""
    with httpx.stream("GET", f"{address}/live") as reply:
        return reply.status_code


def _metric(address: str, start: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{start}"))
