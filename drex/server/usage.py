"""What a reply says of its tokens: how many, how deep, how sure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from drex.outputs import TokenOutput
from drex.server.replies import TokenExit, Usage


@dataclass
class Tally:
    """Tokens of one HTTP request, over all its samples."""

    prompt_tokens: int
    num_layers: int
    layers: Counter[int] = field(default_factory=Counter)
    confidences: list[float] = field(default_factory=list)

    def add(self, tokens: Iterable[TokenOutput]) -> None:
        """Count tokens."""
        for token in tokens:
            self.layers[token.exit_layer] += 1
            if token.exit_layer < self.num_layers:
                self.confidences.append(token.confidence)

    def so_far(self) -> Usage:
        """Counts alone: cheap enough for every chunk."""
        given, made = self.prompt_tokens, self.layers.total()
        return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made, "early_exit": None}

    def usage(self) -> Usage:
        """Everything; without tokens there is nothing to say of their depth."""
        usage, made = self.so_far(), self.layers.total()
        if made:
            usage["early_exit"] = {
                "mean_depth": sum(layer * count for layer, count in self.layers.items()) / made,
                "exits": {str(layer): count / made for layer, count in sorted(self.layers.items())},
                "confidence_p5": float(np.percentile(self.confidences, 5)) if self.confidences else None,
            }
        return usage


def token_exits(tokens: Iterable[TokenOutput], layers: Sequence[int]) -> list[TokenExit]:
    """What `return_exit_layers` adds; `layers` are those after which there is an exit point."""
    return [
        {
            "id": token.id,
            "text": token.text,
            "exit_layer": token.exit_layer,
            "confidence": token.confidence,
            "checks": [
                {"layer": layers[check.exit_index], "confidence": check.confidence, "threshold": check.threshold}
                for check in token.checks
            ],
        }
        for token in tokens
    ]
