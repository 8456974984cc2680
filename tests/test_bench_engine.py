"""What bench/engine.py asks of the engines: prompts from a file, models by their folders, bad options in one line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMON, make_model
from transformers import LlamaConfig, PreTrainedTokenizerFast

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmark, as the script does from its own folder."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [{"id": 1, "prompt": "the cat"}, {"prompt": [7, 5, 9]}, {"prompt": "the dog sat"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_text_of_a_file_is_what_a_user_says(
    scripts: Any, prompts: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    read = scripts("workload").PromptFile.read(prompts, 2, 40)
    tokenizer.save_pretrained(tmp_path)
    chat = read.jobs(tmp_path, 0.1)
    assert [job.prompt for job in chat] == [tokenizer("[user]the cat\n[assistant]")["input_ids"], [7, 5, 9]]
    assert [job.wanted for job in chat] == [4, 4]
    (tmp_path / "chat_template.jinja").unlink()
    plain = read.jobs(tmp_path, 1.0)
    assert [job.prompt for job in plain] == [tokenizer("the cat")["input_ids"], [7, 5, 9]]
    assert [job.wanted for job in plain] == [40, 40]


def test_a_model_without_a_tokenizer_is_asked_token_ids_only(scripts: Any, prompts: Path, tmp_path: Path) -> None:
    workload = scripts("workload")
    with pytest.raises(ValueError, match="has text, and the model no tokenizer"):
        workload.PromptFile.read(prompts, None, 8).jobs(tmp_path, 1.0)
    prompts.write_text('{"prompt": [7, 5, 9]}\n')
    assert workload.PromptFile.read(prompts, None, 8).jobs(tmp_path, 1.0) == [workload.Job([7, 5, 9], 8)]


def test_a_folder_is_a_model_if_its_requests_may_be_long_enough(scripts: Any, text_model: Path, tmp_path: Path) -> None:
    workload = scripts("workload")
    sizes = {**COMMON, "max_position_embeddings": workload.MAX_LENGTH}
    folder = make_model(LlamaConfig(**sizes), tmp_path / "some-model")
    assert workload.prepare(f"{folder}/", tmp_path) == workload.Subject("some-model", "trained model", folder, 97)
    with pytest.raises(ValueError, match="at most 64 tokens"):
        workload.prepare(str(text_model), tmp_path)


def test_options_name_models_and_prompts(scripts: Any, prompts: Path, tmp_path: Path) -> None:
    arguments = scripts("engine").arguments
    options = arguments(["--models", f"tiny,{tmp_path}", "--prompts", str(prompts), "--requests", "2", "--quick"])
    assert options.models == ["tiny", str(tmp_path)]
    assert options.prompts.prompts == ["the cat", [7, 5, 9]]
    assert options.prompts.output_tokens == 64
    assert arguments([]).prompts is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "tiny,nowhere"], "--models: nowhere is not one of bundled, llama-160m, tiny, a folder"),
        (["--dtypes", "int3"], "--dtypes: int3 is not one of float32, bfloat16"),
        (["--requests", "2"], "--requests and --output-tokens go with --prompts"),
        (["--prompts", "nowhere.jsonl"], "--prompts: nowhere.jsonl: expected JSON lines"),
        (["--prompts", "FILE", "--requests", "4"], "has 3 prompts: ask for 1 to 3"),
        (["--prompts", "FILE", "--output-tokens", "0"], "ask for 1 output token at least"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    scripts: Any, prompts: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        scripts("engine").arguments([str(prompts) if word == "FILE" else word for word in words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
