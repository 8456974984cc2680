"""The model with which bench/soak.py and bench/fuzz.py try byte fallback does what byte-level tokenizers never do."""

from __future__ import annotations

from drex import LLM, SamplingParams
from drex.testing.byte_fallback import EXIT_LAYERS, FIRST_BYTE, write_byte_fallback_model


def test_it_writes_single_bytes_exits_early_and_begins_prompts_with_its_own_token(tmp_path):
    write_byte_fallback_model(tmp_path)
    llm = LLM(tmp_path)
    assert llm.check("") == [llm.tokenizer.bos_token_id]
    assert llm.check("é") == [1, *llm.tokenizer.convert_tokens_to_ids(["▁", "é"])]
    assert llm.check("ü")[-2:] == [FIRST_BYTE + byte for byte in "ü".encode()]
    sample = llm.generate("the cat", SamplingParams(seed=0, max_tokens=200, ignore_eos=True))[0].outputs[0]
    assert {*EXIT_LAYERS, 6} == {token.exit_layer for token in sample.tokens}
    assert "\ufffd" in sample.text
    assert sum(FIRST_BYTE <= token < FIRST_BYTE + 256 for token in sample.token_ids) > 50


def test_its_weights_are_the_same_each_time(tmp_path):
    for name in ("one", "other"):
        write_byte_fallback_model(tmp_path / name)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other
