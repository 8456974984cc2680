"""Estimates what passes cost without running any: a roofline from the model's sizes and rates measured in a moment.

Engines start from it where nothing better is known, and learn while they serve.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from drex.compute.decoder import Decoder
from drex.compute.linear import Linear, weight_bytes
from drex.compute.segments import SegmentRunner
from drex.control.cost.profile import OwnCost, Profile
from drex.control.cost.roofline import DecoderSizes, Rates, roofline

MEASURED_BYTES = 2**28
"""Weights that one measurement reads: more than caches hold, and read in a few hundredths of a second."""
MULTIPLIED_BYTES = 2**25
"""Weights that are multiplied with many rows: with more of them the rate is the same, and the time longer."""
MANY_ROWS = 64
"""Rows whose products are bound by computing on a CPU, and on a GPU take about as long as one row's."""
REPEATS = 3
ENOUGH_SECONDS = 0.1
"""An action is not repeated any more when its runs have taken this long: a busy machine must not delay the start."""
OPERATORS_PER_LAYER = {"torch": 16.0, "triton": 16.0, "native": 8.0}
"""By kernels: what a layer takes beside its products and the reading of K/V, in calls of a small torch operator."""
OPERATORS_PER_REQUEST = {"torch": 4.0, "triton": 4.0, "native": 0.5}
"""The same for a layer's attention of one more request."""
GRAPH_LAUNCH_SECONDS = 6e-5
"""A pass with nothing to do on a GPU: one graph launch and the copy back, assumed."""
COPIED_BYTES = 2**27
"""What is copied to find a GPU's bandwidth: more than its caches hold, and little of what the K/V pool leaves free."""
GPU_COMPUTE_SHARE = 0.5
"""Share of a GPU's rate in one large product that the products of a pass attain, assumed."""
LARGE_PRODUCT = 4096
"""Width of the square product that tells a GPU's rate."""
OWN_COST = OwnCost(per_pass=1.4e-4, per_request=1e-6)
"""The engine's own time where passes wait for it, as bench/scheduling.py finds it on a core of a server CPU."""


def estimate(runner: SegmentRunner, threads: int | None = None) -> Profile:
    """The costs of a model on this machine, estimated; sets the number of CPU threads.

    Args:
        runner: of the model.
        threads: CPU threads to estimate for; None tries one, half and all of those that torch has, and takes what is
            fastest at full depth.
    """
    lengths = runner.layout.lengths
    sizes = decoder_sizes(runner)
    if runner.decoder.device.type != "cpu":
        return Profile(roofline(_gpu_rates(runner), sizes, lengths), source="estimated")
    most = torch.get_num_threads()
    found = {}
    for count in sorted({1, max(1, most // 2), most}) if threads is None else [threads]:
        torch.set_num_threads(count)
        found[count] = Profile(roofline(_cpu_rates(runner), sizes, lengths), count, "estimated", OWN_COST)
    best = min(found, key=lambda count: _full_depth_seconds(found[count]))
    torch.set_num_threads(best)
    return found[best]


def decoder_sizes(runner: SegmentRunner) -> DecoderSizes:
    """The sizes of a runner's decoder and exit heads."""
    spec = runner.decoder.spec
    kv_width = spec.num_kv_heads * spec.head_dim
    mlp = 3 * spec.hidden_size * spec.intermediate_size
    vocabulary = spec.hidden_size * spec.vocab_size
    exits = [vocabulary + (mlp if head.kind == "mlp" else 0) for head, _ in runner.heads]
    return DecoderSizes(
        hidden=spec.hidden_size,
        layer_weights=2 * spec.hidden_size * (spec.num_heads * spec.head_dim + kv_width) + mlp,
        head_weights=[*exits, vocabulary],
        kv_values=2 * kv_width,
        bytes_per_number=runner.decoder.dtype.itemsize,
    )


def _full_depth_seconds(profile: Profile) -> float:
    """Geometric mean of what one token for each of 1, 8 and 32 requests takes."""
    final = profile.segments[-1].head
    return statistics.geometric_mean(
        sum(cost.seconds(rows, rows, 0, 0, 0) for cost in profile.segments) + final.one(rows) for rows in (1, 8, 32)
    )


@torch.inference_mode()
def _cpu_rates(runner: SegmentRunner) -> Rates:
    """The rates of the CPU with the present number of threads."""
    decoder = runner.decoder

    def bytes_per_second(rows: int, least: int) -> float:
        """The rate at which weights of `least` bytes are multiplied with rows."""
        products, given = (
            some_products(decoder, least),
            torch.ones(rows, decoder.spec.hidden_size, dtype=decoder.dtype),
        )
        seconds = _median_seconds(lambda: [product(given) for product in products])
        return sum(map(weight_bytes, products)) / seconds

    row = torch.ones(1, decoder.spec.hidden_size, dtype=decoder.dtype)
    operator = _median_seconds(lambda: [F.silu(row) for _ in range(100)]) / 100
    return Rates(
        bandwidth=bytes_per_second(1, MEASURED_BYTES),
        compute=2 * MANY_ROWS * bytes_per_second(MANY_ROWS, MULTIPLIED_BYTES) / decoder.dtype.itemsize,
        layer_seconds=OPERATORS_PER_LAYER[runner.kernels] * operator,
        request_seconds=OPERATORS_PER_REQUEST[runner.kernels] * operator,
    )


@torch.inference_mode()
def _gpu_rates(runner: SegmentRunner) -> Rates:
    """The rates of a GPU: the weights copied, and one large product, since its clock tells nothing of short ones."""
    decoder = runner.decoder
    read = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=decoder.device)
    written = torch.empty_like(read)
    square = torch.ones(LARGE_PRODUCT, LARGE_PRODUCT, device=decoder.device, dtype=decoder.dtype)
    copied = _median_seconds(lambda: written.copy_(read), runner.synchronize)
    multiplied = _median_seconds(lambda: square @ square, runner.synchronize)
    return Rates(
        # A copy reads and writes.
        bandwidth=2 * COPIED_BYTES / copied,
        compute=GPU_COMPUTE_SHARE * 2 * LARGE_PRODUCT**3 / multiplied,
        pass_seconds=GRAPH_LAUNCH_SECONDS,
    )


def some_products(decoder: Decoder, least: int) -> Sequence[Linear]:
    """Products of the first layers that take hidden states, with weights of `least` bytes or all that there are."""
    found: list[Linear] = []
    taken = 0
    for product in (product for layer in decoder.layers for product in (layer.qkv, layer.gate_up)):
        if taken >= least:
            break
        found.append(product)
        taken += weight_bytes(product)
    return found


def _median_seconds(action: Callable[[], Sequence[Tensor] | Tensor], wait: Callable[[], None] | None = None) -> float:
    """Median time of an action, after a run that warms up, unless that one took long enough already."""
    times: list[float] = []
    while len(times) <= REPEATS and sum(times) < ENOUGH_SECONDS:
        started = time.perf_counter()
        action()
        if wait is not None:
            wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:] or times)
