"""The bundled model: small, loads everywhere, and exits as its documentation says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from drex import LLM, EarlyExit, SamplingParams
from drex.compute.load import find_model
from drex.config.early_exit_json import EXIT_WEIGHTS_FILE
from drex.tuning.corpus import split_held_out, standard_library
from drex.tuning.evaluate import evaluate, held_out_blocks

PROMPTS = ["def __init__(self, name):\n", "import os\nimport sys\n\n", "class Test(unittest.TestCase):\n    def test_"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32")


def test_it_fits_in_the_package() -> None:
    files = [path for path in find_model(None).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20


def test_it_exits_early_often_and_loses_little(llm: LLM) -> None:
    documents = split_held_out(standard_library(), 0.02)[1]
    if len(documents) < 10:
        pytest.skip("this Python came without the sources of its standard library")
    blocks = held_out_blocks(llm, documents, 12_000)
    threshold = llm.model.exits.rule.thresholds[0]
    assert threshold is not None
    (_, shipped) = evaluate(llm, blocks, [threshold])
    # 43 % on all held-out files of the library it was trained on; other Pythons come with fewer files.
    assert shipped.exit_share >= 0.35
    assert shipped.loss_ratio <= 1.02


def test_full_depth_is_what_transformers_generates(llm: LLM) -> None:
    plain = AutoModelForCausalLM.from_pretrained(find_model(None), dtype=torch.float32)
    for output in llm.generate(
        PROMPTS, SamplingParams(temperature=0.0, max_tokens=40, early_exit=EarlyExit.off()), use_tqdm=False
    ):
        prompt = list(output.prompt_token_ids)
        wanted = plain.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0)
        assert output.outputs[0].token_ids == wanted[0, len(prompt) :].tolist()[: len(output.outputs[0].token_ids)]


def test_served_early_exit_is_what_score_says_of_the_same_text() -> None:
    llm = LLM(dtype="float64", early_exit=EarlyExit(kv_fill="recompute"))
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    for output in llm.generate(PROMPTS[:2], params, use_tqdm=False):
        sample, prompt = output.outputs[0], output.prompt_token_ids
        scored = llm.score([*prompt, *sample.token_ids], early_exit=EarlyExit())[0]
        # A request's first token never exits; a scored text has no such token.
        assert scored.exit_layers[len(prompt) :] == [token.exit_layer for token in sample.tokens[1:]]
        wanted = [token.logprob for token in sample.tokens[1:]]
        assert scored.logprobs[len(prompt) :] == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("fill", ["alias", "mask"])
def test_alias_and_mask_save_slots(fill: str) -> None:
    llm = LLM(dtype="float32", early_exit=EarlyExit(kv_fill=fill), run_ahead="off")
    chunks = llm.stream(PROMPTS, SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True))
    for _ in range(150):
        next(chunks)
    layers = llm.model.decoder.spec.num_layers
    boundaries = (0, *llm.model.exits.layers, layers)
    requests = llm.engine.scheduler.admission.running
    assert len(requests) == len(PROMPTS)
    executed = [boundaries[depth] for request in requests for depth in request.depths]
    # The live row of a request may stand at any boundary.
    assert 0 <= llm.engine.scheduler.pool.in_use - sum(executed) <= layers * len(requests)
    assert sum(executed) < 0.9 * layers * len(executed)
    chunks.close()
    assert llm.engine.scheduler.pool.in_use == 0


def test_assets_hold_nothing_but_the_model() -> None:
    folder = Path(find_model(None))
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert {"config.json", "model.safetensors", "early_exit.json", "tokenizer.json", EXIT_WEIGHTS_FILE} <= names
    assert not names & {"training", "checkpoint.pt"}
