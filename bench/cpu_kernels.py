"""Processor time of the C++ kernels that read logits beside torch's, and of products with weights of 8 bit.

    python bench/cpu_kernels.py

One thread, and its own time rather than the clock's, so that other work on the machine hardly shows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from drex.compute.linear import OnednnLinear
from drex.compute.native.reductions import NativeReductions
from drex.compute.sampler import TorchReductions
from drex.control.hashing import mix

ROWS = (1, 8, 32)
VOCAB = 49_152
SHAPES = ((3072, 576), (576, 1536), (VOCAB, 576))
"""(out, in) of SmolLM2's widest products and its head."""
REPEATS = 9


def milliseconds(action: Callable[[], object]) -> float:
    """Median processor time of a call, after one that warms up."""
    action()
    times = []
    for _ in range(REPEATS):
        started = time.thread_time()
        action()
        times.append(time.thread_time() - started)
    return 1e3 * statistics.median(times)


def reductions() -> Table:
    """Drawing tokens and summarising logits, by torch and by the C++ kernels."""
    table = Table("rows", "draw, torch", "draw, C++", "summarise, torch", "summarise, C++", title="ms a call")
    for rows in ROWS:
        logits = 4 * torch.randn(rows, VOCAB)
        best, heat, keys = logits.amax(-1), torch.full((rows,), 0.8), mix(range(rows), 3, [5] * rows)
        kinds = (TorchReductions(), NativeReductions())
        drawn = [kind.draw(logits, best, heat, keys).tolist() for kind in kinds]
        assert drawn[0] == drawn[1], "both draw the same tokens"
        times = [milliseconds(partial(kind.draw, logits, best, heat, keys)) for kind in kinds]
        times += [milliseconds(partial(kind.summarise, logits, ())) for kind in kinds]
        table.add_row(str(rows), *(f"{each:.2f}" for each in times))
    return table


def products() -> Table:
    """oneDNN's products: of bfloat16, and of int8 with rows that were quantised before."""
    table = Table("out x in", "rows", "bfloat16, ms", "int8 / bfloat16", title="products of 8 bit")
    for out, width in SHAPES:
        weight = 0.03 * torch.randn(out, width)
        scales = weight.abs().amax(1) / 127
        whole = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        packed, zeros = torch.ops.onednn.qlinear_prepack(whole, None), torch.zeros(out, dtype=torch.int64)
        usual = OnednnLinear(weight.bfloat16())
        for rows in ROWS:
            given, quantised = torch.randn(rows, width).bfloat16(), torch.randint(0, 255, (rows, width)).to(torch.uint8)
            settings: tuple[Any, ...] = (0.01, 128, packed, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], "")
            wide = milliseconds(partial(usual, given))
            narrow = milliseconds(partial(torch.ops.onednn.qlinear_pointwise, quantised, *settings))
            table.add_row(f"{out} x {width}", str(rows), f"{wide:.3f}", f"{narrow / wide:.2f}")
    return table


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    console = Console()
    with torch.inference_mode():
        console.print(reductions())
        console.print(products())


if __name__ == "__main__":
    main()
