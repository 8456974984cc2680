"""What passes cost by a roofline: the longer of reading the weights and computing the rows, and K/V reads on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drex.control.cost.profile import Curve, SegmentCost

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)


@dataclass(frozen=True)
class Rates:
    """How fast a machine runs a model's kernels.

    Attributes:
        bandwidth: bytes of weights or K/V that are read in a second.
        compute: operations of matrix products in a second; a product of one number with another and its addition are 2.
        pass_seconds: a pass with nothing to do.
        layer_seconds: a layer with nothing to do.
        request_seconds: a layer's attention of each further request with nothing to do.
    """

    bandwidth: float
    compute: float
    pass_seconds: float = 0.0
    layer_seconds: float = 0.0
    request_seconds: float = 0.0


@dataclass(frozen=True)
class DecoderSizes:
    """What of a decoder decides how long its passes take.

    Attributes:
        hidden: width of the residual stream.
        layer_weights: numbers in one layer's matrices.
        head_weights: numbers in the matrices of the head at the end of each segment, the final one last.
        kv_values: numbers of a token's K and V at one layer.
        bytes_per_number: of weights and K/V.
    """

    hidden: int
    layer_weights: int
    head_weights: Sequence[int]
    kv_values: int
    bytes_per_number: float


def roofline(rates: Rates, sizes: DecoderSizes, lengths: Sequence[int]) -> tuple[SegmentCost, ...]:
    """The costs of each segment.

    Args:
        rates: of the machine.
        sizes: of the decoder.
        lengths: layers of each segment.
    """

    def products(weights: int) -> tuple[float, ...]:
        read = weights * sizes.bytes_per_number / rates.bandwidth
        return tuple(max(read, 2 * weights * rows / rates.compute) for rows in ROW_COUNTS)

    counts = tuple(map(float, ROW_COUNTS))
    segments = []
    for length, head_weights in zip(lengths, sizes.head_weights, strict=True):
        launch = rates.pass_seconds + length * rates.layer_seconds
        rows = tuple(launch + seconds for seconds in products(length * sizes.layer_weights))
        segments.append(
            SegmentCost(
                rows=Curve(counts, rows),
                head=Curve(counts, products(head_weights)),
                span=length * rates.request_seconds,
                entry=length * sizes.kv_values * sizes.bytes_per_number / rates.bandwidth,
                kv_row=2 * length * sizes.hidden * sizes.kv_values / rates.compute,
            )
        )
    return tuple(segments)
