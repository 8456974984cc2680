"""Servers of tiny random models, in this process, on ports of their own; the official client talks to them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import COMMON, make_model
from transformers import LlamaConfig, PreTrainedTokenizerFast

from drex import LLM, EarlyExit
from drex.server.listening import bind
from drex.server.run import Server
from drex.server.serving import Serving
from drex.server.settings import ServerSettings

EXITS = EarlyExit(layers=[2, 4], thresholds=0.3)
NAME = "tiny"
LENGTH = 1024


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random model with room for long answers, and a tokeniser with a chat template."""
    sizes = {
        **COMMON,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "max_position_embeddings": LENGTH,
    }
    made = make_model(LlamaConfig(**sizes), tmp_path_factory.mktemp("served"), seed=1)
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="session")
def make_llm(folder: Path) -> Callable[..., LLM]:
    """A function settings -> a fresh engine around the model, float32."""
    return lambda **settings: LLM(
        folder, **{"early_exit": EXITS, "dtype": "float32", "kv_cache_tokens": 16 * LENGTH, **settings}
    )


@pytest.fixture(scope="session")
def llm(make_llm: Callable[..., LLM]) -> LLM:
    """The Python API, around the same model as the server's."""
    return make_llm()


@contextlib.contextmanager
def serving(llm: LLM, at: tuple[str, int] = ("127.0.0.1", 0), **settings: Any) -> Iterator[Server]:
    """A running server at an address; stopped, and found idle, at the end."""
    server = Server(Serving(llm, ServerSettings(**{"served_names": (NAME,), **settings})), bind(*at))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield server
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()
    if server.serving.engine.failure is None:
        assert not llm.engine.busy
        llm.engine.scheduler.check_integrity()
        assert llm.engine.scheduler.pool.in_use == 0


def until(holds: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def url(server: Server) -> str:
    host, port = server.address
    return f"http://{host}:{port}"


@pytest.fixture(scope="session")
def server(make_llm: Callable[..., LLM]) -> Iterator[Server]:
    """The server that most tests share."""
    with serving(make_llm(), served_names=(NAME, "alias")) as running:
        yield running


@pytest.fixture(scope="session")
def base(server: Server) -> str:
    """Its address."""
    return url(server)


@pytest.fixture(scope="session")
def client(base: str) -> Iterator[openai.OpenAI]:
    """The official client, which does not try again."""
    with openai.OpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0, timeout=60) as made:
        yield made


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
