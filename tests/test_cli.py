"""The real binary with the bundled model, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CONFIGS, make_model

DREX = str(Path(sys.executable).with_name("drex"))
SETTINGS = {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def drex(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **SETTINGS}
    return subprocess.run([DREX, *arguments], input=text, capture_output=True, text=True, timeout=240, env=environment)


def test_many_prompts_as_json_one_bad_among_them(tmp_path: Path) -> None:
    prompts = ["def add(a, b):\n    return", [5, 6, 7], "", "import os\nimport sys\n\n\n"]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "id": 1}) + "\n" for p in prompts) + "nonsense\n"
    )
    done = drex("generate", "--jsonl", str(tmp_path / "p.jsonl"), "--max-tokens", "24", "--json", "--ignore-eos")
    assert done.returncode == 2, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prompt"] for line in lines[:4]] == prompts
    assert "empty" in lines[2]["error"]
    assert "line 5" in lines[4]["error"]
    for line in (lines[0], lines[1], lines[3]):
        usage, tokens = line["usage"], line["tokens"]
        assert line["finish_reason"] == "length"
        assert usage["completion_tokens"] == len(tokens) == 24
        assert set(tokens[0]) == {"id", "text", "logprob", "exit_layer", "confidence"}
        assert line["text"] == "".join(token["text"] for token in tokens)
        assert sum(usage["exits"].values()) == 24
        assert usage["mean_depth"] == pytest.approx(sum(t["exit_layer"] for t in tokens) / 24)
        assert usage["involuntary_exits"] == usage["involuntary_stays"] == 0
        assert usage["tokens_per_s"] > 0
        assert all(token["logprob"] <= 0 and 0 <= token["confidence"] <= 1 for token in tokens)


def test_text_from_standard_input_is_plain_when_piped_and_ends_with_a_summary() -> None:
    done = drex("generate", "--max-tokens", "16", "--seed", "1", "--temperature", "0.5", text="def main():\n    ")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "\x1b" not in done.stdout
    assert "tokens/s, mean depth" in done.stderr
    assert "involuntary exits 0" in done.stderr


def test_info_shows_segments_and_memory() -> None:
    facts = json.loads(drex("info", "--json").stdout)
    assert [segment["layers"] for segment in facts["segments"]] == [[1, 4], [5, 8], [9, 12]]
    assert facts["kv_bytes_per_token"] == sum(segment["kv_bytes_per_token"] for segment in facts["segments"])
    assert "K/V" in drex("info").stdout


def test_train_evaluate_and_generate_with_ones_own_model(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"number {i} and " + "one two three four five six seven " * 60)
    sizes = "--hidden-size 32 --intermediate-size 64 --num-layers 3 --num-heads 2 --num-kv-heads 1 --exits 1,2"
    recipe = "--sequence-length 32 --tokens 4096 --batch-tokens 512 --micro-batch-tokens 256 --vocab-size 300"
    out = str(tmp_path / "model")
    trained = drex("train", out, "--text", str(tmp_path / "text"), *sizes.split(), *recipe.split())
    assert trained.returncode == 0, trained.stderr
    assert set(json.loads(trained.stdout)["held_out_loss"]) == {"exit_1", "exit_2", "final"}
    measured = drex(
        "evaluate", out, "--text", str(tmp_path / "text"), "--tokens", "600", "--sweep", "0,1", "--json",
        "--set-within", "100",
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    assert [row["threshold"] for row in json.loads(measured.stdout)] == [None, 0.0, 1.0]
    made = drex("generate", "one two three", "--model", out, "--json", "--max-tokens", "5", "--ignore-eos")
    assert json.loads(made.stdout)["usage"]["exits"] == {"3": 1, "1": 4}


def test_ctrl_c_saves_a_training_run_and_says_how_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for i in range(40):
        (tmp_path / "t" / f"{i}.txt").write_text(f"number {i} and " + "one two three four five six seven " * 60)
    sizes = "--hidden-size 32 --intermediate-size 64 --num-layers 3 --num-heads 2 --num-kv-heads 1 --exits 1,2"
    recipe = "--sequence-length 32 --batch-tokens 256 --micro-batch-tokens 256 --vocab-size 300 --tokens 1000000000"
    out = tmp_path / "model"
    words = [DREX, "train", str(out), "--text", str(tmp_path / "t"), *sizes.split(), *recipe.split()]
    log = out / "training" / "log.jsonl"
    steps = []
    for more in ([], ["--resume"]):
        environment = {**os.environ, **SETTINGS}
        started = subprocess.Popen(
            [*words, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        try:
            before, end = steps[-1] if steps else 0, time.monotonic() + 120
            while not (log.is_file() and log.read_text().count("\n") >= before + 3):
                assert started.poll() is None, started.communicate()
                assert time.monotonic() < end
                time.sleep(0.05)
            started.send_signal(signal.SIGINT)
            stdout, stderr = started.communicate(timeout=60)
        finally:
            started.kill()
        assert (started.returncode, stdout) == (130, "")
        said = re.search(
            r"drex: stopped after step (\d+) of \d+, saved: go on with the same command and --resume", stderr
        )
        assert said, stderr
        assert "Traceback" not in stderr
        steps.append(int(said[1]))
        assert log.read_text().count("\n") == steps[-1]
    assert steps[0] < steps[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--model", "no/such/folder"], "no model at"),
        (["generate", "x", "--thresholds", "abc"], "separated by commas"),
        (["generate", "x", "--exits", "99", "--thresholds", "0.5"], "exits lie in 1..11"),
        (["generate", "x", "--temperature", "nan"], "temperature"),
        (["generate", "x", "--file", "y"], "one of them"),
        (["generate", "--file", "missing.txt"], "cannot read"),
        (["generate", "x", "--policy", "fastest"], "choose one of"),
        (["train", "/proc/nowhere/model", "--stdlib"], "cannot write"),
        (["evaluate"], "--text"),
        (["generate", "x", "--unknown"], "No such option"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = drex(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_corrupt_model_is_one_clear_line(tmp_path: Path) -> None:
    folder = make_model(CONFIGS["llama"], tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"not weights")
    done = drex("generate", "x", "--model", str(folder))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "corrupt" in done.stderr
