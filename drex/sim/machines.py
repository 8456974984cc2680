"""Costs of passes on machines that are not at hand, from their data sheets: a roofline with attainable shares.

These are models, not measurements: what `drex simulate` reports from them is labelled so. Bandwidths and dense
16-bit rates are the vendors' figures: NVIDIA's data sheets of H200 SXM, H100 SXM, A100 80 GB SXM and L40S, and the Ada
architecture white paper for the RTX 4090 (16-bit with 32-bit accumulation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drex.control.cost.profile import Profile
from drex.control.cost.roofline import DecoderSizes, Rates, roofline
from drex.sim.shapes import Shape

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


def machine_profile(machine: Machine, shape: Shape, lengths: Sequence[int]) -> Profile:
    """What passes take on a machine.

    Args:
        machine: a preset.
        shape: of the decoder.
        lengths: layers of each segment, each with the LM head at its end.
    """
    rates = Rates(
        bandwidth=machine.bandwidth * machine.bandwidth_share,
        compute=machine.compute * machine.compute_share,
        pass_seconds=machine.launch,
    )
    sizes = DecoderSizes(
        hidden=shape.hidden,
        layer_weights=shape.layer_weights,
        head_weights=[shape.head_weights] * len(lengths),
        kv_values=shape.kv_values,
        bytes_per_number=BYTES,
    )
    return Profile(roofline(rates, sizes, lengths), source=f"{machine.name}, modelled from its data sheet")
