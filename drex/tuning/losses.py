"""Weights of the summed early-exit loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

EXIT_LOSSES = ("ee_llm", "layerskip")
EE_LLM_WEIGHTS = (0.1, 0.2)
LAYERSKIP_SCALE = 0.2


def exit_loss_weights(
    scheme: str, exits: Sequence[int], num_layers: int, weights: Sequence[float] | None = None
) -> list[float]:
    """Loss weight of each exit, then that of the final head.

    Args:
        scheme: `ee_llm`, weight 1 for the final head and fixed ones for the exits (EE-LLM, Chen et al. 2024: .1 and .2
            for exits at 1/4 and 1/2 of the depth); `layerskip`, weights that grow with the sum of the layer numbers
            and add up to 1 (Elhoushi et al. 2024, equation 6, e_scale = 0.2).
        exits: layers executed at each exit, ascending.
        weights: the exits' weights for `ee_llm`; without them .1 for the first exit and .2 for the others.

    Raises:
        ValueError: unknown scheme, or not one weight an exit.
    """
    if scheme == "ee_llm":
        if weights is None:
            weights = [EE_LLM_WEIGHTS[min(i, 1)] for i in range(len(exits))]
        if len(weights) != len(exits) or not all(0 <= w < math.inf for w in weights):
            raise ValueError(f"exit weights {list(weights)}: give one weight from 0 on for each of {len(exits)} exits")
        return [*weights, 1.0]
    if scheme == "layerskip":
        if weights is not None:
            raise ValueError("the layerskip loss computes its own weights: leave out the exit weights")
        raw = [LAYERSKIP_SCALE * sum(range(layer)) for layer in exits]
        raw.append(num_layers - 1 + LAYERSKIP_SCALE * sum(range(num_layers - 1)))
        return [value / sum(raw) for value in raw]
    raise ValueError(f"unknown exit loss {scheme!r}: choose one of {', '.join(EXIT_LOSSES)}")
