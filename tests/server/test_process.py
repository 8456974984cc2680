"""`drex serve` as an operator runs it: a process, its signals, its logs, and clients that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import openai
import pytest
from server_fixtures import NAME, until

from drex import LLM, SamplingParams
from drex.cli.serve import serve
from drex.server.listening import bound, listen
from drex.server.run import serve as run
from drex.server.settings import ServerSettings

DREX = str(Path(sys.executable).with_name("drex"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
ENVIRONMENT.pop("DREX_API_KEY", None)
COMMON_OPTIONS = ("--dtype", "float32", "--profile", "nominal")
OPTIONS = ("--exits", "2,4", "--thresholds", "0.3", "--kv-cache-tokens", "16384")


@contextlib.contextmanager
def process(port: int, *arguments: str, log: IO[Any]) -> Iterator[subprocess.Popen[Any]]:
    """A server of its own process that is ready; killed at the end if it still runs."""
    command = [DREX, "serve", *arguments, "--port", str(port), *COMMON_OPTIONS]
    running = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        until(lambda: _answers(running, port), 120)
        yield running
    finally:
        running.kill()
        running.wait()


def _answers(running: subprocess.Popen[Any], port: int) -> bool:
    assert running.poll() is None, "the server ended before it answered"
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_sigterm_under_load_finishes_what_is_open_and_exits_with_0(folder: Path, tmp_path: Path) -> None:
    port, path = free_port(), tmp_path / "log"
    with path.open("w") as log, process(port, str(folder), *OPTIONS, "--log-format", "json", log=log) as running:
        address = f"http://127.0.0.1:{port}"
        prompt, replies = "the cat sat on a secret", []

        def ask(stream: bool) -> None:
            body = {"prompt": prompt, "max_tokens": 200, "ignore_eos": True, "temperature": 0, "stream": stream}
            replies.append(httpx.post(f"{address}/v1/completions", json=body, timeout=60).text)

        threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: " 6.0" in _line(address, "vllm:num_requests_running"))
        began = time.monotonic()
        running.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert running.wait(30) == 0
        assert time.monotonic() - began < 25
        assert len(replies) == 6
        assert all('"finish_reason":"length"' in reply for reply in replies)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    finished = [line for line in lines if line.get("path") == "/v1/completions"]
    assert len(finished) == 6
    for line in finished:
        assert line["status"] == 200
        assert line["completion_tokens"] == 200
        assert line["ttft_ms"] > 0
        assert re.fullmatch("[0-9a-f]{24}", line["request_id"])
    assert "secret" not in path.read_text()


def test_clients_that_are_killed_a_full_disk_and_a_second_signal(folder: Path) -> None:
    port = free_port()
    with Path("/dev/full").open("w") as log, process(port, str(folder), *OPTIONS, log=log) as running:
        address = f"http://127.0.0.1:{port}"
        code = (
            "import httpx, sys\n"
            "body = {'prompt': 'x', 'max_tokens': 1000, 'n': 4, 'ignore_eos': True, 'stream': True}\n"
            f"with httpx.stream('POST', '{address}/v1/completions', json=body) as reply:\n"
            "    for line in reply.iter_lines(): print(line, flush=True)\n"
        )
        client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert client.stdout is not None
        assert client.stdout.readline().startswith("data: ")
        client.send_signal(signal.SIGKILL)
        client.wait()
        until(lambda: " 0.0" in _line(address, "vllm:num_requests_running"), 5)
        assert " 0.0" in _line(address, 'drex_kv_slots{model_name="[^"]*",state="in_use"')
        asked = {"prompt": "x", "max_tokens": 1000, "n": 4, "ignore_eos": True}
        replies: list[httpx.Response] = []
        ask = threading.Thread(target=lambda: replies.append(httpx.post(f"{address}/v1/completions", json=asked)))
        ask.start()
        until(lambda: " 4.0" in _line(address, "vllm:num_requests_running"))
        running.send_signal(signal.SIGINT)
        time.sleep(0.3)
        running.send_signal(signal.SIGINT)
        assert running.wait(10) == 0
        ask.join(10)


def test_a_log_that_nobody_reads_holds_up_neither_requests_nor_the_end(folder: Path) -> None:
    port = free_port()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, b"x" * 4096):
            pass
    os.set_blocking(writing, True)
    with os.fdopen(reading), os.fdopen(writing, "w") as log, process(port, str(folder), *OPTIONS, log=log) as running:
        body = {"prompt": "x", "max_tokens": 2}
        assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=20).status_code == 200
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0


def _line(address: str, pattern: str) -> str:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return next(line for line in lines if re.match(pattern, line))


def test_the_bundled_model_is_served_and_its_tokens_are_pythons(tmp_path: Path) -> None:
    port = free_port()
    messages: Any = [{"role": "user", "content": "import os"}]
    asked: dict[str, Any] = {"seed": 3, "temperature": 0.7, "max_tokens": 24}
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
    with (tmp_path / "log").open("w") as log, process(port, log=log), client:
        name = client.models.list().data[0].id
        extra = {"return_exit_layers": True}
        found = client.chat.completions.create(model=name, messages=messages, **asked, extra_body=extra)
    expected = LLM(dtype="float32").chat(messages, SamplingParams(**asked))[0].outputs[0]
    assert [token["id"] for token in found.choices[0].tokens] == expected.token_ids
    assert found.choices[0].message.content == expected.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "no/such/folder"}, "no model at"),
        ({"max_queue": -1}, "--max-queue is -1"),
        ({"request_timeout": 0.0}, "--request-timeout is 0"),
        ({"shutdown_timeout": float("nan")}, "--shutdown-timeout is nan"),
        ({"shutdown_timeout": float("inf")}, "--shutdown-timeout is inf"),
        ({"body_timeout": float("inf")}, "--body-timeout is inf"),
        ({"port": 65536}, "--port is 65536"),
        ({"port": -1}, "--port is -1"),
        ({"served_model_name": [""]}, "--served-model-name is empty"),
        ({"api_key": [""]}, "an API key is empty"),
        ({"api_key_file": Path("/nowhere")}, "can't be read"),
        ({"log_format": "xml"}, "choose one of text, json"),
        ({"chat_template": Path("/nowhere"), "model": "no/such/folder"}, "--chat-template /nowhere can't be read"),
        ({"gpu_memory_utilization": 0.9, "device": "cpu"}, "there is no GPU here"),
        ({"gpu_memory_utilization": 0.9, "kv_cache_tokens": 512}, "give one of them"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        serve(**options)


def test_without_its_libraries_it_says_what_to_install() -> None:
    code = (
        "import sys, importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name in ('fastapi', 'uvicorn') else find(name, *rest)\n"
        "sys.argv = ['drex', 'serve']\nfrom drex.cli.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert 'pip install ".[server]" in a clone' in done.stderr


def test_the_engine_and_the_command_line_import_without_the_servers_libraries() -> None:
    names = ["fastapi", "uvicorn", "starlette", "prometheus_client", "pydantic", "uvloop"]
    imported = "drex.llm, drex.cli.main, drex.comparison.policies_in_turn, drex.load_test.open_loop"
    code = f"import sys; sys.modules.update(dict.fromkeys({names})); import {imported}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The address


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody else listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_an_address_that_cannot_be_had_is_refused_before_the_model_is_loaded(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("drex.llm.LLM", loaded)
    with pytest.raises(ValueError, match=f"--port {taken} is in use at 127.0.0.1: .*give another port"):
        serve(port=taken)
    with pytest.raises(ValueError, match=f"--port {taken} is in use at localhost"):
        serve(host="localhost", port=taken)
    # An address for documentation, which no machine has; and what can't be a name.
    with pytest.raises(ValueError, match=r"--host 192\.0\.2\.1 is not this machine's: give 127\.0\.0\.1"):
        serve(host="192.0.2.1", port=0)
    for host in ("a..b", "x" * 64, "1.2.3.4.5.6", "::1::"):
        with pytest.raises(ValueError, match=r"--host .* is not known"):
            serve(host=host, port=0)


def test_a_taken_port_is_one_line_and_exit_code_2(taken: int) -> None:
    command = [DREX, "serve", "--port", str(taken)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr.startswith(f"drex: --port {taken} is in use")
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_of_two_servers_that_load_at_once_the_second_hears_of_it(llm: LLM) -> None:
    with bound("127.0.0.1", 0) as first:
        port = first[0].getsockname()[1]
        with bound("127.0.0.1", port) as second:
            with pytest.raises(ConnectionRefusedError):  # a server that loads is not one that serves
                socket.create_connection(("127.0.0.1", port), timeout=5)
            listen(first)
            with pytest.raises(ValueError, match=f"--port {port} is in use"):
                run(llm, ServerSettings((NAME,)), second)


def test_a_name_with_several_addresses_is_served_at_one_port() -> None:
    with bound("localhost", 0) as sockets:
        assert len({one.getsockname()[1] for one in sockets}) == 1
        listen(sockets)
        for one in sockets:
            socket.create_connection(one.getsockname()[:2], timeout=5).close()
        port = sockets[0].getsockname()[1]
    with bound("localhost", port):  # given back
        pass
