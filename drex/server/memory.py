"""How many tokens' K/V fit on a GPU beside the weights."""

from __future__ import annotations

import torch

from drex.compute.load import ModelFacts
from drex.compute.weights import TensorFiles

SPARE_BYTES = 2**30
"""For the arena, activations and the allocator."""


def kv_tokens(found: ModelFacts, share: float, max_num_seqs: int, max_model_len: int | None) -> int:
    """Tokens of K/V that fit into a share of the GPU's memory, at most as many as can be in flight.

    Args:
        found: the model, not loaded yet.
        share: of all memory of the device that drex may use, in (0, 1].
        max_num_seqs, max_model_len: of the engine.

    Raises:
        ValueError: no GPU, a share out of range, or one that has no room for a request.
    """
    if found.device.type != "cuda":
        raise ValueError("--gpu-memory-utilization: there is no GPU here; use --kv-cache-tokens")
    free, total = torch.cuda.mem_get_info(found.device)
    weights = TensorFiles(found.folder).numel() * found.dtype.itemsize
    length = max_model_len or found.spec.max_length
    token = found.spec.kv_values_per_slot * found.dtype.itemsize * found.spec.num_layers
    return fitting(share, free, total, weights, token, length, max_num_seqs)


def fitting(share: float, free: int, total: int, weights: int, token: int, length: int, most: int) -> int:
    """The arithmetic of `kv_tokens`; sizes in bytes, `token` those of a token at all layers, `length` of a request.

    Raises:
        ValueError: as `kv_tokens`.
    """
    if not 0 < share <= 1:
        raise ValueError(f"--gpu-memory-utilization is {share}: give a share in (0, 1]")
    room = min(free, round(share * total) - (total - free)) - weights - SPARE_BYTES
    tokens = min(room // token, most * length)
    if tokens < length:
        raise ValueError(
            f"--gpu-memory-utilization {share}: {max(0, room) / 2**30:.1f} GiB are left for K/V, not enough for one "
            f"request of {length} tokens: raise it, or lower --max-model-len"
        )
    return int(tokens)
