"""Names of what a comparison runs: a policy, or `drex` with something more switched on, as in `drex+run-ahead`."""

from __future__ import annotations

from typing import Any

from drex.extensions import POLICIES

VARIANTS: dict[str, dict[str, Any]] = {
    "run-ahead": {"run_ahead": "trusted"},
    "lossless": {"run_ahead": "lossless"},
    "adaptive": {"adaptive": True},
}
"""What a benchmark can switch on beside the policy `drex`."""


def policy_settings(name: str) -> dict[str, Any]:
    """What a benchmark's policy sets in an `EngineConfig`: a policy, and what else is to be switched on.

    `drex+run-ahead`, `drex+lossless` and `drex+adaptive` are `drex` with that. Raises ValueError for an unknown name.
    """
    policy, *further = name.split("+")
    POLICIES.check(policy)
    settings: dict[str, Any] = {"policy": policy, "run_ahead": "off"}
    for each in further:
        if policy != "drex" or each not in VARIANTS:
            known = ", ".join(f"drex+{variant}" for variant in VARIANTS)
            raise ValueError(f"policy {name!r}: choose one of {', '.join(POLICIES.names())}, {known}")
        settings |= VARIANTS[each]
    return settings
