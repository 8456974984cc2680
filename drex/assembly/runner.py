"""Builds what runs passes: a segment runner whose K/V pool is as large as the machine's memory allows."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from drex.compute.device import memory_bytes
from drex.compute.load import LoadedModel, request_length
from drex.compute.segments import GRAPH_FILLS, GRAPH_ROWS, SegmentRunner
from drex.config import EngineConfig, EngineOptions
from drex.errors import SettingError
from drex.profiling.profiler import Profiler

log = logging.getLogger(__name__)
CPU_KV_BYTES = 2**30
GIBIBYTE = 2**30
GPU_SHARE = 0.9


def build_runner(
    model: LoadedModel, config: EngineConfig, kernels: str = "auto", *, enforce_eager: bool = False
) -> SegmentRunner:
    """A runner with room for what the engine is to serve; CUDA graphs are captured.

    Args:
        model: with its weights.
        config: of the engine.
        kernels: see `SegmentRunner`.
        enforce_eager: capture no graphs.

    Raises:
        ValueError: the memory does not suffice.
    """
    layout = model.layout
    fills = min(GRAPH_FILLS, config.fill_rows) if model.exits.kv_fill == "project" else 0
    with out_of_memory_refused(config, model.decoder.device):
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
    return runner


@contextmanager
def out_of_memory_refused(config: EngineConfig, device: torch.device) -> Iterator[None]:
    """Raise ValueError, naming the remedy, where what is made inside finds no memory.

    Args:
        config: of the engine.
        device: that the model is on.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU has no room for K/V of {config.kv_cache_tokens} tokens beside the model ({error}): lower "
            "kv_cache_tokens or gpu_memory_utilization, max_num_seqs or max_num_batched_tokens, or set enforce_eager"
        ) from error
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for a CPU's memory.
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise ValueError(
            f"there is no memory for requests of {config.max_model_len} tokens, {config.max_num_seqs} at a time "
            f"(on {device}): lower max_model_len (--max-model-len), max_num_seqs or kv_cache_tokens"
        ) from error


def fit(asked: EngineOptions, model: LoadedModel) -> EngineConfig:
    """The settings with what was left open as the model and the memory allow.

    Args:
        asked: by the user.
        model: with its weights.

    Raises:
        ValueError: a length that the model does not have, or no room for one request.
    """
    on_gpu = model.decoder.device.type == "cuda"
    length = request_length(model.decoder.spec, asked.max_model_len)
    share = asked.gpu_memory_utilization
    if share is not None and not on_gpu:
        raise SettingError(
            "gpu_memory_utilization", "gpu_memory_utilization: there is no GPU here; use kv_cache_tokens"
        )
    token = (
        model.decoder.embedding.element_size() * model.decoder.spec.kv_values_per_slot * model.decoder.spec.num_layers
    )
    most, tokens = asked.max_num_seqs * length, asked.kv_cache_tokens
    if tokens is None and on_gpu:
        total, taken = _taken(model, asked.resolved(length, max(length, asked.max_num_batched_tokens)), token)
        tokens = tokens_that_fit(share or GPU_SHARE, total, taken, token, length, most)
    elif tokens is None:
        tokens = max(length, min(most, CPU_KV_BYTES // token))
    config = asked.resolved(length, tokens)
    if not on_gpu:
        _check_memory(config, token, model.decoder.weight_bytes, given=asked.kv_cache_tokens is not None)
    return config


def _check_memory(config: EngineConfig, token: int, weights: int, *, given: bool) -> None:
    """Say so where a CPU's K/V pool takes more than is usual.

    Args:
        config: of the engine.
        token: bytes of a token's K/V at all layers.
        weights: bytes of the model's weights.
        given: the user has asked for a pool of this size.

    Raises:
        ValueError: a pool that the machine's memory can't hold beside the weights.
    """
    pool, memory, usual = config.kv_cache_tokens * token, memory_bytes(), max(1, CPU_KV_BYTES // token)
    if pool + weights > memory:
        raise ValueError(
            f"K/V of {config.kv_cache_tokens} tokens takes {pool / GIBIBYTE:.1f} GiB beside weights of "
            f"{weights / GIBIBYTE:.1f} GiB, and there are {memory / GIBIBYTE:.1f} GiB of memory: lower "
            + ("kv_cache_tokens" if given else "max_model_len (--max-model-len)")
            + f"; {usual} tokens take 1 GiB"
        )
    if pool > CPU_KV_BYTES and not given:
        log.warning(
            "K/V memory takes up to %.1f GiB, more than the usual 1 GiB on a CPU, for one request of %d tokens: "
            "with max_model_len (--max-model-len) %d it takes 1 GiB",
            pool / GIBIBYTE,
            config.max_model_len,
            usual,
        )


def _taken(model: LoadedModel, config: EngineConfig, token: int) -> tuple[int, int]:
    """Bytes of a GPU, and those that all but the K/V pool take: the largest pass is tried over the pool of `config`."""
    runner = build_runner(model, config)
    Profiler(runner, config, model.exits.rule, model.exits.kv_fill).try_largest()
    free, total = torch.cuda.mem_get_info(model.decoder.device)
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    return total, total - free - config.kv_cache_tokens * token


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
            f"gpu_memory_utilization {share}: {max(0, room) / GIBIBYTE:.1f} GiB are left for K/V, not enough for one "
            f"request of {length} tokens: raise it, or lower max_model_len"
        )
    return tokens
