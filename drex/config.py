"""Settings: what a user asks for, and what it resolves to for one model. All frozen; resolving returns a new object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from drex.checkpoint import (
    CRITERIA,
    KV_FILLS,
    EarlyExitFile,
    ExitSpec,
    check_exit_layers,
    check_threshold,
)

POLICIES = ("drex", "split", "full", "art", "consensus", "majority", "greedy", "latency_only")
RUN_AHEAD = ("off", "trusted", "lossless")
VARIANTS: dict[str, dict[str, Any]] = {
    "run-ahead": {"run_ahead": "trusted"},
    "lossless": {"run_ahead": "lossless"},
    "adaptive": {"adaptive": True},
}
"""What a benchmark can switch on beside the policy `drex`."""
SCHEDULES = ("constant", "calm_paper", "calm_code")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
FILL_ROWS, FILL_ROWS_A_REQUEST = 256, 8
"""Of `max_fill_rows`: at least, and for each request in flight. At exit rate .8 a buffered row owes 4 in the mean."""


@dataclass(frozen=True)
class EarlyExit:
    """Early-exit settings; None means what `early_exit.json` says (or, for one request, what the engine has).

    Args:
        layers: for an engine, the exit points as counts of layers executed (heads: `shared`, unless
            `early_exit.json` describes one for that layer); for a request, the exits it may take.
        criterion: `max_prob`, `margin`, `entropy`, `state`, `patience`, `probe` or `trace`.
        thresholds: one number for all exits, or one for each of `layers`; confidence >= threshold exits.
        kv_fill: what later tokens see at skipped layers: `recompute`, `project`, `alias` or `mask`; engine-wide.
        schedule: of the threshold over output positions: `constant`, or CALM's decay (Schuster et al. 2022)
            as in the paper, `calm_paper`, clip(0.9 t + 0.1 exp(-4 i / max_tokens)), or as in its code, `calm_code`,
            t (0.9 + 0.1 exp(-4 i / max_tokens)).
        patience: how many agreeing exits in a row make confidence 1 under `patience`.
        min_layer: for a request, no exit before this many layers.
        enabled: False turns every exit off.

    Raises:
        ValueError: a value outside of these.
    """

    layers: Sequence[int] | None = None
    criterion: str | None = None
    thresholds: float | Sequence[float] | None = None
    kv_fill: str | None = None
    schedule: str | None = None
    patience: int | None = None
    min_layer: int = 0
    enabled: bool = True

    @classmethod
    def off(cls) -> EarlyExit:
        """Full depth for every token."""
        return cls(enabled=False)

    def __post_init__(self) -> None:
        if self.layers is not None:
            if not isinstance(self.layers, list | tuple) or not all(_whole(layer) for layer in self.layers):
                raise ValueError(f"layers {self.layers!r}: give a list of layer counts")
            object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.thresholds, list | tuple):
            object.__setattr__(self, "thresholds", tuple(map(check_threshold, self.thresholds)))
        elif self.thresholds is not None:
            object.__setattr__(self, "thresholds", check_threshold(self.thresholds))
        for value, choices, name in (
            (self.criterion, CRITERIA, "criterion"),
            (self.kv_fill, KV_FILLS, "kv_fill"),
            (self.schedule, SCHEDULES, "schedule"),
        ):
            if value is not None and value not in choices:
                raise ValueError(f"{name} {value!r}: choose one of {', '.join(choices)}")
        if self.patience is not None and not (_whole(self.patience) and self.patience >= 1):
            raise ValueError(f"patience {self.patience!r}: give at least 1 agreeing exit")
        if not (_whole(self.min_layer) and self.min_layer >= 0):
            raise ValueError(f"min_layer {self.min_layer!r}: give a count of layers from 0 on")
        if not isinstance(self.enabled, bool):
            raise ValueError(f"enabled {self.enabled!r}: give true or false")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> EarlyExit:
        """Build from JSON; raises ValueError for unknown keys."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(raw) - set(known))
        if unknown:
            raise ValueError(f"early_exit: unknown field {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**raw)


@dataclass(frozen=True)
class ExitRule:
    """When one request's live row exits: resolved, one entry an exit point of the engine.

    `thresholds[k]` is None where the request may not take exit k.
    """

    criterion: str
    thresholds: tuple[float | None, ...]
    schedule: str = "constant"
    patience: int = 2

    def threshold(self, exit_index: int, output_index: int, max_tokens: int) -> float | None:
        """The threshold at an exit for the output token number `output_index` (from 0) of at most `max_tokens`.

        None where the exit can't be taken, because it isn't allowed or because no confidence reaches the threshold.
        """
        base = self.thresholds[exit_index]
        if base is None or base > 1:
            return None
        if self.schedule == "constant":
            return base
        decay = math.exp(-4.0 * output_index / max_tokens)
        if self.schedule == "calm_paper":
            return min(1.0, max(0.0, 0.9 * base + 0.1 * decay))
        return base * (0.9 + 0.1 * decay)

    def bar(self, exit_index: int, output_index: int, max_tokens: int) -> float:
        """The confidence that an exit has to reach, as `threshold`; infinite where the exit can't be taken."""
        threshold = self.threshold(exit_index, output_index, max_tokens)
        return math.inf if threshold is None else threshold

    def bars(self, output_index: int, max_tokens: int) -> tuple[float, ...]:
        """As `bar`, of all exits."""
        return tuple([self.bar(exit_index, output_index, max_tokens) for exit_index in range(len(self.thresholds))])

    @property
    def never(self) -> bool:
        """Whether no exit can be taken at all."""
        return all(threshold is None or threshold > 1 for threshold in self.thresholds)


@dataclass(frozen=True)
class ExitPlan:
    """The engine's exit points, resolved for one model: what segments end where, and the default rule."""

    exits: tuple[ExitSpec, ...]
    rule: ExitRule
    kv_fill: str

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(spec.layer for spec in self.exits)

    def rule_for(self, request: EarlyExit | None) -> ExitRule:
        """The rule of a request that overrides some of the engine's settings.

        Raises:
            ValueError: an exit that the engine does not have, or a setting that is engine-wide.
        """
        if request is None:
            return self.rule
        if request.kv_fill is not None and request.kv_fill != self.kv_fill:
            raise ValueError(
                f"early_exit.kv_fill: the engine serves {self.kv_fill!r} for all requests; leave it out of the request"
            )
        if not request.enabled:
            return replace(self.rule, thresholds=(None,) * len(self.exits))
        allowed = self.layers if request.layers is None else tuple(request.layers)
        missing = sorted(set(allowed) - set(self.layers))
        if missing:
            raise ValueError(f"early_exit.layers {missing}: the engine has exits after layers {list(self.layers)}")
        base = dict(zip(self.layers, self.rule.thresholds, strict=True))
        if request.thresholds is not None:
            base.update(zip(allowed, per_exit(request.thresholds, len(allowed)), strict=True))
        thresholds = tuple(
            base[layer] if layer in allowed and layer >= request.min_layer else None for layer in self.layers
        )
        return ExitRule(
            criterion=request.criterion or self.rule.criterion,
            thresholds=thresholds,
            schedule=request.schedule or self.rule.schedule,
            patience=request.patience or self.rule.patience,
        )


def check_run_ahead(mode: str) -> str:
    """A mode of run-ahead as given; raises ValueError for an unknown one."""
    if mode not in RUN_AHEAD:
        raise ValueError(f"run_ahead {mode!r}: choose one of {', '.join(RUN_AHEAD)}")
    return mode


def check_lossless(mode: str, kv_fill: str) -> None:
    """Raise ValueError for a mode of run-ahead that the engine's K/V fill can't serve."""
    if mode == "lossless" and kv_fill != "recompute":
        raise ValueError(
            f"run_ahead 'lossless' needs exact K/V, and the engine serves kv_fill {kv_fill!r}: "
            f"choose kv_fill 'recompute', or run_ahead 'trusted'"
        )


def check_policies(names: Sequence[str]) -> list[str]:
    """Policy names as given; raises ValueError for an unknown one."""
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise ValueError(f"policy {unknown[0]!r}: choose one of {', '.join(POLICIES)}")
    return list(names)


def policy_settings(name: str) -> dict[str, Any]:
    """What a benchmark's policy sets in an `EngineConfig`: a policy, and what else is to be switched on.

    `drex+run-ahead`, `drex+lossless` and `drex+adaptive` are `drex` with that. Raises ValueError for an unknown name.
    """
    policy, *further = name.split("+")
    check_policies([policy])
    settings: dict[str, Any] = {"policy": policy}
    for each in further:
        if policy != "drex" or each not in VARIANTS:
            known = ", ".join(f"drex+{variant}" for variant in VARIANTS)
            raise ValueError(f"policy {name!r}: choose one of {', '.join(POLICIES)}, {known}")
        settings |= VARIANTS[each]
    return settings


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def per_exit(thresholds: float | Sequence[float], count: int) -> tuple[float, ...]:
    """Thresholds, one for each of so many exits; raises ValueError where they are not one, nor as many."""
    values = tuple(thresholds) if isinstance(thresholds, Sequence) else (thresholds,) * count
    if len(values) != count:
        raise ValueError(f"thresholds {list(values)}: give one number, or one for each of {count} exits")
    return values


def resolve_exits(asked: EarlyExit | None, recorded: EarlyExitFile | None, num_layers: int) -> ExitPlan:
    """Combine what the user asked for with what `early_exit.json` says.

    Args:
        asked: None takes the file as it is, or full depth where there is none.
        recorded: the file's content, or None.
        num_layers: of the decoder.

    Raises:
        ValueError: exits outside the model, or thresholds that nobody gave.
    """
    if asked is None:
        asked = EarlyExit() if recorded is not None else EarlyExit.off()
    kv_fill = asked.kv_fill or (recorded.kv_fill if recorded else "recompute")
    criterion = asked.criterion or (recorded.criterion if recorded else "max_prob")
    schedule, patience = asked.schedule or "constant", asked.patience or 2
    if not asked.enabled:
        return ExitPlan((), ExitRule(criterion, (), schedule, patience), kv_fill)
    known = {spec.layer: spec for spec in recorded.exits} if recorded else {}
    layers = tuple(asked.layers) if asked.layers is not None else tuple(known)
    if not layers and num_layers == 1:
        raise ValueError("the model has one layer, so it can't exit early: leave out early-exit settings")
    if not layers:
        raise ValueError(
            "no exit points: the model has no early_exit.json, so name them, as in "
            "EarlyExit(layers=[8], thresholds=0.8) or --exits 8 --thresholds 0.8, or turn early exit off"
        )
    check_exit_layers(list(layers), num_layers)
    if asked.thresholds is not None:
        thresholds = per_exit(asked.thresholds, len(layers))
    elif recorded is not None and set(layers) <= set(known):
        of_layer = dict(zip(known, recorded.thresholds, strict=True))
        thresholds = tuple(of_layer[layer] for layer in layers)
    else:
        raise ValueError(f"no thresholds for exits after layers {list(layers)}: give one number, or one an exit")
    exits = tuple(known.get(layer, ExitSpec(layer)) for layer in layers)
    usable = tuple(t if layer >= asked.min_layer else None for layer, t in zip(layers, thresholds, strict=True))
    return ExitPlan(exits, ExitRule(criterion, usable, schedule, patience), kv_fill)


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and policy of an engine; None is replaced by `resolve`.

    Args:
        max_model_len: tokens a request may have, prompt and output together.
        max_num_seqs: requests in flight.
        max_num_batched_tokens: rows a pass may have; longer prompts are chunked.
        kv_cache_tokens: tokens for which the K/V pool has slots at every layer.
        max_fill_rows: rows that exited and still owe K/V, over all requests; beyond, they are filled. By default 8 a
            request in flight, and at least 256.
        max_wait_passes: a row waits in the rebatching buffer for at most this many passes.
        max_slowdown: bound on how much longer than at full depth a request may take, as a factor; None: no bound.
        adaptive: stop checking exits while that does not pay; output then depends on load.
        run_ahead: whether a request goes on from what an exit point says without being sure: `off`; `trusted`, which
            gives the same tokens as early exit; or `lossless`, which gives those of full depth, whatever exits say.
        max_draft: open rows that a request may have under run-ahead.
        policy: `drex` (rebatching), `split` (flush at once), `full` (no exits), or one of the baselines to compare
            with: `art`, `consensus`, `majority`, `greedy`, `latency_only`.
    """

    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_tokens: int | None = None
    max_fill_rows: int | None = None
    max_wait_passes: int = 32
    max_slowdown: float | None = None
    adaptive: bool = False
    run_ahead: str = "off"
    max_draft: int = 4
    policy: str = "drex"

    def __post_init__(self) -> None:
        sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_fill_rows", "max_wait_passes")
        for name in (*sizes, "max_draft"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.kv_cache_tokens is not None and self.kv_cache_tokens < 2:
            raise ValueError(
                f"kv_cache_tokens is {self.kv_cache_tokens}: give at least 2, a prompt token and its answer"
            )
        if self.max_slowdown is not None and not self.max_slowdown >= 1:
            raise ValueError(f"max_slowdown is {self.max_slowdown}: give a factor from 1 on, or None")
        check_run_ahead(self.run_ahead)
        check_policies([self.policy])

    @property
    def fill_rows(self) -> int:
        """Fills that may be owed, over all requests."""
        default = max(FILL_ROWS, FILL_ROWS_A_REQUEST * self.max_num_seqs)
        return default if self.max_fill_rows is None else self.max_fill_rows

    @property
    def arena_rows(self) -> int:
        """Hidden states the arena holds: one pass's rows, a live row a request, and the owed fills."""
        return self.max_num_batched_tokens + self.max_num_seqs + self.fill_rows
