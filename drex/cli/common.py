"""What the subcommands share: options, and what their texts mean."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from drex.config import EarlyExit
from drex.config.early_exit_json import Thresholds, check_threshold

EXIT_LAYERS_HELP = "Exit points: comma-separated counts of layers executed, as in 4,8."

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hugging Face folder or hub id; without it the bundled model.")
]
ExitsOption = Annotated[str | None, typer.Option("--exits", help=EXIT_LAYERS_HELP)]
ThresholdsOption = Annotated[
    str | None, typer.Option("--thresholds", help="Confidence at which a token exits: one number, or one an exit.")
]
SweepOption = Annotated[
    str | None, typer.Option("--sweep", help="Compare several thresholds, each for all exits, as in 0.5,0.7,0.9.")
]
CriterionOption = Annotated[
    str | None,
    typer.Option(
        "--criterion",
        help="max_prob, margin, entropy, state, patience, probe, trace, or one of an installed package.",
    ),
]
CriterionParametersOption = Annotated[
    str | None, typer.Option("--criterion-parameters", help="Of the criterion, as JSON: '{\"patience\": 3}'.")
]
PolicyParametersOption = Annotated[
    str | None, typer.Option("--policy-parameters", help="Of the policy, as JSON: '{\"age_factor\": 0.1}'.")
]
KvFillOption = Annotated[
    str | None, typer.Option("--kv-fill", help="K/V of skipped layers: recompute, project, alias or mask.")
]
PolicyOption = Annotated[str, typer.Option("--policy", help="drex, split, full, or one of an installed package.")]
RunAheadOption = Annotated[
    str,
    typer.Option("--run-ahead", help="Draft on while waiting: off, trusted, or lossless (full depth's own tokens)."),
]
GenerationConfigOption = Annotated[
    str,
    typer.Option(
        "--generation-config",
        help="Sampling defaults: auto (the model's generation_config.json), none, or a folder with such a file.",
    ),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16 or float64.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option("--max-model-len", help="Tokens a request may have, prompt and output; none: the model's."),
]
RateOption = Annotated[float | None, typer.Option("--rate", help="Open loop: Poisson arrivals a second.")]
TraceOption = Annotated[
    Path | None, typer.Option("--trace", help="Open loop: arrivals and lengths of a recorded trace.")
]
TraceScaleOption = Annotated[float, typer.Option("--trace-scale", help="Factor on the trace's lengths.")]
TraceSpeedOption = Annotated[float, typer.Option("--trace-speed", help="Factor on the trace's rate of arrivals.")]
TpotOption = Annotated[float | None, typer.Option("--tpot-ms", help="Target of every request: mean time a token.")]
MaxSlowdownOption = Annotated[
    float | None, typer.Option("--max-slowdown", help="Bound on time against full depth, as a factor.")
]
AdaptiveOption = Annotated[bool, typer.Option("--adaptive", help="Stop checking exits while that does not pay.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the report here.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Write the report as a page with charts.")]


def early_exit_from(
    exits: str | None,
    thresholds: str | None,
    criterion: str | None,
    kv_fill: str | None,
    full_depth: bool = False,
    criterion_parameters: str | None = None,
) -> EarlyExit | None:
    """The settings that the options name; None leaves everything to `early_exit.json`."""
    named = exits or thresholds or criterion or kv_fill or criterion_parameters
    if full_depth:
        if named:
            raise ValueError("--full-depth goes without --exits, --thresholds, --criterion and --kv-fill")
        return EarlyExit.off()
    if not named:
        return None
    numbers = None if thresholds is None else parse_floats(thresholds, "--thresholds")
    return EarlyExit(
        layers=None if exits is None else parse_ints(exits, "--exits"),
        thresholds=numbers[0] if numbers is not None and len(numbers) == 1 else numbers,
        criterion=criterion,
        criterion_parameters=parse_parameters(criterion_parameters, "--criterion-parameters"),
        kv_fill=kv_fill,
    )


def parse_parameters(text: str | None, option: str) -> dict[str, Any] | None:
    """Names and values from JSON; None where the option was not given.

    Raises:
        ValueError: no JSON object.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} {text!r} is not JSON ({error}): give an object, as in '{{\"k\": 3}}'") from error
    if not isinstance(found, dict):
        raise ValueError(f"{option} {text!r}: give a JSON object, as in '{{\"k\": 3}}'")
    return found


def sweep_from(thresholds: str | None, sweep: str | None, default: Sequence[float]) -> list[Thresholds]:
    """What a command that compares thresholds compares: the one setting of --thresholds, or those of --sweep.

    Args:
        thresholds: text of --thresholds: one number, or one an exit.
        sweep: text of --sweep: numbers, each for all exits.
        default: the sweep where neither is given.

    Raises:
        ValueError: both were given, or what is no threshold.
    """
    if thresholds is not None and sweep is not None:
        raise ValueError("--thresholds is one setting and --sweep compares several: give one of them")
    if thresholds is None:
        return [check_threshold(each) for each in (default if sweep is None else parse_floats(sweep, "--sweep"))]
    numbers = tuple(map(check_threshold, parse_floats(thresholds, "--thresholds")))
    return [numbers if len(numbers) > 1 else numbers[0]]


@contextmanager
def hinting_at_sweep() -> Iterator[None]:
    """Name --sweep where there are not as many --thresholds as exit points: they may have been meant to be compared."""
    try:
        yield
    except ValueError as error:
        hint = "; to compare several, --sweep" if str(error).startswith("thresholds [") else ""
        raise ValueError(f"{error}{hint}") from error


def parse_ints(text: str, option: str, least: int | None = None) -> tuple[int, ...]:
    """'4,8' -> (4, 8); raises ValueError naming the option, for a number below `least` too."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r}: give whole numbers separated by commas, as in 4,8") from None
    if least is not None and min(found) < least:
        raise ValueError(f"{option} {text!r}: give whole numbers from {least} on")
    return found


def parse_floats(text: str, option: str) -> tuple[float, ...]:
    """'0.5,0.7' -> (0.5, 0.7); raises ValueError naming the option."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r}: give numbers separated by commas, as in 0.5,0.7") from None


def check_at_least(least: float, **given: float | None) -> None:
    """Raise ValueError for the first number that is below `least`, or none at all.

    Args:
        least: the smallest that is good.
        given: numbers by their options, as in `output_tokens` for --output-tokens; None was not given.
    """
    for name, value in given.items():
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{_option(name)} is {value}: give a number from {least} on")


def check_above_zero(**given: float | None) -> None:
    """Raise ValueError for the first number, named as in `check_at_least`, that is not above 0 and finite."""
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{_option(name)} is {value}: give a number above 0")


def check_choice(option: str, value: str, known: Collection[str]) -> None:
    """Raise ValueError for a value that is not among those known, naming these."""
    if value not in known:
        raise ValueError(f"{option} {value!r}: choose one of {', '.join(known)}")


def check_share(**given: float | None) -> None:
    """Raise ValueError for the first number, named as in `check_at_least`, that is no share from 0 to 1."""
    for name, value in given.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{_option(name)} is {value}: give a share from 0 to 1")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
