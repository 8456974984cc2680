"""Early-exit settings: what a user asks for, and the exit points and rule that it resolves to for one model.

All frozen; resolving returns a new object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from drex.config.early_exit_json import (
    KV_FILLS,
    EarlyExitFile,
    ExitSpec,
    check_exit_layers,
    check_threshold,
)
from drex.errors import SettingError
from drex.extensions import CRITERIA

SCHEDULES = ("constant", "calm_paper", "calm_code")


@dataclass(frozen=True)
class EarlyExit:
    """Early-exit settings; None means what `early_exit.json` says (or, for one request, what the engine has).

    Args:
        layers: for an engine, the exit points as counts of layers executed (heads: `shared`, unless
            `early_exit.json` describes one for that layer); for a request, the exits it may take.
        criterion: `max_prob`, `margin`, `entropy`, `state`, `patience`, `probe`, `trace`, or one that
            `drex.register_criterion` was given.
        criterion_parameters: of the criterion, by name.
        thresholds: one number for all exits, or one for each of `layers`; confidence >= threshold exits.
        kv_fill: what later tokens see at skipped layers: `recompute`, `project`, `alias` or `mask`; engine-wide.
        schedule: of the threshold over output positions: `constant`, or CALM's decay (Schuster et al. 2022)
            as in the paper, `calm_paper`, clip(0.9 t + 0.1 exp(-4 i / max_tokens)), or as in its code, `calm_code`,
            t (0.9 + 0.1 exp(-4 i / max_tokens)).
        patience: the parameter of that name of the criterion `patience`: how many agreeing exits in a row make
            confidence 1.
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
    criterion_parameters: Mapping[str, Any] | None = None
    min_layer: int = 0
    enabled: bool = True

    @classmethod
    def off(cls) -> EarlyExit:
        """Full depth for every token."""
        return cls(enabled=False)

    def __post_init__(self) -> None:
        if self.layers is not None:
            if not isinstance(self.layers, list | tuple) or not all(_whole(layer) for layer in self.layers):
                raise SettingError("layers", f"layers {self.layers!r}: give a list of layer counts")
            object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.thresholds, list | tuple):
            object.__setattr__(self, "thresholds", tuple(map(check_threshold, self.thresholds)))
        elif self.thresholds is not None:
            object.__setattr__(self, "thresholds", check_threshold(self.thresholds))
        if self.criterion is not None:
            CRITERIA.check(self.criterion)
        if self.criterion_parameters is not None and not isinstance(self.criterion_parameters, Mapping):
            raise SettingError(
                "criterion_parameters", f"criterion_parameters {self.criterion_parameters!r}: map names to values"
            )
        for value, choices, name in (
            (self.kv_fill, KV_FILLS, "kv_fill"),
            (self.schedule, SCHEDULES, "schedule"),
        ):
            if value is not None and value not in choices:
                raise SettingError(name, f"{name} {value!r}: choose one of {', '.join(choices)}")
        if self.patience is not None and not (_whole(self.patience) and self.patience >= 1):
            raise SettingError("patience", f"patience {self.patience!r}: give at least 1 agreeing exit")
        if not (_whole(self.min_layer) and self.min_layer >= 0):
            raise SettingError("min_layer", f"min_layer {self.min_layer!r}: give a count of layers from 0 on")
        if not isinstance(self.enabled, bool):
            raise SettingError("enabled", f"enabled {self.enabled!r}: give true or false")

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
    parameters: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def measure(self) -> Any:
        """The criterion, a `drex.compute.criteria.Criterion`; raises ValueError for parameters that it refuses."""
        given = dict(self.parameters)
        if self.criterion == "patience":
            given.setdefault("patience", self.patience)
        return CRITERIA.make(self.criterion, given)

    @cached_property
    def criterion_key(self) -> str:
        """The same for rules whose criteria are equal."""
        return f"{self.criterion} {self.measure!r}"

    @cached_property
    def counts_agreement(self) -> bool:
        """Whether the criterion goes by how many exits agree."""
        return "agreeing" in self.measure.needs

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
            raise SettingError(
                "early_exit",
                f"early_exit.kv_fill: the engine serves {self.kv_fill!r} for all requests; leave it out of the request",
            )
        if not request.enabled:
            return replace(self.rule, thresholds=(None,) * len(self.exits))
        allowed = self.layers if request.layers is None else tuple(request.layers)
        missing = sorted(set(allowed) - set(self.layers))
        if missing:
            raise SettingError(
                "early_exit", f"early_exit.layers {missing}: the engine has exits after layers {list(self.layers)}"
            )
        base = dict(zip(self.layers, self.rule.thresholds, strict=True))
        if request.thresholds is not None:
            base.update(zip(allowed, per_exit(request.thresholds, len(allowed)), strict=True))
        thresholds = tuple(
            base[layer] if layer in allowed and layer >= request.min_layer else None for layer in self.layers
        )
        inherited = request.criterion in (None, self.rule.criterion) and request.criterion_parameters is None
        rule = ExitRule(
            criterion=request.criterion or self.rule.criterion,
            thresholds=thresholds,
            schedule=request.schedule or self.rule.schedule,
            patience=request.patience or self.rule.patience,
            parameters=self.rule.parameters if inherited else _pairs(request.criterion_parameters),
        )
        assert rule.measure is not None  # parameters are checked
        return rule


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pairs(parameters: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((parameters or {}).items()))


def per_exit(thresholds: float | Sequence[float], count: int) -> tuple[float, ...]:
    """Thresholds, one for each of so many exits; raises ValueError where they are not one, nor as many."""
    values = tuple(thresholds) if isinstance(thresholds, Sequence) else (thresholds,) * count
    if len(values) != count:
        raise SettingError(
            "thresholds", f"thresholds {list(values)}: give one number, or one for each of {count} exits"
        )
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
    given = asked.criterion_parameters
    if given is None and recorded is not None and criterion == recorded.criterion:
        given = recorded.criterion_parameters
    rule = ExitRule(criterion, (), asked.schedule or "constant", asked.patience or 2, _pairs(given))
    assert rule.measure is not None  # parameters are checked
    if not asked.enabled:
        return ExitPlan((), rule, kv_fill)
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
        raise SettingError(
            "thresholds", f"no thresholds for exits after layers {list(layers)}: give one number, or one an exit"
        )
    exits = tuple(known.get(layer, ExitSpec(layer)) for layer in layers)
    usable = tuple(t if layer >= asked.min_layer else None for layer, t in zip(layers, thresholds, strict=True))
    return ExitPlan(exits, replace(rule, thresholds=usable), kv_fill)
