"""Products with weights: `nn.Linear`, or on a CPU in float32 one whose weight is packed for MKL."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

PACKED_FOR = 128
"""Rows of x that a weight is packed for. Any number can be multiplied; far more than these, a little slower."""


class Linear(Protocol):
    """x W^T + b."""

    def __call__(self, rows: Tensor, /) -> Tensor:
        """Shapes: (..., in) -> (..., out)."""


class PackedLinear(nn.Module):
    """x W^T + b in float32 with W laid out once as MKL's kernels read it.

    MKL lays an ordinary weight out anew in every product of more than three rows, which costs about as much as reading
    it. Packed, up to eight rows take little longer than one.

    Args:
        weight: (out, in), on a CPU in float32; not kept.
        bias: (out,).

    Attributes:
        weight_bytes: of weight and bias. What W is packed into is longer, but the rest of it is never touched.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = bias
        self.weight_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, PACKED_FOR)
        # The operator asks the unpacked weight for its shape, no more, if it is told that the number of rows fits.
        self._shape_only = weight.new_full((1,), math.nan).expand(weight.shape)

    def forward(self, rows: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., out)."""
        count = rows.numel() // rows.shape[-1]
        out: Tensor = torch.ops.mkl._mkl_linear(rows, self._packed, self._shape_only, self.bias, count)
        return out


def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The product with a weight (out, in) and a bias (out,), packed where it can be."""
    if can_pack(weight.device, weight.dtype):
        return PackedLinear(weight, bias)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    return plain


def pack_inside(module: nn.Module) -> None:
    """Have all products within a module packed where they can be; it can't be trained or saved any more."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and can_pack(child.weight.device, child.weight.dtype):
            setattr(module, name, PackedLinear(child.weight.detach(), child.bias))
        else:
            pack_inside(child)


def weight_bytes(product: Linear) -> int:
    """Bytes of a product's weight and bias."""
    if isinstance(product, PackedLinear):
        return product.weight_bytes
    assert isinstance(product, nn.Linear)
    return sum(parameter.nbytes for parameter in product.parameters())


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights there are packed."""
    has_mkl = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
    return device.type == "cpu" and dtype == torch.float32 and has_mkl
