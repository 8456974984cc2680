"""`generation_config.json`: its sampling settings are the defaults of requests that name none, and are said."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fixtures import EXITS, serving, url

from drex import LLM, SamplingParams
from drex.inputs.generation_config import read_generation_defaults

RECOMMENDED = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.05}
Make = Callable[..., LLM]


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Make:
    """A function (what generation_config.json holds beside its end token, settings) -> an engine."""

    def made(content: dict[str, Any] | None, **settings: Any) -> LLM:
        target = tmp_path / "model"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
        (target / "generation_config.json").unlink(missing_ok=True)
        if content is not None:
            (target / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **content}))
        return LLM(target, early_exit=EXITS, dtype="float32", kv_cache_tokens=4096, **settings)

    return made


def outputs(llm: LLM, params: SamplingParams | None) -> list[int]:
    """The tokens after a prompt, with seed 3 where there is a seed."""
    assert params is None or params.seed == 3
    return llm.generate([5, 6, 7], params)[0].outputs[0].token_ids


def test_they_are_the_default_of_python_and_no_more_than_that(make: Make) -> None:
    llm = make({**RECOMMENDED, "max_new_tokens": 9, "do_sample": True})
    assert llm.get_default_sampling_params() == SamplingParams(**RECOMMENDED, max_tokens=9)
    greedy = make({"temperature": 0.0, "max_new_tokens": 7, "repetition_penalty": 1.9})
    params = SamplingParams(temperature=0, max_tokens=7, repetition_penalty=1.9, seed=3)
    assert outputs(greedy, None) == outputs(greedy, params) != outputs(greedy, SamplingParams(temperature=0, seed=3))
    assert [token.id for chunk in greedy.stream([5, 6, 7]) for token in chunk.tokens] == outputs(greedy, params)
    turn = [{"role": "user", "content": "the cat"}]
    assert greedy.chat(turn)[0].outputs[0].token_ids == greedy.chat(turn, params)[0].outputs[0].token_ids
    # Settings that are given stand as they are.
    assert outputs(greedy, SamplingParams(seed=3)) == outputs(make(None), SamplingParams(seed=3))


@pytest.mark.parametrize("content", [None, {}, {"temperature": None, "do_sample": False, "max_length": 20}])
def test_without_recommendations_the_defaults_are_drex_s_own(make: Make, content: dict[str, Any] | None) -> None:
    llm = make(content)
    assert llm.get_default_sampling_params() == SamplingParams()
    assert llm.generation_defaults.describe() == ""


@pytest.mark.parametrize("choice", ["none", "vllm"])
def test_none_leaves_them_out(make: Make, choice: str) -> None:
    assert make(RECOMMENDED, generation_config=choice).get_default_sampling_params() == SamplingParams()


def test_a_folder_has_the_last_word(make: Make, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text(json.dumps({"top_k": 3, "eos_token_id": [8, 9, 10**6]}))
    llm = make(RECOMMENDED, generation_config=other)
    assert llm.get_default_sampling_params() == SamplingParams(top_k=3)
    assert llm.inputs.eos_token_ids == {8, 9}
    assert make(RECOMMENDED).inputs.eos_token_ids == {0}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"temperature": "hot"}, ["generation_config.json: temperature is 'hot'", "in [0, 2]", "none"]),
        ({"top_p": 1.5}, ["top_p is 1.5", "(0, 1]", "generation_config to none"]),
        ({"max_new_tokens": 0}, ["max_new_tokens is 0", "from 1 on"]),
        ({"top_k": True}, ["top_k is True"]),
    ],
)
def test_values_out_of_range_are_one_line_with_the_remedy(make: Make, content: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match="generation_config") as caught:
        make(content)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    assert make(content, generation_config="none").get_default_sampling_params() == SamplingParams()


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    for choice in (tmp_path, "nowhere", "Auto"):
        with pytest.raises(
            ValueError, match=r"there is no generation_config.json; name a folder that has one, or auto"
        ):
            read_generation_defaults(choice, tmp_path)


def test_they_are_said_at_the_start_and_so_is_what_is_not_applied(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    content = {**RECOMMENDED, "no_repeat_ngram_size": 3, "typical_p": 1.0, "num_beams": 1, "bad_words_ids": []}
    with caplog.at_level(logging.INFO, "drex"):
        make(content)
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    [(_, applied)] = [one for one in said if one[0] == "INFO"]
    [(_, left_out)] = [one for one in said if one[0] == "WARNING"]
    assert (
        "temperature 0.6, top_p 0.9, top_k 20, min_p 0.01, repetition_penalty 1.05; generation_config none" in applied
    )
    assert left_out.endswith("not applied, since drex does not have it: no_repeat_ngram_size")


def test_the_server_fills_in_what_a_request_leaves_open(make: Make) -> None:
    llm = make({"temperature": 0.0, "repetition_penalty": 1.9, "max_new_tokens": 21})
    asked = [("/v1/completions", {"prompt": [5, 6, 7]}, 16), ("/v1/chat/completions", {"messages": [
        {"role": "user", "content": "the cat"}]}, 21)]  # fmt: skip
    with serving(llm) as running:
        for path, body, length in asked:

            def reply(path: str = path, body: Any = body, **more: Any) -> Any:
                said = {"ignore_eos": True, "return_exit_layers": True, **body, **more}
                found = httpx.post(f"{url(running)}{path}", json=said, timeout=30)
                assert found.status_code == 200, found.text
                return [token["id"] for token in found.json()["choices"][0]["tokens"]]

            assert len(reply()) == length
            assert reply() == reply(temperature=0, repetition_penalty=1.9) == reply(temperature=None)
            assert reply() != reply(repetition_penalty=1.0)
            assert len(reply(max_tokens=30)) == 30
            assert reply(temperature=2, seed=1) != reply(temperature=2, seed=2)


def test_drex_generate_takes_them_unless_an_option_says_otherwise(make: Make, tmp_path: Path) -> None:
    make({"temperature": 1.5, "repetition_penalty": 1.9, "max_new_tokens": 3})
    model = str(tmp_path / "model")

    def generated(*options: str) -> tuple[list[int], str]:
        command = [str(Path(sys.executable).with_name("drex")), "generate", "the cat", "--model", model, "--json"]
        done = subprocess.run([*command, "--max-tokens", "12", "--ignore-eos", *options],
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [token["id"] for token in json.loads(done.stdout)["tokens"]], done.stderr

    drawn, said = generated("--seed", "3")
    again, _ = generated("--seed", "4")
    assert drawn != again
    assert len(drawn) == 12
    assert "requests that don't say otherwise get temperature 1.5, repetition_penalty 1.9;" in said
    greedy, said = generated("--temperature", "0", "--repetition-penalty", "1")
    own, quiet = generated("--generation-config", "none")
    assert greedy == own
    assert "don't say otherwise" not in said + quiet


# End tokens


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [(None, ..., {0}), (None, None, {0}), (None, [], {0}), (7, ..., {7}), (None, 8, {8}), (7, [8, 9], {8, 9})],
)
def test_end_tokens_are_the_tokeniser_s_where_neither_config_names_one(
    folder: Path, tmp_path: Path, in_config: Any, in_generation: Any, expected: set[int]
) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "eos_token_id": in_config}))
    (model / "generation_config.json").unlink(missing_ok=True)
    if in_generation is not ...:
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation}))
    llm = LLM(model, early_exit=EXITS, dtype="float32", kv_cache_tokens=2048)
    assert llm.tokenizer is not None
    assert llm.tokenizer.eos_token_id == 0
    assert llm.inputs.eos_token_ids == expected
    end = min(expected)
    done = llm.generate([5], SamplingParams(max_tokens=4, logit_bias={end: 100.0}))[0].outputs[0]
    assert (done.token_ids, done.finish_reason) == ([end], "stop")
