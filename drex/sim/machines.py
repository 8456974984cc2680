"""Costs of passes on machines that are not at hand, from their data sheets: a roofline with attainable shares.

These are models, not measurements: what `drex simulate` reports from them is labelled so. Bandwidths and dense
16-bit rates are the vendors' figures: NVIDIA's data sheets of H200 SXM, H100 SXM, A100 80 GB SXM and L40S, and the Ada
architecture white paper for the RTX 4090 (16-bit with 32-bit accumulation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drex.control.profile import Curve, Profile, SegmentCost
from drex.sim.shapes import Shape

COUNTS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
BYTES = 2


@dataclass(frozen=True)
class Machine:
    """What a device can do.

    Attributes:
        bandwidth: of its memory, bytes a second.
        compute: dense 16-bit operations a second.
        memory: bytes.
        bandwidth_share, compute_share: of these that kernels attain, assumed.
        launch: seconds that a pass takes with nothing to do, assumed (one graph launch and the copy back).
    """

    name: str
    bandwidth: float
    compute: float
    memory: float
    bandwidth_share: float = 0.85
    compute_share: float = 0.65
    launch: float = 6e-5


MACHINES = {
    machine.name.lower(): machine
    for machine in (
        Machine("H200", 4.8e12, 989e12, 141e9),
        Machine("H100", 3.35e12, 989e12, 80e9),
        Machine("A100", 2.039e12, 312e12, 80e9),
        Machine("L40S", 0.864e12, 362e12, 48e9),
        Machine("RTX4090", 1.008e12, 165e12, 24e9),
    )
}


def roofline(machine: Machine, shape: Shape, lengths: Sequence[int]) -> Profile:
    """What passes take on a machine: the longer of reading the weights and computing the rows, and K/V reads on top.

    Args:
        machine: a preset.
        shape: of the decoder.
        lengths: layers of each segment, each with the LM head at its end.
    """
    bandwidth = machine.bandwidth * machine.bandwidth_share
    compute = machine.compute * machine.compute_share

    def matmul(weights: int, rows: int) -> float:
        return max(weights * BYTES / bandwidth, 2 * weights * rows / compute)

    head = Curve(tuple(map(float, COUNTS)), tuple(matmul(shape.head_weights, rows) for rows in COUNTS))
    segments = []
    for length in lengths:
        weights = length * shape.layer_weights
        curve = tuple(machine.launch + matmul(weights, rows) for rows in COUNTS)
        kv_row = 2 * length * shape.hidden * shape.kv_values / compute
        entry = length * shape.kv_values * BYTES / bandwidth
        segments.append(SegmentCost(Curve(tuple(map(float, COUNTS)), curve), head, 0.0, entry, kv_row))
    return Profile(tuple(segments), source=f"{machine.name}, modelled from its data sheet")
