"""A tokenizer like Llama 2's, and a tiny random model beside it, to try what byte-level tokenizers never do.

A byte that no other token covers is a token of its own, so that output may hold any bytes in any order; prompts begin
with a token of the tokenizer's own; and decoding drops the first space.
"""

from __future__ import annotations

from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from drex.config.early_exit_json import EarlyExitFile, ExitSpec, write_early_exit

SPECIAL = ("<unk>", "<s>", "</s>")
FIRST_BYTE = len(SPECIAL)
"""The token of byte 0; the tokens of the other bytes follow it."""
WORDS = ("▁the", "▁cat", "▁sat", "▁def", "▁return", "▁self", "▁日本")
"""With the mark of the space before them; all that they begin with are tokens too."""
SINGLES = ("a", "b", "e", "!", "é", ".", ",", "(", ")")
EXIT_LAYERS, THRESHOLD = (2, 4), 0.1
CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": SPECIAL.index("<s>"),
    "eos_token_id": SPECIAL.index("</s>"),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_fallback_tokenizer(prefix: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, and a token for each byte of all other text.

    Args:
        prefix: put `<s>` and a space before a prompt, as Llama 2's does. Without it the tokens of two texts joined are
            those of each, one after the other.
    """
    begun = [list(accumulate(word)) for word in WORDS]
    characters = [*SINGLES, *"".join(WORDS)]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *chain.from_iterable(begun)]
    merges = [(before, after[-1]) for each in begun for before, after in pairwise(each)]
    backend = Tokenizer(
        models.BPE(
            {name: number for number, name in enumerate(dict.fromkeys(names))},
            list(dict.fromkeys(merges)),
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    mark = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), mark]) if prefix else mark
    if prefix:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT_TEMPLATE
    return made


def write_byte_fallback_model(folder: Path) -> None:
    """Write a random Llama with two exits and a byte-fallback tokenizer to a folder: the same weights each time."""
    tokenizer = byte_fallback_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG, vocab_size=len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    exits = tuple(ExitSpec(layer) for layer in EXIT_LAYERS)
    write_early_exit(folder, EarlyExitFile(exits, thresholds=(THRESHOLD,) * len(exits)))
