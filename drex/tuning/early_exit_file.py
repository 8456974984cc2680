"""Where measured thresholds may be written, and what `early_exit.json` says of the exits that were measured."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from drex.config import ExitPlan
from drex.config.early_exit_json import EARLY_EXIT_FILE, EarlyExitFile, read_early_exit

PACKAGES = ("site-packages", "dist-packages")


def measured_exits(folder: Path, num_layers: int, plan: ExitPlan) -> EarlyExitFile:
    """The content of `early_exit.json` for exits that were, or are to be, measured; thresholds are left to be set.

    Args:
        folder: of the checkpoint; its file, where there is one, must have the same exits.
        num_layers: of its decoder.
        plan: exits, criterion and K/V fill that are measured.

    Raises:
        ValueError: a folder that is not the user's own to change, or a file with other exits.
    """
    _check_own(folder)
    recorded = read_early_exit(folder, num_layers)
    thresholds = (0.0,) * len(plan.exits)
    if recorded is None:
        return EarlyExitFile(plan.exits, plan.rule.criterion, thresholds, plan.kv_fill)
    if recorded.exits != plan.exits:
        raise ValueError(
            f"{folder / EARLY_EXIT_FILE} has exits after layers {[spec.layer for spec in recorded.exits]}, and those "
            f"after {list(plan.layers)} are measured: leave out --exits, or move the file away"
        )
    # A guarantee was recorded of other thresholds.
    return replace(recorded, criterion=plan.rule.criterion, thresholds=thresholds, kv_fill=plan.kv_fill, guarantee=None)


def _check_own(folder: Path) -> None:
    """Raise ValueError for a folder that others share, or that can't be written to."""
    real = folder.resolve()
    remedy = "copy the folder (cp -rL) and name the copy"
    package = Path(str(files("drex"))).resolve()
    if package in (real, *real.parents) or any(part in PACKAGES for part in real.parts):
        raise ValueError(
            f"{folder} belongs to an installed package, which {EARLY_EXIT_FILE} is not to change: {remedy}"
        )
    if any(part.startswith("models--") for part in real.parts) or _hub_cache() in real.parents:
        raise ValueError(f"{folder} lies in the hub's cache, which others share: {remedy}")
    if not os.access(real, os.W_OK):
        raise ValueError(f"{folder} can't be written to: {remedy}")


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).resolve()
