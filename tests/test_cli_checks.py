"""What commands check before they begin, in this process: a model that would be loaded is a failure."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

import drex.comparison.simulate
import drex.comparison.subject
import drex.llm
import drex.load_test.open_loop
import drex.tuning.train
from drex.cli import advise, bench, evaluate, generate, info, profile, serve, simulate
from drex.cli.common import ThresholdsOption
from drex.cli.main import app
from drex.cli.output import OutputFile


class WorkBeganError(Exception):
    """Something was loaded, trained or simulated."""


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the beginning of any work a failure."""

    def begin(*_: Any, **__: Any) -> None:
        raise WorkBeganError

    monkeypatch.setattr(drex.llm, "load_model", begin)
    monkeypatch.setattr(drex.comparison.subject, "load_model", begin)
    monkeypatch.setattr(drex.comparison.subject, "_random_decoder", begin)
    monkeypatch.setattr(drex.comparison.simulate, "run", begin)
    monkeypatch.setattr(drex.load_test.open_loop, "connect", begin)
    monkeypatch.setattr(drex.tuning.train, "train_tokenizer", begin)


def refusal(*words: str) -> str:
    """The message of a command that is refused."""
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ValueError), (words, done.exception, done.output)
    assert done.stdout == ""
    return str(done.exception)


URL = ("bench", "--url", "http://127.0.0.1:9")
OUTPUTS = {
    "simulate --json": ("simulate", "--json"),
    "simulate --html": ("simulate", "--html"),
    "bench --json": ("bench", "--json"),
    "bench --html": ("bench", "--html"),
    "bench of a shape --html": ("bench", "--shape", "llama-160m", "--html"),
    "bench --url --json": (*URL, "--json"),
    "profile --out": ("profile", "--out"),
    "evaluate --confidences": ("evaluate", "--stdlib", "--confidences"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(command: str, tmp_path: Path) -> None:
    words = OUTPUTS[command]
    for path in (tmp_path / "none" / "out", tmp_path):
        said = refusal(*words, str(path))
        assert f"{words[-1]} {path} can't be written" in said
    out = tmp_path / "out"
    out.write_text("kept")
    assert isinstance(CliRunner().invoke(app, (*words, str(out))).exception, WorkBeganError)
    assert out.read_text() == "kept"
    out.unlink()
    assert isinstance(CliRunner().invoke(app, (*words, str(out))).exception, WorkBeganError)
    assert not out.exists()


def test_every_option_that_names_an_output_is_among_those_tested() -> None:
    modules = (advise, bench, evaluate, generate, info, profile, serve, simulate)
    writing = {module.__name__.rsplit(".", 1)[-1] for module in modules if "OutputFile(" in inspect.getsource(module)}
    assert writing == {command.split()[0] for command in OUTPUTS}
    assert not any(".write_text(" in inspect.getsource(module) for module in modules)


def test_an_output_is_replaced_whole_and_may_be_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.write_text("what was here before")
    for text in ("short\n", "longer than that\n"):
        with OutputFile(out, "--json") as file:
            file.write(text)
        assert out.read_text() == text
    read, write = os.pipe()
    with OutputFile(Path(f"/dev/fd/{write}"), "--json") as file:
        file.write("through a pipe\n")
    os.close(write)
    with open(read) as piped:
        assert piped.read() == "through a pipe\n"
    with OutputFile(Path(os.devnull), "--json") as file:
        file.write("to nobody\n")
    with pytest.raises(ValueError, match="No space left on device"), OutputFile(Path("/dev/full"), "--json") as file:
        file.write("too much")
    said = capsys.readouterr()
    assert said.out == ""
    assert f"wrote {out}" in said.err


NUMBERS = {
    ("advise", "--in-flight", "0"): "--in-flight '0': give whole numbers from 1",
    ("advise", "--in-flight", "8,-1"): "--in-flight '8,-1'",
    ("advise", "--tokens", "0"): "--tokens is 0: give a number from 1",
    ("advise", "--tolerance", "nan"): "--tolerance is nan",
    ("advise", "--sweep", "0.5,-1"): "threshold -1",
    ("evaluate", "--stdlib", "--tokens", "-5"): "--tokens is -5",
    ("evaluate", "--stdlib", "--held-out-share", "2"): "--held-out-share is 2.0: give a share",
    ("evaluate", "--stdlib", "--set-within", "nan"): "--set-within is nan",
    ("evaluate", "--stdlib", "--sweep", "nan"): "threshold nan",
    ("profile", "--max-num-seqs", "0"): "--max-num-seqs is 0",
    ("profile", "--threads", "0"): "--threads is 0",
    ("serve", "--threads", "-1"): "--threads is -1",
    ("serve", "--gpu-memory-utilization", "1.5"): "--gpu-memory-utilization is 1.5",
    ("serve", "--chat-template", "/nowhere.jinja"): "--chat-template /nowhere.jinja can't be read",
    ("bench", "--in-flight", "4,0"): "--in-flight '4,0'",
    ("bench", "--requests", "0"): "--requests is 0",
    ("bench", "--output-tokens", "0"): "--output-tokens is 0",
    ("bench", "--repeats", "0"): "--repeats is 0",
    ("bench", "--rate", "0"): "--rate is 0.0: give a number above 0",
    ("bench", "--tpot-ms", "-1"): "--tpot-ms is -1.0",
    ("bench", "--max-slowdown", "0.5"): "max_slowdown is 0.5",
    ("bench", "--prompts", "/nowhere.jsonl"): "/nowhere.jsonl",
    ("bench", "--trace", "/nowhere.csv"): "can't be read as a trace",
    ("bench", "--shape", "llama-160m", "--exits", "99"): "name layers between 1 and 23",
    ("bench", "--shape", "llama-160m", "--exit-rates", "2"): "give a share in [0, 1)",
    ("bench", "--shape", "llama-160m", "--dtype", "int3"): "dtype 'int3': choose one of",
    ("bench", "--shape", "llama-160m", "--kv-fill", "guess"): "kv_fill 'guess': choose one of",
    ("bench", "--shape", "llama-160m", "--thresholds", "0.5"): "--thresholds goes without --shape",
    (*URL, "--rate", "nan"): "--rate is nan",
    (*URL, "--requests", "0"): "--requests is 0",
    (*URL, "--goodput", "ttft:0"): "--goodput 'ttft:0'",
    ("simulate", "--in-flight", "8,0"): "--in-flight '8,0'",
    ("simulate", "--requests", "0"): "--requests is 0",
    ("simulate", "--prompt-tokens", "0"): "--prompt-tokens is 0",
    ("simulate", "--rate", "0"): "--rate is 0.0",
    ("simulate", "--rate", "inf"): "--rate is inf",
    ("simulate", "--acceptance", "1.5"): "--acceptance is 1.5: give a share",
    ("simulate", "--policies", "drex,best"): "policy 'best': choose one of",
    ("simulate", "--kv-fill", "guess"): "--kv-fill 'guess': choose one of",
    ("simulate", "--trace-speed", "0"): "--trace-speed is 0.0",
    ("simulate", "--max-slowdown", "nan"): "max_slowdown is nan",
    ("train", "OUT", "--stdlib", "--tokens", "10"): "at least one batch",
    ("train", "OUT", "--stdlib", "--vocab-size", "3"): "--vocab-size is 3: give a number from 257",
    ("train", "OUT", "--stdlib", "--micro-batch-tokens", "0"): "micro_batch_tokens is 0",
    ("train", "OUT", "--stdlib", "--adam-lr", "inf"): "adam_lr is inf",
    ("train", "OUT", "--stdlib", "--device", "abacus"): "device 'abacus'",
    ("train", "OUT", "--stdlib", "--tokenizer", "/nowhere"): "/nowhere",
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("words", "said"), NUMBERS.items(), ids=[" ".join(words) for words in NUMBERS])
def test_numbers_and_files_are_checked_before_the_work(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert said in refusal(*(str(out) if word == "OUT" else word for word in words))
    assert not out.exists()


@pytest.mark.usefixtures("no_work")
def test_text_for_training_is_read_before_its_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"no text": 1}\n')
    for text in (tmp_path / "t.jsonl", tmp_path / "nowhere"):
        assert str(text) in refusal("train", str(tmp_path / "model"), "--text", str(text))
    assert not (tmp_path / "model").exists()


def test_thresholds_mean_the_same_in_every_command_that_has_them() -> None:
    having = []
    for command in (advise, bench, evaluate, generate, info, profile, serve, simulate):
        name = command.__name__.rsplit(".", 1)[-1]
        annotations = inspect.get_annotations(getattr(command, name), eval_str=True)
        if "thresholds" in annotations:
            assert annotations["thresholds"] == ThresholdsOption, name
            having.append(name)
    assert having == ["advise", "bench", "evaluate", "generate", "info", "profile", "serve", "simulate"]
    assert get_args(ThresholdsOption)[1].help == "Confidence at which a token exits: one number, or one an exit."


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", [("evaluate", "--stdlib"), ("advise",), ("generate", "x"), ("info",)])
def test_as_many_thresholds_as_exits_are_one_setting_and_others_are_refused(command: tuple[str, ...]) -> None:
    """The bundled model has two exit points."""
    for good in ("0.5", "0.5,0.7"):
        begun = CliRunner().invoke(app, (*command, "--thresholds", good))
        assert isinstance(begun.exception, WorkBeganError) or begun.exit_code == 0, begun.exception
    said = refusal(*command, "--thresholds", "0.3,0.5,0.7,0.9")
    assert "give one number, or one for each of 2 exits" in said
    assert ("to compare several, --sweep" in said) == (command[0] in ("evaluate", "advise"))


@pytest.mark.usefixtures("no_work")
def test_a_setting_and_a_sweep_exclude_each_other() -> None:
    for command in (("evaluate", "--stdlib"), ("advise",)):
        assert "give one of them" in refusal(*command, "--thresholds", "0.5", "--sweep", "0.5,0.7")


def test_the_version_is_one_line_on_standard_output() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stderr) == (0, "")
    name, version = done.stdout.split()
    assert name == "drex"
    assert version[0].isdigit()


def test_standard_output_holds_nothing_but_the_result(text_model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the cat sat on the mat; the dog sat on the log. " * 60)
    words = ("evaluate", str(text_model), "--text", str(tmp_path / "t.txt"), "--exits", "2,4", "--tokens", "128")
    confidences = tmp_path / "c.jsonl"
    done = CliRunner().invoke(app, (*words, "--thresholds", "0.3,0.6", "--json", "--confidences", str(confidences)))
    assert done.exit_code == 0, done.exception
    assert [row["threshold"] for row in json.loads(done.stdout)] == [None, [0.3, 0.6]]
    assert f"wrote {confidences}" in done.stderr
    assert len(json.loads(confidences.read_text().splitlines()[0])["confidences"]) == 2
