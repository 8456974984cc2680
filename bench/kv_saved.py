"""K/V memory that alias and mask fills save on a model with exits, measured where a request ends.

Text comes from the standard library's documents that the bundled model was not trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from drex import LLM, EarlyExit, RequestOutput, SamplingParams
from drex.control.memory.slots import SlotPool
from drex.tuning.corpus import split_held_out, standard_library

FILLS = ("recompute", "alias", "mask")
HELD_OUT_SHARE = 0.02


def held_out_prompts(llm: LLM, count: int, length: int) -> list[list[int]]:
    """The first `length` tokens of held-out documents that have as many, spread over all of them."""
    assert llm.tokenizer is not None
    _, held_out = split_held_out(standard_library(), HELD_OUT_SHARE)
    # A token is a character at least, and seldom more than 20.
    ids = (llm.inputs.encode(document.text[: 20 * length]) for document in held_out)
    long_enough = [tokens[:length] for tokens in ids if len(tokens) >= length]
    return long_enough[:: max(1, len(long_enough) // count)][:count]


def measure(folder: Path, dtype: str, count: int, prompt: int, output: int) -> list[dict[str, Any]]:
    """One entry a fill, under the checkpoint's own exits and thresholds.

    Every entry has slots held at the end of decoding as a share of full depth: `held` as the pool counts them,
    `expected` from the exit layers of the tokens, and both for decoded tokens alone, the prompts left out.
    """
    found: list[dict[str, Any]] = []
    prompts: list[list[int]] = []
    for fill in FILLS:
        llm = LLM(
            folder,
            dtype=dtype,
            early_exit=EarlyExit(kv_fill=fill),
            max_model_len=prompt + output,
            max_num_seqs=count,
            profile="nominal",
        )
        prompts = prompts or held_out_prompts(llm, count, prompt)
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        with _held_at_the_end(llm.engine.scheduler.pool) as held:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        assert len(held) == len(prompts)
        assert not llm.engine.scheduler.report().preemptions
        found.append(_entry(fill, llm, outputs, sum(held)))
    return found


@contextmanager
def _held_at_the_end(pool: SlotPool) -> Iterator[list[int]]:
    """Slots that each request gives back when it ends: the fall of `pool.in_use`."""
    held: list[int] = []
    close = pool.close

    def noted(seat: int) -> None:
        before = pool.in_use
        close(seat)
        held.append(before - pool.in_use)

    with mock.patch.object(pool, "close", noted):
        yield held


def _entry(fill: str, llm: LLM, outputs: list[RequestOutput], held: int) -> dict[str, Any]:
    layers = llm.model.decoder.spec.num_layers
    prompt_slots = sum(len(output.prompt_token_ids) for output in outputs) * layers
    # The first token comes from the prompt's last row, and the last token is never run.
    later = [output.outputs[0].tokens[1:] for output in outputs]
    decode_slots = sum(map(len, later)) * layers
    executed = sum(token.exit_layer for tokens in later for token in tokens)
    stats = llm.exit_stats(outputs)
    expected = decode_slots if fill == "recompute" else executed
    return {
        "fill": fill,
        "requests": len(outputs),
        "mean_depth": stats.mean_depth,
        "layers": layers,
        "thresholds": list(llm.model.exits.rule.thresholds),
        "held": held / (prompt_slots + decode_slots),
        "expected": (prompt_slots + expected) / (prompt_slots + decode_slots),
        "held_decode": (held - prompt_slots) / decode_slots,
        "expected_decode": expected / decode_slots,
        "agrees": held == prompt_slots + executed if fill != "recompute" else held <= prompt_slots + decode_slots,
    }
