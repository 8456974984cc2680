"""The C++ kernels over tensors: contiguous, on a CPU, in float32 or bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from drex.compute.native import _kernels


def is_bfloat16(numbers: Tensor) -> int:
    """How a kernel is told which numbers it is given: 1 for bfloat16, 0 for float32."""
    return int(numbers.dtype == torch.bfloat16)


def address(numbers: Tensor) -> int:
    """Where a kernel finds a tensor's numbers; it knows no strides."""
    assert numbers.is_contiguous()
    return numbers.data_ptr()


def add_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, normed: Tensor) -> None:
    """Add `delta` to hidden states, in place, and write the root-mean-square norm of the sum.

    Args:
        hidden, delta, normed: (rows, hidden size); nothing is added where delta is None.
        weight: (hidden size,).
        eps: added to the mean square.
    """
    rows, width = hidden.shape
    added = 0 if delta is None else address(delta)
    _kernels.add_norm(is_bfloat16(hidden), address(hidden), added, address(weight), address(normed), rows, width, eps)


def gate(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, which lie side by side. Shapes: (rows, 2 intermediate) -> (rows, intermediate)."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _kernels.gate(is_bfloat16(gate_up), address(gate_up), address(out), rows, width)
    return out


def rotate_and_write(
    fused: Tensor,
    positions: Tensor,
    cells: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Rotate queries and keys by their positions, and write keys and values to their cells.

    Args:
        fused: queries, keys and values side by side, (rows, (heads + 2 kv_heads) * head_dim).
        positions, cells: (rows,), int64.
        cos, sin: (all positions, head_dim / 2).
        norms: weights of the norms of queries and keys, (head_dim,) each.
        eps: of the norms.
        queries: written, of the first rows, as many as it has; (at most rows, heads, head_dim).
        keys, values: written; one layer's, (all cells, kv_heads, head_dim).
    """
    query_rows, heads, head_dim = queries.shape
    query_norm, key_norm = (0, 0) if norms is None else (address(norms[0]), address(norms[1]))
    _kernels.rotate_and_write(
        is_bfloat16(fused),
        address(fused),
        address(cos),
        address(sin),
        query_norm,
        key_norm,
        address(queries),
        address(keys),
        address(values),
        address(positions),
        address(cells),
        len(fused),
        query_rows,
        heads,
        keys.shape[1],
        head_dim,
        eps,
    )


def summarise(logits: Tensor, columns: int) -> Tensor:
    """What `reductions.COLUMNS` names. Shapes: (rows, vocab) -> (columns, rows), float64."""
    rows, vocab = logits.shape
    out = torch.empty(columns, rows, dtype=torch.float64)
    _kernels.summarise(is_bfloat16(logits), address(logits), address(out), rows, vocab)
    return out


def draw(logits: Tensor, peaks: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    """The argmax of (logit - peak) / temperature + Gumbel noise of each row, int64.

    Shapes: logits (rows, vocab); peaks and temperatures, float32, and keys, int64, (rows,).
    """
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    _kernels.draw(
        is_bfloat16(logits),
        address(logits),
        address(peaks),
        address(temperatures),
        address(keys),
        address(tokens),
        rows,
        vocab,
    )
    return tokens
