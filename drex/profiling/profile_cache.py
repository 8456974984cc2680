"""What an engine's costs begin from: a profile that was kept, one that is measured now, or an estimate.

Profiles are kept by all that changes what a pass takes: model shape, exits, device, dtype, threads, torch, revision.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from drex.cache import cache_folder, keep, read_kept
from drex.compute.device import device_name
from drex.compute.segments import SegmentRunner
from drex.config import EngineConfig, ExitPlan
from drex.control.cost.profile import Profile, nominal
from drex.profiling.estimate import estimate
from drex.profiling.own_cost import measure_own_cost, requests_at_once
from drex.profiling.profile_file import load_profile
from drex.profiling.profiler import Profiler, choose_threads

log = logging.getLogger(__name__)
MEASURE, MEASURED, NOMINAL = "measure", "measured", "nominal"
"""Choices beside a profile and its file: measure now; the kept one, or else measure now; a made-up machine."""
FRESH_SECONDS = 30 * 86_400.0
REVISION = 6
"""Raised whenever a change of drex makes passes cost something else."""


def obtain(
    asked: Profile | str | Path | None,
    runner: SegmentRunner,
    config: EngineConfig,
    exits: ExitPlan,
    threads: int | None,
) -> Profile:
    """The profile that an engine starts from; sets the number of CPU threads.

    Args:
        asked: a profile; the file of one; `measure` (now, whatever is kept); `measured` (the kept one, or else one that
            is measured now); `nominal` (costs of a made-up machine); or None: the kept one, or else an estimate.
        runner: of the model; measuring overwrites its K/V.
        config: of the engine.
        exits: of the engine.
        threads: for the CPU; None leaves it to OMP_NUM_THREADS, or else to the profile.

    Raises:
        ValueError: a file that is no profile, or one of a model with other segments.
    """
    lengths = runner.layout.lengths
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}: give at least 1")
        torch.set_num_threads(threads)
    if asked is not None and asked not in (MEASURE, MEASURED):
        given = nominal(lengths) if asked == NOMINAL else asked
        ready = given if isinstance(given, Profile) else load_profile(given)
        if len(ready.segments) != len(lengths):
            raise ValueError(f"the profile has {len(ready.segments)} segments and the engine {len(lengths)}")
        return ready
    free = runner.decoder.device.type == "cpu" and threads is None and "OMP_NUM_THREADS" not in os.environ
    key = _key(runner, config, exits, None if free else torch.get_num_threads())
    kept = None if asked == MEASURE else find(key)
    if kept is not None:
        if free and kept.threads is not None:
            torch.set_num_threads(kept.threads)
        return kept
    if asked is None:
        return estimate(runner, None if free else torch.get_num_threads())
    return _measure_and_keep(key, runner, config, exits, free)


def _measure_and_keep(
    key: dict[str, Any], runner: SegmentRunner, config: EngineConfig, exits: ExitPlan, free: bool
) -> Profile:
    """Measure a profile, and keep it if the machine was quiet enough; `free` chooses the number of CPU threads too."""
    profiler = Profiler(runner, config, exits.rule, exits.kv_fill)
    if free:
        choose_threads(profiler, len(os.sched_getaffinity(0)))
    measured = profiler.measure()
    profile = replace(measured.profile, own=measure_own_cost(runner, config, exits, measured.profile))
    if measured.noise is None:
        store(key, profile)
    else:
        log.warning("the profile is used now and not kept: %s; measure again on a quiet machine", measured.noise)
    return profile


def _key(runner: SegmentRunner, config: EngineConfig, exits: ExitPlan, threads: int | None) -> dict[str, Any]:
    """All that changes what a pass takes."""
    spec = runner.decoder.spec
    return {
        "sizes": [
            *(spec.num_layers, spec.hidden_size, spec.intermediate_size, spec.vocab_size),
            *(spec.num_heads, spec.num_kv_heads, spec.head_dim),
        ],
        "segments": list(runner.layout.lengths),
        "heads": [exit_spec.head for exit_spec in exits.exits],
        "criterion": exits.rule.criterion,
        "kv_fill": exits.kv_fill,
        "rows": [config.max_num_seqs, config.max_num_batched_tokens, config.fill_rows, requests_at_once(config)],
        "device": device_name(runner.decoder.device),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "revision": REVISION,
        "dtype": str(runner.decoder.dtype),
        "kernels": runner.kernels,
        "graphs": list(runner.buckets[-1:]),
        "torch": torch.__version__,
    }


def find(key: dict[str, Any]) -> Profile | None:
    """A fresh profile of this key, or None."""
    path = _path(key)
    try:
        if time.time() - path.stat().st_mtime > FRESH_SECONDS:
            return None
    except OSError:
        return None
    found = read_kept(path, "the profile")
    try:
        return Profile.from_dict(found["profile"]) if found and found["key"] == key else None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("ignoring the profile in %s: %s", path, error)
        return None


def store(key: dict[str, Any], profile: Profile) -> None:
    """Keep a profile."""
    keep(_path(key), {"key": key, "profile": profile.to_dict()}, "the profile")


def _path(key: dict[str, Any]) -> Path:
    text = json.dumps(key, sort_keys=True)
    return cache_folder() / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
