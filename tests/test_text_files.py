"""Files of text are read alike wherever they come in: byte-order marks are no text, and only a newline ends a line."""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from drex.cli.generate import _read_jobs
from drex.comparison.simulate import read_confidences, read_depths
from drex.compute.load import BUNDLED, find_model, inspect_model
from drex.config.early_exit_json import EARLY_EXIT_FILE
from drex.control.cost.profile import nominal
from drex.load_test.open_loop import read_texts
from drex.profiling.profile_file import load_profile
from drex.server.settings import read_keys
from drex.sim.workload import read_trace
from drex.text_files import read_json_lines, read_lines, read_text
from drex.tuning.corpus import read_documents
from drex.tuning.plot import plot_losses

MARKS = {"utf-8": "utf-8-sig", "utf-16": "utf-16"}
"""Encodings that put a byte-order mark before the text."""
PROMPT = "one\u2028two\u2029three\u0085four"
"""With all characters at which `str.splitlines` splits and that JSON need not escape."""


def json_line(**values: object) -> str:
    return json.dumps(values, ensure_ascii=False)


LINES = json_line(prompt=PROMPT) + "\r\n\n"


@pytest.fixture(params=MARKS)
def write(request: pytest.FixtureRequest, tmp_path: Path):  # type: ignore[no-untyped-def]
    """A function (name, text) -> the path of a file that holds the text after a byte-order mark."""

    def make(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode(MARKS[request.param]))
        return path

    return make


def test_json_lines_end_at_newlines_only(tmp_path: Path) -> None:
    assert len(PROMPT.splitlines()) == 4
    (tmp_path / "x.jsonl").write_text(LINES + LINES, encoding="utf-8", newline="")
    assert read_json_lines(tmp_path / "x.jsonl") == [{"prompt": PROMPT}] * 2
    assert [number for number, _ in read_lines(tmp_path / "x.jsonl")] == [1, 3]


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    for bad in ("{", "[" * 100_000):
        (tmp_path / "x.jsonl").write_text(f"1\n\n{bad}\n")
        with pytest.raises(ValueError, match="line 3 is not JSON"):
            read_json_lines(tmp_path / "x.jsonl")


def test_prompts_with_marks_and_odd_line_ends(write) -> None:  # type: ignore[no-untyped-def]
    path = write("p.jsonl", LINES)
    assert [job.prompt for job in _read_jobs(None, None, path)] == [PROMPT]
    assert read_texts(path) == [PROMPT]
    text = write("p.txt", "def f():\r\n    return\u2028 1\n")
    assert read_text(text) == "def f():\n    return\u2028 1\n"
    assert [job.prompt for job in _read_jobs(None, text, None)] == ["def f():\n    return\u2028 1\n"]


def test_documents_with_marks_and_odd_line_ends(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    lines = LINES.replace('"prompt"', '"text"')
    path = write("d.jsonl", lines)
    packed = tmp_path / "e.jsonl.xz"
    packed.write_bytes(lzma.compress(path.read_bytes()))
    text = write("t.txt", "plain\n")
    assert [document.text for document in read_documents([path, packed, text])] == [PROMPT, PROMPT, "plain\n"]
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged archive"):
        read_documents([packed])


def test_recorded_runs_with_marks(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    depths = write("depths.jsonl", json_line(text=PROMPT, tokens=[{"exit_layer": 2}, {"exit_layer": 4}]) + "\n")
    assert read_depths(depths, [2, 4]) == [[1, 2]]
    found = read_confidences(write("c.jsonl", json_line(confidences=[[0.5]], right=[[1]]) + "\n\n"), 1)
    assert found._confidences.tolist() == [[0.5]]
    for name, text in (
        ("t.jsonl", '{"input_length": 3, "output_length": 2}\n'),
        ("t.csv", "input_length,output_length\n3,2"),
    ):
        assert [(job.prompt, job.output) for job in read_trace(write(name, text))] == [(3, 2)]
    profile = nominal((2, 4))
    assert load_profile(write("profile.json", json.dumps(profile.to_dict()))) == profile
    log = write("log.jsonl", '{"tokens": 1, "loss": 2.0, "step": 1}\n')
    plot_losses(log, tmp_path / "loss.png")


def test_key_files_with_marks(write) -> None:  # type: ignore[no-untyped-def]
    assert read_keys((), write("keys", "first\r\n# a comment\nsecond\n")) == ("first", "second")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", EARLY_EXIT_FILE])
@pytest.mark.parametrize("encoding", MARKS.values())
def test_files_of_a_model_with_marks(tmp_path: Path, name: str, encoding: str) -> None:
    folder = shutil.copytree(find_model(None), tmp_path / "model")
    path = folder / name
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    plain = inspect_model(None, None, "float32", "cpu")
    marked = inspect_model(folder, None, "float32", "cpu")
    assert plain.folder.name == BUNDLED
    assert (marked.exits, marked.spec.eos_token_ids) == (plain.exits, plain.spec.eos_token_ids)


def test_standard_input_with_a_mark_is_the_text_alone(tmp_path: Path) -> None:
    code = "from drex.cli.generate import _read_jobs; print(ascii(_read_jobs(None, None, None)[0].prompt))"
    told = {"input": "text\u00e9".encode("utf-8-sig"), "env": {**os.environ, "LC_ALL": "C"}, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, **told)  # type: ignore[call-overload]
    assert done.stdout.decode().strip() == ascii("text\u00e9")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000], ids=["list", "object"])
def test_json_nested_without_end_is_one_line(tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(find_model(None), tmp_path / "model")
    for name in (EARLY_EXIT_FILE, "generation_config.json", "config.json"):
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match="not readable as JSON"):
            inspect_model(folder, None, "float32", "cpu")
    path = tmp_path / "x.jsonl"
    path.write_text(content + "\n")
    assert ["line 1: expected an object" in (job.error or "") for job in _read_jobs(None, None, path)] == [True]
    for read in (read_documents, read_texts, load_profile, read_trace):
        with pytest.raises(ValueError, match=r"x\.jsonl"):
            read([path] if read is read_documents else path)  # type: ignore[operator]
