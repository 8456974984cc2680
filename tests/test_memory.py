"""How long requests may be, and the memory that they take: what is chosen, what is said of it, and what is refused."""

from __future__ import annotations

import inspect
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import COMMON, make_model
from test_model_folders import config as edit_config
from test_model_folders import refused
from transformers import MistralConfig
from typer.testing import CliRunner

import drex.assembly.runner
import drex.compute.weights
import drex.llm
from drex import EarlyExit
from drex.cli.main import app
from drex.compute.device import memory_bytes
from drex.llm import LLM

TOKEN = 2 * COMMON["num_key_value_heads"] * 16 * COMMON["num_hidden_layers"] * 4
"""Bytes of a token's K/V at all layers, of the Llama of the tests in float32."""
CONTEXT = COMMON["max_position_embeddings"]


# Length of a request


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(MistralConfig(**COMMON, sliding_window=16), tmp_path_factory.mktemp("windowed"))


COMMANDS = {
    "generate": ["x", "--model", "MODEL"],
    "info": ["MODEL"],
    "evaluate": ["MODEL", "--exits", "2", "--text", __file__],
    "advise": ["MODEL", "--exits", "2", "--text", __file__],
    "profile": ["MODEL"],
    "bench": ["MODEL", "--exits", "2", "--thresholds", "0.5"],
    "serve": ["MODEL", "--port", "0"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_a_length_that_the_model_does_not_have(windowed: Path, command: str) -> None:
    words = [str(windowed) if word == "MODEL" else word for word in COMMANDS[command]]
    for length, said in (("17", "looks back 16 tokens"), ("65", "at most 64 tokens"), ("0", "is 0: give")):
        done = CliRunner().invoke(app, [command, *words, "--max-model-len", length])
        assert isinstance(done.exception, ValueError), done.output
        assert said in str(done.exception)


def test_every_command_that_takes_a_model_takes_its_length() -> None:
    taking = set()
    for command in app.registered_commands:
        assert command.callback is not None
        names = inspect.signature(command.callback).parameters
        if "model" in names:
            assert "max_model_len" in names, command.callback.__name__
            taking.add(command.callback.__name__)
    assert taking == set(COMMANDS)


def test_a_window_shorter_than_the_context_is_the_length_and_is_said_once(
    windowed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert LLM(windowed).config.max_model_len == 16
    [said] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "max_model_len is 16" in said
    assert "64 tokens" in said
    caplog.clear()
    assert LLM(windowed, max_model_len=16).config.max_model_len == 16
    assert not caplog.records


def test_info_shows_the_length_of_the_engine(windowed: Path) -> None:
    from drex.cli.info import describe
    from drex.compute.load import inspect_model

    facts = inspect_model(windowed, None, "float32", "cpu")
    for asked, length in ((None, 16), (8, 8)):
        found = describe(facts, asked)
        assert found["max_model_len"] == length
        assert found["kv_bytes_per_request"] == length * found["kv_bytes_per_token"]


# Memory


@pytest.mark.parametrize("exits", [None, EarlyExit(layers=[1, 3], thresholds=0.5)], ids=["plain", "exits"])
@pytest.mark.parametrize("tokens", [CONTEXT, 3 * CONTEXT, 5 * CONTEXT + 7])
def test_the_pool_of_a_cpu_takes_no_more_than_it_may(
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    exits: EarlyExit | None,
    tokens: int,
) -> None:
    bound = tokens * TOKEN
    monkeypatch.setattr(drex.assembly.runner, "CPU_KV_BYTES", bound)
    llm = LLM(models["llama"], early_exit=exits, dtype="float32")
    pool = llm.engine.executor.runner.pool  # type: ignore[attr-defined]
    assert pool.memory.nbytes == llm.config.kv_cache_tokens * TOKEN == bound  # type: ignore[operator]
    assert "K/V memory" not in caplog.text


def test_a_pool_that_one_request_makes_larger_says_how_large_and_why(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(drex.assembly.runner, "CPU_KV_BYTES", 20 * TOKEN)
    monkeypatch.setattr(drex.assembly.runner, "GIBIBYTE", TOKEN)  # so that the message counts in tokens
    assert LLM(models["llama"], dtype="float32").config.kv_cache_tokens == CONTEXT
    assert f"up to {CONTEXT}.0 GiB" in caplog.text
    assert f"one request of {CONTEXT} tokens" in caplog.text
    assert "--max-model-len) 20 it takes" in caplog.text
    caplog.clear()
    assert LLM(models["llama"], dtype="float32", max_model_len=20).config.kv_cache_tokens == 20
    assert LLM(models["llama"], dtype="float32", kv_cache_tokens=50).config.kv_cache_tokens == 50
    assert "K/V memory" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [({}, "max_model_len (--max-model-len)"), ({"kv_cache_tokens": 1000}, "kv_cache_tokens")],
    ids=["context", "pool"],
)
def test_what_the_memory_can_not_hold_is_refused(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], remedy: str
) -> None:
    llm = LLM(models["llama"], dtype="float32", **settings)  # type: ignore[arg-type]
    assert llm.config.kv_cache_tokens is not None
    needed = llm.config.kv_cache_tokens * TOKEN + llm.model.decoder.weight_bytes
    monkeypatch.setattr(drex.assembly.runner, "memory_bytes", lambda: needed)
    LLM(models["llama"], dtype="float32", **settings)  # type: ignore[arg-type]
    monkeypatch.setattr(drex.assembly.runner, "memory_bytes", lambda: needed - 1)
    with refused("GiB of memory", f"lower {remedy}", "tokens take 1 GiB"):
        LLM(models["llama"], dtype="float32", **settings)  # type: ignore[arg-type]


def test_a_context_beyond_all_memory_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    edit_config(max_position_embeddings=2**40)(folder)
    with refused("K/V of 1099511627776 tokens", "--max-model-len"):
        LLM(folder, dtype="float32")
    assert LLM(folder, dtype="float32", max_model_len=64).config.max_model_len == 64


@pytest.mark.parametrize("where", ["drex.assembly.runner.SegmentRunner", "drex.engine.build.Scheduler"])
@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_is_not_given_is_one_line_with_a_remedy(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(where, refuse)
    with refused("no memory for requests of 64 tokens, 64 at a time", "--max-model-len"):
        LLM(models["llama"], dtype="float32")


def test_other_errors_are_no_lack_of_memory(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(drex.assembly.runner, "SegmentRunner", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        LLM(models["llama"], dtype="float32")


def test_weights_that_the_memory_can_not_hold_are_refused(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drex.compute.weights, "memory_bytes", lambda: 1000)
    with refused("the weights take", "in float64", "--dtype"):
        LLM(models["llama"], dtype="float64")


def test_the_memory_of_a_machine_holds_what_is_in_use() -> None:
    assert torch.zeros(10**6).nbytes < memory_bytes() < 2**63
