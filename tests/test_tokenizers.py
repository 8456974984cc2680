"""Tokenisers: loaded from the files that there are, and never by running what a folder brings."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS
from test_model_folders import refused
from transformers import PreTrainedTokenizerFast

import drex.inputs.tokenizer
from drex.inputs.tokenizer import load_tokenizer

TEXT = "the cat sat"
CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig, PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast): pass
class OwnConfig(LlamaConfig): pass
"""


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tokeniser beside the config of a Llama."""
    tokenizer.save_pretrained(tmp_path)
    CONFIGS["llama"].save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    raw = {**(json.loads(path.read_text()) if path.is_file() else {}), **changes}
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked on standard input; whoever asks is told y."""
    asked: list[str] = []

    def answer(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    return asked


@pytest.mark.parametrize("kind", [None, *CONFIGS])
@pytest.mark.parametrize("named", ["OwnTokenizer", None, "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": [None, "own.Own"]}, ["own.Own", None]], ids=["new", "old"])
def test_code_beside_a_tokeniser_never_runs_and_nobody_is_asked(
    folder: Path,
    questions: list[str],
    caplog: pytest.LogCaptureFixture,
    kind: str | None,
    named: str | None,
    auto_map: Any,
) -> None:
    (folder / "own.py").write_text(CODE)
    (folder / "config.json").unlink()
    if kind is not None:
        CONFIGS[kind].save_pretrained(folder)
    edit(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=named)
    said, found = "", None
    try:
        found = load_tokenizer(folder)
    except ValueError as error:
        said = str(error)
    assert "auto_map" in (said or caplog.text)
    assert "trust_remote_code" not in said
    assert found is None or type(found).__module__.startswith("transformers.")
    assert questions == []
    assert not list(folder.rglob("ran"))


def test_a_tokeniser_that_only_its_own_code_makes_is_refused(folder: Path) -> None:
    (folder / "own.py").write_text(CODE)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]}, tokenizer_class="Own")
    with refused("auto_map", "drex never runs", "tokenizer.json", "--tokenizer"):
        load_tokenizer(folder)


def test_code_beside_a_config_never_runs(folder: Path, questions: list[str]) -> None:
    (folder / "own.py").write_text(CODE)
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    assert load_tokenizer(folder) is not None
    assert questions == []
    assert not list(folder.rglob("ran"))


def test_no_command_asks_to_run_code(folder: Path) -> None:
    """As a user has it: `y` on standard input, which transformers takes for an answer."""
    (folder / "own.py").write_text(CODE)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]}, tokenizer_class="Own")
    words = ["drex", "train", str(folder / "out"), "--text", __file__, "--tokenizer", str(folder)]
    code = f"import sys; sys.argv = {words!r}; from drex.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], input="y\ny\n", capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "drex never runs" in done.stderr
    assert not list(folder.rglob("ran"))


@pytest.fixture
def byte_level(folder: Path) -> Path:
    """A folder with vocab.json and merges.txt instead of tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        *(
            (kind, f"{name}{fast}")
            for kind in CONFIGS
            for name in ("GPT2Tokenizer", "Qwen2Tokenizer")
            for fast in ("", "Fast")
        ),
        ("qwen2", None),
        ("qwen3", None),
    ],
)
def test_a_vocabulary_with_merges_is_a_tokeniser(
    byte_level: Path, tokenizer: PreTrainedTokenizerFast, kind: str, named: str | None
) -> None:
    CONFIGS[kind].save_pretrained(byte_level)
    edit(byte_level / "tokenizer_config.json", tokenizer_class=named, eos_token=tokenizer.eos_token)
    found = load_tokenizer(byte_level)
    assert found is not None
    assert found(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert found.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("named", [None, "LlamaTokenizer"])
def test_a_vocabulary_that_no_class_reads_is_refused(byte_level: Path, named: str | None) -> None:
    edit(byte_level / "tokenizer_config.json", tokenizer_class=named)
    with refused("tokenizer_class", "GPT2Tokenizer"):
        load_tokenizer(byte_level)


def test_half_a_vocabulary(byte_level: Path) -> None:
    (byte_level / "vocab.json").unlink()
    with refused("merges.txt", "no vocab.json", "fetch the model again"):
        load_tokenizer(byte_level)


def test_a_folder_without_a_vocabulary_has_no_tokeniser(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert load_tokenizer(folder) is None


@pytest.mark.parametrize(
    ("content", "installed", "remedy"),
    [
        (b"\x0a\x0e\x0a\x05<unk>", (), "pip install sentencepiece protobuf"),
        (b"\x0a\x0e\x0a\x05<unk>", ("sentencepiece",), "pip install protobuf"),
        (b"IQ== 0\nIg== 1\n", (), "pip install tiktoken"),
    ],
    ids=["SentencePiece", "SentencePiece without protobuf", "tiktoken"],
)
def test_what_reads_a_tokenizer_model_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, installed: tuple[str, ...], remedy: str
) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr(drex.inputs.tokenizer, "_installed", lambda name: name in installed)
    with refused("tokenizer.model", remedy):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", ["{}", '{"model": 5}', "[1]"])
def test_a_tokenizer_json_of_another_form(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with refused("tokeniser", "fetch the model again"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_no_part_of_a_tokeniser(
    folder: Path, tokenizer: PreTrainedTokenizerFast, name: str, encoding: str
) -> None:
    (folder / name).write_text((folder / name).read_text(), encoding=encoding)
    found = load_tokenizer(folder)
    assert found is not None
    assert found.chat_template == tokenizer.chat_template
    assert found(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_a_name_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with refused("is a file", "folder or a hub id"):
        load_tokenizer(tmp_path / "model.gguf")
    with refused("no model at missing", "hub id"):
        load_tokenizer("missing")
