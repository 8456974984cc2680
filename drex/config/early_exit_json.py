"""`early_exit.json`: the early-exit facts that lie beside an ordinary checkpoint. Schema: docs/early_exit_json.md.

No torch here: control code and tools read these facts without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drex.extensions import CRITERIA
from drex.text_files import read_text

EARLY_EXIT_FILE = "early_exit.json"
EXIT_WEIGHTS_FILE = "early_exit/heads.safetensors"
"""In a folder of its own: vLLM and SGLang read every safetensors file that lies beside the model's, and refuse it."""
VERSION = 1

HEAD_KINDS = ("shared", "norm", "linear", "mlp")
KV_FILLS = ("recompute", "project", "alias", "mask")
Thresholds = float | tuple[float, ...]
"""One for all exit points, or one for each."""


@dataclass(frozen=True)
class ExitSpec:
    """One exit point: after how many layers, with which head, whose own weights are in which file of the folder."""

    layer: int
    head: str = "shared"
    weights: str | None = None


@dataclass(frozen=True)
class EarlyExitFile:
    """The content of `early_exit.json`. `guarantee` is what `drex calibrate` recorded, or None."""

    exits: tuple[ExitSpec, ...]
    criterion: str = "max_prob"
    thresholds: tuple[float, ...] = ()
    kv_fill: str = "recompute"
    guarantee: dict[str, Any] | None = None
    criterion_parameters: Mapping[str, Any] = field(default_factory=dict)


def write_early_exit(folder: str | Path, facts: EarlyExitFile) -> None:
    """Write `early_exit.json` into `folder`; one that is there is replaced whole, and where it is a link, the link.

    Raises:
        ValueError: a folder that can't be written to.
    """
    content = {"version": VERSION, **asdict(facts)}
    if not facts.criterion_parameters:
        del content["criterion_parameters"]
    part = Path(folder) / f"{EARLY_EXIT_FILE}.{os.getpid()}.part"
    try:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, Path(folder) / EARLY_EXIT_FILE)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"cannot write {EARLY_EXIT_FILE} to {folder} ({error.strerror}): copy the folder") from error


def read_early_exit(folder: str | Path, num_layers: int) -> EarlyExitFile | None:
    """Read and validate `early_exit.json`; None where the folder has none.

    Args:
        folder: of the checkpoint.
        num_layers: of its decoder; exits must lie before the last layer.

    Raises:
        ValueError: naming the file, the field and what it takes.
    """
    path = Path(folder) / EARLY_EXIT_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); mend it, or remove it and name the exits") from error
    try:
        return _parse(content, num_layers, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(content: Any, num_layers: int, folder: Path) -> EarlyExitFile:
    if not isinstance(content, dict):
        raise ValueError("expected a JSON object")
    if content.get("version") != VERSION:
        raise ValueError(f"version {content.get('version')!r}: this drex reads version {VERSION}")
    _only(content, {"version", "exits", "criterion", "criterion_parameters", "thresholds", "kv_fill", "guarantee"}, "")
    raw_exits = content.get("exits")
    if not isinstance(raw_exits, list) or not raw_exits:
        raise ValueError('"exits" must be a non-empty list of {"layer", "head", "weights"}')
    exits = tuple(_parse_exit(raw, folder) for raw in raw_exits)
    check_exit_layers([spec.layer for spec in exits], num_layers)
    criterion = _one_of(content.get("criterion", "max_prob"), CRITERIA.names(), "criterion")
    parameters = content.get("criterion_parameters", {})
    if not isinstance(parameters, dict):
        raise ValueError('"criterion_parameters" must be an object')
    kv_fill = _one_of(content.get("kv_fill", "recompute"), KV_FILLS, "kv_fill")
    raw_thresholds = content.get("thresholds")
    if not isinstance(raw_thresholds, list) or len(raw_thresholds) != len(exits):
        raise ValueError(f'"thresholds" must be a list with one number for each of the {len(exits)} exits')
    guarantee = content.get("guarantee")
    if guarantee is not None and not isinstance(guarantee, dict):
        raise ValueError('"guarantee" must be an object or null')
    thresholds = tuple(check_threshold(value) for value in raw_thresholds)
    return EarlyExitFile(exits, criterion, thresholds, kv_fill, guarantee, parameters)


def _parse_exit(raw: Any, folder: Path) -> ExitSpec:
    if not isinstance(raw, dict):
        raise ValueError(f'an entry of "exits" must be an object, got {raw!r}')
    _only(raw, {"layer", "head", "weights"}, "exits: ")
    layer, weights = raw.get("layer"), raw.get("weights")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ValueError(f'"layer" must be a whole number, got {layer!r}')
    head = _one_of(raw.get("head", "shared"), HEAD_KINDS, "head")
    if head != "shared" and not isinstance(weights, str):
        raise ValueError(f'exit after layer {layer}: a {head!r} head needs "weights", the name of its safetensors file')
    if weights is not None:
        inside = isinstance(weights, str) and not Path(weights).is_absolute() and ".." not in Path(weights).parts
        if not inside:
            raise ValueError(f'exit after layer {layer}: "weights" must be the name of a file in the model\'s folder')
        if not (folder / weights).is_file():
            raise ValueError(f"exit after layer {layer}: the weight file {weights!r} is missing from the folder")
    return ExitSpec(layer, head, weights)


def check_exit_layers(layers: list[int], num_layers: int) -> None:
    """Raise ValueError unless `layers` ascend and lie in [1, num_layers - 1]."""
    if num_layers == 1 and layers:
        raise ValueError(
            f"exit after layer {layers[0]}: the model has one layer, so it can't exit early; name no exits"
        )
    for layer in layers:
        if not 1 <= layer < num_layers:
            raise ValueError(
                f"exit after layer {layer}: the model has {num_layers} layers, so exits lie in 1..{num_layers - 1}"
            )
    if layers != sorted(set(layers)):
        raise ValueError(f"exit layers {layers}: must be ascending and distinct")


def check_threshold(value: Any) -> float:
    """A finite number >= 0; above 1 it can't be reached, which turns the exit off."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        raise ValueError(f"threshold {value!r}: give a number from 0 on (above 1 the exit is never taken)")
    return float(value)


def spell_thresholds(thresholds: Thresholds) -> str:
    """Thresholds as their option takes them: 0.7, or 0.6,0.7."""
    values = thresholds if isinstance(thresholds, tuple) else (thresholds,)
    return ",".join(f"{value:g}" for value in values)


def _one_of(value: Any, choices: tuple[str, ...], field: str) -> str:
    if value not in choices:
        raise ValueError(f'"{field}" is {value!r}: choose one of {", ".join(choices)}')
    assert isinstance(value, str)
    return value


def _only(content: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(content) - known)
    if unknown:
        raise ValueError(f"{where}unknown field {', '.join(map(repr, unknown))}; known: {', '.join(sorted(known))}")
