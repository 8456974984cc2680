"""Products with weights. On a CPU each weight is laid out once for the kernel that is fastest with its shape.

The kernel of a weight never depends on how many rows it is multiplied with. By oneDNN a row's results are the same to
the last bit whatever the other rows are; by MKL and torch's own choice up to rounding.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from drex.cache import cache_folder, keep, read_kept
from drex.compute.device import device_name

MKL_ROWS = 128
"""Rows of x that MKL lays a weight out for. Any number can be multiplied; far more than these, a little slower."""
TRIED_ROWS = (1, 8, 32)
"""Rows that kernels are tried with: requests that decode together."""
TRIED_FROM, TRIED_AT_MOST = 2**18, 2**20
"""Numbers of a weight from which on kernels are tried, and of the part of it that they are tried with."""
TRIES = 5
LEAD = 0.7
"""A kernel takes the usual one's place if it takes at most this share of its time: a busy machine must not decide."""


FEW_ROWS, STEPS_PER_DOUBLING = 8, 4
"""Up to the former oneDNN multiplies as many rows as there are; above it, numbers of rows are rounded up to these steps
between one power of two and the next. It compiles a product for each number of rows and shape, some 0.4 MB and a
millisecond each. Of the numbers up to 512 there are 32 then, with 8 % more rows at the mean."""


def compiled_rows(count: int) -> int:
    """The rows that a product of `count` rows is compiled for."""
    if count <= FEW_ROWS:
        return count
    step = (1 << (count - 1).bit_length() - 1) // STEPS_PER_DOUBLING
    return -(-count // step) * step


class Linear(Protocol):
    """x W^T + b."""

    def __call__(self, rows: Tensor, /) -> Tensor:
        """Shapes: (..., in) -> (..., out)."""


class PackedLinear(nn.Module):
    """x W^T + b with W laid out once as a library's kernels read it.

    Args:
        weight: (out, in), on a CPU; not kept.
        bias: (out,).

    Attributes:
        weight_bytes: of weight and bias.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = bias
        self.weight_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)


class OnednnLinear(PackedLinear):
    """By oneDNN, in float32 or bfloat16. Up to some 16 rows take hardly longer than one."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self._out = weight.shape[0]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., out)."""
        if not rows.numel():
            return rows.new_zeros(*rows.shape[:-1], self._out)
        count = rows.numel() // rows.shape[-1]
        spare = compiled_rows(count) - count
        given = functional.pad(rows.reshape(count, -1), (0, 0, 0, spare)) if spare else rows
        out: Tensor = torch.ops.mkldnn._linear_pointwise(given, self._packed, self.bias, "none", [], "")
        if spare:
            out = out[:count].view(*rows.shape[:-1], self._out)
        return out


class MklLinear(PackedLinear):
    """By MKL, in float32. It lays an ordinary weight out anew in every product of more than three rows.

    What W is packed into is longer than W, but the rest of it is never touched.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, MKL_ROWS)
        # The operator asks the unpacked weight for its shape, no more, if it is told that the number of rows fits.
        self._shape_only = weight.new_full((1,), math.nan).expand(weight.shape)

    def forward(self, rows: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., out)."""
        count = rows.numel() // rows.shape[-1]
        out: Tensor = torch.ops.mkl._mkl_linear(rows, self._packed, self._shape_only, self.bias, count)
        return out


def plain_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """The product with a weight as it is, by torch's own choice of kernel."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    return plain


KERNELS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "onednn": OnednnLinear,
    "mkl": MklLinear,
    "plain": plain_linear,
}
"""What makes a product of a weight and a bias."""


def kernels_for(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels that there are for products on a device, the one that is fastest as a rule first."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return ("plain",)
    found = []
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # Without the processor's own instructions oneDNN emulates bfloat16, slowly.
        native = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        found += ["onednn"] if native else []
    if dtype == torch.float32 and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear"):
        found.append("mkl")
    return (*found, "plain")


class Products:
    """Makes the products of one model, each with the kernel that is fastest for its shape.

    Args:
        device: where the weights are.
        dtype: of the weights.
        kernels: those to choose from, the usual one first; None are all that there are.

    Attributes:
        chosen: kernels by shape of the weight, of the shapes so far.

    What was found fastest is kept in the cache folder, so that a model has the same kernels at every start.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, kernels: tuple[str, ...] | None = None) -> None:
        self.kernels = kernels_for(device, dtype) if kernels is None else kernels
        self.chosen: dict[tuple[int, int], str] = {}
        self._key = f"{device_name(device)}, torch {torch.__version__}, {dtype}, {self.kernels}"

    @property
    def packs(self) -> bool:
        """Whether weights are laid out anew, so that what they are read into is free again."""
        return self.kernels[0] != "plain"

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """The product with a weight (out, in) and a bias (out,); where weights are packed, this one is not kept."""
        shape = (weight.shape[0], weight.shape[1])
        if shape not in self.chosen:
            self.chosen[shape] = self._fastest(weight)
        kernel = self.chosen[shape]
        # A weight that stays as it is may lie where the next one is read to.
        kept = weight.clone() if kernel == "plain" and self.packs else weight
        return KERNELS[kernel](kept, bias)

    def pack_inside(self, module: nn.Module) -> None:
        """Replace all products within a module; it can't be trained or saved any more."""
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, self.linear(child.weight.detach(), child.bias))
            else:
                self.pack_inside(child)

    def _fastest(self, weight: Tensor) -> str:
        """The kernel for a weight: the usual one, unless another one is clearly faster."""
        usual, *others = self.kernels
        if not others or weight.numel() < TRIED_FROM:
            return usual
        path, key = cache_folder() / "products.json", f"{self._key}, {tuple(weight.shape)}"
        kept = read_kept(path, "the fastest kernels")
        kept = kept if isinstance(kept, dict) else {}
        if kept.get(key) not in self.kernels:
            kept[key] = self._measured(weight)
            keep(path, kept, "the fastest kernel of a product")
        found: str = kept[key]
        return found

    def _measured(self, weight: Tensor) -> str:
        """The kernel that is fastest now."""
        usual = self.kernels[0]
        part = weight[: max(1, TRIED_AT_MOST // weight.shape[1])]
        seconds = _least_seconds({name: KERNELS[name](part, None) for name in self.kernels}, part)
        best = min(seconds, key=lambda name: seconds[name])
        return best if seconds[best] <= LEAD * seconds[usual] else usual


@torch.inference_mode()
def _least_seconds(products: Mapping[str, Linear], weight: Tensor) -> dict[str, float]:
    """For each product of a weight, the geometric mean over numbers of rows of the least time that it takes.

    It is the processor's time on one thread, which says the same on a machine that is busy with other work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _least_seconds_of_a_thread(products, weight)
    finally:
        torch.set_num_threads(threads)


def _least_seconds_of_a_thread(products: Mapping[str, Linear], weight: Tensor) -> dict[str, float]:
    """As `_least_seconds`, with the threads that there are."""
    least: dict[str, list[float]] = {name: [] for name in products}
    for rows in TRIED_ROWS:
        x = weight.new_ones(rows, weight.shape[1])
        times: dict[str, list[float]] = {name: [] for name in products}
        for _ in range(TRIES):
            # In turns, so that a slow moment of the machine meets all of them.
            for name, product in products.items():
                started = time.thread_time()
                product(x)
                times[name].append(time.thread_time() - started)
        for name, found in times.items():
            least[name].append(min(found))
    return {name: statistics.geometric_mean(found) for name, found in least.items()}


def weight_bytes(product: Linear) -> int:
    """Bytes of a product's weight and bias."""
    if isinstance(product, PackedLinear):
        return product.weight_bytes
    assert isinstance(product, nn.Linear)
    return sum(parameter.nbytes for parameter in product.parameters())
