"""The model that `drex train` trains: a Hugging Face Llama with exit heads, and how it is written as a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from drex.compute.heads import ExitHead
from drex.config.early_exit_json import EXIT_WEIGHTS_FILE, EarlyExitFile, ExitSpec, write_early_exit
from drex.tuning.recipe import TrainConfig

UNCALIBRATED_THRESHOLD = 0.9


class EarlyExitModel(nn.Module):
    """A Hugging Face Llama with exit heads, for training."""

    def __init__(self, config: TrainConfig, vocab_size: int, eos_token_id: int) -> None:
        super().__init__()
        self.exits = config.exits
        self.hf = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                max_position_embeddings=config.sequence_length,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=eos_token_id,
                use_cache=False,
            )
        )
        eps = self.hf.config.rms_norm_eps
        self.heads = nn.ModuleList(
            ExitHead(config.exit_head, config.hidden_size, config.intermediate_size, vocab_size, eps)
            for _ in config.exits
        )
        for head in self.heads:
            assert isinstance(head, ExitHead)
            head.start_from(self.hf.model.norm.weight, self.hf.lm_head.weight)

    def losses(self, blocks: Tensor, exits: Sequence[int]) -> list[Tensor]:
        """Mean cross-entropy in nats a token at the given exits (indices), then at the end. blocks: (batch, n + 1)."""
        inputs, targets = blocks[:, :-1], blocks[:, 1:].reshape(-1)
        model = self.hf.model
        hidden = model.embed_tokens(inputs)
        positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
        rotary = model.rotary_emb(hidden, positions)
        out: list[Tensor] = []
        wanted = {self.exits[i]: i for i in exits}
        for count, layer in enumerate(model.layers, 1):
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            if count in wanted:
                head = self.heads[wanted[count]]
                logits = head(hidden, model.norm, self.hf.lm_head.weight)
                out.append(F.cross_entropy(logits.flatten(0, 1).float(), targets))
        logits = self.hf.lm_head(model.norm(hidden))
        out.append(F.cross_entropy(logits.flatten(0, 1).float(), targets))
        return out


def write_checkpoint(model: EarlyExitModel, out: Path, head: str) -> None:
    """Write the model as a Hugging Face folder in bfloat16, with the exit heads' weights and `early_exit.json`.

    Args:
        model: cast to bfloat16 in place.
        out: folder to write to.
        head: kind of the exit heads.
    """
    model.to(torch.bfloat16)
    model.hf.config.use_cache = True
    model.hf.save_pretrained(out)
    weights = {
        f"exits.{layer}.{name}": tensor.to(torch.bfloat16).contiguous()
        for layer, exit_head in zip(model.exits, model.heads, strict=True)
        for name, tensor in exit_head.state_dict().items()
    }
    if weights:
        (out / EXIT_WEIGHTS_FILE).parent.mkdir(exist_ok=True)
        save_file(weights, out / EXIT_WEIGHTS_FILE)
    exits = tuple(ExitSpec(layer, head, EXIT_WEIGHTS_FILE if weights else None) for layer in model.exits)
    thresholds = (UNCALIBRATED_THRESHOLD,) * len(exits)
    write_early_exit(out, EarlyExitFile(exits=exits, criterion="max_prob", thresholds=thresholds))
