"""Kernels on a GPU: parity with the reference, decoding against the roofline, what an exit check costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from drex.assembly.runner import build_runner
from drex.comparison.subject import Subject, synthetic
from drex.compute.attention.torch_ref import TorchAttention
from drex.compute.decoder import Decoder
from drex.compute.indices import Room, count_tiles, fill_in
from drex.compute.kernels.attention import Partial, Tiles, attend, rows_per_tile
from drex.compute.kv import KVPool, KVTables
from drex.config import DEFAULTS, EngineConfig
from drex.control.memory.slots import SlotLayout
from drex.control.plan import Contexts, Entries, Evaluations, Pass, Rows
from drex.profiling.profiler import Profiler
from drex.sim.shapes import SHAPES

CONTEXT = 256
LENGTHS = (1, 7, 64, 513, 2048, 8192, 32768)
SHORT = ("llama-3.2-1b", "llama-3-8b")
REPEATS = 15


def seconds(action: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median wall time, the device waited for; the first two runs don't count."""
    times = []
    for turn in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        action()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(times))


def bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return float(2 * source.numel() / seconds(lambda: target.copy_(source)))


def parity(long: bool) -> list[dict[str, Any]]:
    """Attention kernel against the torch reference in float64: random tables, aliased entries, lengths 1 to 32k."""
    rows = []
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)):
        for heads, kv_heads, head_dim in ((32, 8, 128), (40, 40, 128), (32, 8, 64)):
            for size in (1, 5):
                worst = max(_attention_error(dtype, heads, kv_heads, head_dim, size, splits) for splits in (1, 8))
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "heads": f"{heads}/{kv_heads} x {head_dim}",
                        "rows a span": size,
                        "relative error": worst,
                        "limit": limit,
                        "holds": worst <= limit,
                    }
                )
    return rows


def _attention_error(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, size: int, splits: int) -> float:
    rng, device = np.random.default_rng(size), torch.device("cuda")
    lengths = np.array([max(length, size) for length in LENGTHS])
    layout, cells = SlotLayout((2,)), int(lengths.sum()) + 64
    spec: Any = type("Spec", (), {"num_kv_heads": kv_heads, "head_dim": head_dim})
    pools = [KVPool(spec, layout, cells, device, kind) for kind in (dtype, torch.float64)]
    for memory, exact in zip((pools[0].keys, pools[0].values), (pools[1].keys, pools[1].values), strict=True):
        memory.normal_()
        exact.copy_(memory)
    tables = KVTables(layout, len(lengths), int(lengths.max()), device)
    seats = np.repeat(np.arange(len(lengths)), lengths)
    numbers = np.concatenate([np.arange(length) for length in lengths])
    aliased = rng.random(len(seats)) < 0.2
    own = rng.permutation(cells)[: len(seats)]
    told = Entries(seats, numbers, np.where(aliased, own + cells, own)[None], aliased)
    tables.hear(0, told)
    visible = np.concatenate([np.arange(length - size, length) + 1 for length in lengths])
    in_run = np.zeros(len(lengths), dtype=np.bool_)
    batch = _pass(lengths, size, visible, Contexts(np.arange(len(lengths)), lengths, in_run, lengths[None] * 0, told))
    queries = torch.randn(len(visible), heads, head_dim, device=device).to(dtype)
    expected = TorchAttention(pools[1], tables, batch, heads, kv_heads).forward(0, 1, queries.double())
    most = rows_per_tile(heads, kv_heads, 16)
    room = Room(len(visible), 0, count_tiles(batch.sizes, most), 1, 0)
    vector = torch.zeros(room.size, dtype=torch.int32)
    fill_in(vector.numpy(), room, batch, most)
    field = room.views(vector.to(device))
    names = ("tile_first", "tile_rows", "tile_seats", "tile_in_run", "tile_starts", "visible")
    out = torch.empty(len(visible), heads * head_dim, device=device, dtype=dtype)
    partial = Partial.empty(len(visible), heads, splits, head_dim, device) if splits > 1 else None
    pool, on = pools[0], Tiles(*(field[name] for name in names))
    table, marks = tables.cells[0][0], tables.aliased[0]
    attend(queries, pool.keys, pool.values, 1, 0, table, marks, on, most, splits, partial, out)
    return float((out.double() - expected).abs().max() / expected.abs().max())


def _pass(lengths: Any, size: int, visible: Any, context: Contexts) -> Pass:
    none, rows = np.zeros(0, np.int64), len(visible)
    full = Rows(visible - 1, np.zeros(rows, np.int64), np.zeros((1, rows), np.int64))
    asked = Evaluations(none, none, none.astype(np.float64), [], np.zeros((2, 0), np.int64), {}, {})
    sizes, tokens = np.full(len(lengths), size), np.zeros(rows, np.int64)
    fill = Rows(none, none, np.zeros((1, 0), np.int64))
    return Pass(0, 0, lengths - size, lengths, sizes, full, visible, tokens, fill, context, asked)


def decode(long: bool) -> list[dict[str, Any]]:
    """Full-depth decoding against the roofline and against the matrix products timed alone, in whole passes."""
    out, copied = [], bandwidth()
    for name in SHAPES if long else SHORT:
        if name == "llama-160m":
            continue
        counts = (1, 32, 128, 256)
        subject, config = _subject(name, max(counts))
        plain = subject.without_exits()
        runner = build_runner(plain, config)
        profiler = Profiler(runner, config, plain.exits.rule, plain.exits.kv_fill)
        decoder = plain.decoder
        spec = decoder.spec
        size = decoder.embedding.element_size()
        lookups = 0 if spec.tied else decoder.embedding.numel() * size
        for count in counts:
            step = statistics.median(profiler.time_pass(profiler.decode_pass(0, count, CONTEXT, count)) for _ in "123")
            entries = count * CONTEXT * spec.num_layers * spec.kv_values_per_slot * size
            roofline = (decoder.weight_bytes - lookups + entries) / copied
            products = _products(decoder, count)
            bound = max(roofline, products)
            out.append(
                {
                    "shape": name,
                    "in flight": count,
                    "ms a step": step * 1e3,
                    "tokens/s": count / step,
                    "roofline ms": roofline * 1e3,
                    "products ms": products * 1e3,
                    "of roofline": roofline / step,
                    "of max(roofline, products)": bound / step,
                    "copy TB/s": copied / 1e12,
                }
            )
    return out


def _products(decoder: Decoder, rows: int) -> float:
    """All matrix products of a step, alone."""
    spec, layers = decoder.spec, decoder.layers
    like = decoder.embedding
    hidden, attended, gated = (
        like.new_zeros(rows, width)
        for width in (spec.hidden_size, spec.num_heads * spec.head_dim, spec.intermediate_size)
    )

    def run() -> None:
        for layer in layers:
            layer.qkv(hidden)
            layer.out(attended)
            layer.gate_up(hidden)
            layer.down(gated)
        decoder.lm_head(hidden)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return seconds(graph.replay)


def exit_checks(long: bool) -> list[dict[str, Any]]:
    """What a check takes beyond the head's matrix product: norm, reductions, copy to the host, verdicts."""
    out = []
    for name in SHAPES if long else SHORT:
        if name == "llama-160m":
            continue
        counts = (1, 32, 256)
        subject, config = _subject(name, max(counts))
        model = subject.model
        runner = build_runner(model, config, enforce_eager=True)
        profiler = Profiler(runner, config, model.exits.rule, model.exits.kv_fill)
        for count in counts:
            hidden = profiler.hidden(count)
            product = seconds(partial(model.decoder.lm_head, hidden))
            whole = profiler.head_seconds(0, count)
            out.append(
                {
                    "shape": name,
                    "rows": count,
                    "head µs": product * 1e6,
                    "check µs": whole * 1e6,
                    "beyond the head µs": (whole - product) * 1e6,
                    "limit µs": 50.0,
                }
            )
    return out


def _subject(name: str, most: int) -> tuple[Subject, EngineConfig]:
    length = 2 * CONTEXT
    config = EngineConfig(
        max_model_len=length,
        max_num_seqs=most,
        max_num_batched_tokens=DEFAULTS.max_num_batched_tokens,
        kv_cache_tokens=most * length,
    )
    return synthetic(name, None, [0.8], "project", "auto", config), config
