"""Builds what runs passes: a segment runner whose K/V pool is as large as the machine's memory allows."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from drex.compute.load import LoadedModel
from drex.compute.segments import GRAPH_FILLS, GRAPH_ROWS, SegmentRunner
from drex.config import EngineConfig
from drex.tuning.profile import Profiler

CPU_KV_BYTES = 2**30
GPU_SHARE = 0.9


def build_runner(
    model: LoadedModel, config: EngineConfig, kernels: str = "auto", *, enforce_eager: bool = False
) -> SegmentRunner:
    """A runner with room for what the engine is to serve; CUDA graphs are captured.

    Args:
        model: with its weights.
        config: with `max_model_len` and `kv_cache_tokens` resolved.
        kernels: see `SegmentRunner`.
        enforce_eager: capture no graphs.

    Raises:
        ValueError: the GPU's memory does not suffice.
    """
    layout = model.layout
    assert config.kv_cache_tokens is not None
    fills = min(GRAPH_FILLS, config.fill_rows) if model.exits.kv_fill == "project" else 0
    try:
        runner = SegmentRunner(
            model.decoder,
            model.heads,
            layout,
            config.kv_cache_tokens * layout.cells_per_token,
            config.arena_rows if len(layout.lengths) > 1 else 0,
            config.max_num_seqs,
            config.max_model_len,
            kernels,
            None if enforce_eager else (GRAPH_ROWS, fills),
        )
        runner.capture()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU has no room for K/V of {config.kv_cache_tokens} tokens beside the model ({error}): lower "
            "kv_cache_tokens or gpu_memory_utilization, max_num_seqs or max_num_batched_tokens, or set enforce_eager"
        ) from error
    return runner


def fit(asked: EngineConfig, model: LoadedModel, max_model_len: int | None, share: float | None) -> EngineConfig:
    """Replace what was left open by what the model and the memory allow.

    Args:
        asked: `kv_cache_tokens` may be None.
        model: with its weights.
        max_model_len: None is what the checkpoint was made for.
        share: of a GPU's memory that drex may take, all together; None is 0.9.

    Raises:
        ValueError: a length that the model does not have, or no room for one request.
    """
    spec = model.decoder.spec
    length = spec.max_length if max_model_len is None else max_model_len
    if length > spec.max_length:
        raise ValueError(f"max_model_len is {length}: the checkpoint was made for at most {spec.max_length} tokens")
    if spec.sliding_window is not None and spec.sliding_window < length:
        raise ValueError(
            f"the model looks back {spec.sliding_window} tokens only (sliding_window), which drex does not do: "
            f"set max_model_len to at most {spec.sliding_window}"
        )
    config, on_gpu = replace(asked, max_model_len=length), model.decoder.device.type == "cuda"
    if share is not None and asked.kv_cache_tokens is not None:
        raise ValueError("kv_cache_tokens and gpu_memory_utilization: give one of them")
    if share is not None and not on_gpu:
        raise ValueError("gpu_memory_utilization: there is no GPU here; use kv_cache_tokens")
    if config.kv_cache_tokens is not None:
        return config
    token = model.decoder.embedding.element_size() * spec.kv_values_per_slot * spec.num_layers
    most = config.max_num_seqs * length
    if not on_gpu:
        return replace(config, kv_cache_tokens=max(length, min(most, CPU_KV_BYTES // token)))
    total, taken = _taken(model, config, token)
    return replace(config, kv_cache_tokens=tokens_that_fit(share or GPU_SHARE, total, taken, token, length, most))


def _taken(model: LoadedModel, config: EngineConfig, token: int) -> tuple[int, int]:
    """Bytes of a GPU, and those that all but the K/V pool take: the largest pass is tried over a small one."""
    tokens = max(config.max_model_len, config.max_num_batched_tokens)
    trial = replace(config, kv_cache_tokens=tokens)
    runner = build_runner(model, trial)
    Profiler(runner, trial, model.exits.rule, model.exits.kv_fill).try_largest()
    free, total = torch.cuda.mem_get_info(model.decoder.device)
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    return total, total - free - tokens * token


def tokens_that_fit(share: float, total: int, taken: int, token: int, length: int, most: int) -> int:
    """Tokens of K/V that a share of a GPU's memory has room for, at most as many as can be in flight.

    Args:
        share: in (0, 1].
        total, taken: bytes of the GPU, and those that all but the pool take.
        token: bytes of a token's K/V at all layers.
        length: of the longest request.
        most: tokens in flight.

    Raises:
        ValueError: a share out of range, or one that leaves no room for a request.
    """
    if not 0 < share <= 1:
        raise ValueError(f"gpu_memory_utilization is {share}: give a share in (0, 1]")
    room = int(share * total) - taken
    tokens = min(room // token, most)
    if tokens < length:
        raise ValueError(
            f"gpu_memory_utilization {share}: {max(0, room) / 2**30:.1f} GiB are left for K/V, not enough for one "
            f"request of {length} tokens: raise it, or lower max_model_len"
        )
    return tokens
